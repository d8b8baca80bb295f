"""Per-token log-probabilities without the ``[B, T, V]`` logits ever existing at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError

Array = jax.Array


def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    mask: Array,
    *,
    chunk: int | None = None,
    vocab: int | None = None,
) -> Array:
    """Log-probability of every target token, ``log softmax(hidden @ unembed)[target]``, in nats.

    The logits are made chunk by chunk (time steps of the whole batch, so a sharded batch stays
    sharded), multiplied in the operands' dtype and accumulated in float32. The forward keeps one
    log-sum-exp per token; the backward makes each chunk's logits again.

    Args:
      hidden: [B, T, D] final hidden states, any float dtype.
      unembed: [D, V] output matrix, any float dtype.
      targets: [B, T] integer ids, already shifted by the caller: ``targets[b, t]`` is the token
        that ``hidden[b, t]`` predicts.
      mask: [B, T]; positions with 0 give exactly 0 and no gradient, whatever their target.
      chunk: tokens whose logits exist together, rounded to whole time steps (at least one);
        None takes about 256 MB of logits on a CPU and 1 GB elsewhere.
      vocab: number of real entries when the rows of the matrix are padded; ids from ``vocab`` on
        have probability 0.

    Returns:
      [B, T] float32 log-probabilities in nats.

    Raises:
      UserError: shapes that do not fit together, or a chunk or vocab that is not positive.
    """
    _check(hidden, unembed, targets, mask, chunk, vocab)
    batch, length, _ = hidden.shape
    steps = _steps(batch, length, unembed.shape[1], chunk)
    if vocab is not None and vocab >= unembed.shape[1]:
        vocab = None
    kept = mask > 0
    logps: Any = _logps(steps, vocab, hidden, unembed, jnp.where(kept, targets, 0))
    return jnp.where(kept, logps, 0.0)


def _check(
    hidden: Any, unembed: Any, targets: Any, mask: Any, chunk: int | None, vocab: int | None
) -> None:
    if hidden.ndim != 3 or unembed.ndim != 2 or hidden.shape[2] != unembed.shape[0]:
        raise UserError(
            f"token_logps needs hidden [B,T,D] and unembed [D,V], got {hidden.shape} and "
            f"{unembed.shape}"
        )
    if targets.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        raise UserError(
            f"token_logps needs targets and mask of shape {hidden.shape[:2]}, got "
            f"{targets.shape} and {mask.shape}"
        )
    if (chunk is not None and chunk < 1) or (vocab is not None and vocab < 1):
        raise UserError(f"token_logps: chunk and vocab must be positive, got {chunk} and {vocab}")


def _steps(batch: int, length: int, width: int, chunk: int | None) -> int:
    """Time steps per chunk, evened out so that the last chunk is padded least."""
    if chunk is None:
        limit = 2**28 if jax.default_backend() == "cpu" else 2**30
        chunk = max(1, limit // (4 * width))
    steps = max(1, min(length, chunk // max(batch, 1)))
    chunks = -(-length // steps) if length else 1
    return -(-length // chunks)


def _logits(hidden: Array, unembed: Array, vocab: int | None) -> Array:
    logits = jnp.einsum("btd,dv->btv", hidden, unembed, preferred_element_type=jnp.float32)
    if vocab is not None:
        real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) < vocab
        logits = jnp.where(real, logits, -jnp.inf)
    return logits


def _split(values: Array, steps: int) -> Array:
    """[B, T, ...] -> [T / steps, B, steps, ...], padded with zeros."""
    batch, length = values.shape[:2]
    chunks = -(-length // steps)
    pad = [(0, 0), (0, chunks * steps - length)] + [(0, 0)] * (values.ndim - 2)
    values = jnp.pad(values, pad).reshape(batch, chunks, steps, *values.shape[2:])
    return jnp.moveaxis(values, 1, 0)


def _join(values: Array, length: int) -> Array:
    """The inverse of ``_split``."""
    values = jnp.moveaxis(values, 0, 1)
    return values.reshape(values.shape[0], -1, *values.shape[3:])[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logps(steps: int, vocab: int | None, hidden: Array, unembed: Array, targets: Array) -> Array:
    return _forward(steps, vocab, hidden, unembed, targets)[0]


def _forward(
    steps: int, vocab: int | None, hidden: Array, unembed: Array, targets: Array
) -> tuple[Array, Any]:
    def one(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = _logits(hidden, unembed, vocab)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - total, total

    length = hidden.shape[1]
    if steps >= length:
        logps, total = one(hidden, targets)
    else:
        xs = (_split(hidden, steps), _split(targets, steps))
        _, ys = jax.lax.scan(lambda _, x: (None, one(*x)), None, xs)
        logps, total = (_join(y, length) for y in ys)
    return logps, (hidden, unembed, targets, total)


def _backward(steps: int, vocab: int | None, saved: Any, grad: Array) -> tuple[Array, Array, None]:
    hidden, unembed, targets, total = saved

    def one(hidden: Array, targets: Array, total: Array, grad: Array) -> tuple[Array, Array]:
        logits = _logits(hidden, unembed, vocab)
        ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
        hit = ids == targets[..., None]
        d_logits = grad[..., None] * (hit - jnp.exp(logits - total[..., None]))
        # The two products run in the dtype of the weights, as the forward does.
        d_logits = d_logits.astype(jnp.promote_types(hidden.dtype, unembed.dtype))
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, unembed, preferred_element_type=jnp.float32)
        d_unembed = jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_hidden.astype(hidden.dtype), d_unembed

    length = hidden.shape[1]
    if steps >= length:
        d_hidden, d_unembed = one(hidden, targets, total, grad)
        return d_hidden, d_unembed.astype(unembed.dtype), None

    def body(d_unembed: Array, x: Any) -> tuple[Array, Array]:
        d_hidden, more = one(*x)
        return d_unembed + more, d_hidden

    xs = tuple(_split(x, steps) for x in (hidden, targets, total, grad))
    d_unembed, d_hidden = jax.lax.scan(body, jnp.zeros(unembed.shape, jnp.float32), xs)
    return _join(d_hidden, length), d_unembed.astype(unembed.dtype), None


_logps.defvjp(_forward, _backward)
