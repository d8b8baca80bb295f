"""Several documents in one row: packing without waste and without leaking between documents.

The loss-weight convention of the whole project is fixed here: ``mask[t]`` weights predicting
``tokens[t]`` from the tokens before it *in the same document* (the same ``segment`` of a row), so
the first token of a document, which nothing precedes, always has mask 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Table

Document = tuple[Any, Any]  # (token ids [T], loss weights [T] or None for "all but the first")


@dataclass(frozen=True)
class Fill:
    """How full packed rows are: counts, and the share of positions that hold a real token."""

    rows: int
    documents: int
    tokens: int
    trained: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.documents} documents in {self.rows} rows, {self.tokens} tokens "
            f"({self.trained} trained on), {self.share:.1%} full"
        )


def pack(
    documents: Iterable[Document], length: int, *, on_long: str = "error", window: int = 8192
) -> Table:
    """Pack documents into rows of ``length`` tokens, each document whole and in one row.

    Args:
      documents: pairs (ids [T] int, weights [T] float or None). ``weights[t]`` weights predicting
        ``ids[t]``; None means 1 everywhere. The weight of a document's first token is set to 0.
      length: tokens in a row.
      on_long: what to do with a document longer than ``length``: "error", or "split" into pieces
        that overlap by one token, so that every target is still predicted exactly once.
      window: documents looked at together; each window is placed longest first, into the fullest
        open row that still has room. The result depends on the input alone.

    Returns:
      A table with ``tokens``, ``segment`` (1, 2, ... in a row; 0 is padding), ``position`` (from 0
      in each document), all int32 [N, length], and ``mask`` float32 [N, length].

    Raises:
      UserError: no documents, an empty document, weights of another length, or a document longer
        than ``length`` under on_long="error".
    """
    if on_long not in ("error", "split"):
        raise UserError(f"pack: on_long must be 'error' or 'split', got {on_long!r}")
    if length < 2:
        raise UserError(f"pack: length must be at least 2, got {length}")
    ids, weights, sizes = _flatten(list(documents))
    starts = np.cumsum(sizes) - sizes
    if sizes.max() > length:
        if on_long == "error":
            worst = int(sizes.argmax())
            raise UserError(
                f"document {worst} has {sizes[worst]} tokens, more than the row length {length}: "
                "raise the length, drop the document, or pass on_long='split'"
            )
        starts, sizes = _split(starts, sizes, length)
    row, offset, segment = _place(sizes, length, window)
    return _fill_rows(ids, weights, starts, sizes, row, offset, segment, length)


def pack_evenly(
    documents: Iterable[Document], per_row: int, *, classes: int = 4, multiple: int = 16
) -> list[Table]:
    """Pack ``per_row`` documents to a row, long beside short, in at most ``classes`` tables.

    For fine-tuning, where an update is a number of examples: every row has as many of them, those
    of a table are of similar length, and nothing is spent on prompts or padding. The tables have
    the columns of ``pack``, and ``targets`` and ``rows`` (see ``with_targets``, ``with_rows``).

    Raises:
      UserError: see ``pack``; a row of documents on which nothing is trained.
    """
    if min(per_row, classes, multiple) < 1:
        raise UserError("pack_evenly: per_row, classes and multiple must be at least 1")
    ids, weights, sizes = _flatten(list(documents))
    starts = np.cumsum(sizes) - sizes
    trained = np.add.reduceat(weights > 0, starts)
    ceiling = -(-sizes // multiple) * multiple
    tables = []
    for index in length_classes(ceiling, classes, least=8 * per_row, power=2):
        source = balanced(sizes[index], np.maximum(trained[index], 1), per_row)
        row, slot = np.nonzero(source >= 0)
        which = index[source[row, slot]]
        taken = np.where(source >= 0, sizes[index][source], 0)
        offset = (np.cumsum(taken, axis=1) - taken)[row, slot]
        length = -(-int(taken.sum(1).max()) // multiple) * multiple
        placed = (starts[which], sizes[which], row, offset, (slot + 1).astype(np.int32))
        packed = _fill_rows(ids, weights, *placed, length)
        tables.append(with_rows(with_targets(packed, multiple=multiple), multiple=multiple))
    return tables


def balanced(tokens: np.ndarray, scored: np.ndarray, per_row: int) -> np.ndarray:
    """Examples [n, per_row] of each row (-1: none): the longest left goes to the emptiest row.

    A row is as full as its share of the tokens or of the predictions, whichever is more.
    """
    count = len(tokens)
    rows = -(-count // per_row)
    cost = np.stack([tokens / tokens.mean(), scored / scored.mean()], axis=1)
    source = np.full((rows, per_row), -1, np.int64)
    heap = [(0.0, i, 0, 0.0, 0.0) for i in range(rows)]  # fullness, row, pairs, tokens, scored
    for pair in np.argsort(-cost.max(1), kind="stable").tolist():
        _, row, held, a, b = heapq.heappop(heap)
        source[row, held] = pair
        a, b = a + cost[pair, 0], b + cost[pair, 1]
        if held + 1 < per_row:
            heapq.heappush(heap, (max(a, b), row, held + 1, a, b))
    return _exchanged(source, np.concatenate([cost, np.zeros((1, 2))]))


def _exchanged(source: np.ndarray, cost: np.ndarray, rounds: int = 16) -> np.ndarray:
    """``source`` with pairs exchanged between full and empty rows where that evens them out.

    In each round the fullest row meets the emptiest, the second fullest the second emptiest, and
    they make the one exchange after which the fuller of the two is least full.
    """
    half = len(source) // 2
    for _ in range(rounds if half else 0):
        rank = np.argsort(-cost[source].sum(1).max(1), kind="stable")
        high, low = rank[:half], rank[::-1][:half]
        given = cost[source[high]][:, :, None] - cost[source[low]][:, None]  # [half, P, P, 2]
        above = cost[source[high]].sum(1)[:, None, None] - given
        below = cost[source[low]].sum(1)[:, None, None] + given
        after = np.maximum(above, below).max(-1).reshape(half, -1)
        best = after.argmin(1)
        better = after[np.arange(half), best] < cost[source[high]].sum(1).max(1) - 1e-9
        i, j = np.divmod(best[better], source.shape[1])
        high, low = high[better], low[better]
        source[high, i], source[low, j] = source[low, j], source[high, i]
    # an exchange may leave a hole in the middle of the row that is not full
    return np.take_along_axis(source, np.argsort(source < 0, axis=1, kind="stable"), axis=1)


def fill(table: Table) -> Fill:
    """Statistics of a packed (or padded) table with ``segment`` [N,T] and ``mask`` [N,T]."""
    segment, mask = np.asarray(table["segment"]), np.asarray(table["mask"])
    real = int(np.count_nonzero(segment))
    documents = int(segment.max(axis=1).sum()) if segment.size else 0
    trained = int(np.count_nonzero(mask))
    return Fill(len(segment), documents, real, trained, real / max(segment.size, 1))


def with_targets(table: Table, *, multiple: int = 8) -> Table:
    """The table with the column ``targets`` [N,M]: the tokens that ``mask`` trains on, moved
    together, so that all others never reach the vocabulary head. M is the most there are in a
    row, rounded up to ``multiple``; the loss is unchanged.

    Raises:
      UserError: a row on which nothing is trained.
    """
    tokens, mask = np.asarray(table["tokens"]), np.asarray(table["mask"])
    row, place = np.nonzero(mask[:, 1:])
    counts = np.bincount(row, minlength=len(mask))
    if not counts.all():
        raise UserError(f"row {int(counts.argmin())} has no token to train on")
    shape = (len(mask), -(-int(counts.max()) // multiple) * multiple)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    targets: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in ("at", "ids")}
    targets |= {"mask": np.zeros(shape, np.float32), "of": np.zeros(shape, np.int32)}
    targets["at"][row, slot] = place
    targets["ids"][row, slot] = tokens[row, place + 1]
    targets["mask"][row, slot] = mask[row, place + 1]
    return table.with_columns(targets=targets)


def with_rows(table: Table, *, multiple: int = 64) -> Table:
    """A packed table with the column ``rows``: every document attends in a row of its own.

    With it any plain causal kernel is exact on packed documents (cuDNN keeps no segments apart),
    and documents much shorter than the packed row cost their own length squared, not the row's.
    L is the longest document rounded up to ``multiple``, R the most documents in a row.
    """
    segment, position = np.asarray(table["segment"]), np.asarray(table["position"])
    row, place = np.nonzero(segment)
    line, column = segment[row, place] - 1, position[row, place]
    length = -(-int(column.max() + 1) // multiple) * multiple
    take = np.full((len(segment), int(segment.max()), length), -1, np.int32)
    take[row, line, column] = place
    back = np.full((*segment.shape, 1), -1, np.int32)
    back[row, place, 0] = line * length + column
    return table.with_columns(rows={"take": take, "back": back})


def buckets(table: Table, most: int = 4, *, multiple: int = 32, least: int = 32) -> list[Table]:
    """Rows of similar length together, in at most ``most`` tables cut to their longest row.

    For rows that are padded on the right and not packed (``fit`` takes the list; each table is
    one compiled shape). A row's length is where its ``segment``, or else its ``mask``, ends; for
    pairs, that of the longer response. The cut is the one that leaves least padding; lengths are
    rounded up to ``multiple`` and a table has at least ``least`` rows where there are that many.
    """
    sides = [side for side in ("chosen", "rejected") if side in table] or [""]
    parts = [table.columns[side] if side else table.columns for side in sides]
    marks = [np.asarray(p["segment"] if "segment" in p else p["mask"]) for p in parts]
    widths = [mark.shape[1] for mark in marks]
    ends = [w - (mark[:, ::-1] > 0).argmax(1) for mark, w in zip(marks, widths, strict=True)]
    length = np.minimum(-(-np.max(ends, axis=0) // multiple) * multiple, max(widths))

    def cut(index: np.ndarray) -> Table:
        short, keep = table.take(index), int(length[index].max())

        def trim(columns: Any) -> dict[str, Any]:
            names = ("tokens", "mask", "segment", "position")
            return {k: v[:, :keep] if k in names else v for k, v in columns.items()}

        trimmed = {side: trim(short[side]) for side in sides if side}
        return Table(trim(short.columns) | trimmed)

    return [cut(index) for index in length_classes(length, most, least=least, power=1)]


def length_classes(lengths: np.ndarray, most: int, *, least: int, power: int) -> list[np.ndarray]:
    """Row numbers of at most ``most`` classes of ``lengths`` [N], shortest first: the cut under
    which the sum of (longest of its class) ** power is least, every class of ``least`` rows or
    more (a lone class may have fewer)."""
    sizes, counts = np.unique(lengths, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[k][j]: the cost of the first j sizes in k classes, and where the last class begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(most):
        row: dict[int, tuple[float, int]] = {}
        for j in range(1, len(sizes) + 1):
            options = [
                (cost + float(below[j] - below[i]) * float(sizes[j - 1]) ** power, i)
                for i, (cost, _) in best[-1].items()
                if i < j and (below[j] - below[i] >= least or (i, j) == (0, len(sizes)))
            ]
            if options:
                row[j] = min(options)
        best.append(row)
    ends = [(row[len(sizes)][0], k) for k, row in enumerate(best) if len(sizes) in row]
    k, j, classes = min(ends)[1], len(sizes), []
    while j:
        i = best[k][j][1]
        classes.append(np.flatnonzero((lengths >= sizes[i]) & (lengths <= sizes[j - 1])))
        k, j = k - 1, i
    return classes[::-1]


def _flatten(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ids and weights end to end, and the size of each document."""
    if not documents:
        raise UserError("pack: there are no documents")
    sizes = np.fromiter((len(ids) for ids, _ in documents), np.int64, len(documents))
    if sizes.min() == 0:
        raise UserError(f"pack: document {int(sizes.argmin())} is empty")
    for i, (ids, weights) in enumerate(documents):
        if weights is not None and len(weights) != len(ids):
            raise UserError(
                f"pack: document {i} has {len(ids)} tokens but {len(weights)} loss weights"
            )
    ids = _end_to_end([ids for ids, _ in documents], np.int32)
    if all(weights is None for _, weights in documents):
        return ids, np.ones(len(ids), np.float32), sizes
    filled = [np.ones(len(d), np.float32) if w is None else w for d, w in documents]
    return ids, _end_to_end(filled, np.float32), sizes


def _end_to_end(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts).astype(dtype, copy=False)
    return np.fromiter(chain.from_iterable(parts), dtype)


def _split(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most ``length`` tokens that overlap by one."""
    stride = length - 1
    pieces = np.maximum(1, -(-(sizes - 1) // stride))
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    left = np.repeat(sizes, pieces) - number * stride
    return np.repeat(starts, pieces) + number * stride, np.minimum(left, length)


def _place(sizes: np.ndarray, length: int, window: int) -> tuple[np.ndarray, ...]:
    """Row, offset and segment of every document: best fit, longest first within each window."""
    count = len(sizes)
    row, offset = np.empty(count, np.int64), np.empty(count, np.int64)
    segment = np.empty(count, np.int32)
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # by free space
    inhabited = 0  # bit f is set when some open row has exactly f free positions
    documents_in: list[int] = []
    for begin in range(0, count, window):
        part = sizes[begin : begin + window]
        order = np.argsort(-part, kind="stable")
        for index, size in zip((order + begin).tolist(), part[order].tolist(), strict=True):
            roomy = inhabited >> size
            if roomy:
                free = size + (roomy & -roomy).bit_length() - 1
                here = open_rows[free].pop()
                if not open_rows[free]:
                    inhabited &= ~(1 << free)
            else:
                free, here = length, len(documents_in)
                documents_in.append(0)
            documents_in[here] += 1
            row[index], offset[index], segment[index] = here, length - free, documents_in[here]
            free -= size
            if free:
                open_rows[free].append(here)
                inhabited |= 1 << free
    return row, offset, segment


def _fill_rows(
    ids: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    row: np.ndarray,
    offset: np.ndarray,
    segment: np.ndarray,
    length: int,
) -> Table:
    shape = (int(row.max()) + 1, length)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(starts, sizes) + within
    target = np.repeat(row * length + offset, sizes) + within
    columns = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment", "position")}
    mask = np.zeros(shape, np.float32)
    columns["tokens"].reshape(-1)[target] = ids[source]
    columns["segment"].reshape(-1)[target] = np.repeat(segment, sizes)
    columns["position"].reshape(-1)[target] = within
    mask.reshape(-1)[target] = np.where(within == 0, np.float32(0), weights[source])
    return Table({**columns, "mask": mask})
