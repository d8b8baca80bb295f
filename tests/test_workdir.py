"""Atomic files, the hash of a stage's inputs, artefacts that come back as they were made."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax import workdir
from w2s_jax.types import Table


def quiet(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, Table):
        assert a.digest() == b.digest()
    else:
        assert a == b


VALUE = {
    "scores": np.arange(6.0).reshape(2, 3),
    "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
    "pair": (1, ["a", None, 0.25]),
    "empty": np.zeros((0, 4), np.int32),
    "text": np.array(["one", "two"], object),
    "table": Table(
        {"label": np.eye(2, dtype=np.float32), "question": np.array(["x", "y"], object)}
    ),
}


def test_an_artefact_is_made_once_and_comes_back_the_same(tmp_path: Path) -> None:
    calls = []

    def make():
        calls.append(1)
        return VALUE

    first = workdir.cached(tmp_path / "a", make, quiet, True)
    again = workdir.cached(tmp_path / "a", make, quiet, True)
    assert len(calls) == 1
    assert_same(first, again)
    assert first["half"].dtype == jnp.bfloat16 and first["pair"] == (1, ["a", None, 0.25])
    np.testing.assert_array_equal(first["scores"], VALUE["scores"])
    assert first["table"].digest() == VALUE["table"].digest()


@pytest.mark.parametrize("value", [VALUE, {"plain": [1, 2.5, "x"]}], ids=["arrays", "json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_artefact_is_made_again_and_said(tmp_path, value, damage) -> None:
    workdir.cached(tmp_path, lambda: value, quiet, True)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[data.find(b"2.5" if path.suffix == ".json" else np.arange(6.0).tobytes())] ^= 1
    path.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}[damage])
    said: list[str] = []
    workdir.cached(tmp_path, lambda: {"new": 1}, said.append, True)
    assert len(said) == 1 and "damaged" in said[0]
    assert workdir.cached(tmp_path, lambda: 1 / 0, quiet, True) == {"new": 1}


def test_every_flipped_byte_of_the_arrays_is_noticed(tmp_path: Path) -> None:
    workdir.cached(tmp_path, lambda: {"x": np.arange(8)}, quiet, True)
    path = tmp_path / "artefact.npz"
    data = path.read_bytes()
    start = data.find(np.arange(8).tobytes())
    assert start > 0
    for at in range(start, start + 64, 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        said: list[str] = []
        workdir.cached(tmp_path, lambda: {"x": np.arange(8)}, said.append, False)
        assert said


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        workdir.cached(tmp_path / "stage", lambda: 1 / 0, quiet, True)
    with pytest.raises(TypeError, match="cannot hold a set"):
        workdir.cached(tmp_path / "stage", lambda: {1, 2}, quiet, True)
    assert not (tmp_path / "stage").exists()


def test_a_process_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    assert workdir.cached(tmp_path / "stage", lambda: {"x": 1}, quiet, False) == {"x": 1}
    assert not (tmp_path / "stage").exists()


def test_write_replaces_whole_files(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "deep" / "file"
    workdir.write(path, "old")
    workdir.write(path, "new")
    assert path.read_text() == "new"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        workdir.write(path, "newer")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def scale(x, by):
    return x * by


def test_a_digest_is_of_the_content() -> None:
    table = Table({"label": np.eye(2, dtype=np.float32)})
    base = {"seed": 1, "table": table, "x": np.arange(3), "loss": partial(scale, by=2)}
    assert workdir.digest(base) == workdir.digest(dict(reversed(base.items())))
    changes = [
        {"seed": 2},
        {"table": table.with_columns(group=np.zeros(2, np.int32))},
        {"x": np.arange(3.0)},
        {"x": np.arange(4)},
        {"loss": partial(scale, by=3)},
        {"loss": scale},
    ]
    digests = {workdir.digest({**base, **change}) for change in changes}
    assert len(digests) == len(changes) and workdir.digest(base) not in digests


def test_what_has_no_name_has_no_digest() -> None:
    with pytest.raises(TypeError, match="name them"):
        workdir.digest({"loss": lambda x: x})
    with pytest.raises(TypeError, match="cannot hash"):
        workdir.digest({"file": object()})
