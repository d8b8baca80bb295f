"""Schedules against hand values, update rules against their definitions, bad numbers refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.errors import UserError
from w2s_jax.train.optim import OPTIMIZERS, Tune, optimizer, schedule

AXES = {
    "embed": ("vocab", "embed"),
    "layers": {
        "q": ("layers", "embed", "heads"),
        "norm": ("layers", "norm"),
        "bias": ("layers", "heads"),
    },
}


def move(tx, grads, params):
    """The first update."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


def weights(key=0, layers=3):
    rng = np.random.default_rng(key)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": draw(10, 4),
        "layers": {"q": draw(layers, 4, 6), "norm": draw(layers, 4), "bias": draw(layers, 6)},
    }


@pytest.mark.parametrize(
    "kind, golden",
    [
        # 10 updates, warm-up over 2, final .2, peak 1: at counts 0, 1, 2, 6, 9, 10
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.6, 0.3, 0.2]),  # 1 - .8 (n - 2) / 8
        # .2 + .4 (1 + cos(pi p)), p = 0, .5, .875, 1
        ("cosine", [0.5, 1.0, 1.0, 0.6, 0.2 + 0.4 * (1 + np.cos(np.pi * 7 / 8)), 0.2]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.4, 0.2]),  # from 6: 1 - .8 (n - 6) / 4
    ],
)
def test_schedules(kind, golden):
    rate = schedule(Tune(lr=1.0, warmup=0.2, schedule=kind, decay_from=0.6, final=0.2), 10)
    np.testing.assert_allclose([rate(n) for n in (0, 1, 2, 6, 9, 10)], golden, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak_and_stays_at_the_end():
    rate = schedule(Tune(lr=3.0, schedule="linear"), 4)
    np.testing.assert_allclose([rate(n) for n in (0, 2, 4, 9)], [3.0, 1.5, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("rows, want", [(100, 13), (96, 12), (1, 1)])
def test_total_counts_started_batches(rows, want):
    assert Tune(batch=16, epochs=2).total(rows) == want
    assert Tune(batch=16, epochs=2, steps=7).total(rows) == 7


def test_total_of_a_fraction_of_an_epoch():
    assert Tune(batch=10, epochs=0.3).total(100) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_may_be_traced(name):
    """One program over learning rates gives what separate programs give."""
    params, grads = weights(0), weights(1)

    def first_update(lr):
        tx = optimizer(Tune(optimizer=name, schedule="cosine"), 10, AXES, lr=lr)
        return move(tx, grads, params)

    def close(a, b):  # Newton-Schulz iterations amplify the last bit
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)

    many = jax.jit(jax.vmap(first_update))(jnp.asarray([0.1, 0.3]))
    for i, lr in enumerate((0.1, 0.3)):
        one = jax.jit(first_update)(lr)
        jax.tree.map(lambda m, o, i=i: close(m[i], o), many, one)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd"])
def test_only_matrices_decay(name):
    """With zero gradients all that moves is what decays."""
    params = weights()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer(Tune(optimizer=name, weight_decay=0.5, lr=0.1), 10, AXES)
    updates = move(tx, zeros, params)
    np.testing.assert_allclose(updates["layers"]["q"], -0.05 * params["layers"]["q"], rtol=1e-6)
    np.testing.assert_array_equal(updates["layers"]["norm"], 0.0)
    np.testing.assert_array_equal(updates["layers"]["bias"], 0.0)
    if name == "muon":  # the embedding is Adam's, without decay
        np.testing.assert_array_equal(updates["embed"], 0.0)


def test_decay_without_axes_goes_by_rank():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = optimizer(Tune(weight_decay=1.0, lr=0.1), 10)
    updates = move(tx, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["w"], -0.1)
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_muon_treats_a_stack_as_separate_matrices():
    """Stacked [L, in, out] moves exactly as L separate [in, out] do, over several updates."""
    tune = Tune(optimizer="muon", lr=0.1, clip=0.0)
    stacked = weights()["layers"]["q"]
    tx = optimizer(tune, 10, {"q": ("layers", "embed", "heads")})
    tx_one = optimizer(tune, 10, {"q": ("embed", "heads")})
    state, ones = tx.init({"q": stacked}), [tx_one.init({"q": w}) for w in stacked]
    tx_update, one_update = jax.jit(tx.update), jax.jit(tx_one.update)
    for seed in range(3):
        grads = weights(seed + 5)["layers"]["q"]
        update, state = tx_update({"q": grads}, state, {"q": stacked})
        for i, grad in enumerate(grads):
            one, ones[i] = one_update({"q": grad}, ones[i], {"q": stacked[i]})
            np.testing.assert_allclose(update["q"][i], one["q"], rtol=1e-4, atol=1e-6)


def test_muon_reshapes_heads_and_leaves_edges_to_adam():
    """[embed, heads, head_dim] moves as [embed, heads * head_dim], its mirror too."""
    tune = Tune(optimizer="muon", lr=0.1, adam_scale=0.5, clip=0.0)
    grads = weights(3)["embed"].reshape(10, 4)
    names = {"q": ("embed", "heads", "head_dim"), "o": ("heads", "head_dim", "embed")}
    flat = optimizer(tune, 10, {"q": ("embed", "heads"), "o": ("heads", "embed")})
    deep = optimizer(tune, 10, names)
    f = {"q": grads, "o": grads.T}
    d = {"q": grads.reshape(10, 2, 2), "o": grads.T.reshape(2, 2, 10)}
    one = move(flat, f, f)
    two = move(deep, d, d)
    np.testing.assert_allclose(two["q"].reshape(10, 4), one["q"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(two["o"].reshape(4, 10), one["o"], rtol=1e-4, atol=1e-5)

    for edge in (("vocab", "embed"), ("embed", "vocab"), ("embed", "classes"), ("embed", None)):
        tx = optimizer(tune, 10, {"w": edge})
        update = move(tx, {"w": grads}, {"w": grads})
        # The first update of Adam with Nesterov momentum, times adam_scale * lr:
        # b1 (1 - b1) g / (1 - b1^2) + (1 - b1) g / (1 - b1), over |g|
        golden = 0.5 * 0.1 * (0.9 * 0.1 / 0.19 + 1)
        np.testing.assert_allclose(np.abs(update["w"]), golden, rtol=1e-4)


def test_clip_scales_to_the_global_norm():
    params = {"w": jnp.zeros(2)}
    grads = {"w": jnp.asarray([3.0, 4.0])}
    tx = optimizer(Tune(optimizer="sgd", lr=1.0, clip=1.0), 10)
    np.testing.assert_allclose(move(tx, grads, params)["w"], [-0.6, -0.8])
    tx = optimizer(Tune(optimizer="sgd", lr=1.0, clip=0.0), 10)
    np.testing.assert_allclose(move(tx, grads, params)["w"], [-3.0, -4.0])


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    start, rng = np.ones((3, 4), np.float32), np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
    tx = optimizer(Tune(lr=0.1, b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.3, clip=0.0), 10)
    params = jnp.asarray(start)
    state = tx.init(params)
    for _ in range(4):
        grad = rng.normal(size=(3, 4)).astype(np.float32)
        weight.grad = torch.tensor(grad)
        theirs.step()
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"batch": 0},
        {"batch": 8, "micro": 3},
        {"warmup": 1.5},
        {"optimizer": "adam", "weight_decay": 0.1},
    ],
)
def test_bad_numbers_are_one_line(bad):
    with pytest.raises(UserError, match="|".join(bad)) as error:
        Tune(**bad)
    assert "\n" not in str(error.value)


def test_muon_needs_axes():
    with pytest.raises(UserError, match="axes"):
        optimizer(Tune(optimizer="muon"), 10)
