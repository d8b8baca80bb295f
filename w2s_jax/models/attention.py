"""Attention: who sees whom, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.models import backends
from w2s_jax.models.cache import Cache, plan_cached
from w2s_jax.models.config import Config
from w2s_jax.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The plain causal rows in which packed tokens attend, as gathers in both directions.

    ``take`` [B,R,L] int32 are the tokens of each row (-1: padding, at the end), ``back`` [B,T,O]
    the flat places r * L + l where each token stands (-1: none), and ``read`` [B,R*L] bool the
    places where its output is read: the first of each token.
    """

    take: Array
    back: Array
    read: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scope:
    """Who sees whom: every token itself and what precedes it, less what the fields say.

    ``segment`` [B,T] keeps tokens to their own segment; ``mask`` [B or 1,T,S] bool replaces
    causality and segments (decoding with a cache); ``rows`` replaces all of it.
    """

    segment: Array | None = None
    mask: Array | None = None
    rows: Rows | None = None


def plan(
    tokens: Array,
    segment: Array | None,
    position: Array | None,
    rows: Mapping[str, Array] | None,
    cache: Cache | None,
) -> tuple[Array, Scope, Cache | None]:
    """Positions [B or 1,T], what each token sees, and the extended cache.

    Tokens see themselves and earlier ones of their own segment; padding sees padding. ``rows`` has
    ``take`` and ``back`` (see ``Rows``) and stands in for ``segment``. The keys and values of the
    returned cache are still the old ones.

    Raises:
      UserError: ``rows`` together with a cache, or of the wrong shape.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    if rows is not None:
        _check_rows(tokens, rows, cache)
        take, back = rows["take"], rows["back"]
        batch, count, length = take.shape
        flat = take.reshape(batch, count * length)
        places = jnp.arange(count * length, dtype=back.dtype)[None]
        read = (flat >= 0) & (pick(back[:, :, 0], flat) == places)
        if position is None:
            position = jnp.maximum(back[:, :, 0], 0) % length
        return position, Scope(rows=Rows(take, back, read)), None
    if cache is not None:
        position, mask, cache = plan_cached(tokens, segment, position, cache)
        return position, Scope(mask=mask), cache
    if position is None and segment is not None:
        start = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
        position = steps[None] - jax.lax.cummax(jnp.where(start, steps[None], 0), axis=1)
    return (steps[None] if position is None else position), Scope(segment=segment), None


def _check_rows(tokens: Array, rows: Mapping[str, Array], cache: Cache | None) -> None:
    if cache is not None:
        raise UserError("model: attention rows and a cache exclude each other; decode unpacked")
    take, back = rows["take"].shape, rows["back"].shape
    if len(take) != 3 or len(back) != 3 or take[0] != back[0] or back[:2] != tokens.shape:
        raise UserError(
            f"model: rows need take [B,R,L] and back [B,T,O] for tokens {tokens.shape}, got "
            f"{take} and {back}"
        )


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


def mix(asked: str, q: Array, k: Array, v: Array, scope: Scope) -> Array:
    """What each token gathers from those it sees: q [B,T,H,h], k and v [B,T,K,h] -> [B,T,H,h].

    ``asked`` is ``Config.attention``.

    Raises:
      UserError: the back end asked for cannot serve this batch.
    """
    rows = scope.rows
    if rows is None:
        return backends.causal(asked, q, k, v, scope.segment)
    batch, count, length = rows.take.shape
    split = (into_rows(x, rows.take, rows.back) for x in (q, k, v))
    q, k, v = (x.reshape(batch * count, length, *x.shape[2:]) for x in split)
    lengths = (rows.take >= 0).sum(-1).reshape(-1)
    y = backends.causal(asked, q, k, v, None, lengths)
    return from_rows(y.reshape(batch, count * length, *y.shape[2:]), rows)


def pick(x: Array, index: Array) -> Array:
    """``x[b, index[b, n]]``: [B,T,...] and [B,N] -> [B,N,...]; any index below 0 means 0."""
    # One gather per batch row, so that a batch spread over devices stays where it is
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip", wrap_negative_indices=False))(x, index)


@jax.custom_vjp
def into_rows(x: Array, take: Array, back: Array) -> Array:
    """Tokens [B,T,...] laid out in their rows [B,R*L,...]; padding holds any token."""
    return pick(x, take.reshape(take.shape[0], -1))


def _into_rows_forward(x: Array, take: Array, back: Array) -> tuple[Array, Array]:
    return into_rows(x, take, back), back


def _into_rows_backward(back: Array, grad: Array) -> tuple[Array, None, None]:
    # The transpose of a gather is a scatter, which is slow; here every token knows its places
    total = None
    for one in jnp.unstack(back, axis=2):
        part = _where(one >= 0, pick(grad, one))
        total = part if total is None else total + part
    assert total is not None
    return total, None, None


into_rows.defvjp(_into_rows_forward, _into_rows_backward)


@jax.custom_vjp
def from_rows(y: Array, rows: Rows) -> Array:
    """Outputs [B,R*L,...] of the rows read back at every token [B,T,...]; 0 where it has none."""
    first = rows.back[:, :, 0]
    return _where(first >= 0, pick(y, first))


def _from_rows_forward(y: Array, rows: Rows) -> tuple[Array, Rows]:
    return from_rows(y, rows), rows


def _from_rows_backward(rows: Rows, grad: Array) -> tuple[Array, None]:
    return _where(rows.read, pick(grad, rows.take.reshape(grad.shape[0], -1))), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _where(kept: Array, x: Array) -> Array:
    return jnp.where(kept.reshape(*kept.shape, *(1,) * (x.ndim - kept.ndim)), x, 0)
