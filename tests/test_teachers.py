"""Stored teachers: what is read is what the teacher said, and nothing else is ever read for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teacher_world as world
from teacher_world import MODEL, K, N, T, V

from w2s_jax import annotate
from w2s_jax.columns import add_teacher
from w2s_jax.data import teachers
from w2s_jax.data.shards import Shards
from w2s_jax.errors import UserError
from w2s_jax.losses import sparse
from w2s_jax.models.transformer import decode
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table


def truth(params, table):
    """The full distribution of every place by the definition, and the places trained on."""
    logps = jax.nn.log_softmax(decode(MODEL.apply(params, table["tokens"])))
    return np.asarray(logps), teachers.predicted({"mask": table["mask"]})


def store(table, folder, **options):
    return add_teacher(MODEL, world.params(), table, K, folder, progress=False, batch=2, **options)


def batch(table, index=None):
    return table.batch(np.arange(len(table)) if index is None else index)["teacher"]


TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_read_is_what_the_definition_says(tmp_path, dtype) -> None:
    table = world.padded_table()
    logps, where = truth(world.params(), table)
    said = batch(store(table, tmp_path, dtype=dtype, shard=3))
    best = np.argsort(-logps, axis=-1)[..., :K]
    assert (said["ids"][where] == best[where]).all()
    picked = np.take_along_axis(logps, best, -1)
    stored = said["logits"].astype(np.float32)
    np.testing.assert_allclose(stored[where], picked[where], atol=TOLERANCE[dtype])
    tail = 1 - np.exp(picked).sum(-1)
    np.testing.assert_allclose(said["tail"][where], tail[where], atol=1e-6)
    assert str(said["logits"].dtype) == dtype and said["tail"].dtype == np.float32


def test_places_without_a_prediction_hold_the_uniform_distribution(tmp_path) -> None:
    table = world.padded_table()
    said, idle = batch(store(table, tmp_path)), ~teachers.predicted({"mask": table["mask"]})
    assert idle[:, -1].all() and (said["ids"][idle] == np.arange(K)).all()
    np.testing.assert_allclose(said["logits"][idle].astype(np.float32), -np.log(V), rtol=1e-3)
    np.testing.assert_allclose(said["tail"][idle], 1 - K / V, rtol=1e-6)


def test_targets_and_mask_give_the_same_records(tmp_path) -> None:
    plain, aimed = world.padded_table(), world.targets_table()
    first, second = batch(store(plain, tmp_path)), batch(store(aimed, tmp_path))
    here = teachers.predicted({"mask": plain["mask"]})
    there = aimed["targets"]["mask"] > 0
    for name in first:
        np.testing.assert_array_equal(first[name][here], second[name][there])
    assert second["ids"].shape == (N, 6, K) and first["ids"].shape == (N, T, K)


@pytest.mark.parametrize("storage", ["npy", "array_record"])
def test_any_rows_in_any_order(tmp_path, storage) -> None:
    table = store(world.padded_table(), tmp_path, shard=2, storage=storage)
    whole, index = batch(table), np.array([6, 0, 3, 3, 5])
    some = batch(table, index)
    for name in whole:
        np.testing.assert_array_equal(some[name], whole[name][index])
        np.testing.assert_array_equal(table["teacher"][name][2:4], whole[name][2:4])
    kept = table.take(index)
    np.testing.assert_array_equal(kept["teacher"]["tail"], some["tail"])


@pytest.mark.parametrize("storage", ["npy", "array_record"])
@pytest.mark.parametrize("shard", [1, 2, 7, 100])
def test_shards_and_batches_do_not_show(tmp_path, shard, storage) -> None:
    table = world.padded_table()
    whole = batch(store(table, tmp_path / "whole"))
    add_teacher(
        MODEL, world.params(), table, K, tmp_path / "cut",
        batch=3, shard=shard, storage=storage, progress=False,
    )  # fmt: skip
    cut = batch(teachers.read(tmp_path / "cut", table, verify=True))
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name])


def test_only_trained_predictions_take_space(tmp_path, capsys) -> None:
    table = world.padded_table()
    add_teacher(MODEL, world.params(), table, K, tmp_path)
    trained = int((table["mask"] > 0).sum())
    shards = Shards.read(tmp_path / teachers.identity(table))
    assert shards.records == trained
    assert shards.dtype.itemsize == K * (2 + 2) + 4, "16-bit ids, 16-bit values, float32 tail"
    line = capsys.readouterr().out
    assert f"{trained} predictions, top {K} of {V}, {shards.bytes / trained:.1f} bytes" in line


def test_logits_exist_for_a_chunk_only() -> None:
    params, table = world.params(), world.padded_table()
    columns = table.batch(np.arange(N))
    whole = annotate.top_k(MODEL, K)(params, columns)
    cut = annotate.top_k(MODEL, K, chunk=2 * N)
    for name, values in cut(params, columns).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-5)
    jaxpr = str(jax.make_jaxpr(cut)(params, columns))
    assert f"[{N},2,{V}]" in jaxpr and f"[{N},{T},{V}]" not in jaxpr
    assert f"[{N},{T},{V}]" in str(jax.make_jaxpr(annotate.top_k(MODEL, K))(params, columns))


@pytest.mark.slow
def test_a_killed_store_goes_on_at_the_missing_shards(tmp_path) -> None:
    path = os.pathsep.join([str(Path(world.__file__).parent), *sys.path])
    child = subprocess.Popen(
        [sys.executable, world.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["0\n", "1\n"]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    table = world.padded_table()
    with pytest.raises(UserError, match=r"half-written \(2 of 4 shards\)"):
        teachers.read(tmp_path, table)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.npy")}
    done = batch(store(table, tmp_path))
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.npy")}
    assert len(before) == 2 and len(after) == 4
    assert {name: after[name] for name in before} == before
    whole = batch(store(table, tmp_path / "again"))
    for name in whole:
        np.testing.assert_array_equal(done[name], whole[name])


def test_a_finished_store_runs_no_model(tmp_path, monkeypatch) -> None:
    table = store(world.padded_table(), tmp_path)

    def never(*_, **__):
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr(annotate, "stream", never)
    again = store(world.padded_table(), tmp_path)
    np.testing.assert_array_equal(batch(again)["ids"], batch(table)["ids"])


def test_another_table_is_refused(tmp_path) -> None:
    store(world.padded_table(), tmp_path)
    other = world.padded_table(1)
    with pytest.raises(UserError, match="no teacher for this table of 7 rows"):
        teachers.read(tmp_path, other)
    turned = world.padded_table().take(np.arange(N)[::-1])
    with pytest.raises(UserError, match="no teacher for this table"):
        teachers.read(tmp_path, turned)
    with pytest.raises(UserError, match="does not exist"):
        teachers.read(tmp_path / "nowhere", other)
    more = world.padded_table().with_columns(weight=np.ones(N, np.float32))
    assert "teacher" in teachers.read(tmp_path, more), "columns it does not depend on may change"


def test_another_teacher_in_the_same_folder_is_refused(tmp_path) -> None:
    table = world.padded_table()
    store(table, tmp_path)
    with pytest.raises(UserError, match="holds teacher '.*', not '.*': give another folder"):
        add_teacher(MODEL, world.params(1), table, K, tmp_path, progress=False)
    with pytest.raises(UserError, match="holds k 4, not 5"):
        add_teacher(MODEL, world.params(), table, 5, tmp_path, progress=False)


@pytest.mark.parametrize("k", [0, V + 1])
def test_k_outside_the_vocabulary_is_refused(tmp_path, k) -> None:
    with pytest.raises(UserError, match=f"top-k of {k} tokens from a vocabulary of {V}"):
        add_teacher(MODEL, world.params(), world.padded_table(), k, tmp_path, progress=False)
    with pytest.raises(UserError, match=f"top-k of {k} tokens"):
        batch = world.padded_table().batch(np.arange(2))
        annotate.top_k(MODEL, k)(world.params(), batch)


def test_all_of_the_vocabulary_leaves_no_tail() -> None:
    table = world.padded_table().batch(np.arange(2))
    said = annotate.top_k(MODEL, V)(world.params(), table)
    np.testing.assert_allclose(said["tail"], 0, atol=1e-6)


def words(*names: str) -> Tokenizer:
    import tokenizers

    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a")
    return Tokenizer(tokenizers.Tokenizer(model))


def test_a_tokenizer_is_compared_by_content(tmp_path) -> None:
    pytest.importorskip("tokenizers")
    table, mine = world.padded_table(), words("a", "b", "c")
    store(table, tmp_path, tokenizer=mine)
    for same in (mine, words("a", "b", "c")):
        teachers.read(tmp_path, table, vocab=V + 5, tokenizer=same)  # padded: the same tokens
        teachers.read(tmp_path, table, vocab=V, tokenizer=same)
    with pytest.raises(UserError, match="tokenizer .* is not the student's"):
        teachers.read(tmp_path, table, vocab=V, tokenizer=words("a", "c", "b"))
    with pytest.raises(UserError, match="the teacher names token 22, the student has 22"):
        teachers.read(tmp_path, table, vocab=22, tokenizer=mine)


def test_without_a_tokenizer_the_sizes_must_agree(tmp_path) -> None:
    table = world.padded_table()
    store(table, tmp_path)
    teachers.read(tmp_path, table, vocab=V)
    with pytest.raises(UserError, match="the teacher has 23 tokens, the student 24"):
        teachers.read(tmp_path, table, vocab=24)


@pytest.mark.parametrize("storage", ["npy", "array_record"])
def test_damage_is_one_line(tmp_path, capsys, storage) -> None:
    table = world.padded_table()
    store(table, tmp_path, shard=2, storage=storage)
    shard = sorted(tmp_path.glob("*/00001.*"))[0]
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: its content"):
        teachers.read(tmp_path, table, verify=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{len(content) - 1} bytes instead of {len(content)}"):
        teachers.read(tmp_path, table)
    shard.unlink()
    with pytest.raises(UserError, match="No such file"):
        teachers.read(tmp_path, table)
    add_teacher(MODEL, world.params(), table, K, tmp_path, storage=storage)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "making it again" in said[0] and "4 shards (1 new)" in said[1]
    teachers.read(tmp_path, table, verify=True)


def test_a_teacher_that_is_not_finite_is_refused(tmp_path) -> None:
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, world.params())
    with pytest.raises(UserError, match="not finite in rows 0 to 7"):
        add_teacher(MODEL, broken, world.padded_table(), K, tmp_path, progress=False)


def test_a_table_that_predicts_nothing_named_is_refused(tmp_path) -> None:
    bare = Table({"tokens": world.padded_table()["tokens"]})
    with pytest.raises(UserError, match="needs a column 'targets' or 'mask'"):
        store(bare, tmp_path)


def test_several_tables_share_a_folder(tmp_path) -> None:
    first, second = world.padded_table(), world.targets_table()
    one, two = store([first, second], tmp_path)
    again = [teachers.read(tmp_path, table) for table in (first, second)]
    np.testing.assert_array_equal(batch(one)["ids"], batch(again[0])["ids"])
    np.testing.assert_array_equal(batch(two)["ids"], batch(again[1])["ids"])


def test_the_digest_of_a_table_does_not_read_the_column(tmp_path, monkeypatch) -> None:
    table = store(world.padded_table(), tmp_path)

    def never(self, index):
        raise AssertionError("the column was read")

    name = table.digest()
    monkeypatch.setattr(teachers.Column, "__getitem__", never)
    assert table.digest() == name != world.padded_table().digest()


@pytest.mark.parametrize("k", [1, 4, V])
def test_the_gradient_of_the_stored_divergence_is_that_of_its_formula(k) -> None:
    student, other = (3 * jax.random.normal(jax.random.key(i), (2, 3, V)) for i in (0, 1))
    logps = jax.nn.log_softmax(other)
    best, ids = jax.lax.top_k(logps, k)
    tail = jnp.clip(1 - jnp.exp(best).sum(-1), 0, 1) * (k < V)
    weights = jnp.arange(6.0).reshape(2, 3)

    def formula(student):
        mine = jnp.take_along_axis(jax.nn.log_softmax(student), ids, -1)
        rest = 1 - jnp.exp(mine).sum(-1)
        of_tail = tail * jnp.log(tail / rest) if k < V else 0
        return (weights * ((jnp.exp(best) * (best - mine)).sum(-1) + of_tail)).sum()

    def ours(student):
        said = {"ids": ids, "logits": best, "tail": tail}
        return (weights * sparse.top_k(student, said)).sum()

    np.testing.assert_allclose(ours(student), formula(student), rtol=1e-5)
    found, want = jax.grad(ours)(student), jax.grad(formula)(student)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_full_disk_is_one_line_and_loses_nothing_written(tmp_path, monkeypatch) -> None:
    table, replace = world.padded_table(), os.replace

    def full(source, target):
        if str(target).endswith("00001.npy"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*00001.npy: No space left on device"):
        store(table, tmp_path, shard=2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["00000.npy", "index.json"]
    assert "teacher" in store(table, tmp_path, shard=2)


def test_of_several_processes_one_writes(tmp_path) -> None:
    table, ran = world.padded_table(), []

    def make(spans):
        for begin, end in spans:
            ran.append((begin, end))
            kept = teachers.predicted(table.batch(np.arange(begin, end)))
            shape = kept.shape
            arrays = {"ids": np.zeros((*shape, 1), np.int32), "tail": np.zeros(shape, np.float32)}
            yield begin, kept, {**arrays, "logits": np.zeros((*shape, 1), np.float32)}

    teachers.write(tmp_path, table, teachers.About("t", V, 1), make, shard=4, keep=False)
    assert ran == [(0, 4), (4, 7)] and not list(tmp_path.iterdir())
