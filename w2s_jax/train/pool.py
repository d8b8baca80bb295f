"""The data of many runs on the device, every distinct column, order and choice of rows once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from w2s_jax.train.fit import order
from w2s_jax.types import COLUMNS, Table, Tree


def arguments(
    tables: Sequence[Table], rows: np.ndarray, seeds: Sequence[int], batch: int, steps: int
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """What the S runs share, ``[U, ...]`` per leaf, and each run's number [S] in it.

    Shared: ``order`` [U, steps, batch] places in a run's rows, as ``fit`` draws them; ``rows``
    [U, n] rows of its table; ``pools``, a tree of columns [U, N, ...]. Each run has besides its
    ``key`` [S, 2], the data of ``jax.random.key(seed)``.

    Args:
      rows: [S, n], or [1, n] where all runs train on the same rows.
    """
    numbers = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
    words = _words(list(numbers))
    orders = [_order(tuple(map(int, w)), rows.shape[1], batch, steps) for w in words]
    kept, place = rows, np.zeros(1, np.int32)
    if len(rows) > 1:
        kept, place = np.unique(rows, axis=0, return_inverse=True)
    batches = [device_columns(table) for table in tables]
    tree = jax.tree.structure(batches[0])
    pools = [_pool(leaves) for leaves in zip(*map(jax.tree.leaves, batches), strict=True)]
    shared = {
        "order": np.stack(orders),
        "rows": kept.astype(np.int32),
        "pools": jax.tree.unflatten(tree, [pool for pool, _ in pools]),
    }
    which = np.array([numbers[seed] for seed in seeds], np.int32)
    each = {
        "key": words[which],
        "order": which,
        "rows": np.broadcast_to(place.reshape(-1), which.shape).astype(np.int32),
        "pools": jax.tree.unflatten(tree, [number for _, number in pools]),
    }
    return shared, each


def _words(seeds: Sequence[int]) -> np.ndarray:
    """The data [S, 2] of ``jax.random.key(seed)``; small seeds by one call."""
    if min(seeds) >= 0 and max(seeds) < 2**31:
        return np.asarray(jax.random.key_data(_keys(np.asarray(seeds, np.int32))))
    return np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])


_keys = jax.jit(jax.vmap(jax.random.key))


def _order(seed: tuple[int, ...], rows: int, batch: int, steps: int) -> np.ndarray:
    """``order`` of all updates [steps, batch] int32: whole epochs, cut."""
    epochs = range(-(-steps * batch // rows))
    line = np.concatenate([order(seed, rows, rows, epoch) for epoch in epochs])
    return line[: steps * batch].reshape(steps, batch).astype(np.int32)


def device_columns(table: Table) -> dict[str, Any]:
    """What may reach a device, as it is stored: the same array stays the same object."""
    return {k: v for k, v in table.columns.items() if k in COLUMNS and k != "truth"}


def _pool(columns: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The different columns among ``columns`` [S] as [U, N, ...], and each one's number [S]."""
    numbers: dict[int, int] = {}
    entries: list[np.ndarray] = []
    digests: dict[bytes, int] = {}
    for column in columns:
        if id(column) in numbers:
            continue
        array = np.ascontiguousarray(column[np.arange(len(column))])
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
        numbers[id(column)] = digests.setdefault(digest, len(entries))
        if numbers[id(column)] == len(entries):
            entries.append(array)
    return np.stack(entries), np.array([numbers[id(column)] for column in columns], np.int32)
