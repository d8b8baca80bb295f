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
    given: dict = dict(block="tokens", mode="live", student="s", chosen=1, exposure=0.0)
    given |= dict(forward=0.1)
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


def at_each_seed(score: str, high: dict, low: dict, gap: float = 0.1) -> list[dict]:
    """Two settings whose scores are ``gap`` apart, give or take less, at each of four seeds."""
    both = ((high, 0.5 + gap), (low, 0.5))
    return [
        row(**{"divergence": "", "seed": seed, score: value + 0.01 * seed * (2 - seed)} | setting)
        for setting, value in both
        for seed in range(4)
    ]


def live(name: str, **more) -> dict:
    return dict(divergence=name) | more


def picture(part: str, name: str, **more) -> dict:
    return dict(block="pictures", part=part, divergence=name, mode="stored", count=9) | more


OWN = {"mode": "on-policy"}
SIGNS = {
    "reverse_kl seeks modes more than forward_kl": (
        *("entropy", live("forward_kl"), live("reverse_kl")),
    ),
    "jsd seeks modes more than forward_kl": ("entropy", live("forward_kl"), live("jsd")),
    "reverse_kl seeks modes more than jsd": ("entropy", live("jsd"), live("reverse_kl")),
    "strays less": ("stray", live("forward_kl"), live("reverse_kl")),
    "jsd samples better than sft": ("sampled", live("jsd"), live("sft")),
    "narrows the exposure gap": ("exposure", live("jsd"), live("jsd", **OWN)),
    "on own answers jsd samples better": ("sampled", live("jsd", **OWN), live("jsd")),
    "as one event beats": (
        *("forward", live("renormalised", mode="stored"), live("forward_kl", mode="stored")),
    ),
    "kd T=4 above labels": ("accuracy", picture("losses", "kd T=4"), picture("losses", "ce")),
    "hint matched": ("accuracy", picture("matches", "hint"), picture("matches", "none")),
    "born-again": (
        *("accuracy", picture("generations", "kd T=2", count=1)),
        picture("generations", "ce", count=0),
    ),
}


@pytest.mark.parametrize("words", SIGNS)
def test_a_claim_that_is_turned_round_does_not_hold(words: str) -> None:
    score, high, low = SIGNS[words]
    assert claimed(at_each_seed(score, high, low), words) == [True]
    assert claimed(at_each_seed(score, low, high), words) == [False]
    assert claimed(at_each_seed(score, high, low, gap=0.0), words) == [False]


def test_a_gain_that_shrinks_with_labels() -> None:
    def rows(few: float, many: float) -> list[dict]:
        sizes = ((50, few), (1000, many))
        both = [("kd T=4", size, gain) for size, gain in sizes] + [("ce", 50, 0), ("ce", 1000, 0)]
        return [
            row(seed=seed, accuracy=0.5 + gain, **picture("counts", name, count=size))
            for name, size, gain in both
            for seed in range(3)
        ]

    words = "distillation gains more with 50 labels than with 1000"
    assert claimed(rows(0.2, 0.1), words) == [True]
    assert claimed(rows(0.1, 0.2), words) == [False]


def test_a_claim_answers_for_all_of_them() -> None:
    """Holm's p: of differences 1, 2, 3 the t test gives .0371 (t = 3.4641, one-sided, n = 3)."""
    rows = [row("forward_kl", s, entropy=1.5 + s, stray=0.5) for s in range(3)]
    rows += [row("reverse_kl", s, entropy=0.5, stray=0.5) for s in range(3)]
    modes, strays = findings.claims(rows)
    assert modes["statistic"].endswith("Holm p 0.074 of 2"), "twice that, as there are two"
    assert strays["statistic"].endswith("Holm p 1 of 2") and not strays["holds"]
    (alone, _) = findings.claims([r for r in rows if r["seed"] == 0])
    assert alone["statistic"].endswith("Holm p 1 of 2") and not alone["holds"]


def right(*shares: tuple[float, float]) -> np.ndarray:
    """Answers [1, lrs, 2 seeds, 10 dev and 10 test rows] of which these shares are right."""
    count = np.arange(10)
    one = [np.concatenate([count < 10 * dev, count < 10 * test]) for dev, test in shares]
    return np.stack([np.stack([row, row]) for row in one])[None]


def pictures(folder: Path, **changed) -> Pictures:
    numbers = {**vars(Config()), **PRESETS["tiny"]}
    given: dict = dict(data="", seeds=2, train=120, dev=40, test=60, labels=(40, 20), shift=1)
    given |= dict(losses=("ce", "kd T=4"), teacher="cnn-4-8", lrs=(1e-2,))
    given |= dict(teacher_tune=numbers["teacher_tune"], tune=numbers["picture_tune"])
    return Pictures(ctx=Context(folder), **given | changed)


def test_dev_chooses_and_test_is_reported(tmp_path: Path) -> None:
    study = pictures(tmp_path, dev=10, test=10, lrs=(0.1, 0.2))
    rows = list(study.rows(right((0.6, 0.2), (0.4, 0.9)), ["ce"], part="losses"))
    assert [(r["lr"], r["chosen"], r["accuracy"], r["dev"]) for r in rows[::2]] == [
        (0.1, 1, 0.2, 0.6),
        (0.2, 0, 0.9, 0.4),
    ]
    tokens = zoo(tmp_path, dev=10, test=10, own=5, lrs=(0.1, 0.2))
    chance = np.where(right((0.6, 0.2), (0.4, 0.9))[:, :, :1], 1.0, 0.0)
    seen = dict.fromkeys(("chance", "forward", "reverse", "nll", "entropy", "stray"), chance)
    seen |= dict(count=np.ones_like(chance), own_reverse=chance[..., :10])
    seen |= dict(own_count=np.ones_like(chance[..., :10]))
    start = {name: value[0, 0, 0] for name, value in seen.items()}
    rows = list(tokens._rows("s", "live", ["jsd"], seen, start))[:2]
    assert [(r["lr"], r["chosen"], r["sampled"], r["dev"]) for r in rows] == [
        (0.1, 1, pytest.approx(0.2), pytest.approx(0.6)),
        (0.2, 0, pytest.approx(0.9), pytest.approx(0.4)),
    ]


@pytest.mark.slow
def test_a_weight_is_chosen_with_its_rate(tmp_path: Path, monkeypatch) -> None:
    """The third share is the best at its best rate and the worst on the mean of the rates."""
    study = pictures(tmp_path, dev=10, test=10, lrs=(0.1, 0.2))
    model = study.model("cnn-4-8")
    vars(study)["taught"] = (model, model.init(jax.random.key(0)))
    vars(study)["told"] = study.splits.train
    dev = (right((0.5, 0), (0.6, 0)), right((0.6, 0), (0.6, 0)), right((0.0, 0), (0.7, 0)))

    def trained(self, model, objective, names, count, **how):
        return np.concatenate(dev[: len(names)]), {}

    monkeypatch.setattr(Pictures, "trained", trained)
    rows = [r for r in study.matches("cnn-2-4") if r["divergence"] == "relations"]
    assert {r["share"] for r in rows} == {1.0}
    assert {r["dev"] for r in rows if r["chosen"]} == {0.7}


def test_names_below_the_bars_do_not_touch(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    rows = [
        row(seed=0, accuracy=0.5, **picture("losses", name, mode=mode))
        for name in LOSSES
        for mode in ("stored", "live")
    ]
    findings.figures(rows, tmp_path)
    (axes,) = drawn[0].axes
    ticks = axes.get_xticklabels()
    across = axes.transData.transform([(0, 0), (1, 0)])
    apart = (across[1] - across[0])[0] * np.sin(np.radians(ticks[0].get_rotation()))
    assert len(ticks) == len(LOSSES) and apart > ticks[0].get_fontsize() * drawn[0].dpi / 72


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
    study = pictures(tmp_path)
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
