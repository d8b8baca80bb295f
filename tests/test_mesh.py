"""Mesh specifications, shardings from logical names, batches, the compilation cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh, shardings


@pytest.mark.parametrize(
    "spec, shape",
    [
        (None, (8, 1, 1, 1)),
        ("", (8, 1, 1, 1)),
        ("fsdp=2", (4, 2, 1, 1)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2, 1)),
        ("data=2, fsdp=-1", (2, 4, 1, 1)),
        ("tensor=8", (1, 1, 8, 1)),
        ("tensor=2,context=2", (2, 1, 2, 2)),
    ],
)
def test_make_mesh(spec, shape):
    assert tuple(make_mesh(spec).shape.values()) == shape


def test_make_mesh_on_some_devices():
    assert make_mesh("data=4", jax.devices()[:4]).devices.size == 4
    assert make_mesh(None, jax.devices()[:1]).devices.size == 1


@pytest.mark.parametrize(
    "spec", ["data=3", "rows=2", "data=2,data=4", "data=x", "data=0", "fsdp=3", "data=-1,fsdp=-1"]
)
def test_bad_mesh_is_one_line(spec):
    with pytest.raises(UserError, match="mesh") as error:
        make_mesh(spec)
    assert "\n" not in str(error.value)


def test_shardings_follow_the_rules():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    axes = {
        "embed": ("vocab", "embed"),
        "q": ("layers", "embed", "heads"),
        "norm": ("layers", "norm"),
        "odd": ("embed", "ffn"),
        "twice": ("heads", "kv_heads"),
        "plain": None,
    }
    shapes = {
        "embed": jnp.zeros((6, 4)),
        "q": jnp.zeros((3, 4, 4)),
        "norm": jnp.zeros((3, 4)),
        "odd": jnp.zeros((3, 4)),  # 3 does not divide over fsdp=2
        "twice": jnp.zeros((4, 4)),  # one mesh axis serves one dimension
        "plain": jnp.zeros((2, 2)),
    }
    got = {name: s.spec for name, s in shardings(axes, mesh, shapes).items()}
    assert got["embed"] == P("tensor", "fsdp")
    assert got["q"] == P(None, "fsdp", "tensor")
    assert got["norm"] == P(None, None)
    assert got["odd"] == P(None, "tensor")
    assert got["twice"] == P("tensor", None)
    assert got["plain"] == P()


def test_unknown_name_and_wrong_rank_are_refused():
    mesh = make_mesh()
    with pytest.raises(UserError, match="wings"):
        shardings({"a": ("wings",)}, mesh, {"a": jnp.zeros(2)})
    with pytest.raises(UserError, match="shape"):
        shardings({"a": ("embed",)}, mesh, {"a": jnp.zeros((2, 2))})


def test_batch_rows_and_put_batch():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    np.testing.assert_array_equal(meshes.batch_rows(mesh, 8), np.arange(8))
    batch = {"tokens": np.arange(16).reshape(8, 2), "chosen": {"ref": np.arange(8.0)}}
    placed = meshes.put_batch(batch, mesh, 8)
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"))
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    with pytest.raises(UserError, match="divide"):
        meshes.batch_rows(mesh, 6)


def test_replicate_leaves_what_is_on_the_mesh():
    mesh = make_mesh("data=2,fsdp=4")
    spread = jax.device_put(jnp.zeros(8), meshes.batch_sharding(mesh))
    tree = meshes.replicate({"a": spread, "b": jnp.ones(3), "key": jax.random.key(0)}, mesh)
    assert tree["a"] is spread
    assert tree["b"].sharding.is_fully_replicated and len(tree["b"].sharding.device_set) == 8


def test_logical_constraints_reach_the_compiled_program():
    from flax import linen as nn

    mesh = make_mesh("data=4,tensor=2")

    def f(x):
        return nn.with_logical_constraint(x * 2, ("batch", "length", "act_ffn"))

    with meshes.rules_context(mesh):
        y = jax.jit(f)(jnp.ones((8, 3, 4)))
    assert y.addressable_shards[0].data.shape == (2, 3, 2)
    assert f(jnp.ones((8, 3, 4))).sharding.is_fully_replicated  # outside: nothing happens


def test_every_weight_of_the_decoder_has_a_rule():
    from w2s_jax.models.transformer import Config, transformer

    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    for extra in ({}, {"rope": 0.0, "bias": "all", "norm": "layer", "tie": False}):
        model = transformer(Config(vocab=8, width=8, layers=2, heads=2, **extra))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        spread = shardings(model.axes, mesh, shapes)
        names = {axis for s in jax.tree.leaves(spread) for axis in s.spec if axis}
        assert names == {"fsdp", "tensor"}


def test_distribute_does_nothing_unless_configured(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.delenv("W2S_DISTRIBUTED", raising=False)
    assert meshes.distribute() is False


def test_compilation_cache_keeps_small_programs(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        assert meshes.compilation_cache(tmp_path / "xla") == tmp_path / "xla"
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        assert list((tmp_path / "xla").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_compilation_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compilation cache"):
        meshes.compilation_cache(tmp_path / "file" / "xla")


def _language(kind):
    """A decoder, a batch of each kind (plain, with segments, with attention rows), its loss."""
    from w2s_jax.models.transformer import Config, transformer
    from w2s_jax.objectives import language
    from w2s_jax.types import State

    config = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, max_length=16, scan=True)
    model = transformer(config)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 32)
    batch = {"tokens": tokens, "mask": jnp.ones((4, 16)).at[:, 0].set(0.0)}
    places = jnp.arange(16, dtype=jnp.int32)
    if kind == "segment":
        batch["segment"] = jnp.repeat(jnp.array([[1, 2, 2, 0]]), 4, axis=1).repeat(4, 0)
    if kind == "rows":
        take = jnp.stack([places[:8], places[8:]])[None].repeat(4, 0)
        batch["rows"] = {"take": take, "back": places[None, :, None].repeat(4, 0)}
    state = State(jnp.int32(0), jnp.int32(1), None, ())
    objective = language(model)

    def loss(params, batch):
        total, weight, _ = objective(params, state, batch, jax.random.key(2))
        return total / weight

    return model, params, batch, loss


@pytest.mark.parametrize("kind", ["plain", "segment", "rows"])
def test_context_axis_gives_the_single_device_gradient(kind):
    model, params, batch, loss = _language(kind)
    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh("data=2,tensor=2,context=2")
    with meshes.rules_context(mesh):
        weights = jax.device_put(params, shardings(model.axes, mesh, params))
        placed = jax.device_put(batch, meshes.batch_sharding(mesh))
        got = jax.jit(jax.value_and_grad(loss))(weights, placed)
    assert float(abs(got[0] - want[0])) < 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[1], want[1]
    )


def test_context_axis_splits_the_rows_of_every_activation():
    model, params, batch, _ = _language("segment")
    mesh = make_mesh("context=8")
    with meshes.rules_context(mesh):
        hidden = jax.jit(lambda p, b: model.apply(p, b["tokens"], segment=b["segment"]).hidden)
        compiled = hidden.lower(params, batch).compile()
        text = compiled.as_text()
        assert hidden(params, batch).addressable_shards[0].data.shape == (4, 2, 16)
    # 4 rows x 16 tokens x the width of the feed-forward (48) never whole on one device
    assert "f32[4,2,48]" in text and "f32[4,16,48]" not in text and "f32[64,48]" not in text
    assert "f32[4,4,2,16]" in text  # scores of own queries over all keys, per head


def test_attention_rows_of_a_batch_stay_on_their_device():
    model, params, batch, loss = _language("rows")
    mesh = make_mesh("data=4", jax.devices()[:4])
    with meshes.rules_context(mesh):
        placed = jax.device_put(batch, meshes.batch_sharding(mesh))
        program = jax.jit(jax.grad(loss)).lower(meshes.replicate(params, mesh), placed).compile()
    text = program.as_text()
    found = {kind for kind in ("all-gather", "all-to-all", "permute", "all-reduce") if kind in text}
    assert found == {"all-reduce"}  # the gradients of the weights and nothing else
