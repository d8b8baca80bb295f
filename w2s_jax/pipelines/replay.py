"""DistiLLM's adaptive use of a student's own answers (Ko et al. 2024, arXiv 2402.03898, section 3).

Answers cost more than an update on them and, early on, teach what the student will never say
again. So their share grows only when the validation loss on given text has risen, and answers of
earlier weights are used again. Which rows an update sees follows the released code (``finetune.py``
with a decreasing replay ratio): with u uniform in [0, 1), the threshold f, progress r,

    u < f (1 - r)   the student answers the prompts of the batch; its answers are kept, too
    u < f           answers are drawn from those kept; while there is room for more, it answers
    else            the rows as they are given
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.generate.inside import respond
from w2s_jax.pipelines.reinforce import Trained, program
from w2s_jax.train.feed import order
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.step import start
from w2s_jax.types import Array, Model, Objective, Params, Row, Table, Tree

_COIN = 0x636F696E  # tells the coins of a run from its order of rows


@dataclass(frozen=True)
class Threshold:
    """``share`` of updates on own answers, and the validation loss (nats) it was last raised at."""

    share: float
    loss: float

    def after(self, loss: float, *, margin: float = 0.1, step: float = 0.1) -> Threshold:
        """The threshold after a validation: higher by ``step``, at most 1, if the loss is
        ``margin`` or more above the one remembered, which only then becomes the new one."""
        if loss < self.loss + margin:
            return self
        return Threshold(min(1.0, self.share + step), loss)


def source(coin: float, share: float, progress: float, full: bool) -> str:
    """Where an update's rows come from: "asked", "kept" or "given" (see the module).

    Args:
      coin: uniform in [0, 1).
      full: whether no more answers can be kept.
    """
    if coin >= share:
        return "given"
    return "kept" if full and coin >= share * (1 - progress) else "asked"


def keep(kept: Table | None, new: Table, capacity: int) -> Table:
    """The last ``capacity`` rows of those kept and the new ones after them."""
    if kept is not None:
        columns = {
            name: jax.tree.map(lambda a, b: np.concatenate([a, b]), kept[name], new[name])
            for name in new.columns
        }
        new = Table(columns)
    return new.take(np.arange(len(new))[-capacity:])


def replayed(
    objective: Objective,
    model: Model,
    params: Params,
    table: Table,
    tune: Tune,
    key: Array,
    *,
    validate: Callable[[Params], float],
    every: int,
    tokens: int,
    eos: int | Sequence[int] = (),
    share: float = 0.0,
    margin: float = 0.1,
    capacity: int = 1000,
    axes: Tree = None,
    frozen: Tree = (),
    mesh: jax.sharding.Mesh | None = None,
    note: Callable[[Row], None] | None = None,
    **how: Any,
) -> Trained:
    """Updates on given rows, on the student's answers and on kept answers, as losses ask for.

    Args:
      objective: of one update, whatever its rows: ``distill`` with a live teacher in ``frozen``.
      model: the student, as ``params`` are its weights.
      table: rows for ``objective`` that have, besides, the prompts ``asked`` (``inside.ask``).
      validate: the validation loss of weights, nats per token of given text. It must not keep them.
      every: updates between validations; the first is before the first update.
      tokens, eos, how: see ``generate.inside.respond``.
      share, margin: where the threshold begins; the rise of the loss that raises it.
      capacity: answers that are kept, the newest.
      mesh: where to train, of one process.
      note: is told the row of each validation.

    Returns:
      The weights and a row per validation, before the first update, after every ``every`` and at
      the end: ``step``, ``validation``, ``threshold`` from there on, the number of updates so far
      that were ``asked``, ``kept`` and ``given``, and the metrics of the last.

    Raises:
      UserError: no column ``asked``; a capacity below the batch; a loss that is not finite;
        several processes.
    """
    _refuse(table, tune, every, capacity)
    seed = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
    asking, training = jax.random.split(key)
    steps = tune.total(len(table))
    tx = optimizer(tune, steps, axes)
    update = program(objective, tx, tune.micro)
    answer = jax.jit(partial(respond, model, tokens=tokens, eos=eos, **how))
    place = partial(meshes.put_batch, mesh=mesh, size=tune.batch)
    given, kept, last = table.without("asked"), None, {}
    counts: dict[str, int] = dict.fromkeys(("asked", "kept", "given"), 0)
    history: list[Row] = []

    def look(step: int, loss: float, threshold: Threshold) -> None:
        history.append(_row(step, loss, threshold, counts, last))
        if note is not None:
            note(history[-1])

    with meshes.rules_context(mesh):
        state = start(jax.tree.map(jnp.copy, params), tx, steps)
        threshold = Threshold(share, float(validate(state.params)))
        look(0, threshold.loss, threshold)
        for number in range(steps):
            dice = np.random.default_rng((*seed, _COIN, number))
            full = kept is not None and len(kept) == capacity
            where = source(dice.random(), threshold.share, number / steps, full)
            rows, using = order(seed, len(table), tune.batch, number), given
            if where == "asked":
                prompts = place(table.batch(rows)["asked"])
                said = answer(state.params, prompts, jax.random.fold_in(asking, number))
                using = Table(jax.device_get({name: said[name] for name in ("tokens", "targets")}))
                kept, rows = keep(kept, using, capacity), np.arange(tune.batch)
            elif where == "kept" and kept is not None:
                rows, using = dice.choice(len(kept), tune.batch, replace=False), kept
            counts[where] += 1
            state, last = update(state, frozen, place(using.batch(rows)), training)
            done = number + 1
            if done % every == 0 or done == steps:
                loss = float(validate(state.params))
                threshold = threshold.after(loss, margin=margin)
                look(done, loss, threshold)
    return Trained(state.params, history)


def _row(
    step: int, loss: float, threshold: Threshold, counts: dict[str, int], last: dict[str, Any]
) -> Row:
    said = {name: float(value) for name, value in last.items()}
    if not all(map(math.isfinite, (loss, said.get("loss", 0.0)))):
        raise UserError(
            f"replayed: at update {step} the validation loss is {loss} and that of the update "
            f"{said.get('loss')}; lower lr"
        )
    return {"step": step, "validation": loss, "threshold": threshold.share, **counts, **said}


def _refuse(table: Table, tune: Tune, every: int, capacity: int) -> None:
    if "asked" not in table:
        raise UserError(
            "replayed: the student answers the column 'asked' (generate.inside.ask), the table has "
            f"{sorted(table.columns)}"
        )
    if capacity < tune.batch or every < 1:
        raise UserError(
            f"replayed: capacity ({capacity}) must be at least the batch of {tune.batch}, and "
            f"every ({every}) at least 1"
        )
    if jax.process_count() > 1:
        raise UserError("replayed: answers are kept on one host; run it in one process")
