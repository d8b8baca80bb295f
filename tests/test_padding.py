"""Padded vocabulary rows: no number changes, no padding is predicted, none is exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh
from w2s_jax.models import hf
from w2s_jax.models.transformer import Config, decode, params_count, transformer
from w2s_jax.models.weights import real_leaves
from w2s_jax.objectives import language
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import State, Table

PLAIN = Config(vocab=41, width=16, layers=2, heads=4, kv_heads=2, ffn=24, tie=False)
PADDED = dataclasses.replace(PLAIN, pad_vocab=16)
STATE = State(step=jnp.zeros(()), steps=jnp.ones(()), params=(), opt=())


def _words(size):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size)}}
    return Tokenizer(Backend(WordLevel(words, unk_token="<unk>")), bos=0, eos=1, unk=2)


def _table(rows=8):
    tokens = np.random.default_rng(0).integers(0, 41, size=(rows, 12)).astype(np.int32)
    return Table({"tokens": tokens, "mask": np.ones((rows, 12), np.float32)})


def _grown(params):
    """The weights of the plain model with zeros for the padding."""
    grown = dict(params) | {"embed": jnp.pad(params["embed"], ((0, 7), (0, 0)))}
    if "unembed" in params:
        grown["unembed"] = jnp.pad(params["unembed"], ((0, 0), (0, 7)))
    return grown


def test_rows_by_hand():
    assert (PLAIN.vocab_rows, PADDED.vocab_rows) == (41, 48)
    assert dataclasses.replace(PLAIN, pad_vocab=41).vocab_rows == 41
    assert params_count(PADDED) - params_count(PLAIN) == 2 * 7 * 16
    with pytest.raises(UserError, match="pad_vocab must be a positive integer"):
        dataclasses.replace(PLAIN, pad_vocab=0)


@pytest.mark.parametrize("tie", [True, False])
def test_padding_changes_no_number(tie):
    """Same initial weights, loss, gradients on the real rows, and none on the padding."""
    plain, padded = (transformer(dataclasses.replace(c, tie=tie)) for c in (PLAIN, PADDED))
    params, grown = plain.init(jax.random.key(0)), padded.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, grown, _grown(params))
    batch = _table().batch(range(8))

    def loss(model, params):
        total, weight, _ = language(model)(params, STATE, batch, None)
        return total / weight

    ours = jax.jit(jax.value_and_grad(lambda p: loss(padded, p)))(grown)
    want = jax.jit(jax.value_and_grad(lambda p: loss(plain, p)))(params)
    np.testing.assert_allclose(ours[0], want[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(_grown(want[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_padding_is_never_predicted():
    """Padded columns that would win by far have no say."""
    model = transformer(PADDED)
    params = model.init(jax.random.key(0))
    params["unembed"] = params["unembed"].at[:, 41:].set(100.0 * params["unembed"][:, :7])
    output = model.apply(params, _table()["tokens"])
    assert output.vocab == 41 and decode(output).shape[-1] == 41
    batch = _table().batch(range(8))
    clean = dict(params) | {"unembed": params["unembed"].at[:, 41:].set(0.0)}
    losses = [language(model)(p, STATE, batch, None)[0] for p in (params, clean)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert transformer(PLAIN).apply(_cut(params), _table()["tokens"]).vocab is None


def _cut(params):
    return dict(params) | {"embed": params["embed"][:41], "unembed": params["unembed"][:, :41]}


@pytest.mark.parametrize("spec", [None, "fsdp=2,tensor=4"])
def test_export_writes_the_real_rows_and_loading_pads_them(tmp_path, spec):
    """With a shard of the vocabulary that holds padding alone, too."""
    config = dataclasses.replace(PLAIN, pad_vocab=64)
    model, mesh = transformer(config), make_mesh(spec) if spec else None
    params = model.init(jax.random.key(0))
    hf.export(model, params, tmp_path / "m", _words(41))
    plain, real, _ = hf.load(tmp_path / "m")
    assert plain.config.vocab == 41 and real["embed"].shape == (41, 16)
    again, back, _ = hf.load(tmp_path / "m", pad_vocab=64, mesh=mesh)
    assert again.config.vocab_rows == 64
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if mesh:
        assert back["embed"].addressable_shards[0].data.shape == (16, 8)
    jax.tree.map(np.testing.assert_array_equal, real, _unnamed(real_leaves(config, params), real))


def _unnamed(leaves, like):
    flat = jax.tree_util.tree_leaves_with_path(like)
    names = ["/".join(entry.key for entry in path) for path, _ in flat]
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


def test_training_leaves_the_padding_at_zero():
    model = transformer(PADDED)
    tune = Tune(lr=1e-2, batch=8, steps=3, weight_decay=0.1)
    params = model.init(jax.random.key(0))
    state = fit(language(model), params, _table(), tune, jax.random.key(1), progress=False)
    assert not jnp.any(state.params["embed"][41:]) and not jnp.any(state.params["unembed"][:, 41:])
    assert jnp.any(state.params["unembed"] != params["unembed"])


def test_a_tokenizer_larger_than_the_real_vocabulary_is_refused(tmp_path):
    """Though its ids would fit into the padded rows."""
    model = transformer(PADDED)
    hf.export(model, model.init(jax.random.key(0)), tmp_path / "m", _words(41))
    _words(45).save(tmp_path / "m")
    with pytest.raises(UserError, match="45 tokens, the model only 41"):
        hf.load(tmp_path / "m", pad_vocab=16)
