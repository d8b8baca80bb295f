"""Packing: every document once and whole, masks never lost, rows nearly full."""

import numpy as np
import pytest

from w2s_jax.data.packing import fill, pack
from w2s_jax.errors import UserError


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
