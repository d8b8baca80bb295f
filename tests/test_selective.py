"""Selecting by teacher and student: thresholds by hand, micro-batches, gradients, arms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.models.heads import linear
from w2s_jax.objectives.selective import selective, selective_memory, signals, thresholds
from w2s_jax.train.step import make_step, start

MODEL = linear(3, 4)
RNG = np.random.default_rng(0)
BATCH = {
    "features": RNG.normal(size=(8, 4)).astype(np.float32),
    "label": RNG.dirichlet(np.full(3, 0.5), 8).astype(np.float32),
    "group": np.arange(8),
}
PARAMS = {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}


def begin(memory=None):
    tx = optax.sgd(0.1)
    return start(PARAMS, tx, 10, memory=selective_memory(3, 8) if memory is None else memory), tx


def test_signals_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    named, conf, unc = signals(logits, jnp.array([[0.1, 0.7, 0.2], [0.6, 0.2, 0.2]]))
    np.testing.assert_array_equal(named, [1, 0])
    np.testing.assert_allclose(conf, [0.7, 0.6], rtol=1e-6)
    np.testing.assert_allclose(unc, [1.5 * np.log(2) / np.log(3), 1.0], rtol=1e-5)


def test_thresholds_by_hand():
    memory = selective_memory(3)
    np.testing.assert_array_equal(thresholds(memory), np.zeros((2, 3)))
    memory |= {
        "mean": jnp.array([0.8, 0.5]),
        "by_class": jnp.array([[0.9, 0.6, 0.0], [0.2, 0.4, 0.0]]),
        "seen": jnp.array([2.0, 1.0, 0.0]),
    }
    want = [[0.8, 0.8 * 0.6 / 0.9, 0.8], [0.25, 0.5, 0.5]]
    np.testing.assert_allclose(thresholds(memory), want, rtol=1e-6)


def test_averages_follow_the_definition_over_three_updates():
    state, tx = begin()
    step = jax.jit(make_step(selective(MODEL, decay=0.9), tx))
    means, by_class = np.empty(0), np.full((2, 3), np.nan)
    for update in range(3):
        take = np.arange(8) if update else np.flatnonzero(BATCH["label"].argmax(-1) != 0)[:4]
        batch = {name: column[take] for name, column in BATCH.items()}
        named, conf, unc = map(
            np.asarray, signals(batch["features"] @ state.params["kernel"], batch["label"])
        )
        state, _ = step(state, batch, jax.random.key(0))
        now = np.array([conf.mean(), unc.mean()])
        means = now if update == 0 else 0.9 * means + 0.1 * now
        for y in set(named.tolist()):
            own = np.array([conf[named == y].mean(), unc[named == y].mean()])
            fresh = np.isnan(by_class[:, y]).any()
            by_class[:, y] = own if fresh else 0.9 * by_class[:, y] + 0.1 * own
    state, _ = step(state, BATCH, jax.random.key(0))  # takes in the third
    np.testing.assert_allclose(state.memory["mean"], means, rtol=1e-5)
    np.testing.assert_allclose(
        state.memory["by_class"], np.where(np.isnan(by_class), 0.0, by_class), rtol=1e-5
    )


def test_micro_batches_change_nothing():
    results = []
    for micro in (1, 4):
        state, tx = begin()
        step = jax.jit(make_step(selective(MODEL, decay=0.5), tx, micro=micro))
        for _ in range(3):
            state, metrics = step(state, BATCH, jax.random.key(0))
        results.append((state.params, state.memory, metrics["loss"], metrics["selected"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    picked = results[0][1]["picked"]
    assert picked.min() + picked.max() > 0 and picked.max() <= 3 and picked.sum() < 24


def test_loss_and_gradient_of_one_update_by_hand():
    memory = selective_memory(3) | {
        "mean": jnp.array([0.6, 0.5]),
        "by_class": jnp.array([[0.6, 0.6, 0.6], [0.5, 0.5, 0.5]]),
        "seen": jnp.ones(3),
    }
    state, _ = begin(memory)
    objective = selective(MODEL)

    def loss(params):
        return objective(params, state, BATCH, jax.random.key(0))[0]

    named, conf, unc = signals(BATCH["features"] @ PARAMS["kernel"], BATCH["label"])
    weights = np.where((conf >= 0.6) & (unc >= 0.5), conf * unc, 0.0)
    assert 0 < (weights > 0).sum() < 8

    def plain(params):  # the weights are numbers here
        return (
            soft_xent(BATCH["features"] @ params["kernel"], jax.nn.one_hot(named, 3)) * weights
        ).sum()

    np.testing.assert_allclose(loss(PARAMS), plain(PARAMS), rtol=1e-5)
    got, want = jax.grad(loss)(PARAMS), jax.grad(plain)(PARAMS)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-4, atol=1e-6)
    total = objective(PARAMS, state, BATCH, jax.random.key(0))[1]
    mean = selective(MODEL, per_selected=1.0)(PARAMS, state, BATCH, jax.random.key(0))[1]
    assert total == 8 and mean == pytest.approx(weights.sum(), rel=1e-5)


def test_arms_are_numbers():
    memory = selective_memory(3) | {
        "mean": jnp.array([0.6, 0.5]),
        "by_class": jnp.full((2, 3), 0.5),
        "seen": jnp.ones(3),
    }
    state, _ = begin(memory)

    def look(**numbers):
        out = selective(MODEL, **numbers)(PARAMS, state, BATCH, jax.random.key(0))
        return out[0], {name: float(a / b) for name, (a, b) in out[2].metrics.items()}

    everything, told = look(teacher=0.0, student=0.0)
    named = BATCH["label"].argmax(-1)
    plain = soft_xent(BATCH["features"] @ PARAMS["kernel"], jax.nn.one_hot(named, 3)).sum()
    np.testing.assert_allclose(everything, plain, rtol=1e-5)
    assert told["selected"] == told["confident"] == told["uncertain"] == 1
    both = look()[1]
    assert look(student=0.0)[1]["selected"] == both["confident"]
    assert look(teacher=0.0)[1]["selected"] == both["uncertain"]
    assert look(keep=0.0)[1]["selected"] == 0
    fixed = look(moving=0.0, fixed=(0.9, 0.0))[1]
    assert fixed["selected"] == (BATCH["label"].max(-1) >= 0.9).mean()


def test_a_teacher_that_is_always_as_sure_never_filters():
    state, tx = begin()
    named = jax.nn.one_hot(BATCH["label"].argmax(-1), 3)
    batch = BATCH | {"label": np.asarray(0.7 * named + 0.15 * (1 - named), np.float32)}
    step = jax.jit(make_step(selective(MODEL, decay=0.9, student=0.0), tx))
    for _ in range(20):
        state, metrics = step(state, batch, jax.random.key(0))
        assert metrics["selected"] == 1


def test_a_missing_memory_or_numbering_is_refused():
    state, _ = begin(())
    with pytest.raises(UserError, match="selective_memory"):
        selective(MODEL)(PARAMS, state, BATCH, jax.random.key(0))
    state, _ = begin()
    without = {name: column for name, column in BATCH.items() if name != "group"}
    with pytest.raises(UserError, match="group"):
        selective(MODEL)(PARAMS, state, without, jax.random.key(0))
    state, _ = begin(selective_memory(7))
    with pytest.raises(UserError, match=r"selective_memory\(7\) is for 7 classes, not"):
        selective(MODEL)(PARAMS, state, BATCH, jax.random.key(0))
