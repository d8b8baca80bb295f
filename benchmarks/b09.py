"""Start to first step with a warm cache: from starting the process to the end of one SFT update.

Both sides are a new process per block that imports what it needs, reads the rows and the model,
and trains one update; they have run before on the machine, so that files are in the page cache and
ours finds its compiled program on disk. Ours reports besides how long `import w2s_jax` with all
that training needs takes, and the update.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, fresh
from benchmarks.report import report
from benchmarks.turn import Turn

NEEDS = ("torch", "transformers", "datasets", "trl")
COUNT, BATCH = 64, 4


def run(settings: Settings) -> dict[str, Any]:
    """TRL's SFTTrainer and ours, at their second start."""
    shape = world.shape(settings)
    with world.exported(shape, "policy") as (folder,), tempfile.TemporaryDirectory() as cache:
        lengths = settings.size(world.Lengths(), tiny=world.SHORT)
        data = {"count": COUNT, "vocab": shape.vocab, "lengths": asdict(lengths)}
        rows = f"{cache}/rows.json"
        with open(rows, "w", encoding="utf-8") as file:
            json.dump(world.rows(**data | {"lengths": lengths}), file)
        common = {"folder": folder, "rows": rows}
        theirs = common | {"threads": settings.threads, "vocab": shape.vocab}
        env = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/xla"}
        sides = [
            Side("TRL SFT", "benchmarks.b09:trl", theirs, NEEDS),
            Side("ours", "benchmarks.b09:ours", common, env=env),
        ]
        cold = fresh(sides, replace(settings, blocks=1))
        first = {r.side.name: r.rows[0]["total"] for r in cold if r.rows}
        results = fresh(sides, settings)
    mine = [row for r in results if r.side.name == "ours" for row in r.rows]
    facts = {name: sorted(row[name] for row in mine)[len(mine) // 2] for name in PARTS if mine}
    facts |= {"first_start": first, "batch": BATCH}
    return report("B9", results, settings, unit="starts", keys=("total", "cpu"), **facts)


PARTS = ("imports", "data", "update")


def ours(turn: Turn, folder: str, rows: str) -> None:
    """``fit`` until its first update is done."""
    began = time.perf_counter()
    import jax

    from benchmarks.ours import load, packed
    from w2s_jax.objectives import language
    from w2s_jax.train.fit import fit
    from w2s_jax.train.optim import Tune
    from w2s_jax.types import State

    imported = time.perf_counter()
    with open(rows, encoding="utf-8") as file:
        tables = packed(json.load(file), BATCH)
    model, params = load(folder)
    ready = time.perf_counter()

    def gate(state: State) -> dict[str, float]:
        jax.block_until_ready(state.params)
        if int(state.step):
            now = time.perf_counter()
            turn.ready(imports=imported - began, data=ready - imported, update=now - ready)
            os._exit(0)
        return {}

    tune = Tune(lr=world.LR, batch=1, steps=100, clip=world.CLIP)
    how = {"axes": model.axes, "evaluate": gate, "eval_every": 1, "progress": False}
    fit(language(model), params, tables, tune, jax.random.key(0), **how)


def trl(turn: Turn, folder: str, rows: str, threads: int, vocab: int) -> None:
    """``SFTTrainer.train`` until its first update is done."""
    from benchmarks import peer

    peer._torch(threads)
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Gate(TrainerCallback):
        """Says when the first update is done."""

        def on_step_end(self, args, state, control, **_: Any) -> None:
            """It ends the process."""
            turn.ready(step=state.global_step)
            os._exit(0)

    with open(rows, encoding="utf-8") as file:
        data = peer._dataset([peer._labelled(row) for row in json.load(file)])
    flags = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    SFTTrainer(
        model=peer._model(folder),
        args=SFTConfig(**peer._arguments(BATCH), **flags),
        train_dataset=data,
        processing_class=peer._tokenizer(vocab),
        callbacks=[Gate()],
    ).train()
