"""Images for probes: thumbnails, and frozen features of local patches learnt without labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Array, Params

_CONTRAST = 0.01  # added to a patch's variance: flat patches stay flat
_SHRINK = 0.1  # added to the eigenvalues before whitening


def thumbnails(images: Any, side: int) -> Array:
    """Images [N,H,W,C] as [N, side * side * C] float32: shrunk with anti-aliasing, flattened.

    Raises:
      UserError: ``side`` below 1 or above the images' own.
    """
    count, high, wide, channels = images.shape
    if not 1 <= side <= min(high, wide):
        raise UserError(
            f"a thumbnail of side {side} of images {high}x{wide}: choose 1 or more, "
            "at most the image's side"
        )
    shape = (count, side, side, channels)
    small = jax.image.resize(jnp.asarray(images, jnp.float32), shape, "linear", antialias=True)
    return small.reshape(count, -1)


def patch_bank(images: np.ndarray, filters: int, size: int, seed: int = 0) -> Params:
    """Frozen filters for ``patch_features``: whitened random patches of unlabelled images.

    Coates and Ng 2011 ("The importance of encoding versus training with sparse coding and vector
    quantization"): random patches, once whitened, make filters as good as learnt ones.

    Args:
      images: [N,H,W,C] floats in [0, 1].
      filters: number K of filters.
      size: side P of the square patches.

    Returns:
      ``mean`` [P*P*C] and ``filters`` [P*P*C, K] float32, the whitening folded into the filters.

    Raises:
      UserError: a patch larger than the images.
    """
    if not 1 <= size <= min(images.shape[1:3]):
        raise UserError(f"patches of side {size} do not fit images of shape {images.shape[1:]}")
    rng = np.random.default_rng(seed)
    count = max(20_000, filters)
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    places = [rng.integers(0, n, count) for n in windows.shape[:3]]
    # channels first, as ``conv_general_dilated_patches`` lays a patch out
    patches = np.asarray(_even(windows[tuple(places)].reshape(count, -1)), np.float64)
    mean = patches.mean(0)
    values, vectors = np.linalg.eigh(np.cov(patches.T))
    whiten = (vectors / np.sqrt(values + _SHRINK)) @ vectors.T
    chosen = (patches[rng.choice(count, filters, replace=False)] - mean) @ whiten
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True) + 1e-6
    return {"mean": mean.astype(np.float32), "filters": (whiten @ chosen.T).astype(np.float32)}


def patch_features(bank: Params, images: Array, size: int, threshold: float = 0.25) -> Array:
    """Features [N, 8K] of images [N,H,W,C]: soft-thresholded filter answers of both signs,
    averaged over each quarter of the image (Coates and Ng 2011)."""
    patches = jax.lax.conv_general_dilated_patches(
        images.astype(jnp.float32),
        (size, size),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    answers = (_even(patches) - bank["mean"][None, None, None]) @ bank["filters"]
    signs = jnp.concatenate([answers, -answers], axis=-1)
    active = jax.nn.relu(signs - threshold)
    high, wide = (-(-n // 2) for n in active.shape[1:3])
    quarters = [
        active[:, rows, columns].mean((1, 2))
        for rows in (slice(None, high), slice(-high, None))
        for columns in (slice(None, wide), slice(-wide, None))
    ]
    return jnp.concatenate(quarters, axis=-1)


def _even(patches: Any) -> Any:
    """Each patch (last axis) with mean 0 and about unit variance."""
    centred = patches - patches.mean(-1, keepdims=True)
    return centred / (centred.var(-1, keepdims=True) + _CONTRAST) ** 0.5
