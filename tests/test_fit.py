"""The step and the loop: splits that change nothing, one compilation, donation, the NaN stop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language
from w2s_jax.train import fit as fit_module
from w2s_jax.train.fit import NotFinite, fit, make_step, order, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Aux, Table

AXES = {"first": ("embed", "ffn"), "second": ("ffn", "classes")}


def mlp(key=0):
    rng = np.random.default_rng(key)
    return {
        "first": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    }


def points(rows=64, key=1):
    rng = np.random.default_rng(key)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    label = np.eye(2, dtype=np.float32)[(x[:, 0] > 0).astype(int)]
    weight = rng.uniform(0.1, 2.0, size=rows).astype(np.float32)
    return Table({"features": x, "label": label, "weight": weight})


def objective(params, state, batch, key):
    """Weighted cross-entropy; the memory counts the rows seen."""
    logits = jnp.tanh(batch["features"] @ params["first"]) @ params["second"]
    losses = -(jax.nn.log_softmax(logits) * batch["label"]).sum(-1)
    weight = batch["weight"]
    right = (logits.argmax(-1) == batch["label"].argmax(-1)).astype(jnp.float32)
    aux = Aux({"accuracy": (right.sum(), jnp.float32(len(weight)))})
    return (losses * weight).sum(), weight.sum(), aux


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def losses_of(folder):
    return np.asarray([row["loss"] for row in rows_of(folder) if "loss" in row])


def close(tree, other, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), tree, other)


@pytest.mark.parametrize("micro", [2, 16])
def test_gradient_does_not_depend_on_the_split(micro):
    """Uneven weights: only dividing the sums once, at the end, gives the same update."""
    tx = optimizer(Tune(optimizer="sgd", lr=1.0, clip=0.0), 10)
    state, batch = start(mlp(), tx, 10), points().batch(np.arange(16))
    whole, want = jax.jit(make_step(objective, tx))(state, batch, jax.random.key(0))
    split, got = jax.jit(make_step(objective, tx, micro=micro))(state, batch, jax.random.key(0))
    close(split.params, whole.params, 1e-6)
    for name in ("loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def test_update_is_the_weighted_mean_gradient():
    tx = optimizer(Tune(optimizer="sgd", lr=1.0, clip=0.0), 10)
    state, batch = start(mlp(), tx, 10), points().batch(np.arange(16))

    def mean(params):
        total, weight, _ = objective(params, state, batch, None)
        return total / weight

    new, metrics = jax.jit(make_step(objective, tx))(state, batch, jax.random.key(0))
    loss, grads = jax.jit(jax.value_and_grad(mean))(state.params)
    close(new.params, jax.tree.map(jnp.subtract, state.params, grads), 1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert int(new.step) == 1


def test_batch_of_weight_zero_changes_nothing():
    tx = optimizer(Tune(lr=1.0), 10)
    state, batch = start(mlp(), tx, 10), points().batch(np.arange(4))
    batch["weight"] = np.zeros(4, np.float32)
    new, metrics = jax.jit(make_step(objective, tx))(state, batch, jax.random.key(0))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0
    close(new.params, state.params, 0)


def test_memory_and_keys_pass_through_micro_batches():
    """Memory goes from part to part; every part and every update draws from its own key."""

    def remember(params, state, batch, key):
        total, weight, _ = objective(params, state, batch, key)
        seen = state.memory["rows"] + len(batch["weight"])
        drawn = jax.random.bits(key, (), jnp.uint32) >> 8
        slot = jax.nn.one_hot(state.memory["rows"] // 4, 8, dtype=jnp.uint32)
        return (
            total,
            weight,
            Aux(memory={"rows": seen, "keys": state.memory["keys"] + slot * drawn}),
        )

    tx = optimizer(Tune(), 10)
    memory = {"rows": jnp.int32(0), "keys": jnp.zeros(8, jnp.uint32)}
    state = start(mlp(), tx, 10, memory=memory)
    step = jax.jit(make_step(remember, tx, micro=4))
    for _ in range(2):
        state, _ = step(state, points().batch(np.arange(16)), jax.random.key(0))
    assert int(state.memory["rows"]) == 32
    assert len(set(np.asarray(state.memory["keys"]).tolist())) == 8


def test_order_is_a_permutation_per_epoch_without_short_batches():
    seen = np.concatenate([order(3, 10, 4, step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(order(3, 10, 10, 0), order(4, 10, 10, 0))
    np.testing.assert_array_equal(order((0, 3), 10, 4, 2), order((0, 3), 10, 4, 2))
    assert sorted(order(0, 3, 7, 0)[:3]) == [0, 1, 2]  # a batch larger than the table


def test_order_of_one_seed_is_pinned():
    """The data order is part of a result: it must not change between releases."""
    np.testing.assert_array_equal(order((0, 1), 8, 8, 0), [1, 4, 6, 5, 7, 3, 2, 0])


@pytest.fixture
def programs(monkeypatch):
    """The compiled updates that ``fit`` makes."""
    made, make = [], fit_module._program
    monkeypatch.setattr(fit_module, "_program", lambda *a: made.append(make(*a)) or made[-1])
    return made


@pytest.mark.parametrize("spec", [None, "data=2,fsdp=2,tensor=2"])
def test_compiles_once(programs, spec):
    mesh = make_mesh(spec) if spec else None
    tune = Tune(batch=8, steps=5, optimizer="adamw", micro=2)
    fit(objective, mlp(), points(), tune, jax.random.key(0), axes=AXES, mesh=mesh, progress=False)
    assert programs[0]._cache_size() == 1


def test_compiles_once_after_resuming(programs, tmp_path):
    tune = Tune(batch=8, steps=6)
    kwargs = {"axes": AXES, "progress": False, "workdir": tmp_path, "mesh": make_mesh("fsdp=2")}

    def stop(state):
        if int(state.step) == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(objective, mlp(), points(), tune, jax.random.key(0), evaluate=stop, eval_every=1,
            save_every=2, **kwargs)  # fmt: skip
    fit(objective, mlp(), points(), tune, jax.random.key(0), **kwargs)
    assert [program._cache_size() for program in programs] == [1, 1]
    assert [row["step"] for row in rows_of(tmp_path)][-4:] == [3, 4, 5, 6]


def test_state_is_donated_and_the_callers_arrays_are_not(programs):
    params, frozen = mlp(), {"teacher": jnp.ones(3)}
    tune = Tune(batch=8, steps=3)
    state = fit(objective, params, points(), tune, jax.random.key(0), frozen=frozen, progress=False)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, frozen)))
    assert state.frozen["teacher"] is frozen["teacher"]
    old = start(jax.tree.map(jnp.copy, params), optimizer(tune, 3), 3)
    programs[0](old, frozen, points().batch(np.arange(8)), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt)))


def documents(rows=32, length=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 16, size=(rows, length)).astype(np.int32)
    segment = np.where(np.arange(length) < rng.integers(6, length + 1, size=(rows, 1)), 1, 0)
    return Table(
        {
            "tokens": tokens,
            "segment": segment.astype(np.int32),
            "position": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "mask": (segment * (np.arange(length) > 0)).astype(np.float32),
        }
    )


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_eight_devices_give_the_single_device_curve(tmp_path, spec):
    tune = Tune(lr=1e-2, batch=16, epochs=3, micro=2)
    for name, mesh in (("one", None), ("eight", make_mesh(spec))):
        fit(
            objective, mlp(), points(), tune, jax.random.key(1), axes=AXES, mesh=mesh,
            workdir=tmp_path / name, progress=False,
        )  # fmt: skip
    one, eight = losses_of(tmp_path / "one"), losses_of(tmp_path / "eight")
    assert one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_eight_devices_give_the_single_device_curve_of_a_decoder(tmp_path, name, spec):
    model = transformer(Config(vocab=16, width=16, layers=2, heads=4, ffn=32, scan=True))
    params = model.init(jax.random.key(0))
    tune = Tune(lr=1e-2, batch=8, steps=8, optimizer=name, warmup=0.2)
    for label, mesh in (("one", None), ("eight", make_mesh(spec))):
        state = fit(
            language(model), params, documents(), tune, jax.random.key(1), axes=model.axes,
            mesh=mesh, workdir=tmp_path / label, progress=False,
        )  # fmt: skip
    one, eight = losses_of(tmp_path / "one"), losses_of(tmp_path / "eight")
    assert one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    q = state.params["layers"]["q"]
    assert q.addressable_shards[0].data.size * (1 if spec == "data=8" else 4) == q.size
    assert float(state.progress) == 1.0


def test_optimiser_state_lives_where_the_weights_do():
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    for name in ("adamw", "muon"):
        tune = Tune(batch=8, steps=1, optimizer=name)
        state = fit(
            objective, mlp(), points(), tune, jax.random.key(0), axes=AXES, mesh=mesh,
            progress=False,
        )  # fmt: skip
        moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.shape == (4, 8)]
        assert moments and all(m.addressable_shards[0].data.shape == (2, 4) for m in moments)


def test_rows_metrics_and_evaluations(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"dev": float(state.params["first"].sum()) + state.frozen}

    tune = Tune(batch=8, epochs=1)
    fit(
        objective, mlp(), points(), tune, jax.random.key(0), workdir=tmp_path, evaluate=evaluate,
        eval_every=3, frozen=1.0, progress=False,
    )  # fmt: skip
    assert seen == [0, 3, 6, 8]
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert set(rows[1]) == {"step", "loss", "grad_norm", "accuracy"}
    assert set(rows[0]) == {"step", "dev"}
    speed = rows_of(tmp_path, "speed")
    assert speed[-1]["step"] == 8 and speed[-1]["updates_per_second"] > 0


def test_progress_goes_to_stderr_as_plain_lines(capsys):
    fit(objective, mlp(), points(), Tune(batch=8, steps=2), jax.random.key(0))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "step 2/2" in err


def test_nan_in_the_data_names_step_rows_and_column(tmp_path):
    table = points()
    table["features"][13, 2] = np.nan
    step = next(s for s in range(8) if 13 in order((0, 5), 64, 8, s))
    with pytest.raises(NotFinite) as error:
        fit(
            objective, mlp(), table, Tune(batch=8, epochs=1), jax.random.key(5), workdir=tmp_path,
            save_every=1, progress=False,
        )  # fmt: skip
    message = str(error.value)
    assert "\n" not in message
    assert f"at update {step};" in message and "column features is not finite in row 13" in message
    assert error.value.step == step
    np.testing.assert_array_equal(error.value.rows, order((0, 5), 64, 8, step))
    assert len(losses_of(tmp_path)) == step


def test_nan_in_one_layer_names_it():
    """A stacked weight whose layer 2 alone has no finite gradient: sqrt at 0."""

    def brittle(params, state, batch, key):
        total, weight, aux = objective(params, state, batch, key)
        at_zero = jnp.asarray([1.0, 1.0, 0.0, 1.0])
        return total + jnp.sqrt(params["stack"].sum(-1) ** 2 * at_zero).sum(), weight, aux

    params = mlp() | {"stack": jnp.ones((4, 3))}
    with pytest.raises(NotFinite, match=r"first broken gradient: stack\[2\] \(1 of 3 weights\)"):
        fit(brittle, params, points(), Tune(batch=8, steps=3), jax.random.key(0), progress=False)


def test_bad_inputs_are_one_line(tmp_path):
    run = {"key": jax.random.key(0), "progress": False}
    with pytest.raises(UserError, match="empty table"):
        fit(objective, mlp(), Table(), Tune(), **run)
    with pytest.raises(UserError, match="divide"):
        fit(objective, mlp(), points(), Tune(batch=12), mesh=make_mesh(), **run)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fit(objective, mlp(), points(), Tune(steps=1), workdir=tmp_path / "file", **run)
