"""Packed pairs are the padded pairs: same log-probabilities, losses and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data.pairs import pack_pairs, pad_pairs
from w2s_jax.errors import UserError
from w2s_jax.losses.preference import dpo
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import prefer, response_logps
from w2s_jax.types import State

CONFIG = Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, ffn=24, max_length=128)


def texts(count: int, seed: int = 0, longest: int = 12):
    rng = np.random.default_rng(seed)
    return [[rng.integers(1, 40, rng.integers(1, longest)) for _ in range(count)] for _ in range(3)]


def state(**frozen):
    zero = jnp.zeros((), jnp.int32)
    return State(step=zero, steps=zero + 1, params=(), opt=(), frozen=frozen)


def whole(table):
    return jax.tree.map(jnp.asarray, table.batch(np.arange(len(table))))


def test_layout_by_hand():
    (table,) = pack_pairs([[7, 8]], [[1, 2, 3]], [[4]], per_row=2, multiple=1)
    assert table["tokens"].tolist() == [[7, 8, 1, 2, 3, 4]]
    assert table["segment"].tolist() == [[1, 1, 1, 1, 1, 1]]
    assert table["position"].tolist() == [[0, 1, 2, 3, 4, 2]]
    targets = table["targets"]
    assert targets["at"].tolist() == [[1, 2, 3, 1]]  # the prompt's last token predicts both firsts
    assert targets["ids"].tolist() == [[1, 2, 3, 4]]
    assert targets["of"].tolist() == [[0, 0, 0, 1]]
    assert table["rows"]["take"][0, :2].tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, -1, -1]]
    assert table["rows"]["back"][0].tolist() == [
        [0, 5], [1, 6], [2, -1], [3, -1], [4, -1], [7, -1]
    ]  # fmt: skip
    assert table["pairs"]["weight"].tolist() == [[1.0, 0.0]]
    assert table["source"].tolist() == [[0, -1]]


@pytest.mark.parametrize("per_row,classes", [(1, 1), (3, 1), (4, 3)])
def test_log_probabilities_are_those_of_the_padded_pairs(per_row, classes):
    prompts, chosen, rejected = texts(30)
    model = transformer(CONFIG)
    params = model.init(jax.random.key(0))
    want, lengths = response_logps(model, params, whole(pad_pairs(prompts, chosen, rejected)))
    seen = []
    for table in pack_pairs(
        prompts, chosen, rejected, per_row=per_row, classes=classes, multiple=4
    ):
        got, counts = response_logps(model, params, whole(table))
        real = table["source"] >= 0
        which = table["source"][real]
        np.testing.assert_allclose(got[real], want[which, 0], atol=2e-5)
        np.testing.assert_array_equal(counts[real], lengths[which, 0])
        assert not np.asarray(counts)[~real].any()
        seen += which.tolist()
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("length_mean", [True, False])
def test_loss_and_gradient_are_those_of_the_padded_pairs(length_mean):
    prompts, chosen, rejected = texts(13, seed=1)
    model = transformer(CONFIG)
    params = model.init(jax.random.key(0))
    ref = {"ref": model.init(jax.random.key(1))}
    objective = prefer(model, partial(dpo, beta=2.0), length_mean=length_mean, reference=model)

    def loss(params, tables):
        parts = [objective(params, state(**ref), whole(t), jax.random.key(0)) for t in tables]
        return sum(p[0] for p in parts), (sum(p[1] for p in parts), parts)

    grad = jax.value_and_grad(loss, has_aux=True)
    (a, (n, _)), ga = grad(params, [pad_pairs(prompts, chosen, rejected)])
    (b, (m, _)), gb = grad(params, pack_pairs(prompts, chosen, rejected, multiple=1, per_row=5))
    assert n == m == 13
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x / n, y / m, atol=1e-5), ga, gb)


def test_another_pair_in_the_row_and_the_other_response_change_nothing():
    prompts, chosen, rejected = texts(4, seed=2)
    model = transformer(CONFIG)
    params = model.init(jax.random.key(0))
    (one,) = pack_pairs(prompts, chosen, rejected, multiple=1, classes=1)
    other = [c[::-1] for c in chosen]  # the first pair's rejected response must not notice
    other[1:] = [(ids * 7) % 39 + 1 for ids in other[1:]]
    (two,) = pack_pairs(prompts, other, rejected, multiple=1, classes=1)
    place = np.argwhere(one["source"] == 0)[0]
    a, b = (response_logps(model, params, whole(t))[0][tuple(place)] for t in (one, two))
    assert abs(a[0] - b[0]) > 1e-3
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)


def test_classes_balance_rows_and_pad_little():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(3, 0.8, (3, 2000)), 1, 300).astype(int)
    tables = pack_pairs(*[[np.ones(n, int) for n in row] for row in sizes], per_row=4)
    assert 2 <= len(tables) <= 4
    shapes = [t["rows"]["take"].shape[2] for t in tables]
    assert shapes == sorted(shapes)
    tokens = sum(t["tokens"].size for t in tables)
    assert sum((t["segment"] > 0).sum() for t in tables) / tokens > 0.9
    trained = sum(t["targets"]["mask"].size for t in tables)
    assert sum(t["targets"]["mask"].sum() for t in tables) / trained > 0.88


def test_the_same_pairs_are_packed_the_same_way():
    a, b = (pack_pairs(*texts(50, seed=3)) for _ in range(2))
    assert [t.digest() for t in a] == [t.digest() for t in b]


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(prompts=[[1]]), "as many prompts"),
        (dict(prompts=[[1], []]), "pair 1 has an empty prompt"),
        (dict(chosen=[[], [1]]), "pair 0 has an empty chosen"),
        (dict(length=3), "pair 1: prompt and response have 4 tokens, more than the window of 3"),
        (dict(per_row=0), "per_row must be at least 1"),
        (dict(prompts=[], chosen=[], rejected=[]), "no pairs"),
    ],
)
def test_bad_pairs_are_one_line(change, message):
    given = dict(prompts=[[1], [1, 2]], chosen=[[3], [3]], rejected=[[4], [4, 5]])
    with pytest.raises(UserError, match=message):
        pack_pairs(**given | change)
