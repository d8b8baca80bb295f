"""Labelled pictures and frozen features from npz files, or scikit-learn's digits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import UserError


def arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an npz file.

    Raises:
      UserError: no such file, no npz file, or one that lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := sorted(set(names) - set(archive.files)):
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {archive.files}")
            return {name: archive[name] for name in names}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file ({error})") from None


def draw(rows: int, need: int, source: str | Path) -> np.ndarray:
    """``need`` of ``rows`` row numbers in an order that is always the same.

    Raises:
      UserError: there are not so many.
    """
    if need > rows:
        raise UserError(f"{source} has {rows} rows, {need} are asked for: ask for fewer")
    return np.random.default_rng(0).permutation(rows)[:need]


def pictures(path: str | Path, train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """``train`` rows, then ``test`` rows: pictures [N,H,W,C] float32, classes [N] int32.

    Pictures are divided by the largest value of the ``train`` rows. An npz file has x_train,
    y_train, x_test, y_test (as MNIST does); an empty path means scikit-learn's 1,797 digits of
    8x8 pixels (Alpaydin and Kaynak 1998), which it ships.

    Raises:
      UserError: a file that cannot be read, or has too few rows.
    """
    if str(path):
        found = arrays(path, ("x_train", "y_train", "x_test", "y_test"))
        for part in ("train", "test"):
            _pair(str(path), part, found[f"x_{part}"], found[f"y_{part}"])
        first = draw(len(found["y_train"]), train, f"{path} (x_train)")
        last = draw(len(found["y_test"]), test, f"{path} (x_test)")
        images = np.concatenate([found["x_train"][first], found["x_test"][last]])
        truth = np.concatenate([found["y_train"][first], found["y_test"][last]])
    else:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        rows = draw(
            len(digits.target), train + test, "scikit-learn's digits (name a file for more)"
        )
        images, truth = digits.images[rows], digits.target[rows]
    images = images.astype(np.float32)
    images /= max(images[:train].max(), 1e-6)  # a scale that no test picture has a say in
    images = images[..., None] if images.ndim == 3 else images
    return images, truth.astype(np.int32).reshape(-1)


def _pair(path: str, part: str, images: np.ndarray, truth: np.ndarray) -> None:
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
        raise UserError(
            f"{path}: x_{part} must be numbers [N,H,W] or [N,H,W,C], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if truth.size != len(images) or truth.dtype.kind not in "ui" or (truth < 0).any():
        raise UserError(
            f"{path}: y_{part} must be {len(images)} class numbers from 0, one per picture, got "
            f"{truth.dtype} {list(truth.shape)}"
        )
    if not np.isfinite(images).all():
        raise UserError(f"{path}: x_{part} has values that are NaN or infinite")
