"""Divergences of two next-token (or class) distributions, in nats, one number per position.

Each is ``(student_logits [..., V], teacher_logits [..., V]) -> [...]`` float32, where it needs what
is true ``(student, teacher, targets [...]) -> [...]``; for a stored teacher see ``losses.sparse``.
Below, p is the teacher's distribution and q the student's, both at ``temperature``, and
``KL(a || b) = sum a (log a - log b)``. No gradient reaches the teacher, the temperature (learned:
``objectives.temperature``) or another number; all of these may be traced. Logits that do not exist
are very low (``losses.sequence.EXCLUDED``) or -inf on both sides and count nothing.

Every divergence raises UserError for logits of two shapes and for numbers outside their range.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import EXCLUDED, pick

Array = jax.Array
Number = float | Array
Kind = Callable[..., tuple[Array, Array, Array]]

TINY = float(jnp.finfo(jnp.float32).tiny)


def forward_kl(student: Array, teacher: Array, *, temperature: Number = 1.0) -> Array:
    """``KL(p || q)``, at least 0 (Hinton et al. 2015, 1503.02531, without T^2: see ``scaled``)."""
    return _divergence(_forward, *_tempered(student, teacher, temperature), ())


def reverse_kl(student: Array, teacher: Array, *, temperature: Number = 1.0) -> Array:
    """``KL(q || p)``, at least 0: the student seeks modes (MiniLLM, 2306.08543)."""
    return _divergence(_reverse, *_tempered(student, teacher, temperature), ())


def symmetric(student: Array, teacher: Array, *, lam: Number, temperature: Number = 1.0) -> Array:
    """``(1 - lam) KL(p || q) + lam KL(q || p)``, 0 <= lam <= 1 (DistiLLM, 2402.03898, has .9)."""
    _between("symmetric", "lam", lam, ends=True)
    return _divergence(_symmetric, *_tempered(student, teacher, temperature), (lam,))


def jsd(student: Array, teacher: Array, *, beta: Number, temperature: Number = 1.0) -> Array:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD, 2306.13649, eq. 1).

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``, 0 < beta < 1; at
    most the entropy of (beta, 1 - beta), so ln 2. Divided by beta it tends to ``KL(p || q)`` as
    beta goes to 0, divided by 1 - beta to ``KL(q || p)`` as beta goes to 1: its size goes with
    beta, and at the ends themselves it is 0.
    """
    _between("jsd", "beta", beta, hint="; jsd_or_kl has the two KLs at the ends")
    return _divergence(_jensen, *_tempered(student, teacher, temperature), (beta,))


def jsd_or_kl(student: Array, teacher: Array, *, beta: Number, temperature: Number = 1.0) -> Array:
    """``jsd`` whose ends are ``KL(p || q)`` at beta 0 and ``KL(q || p)`` at beta 1 exactly.

    What GKD and TRL mean by one beta in [0, 1]. It jumps there: ``jsd`` just beside an end is
    nearly 0. A traced beta costs about twice ``jsd``.
    """
    _between("jsd_or_kl", "beta", beta, ends=True)
    if not isinstance(beta, (int, float)):
        sides = _tempered(student, teacher, temperature)
        return _divergence(_jensen_or_kl, *sides, (beta,))
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher, temperature=temperature)
    return jsd(student, teacher, beta=beta, temperature=temperature)


def skew_kl(
    student: Array, teacher: Array, *, alpha: Number = 0.1, temperature: Number = 1.0
) -> Array:
    """``KL(p || alpha p + (1 - alpha) q)``, from 0 to ``-ln alpha`` (DistiLLM, 2402.03898).

    0 < alpha < 1; tends to ``KL(p || q)`` as alpha goes to 0. With the constant ``-H(p)``, which
    DistiLLM's code leaves out.
    """
    _between("skew_kl", "alpha", alpha)
    return _divergence(_skewed, *_tempered(student, teacher, temperature), (alpha,))


def skew_reverse_kl(
    student: Array, teacher: Array, *, alpha: Number = 0.1, temperature: Number = 1.0
) -> Array:
    """``KL(q || alpha q + (1 - alpha) p)``, from 0 to ``-ln alpha`` (DistiLLM, 2402.03898)."""
    _between("skew_reverse_kl", "alpha", alpha)
    return _divergence(_skewed_reverse, *_tempered(student, teacher, temperature), (alpha,))


def total_variation(student: Array, teacher: Array, *, temperature: Number = 1.0) -> Array:
    """``sum |p - q| / 2`` in [0, 1], the subgradient 0 where p = q; T^2 does not belong to it."""
    return _divergence(_variation, *_tempered(student, teacher, temperature), ())


def adaptive_kl(
    student: Array, teacher: Array, *, head: Number = 0.5, temperature: Number = 1.0
) -> Array:
    """``(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t)`` (Wu et al. 2024, 2404.02657).

    g_h is ``sum |p - q|`` over the teacher's head, its fewest likeliest tokens with at least the
    mass ``head`` (the last and those within 1e-4 of it go together), g_t over the others. They
    carry no gradient.
    """
    _between("adaptive_kl", "head", head)
    student, teacher = _tempered(student, teacher, temperature)
    p, q = (jax.nn.softmax(jax.lax.stop_gradient(x)) for x in (teacher, student))
    gap = jnp.abs(p - q)
    whole = gap.sum(-1)
    outside = jnp.where(_head(p, head), 0.0, gap).sum(-1)
    share = jnp.where(whole > 0, outside / jnp.where(whole > 0, whole, 1.0), 0.5)
    return _divergence(_symmetric, student, teacher, (share,))


def taid(student: Array, teacher: Array, *, t: Number, temperature: Number = 1.0) -> Array:
    """``KL(p_t || q)``, p_t between student and teacher (TAID, Shing et al. 2025, 2501.16937).

    p_t has the logits ``(1 - t) student + t teacher`` and no gradient, 0 <= t <= 1: nothing to
    learn at t = 0, ``forward_kl`` at 1. For the schedule of t see ``objectives.taid``.
    """
    return _divergence(_forward, *_towards("taid", student, teacher, t, temperature), ())


def taid_cross_entropy(
    student: Array, teacher: Array, *, t: Number, temperature: Number = 1.0
) -> Array:
    """``-sum p_t log q`` = ``taid`` + H(p_t): its gradient, and the value of TAID's released code
    (by which its schedule moves)."""
    sides = _towards("taid_cross_entropy", student, teacher, t, temperature)
    return _divergence(_cross_entropy, *sides, ())


def logit_mse(student: Array, teacher: Array) -> Array:
    """Mean over V of the squared difference of logits, each side's mean taken off, nats squared.

    Twice the limit of ``T^2 KL(p || q)`` as T goes to infinity (Hinton et al. 2015, section 2.1).
    """
    # by autodiff: there is no softmax whose passes the engine below could save
    _same(student, teacher)
    real = (student > EXCLUDED / 2) & (teacher > EXCLUDED / 2)
    count = real.sum(-1, keepdims=True)
    gap = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    gap = jnp.where(real, gap, 0.0)
    gap = jnp.where(real, gap - gap.sum(-1, keepdims=True) / count, 0.0)
    return (gap**2).sum(-1) / count[..., 0]


def scaled(
    student: Array,
    teacher: Any,
    *,
    temperature: Number,
    divergence: Callable[..., Array] = forward_kl,
    **options: Any,
) -> Array:
    """``T^2 divergence(student, teacher, temperature=T, **options)``.

    The factor of Hinton et al. 2015: a KL's gradient by the logits is T (q - p) instead of
    (q - p) / T, so that it keeps its size beside a loss at temperature 1. Not for
    ``total_variation``, which is bounded at every temperature.
    """
    return _squared(temperature) * divergence(student, teacher, temperature=temperature, **options)


def hinton(
    student: Array,
    teacher: Any,
    targets: Array,
    *,
    alpha: Number,
    temperature: Number,
    divergence: Callable[..., Array] = forward_kl,
    **options: Any,
) -> Array:
    """``alpha CE(targets, q at T = 1) + (1 - alpha) T^2 KL(p || q)`` (Hinton et al. 2015).

    ``targets`` [...] int are what is true. ``divergence`` (with its ``options``) may be another
    than ``forward_kl``, for instance ``sparse.top_k`` of a stored teacher.
    """
    _between("hinton", "alpha", alpha, ends=True)
    soft = scaled(student, teacher, temperature=temperature, divergence=divergence, **options)
    return (1 - alpha) * soft - alpha * pick(student.astype(jnp.float32), targets)


def dkd(
    student: Array,
    teacher: Array,
    targets: Array,
    *,
    alpha: Number = 1.0,
    beta: Number,
    temperature: Number = 1.0,
) -> Array:
    """Decoupled distillation ``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al. 2022, 2203.08679).

    TCKD is the KL of (p_y, 1 - p_y) from (q_y, 1 - q_y) for the target y, ``targets`` [...] int;
    NCKD that of the two distributions among all others (0 of two classes). ``KL(p || q) = TCKD +
    (1 - p_y) NCKD``, so beta weighs alike what a sure teacher says of the others and what an
    unsure one does. CIFAR: alpha 1, beta 2 to 8, T 4.
    """
    sides = _tempered(student, teacher, temperature)
    value: Any = _divergence(_decoupled, *sides, (targets, alpha, beta))
    return _squared(temperature) * value


def _squared(temperature: Number) -> Number:
    known = isinstance(temperature, (int, float))
    return (temperature if known else jax.lax.stop_gradient(temperature)) ** 2


def _tempered(student: Array, teacher: Array, temperature: Number) -> tuple[Array, Array]:
    """Float32 logits of both sides at a temperature."""
    _same(student, teacher)
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise UserError(f"a divergence's temperature must be above 0, not {temperature}")
    if not isinstance(temperature, (int, float)):
        temperature = jax.lax.stop_gradient(temperature)
    student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
    return student / temperature, jax.lax.stop_gradient(teacher) / temperature


def _towards(
    name: str, student: Array, teacher: Array, t: Number, temperature: Number
) -> tuple[Array, Array]:
    """The student's logits and those the share t of the way to the teacher."""
    _between(name, "t", t, ends=True)
    student, teacher = _tempered(student, teacher, temperature)
    # finite, as 0 times -inf is not a number
    here, there = (jnp.maximum(jax.lax.stop_gradient(x), EXCLUDED) for x in (student, teacher))
    return student, (1 - t) * here + t * there


def _same(student: Array, teacher: Any) -> None:
    if getattr(teacher, "shape", None) != student.shape:
        theirs = getattr(teacher, "shape", type(teacher).__name__)
        raise UserError(
            f"a divergence needs a teacher's logits like the student's {student.shape}, got "
            f"{theirs} (a stored teacher: losses.sparse.top_k)"
        )


def _between(name: str, what: str, value: Number, ends: bool = False, hint: str = "") -> None:
    if not isinstance(value, (int, float)):
        return  # traced: a schedule or one run's number
    if not 0 <= value <= 1 or (not ends and value in (0, 1)):
        words = "from 0 to 1" if ends else "above 0 and below 1"
        raise UserError(f"{name}: {what} must be {words}, not {value}{hint}")


def _head(p: Array, mass: Number) -> Array:
    """The fewest likeliest entries [..., V] that hold ``mass`` of the probabilities p [..., V]."""
    # bisection, as sorting a vocabulary is much slower: the last entry of the head is at least
    # (1 - mass) / (V + 1), so 17 halvings of the logarithm leave 1e-4 of it for V = 150,000

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        enough = jnp.where(p >= middle[..., None], p, 0.0).sum(-1) >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(p.shape[:-1], jnp.float32) + (1 - mass) / (2 * p.shape[-1])
    low, _ = jax.lax.fori_loop(0, 17, halve, (low, jnp.ones_like(low)))
    return p >= low[..., None]


# A divergence of log-probabilities: (student q, teacher p) -> its value, the product w of the
# student's probabilities with the derivative by them (up to a constant), and the sum of w. The
# gradient by the student's logits is then w - sum(w) * exp(q).


def _forward(q: Array, p: Array) -> tuple[Array, Array, Array]:
    value = (jnp.exp(p) * (p - q)).sum(-1)
    return value, -jnp.exp(p), -jnp.ones_like(value)


def _cross_entropy(q: Array, p: Array) -> tuple[Array, Array, Array]:
    value = -(jnp.exp(p) * q).sum(-1)
    return value, -jnp.exp(p), -jnp.ones_like(value)


def _reverse(q: Array, p: Array) -> tuple[Array, Array, Array]:
    pull = jnp.exp(q) * (q - p)
    value = pull.sum(-1)
    return value, pull, value


def _symmetric(q: Array, p: Array, lam: Any) -> tuple[Array, Array, Array]:
    forward, reverse = _forward(q, p), _reverse(q, p)
    wide = jnp.broadcast_to(lam, forward[0].shape)[..., None]
    value = (1 - lam) * forward[0] + lam * reverse[0]
    pull = (1 - wide) * forward[1] + wide * reverse[1]
    return value, pull, (1 - lam) * forward[2] + lam * reverse[2]


def _mixed(q: Array, p: Array, share: Any) -> Array:
    """The probabilities ``share p + (1 - share) q``, above 0."""
    return jnp.maximum(share * jnp.exp(p) + (1 - share) * jnp.exp(q), TINY)


def _jensen(q: Array, p: Array, beta: Any) -> tuple[Array, Array, Array]:
    mixed = jnp.log(_mixed(q, p, beta))
    pull = (1 - beta) * jnp.exp(q) * (q - mixed)
    own = pull.sum(-1)
    return beta * (jnp.exp(p) * (p - mixed)).sum(-1) + own, pull, own


def _jensen_or_kl(q: Array, p: Array, beta: Any) -> tuple[Array, Array, Array]:
    parts = zip(_forward(q, p), _jensen(q, p, beta), _reverse(q, p), strict=True)
    value, pull, total = (
        jnp.where(beta == 0, first, jnp.where(beta == 1, last, between))
        for first, between, last in parts
    )
    return value, pull, total


def _skewed(q: Array, p: Array, alpha: Any) -> tuple[Array, Array, Array]:
    mixed = _mixed(q, p, alpha)
    pull = (alpha - 1) * jnp.exp(p) * (jnp.exp(q) / mixed)
    return (jnp.exp(p) * (p - jnp.log(mixed))).sum(-1), pull, pull.sum(-1)


def _skewed_reverse(q: Array, p: Array, alpha: Any) -> tuple[Array, Array, Array]:
    mixed = _mixed(q, p, 1 - alpha)
    gap = q - jnp.log(mixed)
    pull = jnp.exp(q) * (gap - alpha * jnp.exp(q) / mixed)
    return (jnp.exp(q) * gap).sum(-1), pull, pull.sum(-1)


def _variation(q: Array, p: Array) -> tuple[Array, Array, Array]:
    gap = jnp.exp(q) - jnp.exp(p)
    pull = 0.5 * jnp.exp(q) * jnp.sign(gap)
    return 0.5 * jnp.abs(gap).sum(-1), pull, pull.sum(-1)


def _decoupled(
    q: Array, p: Array, targets: Array, alpha: Any, beta: Any
) -> tuple[Array, Array, Array]:
    ids = jax.lax.broadcasted_iota(targets.dtype, q.shape, q.ndim - 1)
    hit = ids == targets[..., None]
    mine, theirs = (jnp.where(hit, x, 0.0).sum(-1) for x in (q, p))
    others = [jnp.where(hit, EXCLUDED, x) for x in (q, p)]
    left, right = (jax.nn.logsumexp(x, axis=-1) for x in others)  # log of what is not the target
    q, p = others[0] - left[..., None], others[1] - right[..., None]
    target = jnp.exp(theirs) * (theirs - mine) + jnp.exp(right) * (right - left)
    among = (jnp.exp(p) * (p - q)).sum(-1)
    sure = jnp.where(hit, jnp.exp(theirs)[..., None], jnp.exp(q) * jnp.exp(right)[..., None])
    pull = beta * (jnp.exp(q) - jnp.exp(p)) - alpha * sure
    return alpha * target + beta * among, pull, -alpha * jnp.ones_like(among)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(kind: Kind, student: Array, teacher: Array, numbers: tuple[Any, ...]) -> Array:
    """The value of ``kind`` at two sets of logits [..., V] -> [...]; no gradient for the teacher.

    What a backward pass by hand saves is passes over [..., V], which cost as much as a product.
    """
    return _value(kind, student, teacher, numbers)[0]


def _value(
    kind: Kind, student: Array, teacher: Array, numbers: tuple[Any, ...]
) -> tuple[Array, Any]:
    totals = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (student, teacher)]
    sides = _logps(student, totals[0]), _logps(teacher, totals[1])
    return kind(*sides, *numbers)[0], (student, teacher, *totals, numbers)


def _logps(logits: Array, total: Array) -> Array:
    return jnp.maximum(logits - total, EXCLUDED)  # finite: the probability of -inf is 0


def _gradient(kind: Kind, saved: Any, grad: Array) -> tuple[Array, None, None]:
    student, teacher, mine, theirs, numbers = saved
    q = _logps(student, mine)
    _, pull, total = kind(q, _logps(teacher, theirs), *numbers)
    return grad[..., None] * (pull - total[..., None] * jnp.exp(q)), None, None


_divergence.defvjp(_value, _gradient)
