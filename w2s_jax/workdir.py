"""Files that are whole or absent: atomic writes, artefacts kept under a hash of their inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.types import Table

_VALUE = "__value__"  # the entry of an archive that holds the structure around its arrays
_CORRUPT = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, TypeError)


def write(path: Path, data: str | bytes) -> None:
    """Put ``data`` at ``path``: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """Content hash (16 hex digits) of nested dicts, sequences, numbers, text, dataclasses,
    arrays, tables and functions (by name, with the arguments a ``partial`` binds).

    Raises:
      TypeError: something whose content cannot be named, an open file for instance.
    """
    text = json.dumps(_name(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached(folder: Path, make: Callable[[], Any], say: Callable[[str], None], keep: bool) -> Any:
    """The value kept in ``folder``, or that of ``make()``, kept there first if ``keep``.

    A value is nested dicts, lists and tuples of numbers, text, None, arrays (any dtype of jax) and
    Tables; arrays come back as numpy, on the first call as on every later one. A damaged
    artefact is reported by one line of ``say`` and made again.
    """
    for path in (folder / "artefact.npz", folder / "artefact.json"):
        if path.exists():
            try:
                return _read(path)
            except _CORRUPT as error:
                say(f"{path} is damaged ({type(error).__name__}); making it again")
                if keep:
                    path.unlink()
    arrays: dict[str, np.ndarray] = {}
    packed = _pack(make(), arrays)
    if keep:
        _save(folder, packed, arrays)
    return _unpack(json.loads(json.dumps(packed)), arrays)


def move_aside(workdir: Path) -> Path | None:
    """Move what a run left in ``workdir`` into a new ``earlier-<n>`` folder there; its path."""
    left = [path for path in workdir.iterdir() if _ours(path)]
    if not left:
        return None
    n = 1
    while (target := workdir / f"earlier-{n}").exists():
        n += 1
    target.mkdir()
    for path in left:
        shutil.move(path, target / path.name)
    return target


def started(workdir: Path) -> bool:
    """Whether a run has left something worth keeping in ``workdir``."""
    return any(_ours(path) and path.name != "config.json" for path in workdir.iterdir())


def _ours(path: Path) -> bool:
    files = {
        "config.json",
        "summary.json",
        "results.jsonl",
        "results.part.jsonl",
        "metrics.jsonl",
        "speed.jsonl",
    }
    stem, _, tail = path.name.rpartition("-")
    stage = bool(stem) and len(tail) == 16 and set(tail) <= set("0123456789abcdef")
    return path.name in files or (path.is_dir() and (stage or path.name in {"figures", "logs"}))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _save(folder: Path, packed: Any, arrays: dict[str, np.ndarray]) -> None:
    text = json.dumps(packed)
    if not arrays:
        sha = hashlib.sha256(text.encode()).hexdigest()
        write(folder / "artefact.json", json.dumps({"sha256": sha, "value": packed}))
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".artefact.npz"
    try:
        with open(temporary, "wb") as file:
            entries: Any = {name: _bits(array) for name, array in arrays.items()}
            entries[_VALUE] = np.frombuffer(text.encode(), np.uint8)
            np.savez(file, **entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "artefact.npz")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        stored = json.loads(path.read_text())
        text = json.dumps(stored["value"])
        if hashlib.sha256(text.encode()).hexdigest() != stored["sha256"]:
            raise ValueError("checksum")
        return _unpack(stored["value"], {})
    with open(path, "rb") as file, np.load(file) as archive:  # checks a CRC per entry
        packed = json.loads(archive[_VALUE].tobytes().decode())
        return _unpack(packed, {k: archive[k] for k in archive.files if k != _VALUE})


def _pack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Table):
        columns = {name: _column(value[name]) for name in value.columns}
        return {"$": "table", "columns": _pack(columns, arrays)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key != "$" for key in value):
            raise TypeError(f"an artefact's dict needs text keys, got {list(value)}")
        return {key: _pack(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_pack(item, arrays) for item in value]
    if isinstance(value, tuple):
        return {"$": "tuple", "values": [_pack(item, arrays) for item in value]}
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind in "OU":
            return {"$": "objects", "values": [_pack(item, arrays) for item in array.tolist()]}
        name = f"a{len(arrays)}"
        arrays[name] = array
        return {"$": "array", "name": name, "dtype": array.dtype.name}
    raise TypeError(f"an artefact cannot hold a {type(value).__name__}")


def _unpack(packed: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, arrays) for item in packed]
    if not isinstance(packed, dict):
        return packed
    kind = packed.get("$")
    if kind == "table":
        return Table(_unpack(packed["columns"], arrays))
    if kind == "tuple":
        return tuple(_unpack(item, arrays) for item in packed["values"])
    if kind == "objects":
        values = [_unpack(item, arrays) for item in packed["values"]]
        column = np.empty(len(values), object)
        column[:] = values
        return column
    if kind == "array":
        return _typed(arrays[packed["name"]], packed["dtype"])
    return {key: _unpack(item, arrays) for key, item in packed.items()}


def _bits(array: np.ndarray) -> np.ndarray:
    # numpy archives know no bfloat16 or float8 (kind V): their bits travel as integers
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype.name == dtype:
        return array
    import ml_dtypes  # a dependency of jax

    return array.view(np.dtype(getattr(ml_dtypes, dtype)))


def _column(column: Any) -> Any:
    if isinstance(column, Mapping):
        return {name: _column(leaf) for name, leaf in column.items()}
    return np.asarray(column[np.arange(len(column))])


def _name(value: Any) -> Any:
    """A JSON value that stands for the content of ``value``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Table):
        return {"table": value.digest()}
    if isinstance(value, partial):
        return [_name(value.func), _name(value.args), _name(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _name(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__qualname__: fields}
    if isinstance(value, Mapping):
        return {str(key): _name(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_name(item) for item in value]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind == "O":
            return [_name(item) for item in array.tolist()]
        bits = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return [array.dtype.name, list(array.shape), bits]
    if callable(value) and hasattr(value, "__qualname__"):
        if "<" in value.__qualname__ or getattr(value, "__closure__", None):
            raise TypeError(f"{value.__qualname__} binds values that a hash cannot see; name them")
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"cannot hash a {type(value).__name__} as the input of a stage")
