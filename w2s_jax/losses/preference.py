"""Losses of responses: one number each, from log-probabilities in nats.

Losses with a reference take ``(chosen, rejected, ref_chosen, ref_rejected)``, those without one
``(chosen, rejected)``: arrays of one shape, written [P]. Whether a log-probability is the sum over
the response or its mean per token is the objective's choice, and beta goes with it: about 0.1 for
sums, 5 to 10 for means. Below, ``r_w = chosen - ref_chosen``, ``r_l = rejected - ref_rejected`` and
``u = r_w - r_l``. Names are TRL's where the formula is. RPO is ``dpo`` with ``prefer(nll=)``; WPO
and LD-DPO change what a loss sees and are options of ``prefer``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError

Array = jax.Array
Number = float | Array


def dpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Number,
    smoothing: Number = 0.0,
) -> Array:
    """Direct preference optimization (2305.18290, eq. 7), [P] nats per pair.

    ``-(1 - s) log sigmoid(beta u) - s log sigmoid(-beta u)``; ``smoothing`` s is the assumed share
    of swapped labels (conservative DPO). ln 2 when policy and reference agree. Sums (beta 0.1) or
    means (Tulu 3's length-normalised DPO, 2411.15124: beta 5).
    """
    return _logistic(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)), smoothing)


def robust(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Number,
    smoothing: Number,
) -> Array:
    """DPO whose mean over labels swapped at rate s is the clean loss (2403.00409), [P] nats.

    ``[-(1 - s) log sigmoid(beta u) + s log sigmoid(-beta u)] / (1 - 2 s)``, 0 <= s < 1/2; it may be
    negative. Sums, beta 0.1.

    Raises:
      UserError: a smoothing of half or more.
    """
    _within("robust", smoothing, 0.0, 0.5)
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    kept = -(1 - smoothing) * jax.nn.log_sigmoid(margin)
    swapped = -smoothing * jax.nn.log_sigmoid(-margin)
    return (kept - swapped) / (1 - 2 * smoothing)


def ipo(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Identity preference optimization (2310.12036, eq. 17), [P].

    ``(u - 1 / (2 beta))**2``, beta being the paper's tau; the margin stays finite however certain
    the labels are. The equation has sums; TRL and the paper's results have means. The target margin
    is in the same unit, so beta differs by about a response's length.
    """
    return ((chosen - rejected) - (ref_chosen - ref_rejected) - 1 / (2 * beta)) ** 2


def hinge(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """The hinge of SLiC (2305.10425) on the margin over a reference, [P]: ``relu(1 - beta u)``.

    Sums; SLiC's margin delta is 1 and its scale 1 / beta (RSO, 2309.06657: beta 0.05, means).
    """
    return jax.nn.relu(1 - beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))


def apo_zero(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Anchored preferences where chosen is better than the policy (2408.06266, eq. 7), [P].

    ``1 - sigmoid(beta r_w) + sigmoid(beta r_l)``: chosen goes up, rejected down. Sums, beta 0.1.
    """
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return jax.nn.sigmoid(-up) + jax.nn.sigmoid(down)


def apo_down(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Anchored preferences where chosen is worse than the policy (2408.06266, eq. 8), [P].

    ``sigmoid(beta r_w) + 1 - sigmoid(beta u)``: both go down, rejected more. Sums, beta 0.1.
    """
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return jax.nn.sigmoid(up) + jax.nn.sigmoid(down - up)


def nca_pair(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Noise contrastive alignment of two responses (2402.05369), [P] nats.

    ``-log sigmoid(beta r_w) - [log sigmoid(-beta r_w) + log sigmoid(-beta r_l)] / 2``: holds the
    chosen response's own likelihood up. Sums, beta 0.01 to 0.1.
    """
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    log_sigmoid = jax.nn.log_sigmoid
    return -log_sigmoid(up) - 0.5 * log_sigmoid(-up) - 0.5 * log_sigmoid(-down)


def bco_pair(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Binary classifier optimization of both responses (2404.04656), [P] nats.

    ``-log sigmoid(beta r_w) - log sigmoid(-beta r_l)``, without the paper's running shift of the
    rewards. Sums, beta 0.1.
    """
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -jax.nn.log_sigmoid(up) - jax.nn.log_sigmoid(-down)


def sppo_hard(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """Self-play preferences with certain winners (2405.00675, eq. 4.7), [P].

    ``(r_w - 1 / (2 beta))**2 + (r_l + 1 / (2 beta))**2``. Sums, beta 0.001 (1 / the paper's eta).
    """
    target = 1 / (2 * beta)
    return (chosen - ref_chosen - target) ** 2 + (rejected - ref_rejected + target) ** 2


def exo_pair(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Number,
    smoothing: Number,
) -> Array:
    """Efficient exact optimization of two responses (2402.00856, eq. 16), [P] nats.

    ``KL(softmax(beta [r_w, r_l]) || [1 - s, s])``, the reverse of cDPO's direction. Sums, beta 0.1,
    smoothing s 0.001.

    Raises:
      UserError: a smoothing that is not inside (0, 1).
    """
    _within("exo_pair", smoothing, 0.0, 1.0, open_below=True)
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    win, lose = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    kept, swapped = jnp.log1p(-smoothing), jnp.log(smoothing)
    return jnp.exp(win) * (win - kept) + jnp.exp(lose) * (lose - swapped)


def dpo_forward_kl(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """DPO regularised by the forward KL (f-DPO, 2309.16240), [P] nats.

    ``-log sigmoid(beta [exp(-r_l) - exp(-r_w)])``: f'(t) = 1 - 1 / t in place of DPO's log t (the
    reverse KL). Exponents stop at 60, where the gradient is 0. Sums, beta 0.1.
    """

    def fall(logp: Array, ref: Array) -> Array:
        return jnp.exp(jnp.minimum(ref - logp, 60.0))

    return -jax.nn.log_sigmoid(beta * (fall(rejected, ref_rejected) - fall(chosen, ref_chosen)))


def dpo_js(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: Number
) -> Array:
    """DPO regularised by the Jensen-Shannon divergence (f-DPO, 2309.16240), [P] nats.

    ``-log sigmoid(beta [log sigmoid(r_w) - log sigmoid(r_l)])``: f'(t) = log(2 t / (1 + t)). Sums,
    beta 0.1.
    """
    up, down = jax.nn.log_sigmoid(chosen - ref_chosen), jax.nn.log_sigmoid(rejected - ref_rejected)
    return -jax.nn.log_sigmoid(beta * (up - down))


def aot(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Number,
    weight: Array,
    smoothing: Number = 0.0,
) -> Array:
    """Distributional preferences by optimal transport, paired (AOT, 2406.05882), [P] nats.

    ``dpo`` of the sorted margins ``chosen - rejected`` against the sorted margins of the reference:
    the k-th smallest against the k-th smallest. A pair's loss stands where its own margin stands;
    pairs of ``weight`` 0 are sorted last and answer to each other. Sums, beta 0.1.

    The pairs of a call depend on each other, so the loss of a batch is not the sum of its parts:
    ``prefer`` sorts over all the pairs it is given at once, on all devices, which is a micro-batch
    where there are several.
    """
    return _transport(chosen - rejected, ref_chosen - ref_rejected, weight, beta, smoothing)


def aot_unpaired(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Number,
    weight: Array,
    smoothing: Number = 0.0,
) -> Array:
    """``aot`` of sorted ``r_w`` against sorted ``r_l`` (2406.05882, unpaired), [P] nats.

    Which chosen belongs to which rejected does not matter; as ``aot`` otherwise.
    """
    return _transport(chosen - ref_chosen, rejected - ref_rejected, weight, beta, smoothing)


for _loss in (aot, aot_unpaired):
    _loss.is_coupled = True  # type: ignore[attr-defined]  # prefer hands it all pairs and weights


def simpo(
    chosen: Array,
    rejected: Array,
    *,
    beta: Number,
    target_margin: Number = 0.0,
    smoothing: Number = 0.0,
) -> Array:
    """Simple preference optimization, without a reference (2405.14734, eq. 6), [P] nats.

    ``-log sigmoid(beta (chosen - rejected) - target_margin)`` of means per token; beta 2 to 2.5,
    target_margin / beta 0.3 to 0.55. ``target_margin`` is the paper's and TRL's (``simpo_gamma``)
    gamma; open-instruct's ``gamma_beta_ratio`` is target_margin / beta. ``smoothing`` as in
    ``dpo``.
    """
    return _logistic(beta * (chosen - rejected) - target_margin, smoothing)


def cpo(chosen: Array, rejected: Array, *, beta: Number, smoothing: Number = 0.0) -> Array:
    """The preference term of contrastive preference optimization (2401.08417, eq. 3), [P] nats.

    ``-log sigmoid(beta (chosen - rejected))`` of sums, beta 0.1; the method adds ``nll=1``.
    ``smoothing`` as in ``dpo``.
    """
    return _logistic(beta * (chosen - rejected), smoothing)


def orpo(chosen: Array, rejected: Array, *, beta: Number) -> Array:
    """The odds-ratio term of ORPO (2403.07691, eq. 7), [P] nats.

    ``-beta log sigmoid(log odds(chosen) - log odds(rejected))``, ``odds(A) = e^A / (1 - e^A)`` of
    means per token; beta (the paper's lambda) 0.1; the method adds ``nll=1``.
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * jax.nn.log_sigmoid(odds)


def kto(
    logps: Array,
    ref: Array,
    desirable: Array,
    z0: Array,
    *,
    beta: Number,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> Array:
    """Kahneman-Tversky optimization (2402.01306, eq. 7) of single responses, [P].

    ``desirable_weight (1 - sigmoid(beta (r - z0)))`` where ``desirable`` is 1 and
    ``undesirable_weight (1 - sigmoid(beta (z0 - r)))`` where it is 0, mixed in between;
    ``r = logps - ref``. Sums, beta 0.1; keep weight times count of the desirable within 1 to 4/3
    of the other. ``z0`` [] is ``kto_baseline``; with 0 this is TRL's ``apo_zero_unpaired``.
    """
    away = beta * (logps - ref - z0)
    wanted = desirable_weight * jax.nn.sigmoid(-away)
    unwanted = undesirable_weight * jax.nn.sigmoid(away)
    return desirable * wanted + (1 - desirable) * unwanted


def kto_baseline(logps: Array, ref: Array, weight: Array) -> Array:
    """KTO's z0 [] nats, without a gradient: the mean of ``logps - ref`` [P], at least 0.

    The log-probabilities (sums) are those of completions of other prompts, so that the mean
    estimates KL(policy || reference); ``weight`` [P] is 0 where there is none.
    """
    total = jnp.where(weight > 0, (logps - ref) * weight, 0.0).sum()
    mean = total / jnp.maximum(weight.sum(), 1e-9)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def bradley_terry(
    chosen: Array, rejected: Array, *, margin: Number = 0.0, centring: Number = 0.0
) -> Array:
    """Reward-model loss of the Bradley-Terry model, [P] nats; the arguments are rewards.

    ``-log sigmoid(R_w - R_l - margin) + centring (R_w + R_l)**2``. ``margin`` [P] is Llama 2's
    (2307.09288; small: 1, 2/3, 1/3, 0 from significantly to negligibly better); ``centring`` (0.01)
    ties the rewards' mean to 0.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


def _logistic(margin: Array, smoothing: Number) -> Array:
    kept = -(1 - smoothing) * jax.nn.log_sigmoid(margin)
    return kept - smoothing * jax.nn.log_sigmoid(-margin)


def _transport(first: Array, second: Array, weight: Array, beta: Number, smoothing: Number):
    """Logistic losses of ``first`` and ``second`` matched by rank, in the order of ``first``."""

    def order(values: Array) -> Array:
        return jnp.argsort(jnp.where(weight > 0, values, jnp.inf).reshape(-1))

    mine = order(jax.lax.stop_gradient(first))
    theirs = second.reshape(-1)[order(jax.lax.stop_gradient(second))]
    matched = theirs[jnp.argsort(mine)].reshape(first.shape)  # the partner at each place
    return _logistic(beta * (first - matched), smoothing)


def _log1mexp(logp: Array) -> Array:
    """``log(1 - exp(logp))`` of log-probabilities; stops, without a gradient, just below 0."""
    x = jnp.minimum(logp, -1e-6)
    small = x > -math.log(2)  # two forms, each exact in its half and finite in the other
    near = jnp.log(-jnp.expm1(jnp.where(small, x, -1.0)))
    return jnp.where(small, near, jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x))))


def _within(
    name: str, smoothing: Number, low: float, high: float, open_below: bool = False
) -> None:
    if not isinstance(smoothing, (int, float)):
        return  # traced: a schedule
    if smoothing >= high or smoothing < low or (open_below and smoothing == low):
        edge = "above" if open_below else "from"
        raise UserError(f"{name}: smoothing must be {edge} {low} and below {high}, not {smoothing}")


def collision(logits: Array) -> Array:
    """``log sum_v p(v)^2`` of the distributions given by logits [..., V], [...] nats: the log of
    the mean probability of a token that is sampled from them."""
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)
