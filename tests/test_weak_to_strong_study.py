"""The study: who learns from what, and what is kept."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from weak_world import LENGTH, sides, splits

from experiments import weak_to_strong as experiment
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import aux_confidence, product, ramp, soft_xent
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines import weak_to_strong_blocks as blocks
from w2s_jax.pipelines.study import TRUTH, Lesson, Study, students, supervise
from w2s_jax.pipelines.weak_to_strong import Learned
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune

TUNE = Tune(lr=0.02, batch=8, epochs=2, optimizer="adam")
LOSSES = {
    "naive": soft_xent,
    "product": product,
    "ramped": partial(aux_confidence, alpha=ramp(0.0, 0.5, over=0.2)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return sides(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data():
    return [splits(0), splits(1)]


@pytest.fixture
def study(data, tmp_path) -> Study:
    """Two seeds, 24 rows a split, 8 + 12 test rows; stages are kept in the test's folder."""
    return Study(
        ctx=Context(tmp_path, quiet=True),
        splits=data,
        seeds=range(2),
        dev=8,
        length=LENGTH,
        weak_tune=TUNE,
        strong_tune=replace(TUNE, lr=0.01),
        losses=LOSSES,
        points=2,
    )


@pytest.fixture
def lessons(monkeypatch) -> list[SimpleNamespace]:
    """``learn`` made a recorder of what it is asked; runs answer with noise of their labels."""
    calls = []

    def learn(given, tables, tune, seeds, *, test, ask=None, points=1, **how):
        calls.append(
            SimpleNamespace(side=given, tables=tables, tune=tune, seeds=seeds, ask=ask, **how)
        )
        found = {"test": [], "ask": [], "curve": []}
        for table, seed in zip(tables, seeds, strict=True):
            key = int(1e6 * np.asarray(table["label"], np.float64)[:, 1].sum()) + 7 * seed
            rng = np.random.default_rng(key)
            found["test"].append(rng.dirichlet([1, 1], len(test)))
            found["curve"].append([rng.dirichlet([1, 1], len(test)), found["test"][-1]])
            found["ask"].append(rng.dirichlet([1, 1], len(ask[0]) if ask else 0).reshape(-1, 2))
        arrays = {name: np.array(values, np.float32) for name, values in found.items()}
        return Learned(**arrays, steps=np.array([3, 6]))

    monkeypatch.setattr(w2s, "learn", learn)
    return calls


def weak_labels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([1, 1], (2, 24)).astype(np.float32)


# --- who learns from what


def test_students_are_what_learn_says_run_by_run(study, world) -> None:
    labels = weak_labels()
    done = students(study, world["large"], {"weak": labels, TRUTH: None}, ["naive", "product"])
    assert set(done) == {("weak", "naive"), ("weak", "product"), (TRUTH, "naive")}
    data, test = study.tokens(world["large"], "transfer"), study.tokens(world["large"], "test")[0]
    for (source, loss), found in done.items():
        tables = data if source == TRUTH else list(map(w2s.relabel, data, labels))
        alone = w2s.learn(
            world["large"],
            tables,
            study.strong_tune,
            [0, 1],
            test=test,
            ask=data,
            losses=(LOSSES[loss],),
            points=2,
        )
        for name in ("test", "ask", "curve", "steps"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=2e-5)
    answers = [done[key].test for key in done]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(answers[1:], answers[:-1], strict=True))


def test_supervisors_never_see_the_rows_they_label(study, world, lessons) -> None:
    supervise(study, world["small"])
    (call,) = lessons
    assert call.tune == study.weak_tune and call.seeds == [0, 1]
    for table, asked, own in zip(call.tables, call.ask, study.splits, strict=True):
        assert list(table["id"]) == list(own.train["id"])
        assert list(asked["id"]) == list(own.transfer["id"])
        assert not {str(x) for x in table["id"]} & {str(x) for x in asked["id"]}
        np.testing.assert_array_equal(table["label"], np.eye(2)[own.train["truth"]])


def everything(study, world):
    """All blocks at their smallest."""
    small, large = world["small"], world["large"]
    tune = replace(TUNE, epochs=1)
    return {
        "transfer": list(blocks.transfer(study, [small], [small, large], ["naive", "product"])),
        "features": list(blocks.features(study, small, large, ["last", "mean"])),
        "bootstrap": list(blocks.bootstrap(study, [small, small, large], 2)),
        "generative": list(blocks.generative(study, small, large, tune)),
        "labels": list(blocks.label_counts(study, small, large, [0.125, 0.5, 1.0])),
        "errors": list(blocks.error_kinds(study, small, large)),
    }


def test_no_block_lets_the_truth_near_a_student(study, world, lessons) -> None:
    rows = everything(study, world)
    for call in lessons:
        assert not any("truth" in table for table in [*call.tables, *(call.ask or [])])
    for name, found in rows.items():
        assert {row["seed"] for row in found if "seed" in row} == {0, 1}, name
    methods = {
        name: list(dict.fromkeys(r["method"] for r in found))
        for name, found in rows.items()
        if "method" in found[0]
    }
    assert methods == {
        "features": ["last", "mean"],
        "bootstrap": ["direct", "bootstrap", "strong-to-strong 1", "strong-to-strong 2"],
        "generative": ["generative"],
        "errors": ["systematic", "random"],
    }
    assert [r["labels"] for r in rows["labels"]] == [3, 3, 12, 12, 24, 24]
    pairs = {(r["weak"], r["student"]) for r in rows["transfer"]}
    assert pairs == {(world["small"].name, world["large"].name)}, "only larger students"


def test_labels_are_handed_up_the_chain(study, world, lessons, monkeypatch) -> None:
    taught = {}

    def recorded(study, strong, sources, losses=("naive",)):
        done = students(study, strong, sources, losses)
        for (source, _), found in done.items():
            taught.setdefault(strong.name, []).append((sources[source], found.ask))
        return done

    monkeypatch.setattr(blocks, "students", recorded)
    middle = replace(world["small"], name="middle")
    list(blocks.bootstrap(study, [world["small"], middle, world["large"]], 2))
    weak = supervise(study, world["small"]).ask
    (from_weak, from_middle), large = taught["middle"][0], taught[world["large"].name]
    np.testing.assert_array_equal(from_weak, weak)
    (direct, said), _, (handed, _), (first, second), (again, _) = large
    np.testing.assert_array_equal(direct, weak)
    np.testing.assert_array_equal(handed, from_middle)
    np.testing.assert_array_equal(first, said)
    np.testing.assert_array_equal(again, second)


def test_random_errors_are_as_many_as_the_supervisors(study, world, lessons) -> None:
    list(blocks.error_kinds(study, world["small"], world["large"]))
    labels = np.array([table["label"] for table in lessons[-1].tables])
    own, chance, truth = labels[:2], labels[2:4], labels[4:]
    wrong = (own.argmax(-1) != truth.argmax(-1)).sum(1)
    assert (wrong > 0).all()
    np.testing.assert_array_equal((chance.argmax(-1) != truth.argmax(-1)).sum(1), wrong)
    assert (own != chance).any() and set(np.unique(labels)) == {0.0, 1.0}


def test_a_share_of_the_labels_is_the_first_rows(study, world, lessons) -> None:
    list(blocks.label_counts(study, world["small"], world["large"], [0.25]))
    np.testing.assert_array_equal(lessons[-1].rows, [np.arange(6)] * 2)


@pytest.mark.slow
def test_probes_learn_from_cleaned_labels(study, world, lessons, monkeypatch) -> None:
    pytest.importorskip("sklearn")
    few = partial(blocks.select.label_probe, neighbours=5)
    monkeypatch.setattr(blocks.select, "label_probe", few)
    rows = list(blocks.probes(study, world["small"], world["large"], ["naive"], TUNE, 0.25))
    assert list(dict.fromkeys(r["method"] for r in rows)) == [
        "probe",
        "knn labels",
        "knn filter",
        "logistic labels",
        "logistic filter",
    ]
    whole, cut = sorted(lessons[1:], key=lambda c: -len(c.tables))
    assert len(whole.tables) == 8 and len(cut.tables) == 4  # 4 and 2 lessons of two seeds
    assert cut.rows.shape == (4, 18), "three quarters are kept"
    weak = supervise(study, world["small"]).ask
    np.testing.assert_allclose(cut.tables[0]["label"], weak[0], rtol=1e-6)
    assert not any("truth" in table for call in lessons for table in call.tables)


# --- what is kept


def test_a_stage_is_made_once_and_again_only_if_its_inputs_change(study, world, lessons) -> None:
    labels = weak_labels()

    def trained(study=study, labels=labels, losses=("naive",), side=world["large"]) -> int:
        """How many runs this makes."""
        before = len(lessons)
        students(study, side, {"weak": labels}, losses)
        return sum(len(call.tables) for call in lessons[before:])

    assert trained() == 2 and trained() == 0
    fresh = replace(study, tables={})
    assert trained(fresh) == 0, "a new process finds it"
    assert trained(labels=labels.copy()) == 0
    assert trained(losses=("product", "naive")) == 2, "only what is missing is trained"
    assert lessons[-1].losses == (product,)
    assert trained(losses=("naive", "product")) == 0, "order does not matter"
    changed = labels.copy()
    changed[1, 3] = changed[1, 3, ::-1]
    assert trained(labels=changed) == 2
    other = {**LOSSES, "naive": partial(aux_confidence, alpha=0.5)}
    assert trained(replace(study, losses=other)) == 2, "another loss of the same name"
    renamed = {"naive": product}
    assert trained(replace(study, losses=renamed)) == 0, "the loss counts, not its name"
    steeper = {"naive": partial(aux_confidence, alpha=ramp(0.0, 0.75, over=0.2))}
    assert trained(study, losses=("ramped",)) == 2
    assert trained(replace(study, losses=steeper)) == 2, "a schedule counts"
    assert trained(replace(study, losses={"naive": LOSSES["ramped"]})) == 0
    assert trained(replace(study, strong_tune=replace(TUNE, lr=0.5))) == 2
    assert trained(replace(study, points=1)) == 2
    assert trained(replace(study, weak_tune=replace(TUNE, lr=0.5))) == 0, "not a student's"
    assert trained(side=w2s.reheaded(world["large"], "mean")) == 2


def test_kept_rows_are_part_of_the_key(study, world, lessons) -> None:
    data = study.tokens(world["large"], "transfer")
    for rows, runs in (([0, 1], 2), ([0, 1], 0), ([0, 2], 2)):
        before = len(lessons)
        study.train(world["large"], {"a": Lesson(data, "naive", np.array([rows] * 2))})
        assert sum(len(call.tables) for call in lessons[before:]) == runs


def test_lessons_of_different_length_are_programs_of_their_own(study, world, lessons) -> None:
    data = study.tokens(world["large"], "transfer")
    few = np.tile(np.arange(8), (2, 1))
    found = study.train(
        world["large"],
        {"all": Lesson(data), "few": Lesson(data, "product", few), "other": Lesson(data, "ramped")},
    )
    assert [len(call.tables) for call in lessons] == [4, 2]
    assert lessons[0].which == [0, 0, 1, 1] and lessons[0].rows is None
    assert list(found) == ["all", "few", "other"]


def test_adapted_models_are_kept_and_start_each_run(study, world, lessons, monkeypatch) -> None:
    made = []
    adapt = w2s.adapt
    monkeypatch.setattr(w2s, "adapt", lambda *a, **k: made.append(a) or adapt(*a, **k))
    small, large, tune = world["small"], world["large"], replace(TUNE, epochs=1)
    first = list(blocks.generative(study, small, large, tune))
    again = list(blocks.generative(study, small, large, tune))
    assert repr(first) == repr(again) and len(made) == 1
    texts = made[0][1]
    assert not any({"truth", "label"} & set(table.columns) for table in texts)
    call = lessons[-1]
    leaf = jax.tree.leaves(call.side.params)[0]
    assert call.side.stacked and len(leaf) == len(call.tables) == 4
    np.testing.assert_array_equal(leaf[:2], leaf[2:], "seeds in order, once per lesson")
    assert np.any(np.asarray(leaf[0]) != np.asarray(leaf[1]))


def test_a_model_too_short_for_the_rows_is_one_line(world, tmp_path) -> None:
    cfg = experiment.Config(seeds=1, train=8, test=8, dev=8, length=1000)
    with pytest.raises(UserError, match="reads at most 64 tokens"):
        experiment.prepare(cfg, Context(tmp_path, quiet=True), [world["small"]])
