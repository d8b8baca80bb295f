"""Rows of the weak-to-strong experiment by hand, and what is claimed from them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import weak_to_strong as experiment
from w2s_jax.pipelines.study import Study
from w2s_jax.pipelines.weak_to_strong import Learned
from w2s_jax.pipelines.weak_to_strong_rows import compare, curves, logged
from w2s_jax.train.optim import Tune

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
        "PGR of the means above 0": True,
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
    assert len(found) == 5 and not any(found.values())


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


def test_curves_of_all_runs_are_logged_by_update(tmp_path) -> None:
    def curve(seed: int, step: int, accuracy: float) -> dict:
        names = dict(block="curve", weak="a/w", student="s", loss="naive", seed=seed, step=step)
        return names | dict(accuracy=accuracy, agreement=0.5, ceiling_accuracy=1.0)

    rows = [curve(0, 5, 0.1), curve(0, 10, 0.2), curve(1, 5, 0.3), {"block": "transfer"}]
    assert list(logged(rows, tmp_path, ())) == rows
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[0]["w-s-naive-seed0/accuracy"] == 0.1
    assert lines[0]["w-s-naive-seed1/accuracy"] == 0.3 and len(lines[1]) == 4


def test_a_model_may_have_its_own_learning_rate() -> None:
    own = Study.own(SimpleNamespace(lrs={"s": 1e-5}), SimpleNamespace(name="s"), Tune(lr=0.1))
    other = Study.own(SimpleNamespace(lrs={"s": 1e-5}), SimpleNamespace(name="w"), Tune(lr=0.1))
    assert (own.lr, other.lr) == (1e-5, 0.1)
