"""Labelled pictures and frozen features: npz files, ``tensorflow_datasets``, digits."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Table

NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100")  # of tensorflow_datasets
PARTS = ("x_train", "y_train", "x_test", "y_test")
MOST = 100_000  # classes: a larger number is no class
_UNREADABLE = (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile)
_UNREADABLE += (zlib.error,)


def arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an npz file.

    Raises:
      UserError: no such file, no npz file, or one that lacks an array.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := sorted(set(names) - set(archive.files)):
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {archive.files}")
            return {name: np.asarray(archive[name]) for name in names}
    except _UNREADABLE as error:
        raise UserError(f"{path} is not a readable npz file ({error})") from None


def draw(rows: int, need: int, source: str | Path) -> np.ndarray:
    """``need`` of ``rows`` row numbers in an order that is always the same.

    Raises:
      UserError: there are not so many, or less than none are asked for.
    """
    if need < 0:
        raise UserError(f"{source}: {need} rows are asked for; ask for 0 or more")
    if need > rows:
        raise UserError(f"{source} has {rows} rows, {need} are asked for: ask for fewer")
    return np.random.default_rng(0).permutation(rows)[:need]


@dataclass(frozen=True)
class Pictures:
    """Three disjoint tables: ``image`` [N,H,W,C] float32, ``label`` [N,classes] float32 one-hot,
    ``truth`` [N] int32."""

    train: Table
    dev: Table
    test: Table


def load(
    source: str | Path = "", *, seed: int, train: int, dev: int, test: int, download: bool = False
) -> Pictures:
    """Labelled pictures from ``source`` (see ``pictures``), which a network can train on.

    Every seed has the same ``train`` + ``dev`` rows, divided in its own way, and the same test.
    The classes are those of the whole source, whichever rows are drawn.

    Raises:
      UserError: as ``pictures``; less than no rows.
    """
    if min(train, dev) < 0:
        raise UserError(f"pictures: train and dev are 0 or more, got {train} and {dev}")
    images, truth, classes = _drawn(source, train + dev, test, download)
    label = np.zeros((len(truth), classes), np.float32)
    label[np.arange(len(truth)), truth] = 1.0
    table = Table({"image": images, "label": label, "truth": truth})
    known = np.random.default_rng([seed]).permutation(train + dev)
    last = np.arange(train + dev, len(truth))
    return Pictures(*(table.take(rows) for rows in (known[dev:], known[:dev], last)))


def pictures(
    source: str | Path, train: int, test: int, *, download: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """``train`` rows, then ``test`` rows: pictures [N,H,W,C] float32, classes [N] int32.

    Pictures are divided by the largest absolute value of the ``train`` rows; which rows they are
    is always the same. ``source`` is an npz file with x_train, y_train, x_test, y_test (as
    MNIST's), a name in ``NAMES``, which ``tensorflow_datasets`` reads from its folder
    (``TFDS_DATA_DIR``), or empty for scikit-learn's 1,797 digits of 8x8 pixels (Alpaydin and
    Kaynak 1998), which it ships.

    Args:
      download: let ``tensorflow_datasets`` fetch what it does not have.

    Raises:
      UserError: a source that cannot be read, or has too few rows.
    """
    return _drawn(source, train, test, download)[:2]


def _drawn(
    source: str | Path, train: int, test: int, download: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """What ``pictures`` gives, and the number of classes of the whole source."""
    if train < 1:
        raise UserError(f"pictures: at least one row to train on is needed, got {train}")
    if str(source):
        named = str(source) in NAMES
        found = _named(str(source), download) if named else arrays(source, PARTS)
        for part in ("train", "test"):
            _pair(str(source), part, found[f"x_{part}"], found[f"y_{part}"])
        shapes = [found[f"x_{part}"].shape[1:] for part in ("train", "test")]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{source}: x_train and x_test differ in the shape of a picture {shapes}"
            )
        first = draw(len(found["y_train"]), train, f"{source} (x_train)")
        last = draw(len(found["y_test"]), test, f"{source} (x_test)")
        images = np.concatenate([found["x_train"][first], found["x_test"][last]])
        known = [found[f"y_{part}"].reshape(-1) for part in ("train", "test")]
        classes = 1 + max(int(part.max(initial=0)) for part in known)
        truth = np.concatenate([known[0][first], known[1][last]])
    else:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        rows = draw(
            len(digits.target), train + test, "scikit-learn's digits (name a file for more)"
        )
        images, truth, classes = digits.images[rows], digits.target[rows], 10
    images = images.astype(np.float32)
    largest = max(images[:train].max(), -images[:train].min())
    images /= max(largest, 1e-6)  # a scale that no test picture has a say in
    images = images[..., None] if images.ndim == 3 else images
    return images, truth.astype(np.int32), classes


def _named(name: str, download: bool) -> dict[str, np.ndarray]:
    """What ``tensorflow_datasets`` has under ``name``, as an npz file would have it."""
    import tensorflow_datasets

    try:
        parts: Any = tensorflow_datasets.load(
            name, split=["train", "test"], batch_size=-1, as_supervised=True, download=download
        )
        parts = tensorflow_datasets.as_numpy(parts)
    except Exception as error:  # it raises many kinds, of its own and of the network
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        cure = "look at the network" if download else "allow its download"
        raise UserError(
            f"tensorflow_datasets gives no {name} ({why}): {cure}, or name an npz file"
        ) from None
    return {
        f"{x}_{part}": a
        for part, pair in zip(("train", "test"), parts, strict=True)
        for x, a in zip("xy", pair, strict=True)
    }


def _pair(path: str, part: str, images: np.ndarray, truth: np.ndarray) -> None:
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif" or not images[:1].size:
        raise UserError(
            f"{path}: x_{part} must be numbers [N,H,W] or [N,H,W,C], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise UserError(
            f"{path}: x_{part} {list(images.shape)} has its channels first; move them last: "
            "x.transpose(0, 2, 3, 1)"
        )
    if truth.size != len(images) or truth.dtype.kind not in "ui" or (truth < 0).any():
        raise UserError(
            f"{path}: y_{part} must be {len(images)} class numbers from 0, one per picture, got "
            f"{truth.dtype} {list(truth.shape)}"
        )
    if truth.max(initial=0) >= MOST:
        raise UserError(
            f"{path}: y_{part} has the class {truth.max()}; number the classes 0, 1, ... (at most "
            f"{MOST} of them)"
        )
    if not (abs(images) < 3e38 if images.dtype.kind == "f" else np.True_).all():
        raise UserError(f"{path}: x_{part} has values that are NaN, infinite or beyond float32")
