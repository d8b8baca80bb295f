"""Divergences from a stored teacher, of which few tokens per position are kept.

The column is ``{"ids" [..., K], "logits" [..., K], "tail" [...]}``: the K likeliest tokens, their
log-probabilities over the WHOLE vocabulary (nats, any float dtype) and the probability of all
others (``columns.add_teacher``). No gradient reaches it. Gradients are one pass over the student's
vocabulary and a scatter of K numbers.

Not offered: a softmax of both sides over the kept tokens (as google/tunix does with
``distill_top_k``). It does not see how much mass the student leaves elsewhere, so a student that
never says a kept token can reach 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl

Array = jax.Array
Stored = dict[str, Array]

LEAST = 1e-6  # of the mass outside the kept tokens: 1 - sum q is not more exact in float32


def top_k(
    student: Array,
    teacher: Stored,
    *,
    divergence: Callable[..., Array] = forward_kl,
    **options: Any,
) -> Array:
    """A divergence over K + 1 events: each kept token, and one of all the others, [...] nats.

    Args:
      divergence: any of ``losses.distillation`` without targets; ``options`` are its keywords
        (``beta``, ``t``, ``temperature``).

    For an f-divergence (all KLs, JSD, skew, total variation) a lower bound of the full one (data
    processing inequality), exact when the tail is 0 or has the student's proportions. A
    ``temperature`` takes the K + 1 probabilities to 1/T and renormalises them, on both sides alike
    (the tail is flattened as if it were one token: an approximation, exact at K = V; DistillKit
    does so to the teacher alone).

    Raises:
      UserError: a column without ``ids``, ``logits`` and ``tail``.
    """
    _check(student, teacher, "tail")
    logps = picked(student, teacher["ids"])
    theirs = teacher["logits"].astype(jnp.float32)
    if logps.shape[-1] == student.shape[-1]:  # no others: not even LEAST, much at a temperature
        return divergence(logps, theirs, **options)
    rest = _log_tail(1.0 - jnp.exp(logps).sum(-1))
    tail = _log_tail(teacher["tail"].astype(jnp.float32))
    sides = [jnp.concatenate([a, b[..., None]], -1) for a, b in ((logps, rest), (theirs, tail))]
    return divergence(*sides, **options)


def renormalised(student: Array, teacher: Stored) -> Array:
    """``sum p' (log p' - log q)`` with p' the kept probabilities divided by their sum, [...] nats.

    q is the student over its whole vocabulary, ``tail`` is not read. Biased: the best student gives
    the tokens that were not kept no probability. It is ``KL(p || q)`` where all are kept.
    """
    _check(student, teacher)
    theirs = jax.nn.log_softmax(jax.lax.stop_gradient(teacher["logits"]).astype(jnp.float32))
    return (jnp.exp(theirs) * (theirs - picked(student, teacher["ids"]))).sum(-1)


def sampled(student: Array, teacher: Stored) -> Array:
    """``-sum_n w_n log q(ids_n)``, unbiased for ``KL(p || q) + H(p)`` and its gradient, [...] nats.

    Of a teacher stored by ``draw``: ids [..., N] with repeats, log w_n as ``logits`` (Anshumann et
    al. 2025, 2503.16870, random sampling distillation).
    """
    _check(student, teacher)
    weights = jnp.exp(jax.lax.stop_gradient(teacher["logits"]).astype(jnp.float32))
    return -(weights * picked(student, teacher["ids"])).sum(-1)


def draw(key: Array, logits: Array, count: int, *, temperature: float = 1.0) -> Stored:
    """Tokens of a teacher's logits [..., V] for ``sampled``: ``ids`` and ``logits`` [..., count].

    Drawn with repeats from the proposal r = softmax(logits / temperature); ``logits`` are the logs
    of the weights ``p / (count r)``, which at temperature 1 are all 1 / count. ``tail`` [...] is 0.
    A temperature above 1 sees more of the tail, at unequal weights.

    Raises:
      UserError: a count below 1 or a temperature that is not positive.
    """
    if count < 1 or temperature <= 0:
        raise UserError(
            f"draw needs a count of 1 or more and a temperature above 0, got {count} and "
            f"{temperature}"
        )
    proposal = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    shape = (count, *logits.shape[:-1])
    ids = jnp.moveaxis(jax.random.categorical(key, proposal, shape=shape), 0, -1)
    p, r = (
        jnp.take_along_axis(x, ids, axis=-1)
        for x in (jax.nn.log_softmax(logits.astype(jnp.float32)), proposal)
    )
    weights = p - r - jnp.log(float(count))
    return {"ids": ids, "logits": weights, "tail": jnp.zeros(logits.shape[:-1], jnp.float32)}


@jax.custom_vjp
def picked(logits: Array, ids: Array) -> Array:
    """``log_softmax(logits)[ids]`` in float32: [..., V] and [..., K] -> [..., K], in nats."""
    return _picked_forward(logits, ids)[0]


def _picked_forward(logits: Array, ids: Array) -> tuple[Array, tuple[Array, ...]]:
    total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    found = jnp.take_along_axis(logits, ids, axis=-1).astype(jnp.float32) - total
    return found, (logits, total, ids)


def _picked_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, None]:
    logits, total, ids = saved
    shared = -grad.sum(-1, keepdims=True)
    wide = shared * jnp.exp(logits.astype(jnp.float32) - total)
    rows, ids = wide.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1])
    rows = rows.at[jnp.arange(len(rows))[:, None], ids].add(grad.reshape(ids.shape))
    return rows.reshape(wide.shape).astype(logits.dtype), None


picked.defvjp(_picked_forward, _picked_backward)


def _log_tail(mass: Array) -> Array:
    """Log of a probability [...] of the tokens that are not kept; no gradient below ``LEAST``."""
    return jnp.log(jnp.where(mass > LEAST, mass, LEAST))


def _check(student: Array, teacher: Any, *more: str) -> None:
    wanted = ("ids", "logits", *more)
    if not isinstance(teacher, dict) or not set(wanted) <= set(teacher):
        found = sorted(teacher) if isinstance(teacher, dict) else type(teacher).__name__
        raise UserError(
            f"a stored teacher has {', '.join(wanted)} (columns.add_teacher), got {found}"
        )
    if teacher["ids"].shape[:-1] != student.shape[:-1]:
        raise UserError(
            f"a stored teacher's ids {teacher['ids'].shape} do not fit logits {student.shape}"
        )
