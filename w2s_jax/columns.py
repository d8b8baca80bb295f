"""Columns that spare a run its second model: references, stored teachers, a teacher beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import annotate
from w2s_jax import mesh as meshes
from w2s_jax.data import teachers
from w2s_jax.data.shards import joined
from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Model, Params, Table

Mesh = jax.sharding.Mesh


def digest(params: Params) -> str:
    """Content hash (hex) of a parameter tree: names, types, shapes and bits, wherever they live.

    Hashed where the weights are (each word mixed with its place, summed in two lanes), so that
    only 8 bytes per weight reach the host; any sharding gives the same. It guards against
    mistakes, not against forgery.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_lanes(jnp.asarray(leaf)) for _, leaf in leaves])
    told = hashlib.sha256()
    for (path, leaf), lanes in zip(leaves, sums, strict=True):
        told.update(f"{jax.tree_util.keystr(path)}:{leaf.dtype}:{leaf.shape};".encode())
        told.update(np.asarray(lanes, "<u4").tobytes())
    return told.hexdigest()[:16]


@jax.jit
def _lanes(leaf: Array) -> Array:
    """Two 32-bit sums [2] over the words of an array, each word mixed with its place."""
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + iota * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(place + np.uint32(0x9E3779B9))
    words = _mix(words ^ np.uint32(0x243F6A88))
    lanes = (_mix(words ^ place), _mix(words * np.uint32(0x85A308D3) + place))
    return jnp.stack([lane.sum(dtype=jnp.uint32) for lane in lanes])


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words in which every bit depends on every other (murmur3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def add_reference(
    model: Model,
    params: Params,
    tables: Table | Sequence[Table],
    *,
    cache: str | Path | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Any:
    """The preference table(s) with the column ``ref`` that ``model`` gives them.

    Args:
      tables: with ``pairs`` (packed) or ``chosen`` and ``rejected``; a list gives a list.
      cache: folder for ``reference-<hash of weights, rows and architecture>`` per table; what is
        there is reused, what a killed pass left is continued.
      batch: rows at a time; None takes some 32k tokens (4k on a CPU).

    Raises:
      UserError: a table without pairs.
    """
    name = "" if cache is None else f"{digest(params)}-{model.config!r}"
    done = []
    for table in _listed(tables):
        asked, folder = _pair_columns(table), None
        if cache is not None:
            key = hashlib.sha256(f"{name}-{asked.digest()}".encode()).hexdigest()[:16]
            folder = Path(cache) / f"reference-{key}"
        size, title = batch or _rows(asked), "reference" if progress else ""
        refs = annotate.kept(annotate.reference(model), params, asked, size, mesh, folder, title)
        done.append(table.with_columns(**{n: {**table[n], "ref": r} for n, r in refs.items()}))
    return done[0] if isinstance(tables, Table) else done


def _listed(tables: Table | Sequence[Table]) -> list[Table]:
    return [tables] if isinstance(tables, Table) else list(tables)


def _pair_columns(table: Table) -> Table:
    """What a reference depends on."""
    if "pairs" in table:
        weight = {"weight": table["pairs"]["weight"]}
        return _only(table, "tokens", "segment", "position", "rows", "targets").with_columns(
            pairs=weight
        )
    if "chosen" not in table or "rejected" not in table:
        raise UserError(
            "a reference needs packed 'pairs', or 'chosen' and 'rejected'; the table has "
            f"{sorted(table.columns)}"
        )
    sides = {name: dict(table[name]) for name in ("chosen", "rejected")}
    return Table({n: {k: v for k, v in side.items() if k != "ref"} for n, side in sides.items()})


def _only(table: Table, *names: str) -> Table:
    return Table({name: table[name] for name in names if name in table})


def _rows(table: Table) -> int:
    """Rows of which a forward pass is large enough to be efficient and small enough to fit."""
    tokens = table["tokens"] if "tokens" in table else table["chosen"]["tokens"]
    length = np.asarray(tokens[np.zeros(1, int)]).shape[1]
    return max(1, 2 ** (12 if jax.default_backend() == "cpu" else 15) // length)


def add_teacher(
    model: Model,
    params: Params,
    tables: Table | Sequence[Table],
    k: int,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float16",
    shard: int | None = None,
    storage: str = "npy",
    batch: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Any:
    """The table(s) with the column ``teacher``: the top ``k`` of ``model``, stored in ``folder``.

    What is stored already is reused, what a killed pass left is continued; the column is read
    from disk batch by batch (``data.teachers.read`` reads it without the model).

    Args:
      tokenizer: of the teacher; without it only the sizes of vocabularies can be compared later.
      dtype: of the stored log-probabilities: float16, bfloat16 or float32.
      shard: rows per shard; None makes shards of about 128 MB.
      storage: "npy", memory-mapped, or "array_record".
      batch: rows at a time; None takes some 32k tokens (4k on a CPU).

    Raises:
      UserError: k larger than the vocabulary; the folder holds another teacher's.
    """
    tokens = "" if tokenizer is None else teachers.vocabulary(tokenizer)
    about = teachers.About("", model.config.vocab, k, tokens, dtype)
    name = hashlib.sha256(f"{digest(params)}-{model.config!r}".encode()).hexdigest()[:16]
    about = dataclasses.replace(about, teacher=name)
    done = []
    for table in _listed(tables):
        make = _teaching(model, params, table, k, batch, mesh, "teacher" if progress else "")
        first = jax.process_index() == 0
        say = print if progress and first else annotate.log.info
        how = {"shard": shard, "storage": storage, "keep": first, "say": say}
        teachers.write(folder, table, about, make, **how)
        annotate.together("teacher written")
        done.append(teachers.read(folder, table))
    return done[0] if isinstance(tables, Table) else done


def _teaching(
    model: Model,
    params: Params,
    table: Table,
    k: int,
    batch: int | None,
    mesh: Mesh | None,
    title: str,
) -> Callable[[list[tuple[int, int]]], Iterator[teachers.Piece]]:
    """What runs the teacher over spans of rows, for ``teachers.write``."""
    asked, size = _asked(table), batch or _rows(table)
    held = teachers.counts(table)
    fn = annotate.top_k(model, k, most=_most(asked, held))

    def make(spans: list[tuple[int, int]]) -> Iterator[teachers.Piece]:
        bar = annotate.Bar(title, sum(end - begin for begin, end in spans))
        for begin, arrays in annotate.stream(fn, params, asked, spans, size, mesh):
            rows = np.arange(begin, begin + len(arrays["tail"]))
            yield begin, _told(asked, rows, held, arrays), bar.passed(arrays, len(rows))
        bar.close()

    return make


def _asked(table: Table) -> Table:
    """What a teacher's answers depend on."""
    return _only(table, "tokens", "segment", "position", "rows", "mask", "targets")


def _most(table: Table, held: np.ndarray) -> int | None:
    """Width of a teacher's answer where the table has no ``targets``: the largest count."""
    return None if "targets" in table else max(1, int(held.max()))


def _told(table: Table, rows: np.ndarray, held: np.ndarray, arrays: Any) -> np.ndarray:
    """Which entries of a teacher's answer [n,W,...] are trained predictions."""
    if "targets" in table:
        return teachers.predicted(_only(table, "targets").batch(rows))
    return np.arange(arrays["tail"].shape[1])[None] < held[rows][:, None]


def live_teacher(
    model: Model,
    params: Params,
    table: Table,
    k: int,
    *,
    mesh: Mesh,
    batch: int,
    dtype: str | None = "bfloat16",
) -> Table:
    """The table with a column ``teacher`` that ``model`` computes, on devices of its own, for the
    rows that are asked for.

    ``fit`` asks for batches ahead of their use, from a thread, so the teacher's forward pass runs
    beside the student's updates; what crosses per prediction is k ids, k bfloat16 log-probabilities
    and a float32 tail. In a job of several processes each has a teacher mesh of its own devices and
    asks for its own rows.

    Args:
      mesh: where the teacher lives, for instance ``make_mesh("tensor=4", jax.devices()[4:])``.
      batch: rows of a forward pass (rounded up to what the mesh divides).
      dtype: type its weights are kept in there; None leaves them.

    Raises:
      UserError: k larger than the vocabulary; a table that does not say what is predicted.
    """
    about = teachers.About(digest(params), model.config.vocab, k, dtype="bfloat16")
    asked, held = _asked(table), teachers.counts(table)
    placed = _placed(model, params, mesh, dtype)
    fn = _narrow(model, k, _most(asked, held))
    aims = _only(asked, "targets", "mask")

    def make(index: np.ndarray) -> dict[str, np.ndarray]:
        part = asked.take(index)
        said = annotate.stream(fn, placed, part, [(0, len(part))], batch, mesh, whole=True)
        arrays = joined([piece for _, piece in said])
        kept = _told(asked, index, held, arrays)
        records = {name: array[kept] for name, array in arrays.items()}
        return teachers.spread(teachers.predicted(aims.batch(index)), records, k, about.vocab)

    name = f"{about}-{dtype}-{model.config!r}-{teachers.identity(table)}"
    return table.with_columns(teacher=teachers.columns(make, len(table), "bfloat16", name))


def _placed(model: Model, params: Params, mesh: Mesh, dtype: str | None) -> Params:
    def put(leaf: Any, place: Any) -> Any:
        return jax.device_put(leaf if dtype is None else leaf.astype(jnp.dtype(dtype)), place)

    return jax.tree.map(put, params, meshes.shardings(model.axes, mesh, params))


@functools.lru_cache(maxsize=64)
def _narrow(model: Model, k: int, most: int | None) -> annotate.Fn:
    """``annotate.top_k`` with bfloat16 log-probabilities."""
    fn = annotate.top_k(model, k, most=most)

    def say(params: Params, batch: Any) -> Any:
        told = fn(params, batch)
        return {**told, "logits": told["logits"].astype(jnp.bfloat16)}

    return say
