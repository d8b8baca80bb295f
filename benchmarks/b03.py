"""DPO with each side's defaults: ours on packed pairs with the reference as a column.

TRL keeps the reference in every step by default and can compute it once; ours computes it once.
``charged`` adds that pass over the data to one epoch of training, on whichever side makes it.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import world
from benchmarks.harness import Result, Settings, Side, alternate
from benchmarks.peer import NEEDS
from benchmarks.report import report


def run(settings: Settings) -> dict[str, Any]:
    """TRL as it is, with the reference computed once, and that with a tuned allocator."""
    shape, task = world.shape(settings), world.task(settings)
    with world.exported(shape, "policy", "reference") as (policy, reference):
        common = {"folder": policy, "reference": reference} | task.options()
        theirs = common | {"threads": settings.threads}
        once = theirs | {"precompute_ref_log_probs": True}
        sides = [
            Side("TRL", "benchmarks.peer:dpo", theirs, NEEDS),
            Side("TRL precomputed", "benchmarks.peer:dpo", once, NEEDS),
            Side("TRL precomputed tuned", "benchmarks.peer:dpo", once, NEEDS, tuned=True),
            Side("ours", "benchmarks.ours:dpo", common | {"live": False}),
        ]
        results = alternate(sides, settings, steps=task.steps)
    facts = task.facts(shape, paired=True)
    line = report("B3", results, settings, unit="pairs", agree={"loss0": 1e-3}, **facts)
    return line | {"charged": charged(results)}


def charged(results: list[Result]) -> dict[str, dict[str, float]]:
    """Ratio to ours of the seconds for one epoch and, where it is made, the pass before it."""
    took: dict[str, dict[str, float]] = {}
    for result in results:
        if not result.error:
            took[result.side.name] = {
                key: statistics.median(row[key] for row in result.rows)
                + result.info.get(f"reference_{key}", 0.0)
                + result.info.get(f"pack_{key}", 0.0)
                for key in ("cpu", "wall")
            }
    mine = took.pop("ours", None)
    if mine is None:
        return {}
    found = {
        name: {key: round(value / mine[key], 3) for key, value in theirs.items()}
        for name, theirs in took.items()
    }
    for name, ratios in found.items():
        print(f"{name:28} reference pass charged: cpu x{ratios['cpu']}, wall x{ratios['wall']}")
    return found
