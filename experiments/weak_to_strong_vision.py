"""Weak-to-strong generalization in vision (Burns et al. 2023): linear probes on frozen features.

The weak supervisor is a linear probe that sees each picture as a thumbnail (4x4 pixels; 2x2 and
3x3 show larger gaps), trained on the truth of one half of the data. The student is a linear probe
on frozen features of the full picture (whitened random patches, learnt without labels), trained on
the supervisor's probabilities for the other half; the ceiling is the same probe trained on the
truth of the same rows. Expect weak < student < ceiling. Resolution is what makes the weak model
weak: one number, a rule (half of the digits' own), not tuned. All students (seeds x
losses x learning rates x supervisors) and ceilings train as one program. The learning rate is the
ceiling's best on dev and every student uses it: no student is chosen by the truth.

  python -m experiments.weak_to_strong_vision --data mnist.npz --train 5000 --dev 1000 --test 2000
  python -m experiments.weak_to_strong_vision --preset paper --features dino_resnet50.npz
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax import figures as draw
from w2s_jax.annotate import predict
from w2s_jax.cli import main
from w2s_jax.data import images
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import (
    aux_confidence,
    entropy_confidence,
    product,
    ramp,
    soft_xent,
)
from w2s_jax.metrics.gap import agreement, agreement_on_errors, pgr
from w2s_jax.metrics.rows import summarise, where
from w2s_jax.metrics.statistics import Interval, claim, interval, median_interval, paired_bootstrap
from w2s_jax.models.vision import patch_bank, patch_features, thumbnails
from w2s_jax.pipelines.probes import (
    Setting,
    best_rate,
    check_choices,
    one_hot,
    supervisors,
    train,
)
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Array, Batch, Params, Row, Table


def hard_labels(logits: Array, labels: Array) -> Array:
    """Cross-entropy to the supervisor's most likely class, [B] nats."""
    return soft_xent(logits, jax.nn.one_hot(labels.argmax(-1), labels.shape[-1]))


_WARM_UP: tuple[Any, Any] = (ramp(0.0, 0.5, over=0.2), ramp(0.0, 0.75, over=0.2))
LOSSES = {
    "naive": soft_xent,
    "hard": hard_labels,
    "confidence": partial(aux_confidence, alpha=_WARM_UP[0]),
    "confidence_75": partial(aux_confidence, alpha=_WARM_UP[1]),
    "entropy": partial(entropy_confidence, alpha=_WARM_UP[0]),
    "product": product,
}


TUNE = Tune(batch=50, epochs=20, optimizer="adam", schedule="cosine", clip=0.0)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    data: str = ""
    """An npz file of pictures (x_train, y_train, x_test, y_test); empty: scikit-learn's digits."""
    features: str = ""
    """An npz file of what two pretrained models say: strong [N,D], weak_logits [N,C], truth [N]."""
    seeds: int = 20
    """Runs per setting: a seed draws dev, the two halves and the order of the rows."""
    train: int = 1000
    """Rows shared by the two halves (with --features: rows of the student)."""
    dev: int = 197
    """Rows on which learning rates are chosen."""
    test: int = 600
    """Rows for the reported numbers, the same for all seeds and models."""
    sides: tuple[int, ...] = (2, 3, 4)
    """Sides of the supervisors' thumbnails in pixels; the claims are about the largest."""
    filters: int = 64
    """Patch filters of the student's features, which have 8 numbers per filter."""
    patch: int = 0
    """Side of a patch in pixels; 0 is a quarter of the picture, at least 3."""
    losses: tuple[str, ...] = tuple(LOSSES)
    """What the students are trained with."""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to choose from on dev."""
    standardise: bool = True
    """Whether features get mean 0 and variance 1 (over the rows that are not for test)."""
    points: int = 10
    """Points of the training curves."""
    tune: Tune = TUNE
    """How every probe trains, supervisors too; its learning rate gives way to --lrs."""


PRESETS = {
    "tiny": {"seeds": 3, "sides": (4,), "filters": 8, "lrs": (1e-2,), "points": 3},
    "paper": {
        **{"seeds": 5, "train": 40_000, "dev": 0, "test": 10_000},
        **{"lrs": (1e-3,), "standardise": False, "tune": replace(TUNE, batch=100)},
    },
}


@dataclass(frozen=True)
class Pool:
    """All rows: features for the student, what supervisors see (or say) by name, and the truth.

    The first ``known`` rows are for training and dev, the rest for test; ``given`` says that
    ``weak`` holds logits [N,C] of models that were trained elsewhere.
    """

    strong: np.ndarray
    weak: dict[str, np.ndarray]
    truth: np.ndarray
    known: int
    given: bool


def load(cfg: Config) -> Pool:
    """The rows of ``cfg``; which are for test does not depend on the seed.

    Raises:
      UserError: a file without the arrays it should have, or with too few rows.
    """
    known = cfg.train + cfg.dev
    if cfg.features:
        found = images.arrays(cfg.features, ("strong", "weak_logits", "truth"))
        rows = images.draw(len(found["truth"]), known + cfg.test, cfg.features)
        strong = _standard(found["strong"][rows].astype(np.float32), known, cfg)
        logits = found["weak_logits"][rows].astype(np.float32)
        return Pool(strong, {"given": logits}, found["truth"][rows].astype(np.int32), known, True)
    shown, truth = images.pictures(cfg.data, known, cfg.test)
    patch = cfg.patch or max(3, shown.shape[1] // 4)
    bank = patch_bank(shown[:known], cfg.filters, patch)

    def encode(bank: Params, batch: Batch) -> Array:
        return patch_features(bank, batch["image"], patch)

    strong = predict(encode, bank, Table({"image": shown}), batch=500)
    small = {f"{side}x{side}": np.asarray(thumbnails(shown, side)) for side in sorted(cfg.sides)}
    weak = {name: _standard(view, known, cfg) for name, view in small.items()}
    return Pool(_standard(strong, known, cfg), weak, truth, known, False)


def _standard(values: np.ndarray, known: int, cfg: Config) -> np.ndarray:
    """Columns with mean 0 and variance 1 over the first ``known`` rows, which are not for test."""
    if not cfg.standardise:
        return values
    seen = values[:known]
    return ((values - seen.mean(0)) / (seen.std(0) + 0.01 * seen.std())).astype(np.float32)


def splits(cfg: Config, pool: Pool) -> dict[str, np.ndarray]:
    """Row numbers [S,n]: ``dev``, the supervisors' half ``weak``, the students' ``strong``."""
    seeds = [np.random.default_rng([1, seed]) for seed in range(cfg.seeds)]
    drawn = np.stack([rng.permutation(pool.known) for rng in seeds])
    half = cfg.dev + (0 if pool.given else cfg.train // 2)
    return {"dev": drawn[:, : cfg.dev], "weak": drawn[:, cfg.dev : half], "strong": drawn[:, half:]}


def supervise(cfg: Config, pool: Pool, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each supervisor's class probabilities [S,N,C] on all rows."""
    if pool.given:
        said = {name: np.asarray(jax.nn.softmax(logits)) for name, logits in pool.weak.items()}
        return {name: np.stack([probs] * cfg.seeds) for name, probs in said.items()}
    return supervisors(pool.weak, pool.truth, rows["weak"], rows["dev"], cfg.lrs, cfg.tune)


def settings(cfg: Config, pool: Pool) -> list[Setting]:
    """Ceilings and students: every run of the one program."""
    learners = [("truth", "naive"), *((weak, loss) for weak in pool.weak for loss in cfg.losses)]
    seeds = range(cfg.seeds)
    return [Setting(s, lr, "strong", *one) for s in seeds for lr in cfg.lrs for one in learners]


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: ``score`` (chosen learning rate), ``curve`` (the same), ``rates``, ``bootstrap``."""
    _check(cfg)
    pool = load(cfg)
    rows = splits(cfg, pool)
    inputs = {"config": cfg, "truth": pool.truth, "strong": pool.strong}
    said = ctx.stage("supervisors", inputs, lambda: supervise(cfg, pool, rows))
    runs = settings(cfg, pool)
    ctx.say(f"{len(runs)} ceilings and students, one program")

    def learn() -> dict[str, np.ndarray]:
        labels = {"truth": one_hot(pool.truth), **said}
        views = {"strong": pool.strong}
        done = train(
            *(runs, views, labels, rows["strong"], LOSSES, cfg.tune),
            points=cfg.points,
            watch=pool.strong,
        )
        return {"classes": done.curve, "steps": done.steps}

    learnt = ctx.stage("students", inputs, learn)
    yield from _rows(
        cfg,
        pool,
        rows["dev"],
        said,
        dict(zip(runs, learnt["classes"], strict=True)),
        learnt["steps"].tolist(),
    )


def plan(cfg: Config) -> Draft:
    """The step of one student; all runs are spread over the devices, each whole on one."""
    _check(cfg)
    width, classes = 8 * cfg.filters, 10
    if cfg.features:
        found = images.arrays(cfg.features, ("strong", "weak_logits", "truth"))
        width, classes = found["strong"].shape[1], found["weak_logits"].shape[1]
    return drafts.probing(width, cfg.tune, classes=classes, flags={"batch": "--tune.batch"})


def _check(cfg: Config) -> None:
    if unknown := sorted(set(cfg.losses) - set(LOSSES)):
        raise UserError(f"--losses: {', '.join(unknown)} unknown; choose from {', '.join(LOSSES)}")
    check_choices(lrs=cfg.lrs, sides=cfg.sides)
    if len(set(cfg.losses)) < max(1, len(cfg.losses)):
        raise UserError("--losses needs one entry at least, none twice")
    if cfg.dev == 0 and len(cfg.lrs) > 1:
        raise UserError("--dev 0 leaves nothing to choose a learning rate on: give one in --lrs")
    if min(cfg.train // 2, cfg.test, cfg.dev + 1, cfg.points, cfg.filters) < 1:
        raise UserError("--train (2 or more), --test, --points, --filters must be above 0")


def _rows(
    cfg: Config,
    pool: Pool,
    dev: np.ndarray,
    said: dict[str, np.ndarray],
    classes: dict[Setting, np.ndarray],
    steps: list[int],
) -> Iterator[Row]:
    """Rows from the ``classes`` [points,N] that every run names along its training."""
    seeds, truth = range(cfg.seeds), pool.truth[pool.known :]

    def named(seed: int, lr: float, label: str, loss: str) -> np.ndarray:
        return classes[Setting(seed, lr, "strong", label, loss)]

    ends = [[named(s, lr, "truth", "naive")[-1] for lr in cfg.lrs] for s in seeds]
    best = cfg.lrs[best_rate(np.array(ends), pool.truth, dev)]
    for weak, probs in said.items():
        last = {"weak": probs[:, pool.known :].argmax(-1)}
        students = [(loss, weak, loss) for loss in cfg.losses]
        for name, label, loss in [*students, ("ceiling", "truth", "naive")]:
            right = {
                (s, lr): named(s, lr, label, loss)[:, pool.known :] == truth[None]
                for s in seeds
                for lr in cfg.lrs
            }
            for (s, lr), line in right.items():
                yield _row("rates", weak, name, s, lr=lr, accuracy=line[-1].mean())
                for step, now in zip(steps, line, strict=True) if lr == best else ():
                    yield _row("curve", weak, name, s, step=step, accuracy=now.mean())
            last[name] = np.stack([named(s, best, label, loss)[-1, pool.known :] for s in seeds])
        yield from _scores(cfg, weak, last, truth)


def _scores(
    cfg: Config, weak: str, last: dict[str, np.ndarray], truth: np.ndarray
) -> Iterator[Row]:
    """``score`` and ``bootstrap`` rows from the classes [S,test] that each learner names."""
    right = {name: (named == truth[None]).astype(float) for name, named in last.items()}
    low, high = right["weak"].mean(1), right["ceiling"].mean(1)
    for name, named in last.items():
        for s, accuracy in enumerate(right[name].mean(1)):
            row = _row("score", weak, name, s, accuracy=accuracy)
            if name in cfg.losses:
                row["pgr"] = pgr(low[s], accuracy, high[s])
                row["agreement"] = agreement(named[s], last["weak"][s])
                row["agreement_on_errors"] = agreement_on_errors(named[s], last["weak"][s], truth)
            yield row
    for loss in cfg.losses:
        gap = paired_bootstrap(right["weak"], right[loss], right["ceiling"]).gap
        yield _row("bootstrap", weak, loss, -1, **vars(gap))


def _row(block: str, weak: str, learner: str, seed: int, **values: Any) -> Row:
    return {"block": block, "weak": weak, "learner": learner, "seed": seed} | values


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the card says must appear, for the supervisor with the largest thumbnail."""
    last = rows[-1]["weak"]
    rows = where(rows, weak=last)
    score = _columns(where(rows, block="score"))
    losses = [name for name, column in score if column == "pgr"]
    weak, ceiling = score["weak", "accuracy"], score["ceiling", "accuracy"]
    student, agrees = score[losses[0], "accuracy"], score[losses[0], "agreement"]
    name, over = f"{losses[0]} student", "mean over seeds, test, t interval"

    def above(words: str, what: str, differences: np.ndarray) -> dict[str, Any]:
        return claim(words, f"{what}, {over}", interval(differences), above=0.0)

    found = [
        above(f"{name} above its supervisor", "accuracy gap", student - weak),
        above(f"{name} below the ceiling", "accuracy gap", ceiling - student),
        above(f"{name} agrees more than it is right", "agreement - accuracy", agrees - student),
    ]
    (one,) = where(rows, block="bootstrap", learner=losses[0])
    ends = [float(one[key]) for key in ("value", "low", "high", "level")]
    gap = Interval(*ends, n=len(weak))
    words, how = f"{name} above its supervisor, pictures redrawn", "two-level bootstrap"
    found.append(claim(words, f"accuracy gap, {how}", gap, above=0.0))
    for loss in losses:
        kept = score[loss, "pgr"][np.isfinite(score[loss, "pgr"])]  # a seed may have no gap
        median = median_interval(kept) if len(kept) else Interval(np.nan, np.nan, np.nan, 0.95, 0)
        found.append(claim(f"{loss}: PGR above 0", "median PGR over seeds", median, above=0.0))
    for loss in losses[1:]:
        gain = score[loss, "accuracy"] - student
        found.append(above(f"{loss} above {losses[0]}", "accuracy difference", gain))
    return found


def _columns(rows: list[Row]) -> dict[tuple[str, str], np.ndarray]:
    """(learner, column) -> [S], in the order of the seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        for column in ("accuracy", "pgr", "agreement"):
            if column in row:
                found.setdefault((str(row["learner"]), column), []).append(float(row[column]))
    return {key: np.array(values) for key, values in found.items()}


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Accuracy per learner, PGR per loss, training curves, agreement, learning rates."""
    score, curve, rates = (where(rows, block=name) for name in ("score", "curve", "rates"))
    students = [row for row in score if "pgr" in row]
    bars = partial(draw.bars, x="weak", hue="learner", xlabel="supervisor", height=4.4)
    lines = partial(draw.lines, y="accuracy", hue="learner", panel="weak", ylabel="test accuracy")
    dots = partial(draw.scatter, hue="learner", panel="weak", diagonal=True)
    recovered = partial(bars, students, y="pgr", error=median_interval, references={"ceiling": 1.0})
    agrees = partial(dots, students, x="accuracy", y="agreement", xlabel="test accuracy")
    paths = [
        bars(score, y="accuracy", ylabel="test accuracy", path=folder / "accuracy.png"),
        lines(curve, x="step", xlabel="updates", path=folder / "curves.png"),
        agrees(ylabel="agreement with the supervisor", path=folder / "agreement.png"),
        lines(rates, x="lr", xlabel="learning rate", logx=True, path=folder / "rates.png"),
    ]
    if any(np.isfinite(row["pgr"]) for row in students):  # else no gap, nothing to recover
        paths.append(recovered(ylabel="PGR, median over seeds", path=folder / "pgr.png"))
    return paths


def summary(rows: list[Row]) -> list[Row]:
    """Mean test accuracy and median PGR per supervisor and learner."""
    score = where(rows, block="score")
    mean = summarise(score, ["weak", "learner"], "accuracy")
    median = summarise(score, ["weak", "learner"], "pgr", median_interval)
    recovered = {(row["weak"], row["learner"]): row["pgr"] for row in median}
    return [
        {name: row[name] for name in ("weak", "learner", "accuracy", "low", "high")}
        | {"median pgr": recovered.get((row["weak"], row["learner"]), "")}
        for row in mean
    ]


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="weak_to_strong_vision",
        minutes=0.5,
        summary=summary,
        plan=plan,
    )
