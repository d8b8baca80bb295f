"""Label probes and row choice on small cases worked out by hand."""

import numpy as np
import pytest

from w2s_jax.data.select import label_probe, most_agreeing
from w2s_jax.errors import UserError

pytest.importorskip("sklearn")


def column(positives) -> np.ndarray:
    positives = np.asarray(positives, np.float32)
    return np.stack([1 - positives, positives], axis=1)


def test_knn_is_the_mean_of_the_neighbours_without_the_row_itself() -> None:
    # Two clusters of three. In each the odd label out is outvoted by its two neighbours.
    features = np.array([[0.0], [0.1], [0.3], [10.0], [10.1], [10.3]])
    positives = np.array([1.0, 0.0, 0.5, 0.2, 0.4, 0.9])
    found = label_probe(features, column(positives), "knn", neighbours=2)
    want = [0.25, 0.75, 0.5, 0.65, 0.55, 0.3]
    np.testing.assert_allclose(found, column(want), rtol=1e-6)
    assert found.dtype == np.float32


def test_knn_leaves_out_the_row_itself_among_copies() -> None:
    features = np.array([[0.0], [0.0], [5.0], [5.0]])
    found = label_probe(features, column([1.0, 0.0, 1.0, 1.0]), "knn", neighbours=1)
    np.testing.assert_allclose(found[:, 1], [0, 1, 1, 1])


def test_features_count_alike_whatever_their_scale() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 3)), column(rng.random(40))
    scaled = features * [1e3, 1.0, 1e-3] + [5.0, -1e3, 0.0]
    constant = np.concatenate([scaled, np.full((40, 1), 7.0)], axis=1)
    for kind in ("knn", "logistic"):
        plain = label_probe(features, labels, kind, neighbours=5)
        same = label_probe(constant, labels, kind, neighbours=5)
        np.testing.assert_allclose(same, plain, atol=1e-4)


@pytest.mark.parametrize("kind", ["knn", "logistic"])
def test_flipped_labels_are_seen_through(kind) -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(200) % 2
    features = rng.normal(size=(200, 4)) + 3.0 * truth[:, None]
    flipped = rng.choice(200, 20, replace=False)
    weak = truth.copy()
    weak[flipped] = 1 - weak[flipped]
    labels = column(weak)
    probe = label_probe(features, labels, kind, neighbours=15)
    np.testing.assert_allclose(probe.sum(1), 1, rtol=1e-5)
    assert (probe.argmax(1) == truth).mean() > 0.97 > (weak == truth).mean()
    kept = most_agreeing(probe, labels, 180)
    assert len(set(kept) & set(flipped)) <= 2, "filtering drops what was flipped"


def test_the_penalty_is_per_row() -> None:
    """Every row twice is the same problem: the fitted probabilities stay."""
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(30, 2)), column(rng.random(30))
    once = label_probe(features, labels, "logistic", penalty=0.1)
    twice = label_probe(np.tile(features, (2, 1)), np.tile(labels, (2, 1)), "logistic", penalty=0.1)
    np.testing.assert_allclose(twice[:30], once, atol=1e-4)
    strong = label_probe(features, labels, "logistic", penalty=1e4)
    share = labels.argmax(1).mean()
    np.testing.assert_allclose(strong[:, 1], share, atol=1e-2)


def test_most_agreeing_keeps_order_and_prefers_earlier_rows() -> None:
    probe = column([0.9, 0.1, 0.5, 0.5, 0.5])
    labels = column([0.1, 0.1, 0.75, 0.25, 1.0])
    # differences 1.6, 0, 0.5, 0.5, 1.0
    assert most_agreeing(probe, labels, 1).tolist() == [1]
    assert most_agreeing(probe, labels, 2).tolist() == [1, 2]
    assert most_agreeing(probe, labels, 4).tolist() == [1, 2, 3, 4]
    assert most_agreeing(probe, labels, 5).tolist() == [0, 1, 2, 3, 4]


def test_bad_input_is_one_line() -> None:
    features, labels = np.zeros((4, 2)), column([0, 0, 0, 0])
    with pytest.raises(UserError, match="4 rows for 4 neighbours"):
        label_probe(features, labels, "knn", neighbours=4)
    with pytest.raises(UserError, match="single class"):
        label_probe(features, labels, "logistic")
    with pytest.raises(UserError, match="'svm' is unknown"):
        label_probe(features, labels, "svm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="keep 5 of 4 rows"):
        most_agreeing(labels, labels, 5)
