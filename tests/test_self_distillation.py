"""Repeated self-distillation in kernel regression: closed forms, fits by hand, bounds."""

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.theory.self_distillation import (
    collapse_window,
    eigenbasis,
    multiplier,
    self_distillation,
    taid,
    taid_floor,
)


def drawn(seed: int, size: int = 12, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(0, np.log(spread), size)), rng.normal(size=size)


def ratio(targets: np.ndarray, tolerance: float) -> float:
    return float(np.sqrt(targets @ targets / (len(targets) * tolerance)))


def test_a_fit_by_hand():
    # one eigenvalue 2, targets (3, 4), N eps = 1: A z misses by 1, so A = 4/5 and c = 2/4
    assert multiplier(np.array([3.0, 4.0]), np.array([2.0, 2.0]), 0.5) == pytest.approx(0.5)
    assert multiplier(np.array([0.6, 0.8]), np.array([2.0, 2.0]), 0.5) == np.inf


def test_a_round_is_kernel_ridge_regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=8)
    gram = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1))
    values, targets = eigenbasis(gram, y)
    course = self_distillation(targets, values, 0.05, 2)
    first = gram @ np.linalg.solve(gram + course.multipliers[0] * np.eye(8), y)
    assert np.linalg.norm(first - y) ** 2 / 8 == pytest.approx(0.05)
    second = gram @ np.linalg.solve(gram + course.multipliers[1] * np.eye(8), first)
    assert np.linalg.norm(second) == pytest.approx(np.linalg.norm(course.targets[2]))


def test_one_eigenvalue_loses_one_unit_a_round():
    _, targets = drawn(0)
    tolerance = targets @ targets / len(targets) / 5.5**2
    course = self_distillation(targets, np.full(12, 0.7), tolerance, 8)
    np.testing.assert_allclose(course.ratios[:6], 5.5 - np.arange(6), rtol=1e-9)
    assert course.collapse == 5 and not course.targets[6:].any()


@pytest.mark.parametrize("seed", range(4))
def test_self_distillation_collapses_within_its_window(seed):
    values, targets = drawn(seed, spread=2.0 + 4 * seed)
    start = 4.0 + seed
    tolerance = targets @ targets / len(targets) / start**2
    kappa = values.max() / values.min()
    early, late = collapse_window(start, kappa)
    course = self_distillation(targets, values, tolerance, int(late) + 1)
    assert course.collapse is not None and early <= course.collapse <= late
    alive = course.ratios[: course.collapse + 1]
    fall = alive[:-1] - alive[1:]
    assert (fall <= 1 + 1e-9).all() and (fall >= 1 / kappa - 1e-9).all()
    assert course.collapse > (start - 1) / kappa  # Mobahi et al.: none before


def test_small_eigenvalues_are_lost_first():
    values, targets = drawn(1)
    course = self_distillation(targets, values, targets @ targets / 12 / 36, 3)
    kept = course.targets[-1] / targets
    np.testing.assert_allclose(
        kept, np.prod([values / (c + values) for c in course.multipliers], axis=0)
    )
    assert (np.diff(kept[np.argsort(values)]) > 0).all()


@pytest.mark.parametrize("rounds", [5, 40])
@pytest.mark.parametrize("start", [1.5, 3.0, 8.0])
def test_taid_stays_above_its_floor(rounds, start):
    values, targets = drawn(2, spread=10.0)
    tolerance = targets @ targets / len(targets) / start**2
    course, floor = taid(targets, values, tolerance, rounds), taid_floor(start, rounds)
    assert (course.ratios >= floor - 1e-9).all()
    assert course.ratios[-1] == pytest.approx(start)  # the last targets are the first
    late = np.arange(rounds + 1) > rounds / start
    assert (course.ratios[late] > 1).all()


def test_taid_survives_where_self_distillation_collapses():
    values, targets = drawn(3, spread=2.0)
    tolerance, rounds = targets @ targets / len(targets) / 8.0**2, 40
    plain = self_distillation(targets, values, tolerance, rounds)
    mixed = taid(targets, values, tolerance, rounds)
    assert plain.collapse is not None and mixed.collapse is None
    assert ratio(targets, tolerance) == pytest.approx(8.0)
    assert 1 + np.sqrt(rounds) < 8.0


@pytest.mark.parametrize("rounds", [1, 2, 9, 100, 1000])
def test_the_floor_of_taid_never_strays_by_more_than_the_root_of_its_rounds(rounds):
    start = 1 + np.sqrt(rounds)
    assert (taid_floor(start, rounds) >= 1 - 1e-12).all()


def test_bad_kernels_are_refused():
    with pytest.raises(UserError, match="eigenvalue"):
        eigenbasis(np.ones((3, 3)) - 2 * np.eye(3), np.ones(3))
    with pytest.raises(UserError, match="symmetric"):
        eigenbasis(np.ones((2, 3)), np.ones(3))
    with pytest.raises(UserError, match="above 0"):
        self_distillation(np.ones(3), np.ones(3), 0.0, 2)
