"""Accuracy, ranking and calibration of class probabilities, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import rankdata

from w2s_jax.errors import UserError
from w2s_jax.metrics.gap import predictions
from w2s_jax.types import Row


def accuracy(scores: Any, truth: Any) -> float:
    """The share of examples whose predicted class is the true one, in [0, 1].

    scores: [N] class ids, or [N, C] probabilities or logits (argmax); truth: [N] class ids.

    Raises:
      UserError: no example, or different lengths.
    """
    guess, truth = predictions(scores), predictions(truth)
    if len(guess) != len(truth) or not len(truth):
        raise UserError(f"accuracy: {len(guess)} predictions for {len(truth)} examples")
    return float((guess == truth).mean())


def auroc(scores: Any, truth: Any) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counting one half.

    scores: [N] scores of class 1, or [N, 2] probabilities or logits; truth: [N] of 0 and 1.
    NaN when only one class occurs.

    Raises:
      UserError: shapes that do not fit, or a class other than 0 and 1.
    """
    scores, truth = np.asarray(scores, np.float64), predictions(truth)
    if scores.ndim == 2 and scores.shape[1] == 2:
        scores = scores[:, 1] - scores[:, 0]
    if scores.shape != truth.shape or not np.isin(truth, (0, 1)).all():
        raise UserError(f"auroc needs one score per example of class 0 or 1, got {scores.shape}")
    positive = truth == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def nll(probs: Any, truth: Any) -> float:
    """Mean negative log-likelihood of the truth in nats; probs [N, C], truth [N]. May be inf.

    Raises:
      UserError: not probabilities, or lengths or classes that do not fit.
    """
    probs, truth = _checked(probs, truth)
    with np.errstate(divide="ignore"):
        return float(-np.log(probs[np.arange(len(truth)), truth]).mean())


def brier(probs: Any, truth: Any) -> float:
    """Multiclass Brier score ``mean sum_c (p_c - 1[y=c])^2``, in [0, 2]; probs [N, C], truth [N].

    Raises:
      UserError: not probabilities, or lengths or classes that do not fit.
    """
    probs, truth = _checked(probs, truth)
    return float(((probs - np.eye(probs.shape[1])[truth]) ** 2).sum(-1).mean())


def brier_binary(probs: Any, truth: Any) -> float:
    """Binary Brier score ``mean (p_1 - y)^2``, in [0, 1]: half of ``brier`` for two classes.

    Raises:
      UserError: not two-class probabilities [N, 2], or lengths or classes that do not fit.
    """
    probs, truth = _checked(probs, truth)
    if probs.shape[1] != 2:
        raise UserError(f"brier_binary needs [N,2] probabilities, got {probs.shape}; use brier")
    return float(((probs[:, 1] - truth) ** 2).mean())


def ece(probs: Any, truth: Any, *, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins of confidence, in [0, 1].

    ``sum_b n_b/n |accuracy_b - confidence_b|`` with confidence ``max_c p_c`` and bins
    ``(low, high]`` (Guo et al. 2017, equation 3). probs [N, C], truth [N].

    Raises:
      UserError: not probabilities, lengths or classes that do not fit, or no bin.
    """
    confidence, right = _confidence(*_checked(probs, truth))
    return _calibration_error(confidence, right, _edges(bins))


def ece_adaptive(probs: Any, truth: Any, *, bins: int = 15) -> float:
    """``ece`` over bins of equal mass; equal confidences share a bin.

    Raises:
      UserError: as ``ece``.
    """
    confidence, right = _confidence(*_checked(probs, truth))
    return _calibration_error(confidence, right, np.quantile(confidence, _edges(bins)))


def ece_classwise(probs: Any, truth: Any, *, bins: int = 15) -> float:
    """Mean over classes of the calibration error of ``p_c`` as a forecast of ``y = c``.

    Equal-width bins (Kull et al. 2019, equation 3).

    Raises:
      UserError: as ``ece``.
    """
    probs, truth = _checked(probs, truth)
    errors = [
        _calibration_error(probs[:, c], (truth == c).astype(np.float64), _edges(bins))
        for c in range(probs.shape[1])
    ]
    return float(np.mean(errors))


def reliability(probs: Any, truth: Any, *, bins: int = 15) -> list[Row]:
    """The table behind a reliability diagram: one row per non-empty equal-width bin.

    Row: low, high (edges of the confidence), count, confidence (mean), accuracy. The weighted
    mean of ``|accuracy - confidence|`` is ``ece``. probs [N, C], truth [N].

    Raises:
      UserError: as ``ece``.
    """
    confidence, right = _confidence(*_checked(probs, truth))
    edges = _edges(bins)
    count, mean, share = _binned(confidence, right, edges)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "count": int(count[b]),
            "confidence": float(mean[b]),
            "accuracy": float(share[b]),
        }
        for b in np.flatnonzero(count)
    ]


def temperature(logits: Any, truth: Any) -> float:
    """The T > 0 that minimises the NLL of ``softmax(logits / T)`` (Guo et al. 2017, section 4.2).

    Fit it on dev, never on test. logits [N, C], truth [N]. T is searched in [0.01, 100].

    Raises:
      UserError: lengths or classes that do not fit, or a logit that is not finite.
    """
    logits, truth = np.asarray(logits, np.float64), predictions(truth)
    _check_shapes(logits, truth)
    if not np.isfinite(logits).all():
        raise UserError("temperature: a logit is not finite")

    def loss(log_t: float) -> float:
        return float(
            -log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(truth)), truth].mean()
        )

    bound = np.log(100.0)
    best = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x))


def _check_shapes(values: np.ndarray, truth: np.ndarray) -> None:
    if values.ndim != 2 or len(values) != len(truth) or not len(truth):
        raise UserError(f"need scores [N,C] and truth [N], got {values.shape} and {truth.shape}")
    if truth.min() < 0 or truth.max() >= values.shape[1]:
        raise UserError(
            f"truth has class {truth.min()}..{truth.max()}, the scores have {values.shape[1]}"
        )


def _checked(probs: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    probs, truth = np.asarray(probs, np.float64), predictions(truth)
    _check_shapes(probs, truth)
    if not (probs >= 0).all() or np.abs(probs.sum(-1) - 1).max() > 1e-2:
        raise UserError("rows are not probabilities (not in [0,1] or not summing to 1): softmax?")
    return probs, truth


def _confidence(probs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return probs.max(-1), (probs.argmax(-1) == truth).astype(np.float64)


def _edges(bins: int) -> np.ndarray:
    if bins < 1:
        raise UserError(f"calibration needs at least one bin, got {bins}")
    return np.linspace(0.0, 1.0, bins + 1)


def _binned(
    confidence: np.ndarray, right: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean confidence and accuracy of each bin ``(low, high]``; the first takes its low."""
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    mean = np.bincount(place, confidence, bins) / some
    return count, mean, np.bincount(place, right, bins) / some


def _calibration_error(confidence: np.ndarray, right: np.ndarray, edges: np.ndarray) -> float:
    count, mean, share = _binned(confidence, right, edges)
    return float((count * np.abs(share - mean)).sum() / count.sum())
