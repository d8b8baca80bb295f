"""Learning with Less (LLKD, Li et al. 2025): pseudo-labels where teacher is sure, student is not.

A teacher labels a large pool once; at every update a student learns only from the examples of which
the teacher's confidence and the student's uncertainty both pass a threshold of the class that moves
with training (`objectives/selective.py`). Documents are bags of words from overlapping topics. The
teachers: one simulated so that its confidence is right, the same with one confidence for all, one
trained on a few gold labels. Expect: labels of the selected are better than the pool's; F1 of all
data with half the gradient samples or fewer; worst labels by the student's uncertainty alone; the
selected share falls; without an informative confidence the gain is gone. The formulas of thresholds
and weights are a reconstruction, the paper's could not be read. The paper's own models (LLaMA,
RoBERTa) and data are not run: `--preset paper` has more documents, words and seeds.

  python -m experiments.llkd --data twenty_newsgroups.jsonl.gz --gold 300 --dev 500 --test 1500
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import figures as draw
from w2s_jax.cli import main
from w2s_jax.errors import UserError
from w2s_jax.metrics.rows import overview, summarise, values, where
from w2s_jax.metrics.statistics import claim, interval
from w2s_jax.pipelines import llkd
from w2s_jax.pipelines.llkd import ARMS, RANDOM, TEACHERS, Learnt, Setting, World
from w2s_jax.pipelines.probes import best_of, check_choices
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

TUNE = Tune(batch=64, epochs=4, optimizer="adam", schedule="cosine", clip=0.0)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    data: str = ""
    """A file of rows with text and label (JSONL, parquet, CSV, ...); empty: drawn documents."""
    seeds: int = 6
    """Runs per setting: a seed draws the parts of the data, the labels and the order."""
    gold: int = 300
    """Documents with true labels for the trained teacher."""
    dev: int = 700
    """Documents with true labels for choosing learning rates and calibrating."""
    pool: int = 7000
    """Documents the teacher labels; with --data, at most what is left."""
    test: int = 2000
    """Documents for the reported numbers, the same for all seeds."""
    words: int = 600
    """Size of the vocabulary."""
    classes: int = 5
    """Topics of the drawn documents."""
    length: float = 40.0
    """Mean number of words in a drawn document."""
    overlap: float = 0.6
    """Share of a topic's words that all topics have in common."""
    least: float = 0.4
    """Smallest confidence of the simulated teacher."""
    hidden: int = 64
    """Hidden units of the student."""
    decay: float = 0.95
    """Decay of the moving averages."""
    fixed: tuple[float, float] = (0.7, 0.5)
    """Thresholds of confidence and uncertainty for the arm in which they do not move."""
    lrs: tuple[float, ...] = (0.001, 0.003, 0.01)
    """Learning rates; every arm has the one that is best for it on dev."""
    points: int = 20
    """Points of the curves."""
    tune: Tune = TUNE
    """How students train; the learning rate gives way to --lrs."""


PRESETS = {
    "tiny": {"seeds": 3, "gold": 100, "dev": 200, "pool": 800, "test": 400, "words": 200}
    | {"hidden": 16, "lrs": (0.003,), "points": 5, "tune": replace(TUNE, epochs=3)},
    "paper": {"seeds": 10, "pool": 50_000, "test": 5000, "words": 2000, "hidden": 256},
}


def load(cfg: Config) -> World:
    """The documents of ``cfg`` in parts; which are for test does not depend on the seed.

    Raises:
      UserError: too few documents.
    """
    need = cfg.gold + cfg.dev + cfg.pool + cfg.test
    if cfg.data:
        counts, truth = llkd.texts(cfg.data, cfg.words)
        least = cfg.gold + cfg.dev + cfg.test + cfg.tune.batch
        if len(truth) < least:
            raise UserError(f"{cfg.data} has {len(truth)} rows, {least} are needed at least")
        counts, truth = counts[:need], truth[:need]
    else:
        numbers = (cfg.words, cfg.classes, cfg.length, cfg.overlap)
        counts, truth = llkd.corpus(need, *numbers, seed=0)
    known = len(truth) - cfg.test
    drawn = np.stack([np.random.default_rng([6, s]).permutation(known) for s in range(cfg.seeds)])
    gold, dev, pool = np.split(drawn, [cfg.gold, cfg.gold + cfg.dev], axis=1)
    features = llkd.tf_idf(counts, known)
    return World(features, truth, gold, dev, pool, np.arange(known, len(truth)))


def learn(cfg: Config, world: World, labels: dict[str, np.ndarray]) -> list[Row]:
    """``score`` rows of every student at the rate that is best on dev, and its ``curve``.

    The random arm keeps, at every update, the share that LLKD selected in the mean.
    """
    seeds, numbers = range(cfg.seeds), {"hidden": cfg.hidden, "decay": cfg.decay}
    train = partial(llkd.students, tune=cfg.tune, fixed=cfg.fixed, **numbers)
    first = [
        Setting(seed, teacher, arm, lr)
        for teacher in labels
        for arm in ARMS
        for seed in seeds
        for lr in cfg.lrs
    ]
    rows = _rows(cfg, world, labels, first, train(first, world, labels))
    share = {
        (row["teacher"], row["seed"]): row["selected"]
        for row in rows
        if row["block"] == "score" and row["arm"] == "LLKD"
    }
    second = [
        Setting(seed, teacher, RANDOM, lr, share[teacher, seed])
        for teacher in labels
        for seed in seeds
        for lr in cfg.lrs
    ]
    return rows + _rows(cfg, world, labels, second, train(second, world, labels))


def _rows(
    cfg: Config,
    world: World,
    labels: dict[str, np.ndarray],
    settings: list[Setting],
    done: Learnt,
) -> list[Row]:
    """Rows of the settings whose learning rate is best on dev for their teacher and arm."""
    marks = []
    for one, classes in zip(settings, done.classes, strict=True):
        dev = world.dev[one.seed]
        right = llkd.macro_f1(classes[dev], world.truth[dev])
        marks.append(((one.teacher, one.arm), one.lr, right))
    best, rows = best_of(marks), []
    parts = zip(settings, done.classes, done.picked, done.selected, strict=True)
    for one, classes, picked, selected in parts:
        if best[one.teacher, one.arm] != one.lr:
            continue
        told = labels[one.teacher][one.seed]
        rows.append({"block": "score", **llkd.score(one, world, told, classes, picked, selected)})
        names = {"teacher": one.teacher, "arm": one.arm, "seed": one.seed}
        for part in np.array_split(np.arange(len(selected)), cfg.points):
            step, now = int(part[-1]) + 1, float(selected[part].mean())
            rows.append({"block": "curve", **names, "step": step, "selected": now})
    return rows


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: ``teacher`` (its accuracy), ``score`` (a student), ``curve`` (its selected share)."""
    _check(cfg)
    world = load(cfg)
    inputs = {"config": cfg, "features": world.features, "truth": world.truth}
    tune = replace(cfg.tune, steps=300, epochs=1.0, batch=min(cfg.tune.batch, cfg.gold), micro=1)
    probs = ctx.stage("teacher", inputs, lambda: llkd.trained(world, (0.003, 0.03), tune))
    labels = llkd.teachers(world, probs, cfg.least)
    for teacher, said in labels.items():
        right = (said.argmax(-1) == world.truth)[:, world.test].mean(1)
        for seed, share in enumerate(right):
            yield {"block": "teacher", "teacher": teacher, "seed": seed, "accuracy": float(share)}
    count = len(TEACHERS) * (len(ARMS) + 1) * cfg.seeds * len(cfg.lrs)
    ctx.say(f"{count} students in two programs")
    yield from ctx.stage("students", inputs, lambda: learn(cfg, world, labels))


def plan(cfg: Config) -> Draft:
    """The step of a linear student; all runs are spread over the devices, each whole on one."""
    _check(cfg)
    return drafts.probing(cfg.words, cfg.tune, classes=cfg.classes, flags={"batch": "--tune.batch"})


def _check(cfg: Config) -> None:
    sizes = (cfg.gold, cfg.dev, cfg.pool, cfg.test, cfg.words, cfg.hidden, cfg.seeds, cfg.points)
    if min(sizes) < 1 or cfg.classes < 2:
        raise UserError("--seeds, --words, --hidden, --points and the parts of the data: from 1")
    if not 0 <= cfg.decay < 1:
        raise UserError(f"--decay {cfg.decay} must be in [0, 1)")
    if not 1 / cfg.classes < cfg.least <= 1:
        raise UserError(f"--least {cfg.least} must be above chance (1 / classes) and at most 1")
    if not (0 <= cfg.overlap <= 1 and 5 <= cfg.length < np.inf):
        raise UserError("--overlap must be in [0, 1] and --length 5 or more")
    if not all(0 <= least <= 1 for least in cfg.fixed):
        raise UserError(f"--fixed {cfg.fixed[0]} {cfg.fixed[1]}: thresholds lie in [0, 1]")
    check_choices(lrs=cfg.lrs)


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the card says must appear: for the calibrated teacher, and for the trained one."""
    found: list[dict[str, Any]] = []
    gain = {}

    def add(name: str, what: str, numbers: np.ndarray, **bounds: Any) -> None:
        words = f"{what}, mean over seeds, t interval"
        found.append(claim(name, words, interval(numbers), **bounds))

    for teacher in TEACHERS:
        score = partial(values, rows, block="score", teacher=teacher)
        f1 = partial(score, "macro F1")
        gain[teacher] = f1(arm="LLKD") - f1(arm="all data")
        if teacher == "constant":
            continue
        labels, pool = partial(score, "label accuracy"), score("pool label accuracy", arm="LLKD")
        under = f"{teacher} teacher: "
        better, worse = labels(arm="LLKD") - pool, pool - labels(arm="student only")
        add(under + "selected labels better than the pool's", "accuracy", better, above=0.0)
        add(under + "LLKD not below all data by .005", "macro F1", gain[teacher], above=-0.005)
        add(under + "LLKD above all data", "macro F1", gain[teacher], above=0.0)
        more = f1(arm="LLKD") - f1(arm=RANDOM)
        add(under + "LLKD above random", "macro F1", more, above=0.0)
        share = score("selected", arm="LLKD")
        add(under + "LLKD selects half or less", "mean share of a batch", share, below=0.5)
        add(under + "student-only labels worse than the pool's", "accuracy", worse, above=0.0)
        worst = np.min([f1(arm=arm) for arm in (*ARMS, RANDOM) if arm != "student only"], axis=0)
        low = worst - f1(arm="student only")
        add(under + "student only worst or tied (.005)", "macro F1 to the next", low, above=-0.005)
        curve = where(rows, block="curve", teacher=teacher)
        for arm, words in (("LLKD", ""), ("LLKD, fixed", ", fixed thresholds")):
            name = f"{under}selected share falls{words}"
            add(name, "first - last quarter", _fall(curve, arm), above=0.0)
    name = "constant confidence: gain of LLKD smaller than under the calibrated teacher"
    add(name, "macro F1", gain["calibrated"] - gain["constant"], above=0.0)
    add("constant confidence: no gain above .005", "macro F1", gain["constant"], below=0.005)
    return found


def _fall(curve: list[Row], arm: str) -> np.ndarray:
    """Selected share of an arm in the first quarter of its curve less that in the last, [S]."""
    steps = sorted({row["step"] for row in where(curve, arm=arm)})
    quarter = max(1, len(steps) // 4)
    lines = np.stack([values(curve, "selected", arm=arm, step=step) for step in steps])
    return lines[:quarter].mean(0) - lines[-quarter:].mean(0)


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Macro-F1, label accuracy and gradient share by arm; the selected share along training."""
    scores, curve = where(rows, block="score"), where(rows, block="curve")
    low = min(row["macro F1"] for row in summarise(scores, ["teacher", "arm"], "macro F1"))
    shown = ("teacher only", "student only", "LLKD", "LLKD, fixed")
    moving = [row for row in curve if row["arm"] in shown]
    bars = partial(draw.bars, scores, "teacher", hue="arm", xlabel="teacher", height=4.4)
    share, mean = "share of the batch that is selected", "mean share of a batch that is selected"
    dots = partial(draw.scatter, scores, hue="arm", panel="teacher", xlabel=mean)
    lines = partial(draw.lines, moving, hue="arm", panel="teacher", xlabel="updates")
    f1, labels = (max(0.0, low - 0.03), None), "accuracy of the selected labels"
    return [
        bars("macro F1", ylabel="test macro-F1", ylim=f1, path=folder / "f1.png"),
        bars("label accuracy", ylabel=labels, ylim=(0.4, None), path=folder / "labels.png"),
        dots("selected", "macro F1", ylabel="test macro-F1", path=folder / "share.png"),
        lines("step", "selected", ylabel=share, path=folder / "selected.png"),
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Mean macro-F1 per teacher and arm with its interval, and what was learnt from."""
    more = ("label accuracy", "selected", "ever", "least class", "lr")
    return overview(where(rows, block="score"), ["teacher", "arm"], "macro F1", more)


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="llkd",
        minutes=0.5,
        summary=summary,
        plan=plan,
    )
