"""The reverse KL of whole responses, KL(student || teacher), from responses that were sampled.

Gu et al. 2024, MiniLLM (arXiv 2306.08543): with ``r_s = log p(y_s) - log q(y_s)`` of a sampled
token, its gradient is that of each step's own reverse KL, which is exact, and of what follows from
a token, a policy gradient with the later ``r_s`` as its return. Each loses the other's variance.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from w2s_jax.losses.distillation import reverse_kl
from w2s_jax.losses.policy import importance
from w2s_jax.losses.sequence import pick

Array = jax.Array


def later(rewards: Array, mask: Array, *, normalise: bool = True) -> Array:
    """What follows each token: the mean of the rewards after it in its response, [B,M].

    Args:
      rewards: [B,M] nats; mask [B,M] is 1 on the response, which is contiguous and begins at 0.
      normalise: False sums instead, which is the exact return; the mean keeps long responses from
        having large returns (MiniLLM, section 2.2, "length normalization").

    The return starts after the token, since the token's own reward is in the single-step term. (The
    authors' code and TRL's start at the token, which counts that reward twice in their sum.)
    """
    rewards = jnp.where(mask > 0, rewards, 0.0)
    total = _after(rewards)
    if not normalise:
        return jnp.where(mask > 0, total, 0.0)
    count = _after((mask > 0).astype(jnp.float32))
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0)


def _after(values: Array) -> Array:
    """Sum of what comes strictly after each entry of [B,M]."""
    return jax.lax.cumsum(values, axis=1, reverse=True) - values


def two_terms(
    student: Array,
    teacher: Array,
    sampled: dict[str, Array],
    *,
    loss: Callable[[Array, Array, Array], Array] = importance,
) -> Array:
    """The single-step and the long-term part at each sampled token, [..., V] -> [...] nats.

    ``w KL(q || p) + loss(log q(y), old, later)``: its gradient, not its value, is an estimate.

    Args:
      student, teacher: logits [..., V] of q and p.
      sampled: per token, without gradients: ``ids``; ``old``, its log-probability under what it
        was drawn from; ``later``, its return; ``weight`` w = q(y) / exp(old).
      loss: of ``losses.policy``: ``importance`` weighs by q / exp(old), ``ppo_clip`` also limits
        that ratio (as the authors do, who reuse samples for four epochs).
    """
    single = sampled["weight"] * reverse_kl(student, teacher)
    logps = pick(student, sampled["ids"])
    return single + loss(logps, sampled["old"], sampled["later"])
