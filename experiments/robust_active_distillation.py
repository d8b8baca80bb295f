"""Robust Active Distillation (Baykal et al. 2022): which rows a fallible teacher is to label.

A student that has seen a few labelled rows says how sure it is of each row of a pool; a budget of
pool rows is labelled by a teacher that is wrong somewhere, and a new student learns from both.
Taking the rows the student is least sure of also takes those the teacher gets wrong; RAD plays a
game against m wrong labels in unknown places and samples by its solution (`data/active.py`).
Expect accuracy RAD > random >= margin sampling, and both teacher errors and informativeness of the
chosen rows random < RAD < margin. Two teachers (one worse) give soft or hard labels. The equations
are from memory of the paper and unverified, the closed form was derived and checked anew; no number
of the paper could be read, so `--preset paper` is the same protocol on more data, numbers our own.

  python -m experiments.robust_active_distillation --data mnist.npz --labelled 100 --pool 5000
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import figures as draw
from w2s_jax.cli import main
from w2s_jax.data import images
from w2s_jax.errors import UserError
from w2s_jax.metrics.rows import overview, summarise, values, where
from w2s_jax.metrics.statistics import claim, interval
from w2s_jax.models.heads import linear, mlp
from w2s_jax.pipelines.active_distillation import MADE_UP, World, choices, students, taught
from w2s_jax.pipelines.probes import check_choices
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

TUNE = Tune(batch=30, steps=400, optimizer="adam", schedule="cosine", clip=0.0)
GROWING = ("random", "margin", "RAD")


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    data: str = ""
    """An npz file of pictures (x_train, y_train, x_test, y_test); empty: scikit-learn's digits."""
    seeds: int = 20
    """Runs per setting: a seed draws the parts of the data, the teacher and the chosen rows."""
    labelled: int = 60
    """Rows the first student learns from, with their true labels; every later one has them too."""
    teachers: tuple[int, ...] = (100, 200)
    """Rows each teacher learns from; fewer make a worse one."""
    dev: int = 137
    """Labelled rows for choosing rates and temperatures and for estimating m."""
    pool: int = 900
    """Rows without a label."""
    test: int = 500
    """Rows for the reported numbers, the same for all seeds."""
    budget: int = 150
    """Rows of the pool that the teacher labels."""
    hidden: int = 128
    """Hidden units of the teacher; students are linear."""
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Learning rates to choose from on dev: the first student's, the teacher's, the last's."""
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Temperatures of the teacher's soft labels to choose from on dev."""
    flips: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3)
    """Shares of the pool on which a perfect teacher is made wrong, least sure rows first."""
    tune: Tune = TUNE
    """How every model trains; its learning rate gives way to --lrs."""


PRESETS = {
    "tiny": {"seeds": 3, "teachers": (100,), "lrs": (0.01,), "temperatures": (1.0,)}
    | {"flips": (0.0, 0.3)}
    | {"tune": replace(TUNE, steps=100)},
    "paper": {"labelled": 500, "teachers": (500, 2000), "dev": 500, "pool": 20_000, "test": 5000}
    | {"budget": 2000, "tune": replace(TUNE, batch=100, steps=2000)},
}


def load(cfg: Config) -> World:
    """Pixels with mean 0 and variance 1 over all that is not for test, and each seed's parts.

    Raises:
      UserError: a file without the arrays it should have, or with too few rows.
    """
    sizes = (cfg.labelled, max(cfg.teachers), cfg.dev, cfg.pool)
    known = sum(sizes)
    shown, truth = images.pictures(cfg.data, known, cfg.test)
    pixels = shown.reshape(len(shown), -1)
    pixels = (pixels - pixels[:known].mean(0)) / pixels[:known].std()
    drawn = np.stack([np.random.default_rng([2, s]).permutation(known) for s in range(cfg.seeds)])
    parts = np.split(drawn, np.cumsum(sizes)[:-1], axis=1)
    return World(pixels, truth, *parts, test=np.arange(known, known + cfg.test))


def begin(cfg: Config, world: World) -> dict[str, np.ndarray]:
    """Logits [S,N,C] of the first ``student`` and of each teacher, by the number of its rows."""
    classes, width = world.classes, world.features.shape[1]
    student = linear(classes, width, bias=True)
    heard = {"student": taught(world, student, world.labelled, cfg.lrs, cfg.tune)}
    teacher = mlp(classes, width, cfg.hidden)
    for size in cfg.teachers:
        heard[str(size)] = taught(world, teacher, world.teacher[:, :size], cfg.lrs, cfg.tune)
    return heard


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: ``alone`` (first student, teachers), ``natural`` (an arm under a trained teacher),
    ``growing`` (an arm under one made wrong)."""
    _check(cfg)
    world = load(cfg)
    inputs = {"config": cfg, "features": world.features, "truth": world.truth}
    heard = ctx.stage("begin", inputs, lambda: begin(cfg, world))
    for name, logits in heard.items():
        right = (logits.argmax(-1) == world.truth)[:, world.test].mean(1)
        arm = "labelled rows only" if name == "student" else f"teacher of {name}"
        for seed, share in enumerate(right):
            yield {"block": "alone", "arm": arm, "seed": seed, "accuracy": float(share)}
    chosen = choices(world, heard, cfg.budget, cfg.flips, GROWING)
    ctx.say(f"{len(chosen)} choices of {cfg.budget} rows; training the last students")

    def learn() -> list[Row]:
        return students(world, heard, chosen, cfg.lrs, cfg.temperatures, cfg.tune)

    for row in ctx.stage("students", inputs, learn):
        yield {"block": "growing" if row["teacher"] == MADE_UP else "natural", **row}


def plan(cfg: Config) -> Draft:
    """The step of one student; all runs are spread over the devices, each whole on one."""
    _check(cfg)
    side = 28 if cfg.data else 8
    return drafts.probing(side * side, cfg.tune, classes=10, flags={"batch": "--tune.batch"})


def _check(cfg: Config) -> None:
    sizes = (cfg.labelled, cfg.dev, cfg.pool, cfg.test, cfg.budget, cfg.hidden, *cfg.teachers)
    if not cfg.teachers or min(*sizes, cfg.seeds) < 1:
        raise UserError("--seeds, --teachers, --hidden, --budget and the parts of the data: from 1")
    if cfg.budget > cfg.pool:
        raise UserError(f"--budget {cfg.budget} is more than the pool of {cfg.pool} rows")
    check_choices(lrs=cfg.lrs, temperatures=cfg.temperatures, teachers=cfg.teachers)
    twice = len(set(cfg.flips)) < len(cfg.flips)
    if len(cfg.flips) < 2 or twice or not all(0 <= share <= 1 for share in cfg.flips):
        raise UserError("--flips needs two shares in [0, 1] at least, none twice")


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the card says must appear, for every teacher and kind of label."""
    found = []

    def above(name: str, what: str, difference: np.ndarray, bound: float = 0.0) -> None:
        words = f"{what}, mean over seeds, t interval"
        found.append(claim(name, words, interval(difference), above=bound))

    natural = where(rows, block="natural")
    for teacher, labels in dict.fromkeys((row["teacher"], row["labels"]) for row in natural):
        mine = partial(values, natural, "accuracy", teacher=teacher, labels=labels)
        under = f"teacher of {teacher}, {labels} labels"
        above(f"{under}: RAD above margin", "accuracy", mine(arm="RAD") - mine(arm="margin"))
        above(f"{under}: RAD above random", "accuracy", mine(arm="RAD") - mine(arm="random"))
        gain = mine(arm="random") - mine(arm="margin")
        above(f"{under}: random not below margin by .005", "accuracy", gain, -0.005)
    for teacher in dict.fromkeys(row["teacher"] for row in natural):
        for column in ("teacher error", "informativeness"):
            mine = partial(values, natural, column, teacher=teacher, labels="hard")
            low, middle, high = (mine(arm=arm) for arm in ("random", "RAD", "margin"))
            under = f"teacher of {teacher}, chosen rows"
            above(f"{under}: {column} random < RAD", column, middle - low)
            above(f"{under}: {column} RAD < margin", column, high - middle)
    _growing(rows, above)
    return found


def _growing(rows: list[Row], above: Callable[..., None]) -> None:
    """The claims about teachers that are made wrong on more and more rows."""
    grown = where(rows, block="growing")
    shares = sorted({row["flips"] for row in grown})
    right = {
        share: {arm: values(grown, "accuracy", arm=arm, flips=share) for arm in GROWING}
        for share in shares
    }
    first, last = right[shares[0]], right[shares[-1]]
    if shares[0] == 0:
        gain = first["RAD"] - first["random"]
        above("perfect teacher: RAD not below random by .01", "accuracy", gain, -0.01)
    for share in filter(None, shares):
        for rival in ("margin", "random"):
            gain = right[share]["RAD"] - right[share][rival]
            above(f"{share:g} of the pool made wrong: RAD above {rival}", "accuracy", gain)
    lost = {arm: first[arm] - last[arm] for arm in GROWING}
    words = f"accuracy lost from {shares[0]:g} to {shares[-1]:g} of the pool wrong"
    for rival in ("RAD", "random"):
        gain = lost["margin"] - lost[rival]
        above(f"growing mistakes: margin loses more than {rival}", words, gain)


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Accuracy per arm, what the chosen rows are like, accuracy as mistakes grow."""
    natural = [
        {**row, "teacher": f"teacher of {row['teacher']}", "labels": f"{row['labels']} labels"}
        for row in where(rows, block="natural")
    ]
    by = ["teacher", "labels", "arm"]
    low = min(row["accuracy"] for row in summarise(natural, by, "accuracy"))
    bars = partial(draw.bars, hue="arm", panel="teacher", xlabel="", height=4.2)
    dots = partial(draw.scatter, where(natural, labels="hard labels"), hue="arm", panel="teacher")
    lines = partial(draw.lines, where(rows, block="growing"), hue="arm", ylabel="test accuracy")
    ends, wrong = (max(0.0, low - 0.02), None), "share of them labelled wrongly"
    informs = "mean informativeness of the chosen rows"
    shares = "share of the pool labelled wrongly, least sure rows first"
    return [
        bars(
            *(natural, "labels", "accuracy"),
            ylabel="test accuracy",
            ylim=ends,
            path=folder / "accuracy.png",
        ),
        dots(
            *("informativeness", "teacher error"),
            xlabel=informs,
            ylabel=wrong,
            path=folder / "chosen.png",
        ),
        lines("flips", "accuracy", xlabel=shares, path=folder / "growing.png"),
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Mean accuracy per arm with its interval, and what its rows were like."""
    alone = [{"teacher": "", "labels": "", **row} for row in where(rows, block="alone")]
    facts = ("teacher error", "informativeness")
    both = [*alone, *where(rows, block="natural")]
    return overview(both, ["teacher", "labels", "arm"], "accuracy", facts)


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="robust_active_distillation",
        minutes=0.3,
        summary=summary,
        plan=plan,
    )
