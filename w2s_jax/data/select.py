"""Choosing and cleaning rows by what a simple probe of their features says of their labels."""

from __future__ import annotations

from typing import Literal

import numpy as np

from w2s_jax.errors import UserError


def label_probe(
    features: np.ndarray,
    labels: np.ndarray,
    kind: Literal["knn", "logistic"],
    *,
    neighbours: int = 50,
    penalty: float = 1e-3,
) -> np.ndarray:
    """What a probe fitted to noisy labels predicts for the same rows.

    EleutherAI/w2s: "knn" is the mean label of the ``neighbours`` nearest rows, the row itself left
    out; "logistic" is L2-regularised logistic regression on the argmax labels, its penalty per row.

    Args:
      features: [N,D] float.
      labels: [N,2] probabilities.

    Returns:
      Probabilities [N,2] float32.

    Raises:
      UserError: fewer rows than neighbours, a single class, or an unknown kind.
    """
    x = features - features.mean(0)
    x = x / np.maximum(features.std(0), 1e-6)
    if kind == "knn":
        if len(x) <= neighbours:
            raise UserError(f"kNN label probe: {len(x)} rows for {neighbours} neighbours")
        from sklearn.neighbors import NearestNeighbors

        nearest = NearestNeighbors(n_neighbors=neighbours).fit(x).kneighbors(return_distance=False)
        return labels[nearest].mean(1).astype(np.float32)
    if kind == "logistic":
        from sklearn.linear_model import LogisticRegression

        hard = labels.argmax(-1)
        if len(set(hard.tolist())) < 2:
            raise UserError("logistic label probe: the labels name a single class")
        fitted = LogisticRegression(C=1.0 / (penalty * len(x)), max_iter=2000).fit(x, hard)
        return fitted.predict_proba(x).astype(np.float32)
    raise UserError(f"label probe {kind!r} is unknown; choose knn or logistic")


def most_agreeing(probe: np.ndarray, labels: np.ndarray, keep: int) -> np.ndarray:
    """The rows on which two label columns [N,C] differ least: ``keep`` indices, ascending.

    Of rows that differ equally the earlier are kept.

    Raises:
      UserError: ``keep`` is not between 1 and N.
    """
    if not 1 <= keep <= len(labels):
        raise UserError(f"filtering by a label probe: cannot keep {keep} of {len(labels)} rows")
    distance = np.abs(probe - labels).sum(-1)
    return np.sort(np.argsort(distance, kind="stable")[:keep])
