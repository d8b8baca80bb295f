"""What all blocks of a weak-to-strong experiment share: data, numbers, and runs that are kept.

A ``Lesson`` is what one student learns from, in all seeds; ``Study.train`` trains those lessons
that the workdir does not have yet, as one population, and keeps each by itself, so that blocks
share runs and a rerun repeats none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from w2s_jax.data.tasks import Splits
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines.weak_to_strong import Learned, Side
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Table, Tree

Losses = dict[str, Callable[..., Array]]
Key = tuple[str, str]  # whose labels, which loss
TRUTH = "truth"  # the labels of supervisors and ceilings


@dataclass(frozen=True, eq=False)
class Lesson:
    """S tables to learn from, one per seed, the name of the loss, and (``rows`` [S,n]) which of
    their rows count (None: all)."""

    tables: Sequence[Table]
    loss: str = "naive"
    rows: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Rows that each run trains on."""
        return len(self.tables[0]) if self.rows is None else self.rows.shape[1]


@dataclass(frozen=True, eq=False)
class Study:
    """The data, numbers and losses that all blocks share.

    ``splits`` [S], one per seed; the first ``dev`` rows of their (common) test split choose
    stopping points, the rest are reported.
    """

    ctx: Context
    splits: Sequence[Splits]
    seeds: Sequence[int]
    dev: int
    length: int
    weak_tune: Tune
    strong_tune: Tune
    losses: Losses
    points: int
    lrs: Mapping[str, float] = field(default_factory=dict)
    mesh: Any = None
    tables: dict[tuple[str, str], list[Table]] = field(default_factory=dict)

    def tokens(self, side: Side, part: str) -> list[Table]:
        """Split ``part`` of every seed in the side's tokens (test: one table for all seeds)."""
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

    def own(self, side: Side, tune: Tune) -> Tune:
        """``tune`` with the learning rate of this model, where ``lrs`` names one."""
        return replace(tune, lr=self.lrs.get(side.name, tune.lr))

    def train(
        self,
        side: Side,
        lessons: Mapping[Any, Lesson],
        *,
        tune: Tune | None = None,
        ask: Sequence[Table] | None = None,
        test: Table | None = None,
    ) -> dict[Any, Learned]:
        """Every lesson learnt, in all seeds; what the disk has is read, the rest is one program
        per number of rows. ``ask`` [S] are tables to label afterwards."""
        tune = self.own(side, self.strong_tune) if tune is None else tune
        test = self.tokens(side, "test")[0] if test is None else test
        common = dict(
            side=side.digest(),
            test=test.digest(),
            ask=None if ask is None else [table.digest() for table in ask],
            tune=tune,
            seeds=list(self.seeds),
            points=self.points,
        )
        inputs = {
            key: common
            | dict(
                tables=[table.digest() for table in lesson.tables],
                loss=self.losses[lesson.loss],
                rows=lesson.rows,
            )
            for key, lesson in lessons.items()
        }
        stage = _stage("learn", side)
        made: dict[Any, Learned] = {}

        def learnt(key: Any) -> dict[str, Any]:
            if key not in made:  # together with all others that are missing and as long
                missing = {
                    k: lesson
                    for k, lesson in lessons.items()
                    if lesson.count == lessons[key].count
                    and (k == key or not self.ctx.kept(stage, inputs[k]))
                }
                made.update(self._learn(side, missing, tune, ask, test))
            return vars(made[key])

        return {
            key: Learned(**self.ctx.stage(stage, inputs[key], lambda key=key: learnt(key)))
            for key in lessons
        }

    def adapt(self, side: Side, tables: Sequence[Table], tune: Tune) -> Side:
        """Generative fine-tuning (see ``adapt``) as a kept stage: run i reads the text of
        ``tables[i]``, never its labels."""
        texts = [table.without("truth", "label") for table in tables]
        inputs = dict(
            side=side.digest(),
            texts=[table.digest() for table in texts],
            tune=tune,
            seeds=list(self.seeds),
        )

        def make() -> Tree:
            return w2s.adapt(side, texts, tune, self.seeds).params

        params = self.ctx.stage(_stage("adapt", side), inputs, make)
        return replace(side, params=params, stacked=True)

    def _learn(
        self,
        side: Side,
        lessons: Mapping[Any, Lesson],
        tune: Tune,
        ask: Sequence[Table] | None,
        test: Table,
    ) -> dict[Any, Learned]:
        """All lessons in all seeds as one population."""
        parts = list(lessons.values())
        names = list(dict.fromkeys(lesson.loss for lesson in parts))
        some = any(lesson.rows is not None for lesson in parts)
        every = np.tile(np.arange(parts[0].count), (len(self.seeds), 1))
        chosen = [every if lesson.rows is None else lesson.rows for lesson in parts]
        size = len(self.seeds)
        steps = tune.total(parts[0].count)
        self.ctx.say(f"  {side.name}: {len(parts) * size} runs of {steps} updates")
        if side.stacked:  # each seed's own start, once per lesson
            params = jax.tree.map(lambda leaf: np.concatenate([leaf] * len(parts)), side.params)
            side = replace(side, params=params)
        done = w2s.learn(
            side,
            [table for lesson in parts for table in lesson.tables],
            tune,
            list(self.seeds) * len(parts),
            test=test,
            ask=None if ask is None else list(ask) * len(parts),
            losses=tuple(self.losses[name] for name in names),
            which=[names.index(lesson.loss) for lesson in parts for _ in self.seeds],
            rows=np.concatenate(chosen) if some else None,
            points=min(self.points, tune.total(parts[0].count)),
            mesh=self.mesh,
        )
        return {
            key: done.pick(np.arange(k * size, (k + 1) * size)) for k, key in enumerate(lessons)
        }


def _stage(name: str, side: Side) -> str:
    """A stage and a model's name as the beginning of a folder's."""
    return f"{name}-" + "".join(c if c.isalnum() else "_" for c in side.name)[-40:]


def supervise(study: Study, weak: Side) -> Learned:
    """Supervisors: trained on the truth of ``train``, asked about ``transfer``."""
    tables = [table.without("truth") for table in study.tokens(weak, "train")]
    ask = [table.without("truth") for table in study.tokens(weak, "transfer")]
    return study.train(
        weak, {TRUTH: Lesson(tables)}, tune=study.own(weak, study.weak_tune), ask=ask
    )[TRUTH]


def students(
    study: Study,
    strong: Side,
    sources: Mapping[str, np.ndarray | None],
    losses: Sequence[str] = ("naive",),
) -> dict[Key, Learned]:
    """Students of one strong model on the transfer rows, and its ceiling.

    ``sources`` maps a name to the labels [S,M,C] it gives those rows; None is the truth, trained
    on with the naive loss only. All are asked about the rows they learnt from.
    """
    data = study.tokens(strong, "transfer")
    bare = [table.without("truth") for table in data]
    lessons = {}
    for source, labels in sources.items():
        if labels is None:
            lessons[source, "naive"] = Lesson(bare)
            continue
        tables = [w2s.relabel(table, labels[i]) for i, table in enumerate(data)]
        lessons |= {(source, loss): Lesson(tables, loss) for loss in losses}
    return study.train(strong, lessons, ask=bare)
