"""Robust active distillation: pieces by hand, claims that can fail, bad flags, real pictures."""

import json

import numpy as np
import pytest

from experiments import robust_active_distillation as rad
from w2s_jax.cli import main
from w2s_jax.pipelines import active_distillation as pipeline


def launch(*argv: str) -> dict:
    return main(
        rad.Config,
        rad.run,
        figures=rad.figures,
        claims=rad.claims,
        presets=rad.PRESETS,
        paper="robust_active_distillation",
        minutes=0.5,
        summary=rad.summary,
        argv=["--quiet", *argv],
    )


def made_up(accuracy: dict[str, float], error: dict[str, float]) -> list[dict]:
    """Rows as an experiment leaves them, by arm, with a little noise over five seeds."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(5):
        for arm in accuracy:
            noise = rng.normal(scale=1e-3)
            row = {"seed": seed, "arm": arm, "accuracy": accuracy[arm] + noise}
            facts = {"teacher error": error[arm] + noise, "informativeness": error[arm] + noise}
            natural = {"block": "natural", "teacher": "100", "labels": "hard"}
            rows.append(natural | row | facts)
            for share in (0.0, 0.3):
                worse = row["accuracy"] - share * error[arm]
                rows.append(row | {"block": "growing", "flips": share, "accuracy": worse})
    return rows


def verdicts(rows: list[dict]) -> dict[str, bool]:
    return {claim["name"]: claim["holds"] for claim in rad.claims(rows)}


def test_claims_follow_the_numbers():
    error = {"random": 0.1, "RAD": 0.15, "margin": 0.3}
    papers = verdicts(made_up({"random": 0.90, "RAD": 0.92, "margin": 0.89}, error))
    assert all(papers.values()) and len(papers) == 12
    reverse = verdicts(made_up({"random": 0.90, "RAD": 0.92, "margin": 0.93}, error))
    under = "teacher of 100, hard labels"
    assert not reverse[f"{under}: RAD above margin"] and reverse[f"{under}: RAD above random"]
    assert not reverse[f"{under}: random not below margin by .005"]
    flat = verdicts(made_up(dict.fromkeys(error, 0.9), dict.fromkeys(error, 0.1)))
    assert not any(holds for name, holds in flat.items() if " < " in name or "loses" in name)


def test_a_teacher_made_wrong_says_the_students_next_guess():
    truth = np.array([0, 1, 2])
    said = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    labels = pipeline.flipped(truth, np.array([0, 1]), said)
    np.testing.assert_array_equal(labels.argmax(-1), [1, 0, 2])


def test_labels_at_a_temperature_keep_the_truth_of_own_rows():
    logits = np.array([[0.0, np.log(3.0)], [0.0, np.log(9.0)]])
    soft = pipeline.told(logits, 2.0, np.array([0, 1]), np.array([0]))
    np.testing.assert_allclose(soft, [[1.0, 0.0], [0.25, 0.75]], rtol=1e-6)
    hard = pipeline.told(logits, 0.0, np.array([0, 1]), np.array([], int))
    np.testing.assert_array_equal(hard, [[0.0, 1.0], [0.0, 1.0]])


def test_parts_of_the_data_never_meet():
    world = rad.load(rad.Config(seeds=2))
    for seed in range(2):
        parts = [getattr(world, n)[seed] for n in ("labelled", "teacher", "dev", "pool")]
        every = np.concatenate([*parts, world.test])
        assert sorted(every) == list(range(1797))
    known = world.features[:1297]
    np.testing.assert_allclose(known.mean(0), 0.0, atol=1e-4)
    assert abs(float(world.features[1297:].mean())) > 1e-4  # test rows had no say


def test_arms_choose_what_they_say():
    rng = np.random.default_rng(0)
    probs = np.array([[0.5, 0.5], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]])
    common = (2, rng, np.eye(4), np.zeros((1, 4)))
    np.testing.assert_array_equal(pipeline.choose("margin", probs, 0, *common), [0, 2])
    np.testing.assert_array_equal(pipeline.choose("RAD", probs, 0, *common), [0, 2])
    np.testing.assert_array_equal(pipeline.choose("entropy", probs, 0, *common), [0, 2])
    picked = [tuple(pipeline.choose("RAD", probs, 4, *common)) for _ in range(60)]
    assert len(set(picked)) == 6  # every label may be wrong: any two rows


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget", "1000"], "budget"),
        (["--pool", "2000"], "1797"),
        (["--temperatures", "0"], "temperatures"),
        (["--flips", "0.1"], "flips"),
        (["--temperatures", "1", "1"], "none twice"),
        (["--teachers", "0"], "teachers"),
        (["--data", "absent.npz"], "absent.npz"),
    ],
)
def test_bad_input_ends_with_one_line(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(*argv, "--workdir", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_mnist_by_path(shared_data, tmp_path):
    path = shared_data / "vision" / "mnist.npz"
    if not path.is_file():
        pytest.skip("no MNIST file")
    sizes = ["--pool", "1000", "--test", "500", "--seeds", "2", "--hidden", "32"]
    launch("--preset", "tiny", "--data", str(path), *sizes, "--workdir", str(tmp_path / "run"))
    rows = [json.loads(s) for s in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    natural = [row for row in rows if row["block"] == "natural"]
    assert min(row["accuracy"] for row in natural) > 0.6
    errors = {arm: [r["teacher error"] for r in natural if r["arm"] == arm] for arm in rad.GROWING}
    assert np.mean(errors["random"]) < np.mean(errors["margin"])
