"""The scaled forward KL together with its derivative by the temperature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def tempered_kl(student: Array, teacher: Array, temperature: Array) -> tuple[Array, Array]:
    """``V = T^2 KL(p || q)`` and ``dV/dT``, nats, both [...]; p and q are the softmax of the
    teacher's and student's logits [..., V] over T (Hinton et al. 2015).

    The gradient by the student, T (q - p), is that of V; dV/dT is a value without a gradient, so
    that nothing of the size of the vocabulary is kept for it. No gradient reaches the teacher or
    ``temperature`` [].
    """
    return _forward(student, teacher, temperature)[0]


def _forward(student: Array, teacher: Array, t: Array) -> tuple[tuple[Array, Array], Any]:
    mine, theirs = student / t, teacher / t
    totals = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (mine, theirs)]
    log_q, log_p = mine - totals[0], theirs - totals[1]
    p, apart = jnp.exp(log_p), log_p - log_q
    divergence = (p * apart).sum(-1)
    # d/dT of log p is (E_p log p - log p) / T, and so for q: four sums, no more passes than that
    known = (p * log_p).sum(-1)
    joint = (p * log_p * apart).sum(-1)
    said = (jnp.exp(log_q) * log_q).sum(-1)
    slope = t * (divergence * (1.0 + known) - joint + known - said)
    return (t * t * divergence, slope), (student, teacher, t, *totals)


def _backward(saved: Any, grads: tuple[Array, Array]) -> tuple[Array, None, None]:
    student, teacher, t, mine, theirs = saved
    change = jnp.exp(student / t - mine) - jnp.exp(teacher / t - theirs)
    return t * grads[0][..., None] * change, None, None


tempered_kl.defvjp(_forward, _backward)
