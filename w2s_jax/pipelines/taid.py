"""Distillation objectives side by side: methods, teachers, seeds and rates as one program.

Every teacher's complete distributions of the rows are stored once, so that no run pays for a
teacher; the truth is one more teacher, whose forward divergence is the cross-entropy on data. A
``World`` is a student, rows, teachers and a way to judge (``taid_worlds``). Settings are chosen on
dev, by the divergence from the teacher, with seeds of their own; what is chosen is judged on test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.losses import distillation as losses
from w2s_jax.objectives import taid_memory
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import Population, population
from w2s_jax.types import Array, Model, Objective, Params, Row, Table

TRUTH = "truth"  # the teacher that gives what really came all probability
TUNING = 1000  # the first seed of the runs that choose settings

Divergence = Callable[[Array, Array, Array], Array]


def _still(divergence: Callable[..., Array]) -> Divergence:
    """A divergence whose target does not move."""
    return lambda student, teacher, t: divergence(student, teacher)


def _moving(student: Array, teacher: Array, t: Array) -> Array:
    return losses.taid_cross_entropy(student, teacher, t=t)


class Method(NamedTuple):
    """How a student learns: a divergence; of TAID, the adaptive steps to choose from; and whether
    its teacher is the truth."""

    divergence: Divergence
    alphas: tuple[float, ...] = (0.0,)
    truth: bool = False


_KL = _still(losses.forward_kl)
METHODS: dict[str, Method] = {
    "SFT": Method(_KL, truth=True),
    "KL": Method(_KL),
    "RKL": Method(_still(losses.reverse_kl)),
    "TVD": Method(_still(losses.total_variation)),
    "adaptive KL": Method(_still(losses.adaptive_kl)),
    "skew KL": Method(_still(partial(losses.skew_kl, alpha=0.1))),
    "TAID linear": Method(_moving),
    "TAID 5e-4": Method(_moving, (5e-4,)),
    "TAID": Method(_moving, (1e-2, 3e-2, 1e-1)),
}
_KINDS = list(dict.fromkeys(method.divergence for method in METHODS.values()))


@dataclass(frozen=True)
class Setting:
    """One run: ``alpha`` counts for TAID alone."""

    method: str
    teacher: str
    seed: int
    lr: float
    alpha: float


@dataclass(frozen=True, eq=False)
class World:
    """What the runs share.

    Args:
      objective: ``objectives.taid`` or ``taid_classes``, which divergences without t ignore.
      begin: seeds -> the first weights of a run each, [S, ...].
      tables: rows with the distributions of each teacher, ``TRUTH`` among them.
      rows: how many of these a seed draws to train on.
      judge: ``(params, data) -> {name: [2,K] or [2]}`` on dev and on test, where K are the
        teachers in the order of ``tables`` (without the truth); ``kl`` must be there.
      start: where TAID's t begins.
    """

    objective: Callable[..., Objective]
    model: Model
    begin: Callable[[Sequence[int]], Params]
    tables: Mapping[str, Table]
    rows: int
    tune: Tune
    judge: Callable[[Params, Any], Any]
    data: Any
    start: float

    @cached_property
    def teachers(self) -> list[str]:
        """Names, without the truth."""
        return [name for name in self.tables if name != TRUTH]

    @cached_property
    def learner(self) -> Callable[[Any], Objective]:
        """Numbers of one run -> its objective; one function, so that one program."""

        def build(row: Any) -> Objective:
            def divergence(student: Array, teacher: Any, *, t: Array) -> Array:
                said = teacher["logits"] if isinstance(teacher, dict) else teacher
                return jax.lax.switch(row["kind"], _KINDS, student, said, t)

            return self.objective(
                self.model, divergence=divergence, start=self.start, alpha=row["alpha"]
            )

        return build

    def train(self, settings: Sequence[Setting]) -> Population:
        """All ``settings`` as one program."""
        seeds = [one.seed for one in settings]
        size = len(next(iter(self.tables.values())))
        drawn = [np.random.default_rng([seed]).permutation(size)[: self.rows] for seed in seeds]
        used = [METHODS[one.method] for one in settings]
        return population(
            self.learner,
            self.begin(seeds),
            [
                self.tables[TRUTH if method.truth else one.teacher]
                for method, one in zip(used, settings, strict=True)
            ],
            self.tune,
            seeds,
            hyper={
                "lr": np.array([one.lr for one in settings], np.float32),
                "alpha": np.array([one.alpha for one in settings], np.float32),
                "kind": np.array([_KINDS.index(one.divergence) for one in used], np.int32),
            },
            rows=np.stack(drawn),
            stacked=True,
            axes=self.model.axes,
            probe=self.judge,
            data=self.data,
            points=1,
            memory=taid_memory(),
        )


# The study


def grid(
    plan: Mapping[str, Sequence[str]],
    lrs: Sequence[float],
    seeds: Sequence[int],
    alphas: Sequence[float] = METHODS["TAID"].alphas,
) -> list[Setting]:
    """Every setting of the methods that ``plan`` gives each teacher; ``alphas`` are TAID's."""
    return [
        Setting(method, teacher, seed, lr, alpha)
        for teacher, methods in plan.items()
        for method in methods
        for alpha in (alphas if method == "TAID" else METHODS[method].alphas)
        for lr in lrs
        for seed in seeds
    ]


def judged(world: World, settings: Sequence[Setting]) -> list[dict[str, np.ndarray]]:
    """Per run what the judge says of dev and test [2], and the course ``t`` [updates] of TAID;
    a run that diverged has NaN."""
    done = world.train(settings)
    found = []
    for i, one in enumerate(settings):
        _, metrics, curve = done.run(i)
        place = world.teachers.index(one.teacher)
        said = {name: value[-1] for name, value in curve.items()}
        said = {name: v[:, place] if v.ndim == 2 else v for name, v in said.items()}
        if i in done.failed:
            said = {name: np.full_like(v, np.nan) for name, v in said.items()}
        if METHODS[one.method].divergence is _moving:
            said["t"] = metrics["t"]
        found.append(said)
    return found


def chosen(
    settings: Sequence[Setting], said: Sequence[Mapping[str, np.ndarray]], seeds: Sequence[int]
) -> tuple[list[Setting], list[Row]]:
    """The best of each method and teacher by the mean divergence on dev, for ``seeds``; and the
    means as rows.

    Raises:
      UserError: every setting of a method diverged.
    """
    means: dict[Setting, list[float]] = {}
    for one, found in zip(settings, said, strict=True):
        means.setdefault(replace(one, seed=0), []).append(float(found["kl"][0]))
    best: dict[tuple[str, str], tuple[float, Setting]] = {}
    for one, values in means.items():
        mean, key = float(np.mean(values)), (one.method, one.teacher)
        if np.isfinite(mean) and mean < best.get(key, (np.inf, one))[0]:
            best[key] = mean, one
    for one in means:
        if (one.method, one.teacher) not in best:
            raise UserError(f"{one.method} diverged at every rate of --lrs: give smaller ones")
    rows = [
        {
            **{"block": "rates", "method": one.method, "teacher": one.teacher},
            **{"lr": one.lr, "alpha": one.alpha, "kl": float(np.mean(values))},
            "picked": int(best[one.method, one.teacher][1] == one),
        }
        for one, values in means.items()
    ]
    picked = [one for _, one in best.values()]
    return [replace(one, seed=seed) for one in picked for seed in seeds], rows


def score_rows(
    settings: Sequence[Setting],
    said: Sequence[Mapping[str, np.ndarray]],
    block: str,
    start: float,
) -> Iterator[Row]:
    """A row per run with what the judge says of test, and how t went: its smallest rise, how far
    it stayed above the line, its last value."""
    for one, found in zip(settings, said, strict=True):
        numbers = {name: float(v[1]) for name, v in found.items() if name != "t"}
        row: Row = {
            **{"block": block, "method": one.method, "teacher": one.teacher},
            **{"seed": one.seed, "lr": one.lr, "alpha": one.alpha, **numbers},
        }
        if "t" in found:
            t = np.asarray(found["t"], np.float64)
            over, rise = t - line(start, len(t)), np.diff(t)
            row |= {"rise": float(rise.min()), "over": float(over.min()), "last": float(t[-1])}
            row["ahead"] = float(over.mean())
        yield row


def line(start: float, updates: int) -> np.ndarray:
    """The linear t of each of ``updates`` updates: update n follows n - 1 of them, the first two
    begin at ``start``."""
    return start + (1 - start) * np.maximum(np.arange(updates) - 1, 0) / updates


def course_rows(
    settings: Sequence[Setting], said: Sequence[Mapping[str, np.ndarray]], points: int = 26
) -> Iterator[Row]:
    """t along the updates, of one seed."""
    first = min(one.seed for one in settings)
    for one, found in zip(settings, said, strict=True):
        if "t" in found and one.seed == first:
            for n in np.unique(np.linspace(0, len(found["t"]) - 1, points).astype(int)):
                row = {"block": "course", "method": one.method, "teacher": one.teacher}
                yield row | {"update": int(n), "t": float(found["t"][n])}
