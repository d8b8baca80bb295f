"""Annotating: padding and order do not show, a kept column is reused, the truth stays out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.annotate import annotate, predict, probabilities, surprise
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


def test_a_damaged_cache_is_made_again_with_a_word(table, tmp_path, caplog) -> None:
    annotate(total, SCALE, table, "score", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:40])
    done = annotate(total, SCALE, table, "score", cache=tmp_path)
    np.testing.assert_allclose(done["score"], 3 * table["features"].sum(-1), rtol=1e-6)
    assert "damaged" in caplog.text


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
