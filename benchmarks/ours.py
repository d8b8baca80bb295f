"""Our sides: ``fit`` on the exported weights, taking turns inside its evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.turn import Turn, memory


def load(folder: str, **options: Any):
    """The decoder and its weights; the exported folders have no tokenizer."""
    import dataclasses

    from w2s_jax.mesh import compilation_cache
    from w2s_jax.models import hf, weights
    from w2s_jax.models.transformer import transformer

    compilation_cache()
    model = transformer(dataclasses.replace(hf.read_config(folder), **options))
    return model, weights.read(Path(folder), model)


def sft(
    turn: Turn, folder: str, data: dict[str, Any], batch: int, steps: int, drop: int = 3
) -> None:
    """Supervised fine-tuning of the completions, one padded row per example."""
    from w2s_jax.objectives import language

    rows = world.rows(**data | {"lengths": world.Lengths(**data["lengths"])})
    model, params = load(folder)
    table = padded(rows)
    train(turn, language(model), params, model.axes, table, batch, steps, drop, units=len(rows))


def padded(rows: list[dict[str, list[int]]], multiple: int = 32):
    """Prompt and completion in rows of one length, the loss on the completion."""
    import numpy as np

    from w2s_jax.types import Table

    longest = max(len(row["prompt"]) + len(row["completion"]) for row in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    tokens, segment = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        ids = row["prompt"] + row["completion"]
        tokens[i, : len(ids)], segment[i, : len(ids)] = ids, 1
        mask[i, len(row["prompt"]) : len(ids)] = 1
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape) * (segment > 0)
    return Table(
        {"tokens": tokens, "segment": segment, "position": position.astype(np.int32), "mask": mask}
    )


def train(
    turn: Turn,
    objective: Any,
    params: Any,
    axes: Any,
    table: Any,
    batch: int,
    steps: int,
    drop: int,
    *,
    units: float,
    frozen: Any = (),
    info: dict[str, float] | None = None,
    begin: float | None = None,
) -> None:
    """``fit``, stopped every ``steps`` updates to wait for its turn.

    Args:
      units: examples in the whole table, so that a block's share of an epoch counts them.
      drop: updates before the first turn; 0 skips ``loss0`` too.
    """
    import jax

    from w2s_jax.train.fit import fit
    from w2s_jax.train.optim import Tune

    idle = memory("VmRSS")
    info = dict(info or {})
    if drop:
        info["loss0"] = loss(objective, params, table, batch, frozen)
    begun = False
    rows = sum(map(len, table)) if isinstance(table, list) else len(table)

    def gate(state: Any) -> dict[str, float]:
        nonlocal begun
        jax.block_until_ready(state.params)
        if int(state.step) == steps and begin is not None:
            info["first_step"] = time.perf_counter() - begin
        if int(state.step) < max(drop, 1):
            return {}
        if begun:
            turn.done(units=units * steps * batch / rows)
        else:
            turn.ready(**info, idle=idle)
        begun = True
        if turn.wait() is None:
            raise SystemExit(0)
        return {}

    tune = Tune(lr=world.LR, batch=batch, steps=10_000_000, clip=world.CLIP)
    how = {"axes": axes, "frozen": frozen, "evaluate": gate, "eval_every": steps}
    fit(objective, params, table, tune, jax.random.key(0), progress=False, **how)


def loss(objective: Any, params: Any, table: Any, batch: int, frozen: Any = ()) -> float:
    """Mean loss over the data, by the objective that is trained."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from w2s_jax.types import State

    @jax.jit
    def look(params: Any, frozen: Any, rows: Any):
        zero = jnp.zeros((), jnp.int32)
        state = State(zero, zero + 1, params, (), frozen)
        return objective(params, state, rows, jax.random.key(0))[:2]

    total = weight = 0.0
    for part in table if isinstance(table, list) else [table]:
        for start in range(0, len(part), batch):
            index = np.arange(start, min(start + batch, len(part)))
            one, count = look(params, frozen, part.batch(index))
            total, weight = total + float(one), weight + float(count)
    return total / weight
