"""Divergences of two next-token (or class) distributions, in nats, one number per position.

Each is ``(student_logits [..., V], teacher) -> [...]``; the teacher is its logits [..., V] or, for
``top_k``, a dict of stored columns. Logits are finite; entries that do not exist have very low
ones (``losses.sequence.EXCLUDED``) on both sides and count nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Kind = Callable[..., tuple[Array, Array, Array]]


def forward_kl(student: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """``KL(teacher || student)`` at a temperature (Hinton et al. 2015, without the factor T^2)."""
    return _divergence(_forward, student / temperature, teacher / temperature, ())


def reverse_kl(student: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """``KL(student || teacher)`` at a temperature (Gu et al. 2024, MiniLLM)."""
    return _divergence(_reverse, student / temperature, teacher / temperature, ())


def jsd(student: Array, teacher: Array, *, beta: float, temperature: float = 1.0) -> Array:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD, eq. 1).

    ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta)
    student``, 0 < beta < 1. Divided by beta it tends to the forward KL as beta goes to 0, divided
    by 1 - beta to the reverse KL as beta goes to 1; at the ends themselves it is 0.
    """
    return _divergence(_jensen, student / temperature, teacher / temperature, (beta,))


# A divergence of log-probabilities: (student q, teacher p) -> its value, the product w of the
# student's probabilities with the derivative by them (up to a constant), and the sum of w. The
# gradient by the student's logits is then w - sum(w) * exp(q).


def _forward(q: Array, p: Array) -> tuple[Array, Array, Array]:
    value = (jnp.exp(p) * (p - q)).sum(-1)
    return value, -jnp.exp(p), -jnp.ones_like(value)


def _reverse(q: Array, p: Array) -> tuple[Array, Array, Array]:
    pull = jnp.exp(q) * (q - p)
    value = pull.sum(-1)
    return value, pull, value


def _jensen(q: Array, p: Array, beta: Any) -> tuple[Array, Array, Array]:
    mixed = beta * jnp.exp(p) + (1 - beta) * jnp.exp(q)
    mixed = jnp.log(jnp.maximum(mixed, jnp.finfo(jnp.float32).tiny))
    pull = (1 - beta) * jnp.exp(q) * (q - mixed)
    own = pull.sum(-1)
    return beta * (jnp.exp(p) * (p - mixed)).sum(-1) + own, pull, own


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(kind: Kind, student: Array, teacher: Array, numbers: tuple[Any, ...]) -> Array:
    """The value of ``kind`` at two sets of logits [..., V] -> [...]; no gradient for the teacher.

    What a backward pass by hand saves is passes over [..., V], which cost as much as a product.
    """
    return _value(kind, student, teacher, numbers)[0]


def _value(
    kind: Kind, student: Array, teacher: Array, numbers: tuple[Any, ...]
) -> tuple[Array, Any]:
    totals = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (student, teacher)]
    value = kind(student - totals[0], teacher - totals[1], *numbers)[0]
    return value, (student, teacher, *totals, numbers)


def _gradient(kind: Kind, saved: Any, grad: Array) -> tuple[Array, None, None]:
    student, teacher, mine, theirs, numbers = saved
    q = student - mine
    _, pull, total = kind(q, teacher - theirs, *numbers)
    return grad[..., None] * (pull - total[..., None] * jnp.exp(q)), None, None


_divergence.defvjp(_value, _gradient)


@jax.custom_vjp
def top_k(student: Array, teacher: dict[str, Array]) -> Array:
    """Forward KL to a teacher of which the K most likely tokens are stored.

    Args:
      teacher: ``ids`` [..., K], ``logits`` [..., K] log-probabilities in nats and ``tail`` [...],
        the probability of all other tokens. No gradient reaches it.

    The other tokens are one event on both sides, so this is a lower bound of the full divergence
    (data processing inequality), exact when the tail is 0 or has the student's proportions. Its
    gradient is one pass over the vocabulary and a scatter of K numbers.
    """
    return _top_k_forward(student, teacher)[0]


def _top_k_forward(student: Array, teacher: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
    logits, ids = student.astype(jnp.float32), teacher["ids"]
    total = jax.nn.logsumexp(logits, axis=-1)
    mine = jnp.take_along_axis(logits, ids, axis=-1) - total[..., None]
    theirs = teacher["logits"].astype(jnp.float32)
    tail = teacher["tail"].astype(jnp.float32)
    p, q = jnp.exp(theirs), jnp.exp(mine)
    room = 1.0 - q.sum(-1)
    counts = (tail > 0) & (room > 1e-6)  # the student's tail is too small to have a gradient
    room, safe = jnp.maximum(room, 1e-6), jnp.where(tail > 0, tail, 1.0)
    other = jnp.where(tail > 0, tail * (jnp.log(safe) - jnp.log(room)), 0.0)
    pull = jnp.where(counts, tail / room, 0.0)  # what the student's tail lacks, per probability
    return (p * (theirs - mine)).sum(-1) + other, (student, total, ids, p, q, pull)


def _top_k_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, None]:
    student, total, ids, p, q, pull = saved
    width = student.shape[-1]
    shared = grad * (p.sum(-1) - pull * q.sum(-1))
    wide = shared[..., None] * jnp.exp(student.astype(jnp.float32) - total[..., None])
    own = grad[..., None] * (pull[..., None] * q - p)
    rows, ids = wide.reshape(-1, width), ids.reshape(-1, ids.shape[-1])
    rows = rows.at[jnp.arange(len(rows))[:, None], ids].add(own.reshape(ids.shape))
    return rows.reshape(wide.shape).astype(student.dtype), None


top_k.defvjp(_top_k_forward, _top_k_backward)
