"""Rounding at random: the mean is exact, small updates arrive; bytes of what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.train import optim
from w2s_jax.train.fit import fit, make_step, start
from w2s_jax.train.optim import OPTIMIZERS, Tune, optimizer, state_bytes
from w2s_jax.train.precision import apply_updates, random_bits, round_randomly
from w2s_jax.types import Aux, Table

# finite numbers between two neighbours of bfloat16, at them, of both signs, tiny and huge
NUMBERS = [1.0, 1.001953125, -1.0030000, 3.14159265, -2.5e-5, 7e20, 0.0, -1e-30]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_mean_over_all_bits_is_exact(number):
    x = jnp.full(2**16, number, jnp.float32)
    rounded = round_randomly(x, jnp.arange(2**16, dtype=jnp.uint16))
    values = np.asarray(rounded.astype(jnp.float32), np.float64)
    assert len(np.unique(values)) <= 2
    assert values.mean() == np.float64(np.float32(number))


def test_what_is_not_finite_stays():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf], jnp.float32)
    out = round_randomly(x, jnp.full(3, 2**16 - 1, jnp.uint16))
    assert jnp.isnan(out[0]) and out[1] == jnp.inf and out[2] == -jnp.inf


def test_bits_are_uniform_and_independent_of_place_and_key():
    draws = [random_bits(jax.random.key(k), (500, 400)) for k in (0, 1)]
    a, b = (np.asarray(bits, np.float64) / 2**16 for bits in draws)
    error = 1 / np.sqrt(a.size)
    assert abs(a.mean() - 0.5) < 4 * error / np.sqrt(12)
    counts, _ = np.histogram(a, 256, (0, 1))
    assert ((counts - a.size / 256) ** 2 / (a.size / 256)).sum() < 256 + 5 * np.sqrt(512)
    for x, y in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a % 0.01, b % 0.01)):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4 * error
    flat = random_bits(jax.random.key(0), (200_000,)).reshape(500, 400)
    np.testing.assert_array_equal(flat, draws[0])  # whatever the shape: the layout is no part of it


def test_updates_below_the_resolution_arrive_on_average():
    """1 + 1000 x 1e-4 is 1.1; rounding to nearest would leave 1."""
    params = {"low": jnp.ones(4096, jnp.bfloat16), "high": jnp.ones(4)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-4), params)

    @jax.jit
    def many(params):
        def one(i, p):
            return apply_updates(p, updates, jax.random.fold_in(jax.random.key(0), i))

        return jax.lax.fori_loop(0, 1000, one, params)

    after = many(params)
    assert after["low"].dtype == jnp.bfloat16 and after["high"].dtype == jnp.float32
    np.testing.assert_allclose(after["low"].astype(jnp.float32).mean(), 1.1, rtol=1e-3)
    np.testing.assert_allclose(after["high"], 1.1, rtol=1e-4)


def test_rounding_depends_on_the_key_and_the_step():
    """Two updates of one run, and the first of two runs, round differently; a rerun does not."""

    def objective(params, state, batch, key):
        return (params["w"].astype(jnp.float32) * batch["weight"].sum()).sum(), 1.0, Aux()

    tx = optimizer(Tune(optimizer="sgd", lr=1e-3, clip=0.0, momentum=0.0), 10)
    state = start({"w": jnp.ones(512, jnp.bfloat16)}, tx, 10)
    batch = {"weight": jnp.ones(1)}
    step = jax.jit(make_step(objective, tx))

    def moved(state, seed):
        new, _ = step(state, batch, jax.random.key(seed))
        return new, np.asarray(new.params["w"] != state.params["w"])

    later, first = moved(state, 0)
    assert 0 < first.sum() < 512
    assert not np.array_equal(first, moved(state, 1)[1])
    assert not np.array_equal(first, moved(later, 0)[1])
    np.testing.assert_array_equal(first, moved(state, 0)[1])


def _regress(dtype, **tune):
    """Squared error of a linear fit before and after 300 updates of 1e-3 to weights near 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    true = rng.normal(size=16)
    weights = {"w": jnp.asarray(true + 0.1 * rng.choice([-1, 1], 16), dtype)}
    table = Table({"features": x, "score": (x @ true).astype(np.float32)})

    def objective(params, state, batch, key):
        errors = batch["features"] @ params["w"].astype(jnp.float32) - batch["score"]
        return (errors**2).sum(), jnp.float32(len(errors)), Aux()

    losses = []

    def look(state):
        losses.append(float(objective(state.params, state, table.batch(range(64)), None)[0]) / 64)
        return {}

    state = fit(objective, weights, table, Tune(lr=1e-3, batch=64, steps=300, **tune),
                jax.random.key(1), evaluate=look, eval_every=300, progress=False)  # fmt: skip
    assert state.params["w"].dtype == dtype
    return losses


def test_weights_and_moments_in_bfloat16_learn_like_float32():
    """An update of 1e-3 is below half of the distance, 1/128, of bfloat16 numbers near 1."""
    first, want = _regress(jnp.float32)
    assert want < 0.01 * first
    for options in ({}, {"moments": "mixed"}, {"moments": "bfloat16"}):
        before, after = _regress(jnp.bfloat16, **options)
        assert after < 0.02 * before, options


@pytest.mark.parametrize("moments", ["float32", "mixed", "bfloat16"])
def test_the_second_moment_reaches_its_value(moments):
    """After n gradients of 1 it is 1 - b2**n; bfloat16 rounded to nearest would stop near 0.5."""
    tx = optimizer(Tune(moments=moments, clip=0.0), 10)
    params = {"w": jnp.zeros(2048)}

    @jax.jit
    def many(state):
        def one(_, state):
            return tx.update({"w": jnp.ones(2048)}, state, params)[1]

        return jax.lax.fori_loop(0, 3000, one, state)

    state = many(tx.init(params))
    found = jax.tree_util.tree_leaves_with_path(state)
    (nu,) = [leaf for path, leaf in found if "nu" in jax.tree_util.keystr(path)]
    assert nu.dtype == (jnp.bfloat16 if moments == "bfloat16" else jnp.float32)
    np.testing.assert_allclose(nu.astype(jnp.float32).mean(), 1 - 0.999**3000, rtol=3e-3)


def _documented():
    """The table of the module: optimizer -> bytes per weight, by moments."""
    lines = [line for line in optim.__doc__.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


@pytest.mark.parametrize("moments", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_per_weight_are_those_of_the_table(name, moments):
    said = _documented()[name][moments]
    if said == "-":
        with pytest.raises(UserError, match="keeps no moments"):
            Tune(optimizer=name, moments=moments)
        return
    params = {"w": jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)}
    tx = optimizer(Tune(optimizer=name, moments=moments), 10, {"w": ("embed", "ffn")})
    assert round(state_bytes(tx, params) / params["w"].size, 1) == float(said)


def test_unknown_moments_are_refused():
    with pytest.raises(UserError, match="moments 'int8' is unknown"):
        Tune(moments="int8")  # type: ignore[arg-type]
