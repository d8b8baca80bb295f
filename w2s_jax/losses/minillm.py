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
from w2s_jax.losses.policy import importance, whiten
from w2s_jax.losses.sequence import pick

Array = jax.Array


# A return: (rewards [B,M] nats, mask [B,M], 1 on the response, which is contiguous and begins at
# 0) -> what follows each token in its response [B,M]. It starts after the token, since the token's
# own reward is in the single-step term. (The authors' code and TRL's start at the token, which
# counts that reward twice in their sum.)


def later_sum(rewards: Array, mask: Array) -> Array:
    """The sum of the rewards after each token: the exact return."""
    return jnp.where(mask > 0, _after(jnp.where(mask > 0, rewards, 0.0)), 0.0)


def later(rewards: Array, mask: Array) -> Array:
    """The mean of the rewards after each token, which keeps long responses from having large
    returns (MiniLLM, section 2.2, "length normalization")."""
    count = _after((mask > 0).astype(jnp.float32))
    return later_sum(rewards, mask) / jnp.maximum(count, 1.0)


def whitened(rewards: Array, mask: Array, *, most: float = jnp.inf) -> Array:
    """``later`` with mean 0 and standard deviation 1 over all tokens of the batch, as the authors
    train: a token is compared with the others, at one size whatever the divergence.

    Args:
      most: rewards are cut to [-most, most] first.
    """
    return whiten(later(jnp.clip(rewards, -most, most), mask), mask)


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
