"""The scaled forward KL together with its derivative by the temperature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def tempered_kl(student: Array, teacher: Array, temperature: Any) -> tuple[Array, Array]:
    """``V = T^2 KL(p || q)`` and ``dV/dT``, nats, both [...] float32; p and q are the softmax of
    the teacher's and student's logits [..., V] over T (Hinton et al. 2015).

    T is a number, [] or one for each distribution [...]. The gradient by the student, T (q - p), is
    that of V; dV/dT is a value without a gradient, so that nothing of the size of the vocabulary is
    kept for it. No gradient reaches the teacher or the temperature. Logits that do not exist are
    very low or -inf on both sides and count nothing.
    """
    return _forward(student, teacher, temperature)[0]


def _forward(student: Array, teacher: Array, temperature: Any) -> tuple[tuple[Array, Array], Any]:
    t = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), student.shape[:-1])
    mine, theirs = (x.astype(jnp.float32) / t[..., None] for x in (student, teacher))
    totals = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (mine, theirs)]
    log_q, log_p = mine - totals[0], theirs - totals[1]
    p, q, apart = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q

    def mean(weight: Array, x: Array) -> Array:
        return jnp.where(weight > 0, weight * x, 0.0).sum(-1)  # 0 log 0 is 0

    # d/dT of log p is (E_p log p - log p) / T, and so for q: four sums, no more passes than that
    divergence, known, said = mean(p, apart), mean(p, log_p), mean(q, log_q)
    slope = t * (divergence * (1.0 + known) - mean(p, log_p * apart) + known - said)
    return (t * t * divergence, slope), (student, teacher, t, *totals)


def _backward(saved: Any, grads: tuple[Array, Array]) -> tuple[Array, None, None]:
    student, teacher, t, mine, theirs = saved
    over = t[..., None]
    change = jnp.exp(student / over - mine) - jnp.exp(teacher / over - theirs)
    return ((t * grads[0])[..., None] * change).astype(student.dtype), None, None


tempered_kl.defvjp(_forward, _backward)
