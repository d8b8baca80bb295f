"""Run a frozen model over a table once and keep what it says as a column."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax import workdir
from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_logps
from w2s_jax.types import Batch, Model, Params, Table, Tree, forward

log = logging.getLogger("w2s_jax")


def predict(
    fn: Callable[[Params, Batch], Tree],
    params: Params,
    table: Table,
    *,
    batch: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """``fn(params, batch)`` over all rows, on the host: a tree of arrays ``[N, ...]``.

    The last batch is padded by repeating its last row, so the program compiles once. A batch holds
    what ``Table.batch`` gives: never ``truth``. With a mesh the rows of a batch, rounded up to
    what divides, are spread over it (``params`` are there already), and every process of a
    multi-host job gets all results.

    Raises:
      UserError: the table is empty.
    """
    if len(table) == 0:
        raise UserError("cannot annotate an empty table")
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)
    size = -(-min(batch, len(table)) // ways) * ways
    mine = meshes.batch_rows(mesh, size)
    params = jax.tree.map(jnp.asarray, params)  # to the device once, not once a batch
    program, parts = jax.jit(fn), []
    with meshes.rules_context(mesh):
        for begin in range(0, len(table), size):
            index = np.minimum(np.arange(begin, begin + size), len(table) - 1)
            rows = meshes.put_batch(table.batch(index[mine]), mesh, size)
            parts.append(_fetch(program(params, rows)))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[: len(table)], whole)


def _fetch(tree: Tree) -> Tree:
    """A result on the host, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def annotate(
    fn: Callable[[Params, Batch], Tree],
    params: Params,
    table: Table,
    column: str,
    *,
    batch: int = 256,
    cache: Path | None = None,
) -> Table:
    """The table with ``column`` added (or replaced) by ``fn(params, batch)``.

    ``fn`` gives an array ``[B, ...]``, or a dict of such for a nested column. ``cache`` is a
    folder: read when it holds the column, written (atomically) when not. Name it by the content
    hashes of weights and rows; nothing else makes a stored column trustworthy.

    Raises:
      UserError: the table is empty, or the cache holds another number of rows.
    """

    def make() -> Tree:
        return predict(fn, params, table, batch=batch)

    if cache is None:
        return table.with_columns(**{column: make()})
    values = workdir.cached(cache, make, log.warning, jax.process_index() == 0)
    rows = len(jax.tree.leaves(values)[0])
    if rows != len(table):
        raise UserError(f"{cache}: holds {rows} rows for a table of {len(table)}; delete it")
    return table.with_columns(**{column: values})


def probabilities(model: Model) -> Callable[[Params, Batch], Tree]:
    """``fn(params, batch) -> [B,C] float32`` class probabilities, for ``annotate``."""
    return lambda params, batch: jax.nn.softmax(forward(model, params, batch).logits)


def surprise(model: Model) -> Callable[[Params, Batch], Tree]:
    """``fn(params, batch) -> {"nll", "tokens"}``, both [B] float32, for ``predict``: the summed
    negative log-likelihood (nats) of the masked tokens and the sum of their weights."""

    def say(params: Params, batch: Batch) -> Tree:
        output, mask = forward(model, params, batch), batch["mask"][:, 1:]
        logps = token_logps(output.hidden[:, :-1], output.unembed, batch["tokens"][:, 1:], mask)
        return {"nll": -(logps * mask).sum(-1), "tokens": mask.sum(-1)}

    return say
