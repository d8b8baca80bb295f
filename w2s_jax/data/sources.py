"""Tables from files: JSONL(.gz), parquet, Arrow, CSV, ArrayRecord folders, Hub datasets.

Text files are read into memory; parquet and Arrow stay memory-mapped and ArrayRecord stays on disk
behind columns that are read when indexed. A column of the column dictionary is cast to its kind
(int32 or float32); one that bears such a name but not its shape, like the integer ``label`` of
most public datasets, is host data and is called ``raw_<name>``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import COLUMNS, Table

Rows = Sequence[Mapping[str, Any]]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".csv")


def read(
    source: str | Path, *, split: str | None = None, columns: Sequence[str] | None = None
) -> Table:
    """A table of host columns (object arrays for text, int64, float64, bool; lists as [N, K]).

    Args:
      source: a local file or folder, or else the name of a dataset on the Hugging Face Hub.
      split: keep one split (a ``split`` field, a file name in a folder, or a Hub split).
      columns: keep only these.

    Raises:
      UserError: missing or damaged file (with its line), unknown split or column, mixed types,
        NaN, or a Hub dataset that cannot be had.
    """
    rows = records(source, split=split)
    if not len(rows):
        raise UserError(f"{source}: no rows" + (f" in split {split!r}" if split else ""))
    stored = not isinstance(rows, list)
    have = list(rows[0])
    for name in columns or ():
        if name not in have:
            raise UserError(f"{source}: no column {name!r}; it has {sorted(have)}")
    found = {}
    for name in columns or have:
        column = Stored(rows, name, source) if stored else _gather(rows, name, source)
        fits = name in COLUMNS and _fits(column, COLUMNS[name])
        key = name if fits or name not in COLUMNS else f"raw_{name}"
        found[key] = _as_kind(column, COLUMNS[name][0]) if fits else column
    return Table(found)


def records(source: str | Path, *, split: str | None = None, config: str | None = None) -> Rows:
    """The rows of a source as dicts of Python values, random access (see ``read``)."""
    path = Path(source)
    if not path.exists():
        return _hub(str(source), split, config)
    if split is None and path.is_file():
        return _file(path)
    splits = local_splits(path)
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(f"{path}: no split {split!r}; it has {sorted(splits)}")
    return splits[split]


def local_splits(path: Path) -> dict[str, Rows]:
    """Every split of a local file or folder; the name "" holds rows that name no split."""
    if path.is_dir():
        return _folder(path)
    rows = _file(path)
    if not len(rows) or "split" not in rows[0]:
        return {"": rows}
    if isinstance(rows, list):
        groups: dict[str, Any] = {}
        for row in rows:
            groups.setdefault(str(row.get("split", "")), []).append(row)
        return groups
    names = np.asarray(rows["split"][:], object)  # type: ignore[call-overload]
    return {
        str(name): rows.select(np.flatnonzero(names == name))  # type: ignore[attr-defined]
        for name in dict.fromkeys(names.tolist())
    }


class Stored:
    """A column that is read when indexed: ``len`` and ``[index]`` giving numpy [len(index), ...].

    ``kind`` is "int" or "float" where the column dictionary asks for a cast, else None.
    """

    def __init__(self, rows: Any, name: str, source: Any, kind: str | None = None):
        self.rows, self.name, self.source, self.kind = rows, name, source, kind
        if hasattr(rows, "select_columns"):
            self.rows = rows.select_columns([name]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return self[np.asarray([index])][0]
        where = np.arange(len(self))[index]
        if hasattr(self.rows, "select_columns"):
            values = _from_arrow(self.rows[where][self.name], self._place, where)
        else:
            values = _as_array([self.rows[int(i)][self.name] for i in where], self._place, where)
        if values.dtype.kind == "f" and np.isnan(values).any():
            bad = int(where[np.argwhere(np.isnan(values))[0, 0]])
            raise UserError(f"{self._place} is NaN in row {bad}")
        return _cast(values, self.kind)

    @property
    def _place(self) -> str:
        return f"{self.source}: column {self.name!r}"


def _as_kind(column: Any, kind: str) -> Any:
    if isinstance(column, Stored):
        return Stored(column.rows, column.name, column.source, kind)
    return _cast(column, kind)


def _cast(values: np.ndarray, kind: str | None) -> np.ndarray:
    target = {"int": np.int32, "float": np.float32}.get(kind or "")
    return values if target is None else values.astype(target)


def _fits(column: Any, want: Any) -> bool:
    """Whether a column has the kind and rank that the column dictionary gives its name."""
    if isinstance(want, Mapping):
        return False
    sample = column[np.arange(min(len(column), 8))]
    kinds = {"int": "iu", "float": "iuf", "any": "iuf"}[want[0]]
    return sample.dtype.kind in kinds and sample.ndim == 1 + len(want[1])


def _gather(rows: Any, name: str, source: Any) -> np.ndarray:
    """One column of in-memory rows; a row that lacks it is an error."""
    values = []
    for i, row in enumerate(rows):
        if name not in row:
            raise UserError(f"{source}: row {row.get('id', i)} has no field {name!r}")
        values.append(row[name])
    return _as_array(values, f"{source}: column {name!r}", None)


def _as_array(values: list[Any], place: str, where: np.ndarray | None) -> np.ndarray:
    """Python values to numpy by one rule for all sources; numbers must not be mixed with text."""
    kinds = {type(value) for value in values}
    if not kinds:
        return np.empty(0, object)
    if kinds <= {bool} or kinds <= {int} or kinds <= {int, float}:
        dtype = {bool: bool, int: np.int64}.get(next(iter(kinds)), np.float64)
        return np.asarray(values, dtype if len(kinds) == 1 else np.float64)
    if kinds == {list}:
        return _lists(values)
    text = kinds - {type(None)}
    if len(text) > 1 or (text & {int, float, bool} and type(None) in kinds):
        first = type(values[0])
        odd = next(i for i, value in enumerate(values) if type(value) is not first)
        row = odd if where is None else int(where[odd])
        raise UserError(
            f"{place} mixes types: {first.__name__} in the first row, "
            f"{type(values[odd]).__name__} in row {row}"
        )
    return _objects(values)


def _lists(values: list[list[Any]]) -> np.ndarray:
    numeric = all(type(item) in (int, float) for value in values for item in value)
    if numeric and len({len(value) for value in values}) == 1 and values[0]:
        whole = all(type(item) is int for value in values for item in value)
        return np.asarray(values, np.int64 if whole else np.float64)
    return _objects(values)


def _objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):  # `column[:] = values` would unpack lists of equal length
        column[i] = value
    return column


def _from_arrow(column: Any, place: str, where: np.ndarray) -> np.ndarray:
    """An Arrow column to numpy; numbers and equal-length lists of numbers without a detour."""
    import pyarrow as pa
    import pyarrow.types as kind

    def plain(values: Any) -> bool:
        number = kind.is_integer(values.type) or kind.is_floating(values.type)
        return number and not values.null_count

    column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if plain(column):
        return column.to_numpy(zero_copy_only=False)
    if kind.is_list(column.type) and len(column) and not column.null_count:
        inner, sizes = column.flatten(), np.diff(column.offsets.to_numpy())
        if plain(inner) and sizes.min() == sizes.max() > 0:
            return inner.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return _as_array(column.to_pylist(), place, where)


# Files


def _file(path: Path) -> Any:
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".ndjson")):
        return list(_jsonl(path))
    if name.endswith((".parquet", ".arrow", ".csv")):
        return _arrow_file(path)
    raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; every fault is named with its line."""
    number = 0
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: damaged or truncated gzip after line {number} ({error}); fetch it again"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text after line {number} ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _row(line: str, place: str) -> dict[str, Any]:
    def constant(name: str) -> Any:
        raise UserError(f"{place}: {name} is not a value we can train on; mend the row")

    try:
        row = json.loads(line, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _arrow_file(path: Path) -> Any:
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetGenerationError

    kind = path.suffix
    try:
        with _quiet():
            if kind == ".arrow":
                return datasets.Dataset.from_file(str(path))
            if kind == ".csv":
                return datasets.Dataset.from_csv(str(path))
            return datasets.Dataset.from_parquet(str(path))
    except (DatasetGenerationError, pa.ArrowException, ValueError) as error:
        cause = error.__cause__ or error
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UserError(f"{path}: cannot be read as {kind[1:]} ({first})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and messages of ``datasets`` off for the block: faults become one line."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


# Folders


def _folder(path: Path) -> dict[str, Rows]:
    if (path / "features.json").is_file() and (path / "dataset_info.json").is_file():
        return _array_record(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path)
    files = [f for f in sorted(path.iterdir()) if f.name.endswith(SUFFIXES)]
    if not files:
        found = ", ".join(sorted(f.name for f in path.iterdir())[:12]) or "nothing"
        raise UserError(f"{path}: no data files ({', '.join(SUFFIXES)}); found {found}")
    groups: dict[str, Any] = {}
    for file in files:  # train.jsonl, train-00000-of-00002.parquet, test_1.csv
        name = file.name.split(".")[0].split("-")[0]
        groups.setdefault(name, []).append(_file(file))
    return {name: _join(parts) for name, parts in groups.items()}


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    import datasets

    return datasets.concatenate_datasets(parts)


def _saved(path: Path) -> dict[str, Rows]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # any damage: the library raises many types
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged saved dataset ({first})") from None
    if isinstance(loaded, datasets.DatasetDict):
        return {str(name): rows for name, rows in loaded.items()}  # type: ignore
    return {"": loaded}


class _Decoded(Sequence):
    """Rows of an ArrayRecord source with bytes as text and numpy values as Python's."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        try:
            row = self.source[int(index)]
        except Exception as error:  # the reader raises RuntimeError, ValueError, ...
            raise UserError(f"row {index} cannot be read as ArrayRecord ({error})") from None
        return {name: _python(value) for name, value in row.items()}


def _python(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _python(leaf) for name, leaf in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf8")
    if isinstance(value, list):
        return [_python(item) for item in value]
    return _python(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value


def _array_record(path: Path) -> dict[str, Rows]:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(str(path))
        shards = [f for split in builder.info.splits.values() for f in split.filepaths]
        if gone := [shard.name for shard in map(Path, shards) if not shard.exists()]:
            raise FileNotFoundError(f"no shard {gone[0]}")
        return {name: _Decoded(builder.as_data_source(name)) for name in builder.info.splits}
    except Exception as error:  # a missing shard or another file format: many types
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as ArrayRecord ({first})") from None


# The Hub


def _hub(name: str, split: str | None, config: str | None) -> Any:
    looks_local = name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local:
        raise UserError(f"{name}: no such file or folder")
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # offline, absent, gated, script-based: the library raises many
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {name!r} from the Hugging Face Hub ({first}); "
            "give a local copy with --data FOLDER (JSONL or parquet)"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            raise UserError(f"{name!r} has the splits {sorted(map(str, loaded))}: name one")
        return next(iter(loaded.values()))
    return loaded
