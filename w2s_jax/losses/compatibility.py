"""Distillation from two versions of a model, so that an update breaks little (MUSCLE).

Echterhoff et al. 2024, arXiv 2407.09435. The student starts as the new version. A mask says token
by token (class by class) which of the two it is drawn to: 1 is the old one. Logits are [..., V],
targets [...] the right tokens; a mask never has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl

Array = jax.Array
Mask = Callable[[Array, Array, Array], Array]


def student_wrong(student: Array, old: Array, targets: Array) -> Array:
    """Where the student's likeliest token is wrong [...] bool: the paper's mask."""
    return student.argmax(-1) != targets


def old_right(student: Array, old: Array, targets: Array) -> Array:
    """Where the old version's likeliest token is right [...] bool (ablation)."""
    return old.argmax(-1) == targets


def always_old(student: Array, old: Array, targets: Array) -> Array:
    """Everywhere [...] bool (ablation): the old version alone teaches."""
    return jnp.ones(targets.shape, bool)


def less_likely(student: Array, old: Array, targets: Array) -> Array:
    """Where the student gives the right token less than the old version does [...] bool (ablation:
    the likelihood of tokens; the paper adds cross-entropy to it)."""
    return _logp(student, targets) < _logp(old, targets)


def sequences_less_likely(student: Array, old: Array, sequence: Array) -> Array:
    """Where the student gives the right tokens of a whole sequence less than the old version does,
    [B,T] bool, the same for all tokens of a sequence (ablation: the likelihood of sequences; the
    paper adds cross-entropy to it).

    It needs whole rows, hence it is made before ``compatibility`` sees any part of them.

    Args:
      student: [B,T] log-probabilities of the right tokens, 0 where none counts.
      old: likewise.
      sequence: [B,T] numbers in 0..T, which of a row's sequences a token belongs to.
    """

    def summed(gap: Array, of: Array) -> Array:
        return jax.ops.segment_sum(gap, of, num_segments=len(of) + 1)[of]

    return jax.lax.stop_gradient(jax.vmap(summed)(student - old, sequence)) < 0


def compatibility(
    student: Array,
    teachers: Sequence[Array],
    targets: Array,
    *,
    mask: Mask = student_wrong,
    weight: float | Array = 1.0,
    temperature: float = 2.0,
) -> Array:
    """``weight D + (1 - weight) CE``, ``D = m KL(old || student) + (1 - m) KL(new || student)``.

    Both KL at the temperature, without a factor T^2, as the paper writes it; the cross-entropy with
    the targets at temperature 1. For ``objectives.distill(..., teacher=[old, new], targets=True)``
    and ``distill_classes``. Weight 0 is plain fine-tuning.

    Args:
      student: [..., V] logits.
      teachers: the old and the new version's logits [..., V]; no gradient reaches them.
      targets: [...] ids.
      mask: ``(student, old, targets) -> [...]`` bool, made anew at every step.
      weight: of the distillation (lambda, not reported in the paper); may be traced.

    Returns:
      [...] nats, float32.

    Raises:
      UserError: not two teachers.
    """
    if not isinstance(teachers, list | tuple) or len(teachers) != 2:
        raise UserError("compatibility needs two teachers, the old and the new version")
    old, new = (jax.lax.stop_gradient(each) for each in teachers)
    drawn = mask(jax.lax.stop_gradient(student), old, targets)
    # one teacher per token: one divergence is taken, not two of which half is thrown away
    teacher = jnp.where(drawn[..., None], old, new)
    distilled = forward_kl(student, teacher, temperature=temperature)
    return weight * distilled - (1 - weight) * _logp(student, targets)


def _logp(logits: Array, targets: Array) -> Array:
    """Log-probability of the targets, [..., V] and [...] -> [...] float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
