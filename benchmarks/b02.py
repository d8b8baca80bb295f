"""DPO with the reference model in every step, against TRL's DPOTrainer as it is."""

from __future__ import annotations

from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.peer import NEEDS
from benchmarks.report import report


def run(settings: Settings) -> dict[str, Any]:
    """The reference differs from the policy, so that the losses that must agree are not ln 2."""
    shape, task = world.shape(settings), world.task(settings)
    with world.exported(shape, "policy", "reference") as (policy, reference):
        common = {"folder": policy, "reference": reference} | task.options()
        theirs = common | {"threads": settings.threads}
        sides = [
            Side("TRL", "benchmarks.peer:dpo", theirs, NEEDS),
            Side("TRL tuned", "benchmarks.peer:dpo", theirs, NEEDS, tuned=True),
            Side("ours", "benchmarks.ours:dpo", common | {"live": True}),
        ]
        results = alternate(sides, settings, steps=task.steps)
    facts = task.facts(shape, paired=True)
    return report("B2", results, settings, unit="pairs", agree={"loss0": 1e-3}, **facts)
