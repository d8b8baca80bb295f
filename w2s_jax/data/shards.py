"""Rows computed once and kept in a folder of numpy shards: whole or absent, hashed, resumed.

``index.json`` says what is kept, the type of a record, and of every finished shard its records,
bytes and hash; it is rewritten, atomically, after each shard. A process killed at any moment
loses the shard it was making.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import workdir
from w2s_jax.errors import UserError

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Field:
    """One array of a record: ``dtype`` as jax names it, ``shape`` of one record."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


@dataclass
class Shards:
    """A folder of shards; shard ``i`` holds what was made of rows ``[i * size, (i + 1) * size)``.

    ``about`` is what the content depends on, ``fields`` the arrays of a record, ``done`` maps the
    number of a finished shard to its ``records``, ``bytes`` and ``sha256``; ``forgotten`` were
    damaged. A row may have any number of records. ``storage`` is "npy", read through memory maps,
    or "array_record" (the ArrayRecord format, one entry per row, compressed).

    Raises:
      UserError: another storage.
    """

    folder: Path
    rows: int
    size: int
    about: dict[str, Any]
    fields: tuple[Field, ...] = ()
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    storage: str = "npy"
    forgotten: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.storage not in ("npy", "array_record"):
            raise UserError(f"shards are stored as npy or array_record, not {self.storage!r}")

    @classmethod
    def read(cls, folder: Path) -> Shards:
        """What a folder holds, finished or not.

        Raises:
          UserError: no folder, no index in it, or one that cannot be understood.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, not {FORMAT}")
            fields = tuple(Field(n, d, tuple(s)) for n, d, s in index["fields"])
            done = {int(number): dict(entry) for number, entry in index["shards"].items()}
            rows, size, about = (index[name] for name in ("rows", "size", "about"))
            held = cls(folder, rows, size, dict(about), fields, done, index["storage"])
            held._sound()
            return held
        except FileNotFoundError:
            raise UserError(f"{folder} holds no shards: there is no {INDEX}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete {folder} and write it again"
            ) from None

    @classmethod
    def begin(
        cls, folder: Path, rows: int, size: int, about: Mapping[str, Any], storage: str = "npy"
    ) -> Shards:
        """The shards of ``folder`` to be finished, or new ones where there is nothing yet.

        Raises:
          UserError: the folder holds something else (named).
        """
        asked: dict[str, Any] = json.loads(json.dumps(dict(about)))
        if not (folder / INDEX).exists():
            return cls(folder, rows, size, asked, storage=storage)
        held = cls.read(folder)
        if held.rows != rows:
            raise UserError(f"{folder}: holds {held.rows} rows for a table of {rows}; delete it")
        for name in sorted(asked.keys() | held.about.keys()):
            if asked.get(name) != held.about.get(name):
                raise UserError(
                    f"{folder} holds {name} {held.about.get(name)!r}, not {asked.get(name)!r}: "
                    "give another folder"
                )
        return held

    def _sound(self) -> None:
        """Raises ValueError, TypeError or KeyError where the numbers of an index cannot be."""
        for name, value, least in (("rows", self.rows, 0), ("size", self.size, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} {value!r}")
        for number, entry in self.done.items():
            if not 0 <= number < self.count:
                raise ValueError(f"shard {number} of {self.count}")
            for name in ("records", "bytes"):
                if type(entry[name]) is not int or entry[name] < 0:
                    raise ValueError(f"shard {number} with {name} {entry[name]!r}")
            if not isinstance(entry["sha256"], str):
                raise ValueError(f"shard {number} without a hash")
        if self.done and not self.fields:
            raise ValueError("no fields")
        if self.dtype.itemsize >= 2**31 or any(n < 0 for f in self.fields for n in f.shape):
            raise ValueError("fields of no such shape")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is in here at the same time (by a lock on the folder, which the system lets
        go of with its holder; file systems that have none are trusted).

        Raises:
          UserError: somebody is, or was since this was read; the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror or error}") from None
        try:
            if not _locked(handle):
                raise UserError(f"another process writes {self.folder}: wait until it has ended")
            there = (self.folder / INDEX).exists()
            if there and not set(Shards.read(self.folder).done) <= {*self.done, *self.forgotten}:
                raise UserError(f"another process has just written {self.folder}: run this again")
            for left in self.folder.glob(".*"):  # of a killed writer
                with contextlib.suppress(OSError):
                    left.unlink()
            yield
        finally:
            os.close(handle)

    @property
    def count(self) -> int:
        """Number of shards when all are there."""
        return -(-self.rows // self.size)

    @property
    def bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(entry["bytes"] for entry in self.done.values())

    @property
    def records(self) -> int:
        """Records of the finished shards."""
        return sum(entry["records"] for entry in self.done.values())

    @property
    def dtype(self) -> np.dtype:
        """The numpy type of a record (bfloat16 as its bits)."""
        return np.dtype([(f.name, _stored(f.dtype), f.shape) for f in self.fields])

    def span(self, number: int) -> tuple[int, int]:
        """First and last-plus-one row of a shard."""
        return number * self.size, min(self.rows, (number + 1) * self.size)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in range(self.count) if number not in self.done]

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:05d}.{self.storage}"

    def put(
        self,
        number: int,
        arrays: Mapping[str, np.ndarray],
        counts: np.ndarray | None = None,
        **notes: Any,
    ) -> None:
        """Write a shard from its arrays [records, ...], then the index, with ``notes`` on it.

        ``counts`` says how many records each row has (None: one).

        Raises:
          UserError: it cannot be written, or its arrays are of another kind than the others'.
        """
        fields = tuple(Field(n, a.dtype.name, a.shape[1:]) for n, a in sorted(arrays.items()))
        if self.fields and fields != self.fields:
            raise UserError(f"{self.folder} holds {self.fields}, not {fields}: delete it")
        self.fields = fields
        records = np.empty(len(next(iter(arrays.values()))), self.dtype)
        for name, array in arrays.items():
            records[name] = _bits(array)
        counts = np.ones(len(records), int) if counts is None else counts
        path = self.path(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, records, counts)
            size = path.stat().st_size
            entry = {"records": len(records), "bytes": size, "sha256": _hash(path)}
            self.done[number] = entry | notes
            workdir.write(self.folder / INDEX, json.dumps(self._index(), indent=1))
        except OSError as error:
            # numpy says how much it wrote instead of why it stopped
            reason = error.strerror or f"{error} (is the disk full?)"
            raise UserError(f"cannot write {path}: {reason}") from None

    def get(self, number: int, counts: np.ndarray | None = None, *, verify: bool = False) -> Any:
        """The records of a shard, read where they are sliced; ``verify`` compares the hash first.

        ``counts`` as for ``put``: an ArrayRecord shard can be cut between rows only.

        Raises:
          UserError: the shard is missing, of another size or type, or (verified) damaged.
        """
        path, entry = self.path(number), self.done[number]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{size} bytes instead of {entry['bytes']}")
            if verify and _hash(path) != entry["sha256"]:
                raise ValueError("its content is not what was written")
            if self.storage == "array_record":
                counts = np.ones(entry["records"], int) if counts is None else counts
                return Packets(path, self.dtype, counts)
            records: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            if records.offset + records.nbytes != size:
                raise ValueError("its header is of another length")
        except Exception as error:  # a header that numpy cannot parse raises one of many kinds
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise UserError(f"shard {path} is damaged: {reason}") from None
        if records.dtype != self.dtype or records.shape != (entry["records"],):
            raise UserError(f"shard {path} is damaged: it holds {records.dtype} {records.shape}")
        return np.asarray(records)  # a plain view of the map: cheaper to index

    def unpack(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of records, bfloat16 as such."""
        return {f.name: _typed(records[f.name], f.dtype) for f in self.fields}

    def drop_damaged(self, verify: bool, say: Callable[[str], None]) -> None:
        """Forget finished shards that cannot be read (one line each), so that they are missing."""
        for number in sorted(self.done):
            try:
                self.get(number, verify=verify)
            except UserError as error:
                say(f"{error}; making it again")
                del self.done[number]
                self.forgotten.add(number)

    def finished(self) -> Shards:
        """Itself, if no shard is missing.

        Raises:
          UserError: some are.
        """
        if missing := self.missing():
            raise UserError(
                f"{self.folder} is half-written ({self.count - len(missing)} of {self.count} "
                "shards): run what writes it again, it goes on where it stopped"
            )
        return self

    def _index(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "storage": self.storage,
            "about": self.about,
            "rows": self.rows,
            "size": self.size,
            "fields": [[f.name, f.dtype, list(f.shape)] for f in self.fields],
            "shards": {str(number): self.done[number] for number in sorted(self.done)},
        }


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of several parts end to end."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Packets:
    """Records of an ArrayRecord file with one entry per row; sliced from row to row."""

    def __init__(self, path: Path, dtype: np.dtype, counts: np.ndarray) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self.path, self.dtype, self.starts = path, dtype, np.cumsum(counts) - counts
        self.reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        self.filled = np.flatnonzero(counts)

    def __getitem__(self, span: slice) -> np.ndarray:
        begin, end = span.start or 0, span.stop
        wanted = self.filled[np.searchsorted(self.starts[self.filled], begin) :]
        if end is not None:
            wanted = wanted[: np.searchsorted(self.starts[wanted], end)]
        if not len(wanted):
            return np.empty(0, self.dtype)
        try:
            return np.frombuffer(b"".join(self.reader.read(wanted.tolist())), self.dtype)
        except Exception as error:  # the reader raises RuntimeError, ValueError, ...
            raise UserError(f"shard {self.path} cannot be read as ArrayRecord: {error}") from None


def _write(path: Path, records: np.ndarray, counts: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.lib.format.write_array(file, records, allow_pickle=False)
        else:
            _write_packets(temporary, records, counts)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_packets(path: Path, records: np.ndarray, counts: np.ndarray) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for part in np.split(records, np.cumsum(counts)[:-1]):
            writer.write(part.tobytes())
        writer.close()
    except RuntimeError as error:  # a full disk, among others
        raise OSError(str(error).split(";")[0]) from None


def _locked(handle: int) -> bool:
    """Whether the lock is ours, or there are none here."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(name: str) -> str:
    dtype = _named(name)
    return f"u{dtype.itemsize}" if dtype.kind == "V" else name


def _named(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # a dependency of jax

        return np.dtype(getattr(ml_dtypes, name))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _typed(array: np.ndarray, name: str) -> np.ndarray:
    dtype = _named(name)
    return np.ascontiguousarray(array).view(dtype) if dtype.kind == "V" else array
