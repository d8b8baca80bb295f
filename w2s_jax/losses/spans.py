"""Divergences of the likelihood of one stretch of text under two models, in nats.

Each is ``(student [...], teacher [...], tokens [...]) -> [...]``: log-probabilities of the stretch
and the number of the student's tokens in it. They compare models whose tokenizers differ, where
next-token distributions have nothing in common (Minixhofer, Vulic and Ponti 2025, "Universal
Cross-Tokenizer Distillation via Approximate Likelihood Matching", arXiv 2503.20083). The teacher
gets no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
CERTAIN = -1e-6  # nearest to 0 that a log-probability may come: a certain event has no gradient


def binary_kl(student: Array, teacher: Array, tokens: Array, *, temperature: Any = 1.0) -> Array:
    """``p log p/q + (1 - p) log (1 - p)/(1 - q)``: forward KL of "this stretch follows" or not.

    p and q are the teacher's and the student's probability of it to the power ``1 / temperature``.
    At 1 a long stretch says little, as both are near 0; the released code of the paper has a
    temperature too, and its limit: times the temperature it tends to ``(a - b) + a log(b / a)``,
    with a and b the log-probabilities, as the temperature grows.
    """
    a = jnp.minimum(_known(teacher) / temperature, CERTAIN)
    b = jnp.minimum(student.astype(jnp.float32) / temperature, CERTAIN)
    return jnp.exp(a) * (a - b) - jnp.expm1(a) * (_log1mexp(a) - _log1mexp(b))


def matching(
    student: Array, teacher: Array, tokens: Array, *, temperature: Any = 1.0, nll: Any = 0.0
) -> Array:
    """``temperature`` times ``binary_kl``, so that its gradient keeps its size, and ``nll`` times
    the stretch's negative log-likelihood under the student: fine-tuning on the same text."""
    apart = temperature * binary_kl(student, teacher, tokens, temperature=temperature)
    return apart - nll * student.astype(jnp.float32)


def squared(student: Array, teacher: Array, tokens: Array) -> Array:
    """Squared difference of the log-probabilities, each per token of the student."""
    count = jnp.maximum(tokens, 1)
    return ((student.astype(jnp.float32) - _known(teacher)) / count) ** 2


def _known(teacher: Array) -> Array:
    return jax.lax.stop_gradient(teacher).astype(jnp.float32)


def _log1mexp(x: Array) -> Array:
    """``log(1 - exp(x))`` for x < 0, accurate on both ends (Maechler 2012)."""
    near = x > -0.6931472
    close, far = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))
