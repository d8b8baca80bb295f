"""LELP: pseudo-subclasses from a teacher's embedding, for tasks of few classes (Loo et al. 2024).

With two classes a teacher's logits say little beyond the label. LELP divides every class into S
pseudo-subclasses along principal directions of the teacher's last embedding and trains the student
on S C classes with one cross-entropy. Here ten digits become two classes (odd and even), so that
five true subclasses lie hidden in each: splitting by them is the oracle, splitting at random is the
floor. Rivals: distillation at temperature 1 and at a tuned one (on both sides as Hinton has it, and
on the teacher's alone, which is LELP with S = 1), k-means on the same embeddings, regression of the
embedding beside distillation (FitNets at the last layer), a teacher retrained with subclasses. All
students train as one program; every arm chooses its temperature, learning rate, number of
subclasses and sharpness on dev. Expect random < distillation < LELP <= oracle.

  python -m experiments.lelp --data mnist.npz --train 5000 --rows 2000 --test 5000 --tune.epochs 20
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax import figures as draw
from w2s_jax.cli import main
from w2s_jax.data import images
from w2s_jax.errors import UserError
from w2s_jax.metrics.rows import summarise, values, where
from w2s_jax.metrics.statistics import claim, interval
from w2s_jax.models import trunks
from w2s_jax.pipelines import lelp
from w2s_jax.pipelines.lelp import HOT, SPLIT, Pool, Setting
from w2s_jax.pipelines.probes import check_choices
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Batch, Params, Row, Table, forward


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    data: str = ""
    """An npz file, or mnist, fashion_mnist, cifar10, cifar100 of tensorflow_datasets; empty:
    scikit-learn's digits."""
    download: bool = False
    """Let tensorflow_datasets fetch what it does not have."""
    classes: int = 2
    """Classes of the task: the original class modulo this; what is left is the true subclass."""
    teacher: str = "mlp-256-128"
    """The teacher's network: mlp-256-128, cnn-16-32, resnet-56 (see models.trunks.named)."""
    student: str = "mlp-16"
    """The student's network, named likewise."""
    seeds: int = 8
    """Runs per setting: a seed draws dev, the students' rows, the teacher and the students."""
    train: int = 1000
    """Rows the teacher learns from."""
    rows: int = 250
    """Rows among them that the students learn from."""
    dev: int = 197
    """Rows on which every arm chooses its settings."""
    test: int = 600
    """Rows for the reported numbers."""
    splits: tuple[int, ...] = (2, 3, 5, 10)
    """Numbers of subclasses S per class to choose from."""
    betas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """LELP's temperatures of the projections to choose from."""
    taus: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Temperatures of the teacher to choose from."""
    weights: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Weights of the embedding regression to choose from."""
    lrs: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    """Learning rates of the students to choose from."""
    apart: float = 0.1
    """Weight of what keeps subclasses apart where the teacher is retrained with them."""
    teaching: Tune = Tune(
        lr=1e-3, batch=50, epochs=30, optimizer="adam", schedule="cosine", clip=0.0
    )
    """How teachers train."""
    tune: Tune = Tune(batch=50, epochs=100, optimizer="adam", schedule="cosine", clip=0.0)
    """How students train; the learning rate gives way to --lrs."""


_TINY = {"seeds": 2, "train": 300, "rows": 150, "dev": 100, "test": 200, "splits": (2, 5)}
PRESETS = {
    "tiny": {
        **_TINY,
        **{"teacher": "mlp-32", "betas": (0.3,), "taus": (1.0, 4.0), "lrs": (1e-2,)},
        **{"weights": (1.0,), "tune": replace(Config().tune, epochs=10)},
    },
    "paper": {
        **{"data": "cifar100", "teacher": "resnet-92", "student": "resnet-56", "seeds": 3},
        **{"train": 45_000, "rows": 45_000, "dev": 5000, "test": 10_000, "lrs": (1e-3,)},
        **{"teaching": replace(Config().teaching, batch=128, epochs=100)},
        **{"tune": replace(Config().tune, batch=128, epochs=100)},
    },
}


def load(cfg: Config) -> Pool:
    """The rows of ``cfg``; which are for test does not depend on the seed.

    Raises:
      UserError: fewer classes than asked for; as ``images.pictures``.
    """
    known = cfg.train + cfg.dev
    image, truth = images.pictures(cfg.data, known, cfg.test, download=cfg.download)
    if truth.max() < cfg.classes - 1:
        raise UserError(f"--classes {cfg.classes}: the data has only {truth.max() + 1} classes")
    drawn = [np.random.default_rng([2, seed]).permutation(known) for seed in range(cfg.seeds)]
    order = np.stack(drawn)
    dev, taught = order[:, : cfg.dev], order[:, cfg.dev :]
    label, fine = truth % cfg.classes, truth // cfg.classes
    return Pool(image, label, fine, known, taught[:, : cfg.rows], taught, dev)


def places(cfg: Config, pool: Pool) -> int:
    """Room for subclasses per class: the most that any arm has."""
    return max(*cfg.splits, int(pool.fine.max()) + 1)


def teach(cfg: Config, pool: Pool) -> dict[str, np.ndarray]:
    """A teacher per seed and number of subclasses (1, the plain teacher, first): logits
    [S,K,N,C,M], and of the plain ones the embeddings [S,N,D] and output weights [S,D,C]."""
    room, counts = places(cfg, pool), (1, *cfg.splits)
    model = trunks.named(cfg.teacher, pool.image.shape[1:], cfg.classes * room)
    model = lelp.unlike(model, cfg.classes, room)
    pairs = list(itertools.product(range(cfg.seeds), counts))
    onehot = np.eye(cfg.classes, dtype=np.float32)[pool.label[: pool.known]]
    table = Table({"image": pool.image[: pool.known], "label": onehot})

    def look(params: Params, data: Batch) -> tuple[Array, Array]:
        said = jax.lax.map(partial(_said, model, params), data["image"])
        return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), said)

    def loss(logits: Array, batch: Batch, splits: Array) -> Array:
        numbers = {"classes": cfg.classes, "places": room, "weight": cfg.apart}
        return lelp.teacher_loss(logits, batch, splits=splits, **numbers)

    seeds = [seed for seed, _ in pairs]
    hyper = {"splits": np.array([count for _, count in pairs], np.int32)}
    done = lelp.train(
        *(model, loss, [table] * len(pairs), cfg.teaching, seeds, pool.taught[seeds], hyper),
        *(look, {"image": _blocks(pool.image)}),
    )
    logits, embedding = (leaf[:, 0, : len(pool.image)] for leaf in done.curve)
    shape = (cfg.seeds, len(counts), len(pool.image))
    kernel = done.params["head"]["kernel"].reshape(*shape[:2], -1, cfg.classes, room)
    return {
        "logits": logits.reshape(*shape, cfg.classes, room),
        "embedding": embedding.reshape(*shape, -1)[:, 0],
        "kernel": kernel[:, 0, ..., 0],
    }


def _said(model: Any, params: Params, image: Array) -> tuple[Array, Array]:
    out = forward(model, params, {"image": image})
    return out.logits, out.taps[-1].astype("float32")


def _blocks(image: np.ndarray, size: int = 1000) -> np.ndarray:
    """Pictures in blocks [n,size,H,W,C], the last one filled with zeros."""
    size = min(size, len(image))
    pad = -len(image) % size
    return np.pad(image, ((0, pad), *((0, 0),) * 3)).reshape(-1, size, *image.shape[1:])


def grid(cfg: Config, pool: Pool) -> list[Setting]:
    """Every student of every arm: what is chosen on dev."""
    true = int(pool.fine.max()) + 1
    each = itertools.product
    arms = [Setting(0, "truth")]
    arms += [Setting(0, arm, tau=tau) for arm in ("kd", "lelp, S = 1") for tau in cfg.taus]
    arms += [Setting(0, "oracle", splits=true, tau=tau) for tau in cfg.taus]
    arms += [Setting(0, "embedding", tau=t, weight=w) for t, w in each(cfg.taus, cfg.weights)]
    for arm in ("random", "k-means", "subclass"):
        arms += [Setting(0, arm, splits=s, tau=t) for s, t in each(cfg.splits, cfg.taus)]
    arms += [
        Setting(0, "lelp", splits=s, beta=b, tau=t)
        for s, b, t in each(cfg.splits, cfg.betas, cfg.taus)
    ]
    return [
        replace(one, seed=seed, lr=lr) for one, lr, seed in each(arms, cfg.lrs, range(cfg.seeds))
    ]


def learn(
    cfg: Config, pool: Pool, heard: dict[str, np.ndarray], runs: Sequence[Setting]
) -> np.ndarray:
    """The classes [R,N] int8 that the trained students name."""
    room, width = places(cfg, pool), heard["embedding"].shape[-1]
    counts = (1, *sorted({*cfg.splits, int(pool.fine.max()) + 1}))
    outputs = cfg.classes * room + width
    model = trunks.named(cfg.student, pool.image.shape[1:], outputs)
    image, scaled = pool.image[: pool.known], _scaled(heard["embedding"], pool)
    tables: dict[Setting, Table] = {}
    memo: dict[Any, Any] = {}
    for one in (replace(run, lr=0.0, weight=0.0) for run in runs):
        if one not in tables:
            label = lelp.wide(lelp.targets(pool, heard, one, (1, *cfg.splits), memo), room)
            columns = {"image": image, "label": label, "features": scaled[one.seed]}
            tables[one] = Table(columns)

    def loss(logits: Array, batch: Batch, **row: Array) -> Array:
        return lelp.student_loss(logits, batch, classes=cfg.classes, places=room, **row)

    def look(params: Params, data: Batch) -> Array:
        def block(image: Array) -> Array:
            return lelp.named(_said(model, params, image)[0], cfg.classes, room, counts)

        return jax.lax.map(block, data["image"]).swapaxes(0, 1).reshape(len(counts), -1)

    numbers = {"lr": "lr", "splits": "splits", "weight": "weight"}
    hyper = {name: np.array([getattr(one, name) for one in runs]) for name in numbers}
    hyper["heat"] = np.array([one.tau if one.arm in HOT else 1.0 for one in runs])
    hyper = {n: v.astype(np.int32 if n == "splits" else np.float32) for n, v in hyper.items()}
    seeds = [one.seed for one in runs]
    done = lelp.train(
        *(model, loss, [tables[replace(one, lr=0.0, weight=0.0)] for one in runs], cfg.tune),
        *(seeds, pool.rows[seeds], hyper, look, {"image": _blocks(pool.image)}),
    )
    own = [counts.index(one.splits) for one in runs]
    return done.curve[np.arange(len(runs)), 0, own, : len(pool.image)]


def _scaled(embedding: np.ndarray, pool: Pool) -> list[np.ndarray]:
    """Embeddings [known,D] of each seed with mean 0 and variance 1 over its students' rows."""
    scaled = []
    for rows, own in zip(pool.rows, embedding, strict=True):
        spread = own[rows].std()
        scaled.append(((own[: pool.known] - own[rows].mean(0)) / spread).astype(np.float32))
    return scaled


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: ``teacher``, ``grid`` (every student), ``ablation``, ``score`` (chosen on dev)."""
    _check(cfg)
    pool = load(cfg)
    for name in (cfg.teacher, cfg.student):
        trunks.named(name, pool.image.shape[1:], cfg.classes)  # refuses what is none
    inputs = {"config": cfg, "image": pool.image, "label": pool.label, "fine": pool.fine}
    heard = ctx.stage("teachers", inputs, lambda: teach(cfg, pool))
    for seed, logits in enumerate(heard["logits"][:, 0, ..., 0]):
        yield _row("teacher", Setting(seed, "teacher"), logits.argmax(-1), pool)
    runs = grid(cfg, pool)
    ctx.say(f"{len(runs)} students, one program")
    classes = ctx.stage("students", inputs, lambda: learn(cfg, pool, heard, runs))
    rows = [_row("grid", one, line, pool) for one, line in zip(runs, classes, strict=True)]
    yield from rows
    yield from chosen(rows)
    best = max(_means(where(rows, arm="lelp")), key=lambda pair: pair[0])[1]
    more = [
        Setting(seed, "lelp", s, b, best[0]["tau"], 0.0, off, turn, best[0]["lr"])
        for s, b in itertools.product((1, *cfg.splits), cfg.betas)
        for off, turn in itertools.product((True, False), (True, False))
        for seed in range(cfg.seeds)
    ]
    ctx.say(f"{len(more)} students of the ablation")
    classes = ctx.stage("ablation", inputs, lambda: learn(cfg, pool, heard, more))
    for one, line in zip(more, classes, strict=True):
        yield _row("ablation", one, line, pool)


def _row(block: str, one: Setting, classes: np.ndarray, pool: Pool) -> Row:
    right = classes == pool.label
    values = {field.name: getattr(one, field.name) for field in fields(one)}
    values |= {"off_logits": int(one.off_logits), "rotate": int(one.rotate)}
    dev, test = right[pool.dev[one.seed]].mean(), right[pool.known :].mean()
    return {"block": block, **values, "dev": float(dev), "accuracy": float(test)}


def _means(rows: list[Row]) -> list[tuple[float, list[Row]]]:
    """(mean dev accuracy, rows of all seeds) per setting, in the order of the grid."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("arm", "splits", "beta", "tau", "weight", "lr"))
        groups.setdefault(key, []).append(row)
    return [(float(np.mean([row["dev"] for row in group])), group) for group in groups.values()]


def chosen(rows: list[Row]) -> list[Row]:
    """``score`` rows: of each arm the setting that is best on dev, over all seeds; ``splits`` rows:
    the same for each number of subclasses."""

    def best(block: str, name: str, some: list[Row]) -> list[Row]:
        group = max(_means(some), key=lambda pair: pair[0])[1]
        return [row | {"block": block, "arm": name} for row in group]

    arms = {row["arm"]: where(rows, arm=row["arm"]) for row in rows}
    found = [row for name, some in arms.items() for row in best("score", name, some)]
    found += best("score", "kd, tau 1", where(arms["kd"], tau=1.0))
    own = next(row["splits"] for row in found if row["arm"] == "lelp")
    found += best("score", "random, same S", where(arms["random"], splits=own))
    for name in SPLIT:
        for count in sorted({row["splits"] for row in arms[name]}):
            found += best("splits", name, where(arms[name], splits=count))
    return found


def _check(cfg: Config) -> None:
    chosen_from = {name: getattr(cfg, name) for name in ("betas", "taus", "weights", "lrs")}
    check_choices(splits=cfg.splits, **chosen_from)
    if min(cfg.splits) < 2:
        raise UserError("--splits need 2 or more each")
    if 1.0 not in cfg.taus:
        raise UserError("--taus must have 1.0: distillation at temperature 1 is an arm")
    if not 0 <= cfg.apart < np.inf:
        raise UserError(f"--apart {cfg.apart} must be 0 or more")
    if min(cfg.rows, cfg.dev, cfg.test, cfg.seeds) < 1 or not cfg.rows <= cfg.train:
        raise UserError("--dev, --test, --seeds and --rows must be above 0, --rows within --train")
    if cfg.classes < 2:
        raise UserError(f"--classes {cfg.classes}: two or more")


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the card says must appear, and what it says may not."""
    score = partial(values, rows, "accuracy", block="score")
    pairs = [
        ("oracle", "kd"),
        ("oracle", "lelp"),
        ("lelp", "random, same S"),
        ("lelp", "random"),
        ("lelp", "k-means"),
        ("lelp", "kd, tau 1"),
        ("lelp", "kd"),
        ("lelp", "lelp, S = 1"),
        ("lelp", "embedding"),
        ("lelp", "subclass"),
    ]
    what = "difference of test accuracy, chosen on dev, mean over seeds, t interval"
    found = [
        claim(f"{high} above {low}", what, interval(score(arm=high) - score(arm=low)), above=0.0)
        for high, low in pairs
    ]
    several = [row for row in where(rows, block="ablation") if row["splits"] > 1]
    for column, words in (("off_logits", "without the logits' directions"), ("rotate", "rotated")):
        sides = [
            summarise(where(several, **{column: on}), ["seed"], "accuracy", None) for on in (1, 0)
        ]
        gain = np.array([a["accuracy"] - b["accuracy"] for a, b in zip(*sides, strict=True)])
        words = f"lelp better {words}, over S and beta"
        found.append(claim(words, "difference of mean test accuracy", interval(gain), above=0.0))
    return found


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Accuracy per arm, accuracy against the number of subclasses, the ablation."""
    score, teacher = where(rows, block="score"), where(rows, block="teacher")
    mean = {row["arm"]: row["accuracy"] for row in summarise(score, ["arm"], "accuracy")}
    score = sorted(score, key=lambda row: mean[row["arm"]])
    level = {"teacher": float(np.mean([row["accuracy"] for row in teacher]))}
    low = min(row["accuracy"] for row in score) - 0.01
    plain = [row | {"arm": "lelp"} for row in where(score, arm="lelp, S = 1")]
    named = {0: "kept", 1: "removed"}, {0: "as they are", 1: "rotated"}
    ablation = [
        row
        | {"panel": f"logits' directions {named[0][row['off_logits']]}, {named[1][row['rotate']]}"}
        for row in where(rows, block="ablation")
    ]
    lines = partial(draw.lines, y="accuracy", ylabel="test accuracy")
    bars = partial(draw.bars, x="arm", y="accuracy", xlabel="", ylabel="test accuracy", height=4.4)
    splits = partial(lines, x="splits", hue="arm", xlabel="subclasses per class")
    betas = partial(lines, x="beta", hue="splits", panel="panel", logx=True)
    return [
        bars(score, ylim=(low, 1.0), references=level, path=folder / "accuracy.png"),
        splits([*plain, *where(rows, block="splits")], path=folder / "splits.png"),
        betas(ablation, path=folder / "ablation.png"),
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Mean test accuracy per arm with what it chose."""
    some = where(rows, block="score")
    mean = summarise(some + where(rows, block="teacher"), ["arm"], "accuracy")
    picked = {row["arm"]: row for row in some}
    names = ("splits", "beta", "tau", "weight", "lr")
    return [
        {name: row[name] for name in ("arm", "accuracy", "low", "high")}
        | {name: picked[row["arm"]][name] if row["arm"] in picked else "" for name in names}
        for row in mean
    ]


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="lelp",
        minutes=0.6,
        summary=summary,
    )
