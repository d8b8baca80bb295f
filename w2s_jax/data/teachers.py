"""What a teacher says of a table, stored: the K most likely tokens of every trained prediction.

A store is a folder with one sub-folder per table (named by the digest of its tokens), each a
``data.shards`` folder. Only trained predictions are kept; reading puts them back in their places,
so a column is memory-mapped and a batch costs what its own records cost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.data.shards import INDEX, Shards, joined
from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table

DTYPES = ("float16", "bfloat16", "float32")
SHARD = 2**27  # bytes of a shard, about
OPEN = 128  # shards that are mapped at once: each takes a file descriptor
ROUND = 1e-2  # what rounding may add to a log-probability or a mass
# (first row, which entries are trained predictions [n,W], arrays [n,W,...])
Piece = tuple[int, np.ndarray, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class About:
    """What a store depends on: ``teacher`` (digest of weights and architecture), ``tokens``
    (``vocabulary`` of its tokenizer, "" if unknown), ``vocab`` (rows of its vocabulary), ``k``,
    and the type of the log-probabilities."""

    teacher: str
    vocab: int
    k: int
    tokens: str = ""
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocab:
            raise UserError(f"top-k of {self.k} tokens from a vocabulary of {self.vocab}")
        if self.dtype not in DTYPES:
            raise UserError(f"log-probabilities are stored as one of {DTYPES}, not {self.dtype!r}")


def vocabulary(tokenizer: Tokenizer) -> str:
    """Content hash of which token each id is; roles and chat templates do not count."""
    tokens = [tokenizer.token(index) for index in range(tokenizer.size)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def identity(table: Table) -> str:
    """Content hash of the columns that say what is predicted from what."""
    names = ("tokens", "segment", "position", "rows", "mask", "targets")
    return Table({name: table[name] for name in names if name in table}).digest()


def predicted(batch: Mapping[str, Any]) -> np.ndarray:
    """Which entries of the ``teacher`` column are trained on: [B,M] with ``targets``, else [B,T]
    where entry t predicts the token after place t."""
    if "targets" in batch:
        return np.asarray(batch["targets"]["mask"]) > 0
    mask = np.asarray(batch["mask"]) > 0
    return np.pad(mask[:, 1:], ((0, 0), (0, 1)))


def counts(table: Table, block: int = 4096) -> np.ndarray:
    """Trained predictions of each row, [N] int64."""
    narrow = Table({name: table[name] for name in ("targets", "mask") if name in table})
    if not narrow.columns:
        raise UserError("a teacher needs a column 'targets' or 'mask': what is to be predicted?")
    if not len(table):
        raise UserError("a teacher has nothing to say: the table has no rows")
    starts = range(0, len(table), block)
    blocks = [np.arange(at, min(at + block, len(table))) for at in starts]
    found = [predicted(narrow.batch(rows)).sum(1) for rows in blocks]
    return np.concatenate(found).astype(np.int64)


def write(
    folder: str | Path,
    table: Table,
    about: About,
    make: Callable[[list[tuple[int, int]]], Iterable[Piece]],
    *,
    shard: int | None = None,
    storage: str = "npy",
    keep: bool = True,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> Shards:
    """Store what ``make`` gives for the rows that are not there yet.

    Args:
      make: called with the spans of rows to do; gives, in order, pieces ``(first row, kept [n,W],
        {"ids" [n,W,K], "logits" [n,W,K] log-probabilities, "tail" [n,W]})`` where ``kept`` marks
        the trained predictions of each row, in order.
      shard: rows per shard; None makes shards of about 128 MB.
      storage: "npy" or "array_record" (see ``data.shards``); what is begun goes on as it was.
      keep: whether this process writes; of several that run the teacher together, one does.
      verify: compare the hashes of what is there, and make what was damaged again (otherwise only
        what is missing or of another size).
      say: takes one line about each damaged shard, and one when all is written.

    Raises:
      UserError: the folder holds another teacher, k or type; it cannot be written; another process
        writes it; the table has no rows or predicts nothing; the teacher says what none can.
    """
    held = counts(table)
    if not held.sum():
        raise UserError(f"a table of {len(held)} rows predicts nothing: its masks are all 0")
    record = about.k * (_width(about.vocab) + np.dtype("V2").itemsize) + 4
    size = shard or max(1, int(SHARD / record / max(held.mean(), 1)))
    key = identity(table)
    content = {**asdict(about), "table": key}
    shards = Shards.begin(Path(folder) / key, len(table), size, content, storage)
    shards.drop_damaged(verify, say)
    fresh = shards.missing()
    with shards.alone() if keep and fresh else contextlib.nullcontext():
        pieces = iter(make([shards.span(number) for number in fresh]) if fresh else ())
        for number in fresh:
            begin, end = shards.span(number)
            arrays = _packed(pieces, (begin, end), held, about)
            if keep:
                largest = int(arrays["ids"].max(initial=0))
                shards.put(number, arrays, held[begin:end], largest=largest)
    if not keep:
        return shards
    share = shards.bytes / max(shards.records, 1)
    say(
        f"teacher in {shards.folder}: {shards.records} predictions, top {about.k} of "
        f"{about.vocab}, {share:.1f} bytes each, {shards.bytes / 1e6:.1f} MB in {shards.count} "
        f"shards ({len(fresh)} new)"
    )
    return shards


def _width(vocab: int) -> int:
    return 2 if vocab <= 2**16 else 4


def _packed(
    pieces: Iterator[Piece], span: tuple[int, int], held: np.ndarray, about: About
) -> dict[str, np.ndarray]:
    """The records of one shard from as many pieces as it takes."""
    at, end = span
    parts = []
    while at < end:
        first, kept, arrays = next(pieces)
        right = first == at and (kept.sum(1) == held[at : at + len(kept)]).all()
        assert right, f"predictions of rows from {first} are not those of the table from {at}"
        parts.append({name: array[kept] for name, array in arrays.items()})
        at += len(kept)
    whole = joined(parts)
    logits, tail = (np.asarray(whole[name], np.float32) for name in ("logits", "tail"))
    if fault := _impossible(whole["ids"], logits, tail, about.vocab):
        raise UserError(f"the teacher {fault} in rows {span[0]} to {end}")
    # a forbidden token may be below all that 16 bits can say; its probability is 0 either way
    logits = np.maximum(logits, _lowest(about.dtype))
    ids = whole["ids"].astype(f"uint{8 * _width(about.vocab)}")
    return {"ids": ids, "logits": logits.astype(_float(about.dtype)), "tail": tail}


def _impossible(ids: np.ndarray, logits: np.ndarray, tail: np.ndarray, vocab: int) -> str:
    """What of these no teacher can say, "" if nothing."""
    if not (np.isfinite(logits).all() and np.isfinite(tail).all()):
        return "gives log-probabilities that are not finite"
    if logits.max(initial=-1.0) > ROUND:
        return "gives log-probabilities above 0"
    if tail.min(initial=0.0) < -ROUND or tail.max(initial=0.0) > 1 + ROUND:
        return "gives a remaining mass outside 0 to 1"
    for worst in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= worst < vocab:
            return f"of {vocab} tokens names token {worst}"
    return ""


def _lowest(dtype: str) -> np.float32:
    """The least number of a type, in float32."""
    import ml_dtypes  # a dependency of jax

    return np.float32(ml_dtypes.finfo(_float(dtype)).min)


def _float(name: str) -> Any:
    import ml_dtypes  # a dependency of jax

    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def read(
    folder: str | Path,
    table: Table,
    *,
    vocab: int | None = None,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
) -> Table:
    """The table with the stored ``teacher`` column, read from disk batch by batch.

    Args:
      table: the one it was made of: same tokens, same predictions, same order of rows.
      vocab: rows of the student's vocabulary; may differ from the teacher's only by padding, that
        is when ``tokenizer`` is the teacher's.
      tokenizer: the student's.
      verify: read everything once and compare the hashes (sizes are always compared).

    Raises:
      UserError: another table, vocabulary or tokenizer; a store half-written or damaged.
    """
    folder, key = Path(folder), identity(table)
    shards = _find(folder, key, len(table))
    about, held = _about(shards, key, len(table)), counts(table)
    _fits(shards.folder, about, vocab, tokenizer)
    shards.finished()
    maps = Maps(shards, held)
    maps.check(verify)
    if vocab is not None and vocab < about.vocab:
        worst = max(entry["largest"] for entry in shards.done.values())
        if worst >= vocab:
            raise UserError(f"{folder}: the teacher names token {worst}, the student has {vocab}")
    rows = Rows(table, held, shards, maps, about)
    name = f"{about}-{key}"
    return table.with_columns(teacher=columns(rows.take, len(table), about.dtype, name))


def _about(shards: Shards, key: str, rows: int) -> About:
    """What the store says of itself, which must be of this table and agree with its records.

    Raises:
      UserError: it does not.
    """
    told = {name: value for name, value in shards.about.items() if name != "table"}
    if shards.about.get("table", key) != key or shards.rows != rows:
        raise UserError(f"{shards.folder} holds a teacher for another table: delete it")
    try:
        about = About(**told)
        want = {"ids": (f"uint{8 * _width(about.vocab)}", (about.k,)), "tail": ("float32", ())}
        want["logits"] = (about.dtype, (about.k,))
        fields = {f.name: (f.dtype, f.shape) for f in shards.fields}
        sound = not shards.done or fields == want
        sound &= all(type(entry["largest"]) is int for entry in shards.done.values())
    except (TypeError, KeyError, UserError):
        sound = False
    if not sound:
        path = shards.folder / INDEX
        raise UserError(f"{path} is damaged (it contradicts itself); delete it and write it again")
    return about


class Maps:
    """The records of each shard, mapped when asked for; the last ``OPEN`` stay so."""

    def __init__(self, shards: Shards, held: np.ndarray) -> None:
        self.shards, self.held = shards, held
        self.get = lru_cache(maxsize=OPEN)(self._map)

    def check(self, verify: bool) -> None:
        """Map each shard once.

        Raises:
          UserError: one is damaged, or is not of the table's predictions.
        """
        for number in range(self.shards.count):
            try:
                self._map(number, verify=True) if verify else self.get(number)
            except UserError as error:
                raise UserError(f"{error}; delete that file and write it again") from None

    def _map(self, number: int, verify: bool = False) -> Any:
        held = self.held[slice(*self.shards.span(number))]
        if self.shards.done[number]["records"] != held.sum():
            records = self.shards.done[number]["records"]
            path = self.shards.path(number)
            raise UserError(f"shard {path} is damaged: {records} records for {held.sum()}")
        return self.shards.get(number, held, verify=verify)


def _find(folder: Path, key: str, rows: int) -> Shards:
    if (folder / key / INDEX).exists():
        return Shards.read(folder / key)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: no teacher was stored there")
    others = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    held = f"it holds {', '.join(others)}" if others else "it is empty"
    raise UserError(
        f"{folder} has no teacher for this table of {rows} rows (digest {key}; {held}): give the "
        "table it was made of, or store the teacher for this one"
    )


def _fits(folder: Path, about: About, vocab: int | None, tokenizer: Tokenizer | None) -> None:
    mine = vocabulary(tokenizer) if tokenizer is not None else ""
    if mine and about.tokens and mine != about.tokens:
        raise UserError(
            f"{folder}: the teacher's tokenizer ({about.tokens}) is not the student's ({mine}); "
            "top-k ids mean other tokens"
        )
    if vocab not in (None, about.vocab) and not (mine and about.tokens):
        raise UserError(
            f"{folder}: the teacher has {about.vocab} tokens, the student {vocab}; if one is the "
            "other with padding, store and read with the tokenizer"
        )


class Rows:
    """Gathers the records of rows and puts them in the places of their predictions.

    Places that predict nothing get the uniform distribution.
    """

    def __init__(
        self,
        table: Table,
        held: np.ndarray,
        shards: Shards,
        maps: Maps,
        about: About,
    ) -> None:
        self.aims = Table({n: table[n] for n in ("targets", "mask") if n in table})
        self.shards, self.maps, self.about = shards, maps, about
        starts = np.concatenate([[0], np.cumsum(held)])
        first = np.arange(len(held)) // shards.size * shards.size
        self.begin, self.held = starts[:-1] - starts[first], held

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """``ids`` [B,W,K] int32, ``logits`` [B,W,K] as stored, ``tail`` [B,W] float32."""
        where = predicted(self.aims.batch(index))
        parts = []
        for row in index.tolist():
            begin = self.begin[row]
            records = self.maps.get(row // self.shards.size)[begin : begin + self.held[row]]
            # a slice holds its map, and the file with it
            parts.append(records if self.shards.count <= OPEN else records.copy())
        records = self.shards.unpack(
            np.concatenate(parts) if parts else np.empty(0, self.shards.dtype)
        )
        return spread(where, records, self.about.k, self.about.vocab)


def columns(
    make: Callable[[np.ndarray], dict[str, np.ndarray]], rows: int, dtype: str, name: str
) -> dict[str, Column]:
    """A ``teacher`` column of ``rows`` rows made batch by batch by ``make(index)``.

    ``name`` says what the values depend on; a table asks for the three leaves one by one, so the
    last batch is remembered.
    """
    last: list[tuple[bytes, dict[str, np.ndarray]]] = [(b"", {})]

    def once(index: np.ndarray) -> dict[str, np.ndarray]:
        key, (before, values) = index.tobytes(), last[0]
        if key != before or not values:
            values = make(index)
            last[0] = (key, values)
        return values

    kinds = {"ids": (np.int32, 3), "logits": (_float(dtype), 3), "tail": (np.float32, 2)}
    return {
        leaf: Column(once, leaf, np.dtype(kind), axes, rows, name)
        for leaf, (kind, axes) in kinds.items()
    }


def spread(
    where: np.ndarray, records: Mapping[str, np.ndarray], k: int, vocab: int
) -> dict[str, np.ndarray]:
    """Records [P,...] at the P true places of ``where`` [B,W]; elsewhere the uniform one."""
    shape = where.shape
    ids = np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy()
    logits = np.full((*shape, k), -np.log(vocab), records["logits"].dtype)
    tail = np.full(shape, 1 - k / vocab, np.float32)
    ids[where], logits[where], tail[where] = records["ids"], records["logits"], records["tail"]
    return {"ids": ids, "logits": logits, "tail": tail}


@dataclass(frozen=True, eq=False)
class Column:
    """A leaf whose values are made when asked for: ``len``, fancy indexing, type, own digest."""

    make: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    leaf: str
    dtype: np.dtype
    ndim: int
    length: int
    name: str

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> np.ndarray:
        if not (isinstance(index, np.ndarray) and index.dtype.kind in "iu"):
            return self.make(np.arange(self.length)[index])[self.leaf]
        rows = index.astype(np.int64)
        if len(rows) and not -self.length <= rows.min() <= rows.max() < self.length:
            raise IndexError(f"row {rows.min()} or {rows.max()} of {self.length}")
        return self.make(np.where(rows < 0, rows + self.length, rows))[self.leaf]

    def digest(self) -> str:
        """What the values depend on, hashed; the values themselves stay where they are."""
        return hashlib.sha256(f"{self.name}/{self.leaf}".encode()).hexdigest()[:16]
