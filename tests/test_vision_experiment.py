"""The vision analogue: frozen features by hand, no leak from test, every way in, honest claims."""

import json

import numpy as np
import pytest

from experiments import weak_to_strong_vision as vision
from w2s_jax.cli import main
from w2s_jax.errors import UserError
from w2s_jax.models.vision import patch_bank, patch_features, thumbnails
from w2s_jax.pipelines.probes import best_of, best_rate

QUICK = ["--preset", "tiny", "--losses", "naive", "product", "--points", "2", "--quiet"]


def pictures(count: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(count, 6, 6, channels)).astype(np.float32)


def launch(*argv: str) -> dict:
    return main(
        vision.Config,
        vision.run,
        figures=vision.figures,
        claims=vision.claims,
        presets=vision.PRESETS,
        paper="weak_to_strong_vision",
        minutes=0.5,
        summary=vision.summary,
        argv=list(argv),
    )


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_thumbnail_of_full_size_is_the_picture_and_a_flat_picture_stays_flat():
    images = pictures(2, channels=3)
    np.testing.assert_allclose(thumbnails(images, 6), images.reshape(2, -1), rtol=1e-5)
    small = thumbnails(np.full((1, 6, 6, 1), 0.3, np.float32), 2)
    np.testing.assert_allclose(small, np.full((1, 4), 0.3), rtol=1e-5)
    corner = np.zeros((1, 6, 6, 1), np.float32)
    corner[0, :2, :2] = 1.0
    assert np.argmax(thumbnails(corner, 2)) == 0
    with pytest.raises(UserError, match="thumbnail"):
        thumbnails(images, 7)


def test_patch_features_of_one_picture_by_loops():
    images, size = pictures(40, channels=2), 3
    bank = patch_bank(images, filters=4, size=size)
    want = np.zeros((4, 4, 8))
    for row in range(4):
        for column in range(4):
            patch = images[0, row : row + size, column : column + size]
            patch = patch.transpose(2, 0, 1).reshape(-1).astype(np.float64)
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 0.01)
            answer = (patch - bank["mean"]) @ bank["filters"]
            want[row, column] = np.maximum(np.concatenate([answer, -answer]) - 0.25, 0)
    quarters = [
        want[r, c].mean((0, 1))
        for r in (slice(0, 2), slice(2, 4))
        for c in (slice(0, 2), slice(2, 4))
    ]
    got = patch_features(bank, images[:1], size)
    np.testing.assert_allclose(got[0], np.concatenate(quarters), rtol=1e-4, atol=1e-5)


def test_the_bank_whitens_the_patches_it_saw():
    rng = np.random.default_rng(0)
    smooth = np.asarray(thumbnails(pictures(300), 3)).reshape(-1, 3, 3, 1).repeat(2, 1).repeat(2, 2)
    bank = patch_bank(smooth, filters=400, size=3)
    windows = smooth[:, :3, :3].reshape(len(smooth), -1)
    windows = windows - windows.mean(1, keepdims=True)
    answers = windows[rng.permutation(300)] @ bank["filters"]
    assert np.isfinite(answers).all() and bank["filters"].shape == (9, 400)
    with pytest.raises(UserError, match="patches"):
        patch_bank(smooth, 4, 9)


def test_splits_are_disjoint_and_test_pictures_shape_no_feature(tmp_path):
    images = pictures(90)
    arrays = {"x_train": images[:60], "y_train": np.arange(60) % 3}
    for name, last in (("one", images[60:]), ("two", 1 - images[60:])):
        np.savez(tmp_path / f"{name}.npz", **arrays, x_test=last, y_test=np.arange(30) % 3)
    numbers = {"train": 40, "dev": 20, "test": 30, "sides": (2,), "filters": 4, "seeds": 2}
    cfgs = [vision.Config(data=str(tmp_path / f"{n}.npz"), **numbers) for n in ("one", "two")]
    one, two = (vision.load(cfg) for cfg in cfgs)
    np.testing.assert_array_equal(one.strong[:60], two.strong[:60])
    np.testing.assert_array_equal(one.weak["2x2"][:60], two.weak["2x2"][:60])
    assert not np.allclose(one.strong[60:], two.strong[60:])
    rows = vision.splits(cfgs[0], one)
    for seed in range(2):
        parts = np.concatenate([rows[name][seed] for name in ("dev", "weak", "strong")])
        assert sorted(parts) == list(range(60)) and one.known == 60
    assert [part.shape[1] for part in rows.values()] == [20, 20, 20]


def test_the_learning_rate_is_the_best_on_dev_rows_alone():
    truth = np.array([0, 1, 0, 1])
    classes = np.array([[[1, 1, 0, 1], [0, 1, 1, 0]]] * 2)  # rate 0: all but row 0; rate 1: 0, 1
    assert best_rate(classes, truth, np.array([[0, 1], [1, 0]])) == 1
    assert best_rate(classes, truth, np.array([[2, 3], [1, 3]])) == 0


def test_every_group_has_its_best_setting():
    marks = [("a", 1, 0.9), ("a", 1, 0.1), ("a", 2, 0.6), ("b", 2, 0.3), ("b", 1, 0.3)]
    assert best_of(marks) == {"a": 2, "b": 2}  # by the mean; of equal ones the first


@pytest.mark.slow
def test_the_tiny_preset_leaves_figures_claims_and_redraws(tmp_path):
    done = launch(*QUICK, "--workdir", str(tmp_path / "run"))
    names = [claim["name"] for claim in done["claims"]]
    assert "naive student above its supervisor" in names and "product above naive" in names
    below = next(c for c in done["claims"] if c["name"] == "naive student below the ceiling")
    assert below["holds"] and below["seeds"] == 3
    drawn = {path.name for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert drawn == {f"{n}.png" for n in ("accuracy", "pgr", "curves", "agreement", "rates")}
    rows = read(tmp_path / "run")
    scores = [row for row in rows if row["block"] == "score"]
    assert len(scores) == 3 * 4  # weak, ceiling, two students
    ends = {row["learner"]: row["accuracy"] for row in rows if row["block"] == "curve"}
    assert ends["naive"] == [r for r in scores if r["learner"] == "naive"][-1]["accuracy"]
    assert launch(*QUICK, "--workdir", str(tmp_path / "run"))["claims"] == done["claims"]


@pytest.mark.slow
def test_given_features_and_logits_are_the_same_path(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 500)
    strong = np.eye(4)[truth] * 2 + rng.normal(size=(500, 4))
    logits = np.eye(4)[truth] * 1.5 + rng.normal(size=(500, 4))
    np.savez(tmp_path / "f.npz", strong=strong, weak_logits=logits, truth=truth)
    numbers = ["--features", str(tmp_path / "f.npz"), "--train", "300", "--test", "200"]
    short = ["--losses", "naive", "--points", "1", "--seeds", "2", "--tune.epochs", "2", "--quiet"]
    launch("--preset", "paper", *numbers, *short, "--workdir", str(tmp_path / "run"))
    rows = read(tmp_path / "run")
    weak = {row["accuracy"] for row in rows if row["learner"] == "weak"}
    order = np.random.default_rng(0).permutation(500)[300:]
    assert weak == {float((logits[order].argmax(1) == truth[order]).mean())}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--losses", "best"], "unknown"),
        (["--train", "5000"], "1797"),
        (["--dev", "0", "--lrs", "0.1", "0.2"], "--dev"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--features", "bad.npz"], "lacks"),
        (["--sides", "9"], "thumbnail"),
    ],
)
def test_bad_input_ends_with_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "bad.npz", strong=np.zeros(3))
    with pytest.raises(SystemExit) as stop:
        launch(*QUICK, *argv, "--workdir", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
