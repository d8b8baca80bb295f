"""The scaled forward KL together with its derivative by the temperature."""

from __future__ import annotations

import jax

from w2s_jax.losses.distillation import forward_kl

Array = jax.Array


def tempered_kl(student: Array, teacher: Array, *, temperature: Array) -> tuple[Array, Array]:
    """``V = T^2 KL(p || q)`` and ``dV/dT``, nats, both [...]; p and q are the softmax of the
    teacher's and student's logits [..., V] over T (Hinton et al. 2015).

    The gradient by the student, T (q - p), is that of V; dV/dT is a plain value, so that nothing
    of the size of the vocabulary is kept for it. With z the logits it is ``2 T KL(p || q) -
    Cov_p(z_teacher, log p - log q) + E_p z_student - E_q z_student``. No gradient reaches the
    teacher or ``temperature`` [].
    """
    temperature = jax.lax.stop_gradient(temperature)
    value = temperature**2 * forward_kl(student, teacher, temperature=temperature)
    mine, theirs = jax.lax.stop_gradient((student, teacher))
    log_q, log_p = (jax.nn.log_softmax(z / temperature) for z in (mine, theirs))
    (q, p), apart = jax.tree.map(jax.numpy.exp, (log_q, log_p)), log_p - log_q
    divergence = (p * apart).sum(-1)
    covariance = (p * theirs * apart).sum(-1) - (p * theirs).sum(-1) * divergence
    shift = (p * mine).sum(-1) - (q * mine).sum(-1)
    return value, 2.0 * temperature * divergence - covariance + shift
