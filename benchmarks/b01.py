"""SFT: a step of fine-tuning on completions, against TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.peer import NEEDS
from benchmarks.report import report

NOTE = "in TRL 1.16 loss_type chunked_nll is an alias of nll, the default: one row stands for both"


def run(settings: Settings) -> dict[str, Any]:
    """TRL as it is, with a tuned allocator, and with padding-free batches too."""
    shape, task = world.shape(settings), world.task(settings)
    with world.exported(shape, "policy") as (policy,):
        common = {"folder": policy} | task.options()
        theirs = common | {"threads": settings.threads}
        free = theirs | {"padding_free": True}
        sides = [
            Side("TRL", "benchmarks.peer:sft", theirs, NEEDS),
            Side("TRL tuned", "benchmarks.peer:sft", theirs, NEEDS, tuned=True),
            Side("TRL tuned padding-free", "benchmarks.peer:sft", free, NEEDS, tuned=True),
            Side("ours", "benchmarks.ours:sft", common),
        ]
        results = alternate(sides, settings, steps=task.steps)
    facts = task.facts(shape) | {"note": NOTE}
    return report("B1", results, settings, unit="rows", agree={"loss0": 1e-3}, **facts)
