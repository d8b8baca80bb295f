"""Low-rank adapters: exact start, frozen and shared base, merge, PEFT's files and numbers."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from w2s_jax.errors import UserError
from w2s_jax.generate.sample import sample
from w2s_jax.losses.classification import soft_xent
from w2s_jax.mesh import make_mesh, rules_context, shardings
from w2s_jax.models.heads import classifier
from w2s_jax.models.lora import TARGETS, adapters, lora, merge
from w2s_jax.models.peft import export_adapter, load_adapter
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import classify, language, on_base
from w2s_jax.train import population as module
from w2s_jax.train.fit import fit, make_step, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.population import population
from w2s_jax.types import Table

LLAMA = Config(vocab=31, width=16, layers=2, heads=4, kv_heads=2, ffn=24, max_length=32)
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, rope=0.0, norm="layer", activation="gelu", bias="all", family="gpt2"
)
QWEN = dataclasses.replace(LLAMA, qk_norm="head", family="qwen3", tie=False)
KINDS = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)

PEFT_NOISE = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def noisy(tree, seed=1, size=0.1):
    """The tree with noise on every leaf, so that nothing is zero or one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x + size * rng.normal(size=x.shape)).astype(x.dtype)), tree
    )


def trained(model, seed=0):
    """Parameters of an adapted model whose every leaf is random."""
    return noisy(model.init(jax.random.key(seed)))


@partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return decode(model.apply(params, tokens))


def near(a, b, bound=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [True, False])
def test_starts_as_the_base_and_merges_into_it(kind, scan):
    base = transformer(dataclasses.replace(KINDS[kind], scan=scan, remat="dots"))
    model = lora(base, 3, alpha=5)
    params = model.init(jax.random.key(0))
    params["base"] = noisy(params["base"])
    near(logits(model, params, TOKENS), logits(base, params["base"], TOKENS), 2e-6)
    params["lora"] = noisy(params["lora"])
    moved = logits(model, params, TOKENS)
    assert jnp.abs(moved - logits(base, params["base"], TOKENS)).max() > 0.1
    merged = merge(model, params)
    near(moved, logits(base, merged, TOKENS))
    change = merged["layers"]["o"] - params["base"]["layers"]["o"]
    pair = params["lora"]["o"]
    near(change[1], 5 / 3 * pair["a"][1] @ pair["b"][1], 1e-5)
    assert jnp.array_equal(merged["embed"], params["base"]["embed"])


def test_one_projection_by_hand():
    """A model of one adapted matrix moves by x A B alpha / r."""
    base = transformer(dataclasses.replace(LLAMA, layers=1))
    model = lora(base, 2, alpha=6, targets=("down",))
    params = trained(model)
    body = params["base"]
    layer = jax.tree.map(lambda leaf: leaf[0], body["layers"])
    a, b = (params["lora"]["down"][side][0] for side in "ab")
    by_hand = {**body, "layers": {**body["layers"], "down": (layer["down"] + 3 * a @ b)[None]}}
    near(logits(model, params, TOKENS), logits(base, by_hand, TOKENS))
    assert set(params["lora"]) == {"down"} and a.shape == (24, 2) and b.shape == (2, 16)


def test_gradient_never_forms_a_weight_sized_product():
    """What the adapters' gradient makes is as small as the adapters, whatever the base."""
    base = transformer(dataclasses.replace(LLAMA, ffn=56, scan=False))
    model = lora(base, 2)
    params = trained(model)

    def loss(adapter):
        return decode(model.apply({"base": params["base"], "lora": adapter}, TOKENS)).sum()

    def made(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jaxprs_in_params(equation.params):
                yield from made(inner)
            if equation.primitive.name == "dot_general":
                yield from (leaf.aval.shape for leaf in equation.outvars)

    shapes = list(made(jax.make_jaxpr(jax.grad(loss))(params["lora"]).jaxpr))
    assert (16, 2) in shapes and (2, 56) in shapes
    assert not {(16, 56), (56, 16), (16, 16), (16, 8)} & set(shapes)


def test_float32_adapters_over_a_bfloat16_base():
    config = dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="bfloat16")
    model = lora(transformer(config), 4)
    params = trained(model)
    assert {x.dtype for x in jax.tree.leaves(params["lora"])} == {jnp.dtype("float32")}
    assert model.apply(params, TOKENS).hidden.dtype == jnp.bfloat16
    exact = lora(transformer(LLAMA), 4)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    near(logits(model, params, TOKENS), logits(exact, wide, TOKENS), 0.5)
    merged = merge(model, params)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    base = transformer(config)
    table = Table({"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)})
    tune = Tune(lr=0.01, batch=2, steps=2)
    objective, frozen = on_base(language(model)), {"base": base.init(jax.random.key(3))}
    begun = adapters(model, jax.random.key(0))
    state = fit(objective, begun, table, tune, jax.random.key(0), frozen=frozen, progress=False)
    assert jnp.abs(state.params["q"]["b"]).max() > 1e-3


def test_a_classifier_adapts_its_body_and_moves_its_head():
    base = classifier(transformer(LLAMA), 3)
    model = lora(base, 2)
    params = model.init(jax.random.key(0))
    tokens, label = TOKENS, np.eye(3, dtype=np.float32)[[0, 2]]
    assert not model.apply(params, tokens).logits.any()
    table = Table({"tokens": tokens, "label": label})
    tune, frozen = Tune(lr=0.05, batch=2, steps=8), {"base": params["base"]}
    objective = on_base(classify(model, soft_xent))
    key = jax.random.key(0)
    state = fit(objective, params["lora"], table, tune, key, frozen=frozen, progress=False)
    after = {"base": params["base"], "lora": state.params}
    out = model.apply(after, tokens).logits
    assert (out.argmax(-1) == jnp.array([0, 2])).all() and state.params["v"]["b"].any()
    near(out, base.apply(merge(model, after), tokens).logits)


def test_sampling_with_adapters_equals_sampling_when_merged():
    base = transformer(LLAMA)
    model = lora(base, 3)
    params = trained(model)
    drawn = [
        sample(m, p, [[3, 4, 5], [6]], jax.random.key(0), tokens=6, temperature=0.0)
        for m, p in ((model, params), (base, merge(model, params)))
    ]
    assert drawn[0] == drawn[1]


def test_fit_trains_adapters_alone(tmp_path):
    """The base stays bit for bit, outside the optimiser's state and the checkpoints."""
    base = transformer(LLAMA)
    model = lora(base, 2)
    weights = base.init(jax.random.key(5))
    before = jax.tree.map(np.array, weights)
    begun = adapters(model, jax.random.key(0))
    tokens = np.concatenate([TOKENS, TOKENS[::-1, ::-1]])
    table = Table({"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)})
    tune = Tune(lr=0.02, batch=4, steps=6, weight_decay=0.1)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    with rules_context(mesh):
        placed = jax.device_put(weights, shardings(base.axes, mesh, weights))
    call = {"frozen": {"base": placed}, "axes": model.axes["lora"], "mesh": mesh}
    run = partial(fit, on_base(language(model)), begun, table, tune, jax.random.key(1))
    state = run(**call, workdir=tmp_path, progress=False)
    jax.tree.map(np.testing.assert_array_equal, state.frozen["base"], before)
    moments = sum(x.size for x in jax.tree.leaves(state.opt))
    size = sum(x.size for x in jax.tree.leaves(begun))
    assert 2 * size <= moments <= 2 * size + 8
    saved = {x.name for x in (tmp_path / "checkpoints" / "6").rglob("*") if "embed" in x.name}
    text = "".join(path.read_text() for path in (tmp_path / "checkpoints" / "6").rglob("_METADATA"))
    assert "'gate', 'a'" in text and "base" not in text and "embed" not in text and not saved
    alone = fit(
        on_base(language(model)), begun, table, tune, jax.random.key(1),
        frozen={"base": weights}, progress=False,
    )  # fmt: skip
    jax.tree.map(lambda a, b: near(a, b, 1e-4), state.params, alone.params)
    spec = state.params["up"]["a"].sharding.spec, state.params["up"]["b"].sharding.spec
    assert spec[0][1] == "fsdp" and spec[1][2] == "tensor"


def test_the_step_takes_gradients_of_the_adapters_only():
    model = lora(transformer(LLAMA), 2)
    params = trained(model)
    tx = optimizer(Tune(optimizer="sgd", momentum=0.0, clip=0, lr=1.0), 1)
    state = start(params["lora"], tx, 1, frozen={"base": params["base"]})
    batch = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)}
    step = jax.jit(make_step(on_base(language(model)), tx))
    new, _ = step(state, batch, jax.random.key(0))

    def loss(both):
        total, weight, _ = language(model)(both, state, batch, jax.random.key(0))
        return total / weight

    want = jax.grad(loss)(params)["lora"]
    jax.tree.map(lambda a, b, g: near(a, b - g, 1e-6), new.params, params["lora"], want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 9}, "'k' 16x8; use at most 8"),
        ({"rank": 2, "targets": ("query",)}, "query.*has q, k, v"),
        ({"rank": 2, "targets": ()}, "no projection"),
        ({"rank": 2, "targets": ("attention_norm",)}, "attention_norm"),
    ],
)
def test_bad_adapters_are_refused(call, words):
    with pytest.raises(UserError, match=words):
        lora(transformer(LLAMA), **call)


def test_wrong_models_are_refused():
    base = transformer(LLAMA)
    for model, words in (
        (lora(base, 2), "already"),
        (classifier(lora(base, 2)), "already"),
        (classifier(base, probe=True), "probe"),
    ):
        with pytest.raises(UserError, match=words):
            lora(model, 2)
    assert lora(base, 2) is lora(base, 2, alpha=4) and lora(base, 2, targets=TARGETS[::-1])


@pytest.mark.parametrize("targets", [None, ("q", "down")])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_folder_round_trip(kind, targets, tmp_path):
    base = transformer(KINDS[kind])
    model = lora(base, 3, alpha=5, targets=targets)
    params = trained(model)
    export_adapter(model, params["lora"], tmp_path / "a", base="some/model")
    again, back = load_adapter(tmp_path / "a", base)
    assert again is model
    jax.tree.map(lambda a, b: near(a, b, 1e-6), back, params["lora"])


@pytest.fixture
def folder(tmp_path):
    model = lora(transformer(LLAMA), 2)
    return export_adapter(model, trained(model)["lora"], tmp_path / "adapter")


def test_faulty_adapter_folders_are_refused(folder, tmp_path):
    base = transformer(LLAMA)
    wide = transformer(dataclasses.replace(LLAMA, width=20, head_dim=4))
    with pytest.raises(UserError, match="another"):
        load_adapter(folder, wide)
    for other, words in ((GPT2, "do not belong"), (dataclasses.replace(LLAMA, layers=1), "belong")):
        with pytest.raises(UserError, match=words):
            load_adapter(folder, transformer(other))
    with pytest.raises(UserError, match=r"lacks tensor base_model.*layers\.2\."):
        load_adapter(folder, transformer(dataclasses.replace(LLAMA, layers=3)))
    with pytest.raises(UserError, match="not of a classifier"):
        load_adapter(folder, classifier(base))
    with pytest.raises(UserError, match="adapter_config"):
        load_adapter(tmp_path, base)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"r": 0}, {"lora_alpha": "x"}):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=next(iter(change))):
            load_adapter(folder, base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_adapter(folder, base)
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        load_adapter(folder, base)


def peer(kind, tmp_path):
    """Our base with random weights, its folder, and the same model in transformers."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from w2s_jax.models.hf import export

    base = transformer(KINDS[kind])
    weights = noisy(base.init(jax.random.key(2)))
    place = export(base, weights, tmp_path / "base")
    return base, weights, transformers.AutoModelForCausalLM.from_pretrained(place)


def peer_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.slow
@PEFT_NOISE
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_adapter(kind, tmp_path):
    base, weights, theirs = peer(kind, tmp_path)
    import peft

    model = lora(base, 3, alpha=5)
    params = {"base": weights, "lora": noisy(adapters(model, jax.random.key(4)))}
    place = export_adapter(model, params["lora"], tmp_path / "adapter")
    ours = logits(model, params, TOKENS)
    assert np.abs(ours - peer_logits(theirs)).max() > 0.1
    near(ours, peer_logits(peft.PeftModel.from_pretrained(theirs, place)), 1e-4)


@pytest.mark.slow
@PEFT_NOISE
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}}),
        ("qwen3", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_we_read_their_adapter(kind, options, tmp_path):
    base, weights, theirs = peer(kind, tmp_path)
    import peft
    import torch

    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(0)
    for name, value in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model, back = load_adapter(tmp_path / "adapter", base)
    ours = logits(model, {"base": weights, "lora": back}, TOKENS)
    assert np.abs(ours - logits(base, weights, TOKENS)).max() > 0.1
    near(ours, peer_logits(theirs), 1e-4)


POPULATION = Config(vocab=31, width=8, layers=1, heads=2, ffn=20, max_length=12)


def test_population_of_adapters_over_one_base(monkeypatch):
    """S sets of adapters with their own start, rate, coefficient and data equal S fits, and no
    array of the program holds S copies of a base weight."""
    base = transformer(POPULATION)
    model = lora(base, 2)
    weights = noisy(base.init(jax.random.key(5)))
    rng = np.random.default_rng(0)
    tables = [
        Table({
            "tokens": rng.integers(0, 31, (6, 12)).astype(np.int32),
            "mask": np.ones((6, 12), np.float32),
        })
        for _ in range(2)
    ]  # fmt: skip
    tables = [tables[0], tables[1], tables[0]]
    tune, seeds = Tune(batch=3, steps=4), [3, 1, 4]
    rates, scales = [0.02, 0.01, 0.03], [1e-2, 5e-3, 2e-2]

    def scaled(row):
        def objective(params, state, batch, key):
            total, weight, aux = inner(params, state, batch, key)
            penalty = sum(jnp.square(x).sum() for x in jax.tree.leaves(params))
            return total + row["scale"] * weight * penalty, weight, aux

        return objective

    inner = on_base(language(model))
    programs, launch = [], module._launch

    def spy(plan, shared, each, runs):
        programs.append((plan, shared, each))
        return launch(plan, shared, each, runs)

    monkeypatch.setattr(module, "_launch", spy)
    hyper = {"lr": rates, "scale": np.array(scales, np.float32)}
    begin = partial(adapters, model)
    call = {"hyper": hyper, "axes": model.axes["lora"], "devices": jax.devices()[:1]}
    got = population(
        scaled, begin, tables, tune, seeds, frozen={"base": weights}, mode="vmap", **call
    )
    for i, seed in enumerate(seeds):
        key = jax.random.key(seed)
        one = dataclasses.replace(tune, lr=rates[i])
        state = fit(
            scaled({"scale": scales[i]}), begin(key), tables[i], one, key,
            frozen={"base": weights}, axes=model.axes["lora"], progress=False,
        )  # fmt: skip
        jax.tree.map(lambda a, b: near(a, b, 1e-5), got.run(i)[0], state.params)
    plan, shared, each = programs[0]
    text = module._program(plan)[0].lower(shared, each).compile().as_text()
    sizes = {tuple(x.shape) for x in jax.tree.leaves(weights)}
    assert "f32[3,1,8,2]" in text  # S adapters do live side by side
    for shape in sizes:
        stacked = ",".join(map(str, (3, *shape)))
        flat = ",".join(map(str, (3, *shape[1:]))) if len(shape) == 3 else stacked
        assert f"f32[{stacked}]" not in text and f"f32[{flat}]" not in text


def test_a_run_of_adapters_leaves_as_a_peft_folder(tmp_path):
    base = transformer(POPULATION)
    model = lora(base, 2)
    table = Table({"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)})
    weights = base.init(jax.random.key(5))
    tune, begin = Tune(batch=2, steps=2), partial(adapters, model)
    call = {"frozen": {"base": weights}, "devices": jax.devices()[:1]}
    got = population(on_base(language(model)), begin, table, tune, [0, 1], **call)
    export_adapter(model, got.run(1)[0], tmp_path)
    _, back = load_adapter(tmp_path, base)
    jax.tree.map(lambda a, b: near(a, b, 1e-6), back, got.run(1)[0])
