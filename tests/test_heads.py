"""Heads: zero at the start, blind to padding, no leaking gradients, likelihood features by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.models import heads
from w2s_jax.types import Model, Output, forward

VOCABULARY, WIDTH = 7, 5


def body() -> Model:
    """A causal token model: the running sum, within a segment, of embeddings."""

    def init(key):
        one, two = jax.random.split(key)
        return {
            "embed": jax.random.normal(one, (VOCABULARY, WIDTH)),
            "unembed": jax.random.normal(two, (WIDTH, VOCABULARY)),
        }

    def apply(params, tokens, segment=None, position=None):
        segment = jnp.ones_like(tokens) if segment is None else segment
        same = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
        seen = jnp.tril(same.astype(jnp.float32))
        hidden = jnp.tanh(jnp.einsum("bts,bsd->btd", seen, params["embed"][tokens]))
        return Output(hidden=hidden, unembed=params["unembed"])

    return Model(init, apply, {"embed": ("vocab", "embed"), "unembed": ("embed", "vocab")}, None)


def rows(padding: int = 0, segment: int = 1, left: int = 0):
    """Two rows of 5 and 3 tokens; token 0 is a real word here. All but the first are masked in."""
    lengths, length = (5, 3), 5 + padding + left
    tokens, segments, mask = (np.zeros((2, length), np.int32) for _ in range(3))
    for row, size in enumerate(lengths):
        here = slice(left, left + size)
        tokens[row, here] = [[3, 0, 6, 1, 0], [2, 5, 0]][row]
        segments[row, here] = segment
        mask[row, left + 1 : left + size] = 1
    position = np.maximum(np.arange(length) - left, 0)[None].repeat(2, 0).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens),
        "segment": jnp.asarray(segments),
        "position": jnp.asarray(position),
        "mask": jnp.asarray(mask, jnp.float32),
    }


def trained(model: Model, seed: int = 0):
    """Parameters whose head is not zero."""
    params = model.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params["head"])
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    head = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return {"body": params["body"], "head": jax.tree.unflatten(tree, head)}


@pytest.mark.parametrize("feature", heads.FEATURES)
def test_logits_start_at_exactly_zero(feature):
    model = heads.classifier(body(), feature=feature)
    params = model.init(jax.random.key(0))
    logits = forward(model, params, rows()).logits
    assert logits.shape == (2, 2) and logits.dtype == jnp.float32
    assert not logits.any()
    assert jax.tree.structure(params) == jax.tree.structure(
        model.axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


@pytest.mark.parametrize("feature", heads.FEATURES)
@pytest.mark.parametrize("change", [{"padding": 4}, {"segment": 3}, {"left": 2, "padding": 1}])
def test_padding_and_segment_number_change_nothing(feature, change):
    model = heads.classifier(body(), feature=feature)
    params = trained(model)
    plain = forward(model, params, rows()).logits
    assert np.abs(plain).min() > 1e-3
    np.testing.assert_allclose(forward(model, params, rows(**change)).logits, plain, rtol=1e-5)


def test_the_last_token_is_found_by_segment_not_by_id():
    model = heads.classifier(body(), feature="last")
    params = trained(model)
    hidden = body().apply(params["body"], rows()["tokens"], rows()["segment"]).hidden
    want = jnp.stack([hidden[0, 4], hidden[1, 2]]) @ params["head"]["kernel"]  # both are id 0
    np.testing.assert_allclose(forward(model, params, rows(3)).logits, want, rtol=1e-5)


def test_mean_feature_averages_masked_tokens_only():
    model = heads.classifier(body(), feature="mean")
    params = trained(model)
    hidden = body().apply(params["body"], rows()["tokens"], rows()["segment"]).hidden
    want = jnp.stack([hidden[0, 1:5].mean(0), hidden[1, 1:3].mean(0)]) @ params["head"]["kernel"]
    np.testing.assert_allclose(forward(model, params, rows(2)).logits, want, rtol=1e-5)


def test_likelihood_features_by_hand():
    nll = jnp.array([[0.0, np.log(2.0), np.log(4.0), 9.0]])
    got = heads.surprise(nll, jnp.array([[1.0, 1.0, 1.0, 0.0]]))
    # sum exp(2 nll) = 1 + 4 + 16; mean nll = (0 + log 2 + 2 log 2) / 3 = log 2
    want = [[(np.log(21.0) / 2 - 3) / 3, 2 * np.log(2.0) - 0.7, 1.0]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_empty_mask_has_no_surprise_and_no_gradient():
    nll, mask = jnp.ones((2, 3)), jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    value, grads = jax.value_and_grad(lambda x: heads.surprise(x, mask).sum())(nll)
    assert jnp.isfinite(value) and not heads.surprise(nll, mask)[1].any()
    assert (grads[0, :2] > 0).all() and not grads[0, 2] and not grads[1].any()


def test_likelihood_logits_by_hand_on_a_uniform_body():
    model = heads.classifier(body(), feature="likelihood")
    params = model.init(jax.random.key(0))
    params["body"]["unembed"] = jnp.zeros((WIDTH, VOCABULARY))  # every token costs log 7 nats
    params["head"]["likelihood"] = jnp.array([0.1, 0.2, -0.3])
    counts, nats = np.array([4, 2]), np.log(7.0)
    worst = np.log(counts * 49.0) / 2
    s = 20 * (0.1 * (worst - 3) / 3 + 0.2 * (2 * nats - 0.7) - 0.3)
    got = forward(model, params, rows(2)).logits
    np.testing.assert_allclose(got, np.stack([-s / 2, s / 2], -1), rtol=1e-5)


def loss(model, batch):
    labels = jnp.array([[1.0, 0.0], [0.2, 0.8]])
    return lambda p: -(jax.nn.log_softmax(forward(model, p, batch).logits) * labels).sum()


@pytest.mark.parametrize("feature", heads.FEATURES)
def test_probe_gives_the_body_no_gradient_and_the_full_head_does(feature):
    for probe in (True, False):
        model = heads.classifier(body(), feature=feature, probe=probe)
        grads = jax.grad(loss(model, rows(1)))(trained(model))
        moved = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["body"]))
        assert (moved == 0) is probe
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["head"]))


@pytest.mark.parametrize("feature", heads.FEATURES)
def test_an_empty_mask_gives_finite_logits_and_gradients(feature):
    model = heads.classifier(body(), feature=feature)
    batch = rows(1)
    batch["mask"] = batch["mask"].at[1].set(0)
    value, grads = jax.value_and_grad(loss(model, batch))(trained(model))
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("feature", ["last", "mean"])
def test_a_linear_model_on_cached_features_is_the_probe(feature):
    model = heads.classifier(body(), classes=3, feature=feature, probe=True)
    params = trained(model)
    cached = heads.features(model, params, rows(1))
    probe = heads.linear(3, WIDTH)
    got = forward(probe, {"kernel": params["head"]["kernel"]}, {"features": cached}).logits
    np.testing.assert_allclose(got, forward(model, params, rows(1)).logits, rtol=1e-5)


def test_cached_likelihood_features_train_like_the_head_under_adam():
    import optax

    model = heads.classifier(body(), feature="likelihood", probe=True)
    start = model.init(jax.random.key(3))
    cached = {"features": heads.features(model, start, rows(1))}
    linear = heads.linear(2, 3 + WIDTH)

    def after(model, params, batch, steps=5):
        tx = optax.adam(1e-2)
        opt = tx.init(params)
        for _ in range(steps):
            updates, opt = tx.update(jax.grad(loss(model, batch))(params), opt)
            params = optax.apply_updates(params, updates)
        return forward(model, params, batch).logits

    want = after(model, start, rows(1))
    assert np.abs(want).max() > 0.1
    got = after(linear, linear.init(jax.random.key(0)), cached)
    np.testing.assert_allclose(got, want, rtol=2e-3)


def test_linear_and_mlp_start_at_zero_and_learn():
    x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    for model in (heads.linear(2, 2), heads.linear(2, 2, bias=True), heads.mlp(2, 2, 8, 2)):
        params = model.init(jax.random.key(0))
        assert not forward(model, params, {"features": x}).logits.any()
        for _ in range(100):
            grads = jax.grad(loss(model, {"features": x}))(params)
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        assert loss(model, {"features": x})(params) < 0.8  # entropy of (.2, .8) is .50
        assert jax.tree.structure(params) == jax.tree.structure(
            model.axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
        )


def test_bad_heads_are_refused():
    with pytest.raises(UserError, match="nearest"):
        heads.classifier(body(), feature="nearest")
    with pytest.raises(UserError, match="two classes"):
        heads.classifier(body(), classes=3, feature="likelihood")
    model = heads.classifier(body(), feature="mean")
    with pytest.raises(UserError, match="mask"):
        model.apply(model.init(jax.random.key(0)), rows()["tokens"])
