"""Causal attention on a CPU: tiles small enough to stay in its cache.

One row and one key/value head at a time, queries in blocks that see only the keys up to their own,
blocks beyond a row's length left out, scores made again in the backward pass (as Dao et al. 2022
do on a GPU). Scores of a whole batch at once would pass through memory a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.types import Array

BLOCK = 64  # queries of a block, about
MOST = 4  # blocks of a row: every one is code of its own, compiled for every layer
_HIDDEN = -1e30


def blocks(length: int) -> int:
    """Into how many equal blocks a row of ``length`` is cut: about ``BLOCK`` queries each."""
    wanted = max(1, min(round(length / BLOCK), MOST))
    return min(
        (n for n in range(1, MOST + 1) if length % n == 0), key=lambda n: (abs(n - wanted), -n)
    )


def causal(
    q: Array, k: Array, v: Array, segment: Array | None = None, lengths: Array | None = None
) -> Array:
    """Causal attention within segments: q [B,T,H,h], k and v [B,T,K,h] -> [B,T,H,h].

    ``segment`` [B,T] int32 or None. Only the first ``lengths`` [B] tokens of a row matter; what
    comes out for the others is finite, and their cotangents are taken to be 0.
    """
    heads, groups = q.shape[2], k.shape[2]
    queries = jnp.moveaxis(q, 2, 1).reshape(-1, heads // groups, *q.shape[1::2])
    keys, values = (jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3]) for x in (k, v))
    marks = None if segment is None else jnp.repeat(segment, groups, axis=0)
    count = None
    if lengths is not None:
        size = q.shape[1] // blocks(q.shape[1])
        count = jnp.repeat(jnp.clip((lengths + size - 1) // size, 1, blocks(q.shape[1])), groups)
    out: Any = _tiles(queries, keys, values, marks, count)
    return jnp.moveaxis(out.reshape(q.shape[0], heads, *q.shape[1::2]), 1, 2)


@jax.custom_vjp
def _tiles(q: Array, k: Array, v: Array, segment: Array | None, count: Array | None) -> Array:
    """q [N,G,T,h], k and v [N,T,h], segment [N,T], count [N] blocks of each -> [N,G,T,h]."""
    return _forward(q, k, v, segment, count)[0]


def _forward(q: Array, k: Array, v: Array, segment: Array | None, count: Array | None):
    out, total = _run(_mix, count, (q, k, v, segment))
    return out, (q, k, v, segment, count, out, total)


def _backward(saved: Any, grad: Array):
    q, k, v, segment, count, out, total = saved
    return (*_run(_unmix, count, (q, k, v, segment, out, total, grad)), None, None)


_tiles.defvjp(_forward, _backward)


def _run(tile: Callable[..., Any], count: Array | None, xs: Any) -> Any:
    """``tile(n, *x)`` for every tile, where n of its blocks hold something."""
    every = blocks(xs[0].shape[2])
    if count is None:
        return jax.lax.map(lambda x: tile(every, *x), xs)
    branches = [partial(tile, n) for n in range(1, every + 1)]
    return jax.lax.map(lambda x: jax.lax.switch(x[0] - 1, branches, *x[1]), (count, xs))


def _blocks(n: int, q: Array, k: Array, segment: Array | None):
    """Of each block: its queries and the keys they see as slices, and its scores [G,b,s]."""
    size = q.shape[1] // blocks(q.shape[1])
    for i in range(n):
        own, seen = slice(i * size, (i + 1) * size), slice(0, (i + 1) * size)
        scores = _dot("gtd,sd->gts", q[:, own], k[seen]) * q.shape[-1] ** -0.5
        mask = jnp.arange(own.start, own.stop)[:, None] >= jnp.arange(seen.stop)[None]
        if segment is not None:
            mask = mask & (segment[own][:, None] == segment[seen][None])
        yield own, seen, jnp.where(mask[None], scores, _HIDDEN)


def _mix(n: int, q: Array, k: Array, v: Array, segment: Array | None) -> tuple[Array, Array]:
    """Outputs [G,T,h] of one tile, and the log-sum-exp [G,T] of its scores."""
    outs, totals = [], []
    for _, seen, scores in _blocks(n, q, k, segment):
        peak = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        outs.append(_dot("gts,sd->gtd", weights.astype(v.dtype), v[seen]) / total)
        totals.append((peak + jnp.log(total))[..., 0])
    rest = q.shape[1] - sum(out.shape[1] for out in outs)
    out, total = jnp.concatenate(outs, axis=1), jnp.concatenate(totals, axis=1)
    out = jnp.pad(out, ((0, 0), (0, rest), (0, 0))).astype(q.dtype)
    return out, jnp.pad(total, ((0, 0), (0, rest)))


def _unmix(
    n: int,
    q: Array,
    k: Array,
    v: Array,
    segment: Array | None,
    out: Array,
    total: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one tile's queries [G,T,h], keys and values [T,h]."""
    dq = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    scale = q.shape[-1] ** -0.5
    for own, seen, scores in _blocks(n, q, k, segment):
        weights = jnp.exp(scores - total[:, own, None])
        d_out = grad[:, own]
        dot = (d_out.astype(jnp.float32) * out[:, own]).sum(-1, keepdims=True)
        d_scores = weights * (_dot("gtd,sd->gts", d_out, v[seen]) - dot)
        d_scores = (d_scores * scale).astype(q.dtype)
        dq.append(_dot("gts,sd->gtd", d_scores, k[seen]))
        dk = dk.at[seen].add(_dot("gts,gtd->sd", d_scores, q[:, own]))
        dv = dv.at[seen].add(_dot("gts,gtd->sd", weights.astype(v.dtype), d_out))
    whole = jnp.concatenate(dq, axis=1)
    whole = jnp.pad(whole, ((0, 0), (0, q.shape[1] - whole.shape[1]), (0, 0)))
    return whole.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
