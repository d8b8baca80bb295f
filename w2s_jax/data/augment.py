"""Random changes of pictures inside a step: pure functions ``(key, images) -> images``.

All take and give [B,H,W,C] of any dtype; every picture draws its own change, so that one key gives
one augmented batch on any number of devices. Bind the numbers with ``functools.partial``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from w2s_jax.types import Array

Augment = Callable[[Array, Array], Array]


def flip(key: Array, images: Array) -> Array:
    """Each picture mirrored left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def crop(key: Array, images: Array, *, padding: int = 4) -> Array:
    """Each picture moved by up to ``padding`` pixels along both axes, zeros where it was not: a
    random crop of the padded picture, as He et al. 2015 (arXiv 1512.03385) do for CIFAR."""
    count, high, wide, _ = images.shape
    corners = jax.random.randint(key, (2, count), 0, 2 * padding + 1)
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, edges)
    rows = (corners[0][:, None] + jnp.arange(high)[None])[:, :, None, None]
    columns = (corners[1][:, None] + jnp.arange(wide)[None])[:, None, :, None]
    padded = jnp.take_along_axis(padded, rows, axis=1)
    return jnp.take_along_axis(padded, columns, axis=2)


def cutout(key: Array, images: Array, *, side: int = 8) -> Array:
    """A square of ``side`` pixels of each picture set to zero, its centre anywhere in the picture
    (DeVries and Taylor 2017, arXiv 1708.04552)."""
    count, high, wide, _ = images.shape
    keys = jax.random.split(key)

    def inside(key: Array, length: int) -> Array:
        first = jax.random.randint(key, (count, 1), 0, length) - side // 2
        places = jnp.arange(length)[None]
        return (places >= first) & (places < first + side)

    hole = inside(keys[0], high)[:, :, None] & inside(keys[1], wide)[:, None, :]
    return jnp.where(hole[..., None], jnp.zeros((), images.dtype), images)


def chain(*steps: Augment) -> Augment:
    """One augmentation after the other, each with a key of its own."""

    def all_of_them(key: Array, images: Array) -> Array:
        for number, step in enumerate(steps):
            images = step(jax.random.fold_in(key, number), images)
        return images

    return all_of_them
