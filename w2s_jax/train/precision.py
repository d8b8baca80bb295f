"""Training in bfloat16 that does not stall: what is stored is rounded up or down at random.

A bfloat16 number has 8 significant bits, so an update below 1/256 of a weight is lost by rounding
to nearest, always. Rounded at random with the probabilities that make the mean exact, a thousand
such updates arrive (Gupta et al. 2015, arXiv 1502.02551). The arithmetic is in float32 throughout.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from w2s_jax.types import Array, Params, Tree


def round_randomly(x: Array, bits: Array) -> Array:
    """``x`` float32 as bfloat16; ``bits`` uint16 of its shape, uniform, make the mean ``x``.

    NaN and infinity stay what they are.
    """
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    word = (word + bits.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    moved = jax.lax.bitcast_convert_type(word, jnp.float32)
    return jnp.where(jnp.isfinite(x), moved, x).astype(jnp.bfloat16)


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform uint16 of ``shape``: the place of each number and ``key``, mixed twice.

    Fused into the update that uses them, where ``jax.random.bits`` makes arrays of the size of the
    weights. The mixer is Wellons' "lowbias32" (https://nullprogram.com/blog/2018/07/31/).
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return (_mixed(_mixed(place + first) ^ second) >> 16).astype(jnp.uint16)


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _random(x: Array, key: Array, number: int) -> Array:
    bits = random_bits(jax.random.fold_in(key, number), x.shape)
    return round_randomly(x.astype(jnp.float32), bits)


def apply_updates(params: Params, updates: Tree, key: Array) -> Params:
    """``params + updates``, added in float32; bfloat16 weights are rounded at random by ``key``."""
    leaves, tree = jax.tree.flatten(params)
    new = []
    for number, (p, u) in enumerate(zip(leaves, tree.flatten_up_to(updates), strict=True)):
        total = p.astype(jnp.promote_types(p.dtype, jnp.float32)) + u
        low = p.dtype == jnp.bfloat16
        new.append(_random(total, key, number) if low else total.astype(p.dtype))
    return jax.tree.unflatten(tree, new)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` as if weights and gradients were float32 (or wider), whatever they are stored in."""

    def wide(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(grads: Tree, state: Tree, params: Params | None = None) -> tuple[Tree, Tree]:
        return tx.update(wide(grads), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)  # pyright: ignore[reportArgumentType]


class Stored(NamedTuple):
    """An optimiser state with some leaves in bfloat16; ``count`` [] int32 updates were made."""

    count: Array
    inner: Tree


def stored_in_bfloat16(
    tx: optax.GradientTransformation, names: frozenset[str]
) -> optax.GradientTransformation:
    """``tx`` whose state keeps the float32 leaves under the fields ``names`` in bfloat16.

    Between updates they are rounded at random; the randomness is a function of the number of
    updates alone, so that a resumed run goes on as it would have.
    """

    def named(path: tuple[Any, ...]) -> bool:
        return any(getattr(entry, "name", None) in names for entry in path)

    def init(params: Params) -> Stored:
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(jnp.bfloat16) if named(path) else x, tx.init(params)
        )
        return Stored(jnp.zeros((), jnp.int32), state)

    def update(grads: Tree, state: Stored, params: Params | None = None) -> tuple[Tree, Stored]:
        wide = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(jnp.float32) if named(path) else x, state.inner
        )
        updates, new = tx.update(grads, wide, params)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        found, tree = jax.tree_util.tree_flatten_with_path(new)
        leaves = [_random(x, key, i) if named(p) else x for i, (p, x) in enumerate(found)]
        return updates, Stored(state.count + 1, jax.tree.unflatten(tree, leaves))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
