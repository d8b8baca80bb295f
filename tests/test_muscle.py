"""The update experiment: its pieces by hand, claims that can fail, bad input in one line."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import muscle as experiment
from w2s_jax.cli import main
from w2s_jax.data import arithmetic
from w2s_jax.losses import compatibility as masks
from w2s_jax.metrics.statistics import interval
from w2s_jax.models.heads import linear
from w2s_jax.pipelines import muscle, muscle_report
from w2s_jax.pipelines.muscle import Bench, Learned
from w2s_jax.train.optim import Tune
from w2s_jax.types import State, Table


def bench(seeds: int = 2) -> Bench:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 60)
    features = (np.eye(3)[truth] + 0.6 * rng.normal(size=(60, 3))).astype(np.float32)
    held = {"features": features, "label": np.eye(3, dtype=np.float32)[truth]}
    tables = [Table({k: v[:40] for k, v in held.items()})] * seeds
    dev = np.tile(np.arange(40, 50), (seeds, 1))
    return Bench(tables, Tune(batch=20, epochs=3, optimizer="adam", lr=0.1), held, dev,
                 np.arange(50, 60))  # fmt: skip


def learned(nll: list[list[float]], **setting: float) -> Learned:
    version = muscle.Version("", linear(3, 3), {})
    return Learned(version, setting, np.array(nll), None)


def test_versions_and_what_starts_from_them():
    data, model = bench(), linear(3, 3)
    start = muscle.class_version("v", model, range(2))
    new = muscle.tasked(data, start, (0.1,))
    old = replace(
        new, version=replace(new.version, params={"kernel": -new.version.params["kernel"]})
    )
    todo = [dict(lr=0.1, mask=m, weight=w) for m, w in ((0, 1.0), (1, 1.0), (0, 0.0))]
    made = muscle.compatible(data, old.version, new.version, [masks.always_old, always_new], todo)
    drawn, kept, plain = made
    np.testing.assert_allclose(kept.nll, new.nll, atol=1e-5)  # its own teacher teaches nothing
    assert drawn.nll.mean() > new.nll.mean() > plain.nll.mean()
    assert drawn.logps.shape == (2, 60, 3)
    np.testing.assert_allclose(np.exp(new.logps).sum(-1), 1, rtol=1e-5)


def always_new(student, old, targets):
    return jnp.zeros(targets.shape, bool)


def test_each_run_hears_its_own_teachers_and_the_new_one_shares_the_students_base():
    seen = {}

    def objective(params, state, batch, key):
        seen["teacher"] = state.frozen["teacher"]

    runs = {"a": np.array([[1.0], [2.0]])}
    frozen = {"base": "new", "teacher": [{"base": "old", "lora": runs}, {"a": 10 * runs["a"]}]}
    state = State(jnp.int32(0), jnp.int32(1), {}, (), frozen)
    muscle.own_teachers(objective, 1, True)({}, state, {}, jax.random.key(0))
    old, new = seen["teacher"]
    assert (old["base"], new["base"]) == ("old", "new")
    assert (old["lora"]["a"], new["lora"]["a"]) == ([2.0], [20.0])


def test_dev_chooses_per_arm_and_never_the_test():
    data = bench()
    low = [[1.0] * 40 + [0.1] * 10 + [9.0] * 10] * 2
    high = [[1.0] * 40 + [0.2] * 10 + [0.0] * 10] * 2
    assert muscle.best([learned(high), learned(low)], data).nll[0, 45] == 0.1
    ones = [learned(high, mask=0, weight=0.0)]
    for mask, mixed in experiment.ARMS.values():
        weights = (0.25, 0.75) if mixed else (1.0,)
        ones += [learned(low if w == 0.75 else high, mask=mask, weight=w) for w in weights]
    picked = experiment.picked(ones, data)
    assert {name: one.setting["weight"] for name, one in picked.items()} == {
        "plain": 0.0, "student wrong": 1.0, "student wrong + CE": 0.75, "old right": 1.0,
        "always old": 1.0, "less likely + CE": 0.75,
    }  # fmt: skip
    cfg = experiment.Config(lambdas=(0.25, 0.75))
    asked = [(s["mask"], s["weight"]) for s in experiment.settings(cfg, 0.1)]
    assert asked == [(one.setting["mask"], one.setting["weight"]) for one in ones]


def test_sequences_are_an_arm_of_words_alone():
    arms = experiment.ARMS | experiment.SEQUENCES
    cfg = experiment.Config(lambdas=(0.25, 0.75))
    todo = experiment.settings(cfg, 0.1, arms)
    assert todo[-2:] == [dict(lr=0.1, mask=len(experiment.MASKS), weight=w) for w in (0.25, 0.75)]
    low, high = [[0.1] * 60] * 2, [[0.2] * 60] * 2
    ones = [learned(low if one["weight"] == 0.75 else high, **one) for one in todo]
    best = experiment.picked(ones, bench(), arms)["sequences less likely + CE"].setting
    assert best == dict(lr=0.1, mask=4, weight=0.75)


def test_final_numbers_are_told_apart_whatever_their_size():
    texts = ["1 #### 1234567", "1 #### 1234568", "1 #### 1,234,567", "2 #### 20", "none"]
    answers = muscle.finals(arithmetic.verify("1 #### 20", text) for text in texts)
    assert answers[0] == answers[2] != answers[1] and answers[4] == ""
    assert answers[3] == muscle.finals([arithmetic.verify("1 #### 20.0", "#### 20.0")])[0]


def test_problems_of_dev_test_and_training_never_meet_and_the_mask_counts_the_prompt():
    cfg = experiment.Config(token_dev=20, token_test=30, problems=40, token_seeds=2, steps=(1,))
    held, drawn = experiment.problems(cfg)
    texts = [set(t["prompt"]) for t in (held, *drawn)]
    assert len(held) == 50 and not (texts[0] & texts[1] or texts[0] & texts[2])
    assert texts[1] != texts[2]
    tokenizer = arithmetic.tokenizer()
    whole, half = (muscle.worded(held, tokenizer, 64, context=c) for c in (True, False))
    assert (whole["mask"][:, 1:] == (whole["segment"][:, 1:] > 0)).all()
    assert whole["mask"].sum() > half["mask"].sum() > 0
    assert (half["mask"] <= whole["mask"]).all()
    groups = muscle.grouped(half.take(np.arange(30)))["groups"]
    assert groups["tokens"].shape == (1, muscle.ROWS, 64)
    np.testing.assert_array_equal(groups["tokens"][0, 49], half["tokens"][29])


def test_a_file_of_problems_is_divided_without_overlap(tmp_path):
    drawn = arithmetic.problems(5, 30, steps=(1,))
    lines = [f'{{"question": "{q}", "answer": "{a}"}}' for q, a in
             zip(drawn["question"], (a.replace("\n", "\\n") for a in drawn["answer"]),
                 strict=True)]  # fmt: skip
    for name, part in (("task", lines[:20]), ("exam", lines[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    cfg = experiment.Config(task=str(tmp_path / "task.jsonl"), token_dev=4, token_test=6,
                            problems=10, token_seeds=2)  # fmt: skip
    held, tables = experiment.problems(cfg)
    exam = str(tmp_path / "exam.jsonl")
    apart, others = experiment.problems(replace(cfg, exam=exam))
    assert len(held) == len(apart) == 10 and len(tables[0]) == 10
    first = set(drawn["prompt"][:20])
    assert set(apart["prompt"][4:]) <= set(drawn["prompt"][20:]) and set(held["prompt"]) <= first
    for part, own in ((held, tables), (apart, others)):
        assert not any(set(part["prompt"]) & set(one["prompt"]) for one in own)


def row(model: str, seed: int, nfr: float, accuracy: float, case: str = "same") -> dict:
    noise = 0.001 * (-1) ** seed
    return dict(block="classes", case=case, model=model, seed=seed, nfr=nfr + noise,
                accuracy=accuracy, old_accuracy=0.8, pfr=0.0, nfr_mc=nfr)  # fmt: skip


def rows(ours: float, case: str = "same") -> list[dict]:
    numbers = {"new": 0.05, "plain": 0.05, "always old": 0.04, "student wrong": ours,
               "student wrong + CE": 0.06}  # fmt: skip
    noise = {"student wrong": 0.002, "student wrong + CE": 0.003}
    return [
        row(
            model, seed, nfr + noise.get(model, 0) * (seed % 3 - 1), 0.8 + 0.01 * (nfr < 0.05), case
        )
        for model, nfr in numbers.items()
        for seed in range(6)
    ]


def test_claims_come_from_intervals_and_can_fail():
    good = {c["name"]: c["holds"] for c in muscle_report.claims(rows(0.03))}
    bad = {c["name"]: c["holds"] for c in muscle_report.claims(rows(0.05))}
    name = "classes, same: student wrong breaks fewer than new"
    assert good[name] and not bad[name]
    assert not good["classes, same: student wrong + CE breaks fewer than new"]
    assert good["classes, same: new breaks right answers"]
    both = muscle_report.claims([*rows(0.03), *rows(0.045, "better")])
    more = [c for c in both if "larger share" in c["name"]]
    assert [c["holds"] for c in more] == [True, False]
    assert more[0]["value"] == pytest.approx((0.05 - 0.03) / 0.05 - (0.05 - 0.045) / 0.05)


def test_the_relative_cut_is_a_ratio_of_means():
    change, base = np.array([0.01, 0.03, 0.02]), np.array([0.1, 0.2, 0.12])
    found = interval(muscle_report.relative(change, base))
    assert found.value == pytest.approx(0.06 / 0.42)
    alike = muscle_report.relative(0.5 * base, base)  # the same share in every seed: no spread
    np.testing.assert_allclose(alike, 0.5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--blocks", "words"], "unknown"),
        (["--olds", "nano-1", "nano-2", "nano-3"], "--olds"),
        (["--lambdas", "1.5"], "--lambdas"),
        (["--token_test", "0"], "above 0"),
        (["--temperature", "0"], "--temperature"),
        (["--alpha", "nan"], "--alpha"),
        (["--token_lrs", "-0.1"], "--token_lrs"),
        (["--blocks"], "--blocks"),
        (["--blocks", "tokens", "--length", "40"], "--length"),
        (["--blocks", "tokens", "--task", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_input_ends_with_one_line(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            experiment.Config,
            experiment.run,
            figures=muscle_report.figures,
            claims=muscle_report.claims,
            presets=experiment.PRESETS,
            paper="muscle",
            minutes=3,
            argv=["--preset", "tiny", *argv, "--quiet", "--workdir", str(tmp_path / "run")],
        )
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
