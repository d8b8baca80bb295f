"""S runs in one program are the S runs that ``fit`` makes, whatever the mode or the devices."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.losses.classification import aux_confidence, ramp, soft_xent
from w2s_jax.models.heads import linear, mlp
from w2s_jax.objectives import classify
from w2s_jax.train import groups as rules
from w2s_jax.train import population as module
from w2s_jax.train import split
from w2s_jax.train.fit import fit, start
from w2s_jax.train.groups import groups
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.population import one_of, population
from w2s_jax.types import Aux, Table, forward

WIDTH, CLASSES, ROWS = 6, 3, 40
TUNE = Tune(lr=0.05, batch=8, epochs=2, optimizer="adam", schedule="cosine", warmup=0.1)
MODEL = mlp(CLASSES, WIDTH, 5)
NAIVE = classify(MODEL, soft_xent)
SEEDS = [3, 1, 4]


def table(seed: int = 0, rows: int = ROWS) -> Table:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    truth = (features @ rng.normal(size=(WIDTH, CLASSES))).argmax(1)
    label = np.eye(CLASSES, dtype=np.float32)[truth]
    return Table({"features": features, "label": label, "truth": truth.astype(np.int32)})


def same(got, want, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-6), got, want)


def separate(objective, params, tables, tune=TUNE, seeds=SEEDS):
    """The parameters [S, ...] of one fit per run."""
    states = [
        fit(objective, params, one, tune, jax.random.key(seed), progress=False).params
        for one, seed in zip(tables, seeds, strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(7))


@pytest.fixture(scope="module")
def tables():
    return [table(0), table(0), table(1)]


@pytest.fixture(scope="module")
def fitted(params, tables):
    return separate(NAIVE, params, tables)


@pytest.mark.parametrize("mode", ["map", "batched", "vmap", "serial"])
def test_runs_equal_separate_fits(mode, params, tables, fitted):
    got = population(NAIVE, params, tables, TUNE, SEEDS, mode=mode)
    same(got.params, fitted)
    same(got.run(2)[0], jax.tree.map(lambda leaf: leaf[2], fitted))
    assert len(got) == 3 and got.failed == ()
    kernel = fitted["head"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1], atol=1e-3)
    if mode != "serial":  # a head at zero knows nothing, and learns
        same(got.metrics["loss"][:, 0], np.full(3, np.log(CLASSES)))
        assert (got.metrics["loss"][:, -1] < np.log(CLASSES)).all()


@pytest.mark.parametrize(("devices", "runs"), [(2, 3), (8, 11), (8, 1)])
def test_any_number_of_devices_gives_the_same_runs(devices, runs, params):
    call = partial(population, NAIVE, params, table(), TUNE, list(range(runs)))
    one = call(devices=jax.devices()[:1], mode="map")
    many = call(devices=jax.devices()[:devices], mode="batched", runs_at_once=2)
    same((many.params, many.metrics), (one.params, one.metrics))
    assert many.metrics["loss"].shape == (runs, 10)


def test_equal_shapes_compile_once_and_devices_do_not_talk(params, monkeypatch):
    module._program.cache_clear()
    launched, launch = [], module._launch

    def spy(*arguments):
        launched.append(arguments)
        return launch(*arguments)

    monkeypatch.setattr(module, "_launch", spy)
    for seed in (0, 5):
        population(NAIVE, params, [table(seed)] * 8, TUNE, range(seed, seed + 8))
    (plan, *_), (again, shared, each, _) = launched
    assert plan == again and len(plan.devices) == 8
    program, _ = module._program(plan)
    assert module._program.cache_info().misses == 1 and program._cache_size() == 1
    text = program.lower(shared, each).compile().as_text()
    assert not any(
        word in text for word in ("all-reduce", "all-gather", "collective", "all-to-all")
    )


def test_learning_rates_of_one_program_equal_separate_ones(params):
    rates = [0.01, 0.1]
    got = population(NAIVE, params, table(), TUNE, [0, 2], hyper={"lr": rates})
    for i, (seed, lr) in enumerate(zip([0, 2], rates, strict=True)):
        tune = Tune(**{**vars(TUNE), "lr": lr})
        want = separate(NAIVE, params, [table()], tune, [seed])
        same(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], got.params), want, 1e-4)


def test_losses_and_their_schedules_are_one_program(params):
    losses = [soft_xent, partial(aux_confidence, alpha=ramp(0, 0.75, over=0.5))]

    def objective(row):
        return classify(MODEL, one_of(losses, row["loss"]))

    got = population(objective, params, table(), TUNE, [2, 2], hyper={"loss": [0, 1]})
    for i, loss in enumerate(losses):
        want = separate(classify(MODEL, loss), params, [table()], seeds=[2])
        same(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], got.params), want)


@pytest.mark.parametrize("mode", ["map", "serial"])
def test_runs_on_some_rows_are_runs_on_the_table_of_those_rows(mode, params):
    rows = np.array([np.random.default_rng(i).permutation(ROWS)[:16] for i in range(2)])
    got = population(NAIVE, params, table(), TUNE, [0, 1], rows=rows, mode=mode)
    want = separate(NAIVE, params, [table().take(r) for r in rows], seeds=[0, 1])
    same(got.params, want)


@pytest.mark.parametrize("mode", ["vmap", pytest.param("serial", marks=pytest.mark.slow)])
def test_curve_points_are_the_parameters_of_those_updates(mode, params):
    probe = {"probe": lambda p: p["head"], "points": 3, "first": True}
    got = population(NAIVE, params, table(), TUNE, [0, 1], mode=mode, **probe)
    assert got.steps.tolist() == [0, 3, 7, 10]
    assert got.curve["kernel"].shape == (2, 4, 5, CLASSES)
    same(got.curve["kernel"][:, 0], np.zeros((2, 5, CLASSES)))
    same(got.curve["kernel"][:, -1], got.params["head"]["kernel"])
    # an optimizer whose rate does not depend on the number of updates still to come
    flat = Tune(lr=0.05, batch=8, steps=10)
    short = Tune(lr=0.05, batch=8, steps=3)
    got = population(NAIVE, params, table(), flat, [0, 1], mode=mode, **probe)
    want = separate(NAIVE, params, [table()], short, [0])
    same(got.curve["kernel"][:1, 1], want["head"]["kernel"])


def test_a_probe_reads_its_data(params):
    data = {"features": table(9).columns["features"]}
    probe = lambda p, data: forward(MODEL, p, data).logits  # noqa: E731
    got = population(NAIVE, params, table(), TUNE, [0, 1], probe=probe, data=data, points=1)
    want = forward(MODEL, jax.tree.map(lambda leaf: leaf[1], got.params), data).logits
    same(got.curve[1, 0], want)


def test_each_run_may_have_its_own_start():
    keys = jax.vmap(jax.random.key)(jnp.array(SEEDS))
    got = population(NAIVE, MODEL.init, table(), TUNE, SEEDS)
    stacked = population(NAIVE, jax.vmap(MODEL.init)(keys), table(), TUNE, SEEDS, stacked=True)
    same(got.params, stacked.params)
    want = separate(NAIVE, MODEL.init(jax.random.key(SEEDS[2])), [table()], seeds=SEEDS[2:3])
    same(jax.tree.map(lambda leaf: leaf[2:3], got.params), want)


def test_shared_columns_are_stored_once():
    base = table()
    other = base.with_columns(label=base["label"][::-1].copy())
    equal = base.with_columns(features=base["features"].copy())
    shared, each = module.arguments([base, other, equal], np.arange(ROWS)[None], [0, 1, 1], 8, 2)
    assert shared["pools"]["features"].shape == (1, ROWS, WIDTH)
    assert shared["pools"]["label"].shape == (2, ROWS, CLASSES)
    assert each["pools"]["label"].tolist() == [0, 1, 0]
    assert shared["order"].shape == (2, 2, 8) and each["order"].tolist() == [0, 1, 1]
    assert "truth" not in shared["pools"]


@pytest.mark.parametrize("mode", ["vmap", pytest.param("serial", marks=pytest.mark.slow)])
def test_a_run_that_breaks_is_named_and_hurts_no_other(mode, params, fitted):
    broken = table().with_columns(features=np.full((ROWS, WIDTH), np.nan, np.float32))
    tables = [table(0), broken, table(1)]
    probe = {"probe": lambda p: p["head"]["kernel"], "points": 2}
    got = population(NAIVE, params, tables, TUNE, SEEDS, mode=mode, **probe)
    assert got.failed == (1,)
    assert np.isnan(got.params["head"]["kernel"][1]).all() and np.isnan(got.curve[1, -1]).all()
    kept = [jax.tree.map(lambda leaf: leaf[[0, 2]], tree) for tree in (got.params, fitted)]
    same(*kept)


def test_frozen_weights_memory_keys_and_micro_batches_reach_the_objective():
    def objective(params, state, batch, key):
        noise = jax.random.normal(key) * state.frozen["scale"]
        memory = state.memory + 1
        value = (params["w"] * (batch["features"].sum(1) + noise + memory)).sum()
        return value, jnp.float32(len(batch["features"])), Aux({}, memory)

    start, frozen, memory = {"w": jnp.ones(())}, {"scale": jnp.float32(0.5)}, jnp.float32(0)
    tune = Tune(lr=0.1, batch=8, steps=4, micro=2, optimizer="sgd", clip=0)
    shared = {"frozen": frozen, "memory": memory}
    got = population(objective, start, table(), tune, [4, 9], **shared)
    for i, seed in enumerate([4, 9]):
        key = jax.random.key(seed)
        want = fit(objective, start, table(), tune, key, progress=False, **shared).params
        same(got.params["w"][i], want["w"])


def test_probes_of_a_nearly_free_model_beat_their_prior():
    model = linear(CLASSES, WIDTH)
    objective = classify(model, soft_xent)
    tune = Tune(lr=0.1, batch=8, epochs=10)
    got = population(objective, model.init(jax.random.key(0)), table(), tune, range(20))
    assert (got.metrics["agreement"][:, -5:].mean(1) > 0.8).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "fast"}, "fast"),
        ({"hyper": {"lr": [0.1]}}, "hyper lr"),
        ({"rows": np.zeros((3, 4), int)}, "rows"),
        ({"points": 2}, "probe"),
        ({"probe": lambda p: p, "points": 99}, "points"),
        ({"stacked": True}, "params"),
        ({"mode": "serial", "hyper": {"lr": [0.1, 0.2]}}, "serial"),
        ({"tables": [table(0), table(0, 20)]}, "length"),
        ({"tables": [table(0)]}, "tables"),
    ],
)
def test_bad_calls_are_refused(change, words, params):
    call = {"tables": table(), **change}
    with pytest.raises(UserError, match=words):
        population(NAIVE, params, call.pop("tables"), TUNE, [0, 1], **call)


def test_auto_groups_small_updates_and_what_fits(monkeypatch, params):
    """By arithmetic: groups of four million multiplications, fewer where memory is short."""
    tx = optimizer(TUNE, 10)
    state = jax.eval_shape(lambda p: start(p, tx, 10), params)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    opt = sum(leaf.size for leaf in jax.tree.leaves(state.opt))
    live, kept = 4 * (2 * weights + opt), 4 * weights
    pools = {"features": np.zeros((1, ROWS, WIDTH), np.float32)}

    def chosen(mode="auto", runs=64, bytes_=1e12, limit=None, pools=pools, rows=8, shared=None):
        monkeypatch.setattr(rules, "room", lambda device: bytes_)
        shared = {"pools": pools, **(shared or {})}
        return groups(mode, state, rows, shared, runs, jax.devices()[:2], limit, False)

    data = 4 * ROWS * WIDTH
    assert chosen() == (32, 64)
    assert chosen(runs=10) == (5, 10)  # two devices, five runs each: one even group
    assert chosen(runs=200) == (25, 200)  # a hundred each: four even groups
    assert chosen(rows=4_000_000 // weights // 8)[0] == 8
    base = {"frozen": np.zeros(10**6, "i1")}
    assert chosen(rows=4_000_000 // weights)[0] == chosen(rows=1, shared=base)[0] == 1
    assert chosen(pools={"tokens": np.zeros((1, ROWS, 10**4), np.int32)}) == (1, 64)
    assert chosen(bytes_=data + 2 * 3 * live + 8)[0] == 3
    assert chosen(bytes_=data + 2 * 3 * live + 8, shared={"frozen": np.zeros(live, "i4")})[0] == 1
    assert chosen(bytes_=data + 2 * 12 * kept) == (2, 24)  # twelve done, two in training
    assert chosen("vmap", bytes_=0) == (32, 64) and chosen("vmap", limit=5)[0] == 5
    assert chosen("map", bytes_=0) == (1, 64)


def test_short_memory_gives_the_same_runs_in_several_launches(monkeypatch, params):
    call = partial(population, NAIVE, params, table(), TUNE, range(7), devices=jax.devices()[:1])
    whole = call()
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    data = table().batch(range(ROWS))
    fixed = sum(leaf.nbytes for leaf in jax.tree.leaves(data)) + 4 * (7 * 10 * 8 + ROWS + 2)
    fixed += 4 * weights  # the shared start
    monkeypatch.setattr(rules, "room", lambda device: fixed + 2 * 12 * weights * 4)
    seen, program = [], module._program
    monkeypatch.setattr(module, "_program", lambda plan: seen.append(plan) or program(plan))
    parts = call(keep_state=True)
    assert (seen[0].width, seen[0].chunk) == (2, 2)
    same((parts.params, parts.metrics), (whole.params, whole.metrics))
    assert parts.states.opt and whole.states is None


def test_a_run_split_out_is_a_finished_fit(tmp_path, params, tables):
    """``fit`` finds the run done: same weights, optimiser's state and rows, no further update."""
    rates = [0.05, 0.01, 0.02]
    runs = population(
        NAIVE, params, tables, TUNE, SEEDS, hyper={"lr": rates}, keep_state=True, mode="vmap"
    )
    tune = dataclasses.replace(TUNE, lr=rates[2])
    split.write_run(runs, 2, tmp_path / "run", tables[2], tune, SEEDS[2])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    again = partial(fit, NAIVE, params, tables[2], key=jax.random.key(SEEDS[2]), progress=False)
    state = again(tune=tune, workdir=tmp_path / "run")
    assert int(state.step) == 10
    jax.tree.map(np.testing.assert_array_equal, state.params, runs.run(2)[0])
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines
    again(tune=tune, workdir=tmp_path / "own")
    theirs = (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()
    for a, b in zip(map(json.loads, lines), map(json.loads, theirs), strict=True):
        assert a.keys() == b.keys()
        same([a[name] for name in a], [b[name] for name in a], 1e-4)
    with pytest.raises(UserError, match="other settings: lr"):
        again(tune=TUNE, workdir=tmp_path / "run")
    with pytest.raises(UserError, match="already"):
        split.write_run(runs, 1, tmp_path / "run", tables[1], tune, SEEDS[1])
    with pytest.raises(UserError, match="keep_state"):
        plain = dataclasses.replace(runs, states=None)
        split.write_run(plain, 1, tmp_path / "x", tables[1], tune, SEEDS[1])
    with pytest.raises(UserError, match="broke"):
        broken = dataclasses.replace(runs, failed=(1,))
        split.write_run(broken, 1, tmp_path / "x", tables[1], tune, SEEDS[1])
