"""The experiments of Burns et al. 2023 as orders of stages; each yields one row per run.

A row names its block, models, loss and seed, and holds accuracies on the test rows of the weak
supervisor, the student and the ceiling, with PGR, agreement, calibration and early stopping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from w2s_jax.data import select
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines.study import TRUTH, Lesson, Study, students, supervise
from w2s_jax.pipelines.weak_to_strong import Learned, Side
from w2s_jax.pipelines.weak_to_strong_rows import compare, curves
from w2s_jax.train.optim import Tune
from w2s_jax.types import Row

CEILING = (TRUTH, "naive")


def transfer(
    study: Study, weaks: Sequence[Side], strongs: Sequence[Side], losses: Sequence[str]
) -> Iterator[Row]:
    """Every (weak, larger strong) pair under every loss, with training curves."""
    taught = {weak.name: supervise(study, weak) for weak in weaks}
    for strong in strongs:
        below = [weak for weak in weaks if weak.size < strong.size]
        if not below:
            continue
        sources = {weak.name: taught[weak.name].ask for weak in below} | {TRUTH: None}
        done = students(study, strong, sources, losses)
        for weak in below:
            for loss in losses:
                runs = (taught[weak.name], done[weak.name, loss], done[CEILING])
                yield from compare(study, "transfer", (weak, strong), loss, runs)
                yield from curves(study, (weak, strong), loss, runs)


def features(study: Study, weak: Side, strong: Side, kinds: Sequence[str]) -> Iterator[Row]:
    """The naive loss with each kind of head on both sides: which one carries the effect?"""
    for kind in kinds:
        low, high = w2s.reheaded(weak, kind), w2s.reheaded(strong, kind)
        taught = supervise(study, low)
        done = students(study, high, {weak.name: taught.ask, TRUTH: None})
        runs = (taught, done[weak.name, "naive"], done[CEILING])
        yield from compare(study, "features", (low, high), "naive", runs, method=kind)


def bootstrap(study: Study, chain: Sequence[Side], repeats: int) -> Iterator[Row]:
    """Labels handed up through intermediate sizes, and from a student to a fresh copy of itself.

    Bootstrapping (Burns et al., chess): M1 labels, M2 learns and labels, ... up to the largest,
    all on the same transfer rows. Strong-to-strong (EleutherAI/w2s): ``repeats`` fresh copies of
    the largest, each on the labels of the one before.
    """
    weak, strong = chain[0], chain[-1]
    taught = supervise(study, weak)
    direct = students(study, strong, {weak.name: taught.ask, TRUTH: None})

    def rows(method: str, student: Learned) -> Iterator[Row]:
        runs = (taught, student, direct[CEILING])
        return compare(study, "methods", (weak, strong), "naive", runs, method=method)

    def taught_by(side: Side, labels: np.ndarray) -> Learned:
        return students(study, side, {"above": labels})["above", "naive"]

    yield from rows("direct", direct[weak.name, "naive"])
    labels = taught.ask
    for middle in chain[1:-1]:
        labels = taught_by(middle, labels).ask
    yield from rows("bootstrap", taught_by(strong, labels))
    labels = direct[weak.name, "naive"].ask
    for repeat in range(1, repeats + 1):
        copy = taught_by(strong, labels)
        labels = copy.ask
        yield from rows(f"strong-to-strong {repeat}", copy)


def generative(study: Study, weak: Side, strong: Side, tune: Tune) -> Iterator[Row]:
    """Language modelling on the unlabelled transfer text first, for the student and the ceiling."""
    taught = supervise(study, weak)
    tuned = study.adapt(strong, study.tokens(strong, "transfer"), tune)
    done = students(study, tuned, {weak.name: taught.ask, TRUTH: None})
    runs = (taught, done[weak.name, "naive"], done[CEILING])
    yield from compare(study, "methods", (weak, strong), "naive", runs, method="generative")


def probes(
    study: Study, weak: Side, strong: Side, losses: Sequence[str], tune: Tune, drop: float
) -> Iterator[Row]:
    """Linear probes of the untouched student, and labels cleaned by a kNN or logistic probe.

    Relabelling replaces a weak label by the label probe's; filtering drops the share ``drop`` of
    rows on which the two differ most (EleutherAI/w2s).
    """
    taught = supervise(study, weak)
    tables = [*study.tokens(strong, "transfer"), *study.tokens(strong, "test")]
    linear, seen = w2s.frozen(strong, tables)
    *data, test = seen
    weakly = [w2s.relabel(table, taught.ask[i]) for i, table in enumerate(data)]
    lessons = {("probe", loss): Lesson(weakly, loss) for loss in losses}
    lessons[CEILING] = Lesson([table.without("truth") for table in data])
    keep = round(len(data[0]) * (1 - drop))
    for kind in ("knn", "logistic"):
        opinions = [
            select.label_probe(np.asarray(table["features"]), taught.ask[i], kind)
            for i, table in enumerate(data)
        ]
        relabelled = [w2s.relabel(table, opinions[i]) for i, table in enumerate(data)]
        lessons[f"{kind} labels", "naive"] = Lesson(relabelled)
        agreeing = [
            select.most_agreeing(opinion, taught.ask[i], keep) for i, opinion in enumerate(opinions)
        ]
        lessons[f"{kind} filter", "naive"] = Lesson(weakly, "naive", np.stack(agreeing))
    done = study.train(linear, lessons, tune=tune, test=test)
    ceiling = done.pop(CEILING)
    for (method, loss), student in done.items():
        runs = (taught, student, ceiling)
        yield from compare(study, "probes", (weak, strong), loss, runs, method=method)


def label_counts(study: Study, weak: Side, strong: Side, shares: Sequence[float]) -> Iterator[Row]:
    """The naive student on a share of the weak labels; the ceiling keeps all rows."""
    taught = supervise(study, weak)
    data = study.tokens(strong, "transfer")
    weakly = [w2s.relabel(table, taught.ask[i]) for i, table in enumerate(data)]
    ceiling = students(study, strong, {TRUTH: None})[CEILING]
    counts = [max(2, round(share * len(data[0]))) for share in shares]
    lessons = {
        count: Lesson(weakly, "naive", np.tile(np.arange(count), (len(weakly), 1)))
        for count in counts
    }
    for count, student in study.train(strong, lessons).items():
        runs = (taught, student, ceiling)
        yield from compare(study, "labels", (weak, strong), "naive", runs, labels=count)


def error_kinds(study: Study, weak: Side, strong: Side) -> Iterator[Row]:
    """Hard labels with the supervisor's own errors against as many errors placed at random."""
    taught = supervise(study, weak)
    truth = [np.asarray(one.transfer["truth"]) for one in study.splits]
    own = w2s.hard(taught.ask)
    wrong = [int((labels.argmax(-1) != t).sum()) for labels, t in zip(own, truth, strict=True)]
    chance = np.stack(
        [w2s.flip(t, n, seed) for t, n, seed in zip(truth, wrong, study.seeds, strict=True)]
    )
    done = students(study, strong, {"systematic": own, "random": chance, TRUTH: None})
    for kind in ("systematic", "random"):
        runs = (taught, done[kind, "naive"], done[CEILING])
        yield from compare(study, "errors", (weak, strong), "naive", runs, method=kind)
