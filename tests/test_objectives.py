"""Objectives by hand: weights, schedules at the present progress, packing, micro-batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.data.packing import pack
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import aux_confidence, ramp, soft_xent
from w2s_jax.models.heads import linear
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import at, classify, language
from w2s_jax.train.fit import make_step, start
from w2s_jax.types import Model, Output, State

PROBE = linear(2, 2)
EYE = {"kernel": jnp.eye(2)}  # the features are the logits
KEY = jax.random.key(0)


def state(step: int = 0, steps: int = 10, params=EYE, memory=()) -> State:
    return State(jnp.int32(step), jnp.int32(steps), params, (), (), memory)


def batch() -> dict:
    """Logits whose softmax is (3/4, 1/4) and (1/5, 4/5), labels (1, 0) and (1/2, 1/2)."""
    logits = np.log(np.array([[3.0, 1.0], [1.0, 4.0]], np.float32))
    return {"features": logits, "label": np.array([[1, 0], [0.5, 0.5]], np.float32)}


LOSSES = np.array([-np.log(3 / 4), -0.5 * (np.log(1 / 5) + np.log(4 / 5))])


def test_classify_sums_the_losses_of_its_rows() -> None:
    total, weight, aux = classify(PROBE, soft_xent)(EYE, state(memory=3), batch(), KEY)
    np.testing.assert_allclose(total, LOSSES.sum(), rtol=1e-6)
    assert float(weight) == 2 and aux.memory == 3
    right, count = aux.metrics["agreement"]
    assert (float(right), float(count)) == (1, 2), "a tie's argmax is class 0, the model says 1"


def test_classify_weighs_rows() -> None:
    rows = batch() | {"weight": np.array([0.25, 2.0], np.float32)}
    total, weight, aux = classify(PROBE, soft_xent)(EYE, state(), rows, KEY)
    np.testing.assert_allclose(total, 0.25 * LOSSES[0] + 2 * LOSSES[1], rtol=1e-6)
    assert float(weight) == 2.25
    assert [float(x) for x in aux.metrics["agreement"]] == [0.25, 2.25]


def test_a_row_of_weight_zero_is_a_row_left_out() -> None:
    rows = batch() | {"weight": np.array([1.0, 0.0], np.float32)}
    first = {name: column[:1] for name, column in batch().items()}
    both = [classify(PROBE, soft_xent)(EYE, state(), b, KEY)[:2] for b in (rows, first)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-6)


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (1, 0.25), (2, 0.5), (9, 0.5)])
def test_schedules_have_their_value_at_the_progress_of_the_run(step, alpha) -> None:
    bound = partial(aux_confidence, alpha=ramp(0.0, 0.5, over=0.2))
    now = classify(PROBE, bound)(EYE, state(step, steps=10), batch(), KEY)[0]
    fixed = aux_confidence(batch()["features"], batch()["label"], alpha=alpha).sum()
    np.testing.assert_allclose(now, fixed, rtol=1e-6)


def test_at_touches_schedules_only() -> None:
    assert at(soft_xent, jnp.float32(0.5)) is soft_xent

    def loss(a, b, *, scale, curve):
        return a, b, scale, curve

    curve = lambda x: 100 * x  # noqa: E731  an ordinary function: not a schedule
    bound = partial(loss, 1, scale=ramp(0.0, 1.0, over=1.0), curve=curve)
    assert at(bound, jnp.float32(0.5))(2) == (1, 2, 0.5, curve)


def test_labels_are_needed() -> None:
    with pytest.raises(UserError, match="reads column 'features'"):
        classify(PROBE, soft_xent)(EYE, state(), {"label": batch()["label"]}, KEY)


def test_what_an_objective_lacks_is_said() -> None:
    tokens = {"tokens": np.zeros((1, 3), np.int32)}
    with pytest.raises(UserError, match="column 'label', the batch has .'features'"):
        classify(PROBE, soft_xent)(EYE, state(), {"features": batch()["features"]}, KEY)
    with pytest.raises(UserError, match="column 'mask', the batch has .'tokens'"):
        language(bigram())(jnp.log(TABLE), state(), tokens, KEY)
    with pytest.raises(UserError, match="needs class logits"):
        classify(bigram(), soft_xent)(jnp.log(TABLE), state(), tokens, KEY)
    with pytest.raises(UserError, match="needs a model of tokens"):
        language(PROBE)(EYE, state(), batch(), KEY)


# A bigram model: token t predicts u with chance TABLE[t, u].
TABLE = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]], np.float32)


def bigram() -> Model:
    def apply(params, tokens, *, segment=None, position=None):
        return Output(hidden=jax.nn.one_hot(tokens, 3), unembed=params)

    return Model(lambda key: jnp.log(TABLE), apply, (None, None), None)


def test_language_by_hand() -> None:
    rows = {
        "tokens": np.array([[0, 1, 2], [2, 0, 0]], np.int32),
        "mask": np.array([[1, 1, 0.5], [0, 2, 0]], np.float32),
    }
    objective, params = language(bigram()), jnp.log(jnp.asarray(TABLE))
    total, weight, aux = objective(params, state(memory=1), rows, KEY)
    # 0 -> 1 with weight 1, 1 -> 2 with 1/2, 2 -> 0 with 2; a row's first token is never a target
    want = -(np.log(0.25) + 0.5 * np.log(0.8) + 2 * np.log(0.6))
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert float(weight) == 3.5 and aux.memory == 1
    weighed = rows | {"weight": np.array([0.0, 3.0], np.float32)}
    total, weight, _ = objective(params, state(), weighed, KEY)
    np.testing.assert_allclose(total, -6 * np.log(0.6), rtol=1e-6)
    assert float(weight) == 6


CONFIG = Config(vocab=12, width=8, layers=1, heads=2, max_length=16)
DECODER = transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 2.0 * leaf, DECODER.init(jax.random.key(3)))


def separate(params, documents) -> tuple[float, float]:
    """The weighted negative log-likelihood, one document a row, and the weight."""
    longest = max(len(ids) for ids, _ in documents)
    tokens = np.array([ids + [0] * (longest - len(ids)) for ids, _ in documents])
    logits = decode(jax.jit(DECODER.apply)(params, tokens))
    logps = np.asarray(jax.nn.log_softmax(logits))
    total = weight = 0.0
    for row, (ids, weights) in enumerate(documents):
        for t in range(1, len(ids)):
            total -= weights[t] * logps[row, t - 1, ids[t]]
            weight += weights[t]
    return total, weight


def test_packed_documents_are_documents_on_their_own(params) -> None:
    rng = np.random.default_rng(0)
    sizes = (5, 3, 7, 2, 8, 4)
    documents = [
        (rng.integers(0, 12, n).tolist(), rng.choice([0.1, 1.0], n).tolist()) for n in sizes
    ]
    rows = pack(documents, 10)
    assert len(rows) < len(documents) and np.asarray(rows["segment"]).max() > 1
    objective = jax.jit(language(DECODER))
    total, weight, _ = objective(params, state(), rows.batch(np.arange(len(rows))), KEY)
    want = separate(params, documents)
    np.testing.assert_allclose((total, weight), want, rtol=1e-5)


def rows_of_text() -> dict:
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.integers(0, 12, (8, 6)).astype(np.int32),
        "mask": (rng.random((8, 6)) < 0.4).astype(np.float32) * rng.random((8, 1), np.float32),
        "weight": rng.random(8, np.float32),
    }


def rows_of_features() -> dict:
    rng = np.random.default_rng(2)
    return {
        "features": rng.normal(size=(8, 2)).astype(np.float32),
        "label": rng.dirichlet([1, 1], 8).astype(np.float32),
        "weight": rng.random(8, np.float32),
    }


@pytest.mark.parametrize("kind", ["language", "classify"])
def test_micro_batches_do_not_change_the_update(kind, params) -> None:
    """Rows of very different weight: sums are divided once, after they are added."""
    if kind == "language":
        objective, begin, rows = language(DECODER), params, rows_of_text()
    else:
        objective, begin, rows = classify(PROBE, soft_xent), EYE, rows_of_features()
    tx = optax.sgd(1.0)
    results = []
    for micro in (1, 4):
        step = jax.jit(make_step(objective, tx, micro=micro))
        new, metrics = step(start(begin, tx, 10), rows, KEY)
        results.append((new.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)
    total, weight, _ = jax.jit(objective)(begin, state(), rows, KEY)
    np.testing.assert_allclose(results[0][1]["loss"], total / weight, rtol=1e-5)
