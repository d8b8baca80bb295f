"""TAID: distillation towards a target that moves from the student to the teacher (Shing 2025).

A tiny pretrained model (nano-1, 8k weights) learns from the stored distributions of three larger
ones (nano-2, nano-3, nano-4) over whole texts of the arithmetic world, by cross-entropy on the
data (SFT), forward and reverse KL, total variation, adaptive KL, skew KL, and TAID: on its line,
with the paper's adaptive step (5e-4, which hardly acts in so few updates) and with a larger one.
All methods, teachers, seeds, rates and steps are one program; rates and steps are chosen on dev by
the divergence from the teacher, equally, and reported on test. Expect TAID at or below forward KL,
a student that does not get worse as its teacher grows, and reverse KL with less mass in the tail;
kernel regression shows why self-distillation collapses and TAID does not (docs/theory.md).

  python -m experiments.taid --scratch          # the student begins with random weights
  python -m experiments.taid --preset paper --data ultrachat.jsonl
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
from w2s_jax.metrics.rows import overview, values, where
from w2s_jax.metrics.statistics import claim, interval
from w2s_jax.models.config import Config as Decoder
from w2s_jax.models.shapes import shape
from w2s_jax.pipelines import taid as study
from w2s_jax.pipelines import taid_worlds as worlds
from w2s_jax.pipelines.probes import check_choices
from w2s_jax.pipelines.taid import METHODS, TUNING, World
from w2s_jax.pipelines.taid_recipe import run_recipe
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

SWEEP = ("KL", "skew KL", "TAID")  # what every teacher is tried with
SEEN = ("KL", "TAID linear", "TAID")  # what the digits are tried with
TUNE = Tune(batch=16, epochs=5, schedule="cosine", clip=1.0)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    student: tuple[str, ...] = ("nano-1", "nano-1@1")
    """Pretrained students, one a seed in turns (nano-1@1 is nano-1's second pretraining)."""
    teachers: tuple[str, ...] = ("nano-2", "nano-3", "nano-4")
    """From the smallest to the largest, which is the one that all methods learn from."""
    scratch: bool = False
    """Whether the student begins with random weights."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of SFT, KL, RKL, TVD, adaptive KL, skew KL, TAID linear, TAID 5e-4, TAID."""
    seeds: int = 6
    """Repetitions: a seed draws the rows and their order."""
    tuned: int = 2
    """Further repetitions by which settings are chosen on dev."""
    train: int = 2000
    """Problems that teachers were heard on."""
    rows: int = 1600
    """How many of them a seed trains on."""
    dev: int = 128
    """Problems by which settings are chosen."""
    test: int = 384
    """Problems that are reported."""
    steps: tuple[int, ...] = (1, 2)
    """Calculations in a problem."""
    length: int = 64
    """Longest problem with its solution in tokens."""
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Learning rates to choose from on dev."""
    start: float = 0.2
    """Where TAID's t begins: 0.2 or 0.4 in the paper, by the pair of models."""
    alphas: tuple[float, ...] = METHODS["TAID"].alphas
    """Adaptive steps of TAID to choose from on dev (with --data it takes the smallest)."""
    tune: Tune = TUNE
    """How the students train; its learning rate gives way to --lrs (not with --data)."""
    pictures: str = ""
    """Pictures of the check on classes, an npz file; empty: scikit-learn's digits."""
    pictured: tuple[int, int, int] = (1000, 197, 600)
    """Pictures for training, dev and test."""
    hidden: tuple[int, int] = (128, 6)
    """Hidden units of the pictures' teacher and student."""
    points: int = 40
    """Targets of the kernel regression."""
    rounds: int = 20
    """Its rounds of distillation."""
    ratio: float = 6.0
    """Norm of its first targets in units of what a fit may miss."""
    data: str = ""
    """Conversations (file or data set; messages, or prompt and response): the first student learns
    from the last teacher, live, by each of --methods, once; --length cuts them."""
    split: str = ""
    """Of --data: which split."""
    count: int = 0
    """With --data: the first so many conversations; 0 for all."""
    held: float = 0.02
    """With --data: the share held out to measure on."""
    template: str = "auto"
    """With --data: chat template of the student: auto (its own), tulu or none."""
    compute: str = "float32"
    """With --data: dtype of the arithmetic, bfloat16 on accelerators."""
    remat: str = "none"
    """With --data: what the backward pass makes again (none, dots, attention, outputs, full)."""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"teachers": ("nano-2",), "student": ("nano-1:0.25",), "seeds": 2},
        **{"methods": ("KL", "RKL", "TAID"), "tuned": 2, "train": 96},
        # as many runs to choose by as to report: one program for both
        **{
            "alphas": (3e-2,),
            "rows": 64,
            "dev": 16,
            "test": 24,
            "steps": (1,),
            "length": 48,
            "lrs": (1e-2,),
        },
        **{"pictured": (200, 50, 100), "hidden": (16, 4), "rounds": 8},
    },
    # Llama-2 to TinyLlama: the pair of the paper with one tokenizer and weights that load here;
    # five epochs of 64 rows. Phi-3-mini, TinyLlama's other teacher, has start 0.4.
    "paper": {
        **{"student": ("TinyLlama/TinyLlama_v1.1",), "data": "HuggingFaceH4/ultrachat_200k"},
        **{"teachers": ("meta-llama/Llama-2-7b-chat-hf",), "split": "train_sft", "length": 2048},
        **{"methods": ("SFT", "KL", "RKL", "TVD", "adaptive KL", "TAID linear", "TAID 5e-4")},
        **{"compute": "bfloat16", "remat": "full", "held": 0.005, "seeds": 5},
        "tune": Tune(lr=1e-4, batch=64, epochs=5, schedule="cosine", clip=1.0),
    },
}

_SMALL = {"vocab": 32_000, "tie": False}
SHAPES = {  # for --plan; of Phi-3's rows of the vocabulary the 64 after the tokens are cut off
    "tinyllama_v1.1": Decoder(width=2048, layers=22, heads=32, kv_heads=4, ffn=5632, **_SMALL),
    "llama-2-7b-chat-hf": Decoder(width=4096, layers=32, heads=32, ffn=11_008, **_SMALL),
    "phi-3-mini-4k-instruct": Decoder(width=3072, layers=32, heads=32, ffn=8192, **_SMALL),
}


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: ``rates`` (dev), ``score`` and ``course`` (test, per run), ``teacher``, ``digits``,
    ``theory``."""
    _check(cfg)
    yield from worlds.theory_rows(cfg.seeds, points=cfg.points, ratio=cfg.ratio, rounds=cfg.rounds)
    if cfg.data:
        yield from _recipe(cfg, ctx)
        return
    plan = {name: [m for m in SWEEP if m in cfg.methods] for name in cfg.teachers}
    plan[cfg.teachers[-1]] = list(cfg.methods)
    yield from ctx.stage(
        "arithmetic", vars(cfg), lambda: _rows(cfg, ctx, _world(cfg), plan, "score")
    )
    plan = {"mlp": [m for m in SEEN if m in cfg.methods]}
    yield from ctx.stage("digits", vars(cfg), lambda: _rows(cfg, ctx, _digits(cfg), plan, "digits"))


def _recipe(cfg: Config, ctx: Context) -> Iterator[Row]:
    return run_recipe(
        cfg.data,
        student=cfg.student[0],
        teacher=cfg.teachers[-1],
        methods=cfg.methods,
        ctx=ctx,
        tune=cfg.tune,
        length=cfg.length,
        begin=cfg.start,
        alpha=min(cfg.alphas),
        held=cfg.held,
        split=cfg.split,
        count=cfg.count,
        chat=cfg.template,
        compute=cfg.compute,
        remat=cfg.remat,
    )


def plan(cfg: Config) -> Draft:
    """The step of the first student beside the last teacher, live."""
    _check(cfg)
    student, teacher = (_shape(name) for name in (cfg.student[0], cfg.teachers[-1]))
    return drafts.draft(
        replace(student, remat=cfg.remat, dtype=cfg.compute),
        "kd",
        cfg.tune,
        length=cfg.length,
        teacher=replace(teacher, dtype=cfg.compute),
        flags={"batch": "--tune.batch", "micro": "--tune.micro", "moments": "--tune.moments"},
        name=f"{cfg.student[0]} from {cfg.teachers[-1]},",
    )


def _shape(name: str) -> Decoder:
    return SHAPES.get(name.rsplit("/", 1)[-1].lower()) or shape(name)


def _world(cfg: Config) -> World:
    return worlds.arithmetic_world(
        student=cfg.student,
        scratch=cfg.scratch,
        teachers=cfg.teachers,
        steps=cfg.steps,
        length=cfg.length,
        sizes=(cfg.train, cfg.dev, cfg.test),
        rows=cfg.rows,
        tune=cfg.tune,
        start=cfg.start,
    )


def _digits(cfg: Config) -> World:
    tune = replace(cfg.tune, epochs=4 * cfg.tune.epochs, lr=1e-2)
    return worlds.digits_world(
        data=cfg.pictures, sizes=cfg.pictured, hidden=cfg.hidden, tune=tune, start=cfg.start
    )


def _rows(
    cfg: Config, ctx: Context, world: World, plan: dict[str, list[str]], block: str
) -> list[Row]:
    """Settings chosen on dev, then every chosen one with the seeds that are reported."""
    settings = study.grid(plan, cfg.lrs, range(TUNING, TUNING + cfg.tuned), cfg.alphas)
    ctx.say(f"{block}: {len(settings)} runs to choose settings, one program")
    best, rates = study.chosen(settings, study.judged(world, settings), range(cfg.seeds))
    ctx.say(f"{block}: {len(best)} runs to report, one program")
    said = study.judged(world, best)
    rows = [{**row, "of": block} for row in rates]
    if block == "score":
        rows += [*worlds.teacher_rows(world), *study.course_rows(best, said)]
    return rows + [*study.score_rows(best, said, block, world.start)]


def _check(cfg: Config) -> None:
    if unknown := sorted(set(cfg.methods) - set(METHODS)):
        raise UserError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(METHODS)}")
    check_choices(alphas=cfg.alphas, lrs=cfg.lrs)
    if cfg.data:
        return
    if missing := sorted({"KL", "TAID"} - set(cfg.methods)):
        raise UserError(f"--methods lacks {', '.join(missing)}, which the others are compared with")
    if not (cfg.student and cfg.teachers and cfg.steps):
        raise UserError("--student, --teachers and --steps need one entry each at least")
    if min(*cfg.pictured, *cfg.hidden) < 1:
        raise UserError("--pictured and --hidden must be above 0")
    if cfg.rows > cfg.train:
        raise UserError(f"--rows {cfg.rows} are more than the {cfg.train} of --train")
    if min(cfg.seeds, cfg.tuned, cfg.rows, cfg.dev, cfg.test, cfg.rounds, cfg.points - 1) < 1:
        raise UserError(
            "--seeds, --tuned, --rows, --dev, --test, --rounds and --points (2) must be above 0"
        )
    if not (0 <= cfg.start < 1 and 1 < cfg.ratio < np.inf and max(cfg.alphas) <= 1):
        raise UserError("--start must be from 0 to below 1, --ratio above 1, --alphas 1 at most")


# Claims


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """The paper's comparisons, paired by seed, on test; and the collapse of self-distillation."""
    kernels = [*_kernels(where(rows, block="theory"))]
    if not _teachers(rows):
        return kernels
    score, last = where(rows, block="score"), _teachers(rows)[-1]
    found = [*_beside(score, last), *_sweep(rows), *_mass(score, last), *_course(score, last)]
    return [*found, *_pictures(where(rows, block="digits")), *kernels]


def _beside(score: list[Row], last: str) -> Iterator[dict[str, Any]]:
    """Held-out divergence of TAID and the others."""
    kl = partial(values, score, "kl", teacher=last)
    said = f"held-out KL from {last}, t interval over paired seeds"
    methods = list(dict.fromkeys(row["method"] for row in where(score, teacher=last)))
    for other in methods:
        if other != "TAID":
            gain = interval(kl(method=other) - kl(method="TAID"))
            yield claim(f"TAID below {other}", f"{other} - TAID, {said}", gain, above=0.0)
    if "TAID linear" in methods:
        gain = interval(kl(method="KL") - kl(method="TAID linear"))
        yield claim("TAID without adaptive steps below KL", f"KL - TAID, {said}", gain, above=0.0)


def _sweep(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Students of the smallest and of the largest teacher, by solution tokens that are right."""
    score, teachers = where(rows, block="score"), _teachers(rows)
    if len(teachers) < 2:
        return
    gains = {}
    for method in {row["method"] for row in score} & set(SWEEP):
        right = partial(values, score, "right", method=method)
        gains[method] = right(teacher=teachers[-1]) - right(teacher=teachers[0])
    said = f"solution tokens right, {teachers[-1]} - {teachers[0]}, t interval over paired seeds"
    yield claim(
        "TAID's student does not get worse as the teacher grows",
        said,
        interval(gains["TAID"]),
        above=-0.005,
    )
    if "skew KL" in gains:
        more = interval(gains["TAID"] - gains["skew KL"])
        yield claim("TAID gains more from the larger teacher than skew KL", said, more, above=0.0)


def _mass(score: list[Row], last: str) -> Iterator[dict[str, Any]]:
    """Logarithms of ratios of probability mass: head (top 10) and tail (lowest fifth)."""
    methods = {row["method"] for row in where(score, teacher=last)}
    if "RKL" not in methods:
        return

    def ratio(one: str, other: str, part: str) -> Any:
        both = [values(score, part, method=m, teacher=last) for m in (one, other)]
        return interval(np.log(both[0]) - np.log(both[1]))

    over = "t interval over paired seeds"
    what = f"log ratio of the students' mass on {last}'s lowest fifth of tokens, {over}"
    yield claim(
        "RKL has less mass in the tail than KL", what, ratio("RKL", "KL", "tail"), below=0.0
    )
    near = ratio("TAID", "KL", "tail")
    yield claim(
        "TAID's tail is near KL's", f"within log 1.25: {what}", near, above=-0.223, below=0.223
    )
    what = f"log ratio of the students' mass on {last}'s ten likeliest tokens, {over}"
    yield claim(
        "RKL has more mass in the head than KL", what, ratio("RKL", "KL", "head"), above=0.0
    )


def _course(score: list[Row], last: str) -> Iterator[dict[str, Any]]:
    """How t goes, of the runs that may run ahead."""
    t = partial(values, score, teacher=last, method="TAID")
    over = "over updates, t interval over seeds"
    rise = interval(t("rise"))
    yield claim("t never falls", f"smallest rise {over}", rise, above=-1e-6)
    above = interval(t("over"))
    yield claim("t never is below its line", f"smallest distance {over}", above, above=-1e-6)
    end = interval(t("last"))
    yield claim("t ends near 1", f"t of the last update, {over}", end, above=0.99, below=1.0 + 1e-6)
    ahead = interval(t("ahead"))
    yield claim("adaptive steps run ahead", f"mean distance {over}", ahead, above=0.01)


def _pictures(digits: list[Row]) -> Iterator[dict[str, Any]]:
    right = partial(values, digits, "accuracy", teacher="mlp")
    what = "difference in test accuracy, t interval over paired seeds"
    gain = interval(right(method="TAID") - right(method="KL"))
    yield claim("digits: TAID more accurate than KL", what, gain, above=0.0)


def _kernels(theory: list[Row]) -> Iterator[dict[str, Any]]:
    """The last targets of self-distillation, the smallest and the floor of TAID's."""
    norms: dict[str, np.ndarray] = {}
    for name in ("self-distillation", "TAID"):
        some = where(theory, method=name)
        seeds = sorted({row["seed"] for row in some})
        norms[name] = np.array([[r["norm"] for r in where(some, seed=s)] for s in seeds])
        floor = np.array([r["floor"] for r in where(some, seed=seeds[0])])
    over = "in units of what a fit may miss, t interval over seeds"
    end = interval(norms["self-distillation"][:, -1])
    words = "kernels: self-distillation collapses"
    yield claim(words, f"norm of the last targets {over}", end, below=1.0)
    least = interval(norms["TAID"].min(1))
    yield claim("kernels: TAID does not", f"smallest norm of targets {over}", least, above=1.0)
    margin = interval((norms["TAID"] - floor).min(1))
    yield claim("kernels: TAID stays above its bound", f"least margin {over}", margin, above=-1e-6)


def _teachers(rows: list[Row]) -> list[str]:
    return [row["teacher"] for row in where(rows, block="teacher")]


# Figures


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Divergence per method, the teachers' sweep, mass, the course of t, digits, kernels."""
    lines = partial(draw.lines, hue="method", style="method")
    bars = partial(draw.bars, x="method", height=4.2, xlabel="")
    norms, recipe = where(rows, block="theory"), where(rows, block="recipe")
    words: Any = {"ylabel": "norm of the targets", "references": {"collapse": 1.0}}
    drawn = [lines(norms, "round", "norm", path=folder / "collapse.png", **words)]
    words = {"y": "kl", "path": folder / "kl.png"}
    if recipe:
        return [*drawn, bars(recipe, ylabel="held-out KL, nats per token", **words)]
    score, last = where(rows, block="score"), _teachers(rows)[-1]
    final = where(score, teacher=last)
    words["ylabel"] = f"KL from {last}, above KL's own, nats"
    drawn.append(bars([r for r in _less(final, "kl", last) if r["method"] != "KL"], **words))
    swept = [row for row in score if row["method"] in SWEEP]
    first = _teachers(rows)[0]
    words = {"path": folder / "teachers.png", "references": {f"KL from {first}": 0.0}}
    words["ylabel"] = "solution tokens right, difference"
    drawn.append(lines(_less(swept, "right", first), "teacher", "right", **words))
    words = {"references": {"KL": 1.0}, "ylabel": "probability mass / the KL student's"}
    masses = _masses(final, last)
    drawn.append(bars(masses, y="ratio", hue="tokens", path=folder / "mass.png", **words))
    course = where(rows, block="course", teacher=last)
    words = {"path": folder / "course.png", "ylabel": "t of the first seed"}
    drawn.append(lines(course, "update", "t", **words))
    words = {"y": "accuracy", "ylabel": "test accuracy"}
    return [*drawn, bars(where(rows, block="digits"), path=folder / "digits.png", **words)]


def _less(rows: list[Row], value: str, teacher: str) -> list[Row]:
    """Rows whose value is less that of the KL student of ``teacher`` and the same seed."""
    own = {(row["seed"], row["method"], row["teacher"]): row[value] for row in rows}
    return [{**row, value: row[value] - own[row["seed"], "KL", teacher]} for row in rows]


def _masses(final: list[Row], last: str) -> list[Row]:
    """Mass in head and tail over that of the KL student of the same seed, per run and part."""
    names = {"head": f"{last}'s ten likeliest", "tail": f"{last}'s lowest fifth"}
    base = {row["seed"]: row for row in final if row["method"] == "KL"}
    return [
        {"method": row["method"], "tokens": words, "ratio": row[part] / base[row["seed"]][part]}
        for row in final
        if row["method"] != "KL"
        for part, words in names.items()
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds per teacher and method, on test."""
    if recipe := where(rows, block="recipe"):
        return [{name: row[name] for name in ("teacher", "method", "kl", "nll")} for row in recipe]
    names = ("teacher", "method", "kl", "nll", "right", "exact", "head", "tail")
    table = overview(where(rows, block="score"), names[:2], "kl", names[3:])
    return [{name: row[name] for name in names} for row in table]


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="taid",
        minutes=2.5,
        summary=summary,
        plan=plan,
    )
