"""Weak-to-strong generalization (Burns et al. 2023) on pretrained language models.

A weak supervisor learns a task from the truth and labels the other half of the data; a stronger
pretrained student learns from those labels; the ceiling is the same student on the truth. Expect
weak < student < ceiling, a median PGR (performance gap recovered) above 0, and an early peak of
the student that goes as it learns to copy the supervisor's errors.

The default task is arithmetic: is this worked solution right? There the head reads how surprised
the model itself is by the solution's tokens (--feature likelihood). That hands the student its
latent knowledge, so what is shown is elicitation under weak labels, not a new skill; the block
"features" shows the ordinary heads, on which nothing works, beside it.

  python -m experiments.weak_to_strong --task boolq --data FOLDER --weak FOLDER --strong FOLDER
  python -m experiments.weak_to_strong --blocks transfer methods --losses naive logconf product
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from w2s_jax import cli, figures, mesh
from w2s_jax.data import tasks
from w2s_jax.data.inspect import inspect
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import (
    aux_confidence,
    confidence_window,
    entropy_confidence,
    logconf,
    product,
    ramp,
    ref_schedule,
    soft_xent,
)
from w2s_jax.metrics.statistics import claim, interval, median_interval, paired_bootstrap
from w2s_jax.models.shapes import shape
from w2s_jax.models.transformer import params_count
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines import weak_to_strong_blocks as blocks
from w2s_jax.pipelines.study import Study
from w2s_jax.pipelines.weak_to_strong import Side
from w2s_jax.pipelines.weak_to_strong_rows import logged, summary
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

LOSSES = {
    "naive": soft_xent,
    "confidence": partial(aux_confidence, alpha=ramp(0.0, 0.5, over=0.2)),
    "confidence_75": partial(aux_confidence, alpha=ramp(0.0, 0.75, over=0.2)),
    "logconf": partial(logconf, alpha=ref_schedule(0.5)),
    "product": product,
    "entropy": partial(entropy_confidence, alpha=ramp(0.0, 0.5, over=0.2)),
    "window": partial(confidence_window, radius=0.15),
}
BLOCKS = ("transfer", "features", "methods", "probes", "labels", "errors")


def _tune(lr: float) -> Tune:
    return Tune(
        lr=lr, batch=32, epochs=2, optimizer="adam", b2=0.98, warmup=0.05, schedule="linear"
    )


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    task: str = "arithmetic"
    """arithmetic, a named task (boolq, sciq, ...), or any name with your own rows in --data."""
    data: str | None = None
    """Folder with <task>.jsonl(.gz), .parquet, ..., or one such file; default: the hub."""
    weak: tuple[str, ...] = ("nano-1", "nano-2")
    """Supervisors: Hugging Face folders, hub ids, or nano-1 .. nano-4."""
    strong: tuple[str, ...] = ("nano-2", "nano-3")
    """Students: as --weak; each learns from every smaller supervisor."""
    losses: tuple[str, ...] = ("naive", "confidence")
    """Of naive, confidence, confidence_75, logconf, product, entropy, window."""
    blocks: tuple[str, ...] = ("transfer", "features", "probes")
    """What to run: transfer (all pairs), features (three kinds of head), methods (bootstrapping,
    strong-to-strong, generative fine-tuning), probes (linear probes, label filters), labels (how
    many weak labels), errors (random against systematic)."""
    seeds: int = 6
    """Repetitions: a seed draws the halves of the data and the order of rows."""
    feature: str = "auto"
    """What the head reads: last, mean, likelihood; auto is likelihood for arithmetic, else last."""
    train: int = 1000
    """Rows of each half: the supervisor's truth and the student's weak labels."""
    test: int = 600
    """Rows for the reported numbers, the same for all seeds and models."""
    dev: int = 200
    """Further rows on which stopping points are chosen."""
    length: int = 96
    """Longest row in tokens; longer ones are left out for all models."""
    weak_tune: Tune = field(default_factory=lambda: _tune(2e-3))
    """How supervisors are trained."""
    strong_tune: Tune = field(default_factory=lambda: _tune(3e-4))
    """How students and ceilings are trained."""
    lrs: dict[str, float] = field(default_factory=dict)
    """Learning rates of single models, as supervisor and student: name lr name lr ..."""
    probe_tune: Tune = field(default_factory=lambda: replace(_tune(1e-2), epochs=10))
    """How linear probes are trained."""
    text_tune: Tune = field(default_factory=lambda: replace(_tune(1e-4), epochs=1))
    """How the generative fine-tuning of the block "methods" is done."""
    points: int = 6
    """Points of the training curves."""
    chain: tuple[str, ...] = ()
    """Intermediate models of bootstrapping, small to large; default: what --weak and --strong have
    between the first supervisor and the last student."""
    repeats: int = 2
    """Strong-to-strong iterations."""
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Shares of the weak labels in the block "labels"."""
    drop: float = 0.1
    """Share of rows that label filters leave out."""


GPT2 = {"gpt2": 5e-5, "gpt2-medium": 5e-5, "gpt2-large": 1e-5, "gpt2-xl": 1e-5}
GPT2_TUNE = Tune(batch=32, epochs=2, optimizer="adam", schedule="cosine", clip=0.0)
PRESETS = {
    "tiny": dict(
        weak=("nano-1",),
        strong=("nano-2",),
        blocks=("transfer", "features"),
        seeds=2,
        train=64,
        test=100,
        dev=50,
        points=2,
    ),
    "paper": dict(
        task="sciq",
        weak=tuple(GPT2)[:-1],
        strong=tuple(GPT2)[1:],
        lrs=GPT2,
        losses=("naive", "logconf"),
        blocks=("transfer",),
        seeds=1,
        train=10_000,
        test=9_000,
        dev=1_000,
        length=1024,
        weak_tune=GPT2_TUNE,
        strong_tune=GPT2_TUNE,
    ),
}


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Load data and models, look at them, then one block after another; one row per run."""
    _check(cfg)
    kind = cfg.feature
    if kind == "auto":
        kind = "likelihood" if cfg.task == "arithmetic" else "last"
    devices = mesh.make_mesh(ctx.mesh) if ctx.mesh else None
    names = dict.fromkeys((*cfg.weak, *cfg.chain, *cfg.strong))
    sides = {name: w2s.side(name, feature=kind, mesh=devices) for name in names}
    study = prepare(cfg, ctx, list(sides.values()))
    weaks, strongs = ([sides[n] for n in part] for part in (cfg.weak, cfg.strong))
    pair = (min(weaks, key=lambda s: s.size), max(strongs, key=lambda s: s.size))
    if pair[0].size >= pair[1].size:
        raise UserError(
            f"no student is larger than a supervisor: {pair[0].name} has {pair[0].size} weights, "
            f"{pair[1].name} has {pair[1].size}; choose a larger --strong"
        )
    for block in cfg.blocks:
        ctx.say(f"block {block}")
        if block == "transfer":
            rows = blocks.transfer(study, weaks, strongs, cfg.losses)
            yield from logged(rows, ctx.workdir, ctx.track)
        elif block == "features":
            yield from blocks.features(study, *pair, ("last", "mean", "likelihood"))
        elif block == "methods":
            yield from blocks.bootstrap(study, _chain(cfg, sides, pair), cfg.repeats)
            yield from blocks.generative(study, *pair, cfg.text_tune)
        elif block == "probes":
            yield from blocks.probes(study, *pair, cfg.losses, cfg.probe_tune, cfg.drop)
        elif block == "labels":
            yield from blocks.label_counts(study, *pair, cfg.shares)
        else:
            yield from blocks.error_kinds(study, *pair)


def prepare(cfg: Config, ctx: Context, sides: Sequence[Side]) -> Study:
    """The data of all seeds, readable by every tokenizer, inspected and printed."""
    limits = dict(train=cfg.train, transfer=cfg.train, test=cfg.dev + cfg.test)
    spare = 1.2 if cfg.task == "arithmetic" else 4  # for the rows that are too long
    train, test = round(cfg.train * spare), round(limits["test"] * spare)
    splits = [
        tasks.load(cfg.task, seed=seed, data=cfg.data, train=train, test=test, dev=2)
        for seed in range(cfg.seeds)
    ]
    for side in sides:
        if cfg.length > side.body.config.max_length:
            most = side.body.config.max_length
            raise UserError(
                f"{side.name} reads at most {most} tokens: give --length {most} or less"
            )
    splits = w2s.readable(splits, [side.tokenizer for side in sides], cfg.length, limits)
    seen = {name: getattr(splits[0], name) for name in limits}
    for side in {side.tokenizer.digest(): side for side in sides}.values():
        ctx.say(f"{side.name} reads {cfg.task}:\n{inspect(seen, side.tokenizer)}")
    few = {name: len(table) for name, table in seen.items() if len(table) < limits[name] - 1}
    if few:
        ctx.say(f"fewer rows than asked for fit in {cfg.length} tokens: {few}")
    dev = min(cfg.dev, len(splits[0].test) // 4)
    return Study(
        ctx=ctx,
        splits=splits,
        seeds=range(cfg.seeds),
        dev=dev,
        length=cfg.length,
        weak_tune=cfg.weak_tune,
        strong_tune=cfg.strong_tune,
        lrs=cfg.lrs,
        losses=LOSSES,
        points=cfg.points,
        mesh=mesh.make_mesh(ctx.mesh) if ctx.mesh else None,
    )


def plan(cfg: Config) -> Draft:
    """The step of the largest student; small ones train as populations, whole on each device."""
    _check(cfg)
    known = {name: shape(name) for name in cfg.strong}
    name = max(known, key=lambda name: params_count(known[name]))
    kind = cfg.feature
    if kind == "auto":
        kind = "likelihood" if cfg.task == "arithmetic" else "last"
    return drafts.classifying(
        known[name],
        cfg.strong_tune,
        length=cfg.length,
        feature=kind,
        alone=params_count(known[name]) <= w2s.SERIAL,
        flags={name: f"--strong-tune.{name}" for name in ("micro", "moments", "batch")},
        name=name,
    )


def _check(cfg: Config) -> None:
    for what, given, known in (
        ("--losses", cfg.losses, tuple(LOSSES)),
        ("--blocks", cfg.blocks, BLOCKS),
        ("--feature", (cfg.feature,), ("auto", "last", "mean", "likelihood")),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
    stray = sorted(set(cfg.lrs) - {*cfg.weak, *cfg.strong, *cfg.chain})
    if stray or not all(lr > 0 for lr in cfg.lrs.values()):
        raise UserError(f"--lrs takes models of this run and numbers above 0, got {cfg.lrs}")
    if not cfg.weak or not cfg.strong or not cfg.losses:
        raise UserError("--weak, --strong and --losses each need at least one name")
    for name, least in dict(train=2, test=2, dev=2, length=2, points=1, repeats=0).items():
        if getattr(cfg, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(cfg, name)}")
    if not cfg.shares or not all(0 < share <= 1 for share in cfg.shares):
        raise UserError(f"--shares must be above 0 and at most 1, got {cfg.shares}")
    if not 0 <= cfg.drop < 1:
        raise UserError(f"--drop must be at least 0 and below 1, got {cfg.drop}")


def _chain(cfg: Config, sides: dict[str, Side], pair: tuple[Side, Side]) -> list[Side]:
    low, high = pair
    names = cfg.chain or tuple(dict.fromkeys((*cfg.weak, *cfg.strong)))
    middle = sorted((sides[n] for n in names), key=lambda s: s.size)
    return [low, *[s for s in middle if low.size < s.size < high.size], high]


def _pair(rows: list[Row], loss: str = "naive") -> list[Row]:
    """The transfer rows of the largest gap in size under one loss."""
    rows = [r for r in rows if r["block"] == "transfer" and r["loss"] == loss]
    if not rows:
        return []
    top = max(rows, key=lambda r: r["student_size"] / r["weak_size"])
    return [r for r in rows if (r["weak"], r["student"]) == (top["weak"], top["student"])]


def claims(rows: list[Row]) -> list[dict]:
    """What the paper says must appear, each judged by its interval over seeds."""
    naive, confident = _pair(rows), _pair(rows, "confidence")
    made = []

    def add(name: str, values: Sequence[float] | np.ndarray, above: float) -> None:
        made.append(claim(name, "mean over seeds, t interval", interval(values), above=above))

    if naive:
        weak, student, ceiling = (
            np.array([r[f"{role}_accuracy"] for r in naive])
            for role in ("weak", "student", "ceiling")
        )
        add("student above weak", student - weak, above=0)
        add("ceiling above student", ceiling - student, above=0)
        drawn = paired_bootstrap(weak[:, None], student[:, None], ceiling[:, None]).pgr
        if np.isfinite(drawn.value):
            words = "PGR of the mean accuracies, paired bootstrap over seeds"
            made.append(claim("PGR of the means above 0", words, drawn, above=0))
        recovered = [r["pgr"] for r in naive if np.isfinite(r["pgr"])]
        if recovered:
            made.append(
                claim("median PGR above 0", "median over seeds with a gap, exact interval",
                      median_interval(recovered), above=0)
            )  # fmt: skip
        add("student falls from its peak (chosen on dev)", [r["fall"] for r in naive], above=0)
        add("more than its ceiling does", [r["fall"] - r["ceiling_fall"] for r in naive], above=0)
    if naive and len(confident) == len(naive):
        gains = [b["pgr"] - a["pgr"] for a, b in zip(naive, confident, strict=True)]
        if np.isfinite(gains).all():
            add("confidence loss lifts PGR", gains, above=0)
    kinds = dict.fromkeys(r["method"] for r in rows if r["block"] == "features")
    for kind in kinds:
        values = [r["student_accuracy"] - r["weak_accuracy"] for r in rows
                  if r["block"] == "features" and r["method"] == kind]  # fmt: skip
        add(f"student above weak, {kind} head", values, above=0)
    return made


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """All figures for which there are rows."""
    paths = []
    pairs = [dict(r, pair=f"{Path(r['weak']).name} > {Path(r['student']).name}")
             for r in rows if r["block"] == "transfer"]  # fmt: skip
    if pairs:
        paths += _figures_of_pairs(pairs, folder)
        paths += _figures_of_training(rows, folder)
    for block, x, name in (
        ("features", "method", "features"),
        ("methods", "method", "methods"),
        ("probes", "method", "probes"),
        ("labels", "labels", "label_counts"),
        ("errors", "method", "error_kinds"),
    ):
        mine = [r for r in rows if r["block"] == block]
        if mine:
            paths.append(_roles(mine, x, folder / f"{name}.png", name.replace("_", " ")))
    return paths


def _figures_of_pairs(pairs: list[Row], folder: Path) -> list[Path]:
    sizes = []
    for r in pairs:
        supervisor = f"supervisor {Path(r['weak']).name}"
        size = dict(size=r["student_size"], weak=supervisor, seed=r["seed"])
        sizes.append(size | dict(accuracy=r["student_accuracy"], labels=f"weak ({r['loss']})"))
        if r["loss"] == pairs[0]["loss"]:
            sizes.append(size | dict(accuracy=r["ceiling_accuracy"], labels="truth (ceiling)"))
            weak = size | dict(size=r["weak_size"], labels="truth (supervisor)")
            sizes += [weak | dict(accuracy=r["weak_accuracy"])]
    unique = {tuple(sorted(s.items())): s for s in sizes}
    paths = [
        figures.lines(list(unique.values()), "size", "accuracy", hue="labels", panel="weak",
                      path=folder / "accuracy_by_size.png", title="Accuracy by student size",
                      xlabel="weights of the body", ylabel="test accuracy", logx=True),
        figures.bars(
            [dict(pair=r["pair"], seed=r["seed"], on=on, share=r[key]) for r in pairs
             if r["loss"] == pairs[0]["loss"]
             for on, key in (("all rows", "agreement"), ("supervisor's errors", "error_agreement"),
                             ("its errors, ceiling", "ceiling_error_agreement"))],
            "pair", "share", hue="on", path=folder / "agreement.png",
            title=f"Agreement with the supervisor ({pairs[0]['loss']} loss)",
            ylabel="share of rows"),
    ]  # fmt: skip
    if known := [r for r in pairs if np.isfinite(r["pgr"])]:  # no gap anywhere: nothing to recover
        paths += [
            figures.bars(known, "pair", "pgr", hue="loss", error=median_interval,
                         path=folder / "pgr.png", ylabel="PGR",
                         title="Performance gap recovered (median over seeds)",
                         references={"supervisor": 0.0, "ceiling": 1.0}),
            figures.scatter(known, "gap", "pgr", hue="loss", style="pair",
                            path=folder / "pgr_by_gap.png", title="PGR against the gap",
                            xlabel="ceiling - weak accuracy", ylabel="PGR"),
        ]  # fmt: skip
    return paths


def _figures_of_training(rows: list[Row], folder: Path) -> list[Path]:
    best = _pair(rows) or [r for r in rows if r["block"] == "transfer"]
    weak, student = best[0]["weak"], best[0]["student"]
    mine = [r for r in rows if r.get("weak") == weak and r.get("student") == student]
    curve, first = [], None
    for r in mine:
        if r["block"] != "curve":
            continue
        first = first or r["loss"]
        at = dict(step=r["step"], seed=r["seed"])
        curve.append(at | dict(what=f"accuracy, {r['loss']}", value=r["accuracy"]))
        if r["loss"] == first:
            curve.append(at | dict(what=f"agreement with weak, {first}", value=r["agreement"]))
            curve.append(at | dict(what="accuracy, ceiling", value=r["ceiling_accuracy"]))
    level = float(np.mean([r["weak_accuracy"] for r in best]))
    bins = [dict(r, who=f"{r['role']}, {r['loss']}" if r["role"] == "student" else "weak")
            for r in mine if r["block"] == "reliability"]  # fmt: skip
    bins = [r for r in bins if r["who"] != "weak" or r["loss"] == first]
    names = f"{Path(weak).name} > {Path(student).name}"
    return [
        figures.lines(curve, "step", "value", hue="what", path=folder / "training.png",
                      title=f"Over training, {names}", xlabel="updates",
                      ylabel="share of test rows", ylim=(0.4, 1.02),
                      references={"weak accuracy": level}),
        figures.reliability_diagram(bins, hue="who", path=folder / "reliability.png",
                                    title=f"Calibration, {names}"),
        figures.bars(
            [dict(stop=stop, loss=r["loss"], seed=r["seed"], accuracy=r[key]) for r in mine
             if r["block"] == "transfer"
             for stop, key in (("end of training", "student_accuracy"),
                               ("honest: agreement on dev", "honest_stop"),
                               ("cheating: truth on dev", "cheating_stop"))],
            "stop", "accuracy", hue="loss", path=folder / "early_stopping.png",
            title=f"Early stopping, {names}", ylabel="test accuracy", ylim=(0.5, 1.0)),
    ]  # fmt: skip


def _roles(rows: list[Row], x: str, path: Path, title: str) -> Path:
    """Weak, student and ceiling accuracy per value of ``x``."""
    many = len({r["loss"] for r in rows}) > 1
    bars = []
    for r in rows:
        for role in ("weak", "student", "ceiling"):
            told = f"{role}, {r['loss']}" if many and role == "student" else role
            accuracy = r[f"{role}_accuracy"]
            bars.append({x: r[x], "seed": r["seed"], "role": told, "accuracy": accuracy})
    unique = {(b[x], b["seed"], b["role"]): b for b in bars}
    names = f"{Path(rows[0]['weak']).name} > {Path(rows[0]['student']).name}"
    return figures.bars(
        list(unique.values()), x, "accuracy", hue="role", path=path,
        title=f"{title.capitalize()}, {names}", ylabel="test accuracy", ylim=(0.4, 1.0),
    )  # fmt: skip


if __name__ == "__main__":
    cli.main(
        Config,
        run,
        figures=draw,
        claims=claims,
        presets=PRESETS,
        paper="weak_to_strong",
        minutes=5,
        summary=summary,
        plan=plan,
    )
