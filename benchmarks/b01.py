"""SFT: a step of fine-tuning on completions, against TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate, call
from benchmarks.peer import NEEDS
from benchmarks.report import report

BATCH = 4


def run(settings: Settings) -> dict[str, Any]:
    """TRL as it is, with padding-free batches, with a tuned allocator; a block is one epoch."""
    shape = settings.size(replace(world.Shape(), vocab=settings.vocab), tiny=world.TINY)
    lengths = settings.size(world.Lengths(), tiny=world.SHORT)
    count = settings.size(16, quick=8, tiny=4)
    data = {"count": count, "vocab": shape.vocab, "lengths": asdict(lengths)}
    with tempfile.TemporaryDirectory() as folder:
        policy = f"{folder}/policy"
        call("benchmarks.world:export", folders={policy: 0}, shape=asdict(shape))
        common = {"folder": policy, "data": data, "batch": BATCH}
        theirs = common | {"threads": settings.threads}
        free = theirs | {"padding_free": True}
        steps = count // BATCH
        sides = [
            Side("TRL", "benchmarks.peer:sft", theirs, NEEDS),
            Side("TRL tuned", "benchmarks.peer:sft", theirs, NEEDS, tuned=True),
            Side("TRL tuned padding-free", "benchmarks.peer:sft", free, NEEDS, tuned=True),
            Side("ours", "benchmarks.ours:sft", common | {"steps": steps}),
        ]
        results = alternate(sides, settings, steps=steps)
    facts = {"data": world.describe(world.rows(count, shape.vocab, lengths)), **asdict(shape)}
    note = "in TRL 1.16 loss_type chunked_nll is an alias of nll: both are the default"
    agree = {"loss0": 1e-3}
    return report(
        "B1", results, settings, unit="rows", agree=agree, batch=BATCH, note=note, model=facts
    )
