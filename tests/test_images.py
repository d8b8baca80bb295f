"""Pictures from files, by name and from scikit-learn: disjoint, scaled, refused in one line."""

import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from w2s_jax.data import images
from w2s_jax.errors import UserError


def archive(path, **change):
    """Pictures whose every pixel is the number of the row."""
    rows = np.arange(20, dtype=np.uint8)
    parts = {
        "x_train": np.broadcast_to(rows[:, None, None], (20, 4, 3)),
        "y_train": rows % 3,
        "x_test": np.full((6, 4, 3), 200, np.uint8),
        "y_test": rows[:6, None] % 3,  # as CIFAR files have it
    }
    np.savez(path, **(parts | change))
    return path


def test_tables_are_disjoint_and_every_seed_has_the_same_rows(tmp_path) -> None:
    path = archive(tmp_path / "some.npz")
    one, two = (images.load(path, seed=seed, train=12, dev=5, test=6) for seed in (0, 1))
    known = [
        np.sort(np.concatenate([p.train["image"], p.dev["image"]])[:, 0, 0, 0]) for p in (one, two)
    ]
    assert np.array_equal(known[0], known[1]) and len(set(known[0].tolist())) == 17
    assert not np.array_equal(one.dev["image"], two.dev["image"])
    assert np.array_equal(one.test["image"], two.test["image"])
    assert one.train["image"].shape == (12, 4, 3, 1) and known[0].max() == 1.0
    for table in (one.train, one.dev, one.test):
        assert np.array_equal(table["label"].argmax(-1), table["truth"])
        assert table["label"].dtype == np.float32 and table["label"].shape[1] == 3
    scale = one.test["image"].max() / 200  # test pictures have no say in it
    number = np.round(one.train["image"][:, 0, 0, 0] / scale)
    assert np.array_equal(number % 3, one.train["truth"])


def test_classes_are_those_of_the_source_whichever_rows_are_drawn(tmp_path) -> None:
    path = archive(tmp_path / "some.npz", y_train=np.arange(20))
    shown = images.load(path, seed=0, train=3, dev=1, test=1)
    assert shown.train["label"].shape == (3, 20) and shown.test["label"].shape == (1, 20)
    assert images.load("", seed=0, train=2, dev=0, test=1).train["label"].shape == (2, 10)


def test_negative_pictures_lie_between_minus_1_and_0(tmp_path) -> None:
    below = -np.arange(20.0)[:, None, None].repeat(4, 1).repeat(3, 2)
    path = archive(tmp_path / "some.npz", x_train=below)
    shown = images.load(path, seed=0, train=20, dev=0, test=1).train["image"]
    assert (shown.min(), shown.max()) == (-1.0, 0.0)


def test_digits_need_no_file() -> None:
    shown, truth = images.pictures("", 30, 10)
    assert shown.shape == (40, 8, 8, 1) and shown[:30].max() == 1.0
    assert truth.dtype == np.int32 and set(truth) <= set(range(10))


def test_a_name_is_read_by_tensorflow_datasets(monkeypatch) -> None:
    asked = {}

    def read(name, **settings):
        asked.update(settings, name=name)
        shown = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
        return (shown, np.array([3, 4])), (shown[:1], np.array([5]))

    fake = SimpleNamespace(load=read, as_numpy=lambda parts: parts)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    shown, truth = images.pictures("cifar10", 2, 1)
    assert shown.shape == (3, 32, 32, 3) and sorted(truth) == [3, 4, 5]
    assert asked["name"] == "cifar10" and asked["download"] is False

    def absent(name, **settings):
        raise AssertionError("Dataset cifar10: could not find data\nin this folder")

    monkeypatch.setattr(fake, "load", absent)
    for download, cure in ((False, "allow its download"), (True, "look at the network")):
        with pytest.raises(UserError, match=f"no cifar10 .*{cure}, or name an npz") as caught:
            images.pictures("cifar10", 2, 1, download=download)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((20, 4))}, "x_train must be numbers"),
        ({"x_test": np.zeros((6, 4, 4))}, "differ in the shape"),
        ({"y_train": np.zeros(20)}, "y_train must be 20 class numbers"),
        ({"y_test": np.full(6, -1)}, "y_test must be 6 class numbers"),
        ({"x_train": np.full((20, 4, 3), np.nan)}, "NaN, infinite or beyond float32"),
        ({"x_test": np.full((6, 4, 3), 1e300)}, "NaN, infinite or beyond float32"),
        ({"x_train": np.zeros((20, 0, 3))}, r"x_train must be numbers .* \[20, 0, 3\]"),
        ({"x_train": np.zeros((20, 3, 8, 8))}, r"channels first; .*transpose\(0, 2, 3, 1\)"),
        ({"y_train": np.full(20, 2**40)}, "y_train has the class 1099511627776; number"),
    ],
)
def test_faults_of_a_file_are_told(tmp_path, change, words) -> None:
    path = archive(tmp_path / "some.npz", **change)
    with pytest.raises(UserError, match=words):
        images.load(path, seed=0, train=5, dev=2, test=2)


def test_files_that_are_none_are_told(tmp_path) -> None:
    path = archive(tmp_path / "some.npz")
    with pytest.raises(UserError, match="20 rows, 30 are asked for"):
        images.load(path, seed=0, train=20, dev=10, test=2)
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    with pytest.raises(UserError, match="lacks x_test, x_train, y_test, y_train"):
        images.load(tmp_path / "other.npz", seed=0, train=1, dev=1, test=1)
    with pytest.raises(UserError, match="cifar11 is not a readable npz file"):
        images.load("cifar11", seed=0, train=1, dev=1, test=1)
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    np.savez_compressed(tmp_path / "broken.npz", **dict(np.load(path)))
    torn = bytearray((tmp_path / "broken.npz").read_bytes())
    torn[97] ^= 0xFF
    (tmp_path / "broken.npz").write_bytes(torn)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as file:
        for name in images.PARTS:
            file.writestr(name, "words")
    for name in ("single.npy", "empty.npz", "broken.npz", "text.zip"):
        with pytest.raises(UserError, match=f"{name}(: x_train| is not)") as caught:
            images.load(tmp_path / name, seed=0, train=1, dev=1, test=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [(0, 0, 1), (-1, 5, 1), (5, -1, 1), (5, 1, -1)])
def test_sizes_below_none_are_told(tmp_path, asked) -> None:
    path = archive(tmp_path / "some.npz")
    with pytest.raises(UserError, match="or more|at least one"):
        images.load(path, seed=0, **dict(zip(("train", "dev", "test"), asked, strict=True)))
