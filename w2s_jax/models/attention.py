"""Attention: who sees whom, rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.models.cache import Cache, plan_cached
from w2s_jax.models.config import Config
from w2s_jax.types import Array

_HIDDEN_SCORE = -1e30


def plan(
    tokens: Array, segment: Array | None, position: Array | None, cache: Cache | None
) -> tuple[Array, Array, Cache | None]:
    """Positions [B or 1,T], mask [B or 1,T,S] of what each token sees, and the extended cache.

    Tokens see themselves and earlier ones of their own segment; padding sees padding. The keys
    and values of the returned cache are still the old ones.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    if cache is not None:
        return plan_cached(tokens, segment, position, cache)
    mask = (steps[:, None] >= steps[None, :])[None]
    if segment is not None:
        mask = mask & (segment[:, :, None] == segment[:, None, :])
    if position is None and segment is not None:
        start = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
        position = steps[None] - jax.lax.cummax(jnp.where(start, steps[None], 0), axis=1)
    return (steps[None] if position is None else position), mask, None


def rope_angles(config: Config, position: Array) -> tuple[Array, Array]:
    """Cosine and sine [B or 1,T,1,h/2] float32 of the rotary angles (Su et al. 2021)."""
    rate = config.rope ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original * rate / (2 * np.pi)
        blend = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        rate = blend * rate + (1 - blend) * rate / scaling.factor
    rate = jnp.asarray(rate, jnp.float32)[None, None, None, :]
    angle = position.astype(jnp.float32)[:, :, None, None] * rate
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate the pairs (x_i, x_{i+h/2}) of [B,T,H,h]: the Hugging Face half-split layout."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(q: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention: q [B,T,H,h], keys and values [B,K,S,h], mask [B or 1,T,S] -> [B,T,H,h].

    Scores and softmax are float32. A row that sees nothing averages what is there.
    """
    batch, length, heads, h = q.shape
    groups = keys.shape[1]
    # Query heads of a group ride on the time axis: a plain batched product is 6x faster on CPU
    # than one with a group axis of its own.
    q = q.swapaxes(1, 2).reshape(batch, groups, -1, h)
    scores = jnp.einsum("bktd,bksd->bkts", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * h**-0.5
    scores = jnp.where(mask[:, None], scores, _HIDDEN_SCORE)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype).reshape(batch, groups, -1, keys.shape[2])
    out = jnp.einsum("bkts,bksd->bktd", weights, values, preferred_element_type=jnp.float32)
    # Divided after mixing: h numbers per query instead of S
    out = (out.reshape(batch, heads, length, h) / total).astype(q.dtype)
    return out.swapaxes(1, 2)
