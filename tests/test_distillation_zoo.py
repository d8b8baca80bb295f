"""The zoo's comparisons: what is measured, what a claim needs, and that its sources agree."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distillation_zoo import PRESETS, Config, main
from w2s_jax.losses import distillation as dense
from w2s_jax.losses.classification import ramp
from w2s_jax.objectives import at
from w2s_jax.pipelines import zoo_findings as findings
from w2s_jax.pipelines import zoo_tokens
from w2s_jax.pipelines.zoo_pictures import LOSSES, Pictures
from w2s_jax.pipelines.zoo_tokens import Zoo, blind
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune

TINY = Tune(batch=8, epochs=1, optimizer="adam", schedule="constant")


def zoo(folder: Path, **changed) -> Zoo:
    numbers = dict(seeds=1, problems=16, dev=20, test=30, own=4, length=64, answer=24, top=73)
    numbers |= dict(steps=(1,), lrs=(1e-3,), tune=TINY, teacher="nano-2", ctx=Context(folder))
    return Zoo(**numbers | changed)  # type: ignore[arg-type]


def test_two_distributions_by_hand() -> None:
    student = jnp.log(jnp.array([[[0.25, 0.7, 0.05]]]))
    teacher = jnp.log(jnp.array([[[0.5, 0.495, 0.005]]]))
    got = zoo_tokens._compared(student, teacher, jnp.array([[1]]))
    q, p = np.array([0.25, 0.7, 0.05]), np.array([0.5, 0.495, 0.005])
    want = {
        "forward": (p * np.log(p / q)).sum(),
        "reverse": (q * np.log(q / p)).sum(),
        "nll": -np.log(0.7),
        "entropy": -(q * np.log(q)).sum(),
        "stray": 0.05,  # the teacher gives the third less than 1 %
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], [[value]], rtol=1e-5, err_msg=name)


def test_targets_are_handed_on_and_schedules_bound() -> None:
    student, teacher = jax.random.normal(jax.random.key(0), (2, 4, 7))
    ids = jnp.zeros(4, int)
    loss = at(blind(dense.taid, t=ramp(0.2, 1.0, over=1.0)), jnp.float32(0.5))
    np.testing.assert_allclose(
        loss(student, teacher, ids), dense.taid(student, teacher, t=0.6), rtol=1e-4
    )
    hard = zoo_tokens.sft(student, None, ids)
    np.testing.assert_allclose(hard, -jax.nn.log_softmax(student)[:, 0], rtol=1e-6)


def test_every_loss_is_finite_and_stored_ones_agree_with_whole_ones() -> None:
    student, teacher = jax.random.normal(jax.random.key(1), (2, 5, 9))
    ids = jnp.arange(5)
    logps = jax.nn.log_softmax(teacher)
    order = jnp.argsort(-logps, axis=-1)
    stored = {"ids": order, "logits": jnp.take_along_axis(logps, order, -1), "tail": jnp.zeros(5)}
    half = partial(at, progress=jnp.float32(0.5))
    for name, loss in zoo_tokens.DENSE.items():
        whole = half(loss)(student, teacher, ids)
        kept = half(zoo_tokens.STORED[name])(student, stored, ids)
        # 1e-6 of mass is left to "all other tokens", which there are none of
        np.testing.assert_allclose(whole, kept, rtol=1e-3, atol=2e-5, err_msg=name)
    for name, loss in LOSSES.items():
        assert jnp.isfinite(half(loss)(student, teacher, ids)).all(), name


def row(divergence: str, seed: int, **values) -> dict:
    given = dict(block="tokens", mode="live", student="s", chosen=1, exposure=0.0, forward=0.1)
    given |= dict(entropy=0.1, stray=0.01, sampled=0.5, reverse=0.1, lr=1e-3, dev=0.5)
    return given | dict(divergence=divergence, seed=seed) | values


def claimed(rows: list[dict], words: str) -> list[bool]:
    return [one["holds"] for one in findings.claims(rows) if words in one["name"]]


def test_a_claim_is_decided_by_its_interval() -> None:
    def rows(gap: float, noise: float) -> list[dict]:
        wide = [row("forward_kl", s, entropy=0.2 + gap + noise * (-1) ** s) for s in range(4)]
        return wide + [row("reverse_kl", s, entropy=0.2) for s in range(4)]

    words = "reverse_kl seeks modes more than forward_kl"
    assert claimed(rows(0.1, 0.01), words) == [True]
    assert claimed(rows(0.1, 0.5), words) == [False]
    assert claimed(rows(-0.1, 0.01), words) == [False]
    assert claimed(rows(0.1, 0.01), "exposure") == []  # nothing on-policy was run


def test_rates_that_dev_did_not_choose_do_not_count() -> None:
    good = [row("forward_kl", s, sampled=0.9) for s in range(3)]
    bad = [row("forward_kl", s, sampled=0.1, chosen=0, lr=1e-2) for s in range(3)]
    plain = [row("sft", s, sampled=0.5 + 0.01 * s) for s in range(3)]
    assert claimed(good + bad + plain, "samples better than sft") == [True]
    (one, two) = findings.summary(good + bad + plain)
    assert one["score"] == pytest.approx(0.9) and two["score"] == pytest.approx(0.51)


@pytest.mark.slow
def test_all_tokens_stored_train_as_a_live_teacher_does(tmp_path: Path) -> None:
    study = zoo(tmp_path)
    made = {m: list(study.run("nano-1", m, ["forward_kl", "jsd"])) for m in ("stored", "live")}
    for one, two in zip(*made.values(), strict=True):
        for name in ("sampled", "forward", "reverse", "entropy"):
            assert one[name] == pytest.approx(two[name], rel=2e-2, abs=1e-4), name
    start = made["live"][-1]
    assert start["divergence"] == "start" and made["live"][0]["forward"] != start["forward"]
    again = list(zoo(tmp_path).run("nano-1", "live", ["forward_kl", "jsd"]))
    assert again == made["live"]  # read, not trained


@pytest.mark.slow
def test_what_goes_beside_the_losses(tmp_path: Path) -> None:
    numbers = {**vars(Config()), **PRESETS["tiny"]}
    study = Pictures(
        ctx=Context(tmp_path), data="", seeds=2, train=120, dev=40, test=60, labels=(40, 20),
        losses=("ce", "kd T=4"), teacher="cnn-4-8", shift=1, lrs=(1e-2,),
        teacher_tune=numbers["teacher_tune"], tune=numbers["picture_tune"],
    )  # fmt: skip
    matches = list(study.matches("cnn-2-4"))
    names = ["none", "hint", "attention", "relations", "similarity"]
    assert [row["divergence"] for row in matches] == [n for n in names for _ in range(2)]
    assert all(0 <= row["accuracy"] <= 1 for row in matches)
    ages = list(study.generations("mlp-4", many=1))
    assert [row["count"] for row in ages] == [0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stored", "on-policy"])
def test_any_student_learns_from_any_teacher(mode: str, tmp_path: Path, capsys) -> None:
    lines = [
        {"prompt": f"q : ann has {i} pens . ben has {i} pens . how many pens does ben have ?",
         "response": f" a : #### {i}"} for i in range(10, 60)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [
        *("--data", str(tmp_path / "rows.jsonl"), "--workdir", str(tmp_path / "work")),
        *("--students", "nano-1", "--teacher", "nano-2", "--modes", mode, "--top", "8"),
        *("--divergences", "reverse_kl", "--template", "none", "--held", "0.2"),
        *("--length", "64", "--answer", "16", "--tune.lr", "0.003", "--tune.epochs", "4"),
        *("--save", str(tmp_path / "new"), "--quiet"),
    ]
    main(flags)
    made = (tmp_path / "work" / "results.jsonl").read_text().splitlines()
    before, after = (json.loads(line) for line in made)
    assert (before["training"], after["training"]) == ("student", "distilled")
    seen = "own_reverse" if mode == "on-policy" else "reverse"  # each improves where it looks
    assert after[seen] < before[seen]
    assert (tmp_path / "new" / "model.safetensors").exists()
