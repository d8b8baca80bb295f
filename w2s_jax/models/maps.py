"""Attention probabilities as numbers of their own, for matching them (``Config.maps``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.models.attention import Scope
from w2s_jax.types import Array


def attention_maps(q: Array, k: Array, scope: Scope) -> Array:
    """What each token gives to those it sees: q [B,T,H,h], k [B,T,K,h] -> [B,H,T,T] float32.

    Rows sum to 1; what a token does not see (later tokens, other segments) has exactly 0.

    Raises:
      UserError: packed attention rows, in which tokens have no one order.
    """
    if scope.rows is not None:
        raise UserError("model: attention maps need whole rows; leave out the column 'rows'")
    batch, length, heads, h = q.shape
    grouped = q.swapaxes(1, 2).reshape(batch, k.shape[2], -1, h)
    scores = jnp.einsum("bktd,bskd->bkts", grouped, k, preferred_element_type=jnp.float32).reshape(
        batch, heads, length, length
    )
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if scope.segment is not None:
        seen = seen & (scope.segment[:, None, :, None] == scope.segment[:, None, None, :])
    return jax.nn.softmax(jnp.where(seen, scores * h**-0.5, -1e30), axis=-1)
