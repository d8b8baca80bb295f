"""Outputs of chosen layers: the same however the layers run, with adapters, heads and a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.losses.features import attention_kl, attention_squared, hint
from w2s_jax.mesh import make_mesh
from w2s_jax.models.heads import classifier
from w2s_jax.models.lora import lora
from w2s_jax.models.transformer import Config, init_cache, transformer
from w2s_jax.objectives import Term, distill, language, match, with_projections
from w2s_jax.objectives.features import linear
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import State, Table

CONFIG = Config(vocab=32, width=16, layers=3, heads=2, ffn=24, max_length=32, taps=(0, 2))
TOKENS = np.random.default_rng(0).integers(1, 32, (2, 8)).astype(np.int32)
KEY = jax.random.key(0)


def seen(config, params):
    """Outputs, and a gradient through the taps alone."""
    model = transformer(config)

    def loss(params):
        out = model.apply(params, TOKENS)
        return sum((i + 1) * jnp.sin(tap).sum() for i, tap in enumerate(out.taps)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_taps_are_the_same_however_the_layers_run():
    params = transformer(CONFIG).init(KEY)
    (_, plain), grads = seen(dataclasses.replace(CONFIG, scan=False), params)
    (_, scanned), others = seen(dataclasses.replace(CONFIG, remat="attention"), params)
    for a, b in zip((plain, grads), (scanned, others), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)
    last = plain.taps[1]
    rms = jnp.sqrt((last * last).mean(-1, keepdims=True) + CONFIG.eps)
    np.testing.assert_allclose(last / rms, plain.hidden, rtol=1e-4, atol=1e-5)  # the norm is 1
    short = dataclasses.replace(CONFIG, layers=1, taps=(0,))
    first = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    tap = jax.jit(transformer(short).apply)(first, TOKENS).taps[0]
    np.testing.assert_allclose(tap, plain.taps[0], rtol=1e-4, atol=1e-5)


def test_a_model_without_taps_starts_and_answers_as_one_with():
    silent = transformer(dataclasses.replace(CONFIG, taps=()))
    model = transformer(CONFIG)
    params = model.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, silent.init(KEY))
    for scan in (False, True):
        pair = [transformer(dataclasses.replace(c.config, scan=scan)) for c in (silent, model)]
        made = [jax.eval_shape(m.apply, params, TOKENS) for m in pair]
        assert made[0].taps == () and len(made[1].taps) == 2
        assert made[0].hidden == made[1].hidden
    cached = jax.eval_shape(
        lambda p: model.apply(p, TOKENS, cache=init_cache(CONFIG, 2, 16)), params
    )
    assert [tap.shape for tap in cached.taps] == [(2, 8, 16)] * 2


def test_adapters_and_classifiers_have_the_taps_of_their_body():
    for model in (lora(transformer(CONFIG), 2), classifier(transformer(CONFIG))):
        out = jax.eval_shape(lambda key, m=model: m.apply(m.init(key), TOKENS), KEY)
        assert [tap.shape for tap in out.taps] == [(2, 8, 16)] * 2
    adapted = lora(transformer(dataclasses.replace(CONFIG, scan=True)), 2)
    params = adapted.init(KEY)
    tapped = jax.grad(lambda p: adapted.apply({**params, "lora": p}, TOKENS).taps[0].sum())
    grads = jax.jit(tapped)(params["lora"])
    assert abs(grads["down"]["b"][0]).max() > 0 == abs(grads["down"]["b"][1:]).max()


@pytest.mark.parametrize("name", ["taps", "maps"])
@pytest.mark.parametrize("taps", [(3,), (-1,), (1, 0), (1, 1)])
def test_layers_that_are_not_there_are_refused(name, taps):
    with pytest.raises(UserError, match=f"{name} must be layers 0 to 2, each once and in order"):
        dataclasses.replace(CONFIG, **{name: taps})


MAPPED = Config(
    vocab=32, width=16, layers=1, heads=4, kv_heads=2, ffn=8, max_length=32, taps=(0,), maps=(0,)
)
SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8], np.int32)


def test_maps_are_what_attention_mixes_values_with():
    """Without a feed-forward layer a block adds its maps times its values, projected."""
    model = transformer(MAPPED)
    params = model.init(KEY)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    params["layers"]["down"] = jnp.zeros_like(params["layers"]["down"])

    @jax.jit
    def said(params):
        tap, maps = model.apply(params, TOKENS, segment=SEGMENT).taps
        x = params["embed"][TOKENS]
        y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + MAPPED.eps)  # the norm is 1
        v = jnp.repeat((y @ layer["v"]).reshape(2, 8, 2, 4), 2, axis=2)
        mixed = jnp.einsum("bhts,bshd->bthd", maps, v).reshape(2, 8, 16) @ layer["o"]
        return maps, tap - x, mixed

    maps, added, mixed = said(params)
    assert maps.shape == (2, 4, 8, 8) and maps.dtype == jnp.float32
    np.testing.assert_allclose(mixed, added, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps.sum(-1), np.ones((2, 4, 8)), rtol=1e-6)
    hidden = (SEGMENT[:, :, None] != SEGMENT[:, None]) | np.triu(np.ones((8, 8), bool), 1)
    np.testing.assert_array_equal(jnp.where(hidden[:, None], maps, 0.0), 0.0)


def test_maps_are_made_for_those_who_ask():
    plain = dataclasses.replace(CONFIG, layers=9)
    asking = dataclasses.replace(plain, maps=(0, 8), remat="full", dtype="bfloat16")
    assert plain.scanned and not asking.scanned
    params = jax.eval_shape(transformer(plain).init, KEY)
    out = jax.eval_shape(transformer(asking).apply, params, TOKENS)
    assert [tap.shape for tap in out.taps] == [(2, 8, 16)] * 2 + [(2, 2, 8, 8)] * 2
    assert [tap.dtype.name for tap in out.taps] == ["bfloat16"] * 2 + ["float32"] * 2
    cache = init_cache(asking, 2, 16)
    cached = jax.eval_shape(lambda p: transformer(asking).apply(p, TOKENS, cache=cache), params)
    assert len(cached.taps) == 2
    rows = {"take": np.zeros((2, 1, 8), np.int32), "back": np.zeros((2, 8, 1), np.int32)}
    with pytest.raises(UserError, match="leave out the column 'rows'"):
        jax.eval_shape(lambda p: transformer(asking).apply(p, TOKENS, rows=rows), params)
    with pytest.raises(UserError, match="not scanned; leave scan at None"):
        dataclasses.replace(CONFIG, maps=(0,), scan=True)


@pytest.mark.slow
def test_matching_maps_ignores_padding():
    student = transformer(dataclasses.replace(MAPPED, remat="full"))
    teacher = transformer(dataclasses.replace(MAPPED, width=24, heads=6, kv_heads=6, taps=()))
    terms = [Term(attention_kl, 1, 0), Term(attention_squared, 1, 0, 5.0)]
    params = {"student": student.init(KEY), "projections": {}}
    frozen = {"teacher": teacher.init(jax.random.key(1))}
    now = State(jnp.int32(0), jnp.int32(1), (), (), frozen)
    objective = match(student, teacher, terms, lambda s, t: language(s))

    @jax.jit
    def said(params, batch):
        def loss(params):
            total, weight, aux = objective(params, now, batch, KEY)
            return total / weight, [s / w for s, w in aux.metrics.values()]

        return jax.value_and_grad(loss, has_aux=True)(params)

    found = []
    for width in (8, 12):  # the same texts, and more padding
        tokens = np.full((2, width), 7, np.int32)
        tokens[:, :8] = TOKENS
        real = np.arange(width)[None].repeat(2, 0) < np.array([[5], [8]])
        batch = {"tokens": tokens, "mask": np.float32(real), "segment": np.int32(real)}
        found.append(said(params, batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)
    assert min(found[0][0][1]) > 1e-4


@pytest.mark.slow
def test_matching_on_a_mesh_is_matching_on_one_device():
    student = transformer(dataclasses.replace(CONFIG, scan=True))
    teacher = transformer(dataclasses.replace(CONFIG, width=32, heads=4))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (16, 8)).astype(np.int32)
    table = Table({"tokens": tokens, "mask": np.ones((16, 8), np.float32)})
    terms = [Term(hint, 0, 0, 1.0, linear()), Term(hint, 1, 1, 1.0, linear())]
    model = with_projections(student, teacher, terms, table)
    objective = match(student, teacher, terms, lambda s, t: distill(s, forward_kl, teacher=t))
    tune = Tune(batch=8, steps=3, optimizer="sgd", lr=0.1)
    frozen = {"teacher": teacher.init(jax.random.key(1))}
    run = partial(fit, objective, model.init(KEY), table, tune, KEY, frozen=frozen, progress=False)
    alone = run().params
    spread = run(mesh=make_mesh("data=2,fsdp=2,tensor=2"), axes=model.axes).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), alone, spread)
