"""The experiments of Burns et al. 2023 as orders of stages; each yields one row per run.

A row names its block, models, loss and seed, and holds accuracies on the test rows of the weak
supervisor, the student and the ceiling, with PGR, agreement, calibration and early stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from w2s_jax.data import select
from w2s_jax.data.tasks import Splits
from w2s_jax.metrics.classification import accuracy, auroc, brier, ece, reliability
from w2s_jax.metrics.gap import agreement, agreement_on_errors, pgr
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines.weak_to_strong import Learned, Side
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Row, Table

Losses = dict[str, Callable[..., Array]]
TRUTH = "truth"  # the label source of a ceiling


@dataclass(frozen=True, eq=False)
class Study:
    """The data, numbers and models that all blocks share.

    ``splits`` [S], one per seed; the first ``dev`` rows of their (common) test split choose
    stopping points, the rest are reported. ``stage`` keeps artefacts (``record.Context.stage``).
    """

    splits: Sequence[Splits]
    seeds: Sequence[int]
    dev: int
    length: int
    weak_tune: Tune
    strong_tune: Tune
    losses: Losses
    points: int
    stage: Callable[[str, dict[str, Any], Callable[[], Any]], Any]
    mesh: Any = None
    tables: dict[tuple[str, str], list[Table]] = field(default_factory=dict)

    def tokens(self, side: Side, part: str) -> list[Table]:
        """Split ``part`` of every seed in the side's tokens."""
        key = (side.tokenizer.digest(), part)
        if key not in self.tables:
            parts = [getattr(one, part) for one in self.splits]
            parts = parts[:1] if part == "test" else parts
            self.tables[key] = w2s.tokenised(parts, side.tokenizer, self.length)
        return self.tables[key]

    @property
    def truth(self) -> np.ndarray:
        """True classes [N] of the dev and test rows."""
        return np.asarray(self.splits[0].test["truth"])

    def train(
        self,
        side: Side,
        tables: Sequence[Table],
        *,
        tune: Tune | None = None,
        seeds: Sequence[int] | None = None,
        losses: Sequence[str] = ("naive",),
        rows: np.ndarray | None = None,
        ask: Sequence[Table] | None = None,
        test: Table | None = None,
    ) -> Learned:
        """``learn`` as a kept stage: run i trains with the loss named ``losses[i % len]``."""
        seeds = list(self.seeds if seeds is None else seeds)
        names = list(dict.fromkeys(losses))
        named = list(losses) if len(losses) == len(seeds) else [losses[0]] * len(seeds)
        test = self.tokens(side, "test")[0] if test is None else test
        tune = self.strong_tune if tune is None else tune
        inputs = dict(
            side=side.digest(),
            tables=[table.digest() for table in tables],
            test=test.digest(),
            ask=None if ask is None else [table.digest() for table in ask],
            tune=tune,
            losses=[(name, self.losses[name]) for name in named],
            seeds=seeds,
            rows=rows,
            points=self.points,
        )

        def make() -> dict[str, Any]:
            done = w2s.learn(
                side,
                tables,
                tune,
                seeds,
                test=test,
                ask=ask,
                losses=tuple(self.losses[name] for name in names),
                which=[names.index(name) for name in named],
                rows=rows,
                points=min(
                    self.points, tune.total(len(tables[0]) if rows is None else rows.shape[1])
                ),
                mesh=self.mesh,
            )
            return dict(test=done.test, ask=done.ask, curve=done.curve, steps=done.steps)

        return Learned(**self.stage(f"learn-{_plain(side.name)}", inputs, make))


def supervise(study: Study, weak: Side) -> Learned:
    """Supervisors: trained on the truth of ``train``, asked about ``transfer``."""
    tables = study.tokens(weak, "train")
    ask = study.tokens(weak, "transfer")
    return study.train(weak, tables, tune=study.weak_tune, ask=ask)


def students(
    study: Study,
    strong: Side,
    sources: dict[str, np.ndarray | None],
    losses: Sequence[str],
    *,
    ask: bool = False,
) -> dict[tuple[str, str], Learned]:
    """All students of one strong model, and its ceiling, as one population.

    ``sources`` maps a name to the labels [S,M,C] it gives the transfer rows; None is the truth,
    trained on with the naive loss only. Returns (source, loss) -> the S runs.
    """
    data = study.tokens(strong, "transfer")
    runs, tables, named, seeds = [], [], [], []
    for source, labels in sources.items():
        for loss in ["naive"] if labels is None else losses:
            runs.append((source, loss))
            for i, table in enumerate(data):
                tables.append(table if labels is None else w2s.relabel(table, labels[i]))
            named += [loss] * len(data)
            seeds += list(study.seeds)
    tables = [table.without("truth") for table in tables]
    asked = [table.without("truth") for table in data] * len(runs) if ask else None
    done = study.train(strong, tables, seeds=seeds, losses=named, ask=asked)
    size = len(data)
    return {run: done.pick(np.arange(k * size, (k + 1) * size)) for k, run in enumerate(runs)}


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
        ceiling = done[TRUTH, "naive"]
        for weak in below:
            for loss in losses:
                student = done[weak.name, loss]
                yield from compare(
                    study, "transfer", weak, strong, loss, taught[weak.name], student, ceiling
                )
                yield from curves(study, weak, strong, loss, taught[weak.name], student, ceiling)


def features(study: Study, weak: Side, strong: Side, kinds: Sequence[str]) -> Iterator[Row]:
    """The naive loss with each kind of head on both sides: which one carries the effect?"""
    for kind in kinds:
        low, high = w2s.reheaded(weak, kind), w2s.reheaded(strong, kind)
        taught = supervise(study, low)
        done = students(study, high, {"weak": taught.ask, TRUTH: None}, ["naive"])
        rows = compare(
            study,
            "features",
            low,
            high,
            "naive",
            taught,
            done["weak", "naive"],
            done[TRUTH, "naive"],
        )
        yield from (row | {"method": kind} for row in rows)


def bootstrap(study: Study, chain: Sequence[Side], repeats: int) -> Iterator[Row]:
    """Labels handed up through intermediate sizes, and from a student to a fresh copy of itself.

    Bootstrapping (Burns et al., chess): M1 labels, M2 learns and labels, ... up to the largest,
    all on the same transfer rows. Strong-to-strong (EleutherAI): ``repeats`` fresh copies of the
    largest, each on the labels of the one before.
    """
    weak, strong = chain[0], chain[-1]
    taught = supervise(study, weak)
    direct = students(study, strong, {"weak": taught.ask, TRUTH: None}, ["naive"], ask=True)
    ceiling = direct[TRUTH, "naive"]

    def rows(method: str, student: Learned) -> Iterator[Row]:
        found = compare(study, "methods", weak, strong, "naive", taught, student, ceiling)
        return (row | {"method": method} for row in found)

    yield from rows("direct", direct["weak", "naive"])
    labels = taught.ask
    for middle in chain[1:-1]:
        labels = students(study, middle, {"below": labels}, ["naive"], ask=True)[
            "below", "naive"
        ].ask
    yield from rows(
        "bootstrap", students(study, strong, {"below": labels}, ["naive"])["below", "naive"]
    )
    labels = direct["weak", "naive"].ask
    for repeat in range(1, repeats + 1):
        done = students(study, strong, {"self": labels}, ["naive"], ask=True)["self", "naive"]
        labels = done.ask
        yield from rows(f"strong-to-strong {repeat}", done)


def generative(study: Study, weak: Side, strong: Side, tune: Tune) -> Iterator[Row]:
    """Language modelling on the unlabelled transfer text first, for the student and the ceiling."""
    taught = supervise(study, weak)
    texts = [table.without("truth", "label") for table in study.tokens(strong, "transfer")]
    tuned = w2s.adapt(strong, texts, tune, study.seeds)
    data = study.tokens(strong, "transfer")
    runs = {}
    for name, labels in (("weak", taught.ask), (TRUTH, None)):
        tables = data if labels is None else [
            w2s.relabel(table, labels[i]) for i, table in enumerate(data)
        ]  # fmt: skip
        runs[name] = study.train(tuned, [table.without("truth") for table in tables])
    found = compare(study, "methods", weak, strong, "naive", taught, runs["weak"], runs[TRUTH])
    yield from (row | {"method": "generative"} for row in found)


def probes(
    study: Study, weak: Side, strong: Side, losses: Sequence[str], tune: Tune, drop: float
) -> Iterator[Row]:
    """Linear probes of the untouched student, and labels cleaned by a kNN or logistic probe.

    Relabelling replaces a weak label by the label probe's; filtering drops the share ``drop`` of
    rows on which they differ most (EleutherAI/w2s). All runs are one program.
    """
    taught = supervise(study, weak)
    linear, data = w2s.frozen(
        strong, [*study.tokens(strong, "transfer"), *study.tokens(strong, "test")]
    )
    test, data, count = data[-1], data[:-1], len(data[0])
    keep = round(count * (1 - drop))
    runs: list[tuple[str, str, Table, np.ndarray]] = []
    for i, table in enumerate(data):
        labelled = w2s.relabel(table, taught.ask[i])
        whole, x, y = np.arange(count), table["features"], taught.ask[i]
        runs += [("probe", loss, labelled, whole) for loss in losses]
        runs += [("ceiling", "naive", table.without("truth"), whole)]
        for kind in ("knn", "logistic"):
            seen = select.label_probe(x, y, kind)
            runs += [(f"probe, {kind} labels", "naive", w2s.relabel(table, seen), whole)]
            kept = select.most_agreeing(seen, y, keep)
            runs += [(f"probe, {kind} filter", "naive", labelled, kept)]
    yield from _probe_rows(study, weak, strong, linear, taught, test, runs, tune)


def _probe_rows(
    study: Study, weak: Side, strong: Side, linear: Side, taught: Learned, test: Table,
    runs: list[tuple[str, str, Table, np.ndarray]], tune: Tune,
) -> Iterator[Row]:  # fmt: skip
    """Train the probe runs in groups of one table length; rows per method and loss."""
    done: dict[tuple[str, str], list[Learned]] = {}
    per_seed = len(runs) // len(study.seeds)
    for length in sorted({len(rows) for *_, rows in runs}):
        chosen = [k for k, run in enumerate(runs) if len(run[3]) == length]
        learned = study.train(
            linear,
            [runs[k][2] for k in chosen],
            tune=tune,
            seeds=[study.seeds[k // per_seed] for k in chosen],
            losses=[runs[k][1] for k in chosen],
            rows=np.stack([runs[k][3] for k in chosen]),
            test=test,
        )
        for j, k in enumerate(chosen):
            done.setdefault(runs[k][:2], []).append(learned.pick([j]))
    joined = {
        run: Learned(
            np.concatenate([p.test for p in parts]), parts[0].ask,
            np.concatenate([p.curve for p in parts]), parts[0].steps,
        )
        for run, parts in done.items()
    }  # fmt: skip
    ceiling = joined.pop(("ceiling", "naive"))
    for (method, loss), student in joined.items():
        found = compare(study, "probes", weak, strong, loss, taught, student, ceiling)
        yield from (row | {"method": method} for row in found)


def label_counts(study: Study, weak: Side, strong: Side, shares: Sequence[float]) -> Iterator[Row]:
    """The naive student on a share of the weak labels; the ceiling keeps all rows."""
    taught = supervise(study, weak)
    ceiling = students(study, strong, {TRUTH: None}, ["naive"])[TRUTH, "naive"]
    data = study.tokens(strong, "transfer")
    tables = [w2s.relabel(table, taught.ask[i]) for i, table in enumerate(data)]
    for share in shares:
        count = max(2, round(share * len(data[0])))
        rows = np.stack([np.arange(count)] * len(tables))
        student = study.train(strong, tables, rows=rows)
        found = compare(study, "labels", weak, strong, "naive", taught, student, ceiling)
        yield from (row | {"labels": count} for row in found)


def error_kinds(study: Study, weak: Side, strong: Side) -> Iterator[Row]:
    """Hard labels with the supervisor's own errors against as many errors placed at random."""
    taught = supervise(study, weak)
    truth = [np.asarray(one.transfer["truth"]) for one in study.splits]
    own = w2s.hard(taught.ask)
    wrong = [int((labels.argmax(-1) != t).sum()) for labels, t in zip(own, truth, strict=True)]
    chance = np.stack(
        [w2s.flip(t, n, seed) for t, n, seed in zip(truth, wrong, study.seeds, strict=True)]
    )
    done = students(study, strong, {"systematic": own, "random": chance, TRUTH: None}, ["naive"])
    for kind in ("systematic", "random"):
        found = compare(
            study,
            "errors",
            weak,
            strong,
            "naive",
            taught,
            done[kind, "naive"],
            done[TRUTH, "naive"],
        )
        yield from (row | {"method": kind} for row in found)


def compare(
    study: Study, block: str, weak: Side, strong: Side, loss: str,
    taught: Learned, student: Learned, ceiling: Learned,
) -> Iterator[Row]:  # fmt: skip
    """One row per seed: what supervisor, student and ceiling reach on the test rows."""
    truth, dev = study.truth, study.dev
    final = truth[dev:]
    for i, seed in enumerate(study.seeds):
        teacher, pupil, top = (one.test[i][dev:] for one in (taught, student, ceiling))
        scores = [accuracy(said, final) for said in (teacher, pupil, top)]
        curve = [accuracy(point[dev:], final) for point in student.curve[i]]
        honest = [agreement(point[:dev], taught.test[i][:dev]) for point in student.curve[i]]
        cheating = [accuracy(point[:dev], truth[:dev]) for point in student.curve[i]]
        top_dev = [accuracy(point[:dev], truth[:dev]) for point in ceiling.curve[i]]
        top_curve = [accuracy(point[dev:], final) for point in ceiling.curve[i]]
        yield dict(
            block=block,
            weak=weak.name,
            student=strong.name,
            weak_size=weak.size,
            student_size=strong.size,
            loss=loss,
            seed=int(seed),
            weak_accuracy=scores[0],
            student_accuracy=scores[1],
            ceiling_accuracy=scores[2],
            gap=scores[2] - scores[0],
            pgr=pgr(*scores),
            agreement=agreement(pupil, teacher),
            error_agreement=agreement_on_errors(pupil, teacher, final),
            ceiling_error_agreement=agreement_on_errors(top, teacher, final),
            auroc=auroc(pupil, final),
            ece=ece(pupil, final),
            weak_ece=ece(teacher, final),
            brier=brier(pupil, final),
            honest_stop=curve[int(np.argmax(honest))],
            cheating_stop=curve[int(np.argmax(cheating))],
            fall=curve[int(np.argmax(cheating))] - scores[1],
            ceiling_fall=top_curve[int(np.argmax(top_dev))] - scores[2],
        )


def curves(
    study: Study, weak: Side, strong: Side, loss: str,
    taught: Learned, student: Learned, ceiling: Learned,
) -> Iterator[Row]:  # fmt: skip
    """Accuracy and agreement over training, and the calibration of the trained student."""
    truth, dev = study.truth[study.dev :], study.dev
    names = dict(weak=weak.name, student=strong.name, loss=loss)
    for i, seed in enumerate(study.seeds):
        teacher = taught.test[i][dev:]
        for k, step in enumerate(student.steps):
            said, top = student.curve[i][k][dev:], ceiling.curve[i][k][dev:]
            yield names | dict(
                block="curve",
                seed=int(seed),
                step=int(step),
                accuracy=accuracy(said, truth),
                agreement=agreement(said, teacher),
                ceiling_accuracy=accuracy(top, truth),
            )
    for role, said in (("student", student.test), ("weak", taught.test)):
        everything = np.concatenate([one[dev:] for one in said])
        for bin_ in reliability(everything, np.tile(truth, len(said))):
            yield names | dict(block="reliability", role=role) | bin_


def _plain(name: str) -> str:
    """A model's name as part of a folder's."""
    return "".join(c if c.isalnum() else "_" for c in name)[-40:]
