"""DPO on ragged lengths (lognormal, mean 180, at most 1,024), in real tokens: packed or padded."""

from __future__ import annotations

from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.peer import NEEDS
from benchmarks.report import report


def run(settings: Settings) -> dict[str, Any]:
    """Both sides with the reference computed once; a token counts once per response it serves."""
    shape = world.shape(settings)
    count = settings.size(64, quick=32, tiny=8)
    lengths = settings.size(world.RAGGED, tiny=world.SHORT)
    task = world.Task(count, shape.vocab, lengths)
    with world.exported(shape, "policy", "reference") as (policy, reference):
        common = {"folder": policy, "reference": reference} | task.options()
        theirs = common | {"threads": settings.threads, "precompute_ref_log_probs": True}
        sides = [
            Side("TRL precomputed", "benchmarks.peer:dpo", theirs, NEEDS),
            Side("TRL precomputed tuned", "benchmarks.peer:dpo", theirs, NEEDS, tuned=True),
            Side("ours", "benchmarks.ours:dpo", common | {"live": False}),
        ]
        results = alternate(sides, settings, steps=task.steps)
    facts = task.facts(shape, paired=True)
    each = facts["data"]["tokens"] / count  # both sides count pairs; the data say how many tokens
    for result in results:
        for row in result.rows:
            row["units"] *= each
    return report("B4", results, settings, unit="tokens", agree={"loss0": 1e-3}, **facts)
