"""Attention in tiles is attention: values and gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.models import backends, tiles


def example(length, heads=4, groups=2, dtype=jnp.float32, batch=3):
    keys = jax.random.split(jax.random.key(length), 4)
    q = jax.random.normal(keys[0], (batch, length, heads, 8), dtype)
    k, v = jax.random.normal(keys[1], (2, batch, length, groups, 8), dtype)
    weights = jax.random.normal(keys[2], q.shape)
    segment = jnp.sort(jax.random.randint(keys[3], (batch, length), 0, 3), axis=1)
    return q, k, v, weights, segment


def both(attend, args, weights):
    def loss(q, k, v):
        return (attend(q, k, v) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


def compare(got, want, rtol=1e-4, atol=2e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=rtol, atol=1e-3)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("length", [1, 7, 48, 128, 192, 208])
@pytest.mark.parametrize("segments", [False, True])
def test_values_and_gradients(length, segments):
    q, k, v, weights, segment = example(length)
    given = segment if segments else None
    got = both(lambda *x: tiles.causal(*x, given), (q, k, v), weights)
    compare(got, both(lambda *x: backends.xla(*x, given), (q, k, v), weights))


@pytest.mark.parametrize("length", [64, 256])
def test_what_lies_beyond_a_rows_length_matters_nowhere(length):
    q, k, v, weights, _ = example(length)
    lengths = jnp.array([length, length // 3, 0])
    real = (jnp.arange(length)[None] < lengths[:, None])[..., None, None]
    weights = weights * real
    got = both(lambda *x: tiles.causal(*x, None, lengths), (q, k, v), weights)
    compare(got, both(lambda *x: backends.xla(*x, None), (q, k, v), weights))
    noise = jnp.where(real, 0.0, 9.0)
    same = both(
        lambda *x: tiles.causal(*x, None, lengths), (q + noise, k + noise[:, :, :2], v), weights
    )
    np.testing.assert_allclose(same[0], got[0], rtol=1e-5)


def test_bfloat16_keeps_its_dtype_and_softmax_in_float32():
    q, k, v, weights, _ = example(128, dtype=jnp.bfloat16)
    out = tiles.causal(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = backends.xla(*(x.astype(jnp.float32) for x in (q, k, v)), None)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=3e-2)
    grads = both(tiles.causal, (q, k, v), weights)[1]
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_vmap_over_runs_equals_a_loop():
    q, k, v, _, _ = example(64)
    runs = jnp.stack([q, -q])
    got = jax.vmap(lambda q: tiles.causal(q, k, v))(runs)
    for a, b in zip(got, runs, strict=True):
        np.testing.assert_allclose(a, tiles.causal(b, k, v), rtol=1e-5, atol=1e-6)


def test_no_scores_of_the_whole_batch():
    q, k, v, weights, _ = example(256, batch=5)
    text = str(jax.make_jaxpr(jax.grad(lambda q: (tiles.causal(q, k, v) * weights).sum()))(q))
    assert "256,256" not in text and "2,64,256" in text  # one tile: 2 heads, a block, its keys


@pytest.mark.parametrize(
    "length,count", [(1, 1), (64, 1), (128, 2), (192, 3), (256, 4), (2048, 4), (97, 1), (208, 4)]
)
def test_rows_are_cut_evenly(length, count):
    assert tiles.blocks(length) == count
