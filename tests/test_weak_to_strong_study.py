"""The study: who learns from what, what is kept, what is reported, what is claimed."""

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
from w2s_jax.pipelines.weak_to_strong_rows import compare, curves
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
        "probe, knn labels",
        "probe, knn filter",
        "probe, logistic labels",
        "probe, logistic filter",
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


# --- what is reported: one seed, 4 dev and 5 reported rows, every confidence 0.8

DEV = [0, 1, 0, 1]
FINAL = [0, 1, 0, 1, 1]


def said(*points: str) -> Learned:
    """A run from the classes it names at each look, "dev rows | reported rows"."""
    classes = np.array([[int(c) for c in point if c in "01"] for point in points])
    curve = np.where(np.eye(2)[classes] > 0, 0.8, 0.2)[None]
    return Learned(curve[:, -1], np.zeros((1, 0, 2)), curve, np.array([2, 4, 6][: len(points)]))


WEAK = said("0001 | 00110")  # right on 3 of 4 and on 2 of 5
STUDENT = said(
    "0101 | 01011",  # dev: all right, 3 of 4 with the supervisor; 5 of 5 right
    "0001 | 01001",  # dev: 3 right, all with the supervisor; 4 of 5
    "0011 | 00010",  # dev: 2 right, 3 with the supervisor; 3 of 5
)
CEILING = said("1101 | 01100", "0101 | 01010", "0101 | 01011")  # 2, 4, 5 of 5
PAIR = (SimpleNamespace(name="w", size=10), SimpleNamespace(name="s", size=40))


def one_seed() -> SimpleNamespace:
    return SimpleNamespace(dev=4, truth=np.array(DEV + FINAL), seeds=[3])


def test_a_row_by_hand() -> None:
    (row,) = compare(one_seed(), "b", PAIR, "naive", (WEAK, STUDENT, CEILING), method="m")
    want = dict(
        weak_accuracy=0.4,
        student_accuracy=0.6,
        ceiling_accuracy=1.0,
        gap=0.6,
        pgr=1 / 3,  # (.6 - .4) / (1 - .4)
        agreement=0.8,
        error_agreement=2 / 3,  # the supervisor errs on rows 1, 2, 4; the student copies 1 and 4
        ceiling_error_agreement=0.0,
        auroc=2 / 3,  # 3 positives (.2 .8 .2), 2 negatives (.2 .2): 2 wins, 4 ties of 6
        ece=0.2,
        weak_ece=0.4,
        brier=0.6 * 0.08 + 0.4 * 1.28,
        honest_stop=0.8,
        cheating_stop=1.0,
        fall=0.4,
        ceiling_fall=-0.2,  # of two looks that are best on dev the first counts
    )
    names = dict(block="b", weak="w", student="s", weak_size=10, student_size=40, loss="naive")
    assert {k: row[k] for k in names} == names and (row["seed"], row["method"]) == (3, "m")
    assert row.keys() == {*names, *want, "seed", "method"}
    for name, value in want.items():
        assert row[name] == pytest.approx(value, abs=1e-9), name


def test_no_gap_has_no_pgr() -> None:
    (row,) = compare(one_seed(), "b", PAIR, "naive", (CEILING, STUDENT, WEAK))
    assert np.isnan(row["pgr"]) and row["gap"] == pytest.approx(-0.6)


def test_curves_by_hand() -> None:
    rows = list(curves(one_seed(), PAIR, "naive", (WEAK, STUDENT, CEILING)))
    points = [r for r in rows if r["block"] == "curve"]
    assert [r["step"] for r in points] == [2, 4, 6]
    np.testing.assert_allclose([r["accuracy"] for r in points], [1.0, 0.8, 0.6])
    np.testing.assert_allclose([r["ceiling_accuracy"] for r in points], [0.4, 0.8, 1.0])
    # the supervisor names 00110
    np.testing.assert_allclose([r["agreement"] for r in points], [0.4, 0.2, 0.8])
    bins = [r for r in rows if r["block"] == "reliability"]
    assert [(r["role"], r["count"]) for r in bins] == [("student", 5), ("weak", 5)]
    np.testing.assert_allclose([r["accuracy"] for r in bins], [0.6, 0.4])
    np.testing.assert_allclose([r["confidence"] for r in bins], 0.8)


# --- what is claimed


def row(seed: int, weak: float, student: float, ceiling: float, **more) -> dict:
    gap = ceiling - weak
    values = dict(
        block="transfer",
        weak="m/w",
        student="m/s",
        weak_size=10,
        student_size=100,
        loss="naive",
        seed=seed,
        weak_accuracy=weak,
        student_accuracy=student,
        ceiling_accuracy=ceiling,
        gap=gap,
        pgr=(student - weak) / gap if gap > 0 else float("nan"),
        fall=0.03 + 0.001 * seed,
        ceiling_fall=0.001,
    )
    return values | more


def study_rows(lift: float = 0.1) -> list[dict]:
    """Six seeds whose student recovers about half; the confidence loss ``lift`` more of it."""
    rows = []
    for seed in range(6):
        wobble = 0.002 * (-1) ** seed
        rows.append(row(seed, 0.6, 0.7 + wobble, 0.8))
        rows.append(row(seed, 0.6, 0.7 + wobble + 0.2 * lift, 0.8, loss="confidence"))
        # a closer pair, on which nothing is claimed, and two heads
        rows.append(row(seed, 0.7, 0.6, 0.65) | dict(weak="m/v", weak_size=50))
        rows.append(row(seed, 0.6, 0.7 + wobble, 0.8, block="features", method="likelihood"))
        rows.append(row(seed, 0.6, 0.6 + wobble, 0.8, block="features", method="last"))
    return rows


def told(rows) -> dict[str, bool]:
    return {claim["name"]: claim["holds"] for claim in experiment.claims(rows)}


def test_what_holds_is_claimed_from_the_widest_pair() -> None:
    assert told(study_rows()) == {
        "student above weak": True,
        "ceiling above student": True,
        "median PGR above 0": True,
        "student falls from its peak (chosen on dev)": True,
        "more than its ceiling does": True,
        "confidence loss lifts PGR": True,
        "student above weak, likelihood head": True,
        "student above weak, last head": False,
    }
    first = experiment.claims(study_rows())[0]
    assert first["value"] == pytest.approx(0.1) and first["seeds"] == 6
    assert told(study_rows(lift=-0.1))["confidence loss lifts PGR"] is False


def test_a_student_no_better_than_its_supervisor_claims_nothing() -> None:
    rows = [row(seed, 0.6, 0.6 + 0.01 * (-1) ** seed, 0.8, fall=0.0) for seed in range(6)]
    found = told(rows)
    assert found.pop("ceiling above student") is True
    assert len(found) == 4 and not any(found.values())


def test_seeds_without_a_gap_do_not_count_for_pgr() -> None:
    rows = [row(seed, 0.6, 0.7, 0.8) for seed in range(5)] + [row(5, 0.8, 0.7, 0.8)]
    (pgr,) = (c for c in experiment.claims(rows) if c["name"] == "median PGR above 0")
    assert pgr["seeds"] == 5
    none = [row(seed, 0.8, 0.7, 0.8) for seed in range(5)]
    assert "median PGR above 0" not in told(none) and told([]) == {}


def test_the_summary_is_of_means() -> None:
    rows = [row(0, 0.5, 0.6, 0.7), row(1, 0.5, 0.9, 1.0), row(0, 0.7, 0.9, 0.7, loss="product")]
    one, two = experiment.summary(rows)
    assert (one["weak"], one["student"], one["seeds"]) == ("w", "s", 2)
    # not the mean of .5 and .8: (.75 - .5) / (.85 - .5)
    assert one["pgr"] == pytest.approx(0.25 / 0.35) and one["ceiling_accuracy"] == 0.85
    assert two["loss"] == "product" and np.isnan(two["pgr"])


def test_a_model_too_short_for_the_rows_is_one_line(world, tmp_path) -> None:
    cfg = experiment.Config(seeds=1, train=8, test=8, dev=8, length=1000)
    with pytest.raises(UserError, match="reads at most 64 tokens"):
        experiment.prepare(cfg, Context(tmp_path, quiet=True), [world["small"]])
