"""A student asks a teacher to label some rows of a pool, and a new student learns from them.

The stages: models that learn from their own labelled rows (the first student, teachers), what each
arm chooses, last students of every learning rate and temperature of which dev picks one. Each
stage is one population of probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from w2s_jax.data import active
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.metrics.classification import temperature
from w2s_jax.models.heads import linear
from w2s_jax.objectives import classify
from w2s_jax.pipelines.probes import best_of, best_rate, one_hot
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Array, Model, Row, Table, forward

RIVALS = ("random", "margin", "entropy", "k-centre")
# name of an arm -> what a wrong label costs, and the factor on the estimate of m; as only their
# product counts, "RAD (cost 1)" is also RAD with half the estimate
ROBUST = {
    "RAD": (2.0, 1.0),
    "RAD (cost 1)": (1.0, 1.0),
    "RAD (2 m)": (2.0, 2.0),
}
MADE_UP = "made up"


@dataclass(frozen=True)
class World:
    """Features [N,D], classes [N] and the parts of the rows: [S,n] numbers, ``test`` [n] for all.

    A student learns from ``labelled``, teachers from the first rows of ``teacher``; ``dev`` has
    labels too, those of ``pool`` are to be asked for.
    """

    features: np.ndarray
    truth: np.ndarray
    labelled: np.ndarray
    teacher: np.ndarray
    dev: np.ndarray
    pool: np.ndarray
    test: np.ndarray

    @property
    def classes(self) -> int:
        """C."""
        return int(self.truth.max()) + 1


@dataclass(frozen=True)
class Run:
    """One model to train: its seed, the rows [n] it sees, class probabilities [N,C], its rate."""

    seed: int
    rows: np.ndarray
    labels: np.ndarray
    lr: float


def learn(
    model: Model,
    features: np.ndarray,
    runs: Sequence[Run],
    tune: Tune,
    say: Callable[[Array], Array] = lambda logits: logits,
) -> np.ndarray:
    """What models say of all rows, [R,N,...], after training with cross-entropy to their labels.

    Args:
      runs: all with the same number of rows.
      say: logits [N,C] -> what is kept of them.

    Raises:
      UserError: a run that diverged.
    """
    tables = {id(r.labels): Table({"features": features, "label": r.labels}) for r in runs}

    def look(params: Any, data: Any) -> Array:
        return say(forward(model, params, data).logits)

    done = population(
        classify(model, soft_xent),
        model.init,
        [tables[id(run.labels)] for run in runs],
        tune,
        [run.seed for run in runs],
        hyper={"lr": np.array([run.lr for run in runs], np.float32)},
        rows=np.stack([run.rows for run in runs]),
        axes=model.axes,
        probe=look,
        data={"features": features},
        points=1,
    )
    if done.failed:
        first = runs[done.failed[0]].lr
        raise UserError(f"{len(done.failed)} of {len(runs)} models diverged, one at rate {first:g}")
    return done.curve[:, 0]


def taught(
    world: World, model: Model, rows: np.ndarray, lrs: Sequence[float], tune: Tune
) -> np.ndarray:
    """Logits [S,N,C] of ``model`` trained on the truth of ``rows`` [S,n]; dev picks the rate."""
    label = one_hot(world.truth)
    runs = [Run(seed, own, label, lr) for seed, own in enumerate(rows) for lr in lrs]
    logits = learn(model, world.features, runs, tune)
    logits = logits.reshape(len(rows), len(lrs), *logits.shape[1:])
    return logits[:, best_rate(logits.argmax(-1), world.truth, world.dev)]


@dataclass(frozen=True)
class Chosen:
    """Rows [b] of the pool that ``arm`` chose and ``teacher`` labels, and what they are like.

    ``labels`` [N,C] are those of a made-up teacher, else None. ``facts``: m of the game, wrong
    labels in the pool, their share and the mean informativeness among the chosen rows.
    """

    teacher: str
    seed: int
    arm: str
    rows: np.ndarray
    facts: Row
    labels: np.ndarray | None = None


def choose(
    arm: str,
    probs: np.ndarray,
    wrong: int,
    budget: int,
    rng: np.random.Generator,
    features: np.ndarray,
    centres: np.ndarray,
) -> np.ndarray:
    """Places [b] in the pool that ``arm`` picks, from the student's ``probs`` [n,C] and m.

    ``features`` [n,D] of the pool and ``centres`` [a,D], those of labelled rows, are for k-centre.
    """
    if arm == "random":
        return active.uniform_rows(len(probs), budget, rng)
    if arm == "margin":
        return active.largest(-active.margins(probs), budget)
    if arm == "entropy":
        return active.largest(active.entropy(probs), budget)
    if arm == "k-centre":
        return active.k_center(features, centres, budget)
    cost, factor = ROBUST[arm]
    wrong = min(round(factor * wrong), len(probs))
    return active.robust_rows(active.informativeness(probs), wrong, budget, rng, cost=cost)


def choices(
    world: World,
    heard: dict[str, np.ndarray],
    budget: int,
    shares: Sequence[float],
    growing: Sequence[str],
) -> list[Chosen]:
    """What the arms pick from the first student's margins, calibrated on dev.

    Every arm chooses for every trained teacher, whose m is estimated on dev; the arms ``growing``
    for made-up ones too, who err on a known share of the pool.

    Args:
      heard: logits [S,N,C] of the ``student`` and, by name, of the teachers.
    """
    found = []
    for seed, said in enumerate(heard["student"]):
        dev, pool = world.dev[seed], world.pool[seed]
        warm = temperature(said[dev], world.truth[dev])
        probs = softmax(said[pool].astype(np.float64) / warm, axis=-1)
        for name, logits in heard.items():
            if name == "student":
                continue
            told = logits[seed].argmax(-1)
            wrong = active.mistakes(float((told == world.truth)[dev].mean()), len(pool))
            for arm in (*RIVALS, *ROBUST):
                own = _pick(world, seed, probs, arm, wrong, told, budget)
                found.append(Chosen(name, seed, arm, *own))
        unsure = pool[np.argsort(active.margins(probs), kind="stable")]
        for share in shares:
            wrong = round(share * len(pool))
            labels = flipped(world.truth, unsure[:wrong], said)
            for arm in growing:
                rows, facts = _pick(world, seed, probs, arm, wrong, labels.argmax(-1), budget)
                facts = {**facts, "flips": share}
                found.append(Chosen(MADE_UP, seed, arm, rows, facts, labels))
    return found


def _pick(
    world: World,
    seed: int,
    probs: np.ndarray,
    arm: str,
    wrong: int,
    told: np.ndarray,
    budget: int,
) -> tuple[np.ndarray, Row]:
    """Rows and facts of one choice, given the classes ``told`` [N] by its teacher."""
    pool, rng = world.pool[seed], np.random.default_rng([3, seed])
    centres = world.features[world.labelled[seed]]
    places = choose(arm, probs, wrong, budget, rng, world.features[pool], centres)
    errors, values = (told != world.truth)[pool], active.informativeness(probs)
    return pool[places], {
        "m": wrong,
        "wrong in pool": int(errors.sum()),
        "teacher error": float(errors[places].mean()),
        "informativeness": float(values[places].mean()),
    }


def flipped(truth: np.ndarray, rows: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Labels [N,C] that are true but on ``rows``, where they are the class that the student's
    logits ``said`` [N,C] put first of those that are wrong."""
    labels = one_hot(truth)
    others = np.where(labels[rows] > 0, -np.inf, said[rows])
    labels[rows] = np.eye(labels.shape[1], dtype=labels.dtype)[others.argmax(-1)]
    return labels


def told(logits: np.ndarray, warm: float, truth: np.ndarray, own: np.ndarray) -> np.ndarray:
    """A teacher's labels [N,C] at temperature ``warm`` (0: hard), the truth on the rows ``own``."""
    logits = logits.astype(np.float64)
    labels = softmax(logits / warm, axis=-1) if warm else np.eye(logits.shape[1])[logits.argmax(-1)]
    labels[own] = one_hot(truth)[own]
    return labels.astype(np.float32)


@dataclass(frozen=True)
class Lesson:
    """What a last student learns from: chosen rows, labels of a temperature (0: hard), a rate."""

    chosen: Chosen
    labels: np.ndarray
    warm: float
    lr: float

    @property
    def group(self) -> tuple[str, str]:
        """The lessons that share a rate and a temperature: teacher and kind of label."""
        return self.chosen.teacher, "soft" if self.warm else "hard"


def students(
    world: World,
    heard: dict[str, np.ndarray],
    chosen: Sequence[Chosen],
    lrs: Sequence[float],
    temperatures: Sequence[float],
    tune: Tune,
) -> list[Row]:
    """Test accuracy of a linear student per choice and kind of label, soft and hard.

    Rate and temperature are those with the best mean accuracy on dev over all arms and seeds, one
    pair per teacher and kind of label (for made-up teachers, who give hard labels: one rate).
    """
    labels: dict[Any, np.ndarray] = {}
    lessons = []
    for one in chosen:
        for warm in (0.0, *temperatures) if one.labels is None else (0.0,):
            key = (one.teacher, one.seed, warm)
            if one.labels is None and key not in labels:
                own = world.labelled[one.seed]
                labels[key] = told(heard[one.teacher][one.seed], warm, world.truth, own)
            label = labels[key] if one.labels is None else one.labels
            lessons += [Lesson(one, label, warm, lr) for lr in lrs]
    right = _learnt(world, lessons, tune) == world.truth
    best = best_of(
        (one.group, (one.warm, one.lr), marks[world.dev[one.chosen.seed]].mean())
        for one, marks in zip(lessons, right, strict=True)
    )
    rows = []
    for one, marks in zip(lessons, right, strict=True):
        if best[one.group] == (one.warm, one.lr):
            what = {"teacher": one.chosen.teacher, "labels": one.group[1], "arm": one.chosen.arm}
            score = {"seed": one.chosen.seed, "accuracy": float(marks[world.test].mean())}
            rows.append(what | score | one.chosen.facts | {"temperature": one.warm, "lr": one.lr})
    return rows


def _learnt(world: World, lessons: Sequence[Lesson], tune: Tune) -> np.ndarray:
    """Classes [L,N] that the students name."""
    runs = []
    for one in lessons:
        rows = np.concatenate([world.labelled[one.chosen.seed], one.chosen.rows])
        runs.append(Run(one.chosen.seed, rows, one.labels, one.lr))
    model = linear(world.classes, world.features.shape[1], bias=True)
    return learn(model, world.features, runs, tune, lambda x: x.argmax(-1).astype("int16"))
