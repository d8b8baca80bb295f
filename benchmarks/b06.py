"""Distillation with a stored top-32 teacher, against TRL's with the teacher in every step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.ours import Clock, Run, load, loss, packed
from benchmarks.peer import NEEDS
from benchmarks.report import report
from benchmarks.turn import Turn

TIMES = 4  # most weights of the teacher over the student's
TOP = 32


def weights(shape: world.Shape) -> int:
    """Numbers in the matrices of a model."""
    attention = 2 * shape.width**2 * (1 + shape.kv_heads / shape.heads)
    return round(
        shape.layers * (attention + 3 * shape.width * shape.ffn) + shape.vocab * shape.width
    )


def larger(shape: world.Shape) -> world.Shape:
    """The widest model of as many layers with at most ``TIMES`` times the weights."""
    factors = (shape.times(factor / 16) for factor in range(16, 16 * TIMES**2 + 1))
    wider = (made for made in factors if made.width >= shape.width)
    fits = [made for made in wider if weights(made) <= TIMES * weights(shape)]
    return max(fits, key=weights)


def run(settings: Settings) -> dict[str, Any]:
    """Forward KL on the same tokens; the teacher's one pass over them is reported, not charged."""
    shape, task = world.shape(settings), world.task(settings)
    large = larger(shape)
    with world.exported(shape, "student") as (small,), world.exported(large, "teacher") as (big,):
        common = {"folder": small, "teacher": big} | task.options()
        theirs = common | {"beta": 0.0, "threads": settings.threads}
        sides = [
            Side("TRL", "benchmarks.peer:gkd", theirs, NEEDS),
            Side("TRL tuned", "benchmarks.peer:gkd", theirs, NEEDS, tuned=True),
            Side("ours", "benchmarks.b06:stored", common | {"k": min(TOP, shape.vocab)}),
        ]
        results = alternate(sides, settings, steps=task.steps)
    for result in results:  # what must agree is the divergence from the whole teacher
        if "whole0" in result.info:
            result.info["loss0_top"] = result.info.pop("loss0")
            result.info["loss0"] = result.info.pop("whole0")
    facts = task.facts(shape) | {"teacher": vars(large), "top": TOP}
    facts |= {"teacher_over_student": round(weights(large) / weights(shape), 2)}
    return report("B6", results, settings, unit="rows", agree={"loss0": 1e-3}, **facts)


def stored(
    turn: Turn,
    folder: str,
    teacher: str,
    data: dict[str, Any],
    batch: int,
    k: int,
    drop: int = 3,
) -> None:
    """Our side: the teacher runs once over the data, then ``fit`` reads its column from disk.
    The ``batch`` examples of an update are packed into one row.

    Says the seconds of that pass (``teacher_cpu``, ``teacher_wall``), the bytes per prediction,
    and ``whole0``, the divergence from the whole teacher before the first update.
    """
    from w2s_jax.columns import add_teacher
    from w2s_jax.losses.distillation import forward_kl
    from w2s_jax.losses.sparse import top_k
    from w2s_jax.objectives import distill

    rows = world.rows(**data | {"lengths": world.Lengths(**data["lengths"])})
    model, params = load(folder)
    large, frozen = load(teacher)
    parts = packed(rows, batch)
    whole = distill(model, forward_kl, teacher=large)
    info = {"whole0": loss(whole, params, parts, 1, {"teacher": frozen})}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        for name in ("compiles", "counts"):
            clock = Clock()
            made = add_teacher(large, frozen, parts, k, Path(root) / name, progress=False)
            info |= clock.said("teacher")
        size = sum(path.stat().st_size for path in Path(root, "counts").glob("*/*.npy"))
        predictions = sum(int((part["targets"]["mask"] > 0).sum()) for part in parts)
        info["bytes_per_prediction"] = size / predictions
        del frozen
        run = Run(turn, 1, drop, units=len(rows), info=info)
        run.train(distill(model, top_k), params, model, made)
