"""Pseudo-labels, and students that choose among them: worlds and arms of `experiments.llkd`.

Documents are bags of words (drawn here, or a file's), a teacher labels a pool, students train on it
by ``objectives.selective`` as one population: arms, learning rates and teachers side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy.special import softmax

from w2s_jax.data import sources
from w2s_jax.errors import UserError
from w2s_jax.metrics.classification import temperature
from w2s_jax.models.heads import linear, mlp
from w2s_jax.objectives import selective, selective_memory
from w2s_jax.pipelines.active_distillation import Run, learn
from w2s_jax.pipelines.probes import best_rate, one_hot
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Array, Row, Table, forward

# The numbers that make an arm of ``selective``; an arm not named in the first group is LLKD less
# one of its parts.
ALL = {"teacher": 0.0, "student": 0.0}
ARMS: dict[str, dict[str, float]] = {
    "all data": ALL,
    "teacher only": {"student": 0.0},
    "student only": {"teacher": 0.0},
    "LLKD": {},
    "LLKD, no weights": {"weigh": 0.0},
    "LLKD, fixed": {"moving": 0.0},
    "LLKD, per selected": {"per_selected": 1.0},
}
RANDOM = "random, as many"
DEFAULTS = {"teacher": 1.0, "student": 1.0, "weigh": 1.0, "moving": 1.0, "per_selected": 0.0}
TEACHERS = ("calibrated", "constant", "trained")


@dataclass(frozen=True)
class World:
    """Features [N,D], classes [N], and row numbers: [S,n] of gold, dev, pool; [n] of test."""

    features: np.ndarray
    truth: np.ndarray
    gold: np.ndarray
    dev: np.ndarray
    pool: np.ndarray
    test: np.ndarray

    @property
    def classes(self) -> int:
        """K."""
        return int(self.truth.max()) + 1


def corpus(
    documents: int, words: int, classes: int, length: float, overlap: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Word counts [N,V] float32 and classes [N] of a bag-of-words mixture with overlapping topics.

    A topic is ``1 - overlap`` of its own word distribution and ``overlap`` of one that all share.
    A document has ``length`` words in the mean, of its own topic and, in a share that is drawn for
    each document, of one other: documents differ in how hard they are.
    """
    rng = np.random.default_rng([4, seed])
    own = rng.dirichlet(np.full(words, 0.1), classes)
    topics = (1.0 - overlap) * own + overlap * rng.dirichlet(np.full(words, 0.3))
    truth = rng.integers(classes, size=documents)
    other = (truth + rng.integers(1, classes, size=documents)) % classes
    share = rng.beta(1.0, 2.0, size=documents)[:, None] * 0.9
    odds = (1.0 - share) * topics[truth] + share * topics[other]
    sizes = 5 + rng.poisson(length - 5, size=documents)
    counts = rng.multinomial(sizes, odds / odds.sum(-1, keepdims=True))
    return counts.astype(np.float32), truth.astype(np.int32)


def tf_idf(counts: np.ndarray, known: int) -> np.ndarray:
    """Counts [N,V] as rows of length 1, words weighed by their rarity in the first ``known``."""
    seen = (counts[:known] > 0).sum(0)
    rows = counts * (np.log((1.0 + known) / (1.0 + seen)) + 1.0)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def texts(path: str, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Word counts [N,V] and classes [N] of a file whose rows have ``text`` and ``label``.

    The V most frequent words; rows in an order that is always the same.

    Raises:
      UserError: a file that cannot be read, or rows without these columns.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    rows = sources.records(path)
    found = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    if not found or not {"text", "label"} <= set(found[0]):
        raise UserError(f"{path}: rows need 'text' and 'label' (a class number)")
    labels = np.array([row["label"] for row in found])
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{path}: 'label' must be a class number from 0")
    counter: Any = CountVectorizer(max_features=words, stop_words="english")
    counts = counter.fit_transform([str(row["text"]) for row in found]).toarray()
    return counts.astype(np.float32), labels.astype(np.int32)


def trained(world: World, lrs: Sequence[float], tune: Tune) -> np.ndarray:
    """Probabilities [S,N,K] of a linear teacher trained on ``gold``, calibrated on ``dev``."""
    label, seeds = one_hot(world.truth), range(len(world.gold))
    runs = [Run(seed, world.gold[seed], label, lr) for seed in seeds for lr in lrs]
    model = linear(world.classes, world.features.shape[1], bias=True)
    logits = learn(model, world.features, runs, tune)
    logits = logits.reshape(len(seeds), len(lrs), *logits.shape[1:])
    logits = logits[:, best_rate(logits.argmax(-1), world.truth, world.dev)].astype(np.float64)
    warm = [temperature(logits[s][own], world.truth[own]) for s, own in enumerate(world.dev)]
    return softmax(logits / np.array(warm)[:, None, None], axis=-1).astype(np.float32)


def simulated(truth: np.ndarray, probs: np.ndarray, least: float, seed: int) -> np.ndarray:
    """Labels [N,K] of a calibrated teacher: it is wrong with chance ``1 - confidence``.

    Confidence runs from ``least`` to 1, half by how sure another teacher is (``probs`` [N,K], by
    rank) and half by chance, so that documents that are hard for all are those it doubts. Where it
    is wrong it names the class that the other finds likeliest of those that are wrong.
    """
    rng = np.random.default_rng([5, seed])
    rank = probs.max(-1).argsort().argsort() / (len(probs) - 1)
    conf = least + (1.0 - least) * (rank + rng.uniform(size=len(truth))) / 2.0
    others = np.where(one_hot(truth) > 0, -1.0, probs).argmax(-1)
    named = np.where(rng.uniform(size=len(truth)) < conf, truth, others)
    return spread(named, conf, probs.shape[1])


def spread(named: np.ndarray, conf: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities [N,K]: ``conf`` [N] on the class ``named`` [N], the rest shared evenly."""
    rest = (1.0 - conf) / (classes - 1)
    labels = np.repeat(rest[:, None], classes, axis=1)
    labels[np.arange(len(named)), named] = conf
    return labels.astype(np.float32)


def teachers(world: World, probs: np.ndarray, least: float) -> dict[str, np.ndarray]:
    """Labels [S,N,K] by teacher: simulated and calibrated; the same classes with one confidence for
    all; the one that was trained (``probs`` [S,N,K])."""
    told = np.stack([simulated(world.truth, p, least, seed) for seed, p in enumerate(probs)])
    mean = np.full(told.shape[1], told.max(-1).mean())
    flat = np.stack([spread(labels.argmax(-1), mean, world.classes) for labels in told])
    return dict(zip(TEACHERS, (told, flat, probs), strict=True))


@dataclass(frozen=True)
class Setting:
    """One student: its seed, whose labels it has, its arm, learning rate and ``keep`` chance."""

    seed: int
    teacher: str
    arm: str
    lr: float
    keep: float = 1.0


@dataclass(frozen=True)
class Learnt:
    """What students did: classes [R,N] they name, how often each row was selected [R,N], and the
    share of the batch that was [R,updates]."""

    classes: np.ndarray
    picked: np.ndarray
    selected: np.ndarray


def students(
    settings: Sequence[Setting],
    world: World,
    labels: Mapping[str, np.ndarray],
    tune: Tune,
    *,
    hidden: int,
    decay: float,
    fixed: tuple[float, float],
) -> Learnt:
    """Train every setting as one program; students are MLPs.

    Raises:
      UserError: a run that diverged.
    """
    rows, width = world.features.shape
    model = mlp(world.classes, width, hidden)
    number = np.arange(rows, dtype=np.int32)
    columns = {"features": world.features, "group": number}
    kinds = dict.fromkeys((one.teacher, one.seed) for one in settings)
    tables = {(t, s): Table({**columns, "label": labels[t][s]}) for t, s in kinds}
    numbers = [DEFAULTS | ARMS.get(one.arm, ALL) for one in settings]
    hyper = {name: np.array([n[name] for n in numbers], np.float32) for name in DEFAULTS}
    hyper |= {name: np.array([getattr(s, name) for s in settings]) for name in ("lr", "keep")}

    def look(params: Any, data: Any) -> Array:
        return forward(model, params, data).logits.argmax(-1).astype("int16")

    done = population(
        lambda row: selective(model, decay=decay, fixed=fixed, **row),
        model.init,
        [tables[one.teacher, one.seed] for one in settings],
        tune,
        [one.seed for one in settings],
        hyper={name: values.astype(np.float32) for name, values in hyper.items()},
        rows=np.stack([world.pool[one.seed] for one in settings]),
        axes=model.axes,
        memory=jax.device_get(selective_memory(world.classes, rows)),
        probe=look,
        data={"features": world.features},
        points=1,
        keep_state=True,
    )
    if done.failed or done.states is None:
        raise UserError(f"{len(done.failed)} students diverged, one at {settings[done.failed[0]]}")
    return Learnt(done.curve[:, 0], done.states.memory["picked"], done.metrics["selected"])


def score(
    one: Setting,
    world: World,
    labels: np.ndarray,
    classes: np.ndarray,
    picked: np.ndarray,
    selected: np.ndarray,
) -> Row:
    """Numbers of one student: test macro-F1 and accuracy, and what it learnt from.

    ``label accuracy`` weighs a row by how often it was selected; ``ever`` is the share of the pool
    that was selected once or more, ``selected`` the mean share of a batch; ``least class`` how
    often a row of the class that was selected least was, over that of any row.
    """
    pool = world.pool[one.seed]
    told, times = labels.argmax(-1)[pool], picked[pool]
    by_class = np.array(
        [times[told == y].mean() for y in range(world.classes) if (told == y).any()]
    )
    right, total = told == world.truth[pool], float(times.sum()) or float("nan")
    return {
        "teacher": one.teacher,
        "arm": one.arm,
        "seed": one.seed,
        "lr": one.lr,
        "macro F1": macro_f1(classes[world.test], world.truth[world.test]),
        "accuracy": float((classes == world.truth)[world.test].mean()),
        "label accuracy": float((times * right).sum()) / total,
        "pool label accuracy": float(right.mean()),
        "ever": float((times > 0).mean()),
        "selected": float(selected.mean()),
        "least class": float(by_class.min()) * len(pool) / total,
    }


def macro_f1(named: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes of the harmonic mean of precision and recall: named, truth [N]."""
    scores = []
    for y in np.unique(truth):
        both = float(((named == y) & (truth == y)).sum())
        scores.append(2.0 * both / float((named == y).sum() + (truth == y).sum()))
    return float(np.mean(scores))
