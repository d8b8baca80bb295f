"""Peak memory above the idle process at a vocabulary of 151,936: SFT, DPO, KD, against TRL.

Idle is the resident set once the packages are imported and the models loaded; the peak is the
kernel's high-water mark after four updates. Every contender is a process of its own, one at a time,
with the default allocator. Our programs come from the compilation cache, as in every start but the
first; ``first_mb`` is what a start that has to compile needs.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, fresh
from benchmarks.peer import NEEDS
from benchmarks.report import report, several
from w2s_jax.errors import UserError

VOCAB = 151_936


def run(settings: Settings) -> dict[str, Any]:
    """``share`` is ours over theirs; the ratio, as everywhere, theirs over ours."""
    shape = settings.size(replace(world.Shape(), vocab=VOCAB), tiny=world.TINY)
    task = replace(world.task(settings, count=16, quick=16), vocab=shape.vocab)
    settings = replace(settings, blocks=settings.blocks or settings.size(3, quick=1))
    found = {}
    with world.exported(shape, "model", "teacher") as (model, teacher):
        for name, sides in cases(model, teacher, task, settings.threads).items():
            print(name)
            with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
                env = {"JAX_COMPILATION_CACHE_DIR": cache}
                mine = replace(sides[-1], env=env)
                first = fresh([mine], replace(settings, blocks=1, sides=""))
                results = fresh([*sides[:-1], mine], settings)
            for row in (row for result in [*first, *results] for row in result.rows):
                row["above_mb"] = (row["peak"] - row["idle"]) / 2**20
            if first[0].error:
                raise UserError(first[0].error)
            line = report("B7", results, settings, unit="run", keys=("above_mb",))
            share = {"share": round(1 / line["ratio"], 3)} if line["ratio"] else {}
            found[name] = line | share | {"first_mb": round(first[0].rows[0]["above_mb"])}
    return several(found) | task.facts(shape)


def cases(model: str, teacher: str, task: world.Task, threads: int) -> dict[str, list[Side]]:
    """The contenders of each kind of training; our side is the last."""
    common = {"folder": model, **task.options(), "check": False, "drop": 4}
    theirs = common | {"threads": threads}
    pair, taught = {"reference": ""}, {"teacher": teacher, "beta": 0.5}
    once = theirs | pair | {"precompute_ref_log_probs": True}
    return {
        "SFT": [
            Side("TRL", "benchmarks.peer:sft", theirs, NEEDS),
            Side("ours", "benchmarks.ours:sft", common),
        ],
        "DPO": [
            Side("TRL", "benchmarks.peer:dpo", theirs | pair, NEEDS),
            Side("TRL precomputed", "benchmarks.peer:dpo", once, NEEDS),
            Side("ours", "benchmarks.ours:dpo", common | pair | {"live": False}),
        ],
        "KD": [
            Side("TRL", "benchmarks.peer:gkd", theirs | taught, NEEDS),
            Side("ours", "benchmarks.ours:kd", common | taught),
        ],
    }
