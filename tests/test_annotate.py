"""Annotating: padding and order do not show, a kept column is reused, the truth stays out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax import annotate as annotating
from w2s_jax import mesh as meshes
from w2s_jax.annotate import annotate, predict, probabilities, surprise
from w2s_jax.data.shards import Shards
from w2s_jax.errors import UserError
from w2s_jax.mesh import batch_sharding, make_mesh, replicated
from w2s_jax.models.heads import linear
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.types import Table

ROWS = 7
SCALE = jnp.float32(3.0)


@pytest.fixture
def table() -> Table:
    rng = np.random.default_rng(0)
    return Table(
        {
            "id": np.array([f"row {i}" for i in range(ROWS)], object),
            "features": rng.normal(size=(ROWS, 2)).astype(np.float32),
            "truth": np.arange(ROWS, dtype=np.int32) % 2,
        }
    )


def total(scale, batch):
    return scale * batch["features"].sum(-1)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_every_row_gets_its_own_value_whatever_the_batch(table, batch) -> None:
    done = annotate(total, SCALE, table, "score", batch=batch)
    np.testing.assert_allclose(done["score"], 3 * table["features"].sum(-1), rtol=1e-6)
    assert list(done["id"]) == list(table["id"]) and "score" not in table


def test_the_last_batch_has_the_shape_of_the_others_and_no_truth(table) -> None:
    seen = []

    def fn(scale, batch):
        seen.append((sorted(batch), batch["features"].shape))
        return total(scale, batch)

    predict(fn, SCALE, table, batch=3)
    assert seen == [(["features"], (3, 2))], "one trace, whole batches, device columns only"


def test_rows_split_over_a_mesh_come_back_in_order(table) -> None:
    mesh = make_mesh("data=2,fsdp=2", jax.devices()[:4])
    where = []

    def fn(scale, batch):
        jax.debug.inspect_array_sharding(batch["features"], callback=where.append)
        return total(scale, batch)

    scale = jax.device_put(SCALE, replicated(mesh))
    found = predict(fn, scale, table, batch=3, mesh=mesh)
    np.testing.assert_allclose(found, predict(total, SCALE, table), rtol=1e-6)
    assert where[0].is_equivalent_to(batch_sharding(mesh), 2)


def nested(scale, batch):
    return {
        "ids": jnp.zeros((*batch["features"].shape, 1), jnp.int32),
        "logits": (scale * batch["features"]).astype(jnp.bfloat16)[..., None],
    }


def test_a_nested_column_is_kept_and_read_again_bit_for_bit(table, tmp_path) -> None:
    made = annotate(nested, SCALE, table, "teacher", batch=3, cache=tmp_path / "t")["teacher"]
    again = annotate(total, SCALE, table, "teacher", cache=tmp_path / "t")["teacher"]
    assert made.keys() == again.keys() == {"ids", "logits"}
    assert again["logits"].dtype == jnp.bfloat16 and again["logits"].shape == (ROWS, 2, 1)
    np.testing.assert_array_equal(made["logits"], again["logits"])


def test_a_kept_column_is_not_made_again(table, tmp_path) -> None:
    first = annotate(total, SCALE, table, "score", cache=tmp_path / "kept")["score"]

    def never(params, batch):
        raise AssertionError("the cache was not used")

    second = annotate(never, SCALE, table, "score", cache=tmp_path / "kept")["score"]
    np.testing.assert_array_equal(first, second)


def counted(table, tmp_path, batch=1):
    """How many rows a pass over a cache makes, and what it gives."""
    made = []

    def fn(scale, rows):
        jax.debug.callback(lambda x: made.append(len(x)), rows["features"])
        return total(scale, rows)

    done = annotate(fn, SCALE, table, "score", batch=batch, cache=tmp_path)["score"]
    jax.effects_barrier()
    return sum(made), done


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr("w2s_jax.annotate.SHARD", 2)


def test_a_stopped_pass_goes_on_where_it_was(table, tmp_path, small_shards, monkeypatch) -> None:
    put, full = Shards.put, predict(total, SCALE, table)

    def twice(self, number, arrays):
        if number == 2:
            raise KeyboardInterrupt
        put(self, number, arrays)

    monkeypatch.setattr(Shards, "put", twice)
    with pytest.raises(KeyboardInterrupt):
        annotate(total, SCALE, table, "score", batch=1, cache=tmp_path)
    monkeypatch.setattr(Shards, "put", put)
    made, done = counted(table, tmp_path)
    assert made == 3, "of 7 rows two shards of two were there"
    np.testing.assert_array_equal(done, full)
    assert counted(table, tmp_path)[0] == 0


@pytest.mark.parametrize("harm", ["cut", "bit", "gone"])
def test_a_damaged_shard_is_made_again_with_a_word(
    table, tmp_path, small_shards, caplog, harm
) -> None:
    first = annotate(total, SCALE, table, "score", batch=1, cache=tmp_path)["score"]
    kept = sorted(tmp_path.glob("*.npy"))[1]
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.unlink()
    if harm != "gone":
        kept.write_bytes(content if harm == "bit" else content[:-2])
    made, again = counted(table, tmp_path)
    assert made == 2 and f"{kept} is damaged" in caplog.text and len(caplog.records) == 1
    np.testing.assert_array_equal(first, again)


def test_a_damaged_index_is_one_line(table, tmp_path) -> None:
    annotate(total, SCALE, table, "score", cache=tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=r"index.json is damaged .*delete") as error:
        annotate(total, SCALE, table, "score", cache=tmp_path)
    assert "\n" not in str(error.value)


def test_the_next_batch_is_under_way_before_the_last_is_fetched(table, monkeypatch) -> None:
    events = []
    put, fetch = meshes.put_batch, annotating._fetch
    monkeypatch.setattr(meshes, "put_batch", lambda *a: events.append("put") or put(*a))
    monkeypatch.setattr(annotating, "_fetch", lambda *a: events.append("fetch") or fetch(*a))
    predict(total, SCALE, table, batch=3)
    assert events == ["put", "put", "fetch", "put", "fetch", "fetch"]


def test_several_tables_give_several_results(table) -> None:
    wide = Table({"features": np.ones((2, 5), np.float32)})
    first, second = predict(total, SCALE, [table, wide], batch=3)
    np.testing.assert_array_equal(first, predict(total, SCALE, table))
    np.testing.assert_array_equal(second, [15, 15])


def test_a_pass_says_how_far_it_is(table, monkeypatch, capsys) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(annotating.time, "perf_counter", lambda: float(next(now)))
    predict(total, SCALE, table, batch=2, progress="teacher")
    assert capsys.readouterr().err == "teacher: 4/7 rows\nteacher: 7/7 rows\n"


def test_a_cache_of_other_rows_is_refused(table, tmp_path) -> None:
    annotate(total, SCALE, table, "score", cache=tmp_path)
    with pytest.raises(UserError, match="holds 7 rows for a table of 2; delete it"):
        annotate(total, SCALE, table.take([0, 1]), "score", cache=tmp_path)


def test_an_empty_table_is_refused(table) -> None:
    with pytest.raises(UserError, match="empty table"):
        predict(total, SCALE, table.take([]))


def test_probabilities_are_the_softmax_of_the_logits(table) -> None:
    model = linear(2, 2)
    kernel = np.array([[0.0, np.log(3.0)], [0.0, 0.0]], np.float32)
    ones = Table({"features": np.ones((2, 2), np.float32)})
    found = predict(probabilities(model), {"kernel": kernel}, ones)
    np.testing.assert_allclose(found, [[0.25, 0.75]] * 2, rtol=1e-6)
    assert found.dtype == np.float32


def test_surprise_is_the_weighted_nll_of_each_row() -> None:
    model = transformer(Config(vocab=11, width=8, layers=1, heads=1))
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 5)).astype(np.int32)
    mask = np.array([[9, 1, 0, 0.5, 1]] * 3, np.float32)  # nothing predicts the first token
    said = predict(surprise(model), params, Table({"tokens": tokens, "mask": mask}))
    logps = jax.nn.log_softmax(decode(model.apply(params, tokens)))[:, :-1]
    picked = np.take_along_axis(np.asarray(logps), tokens[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(said["nll"], -(picked * mask[:, 1:]).sum(1), rtol=1e-5)
    np.testing.assert_allclose(said["tokens"], [2.5] * 3)
