"""Robust selection against linear programs over every set of mistakes, exact chances, rivals."""

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import linprog

from w2s_jax.data import active
from w2s_jax.errors import UserError


def by_linear_program(values: np.ndarray, wrong: int, cost: float) -> tuple[np.ndarray, float]:
    """The best distribution and its worst-case gain over all sets of ``wrong`` mistakes."""
    n = len(values)
    gains = []
    for places in combinations(range(n), wrong):
        gain = values.copy()
        gain[list(places)] *= 1.0 - cost
        gains.append([*-gain, 1.0])  # worth - q.gain <= 0
    found = linprog(
        np.array([0.0] * n + [-1.0]),
        A_ub=np.array(gains),
        b_ub=np.zeros(len(gains)),
        A_eq=np.array([[1.0] * n + [0.0]]),
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    return found.x[:n], -found.fun


@pytest.mark.parametrize("cost", [2.0, 1.0])
@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_the_closed_form_is_the_optimum_of_the_game(wrong, cost):
    for seed in range(4):
        values = np.random.default_rng([seed, wrong]).uniform(0.05, 1.0, 8)
        shares, worth = by_linear_program(values, wrong, cost)
        size, value = active.support(values, wrong, cost=cost)
        got = active.robust(values, wrong, cost=cost)
        np.testing.assert_allclose(value, worth, atol=1e-9)
        np.testing.assert_allclose(got, shares, atol=1e-6)
        assert (got > 0).sum() == size


def test_support_of_three_rows_by_hand():
    # w = 1, 1/2, 1/4: H = 1, 3, 7; one mistake: (k - 1)/H = 0, 1/3, 2/7 and (k - 2)/H = -1, 0, 1/7
    values = np.array([0.25, 1.0, 0.5])
    assert active.support(values, 1, cost=1.0) == (2, pytest.approx(1 / 3))
    assert active.support(values, 1, cost=2.0) == (3, pytest.approx(1 / 7))
    np.testing.assert_allclose(active.robust(values, 1, cost=1.0), [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(active.robust(values, 1, cost=2.0), [4 / 7, 1 / 7, 2 / 7])


def test_no_mistake_is_margin_sampling_and_too_many_are_uniform():
    values = np.random.default_rng(0).uniform(0.1, 1.0, 30)
    assert active.support(values, 0)[0] == 1
    np.testing.assert_array_equal(active.robust(values, 0).argmax(), values.argmax())
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(active.robust_rows(values, 0, 7, rng), active.largest(values, 7))
    np.testing.assert_allclose(active.robust(values, 15), np.full(30, 1 / 30))  # m = N / cost


def test_more_mistakes_spread_wider_and_a_dearer_mistake_too():
    values = np.random.default_rng(2).uniform(0.1, 1.0, 200)
    sizes = [active.support(values, wrong)[0] for wrong in (0, 5, 20, 60)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert active.support(values, 20, cost=1.0)[0] < active.support(values, 20, cost=2.0)[0]


def test_within_the_support_less_informative_rows_are_likelier():
    values = np.sort(np.random.default_rng(3).uniform(0.1, 1.0, 50))[::-1]
    shares = active.robust(values, 8)
    inside = shares[shares > 0]
    assert (np.diff(inside) > 0).all() and (np.diff(np.flatnonzero(shares)) == 1).all()
    np.testing.assert_allclose(inside * values[: len(inside)], inside[0] * values[0])


def test_chances_are_capped_and_add_up_to_the_budget():
    chances = active.inclusion(np.array([0.7, 0.1, 0.1, 0.1, 0.0]), 2)
    np.testing.assert_allclose(chances, [1, 1 / 3, 1 / 3, 1 / 3, 0])  # by hand: s = 10/3
    chances = active.inclusion(np.array([0.4, 0.3, 0.2, 0.1]), 1)
    np.testing.assert_allclose(chances, [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_array_equal(active.inclusion(np.array([0.5, 0.0, 0.5]), 2), [1, 0, 1])


def test_rows_are_drawn_with_their_chances_and_never_twice():
    chances = active.inclusion(np.array([0.5, 0.2, 0.1, 0.1, 0.06, 0.04]), 3)
    rng, counts = np.random.default_rng(4), np.zeros(6)
    for _ in range(4000):
        rows = active.systematic(chances, rng)
        assert len(set(rows.tolist())) == 3
        counts[rows] += 1
    np.testing.assert_allclose(counts / 4000, chances, atol=4 * 0.5 / np.sqrt(4000))
    assert counts[0] == 4000  # its chance is 1


def test_signals_by_hand():
    probs = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(active.margins(probs), [0.2, 1.0])
    np.testing.assert_allclose(active.informativeness(probs), [0.8, 1e-6])
    want = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    np.testing.assert_allclose(active.entropy(probs), [want, 0.0])
    assert active.mistakes(0.94, 1140) == 68
    np.testing.assert_array_equal(active.largest(np.array([1.0, 3.0, 2.0, 3.0]), 2), [1, 3])


def test_k_center_takes_the_farthest_row_each_time():
    features = np.array([[0.0], [1.0], [5.0], [9.0], [9.5]])
    np.testing.assert_array_equal(active.k_center(features, np.array([[0.0]]), 2), [2, 4])
    everything = active.k_center(features, np.array([[0.0]]), 5)
    np.testing.assert_array_equal(everything, np.arange(5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: active.margins(np.array([[2.0, 1.0]])), "softmax"),
        (lambda: active.margins(np.ones((2, 1))), "C above 1"),
        (lambda: active.support(np.array([1.0, 0.0]), 1), "above 0"),
        (lambda: active.support(np.ones(3), 4), "4 wrong labels"),
        (lambda: active.inclusion(np.array([1.0, 0.0]), 2), "2 different"),
        (lambda: active.systematic(np.array([0.5, 0.2]), np.random.default_rng(0)), "whole"),
        (lambda: active.largest(np.ones(3), 4), "4 of 3"),
        (lambda: active.k_center(np.ones((3, 1)), np.ones((0, 1)), 1), "centre"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
