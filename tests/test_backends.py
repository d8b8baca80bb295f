"""Attention back ends against the XLA reference, and what each refuses."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh, rules_context
from w2s_jax.models import backends
from w2s_jax.models.backends import attend, choose, splash, xla


def _inputs(batch, length, heads, groups, h, dtype="float32"):
    keys = jax.random.split(jax.random.key(length), 4)
    sizes = (heads, groups, groups, heads)
    return [
        jax.random.normal(key, (batch, length, n, h), dtype)
        for key, n in zip(keys, sizes, strict=True)
    ]


def _segments(batch, length):
    """Three documents and padding per row, cut at different places."""
    cuts = np.array([[0.3, 0.55, 0.9], [0.1, 0.5, 0.8]])[np.arange(batch) % 2] * length
    places = np.arange(length)[None, :, None]
    number = (places >= cuts[:, None, :]).sum(-1) + 1
    return jnp.asarray(np.where(number == 4, 0, number), jnp.int32)


def _dense(q, k, v, segment):
    """One mask, one product: nothing to get wrong."""
    steps = jnp.arange(q.shape[1])
    mask = (steps[:, None] >= steps[None, :])[None]
    if segment is not None:
        mask = mask & (segment[:, :, None] == segment[:, None, :])
    return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def _pass(run, q, k, v, g, segment):
    """Output and gradients of ``run``."""
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segment), q, k, v)
    return out, *pull(g)


def _near(ours, want, bound):
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=bound, atol=bound)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [512, 600, 2304])
def test_blocks_of_queries_equal_one_product(length, segmented):
    *qkv, g = _inputs(2 if length < 1000 else 1, length, 2, 1, 4)
    segment = _segments(qkv[0].shape[0], length) if segmented else None
    ours, want = (jax.jit(_pass, static_argnums=0)(f, *qkv, g, segment) for f in (xla, _dense))
    _near(ours, want, 2e-5)


def _largest(run, *args):
    """Elements of the largest array that a gradient of ``run`` makes."""

    sizes, todo = [], [jax.make_jaxpr(run)(*args).jaxpr]
    while todo:
        jaxpr = todo.pop()
        for eqn in jaxpr.eqns:
            sizes += [var.aval.size for var in eqn.outvars]
            todo += jax.tree.leaves(
                [
                    getattr(x, "jaxpr", x)
                    for value in eqn.params.values()
                    for x in (value if isinstance(value, tuple | list) else [value])
                    if hasattr(x, "eqns") or hasattr(x, "jaxpr")
                ],
                is_leaf=lambda x: hasattr(x, "eqns"),
            )
    return max(sizes)


def test_scores_of_a_long_row_never_exist_at_once():
    *qkv, g = (jax.ShapeDtypeStruct(x, jnp.float32) for x in [(1, 4096, 4, 8)] * 4)

    def grads(run):
        return lambda q, k, v, g: _pass(run, q, k, v, g, None)

    scores = 4 * 4096 * 4096
    assert _largest(grads(_dense), *qkv, g) == scores
    assert _largest(grads(xla), *qkv, g) == scores * 256 // 4096


@pytest.mark.parametrize(
    ("length", "groups", "segmented"), [(256, 2, False), (256, 1, True), (200, 2, True)]
)
def test_splash_equals_the_reference(length, groups, segmented):
    *qkv, g = _inputs(2, length, 2, groups, 64)
    segment = _segments(2, length) if segmented else None

    def run(q, k, v, segment):
        return splash(q, k, v, segment, interpret=True)

    _near(_pass(run, *qkv, g, segment), _pass(xla, *qkv, g, segment), 2e-5)


@pytest.mark.slow
def test_splash_on_a_mesh_keeps_rows_and_heads_apart():
    *qkv, g = _inputs(4, 128, 4, 2, 64)
    segment = _segments(4, 128)

    def run(q, k, v, segment):
        return splash(q, k, v, segment, interpret=True)

    want = _pass(xla, *qkv, g, segment)
    with rules_context(make_mesh("data=2,fsdp=2,tensor=2")):
        ours = jax.jit(_pass, static_argnums=0)(run, *qkv, g, segment)
    _near(ours, want, 2e-5)


SHAPE = (2, 256, 4, 64)
Q = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
SEGMENT = jax.ShapeDtypeStruct(SHAPE[:2], jnp.int32)


def _like(**change):
    size = {"batch": 2, "length": 256, "heads": 4, "h": 64, "dtype": "bfloat16"} | change
    shape = tuple(size[name] for name in ("batch", "length", "heads", "h"))
    return jax.ShapeDtypeStruct(shape, size["dtype"])


@pytest.mark.parametrize(
    ("kind", "q", "segment", "name"),
    [
        ("cpu", Q, None, "xla"),
        ("tpu", Q, SEGMENT, "splash"),
        ("tpu", _like(h=32), None, "xla"),
        ("tpu", _like(length=64), None, "xla"),
        ("gpu", Q, None, "cudnn"),
        ("gpu", Q, SEGMENT, "xla"),
        ("gpu", _like(dtype="float32"), None, "xla"),
        ("gpu", _like(h=256), None, "xla"),
    ],
)
def test_auto_takes_the_kernel_that_is_exact(monkeypatch, kind, q, segment, name):
    monkeypatch.setattr(backends, "platform", lambda: kind)
    assert choose("auto", q, q, segment) == name
    assert choose("xla", q, q, segment) == "xla"


@pytest.mark.parametrize(
    ("kind", "asked", "q", "segment", "message"),
    [
        ("gpu", "cudnn", Q, SEGMENT, 'cannot keep segments apart; give the batch attention "rows"'),
        ("gpu", "cudnn", _like(dtype="float32"), None, "bfloat16 or float16, not float32"),
        ("gpu", "cudnn", _like(h=20), None, "head_dim up to 128 in steps of 8, not 20"),
        ("cpu", "cudnn", Q, None, "needs an NVIDIA GPU, the devices are cpu"),
        ("cpu", "splash", Q, None, "needs TPUs, the devices are cpu"),
        ("tpu", "splash", _like(length=100), None, "rows from 128 tokens, not 100"),
        ("tpu", "splash", _like(h=48), None, "head_dim in steps of 64, not 48"),
    ],
)
def test_a_kernel_asked_for_by_name_refuses_in_one_line(
    monkeypatch, kind, asked, q, segment, message
):
    monkeypatch.setattr(backends, "platform", lambda: kind)
    with pytest.raises(UserError, match=message) as error:
        choose(asked, q, q, segment)
    assert "\n" not in str(error.value) and asked in str(error.value)


def test_heads_that_do_not_divide_over_the_mesh_fall_back(monkeypatch):
    monkeypatch.setattr(backends, "platform", lambda: "tpu")
    with rules_context(make_mesh("tensor=8")):
        assert choose("auto", _like(heads=8), _like(heads=8), None) == "splash"
        assert choose("auto", _like(heads=8), _like(heads=4), None) == "xla"
        with pytest.raises(UserError, match="8 heads and 4 key/value heads do not divide over 8"):
            choose("splash", _like(heads=8), _like(heads=4), None)


def test_the_devices_of_the_mesh_decide():
    assert backends.platform() == "cpu"
    mesh = make_mesh()
    with rules_context(mesh):
        assert backends.platform() == "cpu"
    other = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=other)):
        assert backends.platform() == "tpu"


@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_is_lowered_to_its_fused_call(monkeypatch, padded):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # no GPU to ask here
    lengths = jnp.array([256, 0]) if padded else None

    def grads(q, k, v, g):
        _, pull = jax.vjp(lambda q, k, v: backends.cudnn(q, k, v, lengths), q, k, v)
        return pull(g)

    text = jax.jit(grads).trace(Q, Q, Q, Q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert ("PADDING_CAUSAL" if padded else '"CAUSAL') in text.replace("\\22", '"')


AHEAD = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from w2s_jax.mesh import make_mesh, rules_context
from w2s_jax.models import backends

slice = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = make_mesh("data=2,tensor=2", slice)
column = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

def grads(q, k, v, segment):
    run = lambda q, k, v: backends.causal("auto", q, k, v, segment)
    out, pull = jax.vjp(run, q, k, v)
    return pull(out)

def like(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=column)

for length, h, segmented in ((1024, 64, True), (640, 128, False)):
    q, k = like((2, length, 4, h)), like((2, length, 2, h))
    segment = like((2, length), jnp.int32) if segmented else None
    with rules_context(mesh):
        text = jax.jit(grads).lower(q, k, k, segment).compile().as_text()
    print(text.count("splash_mha_fwd"), text.count("splash_mha_dkv"), "all-gather(" in text)
"""


@pytest.mark.slow
def test_splash_compiles_ahead_of_time_for_tpu():
    pytest.importorskip("libtpu")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        forward, backward, gathered = line.split()
        assert int(forward) and int(backward) and gathered == "False", done.stdout
