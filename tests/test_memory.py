"""What the compiled step holds: donated state, one sum of gradients, remat policies, the host."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh, rules_context
from w2s_jax.models.config import REMAT
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language
from w2s_jax.train import fit as fits
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Aux, Table

CONFIG = Config(vocab=128, width=64, layers=4, heads=4, kv_heads=2, scan=True)


def rows(count, length=32):
    tokens = np.random.default_rng(0).integers(0, 128, size=(count, length)).astype(np.int32)
    return {"tokens": tokens, "mask": np.ones((count, length), np.float32)}


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.lru_cache
def compiled(config=CONFIG, batch=8, micro=1, spec=None, offload=False, **tune):
    """The program of ``fit``, and the state it starts from."""
    model = transformer(config)
    tx = optimizer(Tune(**tune), 10, model.axes)
    mesh = make_mesh(spec, jax.devices()[:4]) if spec else None
    mesh = fits._host_mesh(mesh) if offload else mesh
    with rules_context(mesh):
        params = model.init(jax.random.key(0))
        state, where = fits._begin(params, tx, 10, (), model.axes, mesh, offload)
        step = fits.make_step(language(model), tx, micro=micro, norms=True)
        update = fits._program(step, where, mesh)
        lowered = update.lower(state, (), rows(batch), jax.random.key(0))
        return lowered.compile(), state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro": 4},
        {"offload": True},
        {"config": dataclasses.replace(CONFIG, param_dtype="bfloat16"), "moments": "bfloat16"},
        pytest.param({"optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "parts", "offload", "bfloat16", "muon"],
)
def test_weights_and_optimiser_state_are_donated(options):
    program, state = compiled(**options)
    kept = size((state.params, state.opt))
    assert program.memory_analysis().alias_size_in_bytes >= kept


def test_shards_are_donated():
    program, state = compiled(spec="fsdp=4")
    mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= mine > 0.25 * size(state.params)


def test_accumulation_costs_one_sum_of_gradients():
    """Eight parts of one row need what one row needs, and one float32 copy of the gradients."""
    one, state = compiled(batch=1)
    parts, _ = compiled(batch=8, micro=8)
    extra = (x.memory_analysis().temp_size_in_bytes for x in (parts, one))
    assert next(extra) - next(extra) < 1.1 * size(state.params)


def test_accumulation_holds_no_activations_of_the_whole_batch():
    whole, parts = (compiled(batch=8, micro=micro)[0].memory_analysis() for micro in (1, 8))
    assert parts.temp_size_in_bytes < 0.5 * whole.temp_size_in_bytes


@functools.lru_cache
def gradient(remat, scan=True):
    """Compiled gradient of a sum over hidden states, alone: no head, no optimiser."""
    model = transformer(dataclasses.replace(CONFIG, layers=3, remat=remat, scan=scan))
    tokens = rows(2, 128)["tokens"]

    def loss(params):
        return jax.numpy.sin(model.apply(params, tokens).hidden).sum()

    params = model.init(jax.random.key(0))
    program = jax.jit(jax.grad(loss)).lower(params).compile()
    return program, program(params)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat", REMAT)
def test_every_policy_gives_the_same_gradient(remat, scan):
    want, got = gradient("none")[1], gradient(remat, scan)[1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def test_policies_keep_less_in_the_stated_order():
    order = ("none", "dots", "attention", "outputs", "full")
    bytes_kept = [gradient(r)[0].memory_analysis().temp_size_in_bytes for r in order]
    assert bytes_kept == sorted(bytes_kept, reverse=True) and len(set(bytes_kept)) == 5
    assert bytes_kept[1] < 0.8 * bytes_kept[0]


def test_offloaded_activations_wait_on_the_host():
    model = transformer(dataclasses.replace(CONFIG, remat="offload"))
    tokens = rows(2, 16)["tokens"]
    params = model.init(jax.random.key(0))
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.apply(p, tokens).hidden.sum()))(params))
    assert "<host>" in text or "Host" in text or "pinned_host" in text


def test_remat_scans_unless_told_otherwise():
    shallow = Config(vocab=8, width=8, layers=2, heads=2)
    assert not shallow.scanned
    assert dataclasses.replace(shallow, remat="full").scanned
    assert not dataclasses.replace(shallow, remat="full", scan=False).scanned


AXES = {"first": ("embed", "ffn"), "second": ("ffn", "classes")}
WEIGHTS = {"first": np.full((8, 16), 0.1, np.float32), "second": np.ones((16, 2), np.float32)}
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def squares(params, state, batch, key):
    """A network of two layers that learns to give 1."""
    out = jax.numpy.tanh(batch["features"] @ params["first"]) @ params["second"]
    return ((out - 1) ** 2).sum(), jax.numpy.float32(len(out)), Aux()


def train(steps=4, **options):
    options = {"mesh": make_mesh("fsdp=2", jax.devices()[:2]), **options}
    params = jax.tree.map(jax.numpy.asarray, WEIGHTS)
    return fit(
        squares, params, Table({"features": X}), Tune(lr=1e-2, batch=4, steps=steps),
        jax.random.key(1), axes=AXES, progress=False, **options,
    )  # fmt: skip


def kinds(state):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt) if leaf.ndim}


@pytest.mark.parametrize("mesh", [None, "fsdp=2"])
def test_optimiser_state_waits_on_the_host(mesh):
    mesh = make_mesh(mesh, jax.devices()[:2]) if mesh else None
    near, far = train(mesh=mesh), train(mesh=mesh, offload=True)
    assert kinds(far) == {"pinned_host"} and kinds(near) != {"pinned_host"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), near.params, far.params)
    assert far.params["first"].sharding.memory_kind == "device"


def test_a_run_may_go_on_with_its_state_on_the_host(tmp_path):
    def stop(state):
        if int(state.step) == 3:
            raise KeyboardInterrupt
        return {}

    whole = train(steps=6)
    for k, options in enumerate(({"offload": True}, {})):
        folder = tmp_path / str(k)
        with pytest.raises(KeyboardInterrupt):
            train(6, workdir=folder, save_every=2, evaluate=stop, eval_every=1, **options)
        resumed = train(6, workdir=folder, offload=not k)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole.params, resumed.params
        )


def test_a_device_without_host_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(fits, "HOST", "somewhere_else")
    with pytest.raises(UserError, match="has no memory of kind somewhere_else, only .*pinned_host"):
        train(offload=True)
