"""Gradients of every loss shared with TRL, on the same weights and tokens: how far apart they are.

Per weight, the largest difference over the largest entry of TRL's gradient; the worst weight
counts. Both sides are float32, run the code that the other benchmarks time, and nothing is timed.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import world
from benchmarks.harness import Result, Settings, Side, fresh
from benchmarks.peer import NEEDS
from benchmarks.report import disagreement, machine
from w2s_jax.errors import UserError

# name -> (kind of training, what TRL is told, what ours is told)
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SFT": ("sft", {}, {}),
    "DPO sigmoid": ("dpo", {}, {"live": True}),
    "DPO sigmoid, reference once": (
        "dpo",
        {"precompute_ref_log_probs": True},
        {"live": False},
    ),
    "DPO sigmoid_norm": (
        "dpo",
        {"loss_type": ["sigmoid_norm"]},
        {"live": False, "length_mean": True},
    ),
    "KD forward KL": ("kd", {"beta": 0.0}, {"beta": 0.0}),
    "KD JSD": ("kd", {"beta": 0.5}, {"beta": 0.5}),
    "KD reverse KL": ("kd", {"beta": 1.0}, {"beta": 1.0}),
}
THEIRS = {"sft": "sft", "dpo": "dpo", "kd": "gkd"}
SECOND = {"sft": "", "dpo": "reference", "kd": "teacher"}


def run(settings: Settings) -> dict[str, Any]:
    """One batch of four examples per loss; the losses themselves must agree too."""
    shape = settings.size(replace(world.Shape(), vocab=settings.vocab), quick=world.TINY)
    task = world.Task(4, shape.vocab, settings.size(world.Lengths(), tiny=world.SHORT))
    found: dict[str, dict[str, Any]] = {}
    with world.exported(shape, "model", "other") as (model, other):
        for name, (kind, theirs, mine) in LOSSES.items():
            second = {SECOND[kind]: other} if SECOND[kind] else {}
            common = {"folder": model, "check": False, **second, **task.options()}
            theirs = common | theirs | {"threads": settings.threads}
            with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
                files = {"TRL": f"{root}/theirs.safetensors", "ours": f"{root}/ours"}
                trl, our = f"benchmarks.peer:{THEIRS[kind]}", f"benchmarks.ours:{kind}"
                sides = [
                    Side("TRL", trl, theirs | {"out": files["TRL"]}, NEEDS),
                    Side("ours", our, common | mine | {"out": files["ours"]}),
                ]
                results = fresh(sides, replace(settings, blocks=1))
                found[name] = compared(results, files)
            print(f"{name:28} " + "  ".join(f"{k} {v}" for k, v in found[name].items()))
    known = {name: line["worst"] for name, line in found.items() if "worst" in line}
    worst = max(known, key=lambda name: known[name], default=None)
    told = {"benchmark": "B12", "worst": known.get(worst or ""), "against": worst}
    of = "largest difference over largest entry of a weight's gradient"
    return told | {"of": of, "losses": found} | task.facts(shape) | machine(settings)


def compared(results: list[Result], files: dict[str, str]) -> dict[str, Any]:
    """How far the two gradients are apart, or why there is nothing to compare.

    Raises:
      UserError: the losses differ, or the gradients have different names.
    """
    failed = [result.error for result in results if result.error]
    if failed or len(results) < 2:
        return {"failed": failed[0] if failed else "one side was not asked for"}
    if fault := disagreement(results, {"loss0": 1e-3}):
        raise UserError(fault)
    from safetensors.numpy import load_file

    theirs = load_file(files["TRL"])
    mine: dict[str, np.ndarray] = {}
    for path in Path(files["ours"]).glob("*.safetensors"):
        mine |= load_file(path)
    if set(mine) != set(theirs):
        raise UserError(f"gradients of different weights: {sorted(set(mine) ^ set(theirs))[:4]}")
    apart = {name: difference(mine[name], theirs[name]) for name in theirs}
    worst = max(apart, key=lambda name: apart[name])
    whole = [np.concatenate([side[name].ravel() for name in theirs]) for side in (mine, theirs)]
    norm = np.linalg.norm(whole[0] - whole[1]) / np.linalg.norm(whole[1])
    figures = {"worst": apart[worst], "norm": float(norm), "loss": results[1].info["loss0"]}
    return {name: float(f"{value:.3g}") for name, value in figures.items()} | {"weight": worst}


def difference(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest entry of ``theirs``."""
    return float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-30))
