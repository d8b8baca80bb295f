"""The stages of weak-to-strong: what is read, trained, asked, adapted, frozen, flipped."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from weak_world import LENGTH, folders, questions, sides, splits

from experiments.pretrain_nano import train_bpe
from w2s_jax.annotate import predict, probabilities
from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import aux_confidence, product, ramp, soft_xent
from w2s_jax.mesh import make_mesh
from w2s_jax.models.heads import classifier
from w2s_jax.models.hf import shipped
from w2s_jax.objectives import classify, language
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines.weak_to_strong import Learned
from w2s_jax.train.fit import fit, start
from w2s_jax.train.optim import Tune, optimizer

TUNE = Tune(lr=0.02, batch=8, epochs=2, optimizer="adam", schedule="linear")  # 6 updates of 24
RAMPED = partial(aux_confidence, alpha=ramp(0.0, 0.75, over=0.5))
SEEDS = [4, 7]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return sides(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def small(world):
    return world["small"]


def tokens(table):
    return w2s.tokenised([table], arithmetic.tokenizer(), LENGTH)[0]


@pytest.fixture(scope="module")
def tables():
    """Training rows of two seeds."""
    return [tokens(questions(seed, 24)) for seed in SEEDS]


@pytest.fixture(scope="module")
def test_rows():
    return tokens(questions(999, 20))


# --- what is read


def texts(table) -> list[str]:
    return [a + b for a, b in zip(table["prompt"], table["response"], strict=True)]


def test_readable_rows_fit_every_tokenizer_and_stay_balanced() -> None:
    tokenizers = [arithmetic.tokenizer(), train_bpe(texts(questions(0, 50)), 259)]
    before = [splits(0, rows=24, long=5), splits(1, rows=30, long=3)]
    after = w2s.readable(before, tokenizers, LENGTH)
    for name in ("train", "transfer", "test"):
        parts = [getattr(one, name) for one in after]
        assert len({len(part) for part in parts}) == 1, "one size for all seeds"
        for old, part in zip(before, parts, strict=True):
            assert np.bincount(part["truth"]).tolist() == [len(part) / 2] * 2
            lengths = [len(ids) + 2 for t in tokenizers for ids in t.encode_ids(texts(part))]
            assert max(lengths) <= LENGTH
            places = [list(getattr(old, name)["id"]).index(row) for row in part["id"]]
            assert places == sorted(places), "rows keep their order"
    # of the 24 rows numbers 0, 5, 10, 15, 20 are long: 9 of class 0 are left; of the 30 more are
    assert [len(one.train) for one in after] == [18, 18]
    assert list(after[0].test["id"]) == list(after[1].test["id"])
    assert after[0].dev is before[0].dev


def test_a_longer_tokenizer_takes_rows_from_all() -> None:
    table = splits(0)
    both = [arithmetic.tokenizer(), train_bpe(texts(table.train), 259)]
    sizes = [len(ids) + 2 for ids in both[1].encode_ids(texts(table.train))]
    length = max(sizes) - 1  # by bytes, the longest rows no longer fit; by words, all do
    alone = w2s.readable([table], both[:1], length)[0]
    assert list(alone.train["id"]) == list(table.train["id"]), "nothing is too long: all is kept"
    together = w2s.readable([table], both, length)[0]
    assert len(together.train) < len(table.train)
    assert w2s.readable([table], both[::-1], length)[0].train.digest() == together.train.digest()


def test_more_rows_than_asked_for_are_left_out() -> None:
    both = [splits(0, long=5), splits(1, long=5)]
    limits = dict(train=10, transfer=100)
    found = w2s.readable(both, [arithmetic.tokenizer()], LENGTH, limits)
    whole = w2s.readable(both, [arithmetic.tokenizer()], LENGTH)
    for one, all_ in zip(found, whole, strict=True):
        assert list(one.train["id"]) == list(all_.train["id"][:10]), "the first of each class"
        assert np.bincount(one.train["truth"]).tolist() == [5, 5]
        assert len(one.transfer) == len(all_.transfer) and len(one.test) == len(all_.test)


def test_nothing_readable_is_one_line() -> None:
    with pytest.raises(UserError, match="split 'train' has no row of some class in 4 tokens"):
        w2s.readable([splits(0)], [arithmetic.tokenizer()], 4)
    with pytest.raises(UserError, match="more than length 6"):
        w2s.tokenised([questions(0, 4)], arithmetic.tokenizer(), 6)


# --- sides


def test_a_side_starts_from_the_folder_with_a_silent_head(small, test_rows) -> None:
    found = predict(probabilities(small.model), small.params, test_rows)
    np.testing.assert_array_equal(found, 0.5)
    assert small.size == sum(x.size for x in jax.tree.leaves(small.params["body"]))


def test_a_sides_hash_is_of_everything_it_says(small, world, tmp_path) -> None:
    again = w2s.side(folders(tmp_path)["small"])
    assert again.digest() == small.digest(), "the content counts, not the place"
    other = classifier(small.body, 2, "last", probe=True)
    bent = replace(small.body, config=replace(small.body.config, rope=77.0))
    different = [
        world["large"],
        w2s.reheaded(small, "mean"),
        w2s.reheaded(small, "likelihood"),
        replace(small, params=jax.tree.map(lambda x: x + 1e-3, small.params)),
        replace(small, tokenizer=train_bpe(["a b"], 260)),
        replace(small, model=other),
        replace(small, model=classifier(bent, 2, "last")),
    ]
    assert len({side.digest() for side in (small, *different)}) == 8


def test_reheading_keeps_the_body(small) -> None:
    again = w2s.reheaded(w2s.reheaded(small, "likelihood"), "last")
    assert again.model is small.model and again.digest() == small.digest()


# --- learning


def fitted(side, loss, table, seed, tune=TUNE):
    """Parameters of one run by ``fit``."""
    key = jax.random.key(seed)
    objective = classify(side.model, loss)
    return fit(objective, side.params, table, tune, key, axes=side.model.axes, progress=False)


@pytest.fixture(scope="module")
def setting(tables):
    """Three runs: two tables, three seeds, two losses, their own halves of the rows."""
    rows = np.stack([np.arange(16), np.arange(8, 24), np.arange(16)[::-1]])
    return dict(
        tables=[tables[0], tables[1], tables[0]],
        seeds=[4, 7, 5],
        losses=(soft_xent, RAMPED),
        which=[0, 1, 1],
        rows=rows,
        ask=[tables[1], tables[0], tables[0]],
    )


@pytest.fixture(scope="module")
def learned(small, setting, test_rows):
    how = dict(setting)
    return w2s.learn(
        small, how.pop("tables"), TUNE, how.pop("seeds"), test=test_rows, points=2, **how
    )


def test_learn_is_one_fit_per_run(small, setting, learned, test_rows) -> None:
    assert learned.steps.tolist() == [2, 4] and learned.curve.shape == (3, 2, 20, 2)
    np.testing.assert_array_equal(learned.test, learned.curve[:, -1])
    say = probabilities(small.model)
    for i, (loss, seed) in enumerate(zip((soft_xent, RAMPED, RAMPED), (4, 7, 5), strict=True)):
        table = setting["tables"][i].take(setting["rows"][i])
        params = fitted(small, loss, table, seed).params
        np.testing.assert_allclose(predict(say, params, test_rows), learned.test[i], atol=2e-4)
        asked = predict(say, params, setting["ask"][i])
        np.testing.assert_allclose(asked, learned.ask[i], atol=2e-4)
    assert np.abs(learned.test - 0.5).max() > 0.01, "something was learnt"


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, "data=2,fsdp=2"])
def test_large_models_one_after_another_say_the_same(
    small, setting, learned, test_rows, spec, monkeypatch
) -> None:
    monkeypatch.setattr(w2s, "SERIAL", 0)
    mesh = make_mesh(spec, jax.devices()[:4]) if spec else None
    how = {name: value[:2] for name, value in setting.items()}
    found = w2s.learn(
        small, how.pop("tables"), TUNE, how.pop("seeds"), test=test_rows, points=2, mesh=mesh, **how
    )
    want = learned.pick([0, 1])
    for name in ("test", "ask", "curve", "steps"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=2e-4)


@pytest.mark.slow
def test_large_stacked_models_start_each_from_their_own(
    small, tables, test_rows, monkeypatch
) -> None:
    own = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), small.params)
    stacked = replace(small, params=own, stacked=True)
    together = w2s.learn(stacked, tables, TUNE, SEEDS, test=test_rows)
    monkeypatch.setattr(w2s, "SERIAL", 0)
    apart = w2s.learn(stacked, tables, TUNE, SEEDS, test=test_rows)
    np.testing.assert_allclose(apart.test, together.test, atol=5e-5)
    assert apart.ask.shape == together.ask.shape == (2, 0, 2)


def test_the_truth_and_the_labels_of_the_test_rows_are_not_read(small, tables, test_rows) -> None:
    plain = w2s.learn(small, tables[:1], TUNE, [4], test=test_rows)
    lied = test_rows.with_columns(label=1 - test_rows["label"], truth=1 - test_rows["truth"])
    other = tables[0].with_columns(truth=1 - tables[0]["truth"])
    blind = w2s.learn(small, [other], TUNE, [4], test=lied)
    np.testing.assert_array_equal(plain.test, blind.test)


def test_a_run_that_breaks_is_named(small, tables, test_rows) -> None:
    wild = replace(TUNE, lr=1e30, clip=0.0, optimizer="sgd")
    with pytest.raises(UserError, match=r"runs \[0, 1\] became NaN; lower the learning rate"):
        w2s.learn(small, tables, wild, SEEDS, test=test_rows)


def test_pick_and_join_are_inverse(learned) -> None:
    back = w2s.join([learned.pick([0]), learned.pick([1, 2])])
    for name in ("test", "ask", "curve", "steps"):
        np.testing.assert_array_equal(getattr(back, name), getattr(learned, name))
    assert isinstance(back, Learned) and learned.pick([2]).test.shape == (1, 20, 2)


# --- generative fine-tuning


def text_loss(side, params, table) -> float:
    """Nats per token of the whole text but its first token."""
    tx = optimizer(TUNE, 1)
    mask = (np.asarray(table["segment"]) > 0) * (np.arange(LENGTH)[None] > 0)
    rows = table.with_columns(mask=mask.astype(np.float32)).batch(np.arange(len(table)))
    total, weight, _ = jax.jit(language(side.body))(params, start(params, tx, 1), rows, None)
    return float(total / weight)


def test_adapting_lowers_the_loss_of_each_runs_own_text(small, tables) -> None:
    tuned = w2s.adapt(small, tables, replace(TUNE, epochs=8), SEEDS)
    runs = [jax.tree.map(lambda x, i=i: x[i], tuned.params) for i in range(2)]
    for own, run, table in zip((0, 1), runs, tables, strict=True):
        before = text_loss(small, small.params["body"], table)
        after = [text_loss(small, one["body"], table) for one in runs]
        assert after[own] < before - 0.1 and after[own] == min(after)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(run["head"]))
    assert tuned.stacked and not small.stacked and tuned.digest() != small.digest()
    bare = [table.without("label", "truth") for table in tables]
    blind = w2s.adapt(small, bare, replace(TUNE, epochs=8), SEEDS)
    assert blind.digest() == tuned.digest(), "labels are unseen"


# --- frozen bodies


@pytest.mark.parametrize("feature", ["last", "mean"])
def test_a_frozen_side_is_a_classifier_that_trains_its_head_alone(
    small, tables, test_rows, feature
) -> None:
    given = w2s.reheaded(small, feature)
    linear, (*probes, probe_test) = w2s.frozen(given, [*tables, test_rows])
    assert sorted(probes[0].columns) == ["features", "label", "truth"]
    cached = w2s.learn(linear, probes, TUNE, SEEDS, test=probe_test)
    probe = replace(given, model=classifier(small.body, 2, feature, probe=True))
    whole = w2s.learn(probe, tables, TUNE, SEEDS, test=test_rows)
    np.testing.assert_allclose(cached.test, whole.test, atol=2e-5)
    assert np.abs(cached.test - 0.5).max() > 0.01


def test_equal_tokens_are_seen_once(small, tables) -> None:
    again = w2s.relabel(tables[0], np.full((24, 2), 0.5))
    _, (one, two) = w2s.frozen(small, [tables[0], again])
    assert one["features"] is two["features"]
    np.testing.assert_array_equal(two["label"], 0.5)


# --- labels


def test_flip_turns_over_exactly_as_many_labels_as_asked() -> None:
    truth = np.arange(50, dtype=np.int32) % 2
    for wrong in (0, 1, 13, 50):
        labels = w2s.flip(truth, wrong, seed=3)
        assert (labels.argmax(1) != truth).sum() == wrong
        np.testing.assert_array_equal(labels.sum(1), 1)
    one, same, other = (w2s.flip(truth, 13, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    np.testing.assert_array_equal(truth, np.arange(50) % 2)


def test_relabelling_puts_the_labels_in_and_takes_the_truth_out(tables) -> None:
    said = np.random.default_rng(0).dirichlet([1, 1], 24)
    new = w2s.relabel(tables[0], said)
    assert "truth" not in new and new["label"].dtype == np.float32
    np.testing.assert_allclose(new["label"], said, rtol=1e-6)
    assert new["tokens"] is tables[0]["tokens"] and "truth" in tables[0]


def test_hard_labels() -> None:
    soft = np.array([[[0.2, 0.8], [0.6, 0.4]], [[0.5, 0.5], [0.0, 1.0]]])
    want = [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]
    np.testing.assert_array_equal(w2s.hard(soft), want)


def test_losses_of_one_program_are_the_losses_apart(small, tables, test_rows) -> None:
    both = w2s.learn(
        small, tables, TUNE, [4, 4], test=test_rows, losses=(soft_xent, product), which=[1, 0]
    )
    for i, loss in enumerate((product, soft_xent)):
        alone = w2s.learn(small, [tables[i]], TUNE, [4], test=test_rows, losses=(loss,))
        np.testing.assert_allclose(both.test[i], alone.test[0], atol=2e-5)


@pytest.mark.skipif("nano-1" not in shipped(), reason="the package carries no nano-1")
def test_a_shipped_model_is_a_side() -> None:
    side = w2s.side("nano-1", feature="likelihood")
    table = w2s.tokenised([arithmetic.judged(0, 4, steps=(1,))], side.tokenizer, 64)[0]
    found = predict(probabilities(side.model), side.params, table)
    np.testing.assert_array_equal(found, 0.5)
