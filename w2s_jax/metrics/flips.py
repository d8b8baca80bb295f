"""What an update of a model breaks: items that were right before it and are wrong after it.

Echterhoff et al. 2024 (MUSCLE, arXiv 2407.09435); the negative flip rate is that of Yan et al. 2021
(arXiv 2011.09161). Items are answered by an old model and by a new one; where a compatible model
stands in for the new one, ``update`` and ``score_update`` say what that changes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.metrics.gap import predictions


class Update(NamedTuple):
    """What a compatible model changes over the new one, all shares of items in [-1, 1].

    ``nfr`` is that of old -> new; ``delta_nfr``, ``delta_pfr`` and ``delta_accuracy`` are those of
    the compatible model less those of the new one, ``percent`` is ``100 delta_nfr / nfr`` (NaN
    where nothing flips).
    """

    nfr: float
    delta_nfr: float
    percent: float
    delta_pfr: float
    delta_accuracy: float


class Shift(NamedTuple):
    """How scores of items move: the share that rises and falls, and by how much it does on average
    (``gain``, ``regress``: in the scores' units, 0 where none does)."""

    pfr: float
    nfr: float
    gain: float
    regress: float


class ScoreUpdate(NamedTuple):
    """``Update`` for scores: ``shift`` of old -> new, and what the compatible model changes of its
    shares and of the mean score."""

    shift: Shift
    delta_nfr: float
    percent: float
    delta_pfr: float
    delta_score: float


def nfr(old: Any, new: Any, truth: Any = None) -> float:
    """Negative flip rate: the share of items that ``old`` has right and ``new`` wrong.

    Args:
      old: [N] answers (class ids, numbers, texts) or scores of classes [N,C]; without ``truth``
        [N] bool, which items are right.
      new: likewise.
      truth: [N] right answers.

    Raises:
      UserError: lengths that differ, no item, or without ``truth`` something else than bools.
    """
    before, after = _right(old, new, truth)
    return float((before & ~after).mean())


def pfr(old: Any, new: Any, truth: Any = None) -> float:
    """Positive flip rate: share of items that ``old`` has wrong and ``new`` right (see ``nfr``)."""
    before, after = _right(old, new, truth)
    return float((~before & after).mean())


def nfr_mc(old: Any, new: Any, truth: Any) -> float:
    """Share of items that ``new`` has wrong and answers unlike ``old``: the negative flips and the
    changes from one wrong answer to another (MUSCLE, section 3). Arguments as ``nfr``.

    As the paper writes it, every negative flip is in it: ``nfr <= nfr_mc``.
    """
    before, after, right = _answers(old, new, truth)
    return float(((after != right) & (before != after)).mean())


def update(old: Any, new: Any, compatible: Any, truth: Any = None) -> Update:
    """What the paper's tables report of a compatible model; arguments as ``nfr``."""
    flips = [nfr(old, each, truth) for each in (new, compatible)]
    gains = [pfr(old, each, truth) for each in (new, compatible)]
    late, fixed = _right(new, compatible, truth)
    change = flips[1] - flips[0]
    return Update(
        nfr=flips[0],
        delta_nfr=change,
        percent=_percent(change, flips[0]),
        delta_pfr=gains[1] - gains[0],
        delta_accuracy=float(fixed.mean() - late.mean()),
    )


def shift(old: Any, new: Any) -> Shift:
    """How scores [N] of generated texts (ROUGE, a log-probability, a judge's mark: more is better)
    change with the model; of each item ``D = new - old``, as section 3.2 of the paper has it.

    Raises:
      UserError: not [N] finite numbers of one length above 0.
    """
    before, after = _scores(old, new)
    moved = after - before
    up, down = moved > 0, moved < 0
    return Shift(
        pfr=float(up.mean()),
        nfr=float(down.mean()),
        gain=float(moved[up].mean()) if up.any() else 0.0,
        regress=float(-moved[down].mean()) if down.any() else 0.0,
    )


def score_update(old: Any, new: Any, compatible: Any) -> ScoreUpdate:
    """What a compatible model changes of ``shift(old, new)``; scores [N] each, errors as there."""
    first, second = shift(old, new), shift(old, compatible)
    late, fixed = _scores(new, compatible)
    change = second.nfr - first.nfr
    return ScoreUpdate(
        shift=first,
        delta_nfr=change,
        percent=_percent(change, first.nfr),
        delta_pfr=second.pfr - first.pfr,
        delta_score=float(fixed.mean() - late.mean()),
    )


def _percent(change: float, rate: float) -> float:
    return 100 * change / rate if rate else math.nan


def _right(old: Any, new: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which items [N] are right before and after."""
    if truth is not None:
        before, after, right = _answers(old, new, truth)
        return before == right, after == right
    before, after = (np.asarray(each) for each in (old, new))
    if before.dtype != bool or after.dtype != bool:
        raise UserError(
            f"flips without truth need [N] bools (which items are right), got {before.dtype} and "
            f"{after.dtype}: hand in the truth"
        )
    _check(before, after)
    return before, after


def _answers(old: Any, new: Any, truth: Any) -> list[np.ndarray]:
    arrays = [np.asarray(each) for each in (old, new, truth)]
    arrays = [predictions(each) if each.ndim == 2 else each for each in arrays]
    _check(*arrays)
    return arrays


def _scores(*given: Any) -> list[np.ndarray]:
    try:
        arrays = [np.asarray(each, np.float64) for each in given]
    except (TypeError, ValueError):
        raise UserError("scores of items must be numbers [N]") from None
    _check(*arrays)
    if not all(np.isfinite(each).all() for each in arrays):
        raise UserError("a score is NaN or infinite: give such items the lowest score, and say so")
    return arrays


def _check(*arrays: np.ndarray) -> None:
    shapes = [each.shape for each in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise UserError(f"flips need one answer per item and model, got shapes {shapes}")
