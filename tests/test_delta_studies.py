"""Studies of delta learning: nothing held out is trained on, dev chooses, pairs are right."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.data.arithmetic_mistakes import KINDS, corrupt
from w2s_jax.data.pairs import alike, pack_pairs
from w2s_jax.errors import UserError
from w2s_jax.losses.preference import dpo
from w2s_jax.objectives import prefer
from w2s_jax.pipelines import delta_analyses as analyses
from w2s_jax.pipelines import delta_learning as delta
from w2s_jax.pipelines import delta_studies as studies
from w2s_jax.pipelines.delta_learning import Method, Trained
from w2s_jax.pipelines.delta_world import TEST, Bench
from w2s_jax.record import Context
from w2s_jax.train.fit import start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Table

TUNE = Tune(lr=1e-4, batch=8, optimizer="adam")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp("bench")
    return Bench(
        ctx=Context(folder, quiet=True), student="nano-1", seeds=2, prompts=16, solutions=24,
        dev=8, test=24, greedy=4, length=128, answer=56, temperature=1.0, lrs=(1e-4, 1e-3),
        tune=TUNE, sft_tune=TUNE, habit_tune=TUNE, method=Method(partial(dpo, beta=5.0)),
    )  # fmt: skip


def random_pairs(seed: int, longest: int):
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(1, 70, rng.integers(2, longest)).tolist() for _ in range(8)] for _ in range(3)
    ]


def test_tables_made_alike_give_the_same_loss_and_gradient() -> None:
    model, params, _ = delta.hf.load("nano-1")
    tables = [
        pack_pairs(*random_pairs(seed, longest), per_row=2, classes=1, multiple=8)[0]
        for seed, longest in ((0, 9), (1, 30))
    ]
    wide = alike(tables)
    assert {t["tokens"].shape for t in wide} == {tables[1]["tokens"].shape}
    assert tables[0]["tokens"].shape != tables[1]["tokens"].shape
    objective = prefer(model, partial(dpo, beta=5.0), reference=model)
    state = start(params, optimizer(TUNE, 1, axes=model.axes), 1, frozen={"ref": params})

    def loss(params, table):
        total, weight, _ = objective(
            params, state, table.batch(np.arange(len(table))), jax.random.key(0)
        )
        return total / weight

    moved = jax.tree.map(lambda leaf: leaf * 1.05, params)
    for narrow, broad in zip(tables, wide, strict=True):
        told = [jax.value_and_grad(loss)(moved, table) for table in (narrow, broad)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), *told)


def test_alike_refuses_tables_of_other_counts() -> None:
    one = pack_pairs(*random_pairs(0, 9), per_row=2, classes=1)[0]
    with pytest.raises(UserError, match="one shape of pairs"):
        alike([one, one.take([0, 1])])


def test_nothing_held_out_is_trained_on_and_dev_is_not_test(bench: Bench) -> None:
    held = list(bench.held_out["question"])
    assert len(set(held)) == len(held) == bench.dev + bench.test
    asked = {p.question for drawn in bench.asked for p in drawn}
    assert not asked & set(held)
    assert bench.asked[0][0].question != bench.asked[1][0].question
    again = bench.problems(TEST, 20)  # the stream of the test itself
    assert not {p.question for p in again} & set(held)


def test_chances_are_the_products_of_token_probabilities(bench: Bench) -> None:
    runs = bench.loaded("nano-1")
    found = delta.chances(runs, bench.held_out)
    assert found.shape == (2, 32) and np.array_equal(found[0], found[1])
    tokens, mask = (bench.held_out[name][3] for name in ("tokens", "mask"))
    size = int((tokens != runs.tokenizer.pad).sum())
    out = runs.model.apply(runs.run(0), tokens[None, :size])
    logps = jax.nn.log_softmax((out.hidden @ out.unembed)[0])[:, : runs.tokenizer.size]
    picked = np.array([logps[t - 1, tokens[t]] for t in range(1, size) if mask[t]])
    np.testing.assert_allclose(found[0, 3], np.exp(picked.sum()), rtol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "widths"),
    [
        ([20] * 12 + [50] * 20, [50]),  # 32 rows of 50 rather than 32 of 32 and 32 of 50
        ([20] * 13 + [50] * 20, [32, 50]),  # rather than 64 of 50
        ([20] * 64 + [50] * 2, [32, 50]),
        ([20] * 3 + [40] * 3 + [50] * 3, [50]),
    ],
)
def test_rows_of_like_length_are_scored_together(sizes, widths) -> None:
    """Each row once, whole and where it is looked for; 50 is no multiple of the grain."""
    tokens = np.arange(len(sizes))[:, None] + np.zeros((1, 50), np.int32)
    mask = (np.arange(50) < np.array(sizes)[:, None]).astype(np.float32)
    groups, place = delta._in_rows(Table({"tokens": tokens, "mask": mask}))
    assert [g["tokens"].shape[2] for g in groups] == widths
    rows = np.concatenate([g["tokens"][..., 0].ravel() for g in groups])
    count = np.concatenate([g["mask"].sum(-1).ravel() for g in groups])
    assert rows[place].tolist() == list(range(len(sizes))) and count[place].tolist() == sizes


def test_credit_of_right_and_wrong_answers(bench: Bench) -> None:
    encode, drawn = bench.tokenizer.encode, bench.asked[0][:2]
    right = [encode(f" a : {p.answer}") for p in drawn]
    wrong = [encode(" a : #### 99") if p.final != 99 else encode(" a : #### 1") for p in drawn]
    small = bench.asked
    bench.__dict__["asked"] = [drawn]
    try:
        assert bench.credit([right])[0].tolist() == [1.5, 1.5]
        assert bench.credit([wrong])[0].tolist() == [0.0, 0.0]
    finally:
        bench.__dict__["asked"] = small


def trained(lr: float, gains: list[float], bench: Bench) -> Trained:
    chances = np.tile(np.array(gains)[:, None], (1, bench.dev + bench.test))
    chances[:, bench.dev :] = 1 - chances[:, bench.dev :]  # test says the reverse of dev
    none = np.zeros((2, 1))
    return Trained(None, lr, chances, chances[:, None], none, {})  # type: ignore[arg-type]


def test_dev_chooses_the_surest_rate_and_test_is_not_asked(bench: Bench) -> None:
    base = np.zeros((2, bench.dev + bench.test))
    grid = [trained(1.0, [0.10, 0.11], bench), trained(2.0, [0.05, 0.30], bench)]
    assert bench.surest(base, grid).lr == 1.0  # the larger mean is less sure
    assert bench.surest(base, [*grid, trained(3.0, [0.2, 0.2], bench)]).lr == 3.0


def test_one_population_over_rates_equals_one_for_each(bench: Bench) -> None:
    student = bench.loaded("nano-1")
    said = [bench.answers(student, draw=i) for i in range(2)]
    tables = bench.pairs(student, said[0], said[1])
    both = bench.preferred(student, tables, (1e-4, 1e-3))
    for one in both:
        (alone,) = bench.preferred(student, tables, (one.lr,))
        np.testing.assert_allclose(one.chances, alone.chances, rtol=1e-4, atol=1e-7)
    assert np.abs(both[0].chances - both[1].chances).max() > 1e-5


def test_answers_are_kept_by_model_and_draw(bench: Bench) -> None:
    student, other = bench.loaded("nano-1"), bench.loaded("nano-1:0.5")
    first, second = (bench.answers(student, draw=i) for i in (0, 1))
    assert first == bench.answers(student, draw=0) != second
    assert bench.answers(other, draw=0) != first


def test_studies_give_rows_for_every_training_and_seed(bench: Bench) -> None:
    student, worse = bench.loaded("nano-1"), bench.loaded("nano-1:0.25")
    rows = studies.post_training(bench, "natural", student, student, worse)
    names = {"student", "weak chosen", "weak rejected", "dpo delta", "dpo tied", "dpo reversed"}
    assert {r["training"] for r in rows} == names | {"sft"}
    picked = [r for r in rows if r["training"] == "dpo delta" and r["picked"]]
    assert [r["seed"] for r in picked] == [0, 1] and len({r["lr"] for r in picked}) == 1
    assert {r["lr"] for r in rows if r["training"] == "dpo tied"} == {picked[0]["lr"]}
    assert all("greedy" in r for r in picked) and all("train_displaced" in r for r in picked)
    ladder = analyses.ladder(bench, student, [worse, student], [1e-4])
    assert {r["chosen"] for r in ladder} == {"nano-1"}  # the better is chosen, whatever the order
    assert all(r["delta"] == r["chosen_quality"] - r["rejected_quality"] for r in ladder)


def test_weak_pairs_prefer_what_the_verifier_does(bench: Bench, monkeypatch) -> None:
    seen = {}

    def spy(self, student, chosen, rejected, keep):
        seen.update(chosen=chosen, rejected=rejected, keep=keep)
        raise StopIteration

    monkeypatch.setattr(Bench, "pairs", spy)
    weak = [bench.loaded(name) for name in ("nano-2", "nano-1", "nano-1:0.25")]
    with pytest.raises(StopIteration):
        studies.weak_pairs(bench, bench.loaded("nano-1"), weak)
    better, worse = bench.credit(seen["chosen"]), bench.credit(seen["rejected"])
    assert len({len(index) for index in seen["keep"]}) == 1 and len(seen["keep"][0])
    for high, low, index in zip(better, worse, seen["keep"], strict=True):
        assert (high[index] > low[index]).all()


def test_sections_are_counted_and_repeat_people(bench: Bench) -> None:
    given = bench.loaded("nano-1")
    drawn = bench.asked[0][:4]
    said = studies._listed(given, drawn, (9, 9), "x")
    header = given.tokenizer.encode("####")[0]
    assert [ids.count(header) for ids in said] == [9] * 4
    assert all(ids[-1] == given.tokenizer.eos for ids in said)
    text = given.tokenizer.decode(said[0])
    values = dict([drawn[0].start, *((s.name, s.value) for s in drawn[0].steps)])
    for part in text.split("####")[1:]:
        who, *digits = part.replace(".", "").split()
        assert values[who] == int("".join(digits))
    assert studies._listed(given, drawn, (3, 3), "a") != studies._listed(given, drawn, (3, 3), "b")


def test_mistakes_of_one_kind_are_of_that_kind() -> None:
    import random

    drawn = arithmetic.draw(11, 200)
    for kind in KINDS:
        rng = random.Random(0)
        made = [corrupt(p, rng, outcome_error=1, step_error=1, kinds=(kind,)) for p in drawn]
        assert sum(s.kind == kind for s in made) >= 196
    with pytest.raises(UserError, match="kinds of mistakes"):
        corrupt(drawn[0], random.Random(0), outcome_error=1, step_error=1, kinds=("typo",))
