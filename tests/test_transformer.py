"""The decoder: causality, packing, positions, cache, scan and remat, sharding, counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import batch_sharding, make_mesh, rules_context, shardings
from w2s_jax.models.transformer import (
    Config,
    RopeScaling,
    decode,
    flops_per_token,
    init_cache,
    params_count,
    shapes,
    transformer,
)

LLAMA = Config(vocab=31, width=16, layers=2, heads=4, kv_heads=2, ffn=24, max_length=32)
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, rope=0.0, norm="layer", activation="gelu", bias="all", family="gpt2"
)
OLMO = dataclasses.replace(LLAMA, qk_norm="all", placement="post", tie=False, family="olmo2")
QWEN = dataclasses.replace(
    LLAMA,
    qk_norm="head",
    bias="qkv",
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16),
    family="qwen3",
)
KINDS = {"llama": LLAMA, "gpt2": GPT2, "olmo2": OLMO, "qwen": QWEN}


def _model(config, seed=0):
    """A model whose every leaf is random, so that norms and biases count."""
    model = transformer(config)
    params = model.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return model, jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))


def _tokens(rows, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, LLAMA.vocab)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens, columns):
    out = model.apply(params, tokens, **columns)
    return decode(out), out.cache


def _logits(model, params, tokens, **columns):
    return _run(model, params, tokens, columns)[0]


def _near(a, b, bound=2e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_never_sees_what_follows(kind):
    model, params = _model(KINDS[kind])
    tokens = _tokens(2, 10)
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % LLAMA.vocab)
    before, after = (_logits(model, params, t) for t in (tokens, changed))
    assert jnp.array_equal(before[:, :6], after[:, :6])
    assert (jnp.abs(before[:, 6:] - after[:, 6:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_independent(kind):
    model, params = _model(KINDS[kind])
    first, second = _tokens(2, 5)
    row = jnp.concatenate([first, second, jnp.zeros(2, jnp.int32)])[None]
    segment = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([5, 5, 2]))[None]
    packed = _logits(model, params, row, segment=segment)
    assert jnp.isfinite(packed).all()
    _near(packed[0, :10].reshape(2, 5, -1), _logits(model, params, jnp.stack([first, second])))
    position = jnp.concatenate([jnp.arange(5), jnp.arange(5), jnp.arange(2)])[None]
    _near(_logits(model, params, row, segment=segment, position=position), packed)


def test_rotary_positions_are_relative_and_learned_ones_are_not():
    for config, same in ((LLAMA, True), (GPT2, False)):
        model, params = _model(config)
        tokens, position = _tokens(1, 8), jnp.arange(8)[None]
        a, b = (_logits(model, params, tokens, position=position + k) for k in (0, 9))
        assert (jnp.abs(a - b).max() < 2e-5) == same


def _loss(model, tokens):
    return lambda params: jnp.sum(jnp.sin(decode(model.apply(params, tokens))))


SCAN, FULL = {"scan": True}, {"scan": False, "remat": "full"}
CHANGES = [
    *((kind, SCAN) for kind in KINDS),
    ("llama", FULL),
    ("llama", {**SCAN, "remat": "dots"}),
    ("llama", {**FULL, "remat": "outputs"}),
]


@functools.lru_cache
def _gradient(config):
    model, params = _model(config)
    return jax.jit(jax.value_and_grad(_loss(model, _tokens(2, 9))))(params)


@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=str)
def test_scan_and_remat_change_no_number(kind, change):
    plain = dataclasses.replace(KINDS[kind], scan=False)
    other = dataclasses.replace(plain, **change)
    assert transformer(other).axes == transformer(plain).axes
    want, ours = _gradient(plain), _gradient(other)
    _near(ours[0], want[0], 1e-4)
    jax.tree.map(lambda a, b: _near(a, b, 1e-5 * float(jnp.abs(b).max() + 1)), ours[1], want[1])


def test_remat_keeps_less():
    def kept(remat):
        config = dataclasses.replace(LLAMA, layers=4, remat=remat, scan=True)
        model, tokens = transformer(config), _tokens(4, 32)
        params = model.init(jax.random.key(0))
        pull = jax.eval_shape(lambda p: jax.vjp(_loss(model, tokens), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    sizes = {remat: kept(remat) for remat in ("none", "dots", "full")}
    assert sizes["full"] < sizes["dots"] < sizes["none"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_equals_the_full_pass(kind):
    config = KINDS[kind]
    model, params = _model(config)
    tokens = _tokens(2, 12)
    cache, parts = init_cache(config, 2, 14), []
    for start, stop in ((0, 4), (4, 8), *((i, i + 1) for i in range(8, 12))):
        logits, cache = _run(model, params, tokens[:, start:stop], {"cache": cache})
        parts.append(logits)
    _near(jnp.concatenate(parts, axis=1), _logits(model, params, tokens))
    assert int(cache.index) == 12 and cache.position.tolist() == [12, 12]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_different_lengths_share_a_cache(kind, side):
    config = KINDS[kind]
    model, params = _model(config)
    prompts, more = [_tokens(1, n, n) for n in (3, 6)], _tokens(2, 4, 9)
    ids, segment = np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32)
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        where = slice(6 - n, None) if side == "left" else slice(n)
        ids[row, where], segment[row, where] = prompt[0], 1
    cache = init_cache(config, 2, 10)
    columns = {"segment": jnp.asarray(segment), "cache": cache}
    _, cache = _run(model, params, jnp.asarray(ids), columns)
    assert cache.position.tolist() == [3, 6]
    got, _ = _run(model, params, more, {"cache": cache})
    for row, prompt in enumerate(prompts):
        whole = jnp.concatenate([prompt, more[row : row + 1]], axis=1)
        _near(got[row], _logits(model, params, whole)[0, -4:])


@pytest.mark.parametrize(
    ("spec", "scan"), [("data=2,fsdp=2,tensor=2", True), ("fsdp=4,tensor=2", False)]
)
def test_eight_devices_give_the_single_device_gradient(spec, scan):
    config = dataclasses.replace(QWEN, scan=scan)
    model, params = _model(config)
    tokens, segment = _tokens(8, 12), jnp.repeat(jnp.array([[1, 2, 0]]), 4, axis=1).repeat(8, 0)

    def loss(params, tokens, segment):
        return jnp.mean(decode(model.apply(params, tokens, segment=segment)) ** 2)

    want = jax.jit(jax.value_and_grad(loss))(params, tokens, segment)
    mesh = make_mesh(spec)
    with rules_context(mesh):
        places = shardings(model.axes, mesh, params)
        columns = jax.device_put((tokens, segment), batch_sharding(mesh))
        got = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, places), *columns)
    jax.tree.map(_near, jax.device_get(got), jax.device_get(want))


def test_population_vmap_equals_separate_runs():
    model, first = _model(LLAMA)
    second = _model(LLAMA, seed=5)[1]
    tokens = _tokens(2, 8)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    together = jax.jit(jax.vmap(lambda p: decode(model.apply(p, tokens))))(both)
    for i, params in enumerate((first, second)):
        _near(together[i], _logits(model, params, tokens), 1e-5)


def test_compute_in_bfloat16_keeps_parameters_and_logits_in_float32():
    model, params = _model(dataclasses.replace(LLAMA, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, params, _tokens(2, 8)).hidden.dtype == jnp.bfloat16
    got, exact = (_logits(m, params, _tokens(2, 8)) for m in (model, transformer(LLAMA)))
    assert got.dtype == jnp.float32
    assert 0 < jnp.abs(got - exact).max() < 0.05 * jnp.abs(exact).max()


def test_counts_by_hand():
    embedding, norms = 31 * 16, 2 * 2 * 16 + 16
    matrices = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert params_count(LLAMA) == embedding + norms + matrices
    assert params_count(dataclasses.replace(LLAMA, tie=False)) == 2 * embedding + norms + matrices
    assert flops_per_token(LLAMA, 10) == 6 * (embedding + matrices) + 6 * 2 * 10 * 16


@pytest.mark.parametrize(("tie", "spread"), [(True, 1.0), (False, 0.02 * 8)])
def test_initial_logits_have_the_stated_spread(tie, spread):
    config = Config(vocab=1000, width=64, layers=3, heads=2, tie=tie)
    model = transformer(config)
    logits = _logits(model, model.init(jax.random.key(0)), _tokens(2, 16))
    assert 0.8 * spread < float(logits.std()) < 1.25 * spread


def test_axes_mirror_the_parameters():
    for config in KINDS.values():
        model = transformer(config)
        params = shapes(config)
        ranks = jax.tree.map(
            lambda names: len(names), model.axes, is_leaf=lambda x: type(x) is tuple
        )
        assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)
        assert all(leaf.shape[0] == config.layers for leaf in jax.tree.leaves(params["layers"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "4 heads do not divide into 3"),
        ({"head_dim": 5}, "even head_dim"),
        ({"width": -1}, "width must be a positive integer"),
        ({"norm": "batch"}, "norm='batch' is not one of"),
        ({"remat": "some"}, "remat='some' is not one of"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_rows_and_caches_beyond_the_model_are_refused():
    model = transformer(LLAMA)
    params = model.init(jax.random.key(0))
    with pytest.raises(UserError, match="33 tokens exceed max_length 32"):
        model.apply(params, _tokens(1, 33))
    with pytest.raises(UserError, match="cache of 33 tokens exceeds max_length 32"):
        init_cache(LLAMA, 1, 33)
