"""Which rows every update sees, and their way to the devices ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.train.log import real_tokens
from w2s_jax.types import Batch, Table

Seed = int | tuple[int, ...]

SHAPES = 4  # compiled programs of one run
_TURNS, _TABLE = 0x7465726E, 0x7461626C  # tell the random streams of a list of tables apart


def order(seed: Seed, rows: int, batch: int, step: int) -> np.ndarray:
    """Row indices [batch] int64 of update ``step``: a pure function, so resuming needs no replay.

    Every epoch is a fresh Philox permutation of the table and batches are cut from the endless
    line of epochs: no row is dropped, no batch is short, and a batch may end one epoch and begin
    the next.
    """
    epoch, at = divmod(step * batch, rows)
    if at + batch <= rows:
        return _permutation(seed, rows, epoch)[at : at + batch]
    place = np.arange(step * batch, (step + 1) * batch)
    epochs = place // rows
    index = np.empty(batch, np.int64)
    for one in range(epoch, int(epochs[-1]) + 1):
        here = epochs == one
        index[here] = _permutation(seed, rows, one)[place[here] % rows]
    return index


def turn(seed: Seed, sizes: Sequence[int], batch: int, step: int) -> tuple[int, np.ndarray]:
    """The table that update ``step`` draws from and the row indices [batch] there; pure.

    Per epoch, table i of ``sizes[i]`` rows has ceil(sizes[i] / batch) turns, and all turns of the
    epoch are in random order. The rows of a table come from a line of permutations of its own
    (``order``). With one table this is ``order``.
    """
    if len(sizes) == 1:
        return 0, order(seed, sizes[0], batch, step)
    words = (seed,) if isinstance(seed, int) else seed
    turns = [-(-size // batch) for size in sizes]
    epoch, at = divmod(step, sum(turns))
    line, rank = _line(words, tuple(turns), epoch)
    table = int(line[at])
    before = epoch * turns[table] + int(rank[at])
    return table, order((*words, _TABLE, table), sizes[table], batch, before)


@lru_cache(maxsize=8)
def _permutation(seed: Seed, rows: int, epoch: int) -> np.ndarray:
    entropy = (seed,) if isinstance(seed, int) else seed
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*entropy, epoch])))
    return generator.permutation(rows)


@lru_cache(maxsize=2)
def _line(words: tuple[int, ...], turns: tuple[int, ...], epoch: int) -> tuple[Any, Any]:
    """The tables in the order of their turns in ``epoch``, and how many had the turn before."""
    shuffled = _permutation((*words, _TURNS), sum(turns), epoch)
    line = np.repeat(np.arange(len(turns)), turns)[shuffled]
    rank = np.empty(len(line), np.int64)
    for table, count in enumerate(turns):
        rank[line == table] = np.arange(count)
    return line, rank


class Feed:
    """Batches of a run on the devices, ``ahead`` of them prepared before their use.

    Columns in memory are gathered between two updates, while the devices work; with stored columns
    (memory-mapped, Arrow, ArrayRecord) a thread reads. Each process gathers only its own rows.

    Raises:
      UserError: no rows, more than four shapes of tables, a batch that does not divide over the
        mesh.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        seed: Seed,
        batch: int,
        mesh: jax.sharding.Mesh | None,
        steps: int,
        ahead: int = 2,
    ) -> None:
        self.tables, self.size, self.mesh = tables, batch, mesh
        self.steps, self.ahead = steps, ahead
        self.mine = meshes.batch_rows(mesh, batch)
        self.turn = partial(turn, seed, [len(table) for table in tables], batch)
        self.tokens: dict[int, int] = {}
        self.ready: deque[tuple[int, Batch | Future]] = deque()
        _refuse(tables)
        stored = any(_stored(table) for table in tables)
        self.reader = ThreadPoolExecutor(1, "feed") if stored else None

    def rows(self, step: int) -> tuple[Batch, np.ndarray, str]:
        """Host batch of update ``step``, its row numbers, and a name for the table if several."""
        table, rows = self.turn(step)
        name = f"table {table}" if len(self.tables) > 1 else ""
        return self.tables[table].batch(rows), rows, name

    def take(self, step: int) -> Batch:
        """The batch of ``step``, ready or not."""
        while self.ready and self.ready[0][0] < step:
            self.ready.popleft()
        if not self.ready or self.ready[0][0] != step:
            self.ready.clear()
            return self._make(step)
        batch = self.ready.popleft()[1]
        return batch.result() if isinstance(batch, Future) else batch

    def prepare(self, step: int) -> None:
        """See to it that the batches of ``step`` and the updates after it are on their way."""
        first = self.ready[-1][0] + 1 if self.ready else step
        for later in range(first, min(step + self.ahead, self.steps)):
            read = self.reader
            batch = self._make(later) if read is None else read.submit(self._make, later)
            self.ready.append((later, batch))

    def close(self) -> None:
        """Stop reading."""
        self.ready.clear()
        if self.reader is not None:
            self.reader.shutdown(cancel_futures=True)

    def _make(self, step: int) -> Batch:
        table, rows = self.turn(step)
        batch = self.tables[table].batch(rows[self.mine])
        self.tokens[step] = real_tokens(batch) * self.size // len(self.mine)
        if self.mesh is None and jax.default_backend() == "cpu":
            return batch  # it is where it will be read: placing it would take longer than gathering
        return meshes.put_batch(batch, self.mesh, self.size)


def _refuse(tables: Sequence[Table]) -> None:
    if not tables or not all(len(table) for table in tables):
        raise UserError("cannot train on an empty table")
    shapes = {str(jax.tree.map(np.shape, table.batch([0]))) for table in tables}
    if len(shapes) > SHAPES:
        raise UserError(
            f"{len(tables)} tables have {len(shapes)} different shapes, each a program to compile; "
            f"pad them to at most {SHAPES}"
        )


def _stored(table: Table) -> bool:
    leaves = jax.tree.leaves(dict(table.columns))
    return any(isinstance(x, np.memmap) or not isinstance(x, np.ndarray | list) for x in leaves)
