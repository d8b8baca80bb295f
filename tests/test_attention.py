"""Attention rows: packed documents and shared prompts give the numbers of unpacked rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.models.attention import Rows, from_rows, into_rows, plan
from w2s_jax.models.transformer import Config, init_cache, transformer

LLAMA = Config(vocab=31, width=16, layers=2, heads=4, kv_heads=2, ffn=24, max_length=16)
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, rope=0.0, norm="layer", activation="gelu", bias="all", family="gpt2"
)
DEEP = dataclasses.replace(LLAMA, scan=True, remat="full", qk_norm="head")
KINDS = {"llama": LLAMA, "gpt2": GPT2, "scanned": DEEP}

# Two preference pairs in one row of 20 places: prompt 1-4, answers 5-7 and 8-9; prompt 10-11,
# answers 12-14 and 15-18; one place of padding. Places count from 0.
PIECES = (((0, 4), (4, 7), (7, 9)), ((9, 11), (11, 14), (14, 18)))


def _model(config):
    model = transformer(config)
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return model, jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))


def _rows(sequences, tokens, length, copies):
    """``take`` and ``back`` of rows given as lists of places of one packed row."""
    take = np.full((1, len(sequences), length), -1, np.int32)
    back = np.full((1, tokens, copies), -1, np.int32)
    seen = np.zeros(tokens, int)
    for r, places in enumerate(sequences):
        take[0, r, : len(places)] = places
        for i, t in enumerate(places):
            back[0, t, seen[t]] = r * length + i
            seen[t] += 1
    return {"take": jnp.asarray(take), "back": jnp.asarray(back)}


def _pairs():
    """The rows of ``PIECES`` and, for each, the places of its prompt and answer."""
    sequences = []
    for prompt, *answers in PIECES:
        sequences += [[*range(*prompt), *range(*answer)] for answer in answers]
    return _rows(sequences, 20, 7, 2), sequences


def _near(a, b, bound=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=bound, atol=bound)


def _tokens():
    return jax.random.randint(jax.random.key(3), (1, 20), 0, 31)


def _weights(shape):
    return jax.random.normal(jax.random.key(4), shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prompt_equals_two_unpacked_rows(kind):
    model, params = _model(KINDS[kind])
    rows, sequences = _pairs()
    tokens, weights = _tokens(), _weights((20, 16))
    # What a loss would read: every answer token, and the prompt tokens once
    counted = [
        [t for t in places if r % 2 == 0 or t >= PIECES[r // 2][2][0]]
        for r, places in enumerate(sequences)
    ]

    def packed(params):
        hidden = model.apply(params, tokens, rows=rows).hidden[0]
        return jnp.sum(jnp.sin(hidden[:18]) * weights[:18]), hidden

    alone = np.zeros((4, 7), int)  # each sequence a row of its own, zeros behind it
    count, place = np.zeros((4, 7)), np.zeros((4, 7), int)
    for r, (places, counts) in enumerate(zip(sequences, counted, strict=True)):
        alone[r, : len(places)] = tokens[0, np.array(places)]
        place[r, : len(places)] = places
        count[r, : len(places)] = np.isin(places, counts)

    def unpacked(params):
        hidden = model.apply(params, jnp.asarray(alone)).hidden
        return jnp.sum(jnp.sin(hidden) * weights[place] * count[..., None]), hidden

    (loss, hidden), grad = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (want, each), exact = jax.jit(jax.value_and_grad(unpacked, has_aux=True))(params)
    _near(loss, want)
    for r, places in enumerate(sequences):
        _near(hidden[np.array(places)], each[r, : len(places)])
    jax.tree.map(_near, grad, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_segment_mask_on_packed_documents(kind):
    model, params = _model(KINDS[kind])
    ends = [(0, 6), (6, 7), (7, 16)]
    rows = _rows([list(range(*e)) for e in ends], 16, 9, 1)
    segment = jnp.repeat(jnp.array([1, 2, 3]), jnp.array([6, 1, 9]))[None]
    tokens, weights = _tokens()[:, :16], _weights((16, 16))

    def loss(params, columns):
        hidden = model.apply(params, tokens, **columns).hidden[0]
        return jnp.sum(jnp.sin(hidden) * weights), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    got, want = run(params, {"rows": rows}), run(params, {"segment": segment})
    jax.tree.map(_near, got, want)


def test_tokens_of_no_row_are_finite_and_touch_nothing():
    model, params = _model(LLAMA)
    rows, _ = _pairs()
    tokens = _tokens()
    run = jax.jit(lambda t: model.apply(params, t, rows=rows).hidden)
    before, after = run(tokens), run(tokens.at[:, 18:].add(1) % 31)
    assert jnp.isfinite(after).all()
    assert jnp.array_equal(before[:, :18], after[:, :18])
    assert not jnp.array_equal(before[:, 18:], after[:, 18:])


def test_the_gathers_are_each_others_transposes_and_hold_no_scatter():
    rows, _ = _pairs()
    _, scope, _ = plan(_tokens(), None, None, rows, None)
    assert isinstance(scope.rows, Rows)
    take, back = scope.rows.take, scope.rows.back
    x, y = _weights((1, 20, 2, 3)), _weights((1, 28, 2, 3))

    def plainly(x):  # the same by indexing, differentiated by JAX
        flat = take.reshape(-1)
        return jnp.where((flat >= 0)[None, :, None, None], x[:, flat], 0)

    kept = jnp.where((take.reshape(-1) >= 0)[None, :, None, None], y, 0)
    ours = jax.vjp(lambda x: into_rows(x, take, back), x)[1](kept)[0]
    _near(ours, jax.vjp(plainly, x)[1](kept)[0], 1e-6)
    out, pull = jax.vjp(lambda y: from_rows(y, scope.rows), y)
    z = _weights((1, 20, 2, 3)) + 1
    _near(jnp.vdot(out, z), jnp.vdot(y, pull(z)[0]), 1e-4)
    _near(out[0, 0], y[0, 0]), _near(out[0, 4], y[0, 4]), _near(out[0, 7], y[0, 11])
    assert (out[0, 18:] == 0).all()
    model, params = _model(LLAMA)
    text = str(
        jax.make_jaxpr(
            jax.grad(lambda p, h: model.apply(p, _tokens(), rows=h).hidden.sum(), allow_int=True)
        )(params, rows)
    )
    assert text.count("scatter-add[") == 1 and text.count("scatter[") == 0  # the embedding


def test_positions_count_within_the_row():
    rows, _ = _pairs()
    position, _, _ = plan(_tokens(), None, None, rows, None)
    assert position[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0]


def test_rows_that_do_not_fit_are_refused():
    rows, _ = _pairs()
    model, params = _model(LLAMA)
    with pytest.raises(UserError, match=r"take \[B,R,L\] and back \[B,T,O\]"):
        model.apply(params, _tokens()[:, :5], rows=rows)
    with pytest.raises(UserError, match="rows and a cache exclude each other"):
        model.apply(params, _tokens(), rows=rows, cache=init_cache(LLAMA, 1, 8))


def test_a_kernel_named_in_the_config_is_the_one_asked(monkeypatch):
    from w2s_jax.models import backends

    model = transformer(dataclasses.replace(LLAMA, attention="cudnn"))
    params = jax.eval_shape(model.init, jax.random.key(0))  # any device can make the weights
    with pytest.raises(UserError, match="attention='cudnn' cannot serve this batch"):
        jax.eval_shape(model.apply, params, _tokens()[:, :8])
    asked = []
    plain = backends.xla
    monkeypatch.setattr(backends, "choose", lambda name, *_: asked.append(name) or "xla")
    monkeypatch.setattr(backends, "xla", lambda q, *rest: asked.append(q.shape) or plain(q, *rest))
    rows, _ = _pairs()
    jax.eval_shape(lambda p: model.apply(p, _tokens(), rows=rows).hidden, params)
    assert asked[:2] == ["cudnn", (4, 7, 4, 4)]  # four rows of seven places, heads of four
