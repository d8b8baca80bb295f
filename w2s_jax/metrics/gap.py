"""How much of the gap between a weak supervisor and the ceiling a student recovers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from w2s_jax.errors import UserError


class MedianPGR(NamedTuple):
    """The median over the pairs that count, how many do, and how many were dropped."""

    value: float
    pairs: int
    dropped: int


def pgr(weak: Any, student: Any, ceiling: Any) -> Any:
    """Performance gap recovered, ``(student - weak) / (ceiling - weak)``.

    Burns et al. 2023, section 3. 0 is no better than the supervisor, 1 is the ceiling; it may lie
    outside. NaN where the ceiling is not above the supervisor, for there is no gap to recover.

    Args:
      weak: scores of the supervisor (accuracies, or any score where more is better).
      student: scores of the student trained on its labels.
      ceiling: scores of the same student trained on the truth.

    Returns:
      A float for numbers, float64 of the broadcast shape for arrays.
    """
    weak, student, ceiling = (np.asarray(x, np.float64) for x in (weak, student, ceiling))
    gap = ceiling - weak
    undefined = ~(gap > 0)
    value = np.where(undefined, np.nan, (student - weak) / np.where(undefined, 1.0, gap))
    return float(value) if value.ndim == 0 else value


def median_pgr(weak: Any, student: Any, ceiling: Any, *, least: float = 0.0) -> MedianPGR:
    """The median PGR over (weak, student) pairs with ``ceiling - weak > least``.

    PGR is heavy-tailed where the gap is small, so it is never averaged; pairs without a gap are
    dropped and counted (openai/weak-to-strong reports the same). weak, student, ceiling: [P]
    scores, one per pair, best averaged over seeds before. The value is NaN when no pair is left.

    Raises:
      UserError: the three do not have one length, or a score is not finite.
    """
    scores = [np.atleast_1d(np.asarray(x, np.float64)) for x in (weak, student, ceiling)]
    if len({s.shape for s in scores}) != 1 or scores[0].ndim != 1:
        raise UserError(f"median_pgr needs three [P] arrays, got {[s.shape for s in scores]}")
    if not all(np.isfinite(s).all() for s in scores):
        raise UserError("median_pgr: a score is not finite; drop the failed run and say so")
    weak, student, ceiling = scores
    kept = (ceiling - weak) > max(least, 0.0)
    values = pgr(weak, student, ceiling)[kept]
    middle = float(np.median(values)) if kept.any() else float("nan")
    return MedianPGR(middle, int(kept.sum()), int((~kept).sum()))


def predictions(values: Any) -> np.ndarray:
    """Class ids [N] from class ids [N], or from probabilities or logits [N, C] by argmax.

    Raises:
      UserError: neither of the two.
    """
    values = np.asarray(values)
    if values.ndim == 2:
        return values.argmax(-1)
    if values.ndim == 1 and values.dtype.kind in "iub":
        return values.astype(np.int64)
    raise UserError(
        f"predictions are integer ids [N] or scores [N,C], got {values.dtype} {values.shape}"
    )


def agreement(a: Any, b: Any, where: Any = None) -> float:
    """The share of examples on which two predictors name the same class, in [0, 1].

    Args:
      a: [N] class ids, or [N, C] probabilities or logits.
      b: likewise.
      where: [N] bool, the examples that count; all if None.

    Returns:
      A float; NaN when no example counts.

    Raises:
      UserError: different lengths, or neither ids nor scores.
    """
    a, b = predictions(a), predictions(b)
    counts = np.ones(len(a), bool) if where is None else np.asarray(where, bool)
    if not len(a) == len(b) == len(counts):
        raise UserError(f"agreement: lengths differ: {len(a)}, {len(b)}, {len(counts)}")
    return float((a == b)[counts].mean()) if counts.any() else float("nan")


def agreement_on_errors(student: Any, weak: Any, truth: Any) -> float:
    """Agreement with the supervisor where the supervisor is wrong: how far its errors are copied.

    Burns et al. 2023, section 5.1.3: larger students copy fewer. student, weak: [N] ids or [N, C]
    scores; truth: [N] ids. NaN when the supervisor makes no error.

    Raises:
      UserError: different lengths, or neither ids nor scores.
    """
    weak, truth = predictions(weak), predictions(truth)
    if len(weak) != len(truth):
        raise UserError(f"agreement_on_errors: lengths differ: {len(weak)}, {len(truth)}")
    return agreement(student, weak, where=weak != truth)
