"""Which rows an update sees, several tables in one run, and batches that are ready in time."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language
from w2s_jax.train import fit as fit_module
from w2s_jax.train.feed import Feed, order, turn
from w2s_jax.train.fit import fit
from w2s_jax.train.log import Log, Meter, Progress
from w2s_jax.train.optim import Tune
from w2s_jax.train.watch import Watch
from w2s_jax.types import Table

SIZES = (10, 3, 9)  # with batches of 4: 3 + 1 + 3 turns per epoch
MODEL = transformer(Config(vocab=16, width=8, layers=1, heads=2))


def rows_of(length, rows, packed=False):
    rng = np.random.default_rng(length)
    columns = {
        "tokens": rng.integers(1, 16, size=(rows, length)).astype(np.int32),
        "mask": np.ones((rows, length), np.float32),
    }
    if packed:
        steps = np.arange(length, dtype=np.int32)
        columns["segment"] = np.tile(1 + steps // 3, (rows, 1))
        columns["position"] = np.tile(steps % 3, (rows, 1))
    return Table(columns)


TABLES = [rows_of(length, rows) for length, rows in zip((5, 7, 9), SIZES, strict=True)]


def train(table, **kwargs):
    tune = kwargs.pop("tune", None) or Tune(lr=1e-2, batch=4, epochs=2)
    return fit(
        language(MODEL), MODEL.init(jax.random.key(0)), table, tune, jax.random.key(3),
        axes=MODEL.axes, progress=False, **kwargs,
    )  # fmt: skip


def test_every_table_has_its_turns_and_its_own_line_of_rows():
    drawn = [turn((0, 3), SIZES, 4, step) for step in range(14)]
    tables = [table for table, _ in drawn]
    for epoch in (tables[:7], tables[7:]):
        assert [epoch.count(i) for i in range(3)] == [3, 1, 3]
    assert tables[:7] != tables[7:] and tables[:7] != sorted(tables[:7])
    for i, size in enumerate(SIZES):
        line = np.concatenate([rows for table, rows in drawn if table == i])
        assert sorted(line[:size]) == list(range(size))
    lines = [np.concatenate([r for t, r in drawn if t == i])[:9] for i in (0, 2)]
    assert not np.array_equal(*lines)


def test_a_turn_is_a_function_of_the_seed_and_the_step():
    forward = [turn(5, SIZES, 4, step) for step in range(20)]
    backward = [turn(5, SIZES, 4, step) for step in reversed(range(20))][::-1]
    for (a, rows), (b, same) in zip(forward, backward, strict=True):
        assert a == b and np.array_equal(rows, same)
    assert [t for t, _ in forward] != [turn(6, SIZES, 4, step)[0] for step in range(20)]


def test_one_table_in_a_list_is_that_table():
    assert turn(1, [10], 4, 3)[0] == 0
    np.testing.assert_array_equal(turn(1, [10], 4, 3)[1], order(1, 10, 4, 3))
    assert Tune(batch=4, epochs=1.4).total([10]) == Tune(batch=4, epochs=1.4).total(10) == 4
    alone, listed = train(TABLES[0]), train(TABLES[:1])
    jax.tree.map(np.testing.assert_array_equal, alone.params, listed.params)


def test_total_of_several_tables_counts_their_turns():
    assert Tune(batch=4, epochs=2).total(SIZES) == 14
    assert Tune(batch=4, epochs=0.5).total(SIZES) == 4
    assert Tune(batch=4, steps=3).total(SIZES) == 3


def test_several_tables_resume_bit_for_bit(tmp_path):
    whole = train(TABLES)
    assert int(whole.step) == 14

    def stop(state):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(TABLES, workdir=tmp_path, save_every=5, evaluate=stop, eval_every=1)
    resumed = train(TABLES, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    changed = [*TABLES[:2], rows_of(9, 8)]
    with pytest.raises(UserError, match="other settings: .*rows"):
        train(changed, workdir=tmp_path)


COMPILED: list[str] = []


@pytest.fixture
def compiled():
    """Names of what is compiled, from JAX's own events."""
    if not COMPILED:  # a listener cannot be taken back
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, seconds, **_: COMPILED.append(name) if "backend_compile" in name else None
        )
    COMPILED.clear()
    return COMPILED


RUNS = {
    "packed": ([rows_of(9, 16, packed=True)], {}, 1),
    "buckets": (TABLES, {}, 3),
    "accumulated": (TABLES, {"micro": 2}, 3),
    "mesh": (TABLES, {"mesh": "data=2,fsdp=2"}, 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_compiled_after_the_first_epoch(name, compiled, monkeypatch):
    tables, options, shapes = RUNS[name]
    mesh = options.get("mesh")
    mesh = make_mesh(mesh, jax.devices()[:4]) if mesh else None
    made, make = [], fit_module._program
    monkeypatch.setattr(fit_module, "_program", lambda *a: made.append(make(*a)) or made[-1])
    counts = {}

    def look(state):
        counts[int(state.step)] = len(compiled)
        return {}

    tune = Tune(lr=1e-2, batch=4, epochs=4, micro=options.get("micro", 1))
    epoch = tune.total([len(table) for table in tables]) // 4
    train(tables, tune=tune, mesh=mesh, evaluate=look, eval_every=epoch)
    assert made[0]._cache_size() == shapes
    assert counts[epoch] >= shapes and counts[4 * epoch] == counts[epoch]


def test_more_than_four_shapes_are_refused():
    with pytest.raises(UserError, match="5 tables have 5 different shapes.*at most 4"):
        train([rows_of(length, 4) for length in range(4, 9)])
    train([rows_of(4, 4) for _ in range(5)], tune=Tune(batch=4, steps=1))
    with pytest.raises(UserError, match="empty table"):
        train([TABLES[0], rows_of(3, 0)])


def test_two_batches_are_on_their_way():
    feed = Feed(TABLES, 0, 4, None, steps=4)
    first = feed.take(0)
    np.testing.assert_array_equal(first["tokens"], feed.rows(0)[0]["tokens"])
    feed.prepare(1)
    assert [step for step, _ in feed.ready] == [1, 2]
    feed.take(1)
    feed.prepare(2)
    feed.take(2)
    feed.prepare(3)
    assert [step for step, _ in feed.ready] == [3]  # nothing after the last update
    assert feed.tokens[0] == first["tokens"].size


class Slow:
    """A stored column: numpy behind ``len`` and fancy indexing; notes who reads."""

    def __init__(self, values, fault=None):
        self.values, self.fault, self.readers = values, fault, set()

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.readers.add(threading.current_thread())
        if self.fault in index:
            raise OSError("the disk is gone")
        return self.values[index]


def test_stored_columns_are_read_in_the_background():
    table = TABLES[0]
    slow = Slow(table["tokens"])
    state = train(table.with_columns(tokens=slow))
    jax.tree.map(np.testing.assert_array_equal, state.params, train(table).params)
    assert any(reader is not threading.main_thread() for reader in slow.readers)
    assert not any(reader.is_alive() for reader in slow.readers - {threading.main_thread()})


def test_a_reader_that_fails_stops_the_run():
    bad = int(order((0, 3), 10, 4, 1)[0])  # first read by the second update
    with pytest.raises(OSError, match="the disk is gone"):
        train(TABLES[0].with_columns(tokens=Slow(TABLES[0]["tokens"], bad)))


def test_nested_columns_reach_the_devices():
    side = {"tokens": np.ones((8, 3), np.int32), "mask": np.ones((8, 3), np.float32)}
    table = Table({"chosen": side, "rejected": dict(side)})
    mesh = make_mesh("data=4", jax.devices()[:4])
    batch = Feed([table], 0, 4, mesh, steps=1).take(0)
    assert batch["chosen"]["tokens"].addressable_shards[0].data.shape == (1, 3)


def test_metrics_are_fetched_late():
    feed = Feed(TABLES[:1], 0, 4, None, steps=4)
    log, bar = Log(None), Progress(4, show=False)
    watch = Watch(4, feed, log, bar, Meter(0.0, jax.devices()[:1]), None, 0, None, 0)
    done = []
    for step in range(4):
        feed.take(step)
        watch.record(step, {"loss": jnp.ones(()), "grad_norm": jnp.ones(()), "norms": ()})
        done.append(watch.fetched)
    watch.flush()
    assert done == [0, 0, 1, 2] and watch.fetched == 4
