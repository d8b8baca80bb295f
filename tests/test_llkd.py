"""LLKD: drawn documents, simulated teachers, the arms as numbers, claims that can fail."""

import json

import numpy as np
import pytest

from experiments import llkd as experiment
from w2s_jax.cli import main
from w2s_jax.pipelines import llkd


def launch(*argv: str) -> dict:
    return main(
        experiment.Config,
        experiment.run,
        figures=experiment.figures,
        claims=experiment.claims,
        presets=experiment.PRESETS,
        paper="llkd",
        minutes=1.0,
        summary=experiment.summary,
        argv=["--quiet", *argv],
    )


def test_documents_are_of_their_topic_and_the_same_again():
    counts, truth = llkd.corpus(400, 60, 3, 30.0, 0.5, seed=1)
    again, _ = llkd.corpus(400, 60, 3, 30.0, 0.5, seed=1)
    np.testing.assert_array_equal(counts, again)
    assert counts.shape == (400, 60) and set(truth) == {0, 1, 2} and counts.sum(1).min() >= 5
    means = np.stack([counts[truth == y].mean(0) for y in range(3)])
    nearest = ((counts[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert 0.6 < (nearest == truth).mean() < 1.0


def test_tf_idf_by_hand():
    rows = llkd.tf_idf(np.array([[2.0, 1.0], [1.0, 0.0], [9.0, 9.0]]), known=2)
    idf = np.array([np.log(3 / 3) + 1, np.log(3 / 2) + 1])
    want = np.array([2.0, 1.0]) * idf
    np.testing.assert_allclose(rows[0], want / np.linalg.norm(want), rtol=1e-6)
    np.testing.assert_allclose(rows[1], [1.0, 0.0])


def test_the_simulated_teacher_is_calibrated_and_the_flat_one_is_not():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 20_000).astype(np.int32)
    probs = rng.dirichlet(np.ones(4), 20_000).astype(np.float32)
    labels = llkd.simulated(truth, probs, 0.4, seed=0)
    conf, right = labels.max(-1), labels.argmax(-1) == truth
    for low in (0.4, 0.6, 0.8):
        inside = (conf >= low) & (conf < low + 0.2)
        assert abs(right[inside].mean() - conf[inside].mean()) < 0.03
    assert np.corrcoef(conf, probs.max(-1))[0, 1] > 0.5  # doubts what another teacher doubts
    np.testing.assert_allclose(labels.sum(-1), 1.0, rtol=1e-5)
    world = llkd.World(np.zeros((20_000, 1)), truth, *[np.zeros((1, 1), int)] * 4)
    flat = llkd.teachers(world, probs[None], 0.4)["constant"][0]
    np.testing.assert_array_equal(flat.argmax(-1), labels.argmax(-1))
    assert np.ptp(flat.max(-1)) < 1e-6


def test_a_students_numbers_by_hand():
    truth, pool = np.array([0, 0, 1, 1, 1, 0]), np.array([[0, 1, 2, 3]])
    rows = np.array([4, 5])
    world = llkd.World(np.zeros((6, 1)), truth, pool, pool, pool, rows)
    labels = np.eye(2)[[0, 1, 1, 1, 0, 0]]
    picked = np.array([3.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    one = llkd.Setting(0, "trained", "LLKD", 0.1)
    row = llkd.score(
        one, world, labels, np.array([0, 0, 0, 0, 1, 1]), picked, np.array([0.5, 0.25])
    )
    assert row["label accuracy"] == pytest.approx(5 / 6) and row["pool label accuracy"] == 0.75
    assert row["ever"] == 0.75 and row["selected"] == pytest.approx(0.375)
    assert row["least class"] == pytest.approx((3 / 3) / (6 / 4))  # class 1: three rows
    assert row["accuracy"] == 0.5 and row["macro F1"] == pytest.approx((0 + 2 / 3) / 2)


def test_macro_f1_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    named, truth = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    want = sklearn.f1_score(truth, named, average="macro")
    assert llkd.macro_f1(named, truth) == pytest.approx(float(want))


def made_up(f1: dict[str, float], labels: dict[str, float], falls: bool) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    for teacher in llkd.TEACHERS:
        for arm in (*llkd.ARMS, llkd.RANDOM):
            for seed in range(5):
                noise = rng.normal(scale=1e-4)
                gain = 0.0 if teacher == "constant" else f1.get(arm, 0.7)
                row = {"teacher": teacher, "arm": arm, "seed": seed}
                score = {"macro F1": gain + noise, "label accuracy": labels.get(arm, 0.7) + noise}
                more = {"pool label accuracy": 0.7, "selected": 0.3 + noise}
                rows.append({"block": "score", **row, **score, **more})
                for step in (1, 2, 3, 4):
                    share = (0.5 - 0.1 * step if falls else 0.2) + noise
                    rows.append({"block": "curve", **row, "step": step, "selected": share})
    return rows


def verdicts(*numbers) -> dict[str, bool]:
    return {claim["name"]: claim["holds"] for claim in experiment.claims(made_up(*numbers))}


def test_claims_follow_the_numbers():
    papers = verdicts({"LLKD": 0.8, "student only": 0.6}, {"LLKD": 0.8, "student only": 0.6}, True)
    assert all(papers.values()) and len(papers) == 20
    other = verdicts({"LLKD": 0.6}, {"LLKD": 0.6, "student only": 0.8}, False)
    assert sum(other.values()) == 3  # half or less of both teachers, no gain from a constant
    assert not other["trained teacher: selected share falls"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--least", "0.1"], "least"),
        (["--decay", "1"], "decay"),
        (["--lrs"], "lrs"),
        (["--lrs", "0.01", "0.01"], "none twice"),
        (["--fixed", "nan", "0.5"], "fixed"),
        (["--data", "absent.jsonl"], "absent"),
        (["--data", "bad.jsonl"], "label"),
        (["--overlap", "2"], "overlap"),
    ],
)
def test_bad_input_ends_with_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(SystemExit) as stop:
        launch(*argv, "--workdir", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_newsgroups_by_path(shared_data, tmp_path):
    path = shared_data / "text_cls" / "twenty_newsgroups_6.jsonl.gz"
    if not path.is_file():
        pytest.skip("no newsgroups")
    sizes = ["--seeds", "2", "--pool", "1500", "--words", "400", "--lrs", "0.01"]
    sizes += ["--tune.epochs", "12", "--data", str(path)]
    launch("--preset", "tiny", *sizes, "--workdir", str(tmp_path / "run"))
    rows = [json.loads(s) for s in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    scores = [row for row in rows if row["block"] == "score" and row["teacher"] == "trained"]
    every = [row["macro F1"] for row in scores if row["arm"] == "all data"]
    assert min(every) > 0.5  # six groups
