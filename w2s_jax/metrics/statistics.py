"""Intervals, paired tests and claims. Everything random takes a seed and is reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from w2s_jax.errors import UserError
from w2s_jax.metrics.gap import pgr


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    ``level`` is the coverage the interval is built for (of an exact interval: the coverage it
    has); ``n`` the independent units behind it (seeds, or test items). ``low`` and ``high`` are
    NaN when one unit tells nothing about the spread.
    """

    value: float
    low: float
    high: float
    level: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3g} (n={self.n})"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Discordance(NamedTuple):
    """McNemar's counts (right in the first only, in the second only) and two-sided p-value."""

    first: int
    second: int
    p: float


@dataclass(frozen=True)
class GapBootstrap:
    """What ``paired_bootstrap`` finds: PGR and gap with intervals, and which one to report.

    ``dropped`` is the share of draws without a gap; ``advice`` is empty, or says why the gap
    ``student - weak`` is to be reported instead of PGR.
    """

    pgr: Interval
    gap: Interval
    dropped: float
    advice: str


def interval(values: Any, level: float = 0.95) -> Interval:
    """The mean with Student's t interval: values [n], one per independent unit (seed).

    For paired differences of items, pass the differences. One value gives NaN bounds.

    Raises:
      UserError: no value, a value that is not finite, or a level outside (0, 1).
    """
    values = _values(values, level)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, level, 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(mean, mean - float(half), mean + float(half), level, n)


def bootstrap_interval(
    values: Any,
    level: float = 0.95,
    *,
    statistic: Callable[..., Any] = np.mean,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Any statistic of values [n] with a percentile bootstrap interval.

    ``statistic(values, axis=...)`` as ``np.mean`` or ``np.median``. Below about 20 values it is
    too narrow: prefer ``interval`` for means and ``median_interval`` for medians of few seeds.

    Raises:
      UserError: no value, a value that is not finite, or a level outside (0, 1).
    """
    values = _values(values, level)
    point, n = float(statistic(values, axis=0)), len(values)
    if n == 1:
        return Interval(point, math.nan, math.nan, level, 1)
    found = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=draws,
        batch=max(1, 2**22 // n),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(point, float(found.low), float(found.high), level, n)


def median_interval(values: Any, level: float = 0.95) -> Interval:
    """The median with the exact order-statistic interval: values [n], distribution-free.

    The narrowest pair of order statistics ``x_(k), x_(n+1-k)`` whose binomial coverage is at
    least ``level``. With fewer than 6 values (for .95) no pair reaches it: the result is the
    range, and its ``level`` is what the range covers, ``1 - 2^(1-n)`` (.9375 for n = 5).

    Raises:
      UserError: no value, a value that is not finite, or a level outside (0, 1).
    """
    values = np.sort(_values(values, level))
    middle, n = float(np.median(values)), len(values)
    if n == 1:
        return Interval(middle, math.nan, math.nan, level, 1)
    # P(x_(k) < median < x_(n+1-k)) = 1 - 2 P(Binomial(n, 1/2) <= k - 1).
    ranks = np.arange(1, n // 2 + 1)
    coverage = 1 - 2 * stats.binom.cdf(ranks - 1, n, 0.5)
    enough = np.flatnonzero(coverage >= level)
    best = enough[-1] if len(enough) else 0
    low, high = values[ranks[best] - 1], values[n - ranks[best]]
    return Interval(middle, float(low), float(high), float(coverage[best]), n)


def wilson(correct: int, total: int, level: float = 0.95) -> Interval:
    """A proportion (an accuracy over items) with Wilson's score interval.

    Raises:
      UserError: not 0 <= correct <= total with total > 0, or a level outside (0, 1).
    """
    if not 0 <= correct <= total or total < 1 or not 0 < level < 1:
        raise UserError(f"wilson: {correct} of {total} at level {level} is not a proportion")
    found = stats.binomtest(int(correct), int(total)).proportion_ci(level, method="wilson")
    return Interval(correct / total, float(found.low), float(found.high), level, int(total))


def proportion_gap(low: tuple[int, int], high: tuple[int, int], level: float = 0.95) -> Interval:
    """The difference of two independent proportions, each (correct, total): ``high - low``.

    Newcombe's hybrid score interval (1998, method 10), from the two Wilson intervals. On the same
    items, where outcomes correlate, it is conservative.

    Raises:
      UserError: as ``wilson``.
    """
    a, b = wilson(*low, level), wilson(*high, level)
    gap = b.value - a.value
    down = math.hypot(b.value - b.low, a.high - a.value)
    up = math.hypot(b.high - b.value, a.value - a.low)
    return Interval(gap, gap - down, gap + up, level, low[1] + high[1])


def paired_bootstrap(
    weak: Any,
    student: Any,
    ceiling: Any,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    least: float = 0.0,
) -> GapBootstrap:
    """PGR and the gap ``student - weak`` with percentile intervals over test items and seeds.

    Two-level and paired: a draw resamples the items, the same for the three models and for every
    seed (they share the test set), and the seeds when there are several; scores are averaged over
    both, then PGR is taken. Draws with ``ceiling - weak <= least`` have no PGR: they are dropped
    and their share reported; above 5 % the gap is the number to report. With fewer than about
    10 seeds the between-seed part is understated: show ``median_interval`` over seeds beside it.
    Noise of single (seed, item) cells counts up to three times (Owen 2007, the pigeonhole
    bootstrap): conservative where seeds agree little on which items are hard.

    Args:
      weak: [S, N] or [N] scores of the supervisor on each item (1 right, 0 wrong, or real).
      student: likewise, the same seeds and items in the same order.
      ceiling: likewise.
      level: coverage of the intervals.
      draws: bootstrap draws.
      seed: of the resampling.
      least: the smallest gap for which PGR is defined.

    Raises:
      UserError: shapes that differ, scores that are not finite, or a level outside (0, 1).
    """
    scores = np.stack([np.atleast_2d(_finite(x)) for x in _same_shape(weak, student, ceiling)])
    _check_level(level)
    drawn = _resampled_means(scores, draws, np.random.default_rng(seed))
    _, seeds, items = scores.shape
    point = scores.mean((1, 2))
    n = seeds if seeds > 1 else items
    gap = _percentiles(point[1] - point[0], drawn[1] - drawn[0], level, n)
    kept = drawn[2] - drawn[0] > least
    ratios = pgr(*drawn[:, kept])
    recovered = _percentiles(pgr(*point), ratios, level, n)
    dropped = float(1 - kept.mean())
    advice = ""
    if dropped > 0.05 or math.isnan(recovered.value):
        advice = f"ceiling - weak <= {least:g} in {dropped:.1%} of the draws: report the gap"
    return GapBootstrap(recovered, gap, dropped, advice)


def mcnemar(first: Any, second: Any) -> Discordance:
    """Exact McNemar test of two classifiers on the same items: first, second [N] bool (right).

    Two-sided ``p = 2 min(P(Bin(b+c, 1/2) <= min(b, c)), 1/2)`` over the discordant counts b, c;
    1 when there are none.

    Raises:
      UserError: shapes that differ.
    """
    first, second = (np.asarray(x, bool) for x in _same_shape(first, second))
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    p = float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    return Discordance(b, c, p)


def sign_flip(differences: Any, *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip permutation test that paired differences [n] centre on 0.

    Exact when ``2^n <= draws``.

    Raises:
      UserError: fewer than two differences, or one that is not finite.
    """
    differences = _values(differences, 0.95)
    if len(differences) < 2:
        raise UserError("sign_flip needs at least two paired differences")
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, 2**22 // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(pvalues: Any) -> np.ndarray:
    """Holm's step-down adjusted p-values, [m] in the order given (Holm 1979).

    Raises:
      UserError: a p-value outside [0, 1].
    """
    pvalues = np.asarray(pvalues, np.float64)
    if pvalues.ndim != 1 or not ((pvalues >= 0) & (pvalues <= 1)).all():
        raise UserError("holm needs [m] p-values in [0, 1]")
    order = np.argsort(pvalues, kind="stable")
    scaled = pvalues[order] * np.arange(len(pvalues), 0, -1)
    adjusted = np.empty_like(pvalues)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def claim(
    name: str,
    statistic: str,
    estimate: Interval,
    *,
    above: float | None = None,
    below: float | None = None,
    seeds: int | None = None,
) -> dict[str, Any]:
    """One entry of ``summary.json``: the claim holds when the whole interval clears the bound.

    Args:
      name: the claim in words ("the student beats its supervisor").
      statistic: what ``estimate`` is of ("median PGR, exact interval over seeds").
      estimate: value and interval; NaN bounds (one seed) never hold.
      above: the interval must lie above this.
      below: the interval must lie below this (both: between them).
      seeds: runs behind it; ``estimate.n`` if None.

    Returns:
      name, holds, statistic, value, interval, level, seeds; what is not finite is None.

    Raises:
      UserError: neither bound is given.
    """
    if above is None and below is None:
        raise UserError(f"claim {name!r} needs a bound: above=..., below=..., or both")
    holds = (above is None or estimate.low > above) and (below is None or estimate.high < below)
    return {
        "name": name,
        "holds": bool(holds),
        "statistic": statistic,
        "value": _json(estimate.value),
        "interval": [_json(estimate.low), _json(estimate.high)],
        "level": estimate.level,
        "seeds": int(estimate.n if seeds is None else seeds),
    }


def _resampled_means(scores: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means over resampled seeds and items: scores [3, S, N] -> [3, draws]."""
    models, seeds, items = scores.shape
    # Items with the same outcomes are interchangeable: draw how often each kind comes up.
    kinds, counts = np.unique(scores.reshape(models * seeds, items).T, axis=0, return_counts=True)
    means = np.empty((models, draws))
    size = max(1, 2**22 // len(counts))
    for start in range(0, draws, size):
        now = min(size, draws - start)
        item_share = rng.multinomial(items, counts / items, now) / items
        seed_share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), now) / seeds
        by_seed = (item_share @ kinds).reshape(now, models, seeds)
        means[:, start : start + now] = np.einsum("dms,ds->md", by_seed, seed_share)
    return means


def _percentiles(value: float, drawn: np.ndarray, level: float, n: int) -> Interval:
    if not len(drawn):
        return Interval(float(value), math.nan, math.nan, level, n)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), level, n)


def _values(values: Any, level: float) -> np.ndarray:
    _check_level(level)
    values = _finite(values)
    if values.ndim != 1 or not len(values):
        raise UserError(f"an interval needs values [n] with n > 0, got shape {values.shape}")
    return values


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"a confidence level lies between 0 and 1, got {level}")


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise UserError("a value is NaN or infinite: drop such runs, count them, and say so")
    return values


def _same_shape(*arrays: Any) -> list[np.ndarray]:
    arrays_ = [np.asarray(a) for a in arrays]
    if len({a.shape for a in arrays_}) != 1 or not arrays_[0].size:
        raise UserError(f"paired scores must have one shape, got {[a.shape for a in arrays_]}")
    return arrays_


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
