"""Columns instead of models: step 0 is ln 2, a digest sees every bit, a teacher lives elsewhere."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teacher_world as world
from teacher_world import MODEL, N, V

from w2s_jax import annotate
from w2s_jax.columns import add_reference, add_teacher, digest, live_teacher
from w2s_jax.data import teachers
from w2s_jax.data.pairs import pack_pairs, pad_pairs
from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.losses.preference import dpo
from w2s_jax.losses.sparse import top_k
from w2s_jax.mesh import make_mesh, shardings
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import distill, prefer
from w2s_jax.train.fit import fit, make_step, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Table

CONFIG = Config(vocab=97, width=32, layers=2, heads=2, max_length=64)


def pairs(count: int = 11):
    rng = np.random.default_rng(0)

    def texts(low, high):
        return [rng.integers(1, 97, rng.integers(low, high)).tolist() for _ in range(count)]

    return texts(3, 9), texts(1, 20), texts(1, 20)


def padded() -> list[Table]:
    return [pad_pairs(*pairs())]


def packed() -> list[Table]:
    return pack_pairs(*pairs(), per_row=2, classes=2)


def first_losses(model, params, tables, batch, *, micro=1, beta=1.0, length_mean=False):
    """Loss of the first update of a run on each batch, by the step that ``fit`` compiles."""
    objective = prefer(model, partial(dpo, beta=beta), length_mean=length_mean)
    tx = optimizer(Tune(batch=batch), 1, None)
    step = jax.jit(make_step(objective, tx, micro=micro))
    state, key = start(params, tx, 1), jax.random.key(0)
    return [
        float(step(state, table.batch(np.arange(at, at + batch) % len(table)), key)[1]["loss"])
        for table in tables
        for at in range(0, len(table), batch)
    ]


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("plain", [True, False])
def test_the_loss_of_step_0_is_ln_2(make, plain) -> None:
    change = {} if plain else {"remat": "full", "scan": True, "dtype": "bfloat16"}
    model = transformer(dataclasses.replace(CONFIG, **change))
    params = model.init(jax.random.key(1))
    tables = add_reference(model, params, make(), batch=7, progress=False)
    how = {"micro": 1, "length_mean": False} if plain else {"micro": 2, "length_mean": True}
    losses = first_losses(model, params, tables, 2, **how)
    np.testing.assert_allclose(losses, math.log(2), atol=1e-5)


@pytest.mark.slow
def test_the_loss_of_step_0_is_ln_2_on_a_mesh(tmp_path) -> None:
    model = transformer(CONFIG)
    params = model.init(jax.random.key(1))
    tables = add_reference(model, params, packed(), batch=7, progress=False)
    fit(
        prefer(model, partial(dpo, beta=1.0), length_mean=False),
        params, tables, Tune(batch=2, steps=1), jax.random.key(0), workdir=tmp_path,
        axes=model.axes, mesh=make_mesh("fsdp=2,tensor=2", jax.devices()[:4]), progress=False,
    )  # fmt: skip
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first["loss"], math.log(2), atol=1e-5)


def test_another_reference_does_not_give_ln_2() -> None:
    model = transformer(CONFIG)
    params, other = (model.init(jax.random.key(seed)) for seed in (1, 2))
    tables = add_reference(model, other, packed(), progress=False)
    assert max(abs(x - math.log(2)) for x in first_losses(model, params, tables, 2)) > 1e-2


@pytest.mark.parametrize("make", [padded, packed])
def test_the_reference_is_the_sum_over_the_response(make) -> None:
    model = transformer(CONFIG)
    params = model.init(jax.random.key(1))
    prompts, *sides = pairs()
    say = jax.jit(lambda params, tokens: jax.nn.log_softmax(decode(model.apply(params, tokens))))
    want = np.zeros((len(prompts), 2))
    for i, prompt in enumerate(prompts):
        for j, side in enumerate(sides):
            text = prompt + side[i]
            tokens = np.zeros((1, 32), np.int32)  # causal: what follows does not matter
            tokens[0, : len(text)] = text
            logps = say(params, tokens)[0]
            places = np.arange(len(prompt), len(text))
            want[i, j] = np.asarray(logps)[places - 1, tokens[0, places]].sum()
    for table in add_reference(model, params, make(), progress=False):
        if "pairs" in table:
            here = table["source"]
            found, mine = table["pairs"]["ref"][here >= 0], want[here[here >= 0]]
        else:
            found = np.stack([table[name]["ref"] for name in ("chosen", "rejected")], -1)
            mine = want
        np.testing.assert_allclose(found, mine, rtol=1e-5)


def test_a_kept_reference_is_reused_and_named_by_what_it_depends_on(tmp_path, monkeypatch) -> None:
    model = transformer(CONFIG)
    params = model.init(jax.random.key(1))
    first = add_reference(model, params, padded(), cache=tmp_path, progress=False)[0]
    stream, ran = annotate.stream, []

    def seen(fn, params, table, spans, *rest):
        ran.append(spans)
        return stream(fn, params, table, spans, *rest)

    monkeypatch.setattr(annotate, "stream", seen)
    more = first.with_columns(weight=np.ones(len(first), np.float32))
    again = add_reference(model, params, more, cache=tmp_path, progress=False)
    assert ran == [[]], "an old reference and a weight change nothing"
    np.testing.assert_array_equal(first["chosen"]["ref"], again["chosen"]["ref"])
    bumped = jax.tree.map(lambda leaf: leaf, params)
    bumped["final_norm"] = bumped["final_norm"].at[3].multiply(1 + 1e-6)
    add_reference(model, bumped, more, cache=tmp_path, progress=False)
    add_reference(model, params, more.take([1, 0]), cache=tmp_path, progress=False)
    low = transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    add_reference(low, params, more, cache=tmp_path, progress=False)
    assert len(ran) == 4 and all(ran[1:]) and len(list(tmp_path.iterdir())) == 4


def test_a_table_without_pairs_is_refused() -> None:
    with pytest.raises(UserError, match="needs packed 'pairs', or 'chosen' and 'rejected'"):
        add_reference(MODEL, world.params(), world.padded_table(), progress=False)


LEAVES = {
    "float32": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "bfloat16": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3),
    "int8": np.arange(5, dtype=np.int8),
    "bool": np.array([True, False]),
    "scalar": np.float32(3),
}


def test_a_digest_sees_every_bit_and_every_place() -> None:
    base = digest(LEAVES)
    assert base == digest(jax.tree.map(jnp.asarray, LEAVES)) and len(base) == 16
    seen = {base}
    for name, leaf in LEAVES.items():
        flat = np.array(leaf).reshape(-1)
        bits = flat.view(f"u{flat.dtype.itemsize}")
        for place in range(len(bits)):
            for bit in (0, 8 * flat.dtype.itemsize - 1) if name != "bool" else (0,):
                other = bits.copy()
                other[place] ^= 1 << bit
                seen.add(digest({**LEAVES, name: other.view(flat.dtype).reshape(np.shape(leaf))}))
    assert len(seen) == 1 + 2 * (24 + 6 + 5 + 1) + 2
    sign = LEAVES["float32"].copy()
    sign[0, 0] *= -1  # two sign bits: sums without mixing would cancel
    assert digest({**LEAVES, "float32": sign}) not in seen
    swapped = LEAVES["float32"][::-1].copy()
    assert digest({**LEAVES, "float32": swapped}) not in seen
    assert digest({**LEAVES, "float32": LEAVES["float32"].reshape(3, 2, 4)}) not in seen
    renamed = dict(LEAVES)
    renamed["float33"] = renamed.pop("float32")
    assert digest(renamed) not in seen


def test_a_digest_does_not_depend_on_where_the_weights_are() -> None:
    params = world.params()
    mesh = make_mesh("data=1,fsdp=4,tensor=2")
    spread = jax.device_put(params, shardings(MODEL.axes, mesh, params))
    assert digest(spread) == digest(params) == digest(jax.device_get(params))


def losses(table, objective, mesh, folder, frozen=()):
    """Of three updates of a student that is not the teacher."""
    tune = Tune(lr=1e-2, batch=4, steps=3)
    fit(
        objective, world.params(1), table, tune, jax.random.key(0), workdir=folder,
        axes=MODEL.axes, mesh=mesh, frozen=frozen, progress=False,
    )  # fmt: skip
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("make", [world.padded_table, world.targets_table])
def test_a_teacher_on_other_devices_is_the_teacher_inside_the_step(make, tmp_path) -> None:
    ours, theirs = make_mesh("data=2,fsdp=2", jax.devices()[:4]), jax.devices()[4:]
    there = make_mesh("data=2,tensor=2", theirs)
    live = live_teacher(MODEL, world.params(), make(), V, mesh=there, batch=4, dtype=None)
    found = losses(live, distill(MODEL, top_k), ours, tmp_path / "beside")
    inside = distill(MODEL, forward_kl, teacher=MODEL)
    want = losses(make(), inside, ours, tmp_path / "inside", {"teacher": world.params()})
    assert len(want) == 3
    np.testing.assert_allclose(found, want, rtol=1e-2)  # bfloat16 log-probabilities


def test_a_live_teacher_says_what_a_stored_one_says(tmp_path) -> None:
    table, mesh = world.padded_table(), make_mesh("data=2", jax.devices()[4:6])
    live = live_teacher(MODEL, world.params(), table, 4, mesh=mesh, batch=3, dtype=None)
    kept = add_teacher(MODEL, world.params(), table, 4, tmp_path, dtype="bfloat16", progress=False)
    for index in (np.arange(N), np.array([5, 1, 1]), np.array([2])):
        one, two = live.batch(index)["teacher"], kept.batch(index)["teacher"]
        np.testing.assert_array_equal(one["ids"], two["ids"])
        for name in ("logits", "tail"):
            here, there = (x[name].astype(np.float32) for x in (one, two))
            np.testing.assert_allclose(here, there, rtol=1e-2, atol=1e-6)
        assert {name: x.dtype for name, x in one.items()} == {n: x.dtype for n, x in two.items()}


def test_a_live_teacher_stays_on_its_devices_and_runs_once_a_batch() -> None:
    table, mesh = world.padded_table(), make_mesh("data=2", jax.devices()[4:6])
    where, runs = [], []

    @dataclasses.dataclass(frozen=True, eq=False)
    class Seen:
        config: object
        axes: object
        reads: tuple[str, ...] = ("tokens",)

        def apply(self, params, tokens):
            jax.debug.inspect_array_sharding(tokens, callback=where.append)
            jax.debug.callback(lambda: runs.append(1))
            return MODEL.apply(params, tokens)

    model = Seen(MODEL.config, MODEL.axes)
    live = live_teacher(model, world.params(), table, 4, mesh=mesh, batch=4)  # type: ignore[arg-type]
    live.batch(np.arange(4))
    jax.effects_barrier()
    assert len(runs) == 1 and where[0].device_set == set(jax.devices()[4:6])
    live.batch(np.arange(7))
    jax.effects_barrier()
    assert len(runs) == 3 and len(where) == 1, "two batches of four, nothing compiled again"


def test_a_digest_of_a_table_does_not_run_a_live_teacher() -> None:
    table, mesh = world.padded_table(), make_mesh("data=1", jax.devices()[4:5])
    one = live_teacher(MODEL, world.params(), table, 4, mesh=mesh, batch=4).digest()
    two = live_teacher(MODEL, world.params(1), table, 4, mesh=mesh, batch=4).digest()
    assert one != two


@pytest.mark.slow
def test_a_stored_teacher_trains_as_the_whole_one_does(tmp_path) -> None:
    table = world.targets_table()
    add_teacher(MODEL, world.params(), table, V, tmp_path, dtype="float32", progress=False)
    stored = teachers.read(tmp_path, table)
    found = losses(stored, distill(MODEL, top_k), None, tmp_path / "stored")
    inside = distill(MODEL, forward_kl, teacher=MODEL)
    want = losses(table, inside, None, tmp_path / "inside", {"teacher": world.params()})
    np.testing.assert_allclose(found, want, rtol=1e-4)
