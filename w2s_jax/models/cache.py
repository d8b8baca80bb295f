"""The key/value cache of a decoder: what it holds, and who sees whom through it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.models.config import Config
from w2s_jax.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys [B,K,h,S] and values [B,K,S,h] of the tokens seen so far, one pair per layer: the
    layouts in which the two products of one query run fastest (CPU: twice as fast as with equal
    ones).

    All rows write at the same slot ``index`` [], so that a write is one contiguous update; what a
    slot means is in ``segment`` [B,S] (0: padding or not yet written, never attended by real
    tokens). Prompts of different lengths may therefore be padded on either side, and a finished
    row goes on with segment 0. ``position`` [B] int32 is the next position of each row; padding
    does not advance it.
    """

    layers: tuple[tuple[Array, Array], ...]
    segment: Array
    position: Array
    index: Array


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """An empty cache of ``length`` slots for ``batch`` rows, in the compute dtype.

    Raises:
      UserError: more slots than the model's ``max_length``.
    """
    if length > config.max_length:
        raise UserError(
            f"model: a cache of {length} tokens exceeds max_length {config.max_length}; "
            "use shorter prompts or generate fewer tokens"
        )
    return empty_cache(config, batch, length)


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    """The same without the limit: rows that take turns in it may share more slots than one has."""
    keys, values = (
        (batch, config.kv_heads, *size)
        for size in ((config.head_dim, length), (length, config.head_dim))
    )
    return Cache(
        layers=tuple(
            (jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype))
            for _ in range(config.layers)
        ),
        segment=jnp.zeros((batch, length), jnp.int32),
        position=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def extend(keys: Array, values: Array, index: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values of a layer with those of new tokens, both [B,T,K,h], from slot ``index``."""
    k, v = k.transpose(0, 2, 3, 1).astype(keys.dtype), v.swapaxes(1, 2).astype(values.dtype)
    return (
        jax.lax.dynamic_update_slice_in_dim(keys, k, index, 3),
        jax.lax.dynamic_update_slice_in_dim(values, v, index, 2),
    )


def place(cache: Cache, prompts: Cache, source: Array) -> Cache:
    """New rows among those of ``cache`` [B,S]: row b becomes row ``source[b]`` of ``prompts`` [R,P]
    where that is not negative. Prompts end where the cache stands, hence ``index`` is at least P.
    """
    length = prompts.segment.shape[1]
    begin, new, of = cache.index - length, source >= 0, jnp.maximum(source, 0)

    def put(old: Array, prompt: Array, axis: int) -> Array:
        here = jax.lax.dynamic_slice_in_dim(old, begin, length, axis)
        taken = new.reshape((-1,) + (1,) * (old.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(
            old, jnp.where(taken, prompt[of], here), begin, axis
        )

    return Cache(
        layers=tuple(
            (put(keys, new_keys, 3), put(values, new_values, 2))
            for (keys, values), (new_keys, new_values) in zip(
                cache.layers, prompts.layers, strict=True
            )
        ),
        segment=put(jnp.where(new[:, None], 0, cache.segment), prompts.segment, 1),
        position=jnp.where(new, prompts.position[of], cache.position),
        index=cache.index,
    )


def settle(cache: Cache, rows: Array | None, index: Array, length: int) -> Cache:
    """Rows ``rows`` [B] of a cache (None: all), moved to ``length`` slots; it stands at ``index``.

    What lies before the first slot then is lost: ``index`` is at least the longest row.
    """
    shift = cache.index - index
    taken = slice(None) if rows is None else rows

    def move(old: Array, axis: int) -> Array:
        pad = [(0, 0)] * old.ndim
        pad[axis] = (length, length)
        wide = jnp.pad(old[taken], pad)
        return jax.lax.dynamic_slice_in_dim(wide, length + shift, length, axis)

    return Cache(
        layers=tuple((move(keys, 3), move(values, 2)) for keys, values in cache.layers),
        segment=move(cache.segment, 1),
        position=cache.position[taken],
        index=jnp.asarray(index, jnp.int32),
    )


def plan_cached(
    tokens: Array, segment: Array | None, position: Array | None, cache: Cache
) -> tuple[Array, Array, Cache]:
    """Positions [B,T], mask [B,T,S] and the extended cache for tokens [B,T] that follow it."""
    if segment is None:
        segment = jnp.ones_like(tokens)
    segment = segment.astype(jnp.int32)
    real = (segment > 0).astype(jnp.int32)
    if position is None:
        position = cache.position[:, None] + jnp.cumsum(real, axis=1) - real
    seen = jax.lax.dynamic_update_slice(cache.segment, segment, (jnp.int32(0), cache.index))
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
    causal = slots[None, :] <= cache.index + steps[:, None]
    mask = causal[None] & (segment[:, :, None] == seen[:, None, :])
    after = jnp.max(jnp.where(real > 0, position + 1, cache.position[:, None]), axis=1)
    return position, mask, Cache(cache.layers, seen, after, cache.index + tokens.shape[1])
