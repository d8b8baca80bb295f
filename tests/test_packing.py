"""Packing: every document once and whole, masks never lost, rows nearly full."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data.packing import (
    buckets,
    fill,
    length_classes,
    pack,
    pack_evenly,
    with_rows,
    with_targets,
)
from w2s_jax.errors import UserError
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language
from w2s_jax.types import State, Table


def _documents(seed, count, longest):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, count)
    return [
        (rng.integers(1, 1000, size).tolist(), rng.integers(0, 2, size).astype(float).tolist())
        for size in sizes
    ]


def _unpack(table):
    """The documents of a packed table, read back row by row."""
    found = []
    for tokens, segment, position, mask in zip(
        *(table[name] for name in ("tokens", "segment", "position", "mask")), strict=True
    ):
        for number in range(1, segment.max() + 1):
            where = np.flatnonzero(segment == number)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            assert np.array_equal(position[where], np.arange(len(where)))
            found.append((tuple(tokens[where].tolist()), tuple(mask[where].tolist())))
    return found


@pytest.mark.parametrize(("count", "window"), [(1, 8), (257, 16), (257, 8192)])
def test_each_document_once_and_whole(count, window):
    documents = _documents(0, count, 32)
    table = pack(documents, 32, window=window)
    want = [(tuple(ids), (0.0, *mask[1:])) for ids, mask in documents]
    assert sorted(_unpack(table)) == sorted(want)
    padding = table["segment"] == 0
    for name in ("tokens", "position", "mask"):
        assert not table[name][padding].any()


def test_golden_rows():
    documents = [([1, 2], None), ([3, 4, 5], [1, 0, 0.5]), ([6], None), ([7, 8], None)]
    table = pack(documents, 5)
    assert table["tokens"].tolist() == [[3, 4, 5, 1, 2], [7, 8, 6, 0, 0]]
    assert table["segment"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 2, 0, 0]]
    assert table["position"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert table["mask"].tolist() == [[0, 0, 0.5, 0, 1], [0, 1, 0, 0, 0]]
    assert table["tokens"].dtype == np.int32
    assert table["mask"].dtype == np.float32


def test_rows_are_nearly_full_and_statistics_agree():
    documents = _documents(1, 5000, 60)
    table = pack(documents, 256)
    stats = fill(table)
    tokens = sum(len(ids) for ids, _ in documents)
    assert (stats.documents, stats.tokens) == (5000, tokens)
    assert stats.trained == sum(int(np.count_nonzero(mask[1:])) for _, mask in documents)
    assert stats.share == tokens / table["tokens"].size > 0.98
    assert "5000 documents" in str(stats)


def test_deterministic():
    assert pack(_documents(2, 300, 20), 24).digest() == pack(_documents(2, 300, 20), 24).digest()


@pytest.mark.parametrize("size", [4, 5, 7, 8, 10, 11])
def test_split_predicts_every_target_once(size):
    ids = list(range(100, 100 + size))
    table = pack([(ids, None), ([1, 2], None)], 4, on_long="split")
    trained = table["tokens"][table["mask"] > 0].tolist()
    assert sorted(trained) == sorted([*ids[1:], 2])
    for tokens, mask in _unpack(table):  # the token before a target is its true predecessor
        assert all(b == a + 1 for a, b in zip(tokens, tokens[1:], strict=False))
        assert mask[0] == 0


def test_arrays_and_lists_agree():
    documents = _documents(3, 50, 9)
    arrays = [(np.asarray(ids, np.int64), np.asarray(mask)) for ids, mask in documents]
    assert pack(documents, 16).digest() == pack(arrays, 16).digest()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "no documents"),
        ([([1], None), ([], None)], {}, "document 1 is empty"),
        ([([1, 2], [1.0])], {}, "2 tokens but 1 loss weights"),
        ([([1], None), ([1] * 9, None)], {}, "document 1 has 9 tokens"),
        ([([1], None)], {"on_long": "cut"}, "on_long"),
        ([([1], None)], {"length": 1}, "at least 2"),
    ],
)
def test_bad_input_is_one_line(documents, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pack(documents, **{"length": 8, **options})
    assert "\n" not in str(caught.value)


def rows(count=40, width=64, seed=0):
    rng = np.random.default_rng(seed)
    length = np.clip(rng.lognormal(2.5, 0.6, count), 2, width).astype(int)
    real = np.arange(width)[None] < length[:, None]
    mask = real & (rng.random(real.shape) < 0.4)
    mask[:, 0], mask[np.arange(count), length - 1] = False, True
    return Table(
        {
            "tokens": np.where(real, rng.integers(1, 40, real.shape), 0).astype(np.int32),
            "segment": real.astype(np.int32),
            "position": np.where(real, np.arange(width)[None], 0).astype(np.int32),
            "mask": mask.astype(np.float32),
        }
    )


MODEL = transformer(Config(vocab=40, width=16, layers=1, heads=2, max_length=64))
LANGUAGE = language(MODEL)


@jax.jit
def part(params, batch):
    """Loss, its weight and its gradient on one batch."""
    state = State(jnp.int32(0), jnp.int32(1), params, ())

    def loss(params):
        total, weight, _ = LANGUAGE(params, state, batch, jax.random.key(0))
        return total, weight

    return jax.value_and_grad(loss, has_aux=True)(params)


def language_loss(tables):
    params = MODEL.init(jax.random.key(0))
    parts = [part(params, t.batch(np.arange(len(t)))) for t in tables]
    weight = sum(w for (_, w), _ in parts)
    total = sum(loss for (loss, _), _ in parts) / weight
    return total, jax.tree.map(lambda *grads: sum(grads) / weight, *(g for _, g in parts))


@pytest.mark.parametrize("change", [with_targets, partial(buckets, multiple=8, least=4)])
def test_leaving_out_what_is_not_trained_on_changes_nothing(change):
    table = rows()
    changed = change(table)
    (a, ga), (b, gb) = (language_loss(t if isinstance(t, list) else [t]) for t in (table, changed))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ga, gb)


def test_rows_of_documents_change_nothing():
    packed = pack([(ids, None) for ids, _ in _documents(0, 30, 20)], 32)
    packed = packed.with_columns(tokens=packed["tokens"] % 40)
    given = with_rows(packed, multiple=4)
    assert given["rows"]["take"].shape[2] == 20
    (a, ga), (b, gb) = (language_loss([t]) for t in (packed, given))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ga, gb)


def test_documents_packed_evenly_are_the_documents():
    documents = [(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids, _ in _documents(3, 61, 30)]
    documents = [([t % 40 for t in ids], w) for ids, w in documents if len(ids) > 1]
    tables = pack_evenly(documents, 4, classes=3, multiple=4)
    assert len(tables) <= 3
    assert sum(t["segment"].max(1).sum() for t in tables) == len(documents)
    assert all((t["segment"].max(1) >= 1).all() and t["segment"].max() == 4 for t in tables)
    (a, ga), (b, gb) = language_loss([pack(documents, 64)]), language_loss(tables)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ga, gb)


def test_targets_by_hand():
    table = Table(
        {
            "tokens": np.array([[5, 6, 7, 8]], np.int32),
            "mask": np.array([[1, 0, 0.5, 2]], np.float32),  # nothing precedes the first token
        }
    )
    targets = with_targets(table, multiple=1)["targets"]
    assert targets["at"].tolist() == [[1, 2]] and targets["ids"].tolist() == [[7, 8]]
    assert targets["mask"].tolist() == [[0.5, 2.0]]
    with pytest.raises(UserError, match="row 0 has no token to train on"):
        with_targets(table.with_columns(mask=np.array([[1, 0, 0, 0]], np.float32)))


def test_buckets_cut_to_few_lengths_and_lose_no_row():
    table = rows(400)
    parts = buckets(table.with_columns(number=np.arange(400)), 4, multiple=8, least=10)
    assert 2 <= len(parts) <= 4 and all(len(p) >= 10 for p in parts)
    assert sorted(np.concatenate([p["number"] for p in parts])) == list(range(400))
    assert sum(p["tokens"].size for p in parts) < 0.6 * table["tokens"].size
    assert sum((p["segment"] > 0).sum() for p in parts) == (table["segment"] > 0).sum()


def test_pairs_are_cut_by_the_longer_response():
    side = {"tokens": np.ones((2, 16), np.int32), "mask": np.zeros((2, 16), np.float32)}
    chosen, rejected = dict(side), {k: v.copy() for k, v in side.items()}
    chosen["mask"] = chosen["mask"].copy()
    chosen["mask"][:, 3], rejected["mask"][:, 5], rejected["mask"][1, 11] = 1, 1, 1
    parts = buckets(Table({"chosen": chosen, "rejected": rejected}), 2, multiple=4, least=1)
    assert [p["chosen"]["tokens"].shape for p in parts] == [(1, 8), (1, 12)]


def test_length_classes_by_hand():
    lengths = np.array([1, 9, 2, 10, 1])
    classes = length_classes(lengths, 2, least=1, power=1)
    assert [c.tolist() for c in classes] == [[0, 2, 4], [1, 3]]
    assert [c.tolist() for c in length_classes(lengths, 3, least=9, power=1)] == [[0, 1, 2, 3, 4]]
