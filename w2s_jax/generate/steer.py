"""Logit arithmetic: what a large model should say, moved as fine-tuning moved a small one.

A rule is ``rule(large [...,V], base [...,V], experts [E,...,V], **numbers) -> Blend``: the next
tokens' logits (or log-probabilities: constants do not matter) of a large model, of a small base
and of E small experts made from that base, for the same text. ``proxy`` adds the experts' logit
shifts with fixed weights (proxy tuning, Liu et al. 2024, arXiv 2401.08565); ``fused`` solves for
the weight at every place (Fan et al. 2024, arXiv 2406.15480). All arithmetic is float32. The loop
that decodes by a rule and the scorer of given texts are in ``steer_loop``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from w2s_jax.types import Array

GRID = tuple(i / 10 for i in range(21))  # 0 .. 2, with the 1 of proxy tuning
ROOM = 2**22  # numbers that a search over weights holds at once
GOLDEN = (5**0.5 - 1) / 2

Objective = Callable[[Array], Array]  # weights [...] -> what is minimised [...]
Search = Callable[[Objective, tuple[int, ...], int], tuple[Array, Array]]


class Blend(NamedTuple):
    """What a rule makes of the models: ``logps`` [...,V] float32, log-probabilities (nats).

    ``alpha`` [...] float32 is the weight of what was added (of several experts that all act: the
    sum), ``expert`` [...] int32 the one that acted, -1 where none does or all do.
    """

    logps: Array
    alpha: Array
    expert: Array


Rule = Callable[..., Blend]


def shifts(large: Array, base: Array, experts: Array) -> tuple[Array, Array]:
    """Log-probabilities of the large model [...,V], and what each expert adds to them [E,...,V];
    0 where neither base nor expert ever says a token (logits of -inf)."""
    logps, below, above = (
        jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (large, base, experts)
    )
    never = jnp.isneginf(above) & jnp.isneginf(below)[None]
    return logps, jnp.where(never, 0.0, above - below[None])


def proxy(large: Array, base: Array, experts: Array, *, alpha: float | Array = 1.0) -> Blend:
    """``softmax(large + sum_e alpha_e (expert_e - base))`` with fixed weights [] or [E].

    Proxy tuning is ``alpha`` 1; 0 is the large model; negative weights steer away from an expert.
    With the large model as its own expert it is contrastive decoding, ``(1 + alpha) large -
    alpha base`` (O'Brien and Lewis 2023, arXiv 2309.09117, without its plausibility mask).
    """
    logps, shift = shifts(large, base, experts)
    count = shift.shape[0]
    weights = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (count,))
    added = jnp.tensordot(weights, shift, axes=1)
    rows = logps.shape[:-1]
    return Blend(
        jax.nn.log_softmax(logps + added),
        jnp.broadcast_to(weights.sum(), rows),
        jnp.full(rows, 0 if count == 1 else -1, jnp.int32),
    )


def displacement(logps: Array, shift: Array, alpha: Array) -> tuple[Array, Array]:
    """KL(r || p) and KL(p || r) in nats, [...], of ``r = softmax(logps + alpha shift)`` and p.

    ``logps`` [...,V] are log-probabilities of p, ``shift`` [...,V], ``alpha`` [...]. With
    ``Z = log sum exp(logps + alpha shift)`` they are ``alpha E_r[shift] - Z`` and
    ``Z - alpha E_p[shift]``; rounding below 0 is cut off.
    """
    moved = logps + alpha[..., None] * shift
    total = jax.nn.logsumexp(moved, axis=-1)
    there = (jnp.exp(moved - total[..., None]) * shift).sum(-1)
    here = (jnp.exp(logps) * shift).sum(-1)
    return jnp.maximum(alpha * there - total, 0.0), jnp.maximum(total - alpha * here, 0.0)


def grid(
    objective: Objective,
    rows: tuple[int, ...],
    vocab: int,
    *,
    alphas: Sequence[float] = GRID,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """The best of ``alphas`` and its objective, both [rows]; ties go to the smaller weight.

    ``chunk`` weights are tried at a time (default: as many as keep ``chunk`` x rows x V small).
    """
    size = max(1, vocab * math.prod(rows))
    tried = jnp.asarray(sorted(alphas), jnp.float32)
    found = jax.lax.map(
        lambda alpha: objective(jnp.broadcast_to(alpha, rows)),
        tried,
        batch_size=max(1, min(chunk or ROOM // size, len(tried))),
    )
    return tried[found.argmin(0)], found.min(0)


def golden(
    objective: Objective,
    rows: tuple[int, ...],
    vocab: int,
    *,
    low: float = 0.0,
    high: float = 2.0,
    evaluations: int = 12,
) -> tuple[Array, Array]:
    """The least of the objective by golden-section search, both [rows]; for a single dip only.

    The weight is found to ``(high - low) .618^(evaluations - 1)``; 12 evaluations: .01 of 0..2.
    """
    least, most = (jnp.full(rows, end, jnp.float32) for end in (low, high))
    left, right = most - GOLDEN * (most - least), least + GOLDEN * (most - least)

    def narrow(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        least, most, left, right, at_left, at_right = state
        low_side = at_left <= at_right
        least, most = jnp.where(low_side, least, left), jnp.where(low_side, right, most)
        new = jnp.where(low_side, most - GOLDEN * (most - least), least + GOLDEN * (most - least))
        at_new = objective(new)
        return (
            least,
            most,
            jnp.where(low_side, new, right),
            jnp.where(low_side, left, new),
            jnp.where(low_side, at_new, at_right),
            jnp.where(low_side, at_left, at_new),
        )

    state = (least, most, left, right, objective(left), objective(right))
    *_, left, right, at_left, at_right = jax.lax.fori_loop(0, evaluations - 2, narrow, state)
    best = at_left <= at_right
    return jnp.where(best, left, right), jnp.minimum(at_left, at_right)


def fused(large: Array, base: Array, experts: Array, *, search: Search = grid) -> Blend:
    """The shift whose weight displaces the large model as far as fine-tuning displaced the base.

    With P the large model, Q the base, Q_s expert s and ``P~ = softmax(P + alpha (Q_e - Q))``,
    one expert e acts at a place, and (e, alpha) has the least (paper: section 3, both equations)

    ``sum_s (KL(P~ || P) - KL(Q_s || Q))^2 + (KL(P || P~) - KL(Q || Q_s))^2``.

    Ties go to the smaller weight, then to the first expert. Where large and base agree and one
    expert differs from them, alpha is 1 (exactly so on the grid). Where a model's logits are not
    finite, nor are the log-probabilities (alpha 0, expert -1). ``search`` is ``grid`` or
    ``golden``, with a range bound by ``partial`` if need be. No more than one expert's
    ``chunk`` x rows x V is held beside the inputs.
    """
    logps, shift = shifts(large, base, experts)
    below = jax.nn.log_softmax(base.astype(jnp.float32))
    rows, vocab = logps.shape[:-1], logps.shape[-1]
    one = jnp.ones(rows, jnp.float32)
    wanted = jax.lax.map(lambda each: displacement(below, each, one), shift)

    def least(each: Array) -> tuple[Array, Array]:
        return search(partial(_mismatch, logps, each, wanted), rows, vocab)

    alphas, values = jax.lax.map(least, shift)  # [E, rows] each
    least_of_all = values.min(0)
    solved = jnp.isfinite(least_of_all)  # all experts are in every objective: one NaN is enough
    tied = jnp.where(values == least_of_all[None], alphas, jnp.inf)
    expert = tied.argmin(0)
    alpha = jnp.take_along_axis(alphas, expert[None], axis=0)[0]
    chosen = jnp.take_along_axis(shift, expert[None, ..., None], axis=0)[0]
    moved = jax.nn.log_softmax(logps + alpha[..., None] * chosen)
    return Blend(
        jnp.where(solved[..., None], moved, jnp.nan),
        jnp.where(solved, alpha, 0.0),
        jnp.where(solved & (alpha > 0), expert.astype(jnp.int32), -1),
    )


def _mismatch(logps: Array, shift: Array, wanted: tuple[Array, Array], alpha: Array) -> Array:
    """The objective [...] of weights [...] of one expert's shift."""
    pair = displacement(logps, shift, alpha)
    return sum(  # pyright: ignore[reportReturnType]
        jnp.square(got[None] - want).sum(0) for got, want in zip(pair, wanted, strict=True)
    )
