"""A vocabulary split over devices: logits stay where their part of the matrix is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from w2s_jax.mesh import batch_sharding, make_mesh, rules_context, shardings
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language
from w2s_jax.types import State

# 96 and its share of 24 are sizes of nothing else
VOCAB, SHARE, BATCH, LENGTH = 96, 24, 4, 10


def _world(tie):
    config = Config(vocab=VOCAB, width=16, layers=1, heads=4, ffn=40, max_length=LENGTH, tie=tie)
    model = transformer(config)
    objective = language(model)

    def loss(params, batch):
        state = State(jnp.int32(0), jnp.int32(1), None, ())
        total, weight, _ = objective(params, state, batch, jax.random.key(2))
        return total / weight

    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCAB)
    batch = {"tokens": tokens, "mask": jnp.ones((BATCH, LENGTH)).at[:, 0].set(0.0)}
    return model, jax.value_and_grad(loss), batch


def _shapes(text, operation=""):
    """Shapes of the results of the program's instructions."""
    found = re.findall(rf"= \(?\w+\[([\d,]+)\][^=]*? {operation}[\w-]*\(", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


@pytest.mark.parametrize("tie", [True, False])
def test_no_logits_are_gathered(tie):
    model, grad, batch = _world(tie)
    params = model.init(jax.random.key(0))
    mesh = make_mesh("data=2,tensor=4")
    with rules_context(mesh):
        places = shardings(model.axes, mesh, params)
        weights = jax.device_put(params, places)
        placed = jax.device_put(batch, batch_sharding(mesh))
        scalar = NamedSharding(mesh, jax.sharding.PartitionSpec())
        run = jax.jit(grad, out_shardings=(scalar, places)).lower(weights, placed).compile()
        got = run(weights, placed)
    text = run.as_text()
    assert [s for s in _shapes(text) if SHARE in s], "the program has no share of the vocabulary"
    assert not [s for s in _shapes(text) if VOCAB in s]
    assert not [s for s in _shapes(text, "all-gather") if SHARE in s]
    want = jax.jit(grad)(params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(got),
        jax.device_get(want),
    )
