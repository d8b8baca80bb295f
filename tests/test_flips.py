"""Flips of an update: by hand, the identities of the paper, what is refused."""

import math

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.metrics import flips

TRUTH = np.array([0, 1, 2, 0, 1, 2, 0, 1])
OLD = np.array([0, 1, 2, 1, 0, 0, 1, 1])  # right, right, right, wrong x 4, right
NEW = np.array([0, 0, 1, 0, 1, 1, 1, 1])  # broken twice, mended twice, one other mistake, one same
MADE = np.array([0, 1, 1, 0, 1, 2, 1, 1])  # one of the two breaks is gone, one more is right


def test_flips_by_hand():
    assert flips.nfr(OLD, NEW, TRUTH) == 2 / 8
    assert flips.pfr(OLD, NEW, TRUTH) == 2 / 8
    assert flips.nfr_mc(OLD, NEW, TRUTH) == 3 / 8  # the two, and 0 -> 1 where 2 is right
    got = flips.update(OLD, NEW, MADE, TRUTH)
    assert got == flips.Update(2 / 8, -1 / 8, -50.0, 1 / 8, 2 / 8)


def test_scores_texts_and_judgements_are_other_ways_to_say_it():
    logits = np.eye(3)[NEW] + 0.1
    assert flips.nfr(np.eye(3)[OLD], logits, TRUTH) == 2 / 8
    words = np.array(["a", "b", "c"])
    assert flips.nfr_mc(words[OLD], words[NEW], words[TRUTH]) == 3 / 8
    assert flips.nfr(OLD == TRUTH, NEW == TRUTH) == 2 / 8
    assert flips.update(OLD == TRUTH, NEW == TRUTH, MADE == TRUTH).delta_pfr == 1 / 8


@pytest.mark.parametrize("seed", range(5))
def test_the_identities_of_the_rates(seed):
    rng = np.random.default_rng(seed)
    truth, old, new = rng.integers(0, 4, (3, 200))
    assert flips.nfr(old, new, truth) <= flips.nfr_mc(old, new, truth)
    gain = flips.pfr(old, new, truth) - flips.nfr(old, new, truth)
    assert gain == pytest.approx((new == truth).mean() - (old == truth).mean())
    same = flips.update(old, new, new, truth)
    assert same[1:] == (0, 0, 0, 0)  # a compatible model that is the new one
    assert flips.nfr(old, truth, truth) == 0  # a new model that is always right
    assert flips.nfr(old, old, truth) == flips.nfr_mc(old, old, truth) == 0
    binary = [x % 2 for x in (old, new, truth)]
    assert flips.nfr(*binary) == flips.nfr_mc(*binary)  # two classes: no other wrong answer
    assert math.isnan(flips.update(old, truth, new, truth).percent)


def test_shifts_of_scores_by_hand():
    old, new = np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.3, 0.5, 0.1, 0.7])
    got = flips.shift(old, new)
    np.testing.assert_allclose(got, (0.25, 0.5, 0.2, 0.3))
    made = np.array([0.3, 0.6, 0.4, 0.9])
    one = flips.score_update(old, new, made)
    assert one.shift == got
    np.testing.assert_allclose(one[1:], (-0.25, -50.0, 0.25, 0.15))


@pytest.mark.parametrize("seed", range(3))
def test_the_identities_of_shifts(seed):
    old, new = np.random.default_rng(seed).normal(size=(2, 50)).round(1)
    got = flips.shift(old, new)
    assert got.pfr + got.nfr <= 1
    assert got.pfr * got.gain - got.nfr * got.regress == pytest.approx((new - old).mean())
    assert flips.shift(new, old) == flips.Shift(got.nfr, got.pfr, got.regress, got.gain)
    assert flips.shift(old, old) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flips.nfr(OLD, NEW), "bools"),
        (lambda: flips.nfr(OLD, NEW[:-1], TRUTH), "one answer per item"),
        (lambda: flips.pfr(OLD[:0], NEW[:0], TRUTH[:0]), "one answer per item"),
        (lambda: flips.nfr_mc(np.zeros((2, 2, 2)), OLD, TRUTH), "one answer per item"),
        (lambda: flips.nfr(OLD == TRUTH, (NEW == TRUTH)[:3]), "one answer per item"),
        (lambda: flips.shift([0.1, np.nan], [0.2, 0.3]), "NaN"),
        (lambda: flips.shift(["good"], ["bad"]), "numbers"),
        (lambda: flips.score_update([0.1], [0.2], [0.3, 0.4]), "one answer per item"),
    ],
)
def test_what_is_no_pair_of_answers_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
