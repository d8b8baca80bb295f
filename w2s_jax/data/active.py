"""Which rows to have labelled by a teacher that makes mistakes: Robust Active Distillation, rivals.

A student says class probabilities of a pool; the b rows chosen are labelled. Rows it is unsure of
teach most, and are those the teacher gets wrong. Robust Active Distillation (Baykal et al. 2022,
arXiv 2210.01213) plays a game against m mistakes in unknown places. The game and its closed form
below are from memory of the paper (unverified); that the form is optimal was derived anew and is
tested against linear programs.
"""

from __future__ import annotations

import numpy as np

from w2s_jax.errors import UserError

LEAST = 1e-6  # a row that teaches nothing would have an infinite share


def margins(probs: np.ndarray) -> np.ndarray:
    """The most likely class's probability less the second's: probs [N,C] -> [N] in [0, 1].

    Raises:
      UserError: rows that are not probabilities of two classes or more.
    """
    top = np.sort(_checked(probs), axis=-1)
    return top[:, -1] - top[:, -2]


def informativeness(probs: np.ndarray) -> np.ndarray:
    """``1 - margin``, at least 1e-6: probs [N,C] -> [N].

    Raises:
      UserError: as ``margins``.
    """
    return np.maximum(1.0 - margins(probs), LEAST)


def entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy of each row in nats: probs [N,C] -> [N].

    Raises:
      UserError: as ``margins``.
    """
    probs = _checked(probs)
    return -(probs * np.log(np.maximum(probs, np.finfo(float).tiny))).sum(-1)


def mistakes(accuracy: float, rows: int) -> int:
    """How many of ``rows`` a teacher of this accuracy gets wrong: m of the game."""
    return round((1.0 - accuracy) * rows)


def support(values: np.ndarray, wrong: int, *, cost: float = 2.0) -> tuple[int, float]:
    """The optimal number of rows k* to spread over, and the value of the game.

    With values sorted downwards and ``H_k = sum_{i<=k} 1/w_i``, k* is the smallest maximiser of
    ``(k - cost m) / H_k``. Where no k makes it positive (m >= N / cost) every row is in the
    support, and the value is that of k = N.

    Args:
      values: [N] gains w > 0 of rows labelled rightly.
      wrong: m, how many labels of the pool are wrong.
      cost: 2 where a wrong label loses w, 1 where it gains nothing.

    Raises:
      UserError: a value that is not above 0, or m outside 0..N.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not (values > 0).all():
        raise UserError("robust selection needs values [N] above 0 (informativeness clips them)")
    if not 0 <= wrong <= len(values):
        raise UserError(f"robust selection: {wrong} wrong labels among {len(values)} rows")
    sizes = np.arange(1, len(values) + 1)
    worth = (sizes - cost * wrong) / np.cumsum(1.0 / np.sort(values)[::-1])
    best = int(worth.argmax()) if worth.max() > 0 else len(values) - 1
    return best + 1, float(worth[best])


def robust(values: np.ndarray, wrong: int, *, cost: float = 2.0, least: int = 1) -> np.ndarray:
    """The distribution q* [N] that gains most from one draw when the worst m labels are wrong.

    ``argmax_q min_g sum_i q_i g_i`` where g_i is w_i, or ``(1 - cost) w_i`` on at most m rows:
    ``q_i`` is proportional to ``1 / w_i`` on the k* largest values and 0 elsewhere, so a row in the
    support is the likelier the less it teaches. Uniform where m >= N / cost.

    Args:
      values: [N] gains w > 0.
      wrong: m.
      cost: as ``support``.
      least: rows the support has at least (the budget).

    Raises:
      UserError: as ``support``.
    """
    values = np.asarray(values, np.float64)
    size, worth = support(values, wrong, cost=cost)
    if worth <= 0:
        return np.full(len(values), 1.0 / len(values))
    order = np.argsort(-values, kind="stable")[: max(size, least)]
    shares = np.zeros(len(values))
    shares[order] = 1.0 / values[order]
    return shares / shares.sum()


def inclusion(shares: np.ndarray, budget: int) -> np.ndarray:
    """Chances [N] that each row is among ``budget`` different ones: ``min(1, s q_i)``, sum b.

    Raises:
      UserError: fewer rows with a share than the budget.
    """
    shares = np.asarray(shares, np.float64)
    some = int((shares > 0).sum())
    if not 1 <= budget <= some:
        raise UserError(f"cannot draw {budget} different rows of {some}")
    if budget == some:
        return (shares > 0).astype(float)
    left = np.sort(shares)[::-1][:some]
    scales = (budget - np.arange(some)) / np.cumsum(left[::-1])[::-1]
    capped = int(np.argmax(scales * left <= 1.0))  # so many of the largest have chance 1
    return np.minimum(1.0, scales[capped] * shares)


def systematic(chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Different rows drawn with exactly these chances [N], whose sum b is whole: [b], ascending.

    Systematic sampling: rows in random order lie end to end, each as long as its chance, and every
    point at an unknown offset plus a whole number picks the row it falls on.

    Raises:
      UserError: chances outside [0, 1], or a sum that is not whole.
    """
    chances = np.asarray(chances, np.float64)
    budget = round(float(chances.sum()))
    if not ((chances >= 0) & (chances <= 1)).all() or abs(chances.sum() - budget) > 1e-6:
        raise UserError("systematic sampling needs chances in [0, 1] with a whole sum")
    order = rng.permutation(len(chances))
    ends = np.cumsum(chances[order])
    ends *= budget / ends[-1]
    picked = np.searchsorted(ends, rng.uniform() + np.arange(budget), side="right")
    return np.sort(order[picked])


def robust_rows(
    values: np.ndarray, wrong: int, budget: int, rng: np.random.Generator, *, cost: float = 2.0
) -> np.ndarray:
    """``budget`` different rows of the pool by ``robust``, whose support has at least so many.

    With m = 0 these are the rows with the largest values. Returns row numbers [b], ascending.

    Raises:
      UserError: as ``support``, or a budget above N.
    """
    return systematic(inclusion(robust(values, wrong, cost=cost, least=budget), budget), rng)


def largest(values: np.ndarray, budget: int) -> np.ndarray:
    """The rows with the largest values, [b] ascending; of equal ones the earlier.

    Margin sampling is ``largest(-margins(probs), b)``, entropy sampling ``largest(entropy(probs),
    b)``.

    Raises:
      UserError: a budget outside 1..N.
    """
    _afford(budget, len(values))
    return np.sort(np.argsort(-np.asarray(values), kind="stable")[:budget])


def uniform_rows(rows: int, budget: int, rng: np.random.Generator) -> np.ndarray:
    """``budget`` of ``rows`` row numbers, each set of them as likely: [b], ascending.

    Raises:
      UserError: a budget outside 1..N.
    """
    _afford(budget, rows)
    return np.sort(rng.choice(rows, budget, replace=False))


def k_center(features: np.ndarray, centres: np.ndarray, budget: int) -> np.ndarray:
    """Greedy k-centre (CoreSet, Sener and Savarese 2018): again and again the row farthest off.

    Args:
      features: [N,D] of the pool.
      centres: [M,D] of what is labelled already.

    Returns:
      Row numbers [b], ascending.

    Raises:
      UserError: a budget outside 1..N, or no centre.
    """
    _afford(budget, len(features))
    if not len(centres):
        raise UserError("k-centre needs at least one labelled row to be far from")
    features, centres = np.asarray(features, np.float64), np.asarray(centres, np.float64)
    squares = (features**2).sum(-1)[:, None] + (centres**2).sum(-1)[None]
    nearest = (squares - 2.0 * features @ centres.T).min(1)
    picked = []
    for _ in range(budget):
        picked.append(int(nearest.argmax()))
        own = ((features - features[picked[-1]]) ** 2).sum(-1)
        nearest = np.minimum(nearest, own)
        nearest[picked] = -np.inf
    return np.sort(np.array(picked))


def _afford(budget: int, rows: int) -> None:
    if not 1 <= budget <= rows:
        raise UserError(f"cannot choose {budget} of {rows} rows")


def _checked(probs: np.ndarray) -> np.ndarray:
    probs = np.asarray(probs, np.float64)
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise UserError(f"need class probabilities [N,C] with C above 1, got {probs.shape}")
    if not (probs >= 0).all() or np.abs(probs.sum(-1) - 1.0).max(initial=0.0) > 1e-3:
        raise UserError("rows are not probabilities (not in [0,1] or not summing to 1): softmax?")
    return probs
