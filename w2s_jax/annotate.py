"""Run a frozen model over a table once and keep what it says as a column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Batch, Model, Params, Table, Tree, forward


def predict(fn: Callable[[Params, Batch], Tree], params: Params, table: Table, *, batch: int = 256):
    """``fn(params, batch)`` over all rows, on the host: a tree of arrays ``[N, ...]``.

    The last batch is padded by repeating its last row, so the program compiles once.

    Raises:
      UserError: the table is empty.
    """
    if len(table) == 0:
        raise UserError("cannot annotate an empty table")
    size = min(batch, len(table))
    program, parts = jax.jit(fn), []
    for begin in range(0, len(table), size):
        index = np.minimum(np.arange(begin, begin + size), len(table) - 1)
        kept = min(size, len(table) - begin)
        out = program(params, table.batch(index))
        parts.append(jax.tree.map(lambda leaf, kept=kept: leaf[:kept], out))
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *parts)


def annotate(
    fn: Callable[[Params, Batch], Any],
    params: Params,
    table: Table,
    column: str,
    *,
    batch: int = 256,
    cache: Path | None = None,
) -> Table:
    """The table with ``column`` added (or replaced) by ``fn(params, batch)``.

    ``cache`` is a ``.npy`` file: read when it exists, written (atomically) when not. Name it by the
    content hashes of weights and rows; nothing else makes a stored column trustworthy.
    """
    if cache is not None and cache.exists():
        values = np.load(cache)
    else:
        values = predict(fn, params, table, batch=batch)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial_file = cache.with_suffix(".partial.npy")
            np.save(partial_file, values)
            partial_file.replace(cache)
    if len(values) != len(table):
        raise UserError(f"{cache}: holds {len(values)} rows for a table of {len(table)}; delete it")
    return table.with_columns(**{column: values})


def probabilities(model: Model) -> Callable[[Params, Batch], Tree]:
    """``fn(params, batch) -> [B,C] float32`` class probabilities, for ``annotate``."""
    return lambda params, batch: jax.nn.softmax(forward(model, params, batch).logits)
