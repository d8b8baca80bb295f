"""Parity with transformers, round trips, sharded and bfloat16 folders, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh
from w2s_jax.models import hf, weights
from w2s_jax.models.families import from_hf_config, to_hf_config
from w2s_jax.models.transformer import Config, RopeScaling, decode, transformer
from w2s_jax.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# label -> (config class, arguments)
FAMILIES = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32},
    ),
    "llama2": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama3": (
        "LlamaConfig",
        {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "qwen2.5": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "olmo2": ("Olmo2Config", SIZES),
}


def _reference(label, seed=0):
    """A random transformers model in which every weight matters, norms and biases included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    kind, arguments = FAMILIES[label]
    config = getattr(transformers, kind)(**arguments)
    config.attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if weight.ndim == 1 and "bias" not in name else 0.0
            weight.copy_(centre + torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.1))
    return model


def _tokens(rows=3, length=20, vocab=61, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def _ours(folder):
    model = transformer(hf.read_config(folder))
    return model, weights.read(folder, model)


def _close(ours, theirs, bound=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def _words(size=20):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))]
    backend = Backend(models.WordLevel(dict(zip(names, range(size), strict=True)), "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, bos=1, eos=2, unk=0)


@pytest.mark.parametrize("label", FAMILIES)
def test_logits_and_gradients_equal_transformers(label, tmp_path):
    torch = pytest.importorskip("torch")
    reference = _reference(label)
    reference.save_pretrained(tmp_path)
    model, params = _ours(tmp_path)
    tokens = _tokens()
    direction = np.random.default_rng(1).normal(size=(3, 20, 61)).astype(np.float32)
    logits = reference(torch.from_numpy(tokens).long()).logits
    (logits * torch.from_numpy(direction)).sum().backward()

    def value(params):
        out = decode(model.apply(params, jnp.asarray(tokens)))
        return jnp.sum(out * direction), out

    grads, out = jax.jit(jax.grad(value, has_aux=True))(params)
    _close(out, logits.detach())
    theirs = dict(reference.named_parameters())
    ours = dict(weights.tensors(model.config, grads, None))
    assert set(ours) == {name for name, weight in theirs.items() if weight.grad is not None}
    for name, grad in ours.items():
        _close(grad, theirs[name].grad)


@pytest.mark.parametrize("label", FAMILIES)
def test_export_loads_in_transformers(label, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _reference(label).save_pretrained(tmp_path / "a")
    model, params = _ours(tmp_path / "a")
    hf.export(model, params, tmp_path / "b", _words())
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokens = _tokens()
    logits = again(torch.from_numpy(tokens).long()).logits.detach()
    _close(decode(model.apply(params, jnp.asarray(tokens))), logits)
    assert again.config.bos_token_id == 1 and again.generation_config.eos_token_id == 2
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "b").encode("w1 w2") == [
        4,
        5,
    ]


SMALL = Config(vocab=40, width=16, layers=3, heads=4, kv_heads=2, ffn=24, max_length=32)


def _saved(folder, config=SMALL, seed=0, **options):
    model = transformer(config)
    params = model.init(jax.random.key(seed))
    hf.export(model, params, folder, _words(), **options)
    return model, params


def _equal(a, b):
    return jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    )


@pytest.mark.parametrize("tie", [True, False])
def test_sharded_files_hold_the_same_model(tmp_path, tie):
    config = dataclasses.replace(SMALL, tie=tie)
    _, params = _saved(tmp_path / "many", config, max_shard=4_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    model, back, _ = hf.load(tmp_path / "many")
    assert _equal(params, back) and model.config == config


def test_bfloat16_files_are_read_without_torch(tmp_path):
    _, params = _saved(tmp_path, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model, back, _ = hf.load(tmp_path, dtype="bfloat16")
    assert _equal(rounded, back) and model.config.dtype == model.config.param_dtype == "bfloat16"
    model, back, _ = hf.load(tmp_path, compute="bfloat16")
    assert _equal(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), back)
    assert model.apply(back, jnp.zeros((1, 4), jnp.int32)).hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
@pytest.mark.parametrize("spec", ["data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_loading_onto_a_mesh_equals_loading_whole(tmp_path, family, spec):
    _reference(family).save_pretrained(tmp_path)
    model, whole = _ours(tmp_path)
    sharded = weights.read(tmp_path, model, mesh=make_mesh(spec))
    assert _equal(whole, jax.device_get(sharded))
    pieces = {
        leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(sharded)
    }
    assert True in pieces


def test_base_checkpoints_without_the_prefix_load(tmp_path):
    from safetensors.numpy import load_file, save_file

    _reference("gpt2").save_pretrained(tmp_path)
    _, params = _ours(tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file({**bare, "h.0.attn.bias": np.ones((1, 1), np.float32)}, path)
    assert _equal(params, _ours(tmp_path)[1])


def test_fingerprint_sees_every_bit():
    params = transformer(SMALL).init(jax.random.key(0))
    same = jax.tree.map(np.asarray, params)
    assert hf.fingerprint(params) == hf.fingerprint(same)
    same["final_norm"] = np.nextafter(same["final_norm"], 2, dtype=np.float32)
    assert hf.fingerprint(params) != hf.fingerprint(same)


def test_export_replaces_a_model_and_keeps_the_old_one_on_failure(tmp_path):
    place = tmp_path / "m"
    _, first = _saved(place, seed=0)
    model, second = _saved(place, seed=1)
    assert _equal(hf.load(place)[1], second)
    broken = {**first, "final_norm": first["final_norm"][:-1]}
    with pytest.raises(UserError, match="shapes"):
        hf.export(model, broken, place)
    assert _equal(hf.load(place)[1], second) and list(tmp_path.iterdir()) == [place]


def test_a_disk_that_writes_other_bits_is_noticed(tmp_path, monkeypatch):
    place, write = tmp_path / "m", weights.write

    def faulty(folder, *arguments):
        write(folder, *arguments)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(weights, "write", faulty)
    with pytest.raises(UserError, match="does not read back"):
        _saved(place)
    assert list(tmp_path.iterdir()) == []


def test_configs_go_both_ways():
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    for config in (
        dataclasses.replace(SMALL, rope_scaling=scaling, tie=False),
        dataclasses.replace(SMALL, family="qwen3", qk_norm="head"),
        dataclasses.replace(SMALL, family="olmo2", qk_norm="all", placement="post"),
        dataclasses.replace(SMALL, family="qwen2", bias="qkv"),
    ):
        assert from_hf_config(to_hf_config(config)) == config


def test_published_config_has_the_published_size(shared_data):
    values = json.loads((shared_data / "configs" / "qwen3-8b.hf_config.json").read_text())
    config = from_hf_config(values)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_190_735_360


def test_shipped_names_resolve_to_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "NANO", tmp_path)
    _, params = _saved(tmp_path / "nano-2-seed1")
    assert hf.shipped() == ["nano-2@1"]
    assert _equal(hf.load("nano-2@1")[1], params)
    with pytest.raises(UserError, match="no shipped model nano-2; there are: nano-2@1"):
        hf.load("nano-2")


def test_a_checkpoint_on_the_way_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "NANO", tmp_path)
    _saved(tmp_path / "nano-2-seed1")
    _saved(tmp_path / "nano-2-seed1-0.5")
    assert hf.shipped() == ["nano-2@1:0.5", "nano-2@1"]
    assert hf.locate("nano-2@1:0.5").name == hf.locate("nano-2@1:.50").name == "nano-2-seed1-0.5"
    with pytest.raises(UserError, match="there are: nano-2@1$"):
        hf.locate("nano-2@1:0.25")


BASE = to_hf_config(SMALL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no key 'model_type'"),
        ({**BASE, "model_type": "mamba"}, "'mamba' is not supported; llama, qwen2"),
        ({k: v for k, v in BASE.items() if k != "hidden_size"}, "key 'hidden_size' is missing"),
        ({**BASE, "hidden_size": "16"}, "hidden_size must be int"),
        ({**BASE, "num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({**BASE, "attention_bias": True}, "attention_bias=True is not supported"),
        ({**BASE, "hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({**BASE, "rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"),
        ({**BASE, "rope_scaling": {"rope_type": "llama3"}}, "key 'factor' is missing"),
        ({**BASE, "model_type": "qwen2", "use_sliding_window": True}, "sliding-window"),
        ({**BASE, "layer_types": ["sliding_attention"]}, "sliding-window"),
    ],
)
def test_unsupported_configs_are_refused(values, message):
    with pytest.raises(UserError, match=message) as caught:
        from_hf_config(values)
    assert "\n" not in str(caught.value)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder, change):
    from safetensors.numpy import load_file, save_file

    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors")


def _infinite(content):
    name = "model.layers.0.mlp.up_proj.weight"
    content[name] = content[name].astype(jnp.bfloat16)
    content[name][1, 2] = -np.inf


def _lost_shard(folder):
    model, params = transformer(SMALL), transformer(SMALL).init(jax.random.key(0))
    hf.export(model, params, folder, _words(), max_shard=4_000)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated": (_truncate, "truncated or corrupt"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
    "other width": (lambda f: _edit(f, intermediate_size=25), "has shape .* config.json says"),
    "more layers": (lambda f: _edit(f, num_hidden_layers=4), "lack tensor model.layers.3"),
    "fewer layers": (lambda f: _edit(f, num_hidden_layers=2), "9 tensors do not belong"),
    "untied": (lambda f: _edit(f, tie_word_embeddings=False), "lack tensor lm_head.weight"),
    "extra": (lambda f: _tensors(f, lambda t: t.update(x=t["model.norm.weight"])), r"\(x\)"),
    "nan": (
        lambda f: _tensors(f, lambda t: t["model.norm.weight"].__setitem__(3, np.nan)),
        "tensor model.norm.weight holds NaN or infinity",
    ),
    "infinity in bfloat16": (
        lambda f: _tensors(f, _infinite),
        r"tensor model.layers.0.mlp.up_proj.weight holds NaN or infinity",
    ),
    "lost shard": (_lost_shard, "is missing"),
    "bad index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "is not a safetensors index",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "other tokenizer": (lambda f: _words(50).save(f), "50 tokens, the model only 40"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folders_are_one_line(tmp_path, fault):
    spoil, message = BROKEN[fault]
    _saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "a/b/c", "no-such-model", "org/no-such-model"])
def test_unknown_names_are_one_line(name):
    with pytest.raises(UserError) as caught:
        hf.load(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_what_cannot_be_exported_is_refused(tmp_path):
    odd = transformer(dataclasses.replace(SMALL, qk_norm="head"))
    with pytest.raises(UserError, match="not of family 'llama'"):
        hf.export(odd, odd.init(jax.random.key(0)), tmp_path / "x")
    model = transformer(SMALL)
    params = model.init(jax.random.key(0))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model folder"):
        hf.export(model, params, tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        hf.export(model, params, tmp_path / "notes.txt" / "m")
    with pytest.raises(UserError, match="'floot' is not a dtype"):
        hf.export(model, params, tmp_path / "y", dtype="floot")
