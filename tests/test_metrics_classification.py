import math

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.metrics.classification import (
    accuracy,
    auroc,
    brier,
    brier_binary,
    ece,
    ece_adaptive,
    ece_classwise,
    nll,
    reliability,
    temperature,
)

CALIBRATION = [nll, brier, brier_binary, ece, ece_adaptive, ece_classwise, reliability]


def two(p1):
    p1 = np.asarray(p1, np.float64)
    return np.stack([1 - p1, p1], 1)


def random_example(n=400, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = (rng.uniform(size=n)[:, None] > probs.cumsum(-1)).sum(-1)
    return logits, probs, truth


def test_accuracy_by_hand():
    truth = np.array([1, 0, 1, 1])
    assert accuracy(two([0.9, 0.2, 0.4, 0.8]), truth) == 0.75
    assert accuracy([1, 0, 0, 1], truth) == 0.75
    with pytest.raises(UserError, match="accuracy"):
        accuracy(two([]), np.zeros(0, int))


def test_auroc_counts_pairs_with_ties_as_half():
    # Positives .8 .5, negatives .5 .2: pairs won 1, 1, tied 1/2, won 1 -> 3.5 of 4.
    assert auroc([0.8, 0.5, 0.5, 0.2], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    assert auroc([0.1, 0.9], [1, 0]) == 0 and auroc([0.3, 0.3], [0, 1]) == 0.5
    assert math.isnan(auroc([0.1, 0.2], [1, 1]))
    with pytest.raises(UserError, match="auroc"):
        auroc([0.1, 0.2], [1, 2])


def test_auroc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    truth, scores = rng.integers(0, 2, 300), rng.integers(0, 12, 300) / 12
    assert auroc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    logits = np.stack([np.zeros(300), scores], 1)
    assert auroc(logits, truth) == pytest.approx(auroc(scores, truth), abs=1e-12)


def test_brier_by_hand():
    probs, truth = two([0.9, 0.2]), np.array([1, 1])
    assert brier_binary(probs, truth) == pytest.approx((0.01 + 0.64) / 2)
    assert brier(probs, truth) == pytest.approx(2 * brier_binary(probs, truth))
    assert brier([[0.0, 0.0, 1.0]], [0]) == 2  # surely wrong
    assert brier(np.full((4, 3), 1 / 3), [0, 1, 2, 0]) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="brier_binary"):
        brier_binary(np.full((2, 3), 1 / 3), [0, 1])


def test_nll_by_hand():
    assert nll(two([0.75, 0.5]), [1, 0]) == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2)
    assert nll(two([1.0]), [0]) == np.inf


def test_ece_by_hand():
    # Confidences .9 .9 .6 .6, right 1 0 1 1: bins |.5-.9| and |1-.6|, each of half the mass.
    probs, truth = two([0.9, 0.9, 0.6, 0.6]), np.array([1, 0, 1, 1])
    assert ece(probs, truth) == pytest.approx(0.4)
    assert ece(probs, truth, bins=1) == pytest.approx(abs(0.75 - 0.75))
    assert ece_adaptive(probs, truth, bins=2) == pytest.approx(0.4)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    rows = reliability(two([0.75, 0.76, 1.0]), [1, 1, 1], bins=4)
    assert [(r["low"], r["high"], r["count"]) for r in rows] == [(0.5, 0.75, 1), (0.75, 1.0, 2)]


def test_the_reliability_table_sums_to_the_ece():
    _, probs, truth = random_example()
    rows = reliability(probs, truth)
    assert sum(r["count"] for r in rows) == 400
    total = sum(r["count"] / 400 * abs(r["accuracy"] - r["confidence"]) for r in rows)
    assert ece(probs, truth) == pytest.approx(total)


def test_classwise_ece_by_hand():
    # Column 1: .9 (y=1) and .1 (y=0); column 0 mirrors it: every bin is off by .1.
    assert ece_classwise(two([0.9, 0.1]), [1, 0]) == pytest.approx(0.1)
    assert ece_classwise(two([0.9, 0.1]), [0, 1]) == pytest.approx(0.9)


def test_adaptive_bins_hold_equal_mass_and_do_not_depend_on_the_order():
    _, probs, truth = random_example(300)
    probs = probs.round(1) / probs.round(1).sum(-1, keepdims=True)  # many ties
    order = np.random.default_rng(0).permutation(300)
    assert ece_adaptive(probs, truth) == pytest.approx(ece_adaptive(probs[order], truth[order]))


def test_calibrated_forecasts_have_little_error_and_sharpened_ones_more():
    logits, probs, truth = random_example(20_000)
    sharp = np.exp(3 * logits) / np.exp(3 * logits).sum(-1, keepdims=True)
    for metric in (ece, ece_adaptive, ece_classwise):
        assert metric(probs, truth) < 0.02 < 0.08 < metric(sharp, truth)


def test_temperature_recovers_the_planted_one():
    logits, _, truth = random_example(20_000)
    assert temperature(3 * logits, truth) == pytest.approx(3, rel=0.05)
    assert temperature(logits / 2, truth) == pytest.approx(0.5, rel=0.05)
    with pytest.raises(UserError, match="finite"):
        temperature([[np.nan, 0.0]], [0])


@pytest.mark.parametrize("metric", CALIBRATION)
def test_what_is_not_a_probability_is_refused(metric):
    with pytest.raises(UserError, match="probabilities"):
        metric(np.array([[2.0, -1.0]]), [0])
    with pytest.raises(UserError, match="probabilities"):
        metric(np.array([[np.nan, 0.5]]), [0])
    with pytest.raises(UserError, match="class"):
        metric(two([0.5]), [2])
    with pytest.raises(UserError, match="truth"):
        metric(two([0.5, 0.5]), [1])


def test_no_bin_is_refused():
    with pytest.raises(UserError, match="bin"):
        ece(two([0.5]), [1], bins=0)
