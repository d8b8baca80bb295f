"""Run a frozen model over a table once and keep what it says as a column."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.data.shards import Shards, joined
from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_logps
from w2s_jax.objectives import response_logps
from w2s_jax.types import Array, Batch, Model, Params, Table, Tree, forward

log = logging.getLogger("w2s_jax")

Fn = Callable[[Params, Batch], Tree]
SHARD = 16  # batches in a shard of a kept column


def predict(
    fn: Fn,
    params: Params,
    table: Table | Sequence[Table],
    *,
    batch: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    progress: str = "",
) -> Any:
    """``fn(params, batch)`` over all rows, on the host: a tree of arrays ``[N, ...]``.

    The last batch is padded by repeating its last row, so the program compiles once. A batch holds
    what ``Table.batch`` gives: never ``truth``. The next batch is under way before the last one
    is fetched. With a mesh the rows of a batch, rounded up to what divides, are spread over it
    (``params`` are there already), and every process of a multi-host job gets all results.

    Args:
      table: or several (length classes): then the result is a list.
      progress: what a bar or, off a terminal, a plain line now and then calls the work.

    Raises:
      UserError: the table is empty.
    """
    tables = [table] if isinstance(table, Table) else list(table)
    if any(len(part) == 0 for part in tables):
        raise UserError("cannot annotate an empty table")
    params = jax.tree.map(jnp.asarray, params)  # to the device once, not once a batch
    found = []
    with contextlib.closing(Bar(progress, sum(map(len, tables)))) as bar:
        for part in tables:
            said = stream(fn, params, part, [(0, len(part))], batch, mesh)
            pieces = [bar.passed(piece, len(jax.tree.leaves(piece)[0])) for _, piece in said]
            found.append(jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces))
    return found[0] if isinstance(table, Table) else found


def stream(
    fn: Fn,
    params: Params,
    table: Table,
    spans: Sequence[tuple[int, int]],
    batch: int,
    mesh: jax.sharding.Mesh | None,
    whole: bool = False,
) -> Iterator[tuple[int, Tree]]:
    """(first row, result on the host) of each batch of each span of rows, one batch ahead.

    A batch larger than the table is cut to it, unless ``whole``: then a small table is padded.
    """
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)
    size = -(-(batch if whole else min(batch, len(table))) // ways) * ways
    mine = meshes.batch_rows(mesh, size)
    program, waiting = jax.jit(fn), None
    for begin, end in ((at, min(at + size, e)) for b, e in spans for at in range(b, e, size)):
        rows = table.batch(np.minimum(begin + mine, end - 1))
        with meshes.rules_context(mesh):
            result = program(params, meshes.put_batch(rows, mesh, size))
        if waiting is not None:
            yield _fetch(*waiting)
        waiting = (begin, end, result)
    if waiting is not None:
        yield _fetch(*waiting)


def _fetch(begin: int, end: int, result: Tree) -> tuple[int, Tree]:
    """The rows of a result on the host, whole on every process."""
    if jax.process_count() == 1:
        result = jax.device_get(result)
    else:
        from jax.experimental import multihost_utils

        result = multihost_utils.process_allgather(result, tiled=True)
    return begin, jax.tree.map(lambda leaf: leaf[: end - begin], result)


class Bar:
    """Rows done: a bar on a terminal (after 2 seconds), elsewhere a line every 30 seconds."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.bar = name, total, 0, None
        self.show = bool(name) and jax.process_index() == 0
        self.last = time.perf_counter()
        if self.show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=name, unit="row", dynamic_ncols=True, delay=2)

    def passed(self, value: Any, rows: int) -> Any:
        """Count ``rows`` more; gives back the value."""
        self.done += rows
        if self.bar is not None:
            self.bar.update(rows)
        elif self.show and time.perf_counter() - self.last > 30:
            self.last = time.perf_counter()
            print(f"{self.name}: {self.done}/{self.total} rows", file=sys.stderr)
        return value

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def annotate(
    fn: Fn,
    params: Params,
    table: Table,
    column: str,
    *,
    batch: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    cache: Path | None = None,
    progress: str = "",
) -> Table:
    """The table with ``column`` added (or replaced) by ``fn(params, batch)``.

    ``fn`` gives an array ``[B, ...]``, or a dict of such for a nested column. ``cache`` is a
    folder that receives the rows in shards as they are made; what is there already, whole and
    with the right hash, is not made again, so a killed pass goes on where it was. Name it by the
    content hashes of weights and rows; nothing else makes a stored column trustworthy. With
    several processes all must see it.

    Raises:
      UserError: the table is empty, or the cache holds another number of rows.
    """
    value = kept(fn, params, table, batch, mesh, cache, progress or column)
    return table.with_columns(**{column: value})


def kept(
    fn: Fn,
    params: Params,
    table: Table,
    batch: int,
    mesh: jax.sharding.Mesh | None,
    cache: Path | None,
    progress: str,
) -> Tree:
    """The values of ``annotate`` alone: made, read from ``cache``, or some of each."""
    if cache is None:
        return predict(fn, params, table, batch=batch, mesh=mesh, progress=progress)
    if len(table) == 0:
        raise UserError("cannot annotate an empty table")
    shards = Shards.begin(Path(cache), len(table), SHARD * batch, {})
    shards.drop_damaged(True, log.warning)
    together("annotate reads")
    fresh = shards.missing()
    spans = [shards.span(number) for number in fresh]
    if fresh:
        params = jax.tree.map(jnp.asarray, params)
    with contextlib.closing(Bar(progress, sum(e - b for b, e in spans))) as bar:
        said = stream(fn, params, table, spans, batch, mesh)
        for number, (_, end) in zip(fresh, spans, strict=True):
            parts = []
            for begin, piece in said:
                flat = _flat(piece)
                rows = len(next(iter(flat.values())))
                parts.append(bar.passed(flat, rows))
                if begin + rows == end:
                    break
            if jax.process_index() == 0:
                shards.put(number, joined(parts))
    together("annotate wrote")
    shards = Shards.read(Path(cache)).finished()
    whole = [shards.unpack(shards.get(number)) for number in range(shards.count)]
    return _nested(joined(whole))


def together(what: str) -> None:
    """Wait until every process of the job is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _flat(tree: Tree, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping):
        return {prefix or ".": tree}
    names = {name: f"{prefix}.{name}" if prefix else name for name in tree}
    return {k: v for name, path in names.items() for k, v in _flat(tree[name], path).items()}


def _nested(flat: Mapping[str, np.ndarray]) -> Any:
    if "." in flat:
        return flat["."]
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return tree


# What to ask a model. One function per model, so that asking again compiles nothing.


@functools.lru_cache(maxsize=64)
def probabilities(model: Model) -> Fn:
    """``fn(params, batch) -> [B,C] float32`` class probabilities, for ``annotate``."""
    return lambda params, batch: jax.nn.softmax(forward(model, params, batch).logits)


@functools.lru_cache(maxsize=64)
def surprise(model: Model) -> Fn:
    """``fn(params, batch) -> {"nll", "tokens"}``, both [B] float32, for ``predict``: the summed
    negative log-likelihood (nats) of the masked tokens and the sum of their weights."""

    def say(params: Params, batch: Batch) -> Tree:
        output, mask = forward(model, params, batch), batch["mask"][:, 1:]
        logps = token_logps(output.hidden[:, :-1], output.unembed, batch["tokens"][:, 1:], mask)
        return {"nll": -(logps * mask).sum(-1), "tokens": mask.sum(-1)}

    return say


@functools.lru_cache(maxsize=64)
def reference(model: Model) -> Fn:
    """``fn(params, batch) -> {"chosen", "rejected"}`` or, for packed pairs, ``{"pairs"}``.

    The log-probability (nats, summed over its tokens, float32) of each response: [B] for each of
    ``chosen`` and ``rejected``, [B,P,2] for ``pairs``; where the column ``ref`` belongs.
    """

    def say(params: Params, batch: Batch) -> Tree:
        sums, _ = response_logps(model, params, batch)
        if "pairs" in batch:
            return {"pairs": sums}
        return {"chosen": sums[:, 0, 0], "rejected": sums[:, 0, 1]}

    return say


@functools.lru_cache(maxsize=64)
def top_k(model: Model, k: int, *, most: int | None = None, chunk: int | None = None) -> Fn:
    """``fn(params, batch) -> {"ids" [B,W,K] int32, "logits" [B,W,K], "tail" [B,W]}`` float32.

    The K most likely tokens of each prediction, best first, their log-probabilities (nats) and
    the probability of all others. ``W`` counts the ``targets`` where the batch has them, else the
    places (entry t predicts the token after t) or, with ``most``, the first that many places that
    ``mask`` says are trained on. Logits exist for ``chunk`` predictions at a time.

    Raises:
      UserError: k is not between 1 and the number of tokens.
    """

    def say(params: Params, batch: Batch) -> Tree:
        output = forward(model, params, batch)
        at, hidden = _aims(batch, most), output.hidden
        if at is not None:
            hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
        return _top_k(hidden, output.unembed, k, output.vocab, chunk)

    return say


def _aims(batch: Batch, most: int | None) -> Array | None:
    """Places that predict, [B,W]; None for all of them in order."""
    if "targets" in batch:
        return batch["targets"]["at"]
    if most is None:
        return None
    idle = jnp.pad(batch["mask"][:, 1:] <= 0, ((0, 0), (0, 1)), constant_values=True)
    return jnp.argsort(idle, axis=1, stable=True)[:, :most]


def _top_k(hidden: Array, unembed: Array, k: int, vocab: int | None, chunk: int | None) -> Tree:
    real = min(vocab or unembed.shape[1], unembed.shape[1])
    if not 1 <= k <= real:
        raise UserError(f"top-k of {k} tokens from a vocabulary of {real}")
    batch, length, width = hidden.shape
    room = chunk or 2 ** (26 if jax.default_backend() == "cpu" else 28) // unembed.shape[1]
    steps = max(1, min(length, room // batch))
    padded = jnp.pad(hidden, ((0, 0), (0, -length % steps), (0, 0)))
    parts = padded.reshape(batch, -1, steps, width).swapaxes(0, 1)

    def one(part: Array) -> Tree:
        logits = jnp.einsum("btd,dv->btv", part, unembed, preferred_element_type=jnp.float32)
        logps = jax.nn.log_softmax(logits[..., :real])
        best, ids = jax.lax.top_k(logps, k)
        return {"ids": ids, "logits": best, "tail": jnp.clip(1 - jnp.exp(best).sum(-1), 0, 1)}

    def join(leaf: Array) -> Array:
        leaf = leaf.swapaxes(0, 1)
        return leaf.reshape(batch, -1, *leaf.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(one, parts))
