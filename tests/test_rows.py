import math

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.metrics.classification import ece, reliability
from w2s_jax.metrics.rows import overview, pool_bins, summarise, values, where
from w2s_jax.metrics.statistics import interval


def measurements(seeds=3):
    return [
        {"weak": weak, "loss": loss, "size": size, "seed": s, "accuracy": 0.5 + i / 10 + s / 100}
        for weak in ("nano-1", "nano-2")
        for loss in ("naive", "confidence")
        for i, size in enumerate((1000, 10_000, 100_000))
        for s in range(seeds)
        if not (weak == "nano-2" and size == 1000)
    ]


def test_summarise_by_hand():
    table = summarise(measurements(), ["weak", "loss", "size"], "accuracy")
    assert len(table) == 2 * (3 + 2)  # the missing combinations are not invented
    assert list(table[0]) == [
        "weak",
        "loss",
        "size",
        "accuracy",
        "low",
        "high",
        "coverage",
        "repeats",
    ]
    want = interval([0.5, 0.51, 0.52])
    got = table[0]
    assert (got["accuracy"], got["low"], got["high"]) == (want.value, want.low, want.high)
    assert (got["coverage"], got["repeats"]) == (0.95, 3)


def test_summarise_skips_what_has_no_value_and_counts_the_rest():
    rows = [{"m": "a", "v": 1.0}, {"m": "a", "v": math.nan}, {"m": "a", "w": 9}, {"m": "b", "v": 2}]
    table = summarise(rows, ["m"], "v", None)
    assert [(r["m"], r["v"], r["repeats"]) for r in table] == [("a", 1.0, 1), ("b", 2.0, 1)]
    assert all(math.isnan(r["low"]) for r in table)


def test_settings_are_not_taken_for_repetitions():
    with pytest.raises(UserError, match="seed twice"):
        summarise(measurements(), ["weak", "size"], "accuracy")
    assert summarise(measurements(), ["weak", "size"], "accuracy", None)[0]["repeats"] == 6


def test_a_column_comes_in_the_order_of_the_seeds():
    rows = [
        {"arm": arm, "seed": s, "v": v} for arm, s, v in (("a", 2, 9), ("b", 0, 7), ("a", 0, 5))
    ]
    rows += [{"seed": 1, "v": 8}]  # has no arm
    found = values(rows, "v", arm="a")
    assert found.tolist() == [5.0, 9.0] and found.dtype == np.float64
    assert where(rows, arm="b", seed=0) == [rows[1]] and where(rows, arm="c") == []


def test_an_overview_has_one_interval_and_the_means_of_the_rest():
    rows = [{"arm": "a", "seed": s, "v": v, "w": 2 * v} for s, v in enumerate((1.0, 2.0, 3.0))]
    rows += [{"arm": "b", "seed": s, "v": 4.0} for s in range(2)]
    one, two = overview(rows, ["arm"], "v", ["w"])
    want = interval([1.0, 2.0, 3.0])
    assert one == {"arm": "a", "v": 2.0, "low": want.low, "high": want.high, "w": 4.0}
    assert (two["arm"], two["v"], two["w"]) == ("b", 4.0, "")


def test_bins_of_several_seeds_pool_by_count():
    p = np.array([0.6, 0.6, 0.6, 0.9])
    probs = np.stack([1 - p, p], 1)
    truths = [1, 1, 0, 1], [1, 0, 0, 0]
    rows = [
        {**row, "model": "m", "seed": seed}
        for seed, truth in enumerate(truths)
        for row in reliability(probs, truth, bins=10)
    ]
    table = pool_bins(rows, "model")
    assert [(r["count"], r["share"]) for r in table] == [(6, 0.75), (2, 0.25)]
    np.testing.assert_allclose([r["accuracy"] for r in table], [3 / 6, 1 / 2])
    # Pooled bins are the bins of the pooled examples.
    together = ece(np.concatenate([probs, probs]), np.concatenate(truths), bins=10)
    off = sum(r["share"] * abs(r["accuracy"] - r["confidence"]) for r in table)
    assert off == pytest.approx(together)
