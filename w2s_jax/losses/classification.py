"""Classification losses of weak-to-strong generalization: one number per example, never reduced.

Notation: f student logits [B,C], p = softmax(f), q weak (or true) label probabilities [B,C]. Every
loss here but ``confidence_window`` is CE(f, target), with the target detached, for some mix of q
and the student's own prediction. Sources: Burns et al. 2023 (arXiv 2312.09390); the repository
openai/weak-to-strong; EleutherAI's replication (EleutherAI/w2s).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from w2s_jax.errors import UserError

Array = jax.Array
Threshold = Callable[[Array, Array], Array | float]


def soft_xent(logits: Array, labels: Array) -> Array:
    """Cross-entropy to soft labels, ``-sum_k q_k log p_k``; the naive loss of Burns et al.

    Args:
      logits: [B, C], any float dtype.
      labels: [B, C] probabilities; a hard label is a one-hot row.

    Returns:
      [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, C] arrays of one shape.
    """
    _check(logits, labels)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), labels.astype(jnp.float32))


def quantile_threshold(probs: Array, labels: Array) -> Array:
    """The t for which the share of the batch with ``p_1 > t`` is the mean weak label of class 1.

    t lies midway between two neighbouring predictions; the share is rounded to a whole number of
    examples, and is exact unless predictions tie. probs, labels [B, 2] -> [] float32 in
    [-inf, inf] (no example, or every example, is positive).
    """
    batch = probs.shape[0]
    positive = jnp.round(labels[:, 1].mean() * batch).astype(jnp.int32)
    below = batch - positive
    return (_ordered(probs[:, 1], below - 1) + _ordered(probs[:, 1], below)) / 2


def half_threshold(probs: Array, labels: Array) -> Array:
    """The batch median of ``p_1``: half of the batch is positive, as for balanced classes."""
    return jnp.median(probs[:, 1])


def aux_confidence(
    logits: Array,
    labels: Array,
    *,
    alpha: Array | float,
    threshold: Threshold = quantile_threshold,
) -> Array:
    """Auxiliary confidence loss, ``(1 - alpha) CE(f, q) + alpha CE(f, 1[f > t])``.

    Burns et al. 2023, section 4.3.2 and appendix A.4. The hardened self-prediction is detached.
    With two classes ``t = threshold(probs, labels)`` is a cut on ``p_1`` (a running threshold is
    a function that returns it); with more classes the argmax is taken and ``threshold`` is not
    called. The threshold is of the batch: below 8 examples it says little. A zero-initialised head
    ties all predictions, so let ``alpha`` start at 0 (``ramp(0, 0.75, over=0.2)``).

    Args:
      logits: [B, C], any float dtype.
      labels: [B, C] probabilities.
      alpha: weight of the self-prediction in [0, 1], a number, [] or [B].
      threshold: (probs [B, 2] float32, labels [B, 2]) -> [] or [B].

    Returns:
      [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, C] arrays of one shape.
    """
    _check(logits, labels)
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    if probs.shape[-1] == 2:
        positive = probs[:, 1] > threshold(probs, labels.astype(jnp.float32))
        chosen = positive.astype(jnp.int32)
    else:
        chosen = probs.argmax(-1)
    return _mixed_xent(logits, labels, jax.nn.one_hot(chosen, probs.shape[-1]), alpha)


def logconf(logits: Array, labels: Array, *, alpha: Array | float) -> Array:
    """The reference repository's confidence loss, arithmetic for arithmetic.

    ``t = quantile(p_0, mean_b q_1)`` with linear interpolation over the batch; the hardened
    prediction is class 0 where ``p_0 >= t``; CE to ``(1 - alpha) q + alpha hard``. Its warm-up is
    ``ref_schedule(0.5)`` (openai/weak-to-strong, loss.py, ``logconf``).

    Args:
      logits: [B, 2], any float dtype.
      labels: [B, 2] probabilities.
      alpha: weight of the self-prediction in [0, 1], a number, [] or [B].

    Returns:
      [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, 2] arrays.
    """
    _check(logits, labels)
    if logits.shape[-1] != 2:
        raise UserError(f"logconf needs 2 classes, got {logits.shape[-1]}; use aux_confidence")
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    share = labels.astype(jnp.float32).mean(0)[1]
    first = probs[:, 0] >= _quantile(probs[:, 0], jnp.clip(share, 0.0, 1.0))
    return _mixed_xent(logits, labels, jnp.stack([first, ~first], axis=1), alpha)


def _quantile(values: Array, share: Array) -> Array:
    """``jnp.quantile`` of [B] with linear interpolation, by counting (see ``_ordered``)."""
    place = share * (values.shape[0] - 1)
    low = jnp.floor(place)
    high = place - low
    below, above = (_ordered(values, x.astype(jnp.int32)) for x in (low, jnp.ceil(place)))
    return below * (1 - high) + above * high


def _ordered(values: Array, place: Array) -> Array:
    """What stands at ``place`` [] (from 0) of ``values`` [B] in ascending order; -inf before the
    first, inf after the last.

    A few hundred values are compared all with all instead of sorted: on a CPU the sort of 32
    predictions is a fifth of the whole update of a small probe, the comparisons almost nothing.
    """
    if values.shape[0] <= 256:
        upto = (values[None] <= values[:, None]).sum(1)
        return jnp.where(place < 0, -jnp.inf, jnp.where(upto > place, values, jnp.inf).min())
    edge = jnp.array([jnp.inf], values.dtype)
    return jnp.concatenate([-edge, jnp.sort(values), edge])[place + 1]


def product(
    logits: Array, labels: Array, *, alpha: Array | float = 1.0, beta: Array | float = 1.0
) -> Array:
    """CE to the normalised product ``p^beta q^alpha``, detached (openai/weak-to-strong, loss.py).

    ``alpha`` weighs the weak labels, ``beta`` the student's own prediction; ``beta = 0`` with
    ``alpha = 1`` is ``soft_xent``. logits, labels [B, C] -> [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, C] arrays of one shape.
    """
    _check(logits, labels)
    logps = jax.nn.log_softmax(logits.astype(jnp.float32))
    # In logs, so that a confident student does not underflow; 0 to the power 0 stays 1.
    scores = _column(beta) * logps + xlogy(_column(alpha), labels.astype(jnp.float32))
    return soft_xent(logits, jax.lax.stop_gradient(jax.nn.softmax(scores)))


def entropy_confidence(logits: Array, labels: Array, *, alpha: Array | float) -> Array:
    """CE to ``(1 - alpha) q + alpha p`` with the soft self-prediction p detached.

    EleutherAI's "entropy" loss: ``logconf`` without hardening. logits, labels [B, C];
    alpha in [0, 1], a number, [] or [B] -> [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, C] arrays of one shape.
    """
    _check(logits, labels)
    return _mixed_xent(logits, labels, jax.nn.softmax(logits.astype(jnp.float32)), alpha)


def confidence_window(logits: Array, labels: Array, *, radius: Array | float = 0.15) -> Array:
    """CE where the student is unsure, ``max_k p_k < 0.5 + radius``, and 0 elsewhere.

    The mean over the batch divides by B, not by the number of unsure examples, as in EleutherAI's
    "window" loss; its "midweak" window is ``radius=midweak(weak labels of the training set)``.
    logits, labels [B, C]; radius a number, [] or [B] -> [B] float32, nats.

    Raises:
      UserError: logits and labels are not two [B, C] arrays of one shape.
    """
    _check(logits, labels)
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    return jnp.where(probs.max(-1) < 0.5 + radius, soft_xent(logits, labels), 0.0)


def midweak(labels: Any) -> Array:
    """The window radius whose edge is the median weak confidence: [N, C] -> [] float32."""
    return jnp.median(jnp.max(jnp.asarray(labels, jnp.float32), axis=-1)) - 0.5


def ramp(start: float, end: float, *, over: float) -> Any:
    """A schedule: linear from ``start`` to ``end`` over the first ``over`` of the run, then flat.

    Burns et al. warm alpha up with ``ramp(0, alpha, over=0.2)``. The result maps progress in
    [0, 1] to [] float32; ``over=0`` is ``end`` from the start.

    Raises:
      UserError: ``over`` outside [0, 1].
    """
    _check_share(over)

    return _mark(partial(_ramp, start=start, end=end, over=over))


def ref_schedule(alpha: float, *, over: float = 0.1) -> Any:
    """The reference repository's warm-up: ``alpha * progress`` up to ``over``, then ``alpha``.

    It climbs to ``over * alpha`` only (0.05 for alpha 0.5) and then jumps; ``ramp`` is the
    continuous one. The result maps progress in [0, 1] to [] float32.

    Raises:
      UserError: ``over`` outside [0, 1].
    """
    _check_share(over)

    return _mark(partial(_climb_then_jump, alpha=alpha, over=over))


def _ramp(progress: Array | float, *, start: float, end: float, over: float) -> Array:
    done = jnp.clip(jnp.asarray(progress, jnp.float32) / over, 0, 1) if over else 1.0
    return jnp.asarray(start + (end - start) * done, jnp.float32)


def _climb_then_jump(progress: Array | float, *, alpha: float, over: float) -> Array:
    progress = jnp.asarray(progress, jnp.float32)
    return alpha * jnp.where(progress > over, 1.0, progress)


def _check(logits: Array, labels: Array) -> None:
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise UserError(
            f"logits and labels must both be [B,C], got {logits.shape} and {labels.shape}"
        )


def _mixed_xent(logits: Array, labels: Array, own: Array, alpha: Array | float) -> Array:
    """CE to ``(1 - alpha) labels + alpha own``, with ``own`` detached."""
    weight = _column(alpha)
    return soft_xent(logits, (1 - weight) * labels + weight * jax.lax.stop_gradient(own))


def _column(value: Array | float) -> Array:
    """A number, [] or [B] as something that scales the rows of [B, C]."""
    value = jnp.asarray(value, jnp.float32)
    return value[:, None] if value.ndim else value


def _check_share(over: float) -> None:
    if not 0 <= over <= 1:
        raise UserError(f"a schedule's `over` is a share of the run in [0, 1], got {over}")


def _mark(schedule: Callable[[Array | float], Array]) -> Callable[[Array | float], Array]:
    """Objectives replace a keyword with this mark by its value at the present progress."""
    schedule.is_schedule = True  # type: ignore[attr-defined]
    return schedule
