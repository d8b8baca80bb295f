"""A tiny teacher and its tables, shared by the tests of stored teachers and their child process."""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from w2s_jax import columns
from w2s_jax.data import shards
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.types import Table

V, T, N, K = 23, 9, 7, 4
MODEL = transformer(Config(vocab=V, width=16, layers=1, heads=2, max_length=16))


def params(seed: int = 0):
    return MODEL.init(jax.random.key(seed))


def padded_table(seed: int = 0) -> Table:
    """Rows with a prompt that is not trained on and padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (N, T)).astype(np.int32)
    mask = np.zeros((N, T), np.float32)
    for row in range(N):
        mask[row, 2 + row % 3 : 5 + row % 4] = 1 + row
    return Table({"tokens": tokens, "mask": mask})


def targets_table(seed: int = 0) -> Table:
    """The same predictions as targets at a static size, some in the middle of weight 0."""
    table = padded_table(seed)
    shape, most = table["mask"].shape, 6
    at, ids = np.zeros((shape[0], most), np.int32), np.zeros((shape[0], most), np.int32)
    mask = np.zeros((shape[0], most), np.float32)
    for row in range(shape[0]):
        places = np.flatnonzero(table["mask"][row])
        slots = np.sort(np.random.default_rng(row).choice(most, len(places), replace=False))
        at[row, slots], ids[row, slots] = places - 1, table["tokens"][row, places]
        mask[row, slots] = table["mask"][row, places]
    targets = {"at": at, "ids": ids, "mask": mask, "of": np.zeros_like(at)}
    return Table({"tokens": table["tokens"], "targets": targets})


def main(folder: str) -> None:
    """Store the teacher, a second of rest after each shard so that a kill finds it half-done."""
    put = shards.Shards.put

    def slow(self, number, *rest, **notes):
        put(self, number, *rest, **notes)
        print(number, flush=True)
        time.sleep(1)

    shards.Shards.put = slow
    columns.add_teacher(
        MODEL, params(), padded_table(), K, Path(folder), shard=2, batch=2, progress=False
    )


if __name__ == "__main__":
    main(sys.argv[1])
