import math

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.metrics.gap import agreement, agreement_on_errors, median_pgr, pgr, predictions


def test_pgr_by_hand():
    assert pgr(0.6, 0.7, 0.8) == pytest.approx(0.5)
    assert pgr(0.6, 0.6, 0.8) == 0 and pgr(0.6, 0.8, 0.8) == 1
    assert pgr(0.6, 0.5, 0.8) == pytest.approx(-0.5) and pgr(0.6, 0.9, 0.8) == pytest.approx(1.5)
    # The vision rows of the reference README: AlexNet under DINO ResNet50 and ViT-B/8.
    assert pgr(56.6, 61.9, 64.5) == pytest.approx(0.67, abs=0.005)
    assert pgr(56.6, 66.6, 74.0) == pytest.approx(0.57, abs=0.005)


def test_pgr_has_no_value_without_a_gap():
    values = pgr(np.array([0.6, 0.8, 0.9]), np.array([0.7, 0.7, 0.9]), np.array([0.8, 0.8, 0.7]))
    np.testing.assert_allclose(values, [0.5, np.nan, np.nan])
    assert math.isnan(pgr(0.5, 0.5, 0.5)) and isinstance(pgr(0.5, 0.5, 0.5), float)


def test_pgr_is_unchanged_by_shift_and_scale():
    weak, student, ceiling = np.random.default_rng(0).uniform(size=(3, 20))
    np.testing.assert_allclose(
        pgr(weak, student, ceiling), pgr(3 * weak - 1, 3 * student - 1, 3 * ceiling - 1), rtol=1e-9
    )


def test_median_pgr_drops_and_counts_pairs_without_a_gap():
    # PGRs .5, .2, 1 and one pair whose ceiling is below its supervisor.
    weak, student, ceiling = [0.6, 0.5, 0.5, 0.9], [0.7, 0.6, 1.0, 0.1], [0.8, 1.0, 1.0, 0.8]
    value, pairs, dropped = median_pgr(weak, student, ceiling)
    assert (round(value, 9), pairs, dropped) == (0.5, 3, 1)
    assert median_pgr(weak, student, ceiling, least=0.3)[1:] == (2, 2)
    assert math.isnan(median_pgr([0.5], [0.6], [0.5]).value)


@pytest.mark.parametrize("bad", [([0.5], [0.5, 0.6], [0.7]), ([0.5], [np.nan], [0.7])])
def test_median_pgr_refuses(bad):
    with pytest.raises(UserError, match="median_pgr"):
        median_pgr(*bad)


def test_agreement_by_hand():
    a, b = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    assert agreement(a, b) == 0.5
    assert agreement(a, b, where=[True, True, True, False]) == pytest.approx(2 / 3)
    assert math.isnan(agreement(a, b, where=np.zeros(4, bool)))
    assert agreement(np.eye(2)[a], b) == 0.5


def test_agreement_on_the_supervisors_errors():
    truth, weak = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 0])
    student = np.array([1, 1, 1, 0, 0])  # of the three errors (1, 2, 4) it copies two
    assert agreement_on_errors(student, weak, truth) == pytest.approx(2 / 3)
    assert math.isnan(agreement_on_errors(student, truth, truth))
    # With two classes, copying an error is being wrong: accuracy there is the complement.
    assert agreement(student, truth, where=weak != truth) == pytest.approx(1 / 3)


def test_what_is_no_prediction_is_refused():
    with pytest.raises(UserError, match="integer ids"):
        predictions(np.array([0.1, 0.9]))
    with pytest.raises(UserError, match="lengths"):
        agreement([0, 1], [0, 1, 1])
    with pytest.raises(UserError, match="lengths"):
        agreement_on_errors([0, 1], [0, 1], [0])
