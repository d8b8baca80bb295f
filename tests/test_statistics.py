import json
import math

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.metrics.gap import pgr
from w2s_jax.metrics.statistics import (
    Interval,
    bootstrap_interval,
    claim,
    holm,
    interval,
    mcnemar,
    median_interval,
    paired_bootstrap,
    proportion_gap,
    sign_flip,
    wilson,
)


def outcomes(shape, seed=0, rates=(0.6, 0.7, 0.8)):
    """Right (1) or wrong (0), the three models agreeing on which items are hard."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=shape[-1])
    noise = rng.uniform(size=(3, *shape))
    mixed = 0.8 * hard + 0.2 * noise
    cut = [
        np.quantile(0.8 * rng.uniform(size=9999) + 0.2 * rng.uniform(size=9999), r) for r in rates
    ]
    return [(m < c).astype(float) for m, c in zip(mixed, cut, strict=True)]


def test_t_interval_by_hand():
    # Mean 2, sd 1, n 3: 2 +- t(.975, 2) / sqrt 3 with t = 4.302653.
    got = interval([1.0, 2.0, 3.0])
    assert (got.value, got.level, got.n) == (2, 0.95, 3)
    assert got.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert got.low == pytest.approx(4 - got.high)
    assert interval([1.0, 2.0, 3.0], 0.5).high < got.high


@pytest.mark.parametrize("function", [interval, bootstrap_interval, median_interval])
def test_one_value_has_no_interval_and_bad_values_are_refused(function):
    got = function([0.5])
    assert got.value == 0.5 and math.isnan(got.low) and math.isnan(got.high) and got.n == 1
    same = function([0.5, 0.5, 0.5])
    assert (same.low, same.high) == (0.5, 0.5)
    for bad in ([], [1.0, np.nan], [[1.0], [2.0]]):
        with pytest.raises(UserError):
            function(bad)
    with pytest.raises(UserError, match="level"):
        function([1.0, 2.0], 95)


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    got = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert got.value == pytest.approx(values.mean())
    assert got.high - got.low == pytest.approx(2 * half, rel=0.05)
    assert got == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    median = bootstrap_interval(values, statistic=np.median)
    assert median.value == np.median(values) and median.low < median.value < median.high


def test_median_interval_uses_the_order_statistics_of_the_binomial():
    # n = 5: the range covers 1 - 2/32. n = 6: 1 - 2/64. n = 9: 2nd and 8th, 1 - 2 * 10/512.
    for n, low, high, level in [(5, 1, 5, 0.9375), (6, 1, 6, 0.96875), (9, 2, 8, 1 - 20 / 512)]:
        got = median_interval(np.arange(n, 0, -1.0))
        assert (got.value, got.low, got.high, got.n) == ((n + 1) / 2, low, high, n)
        assert got.level == pytest.approx(level)


def test_median_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_cauchy((4000, 9))
    found = [median_interval(x) for x in draws]
    share = np.mean([i.low < 0 < i.high for i in found])
    assert share == pytest.approx(found[0].level, abs=0.012)


def test_wilson_by_hand():
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) for 8 of 10.
    z, n, p = 1.959964, 10, 0.8
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    got = wilson(8, 10)
    assert got.low == pytest.approx((middle - half) / (1 + z * z / n), rel=1e-5)
    assert got.high == pytest.approx((middle + half) / (1 + z * z / n), rel=1e-5)
    assert wilson(0, 10).low == 0
    with pytest.raises(UserError, match="wilson"):
        wilson(11, 10)


def test_paired_bootstrap_centres_on_the_pgr_of_the_means():
    weak, student, ceiling = outcomes((4, 500))
    got = paired_bootstrap(weak, student, ceiling, draws=2000)
    assert got.pgr.value == pytest.approx(pgr(weak.mean(), student.mean(), ceiling.mean()))
    assert got.gap.value == pytest.approx(student.mean() - weak.mean())
    assert got.pgr.low < got.pgr.value < got.pgr.high and got.pgr.n == 4
    assert got.dropped == 0 and got.advice == ""
    assert got == paired_bootstrap(weak, student, ceiling, draws=2000)


def test_pairing_makes_the_gap_tighter_than_independent_resampling():
    weak, student, ceiling = (x[0] for x in outcomes((1, 800)))
    got = paired_bootstrap(weak, student, ceiling, draws=4000)
    independent = 1.96 * math.sqrt((weak.var() + student.var()) / 800)
    paired = 1.96 * (student - weak).std(ddof=1) / math.sqrt(800)
    assert (got.gap.high - got.gap.low) / 2 == pytest.approx(paired, rel=0.06)
    assert paired < 0.7 * independent
    assert got.pgr.n == 800


def test_seeds_that_differ_widen_the_interval():
    weak, student, ceiling = outcomes((6, 400))
    shifted = student.copy()
    shifted[:3], shifted[3:] = weak[:3], ceiling[3:]  # half of the seeds fail, half succeed
    calm = paired_bootstrap(weak, student, ceiling, draws=2000).pgr
    wild = paired_bootstrap(weak, shifted, ceiling, draws=2000).pgr
    assert wild.high - wild.low > 2 * (calm.high - calm.low)


def test_without_a_clear_gap_draws_are_dropped_and_the_gap_is_advised():
    weak, student, ceiling = outcomes((1, 60), rates=(0.7, 0.7, 0.72), seed=3)
    got = paired_bootstrap(weak, student, ceiling, draws=1000)
    assert got.dropped > 0.05 and "report the gap" in got.advice
    nothing = paired_bootstrap(ceiling, student, ceiling, draws=100)
    assert nothing.dropped == 1 and math.isnan(nothing.pgr.value) and nothing.advice


def test_paired_bootstrap_takes_real_scores_and_refuses_different_shapes():
    rng = np.random.default_rng(0)
    weak = rng.normal(size=(2, 50))
    got = paired_bootstrap(weak, weak + 1, weak + 2, draws=200)
    np.testing.assert_allclose([got.pgr.low, got.pgr.high, got.gap.low], [0.5, 0.5, 1], rtol=1e-9)
    with pytest.raises(UserError, match="shape"):
        paired_bootstrap(weak, weak[:1], weak)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "cell", "least"), [(1, 0.0, 0.92), (20, 0.1, 0.91), (20, 3.0, 0.95)]
)
def test_bootstrap_intervals_cover_about_as_often_as_they_say(seeds, cell, least):
    """Items and seeds sampled anew each time; only noise of single cells makes it conservative."""
    rng, hits, runs, items = np.random.default_rng(seeds), np.zeros(2), 200, 200
    for run in range(runs):
        item = rng.normal(size=(3, 1, items))  # each model has its own hard items
        seed = rng.normal(size=(3, seeds, 1)) * (0.2 if seeds > 1 else 0.0)
        noise = cell * rng.normal(size=(3, seeds, items))
        scores = np.array([0.0, 1.0, 2.0])[:, None, None] + item + seed + noise
        got = paired_bootstrap(*scores, draws=400, seed=run)
        hits += [got.pgr.low <= 0.5 <= got.pgr.high, got.gap.low <= 1 <= got.gap.high]
    cover = hits / runs
    assert np.all(cover > least) and (cell > 1 or np.all(cover < 0.98)), cover


def test_mcnemar_by_hand():
    # b = 1, c = 5: 2 (C(6,0) + C(6,1)) / 64 = 14/64.
    first = np.array([1, 0, 0, 0, 0, 0, 1, 0], bool)
    second = np.array([0, 1, 1, 1, 1, 1, 1, 0], bool)
    assert mcnemar(first, second) == (1, 5, pytest.approx(14 / 64))
    assert mcnemar(second, first) == (5, 1, pytest.approx(14 / 64))
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert mcnemar([1, 0], [0, 1]).p == 1


def test_sign_flip_is_exact_for_few_and_sampled_for_many():
    # All of 5 positive: only the identity and the full flip are as extreme, 2/32.
    assert sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)
    assert sign_flip([1.0, -1.0]) == 1
    rng = np.random.default_rng(0)
    assert sign_flip(rng.normal(0.5, 1, 100)) < 0.01 < 0.05 < sign_flip(rng.normal(0, 1, 100))
    with pytest.raises(UserError, match="two"):
        sign_flip([1.0])


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    with pytest.raises(UserError, match="holm"):
        holm([0.5, 1.5])


def test_a_claim_holds_only_when_the_whole_interval_clears_the_bound():
    clear, touching = Interval(0.5, 0.1, 0.9, 0.95, 5), Interval(0.5, -0.1, 1.1, 0.95, 5)
    got = claim("the student recovers something", "median PGR", clear, above=0)
    assert got == {
        "name": "the student recovers something",
        "holds": True,
        "statistic": "median PGR",
        "value": 0.5,
        "interval": [0.1, 0.9],
        "level": 0.95,
        "seeds": 5,
    }
    assert not claim("x", "y", touching, above=0)["holds"]
    assert (
        claim("x", "y", clear, below=1)["holds"] and not claim("x", "y", clear, below=0.9)["holds"]
    )
    assert claim("x", "y", clear, above=0, below=1)["holds"]
    assert claim("x", "y", clear, above=0, seeds=3)["seeds"] == 3
    with pytest.raises(UserError, match="bound"):
        claim("x", "y", clear)


def test_a_claim_from_one_seed_does_not_hold_and_is_valid_json():
    got = claim("x", "y", interval([0.5]), above=0)
    assert got["holds"] is False
    assert json.loads(json.dumps(got, allow_nan=False))["interval"] == [None, None]


def test_an_interval_prints_short():
    assert str(Interval(0.51234, 0.1, 0.9, 0.95, 5)) == "0.512 [0.1, 0.9]"
    assert str(interval([0.5])) == "0.5 (n=1)"


def test_proportion_gap_against_newcombe_1998() -> None:
    # Newcombe (1998), table II, contrast (a), method 10: 56/70 - 48/80 is in [.0524, .3339]
    found = proportion_gap((48, 80), (56, 70))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
