"""The distillation zoo on pictures: divergences x {stored, live} x student sizes, and what goes
beside them: fewer labels, matched features, self-distillation.

One teacher is trained on all training rows; students learn from it on a few of them. A seed draws
which, the student's first weights and the order. The runs of one student in one mode (losses x
learning rates x seeds) are one population program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.annotate import predict
from w2s_jax.data import images
from w2s_jax.data.augment import crop
from w2s_jax.errors import UserError
from w2s_jax.losses import distillation as dense
from w2s_jax.losses import features
from w2s_jax.losses.classification import ramp, soft_xent
from w2s_jax.models.trunks import Mlp, named
from w2s_jax.objectives import classify, distill_classes
from w2s_jax.objectives.augmented import augmented
from w2s_jax.objectives.features import Head, Term, linear, match, with_projections
from w2s_jax.pipelines.distillation import generations
from w2s_jax.pipelines.zoo_tokens import blind, sft
from w2s_jax.record import Context
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import one_of, population
from w2s_jax.types import Array, Batch, Model, Params, Row, Table, Tree, forward

HARD = 0.1  # weight of the true label where a loss has both


def _kd(temperature: float) -> Callable[..., Array]:
    return partial(dense.hinton, alpha=HARD, temperature=temperature)


LOSSES: dict[str, Callable[..., Array]] = {
    "ce": sft,
    "kd T=1": _kd(1.0),
    "kd T=2": _kd(2.0),
    "kd T=4": _kd(4.0),
    "forward_kl": blind(dense.forward_kl),
    "reverse_kl": blind(dense.reverse_kl),
    "jsd": blind(dense.jsd, beta=0.5),
    "skew_kl": blind(dense.skew_kl, alpha=0.1),
    "skew_reverse_kl": blind(dense.skew_reverse_kl, alpha=0.1),
    "total_variation": blind(dense.total_variation),
    "adaptive_kl": blind(dense.adaptive_kl),
    "taid": blind(dense.taid, t=ramp(0.4, 1.0, over=1.0)),
    "dkd": partial(dense.dkd, alpha=1.0, beta=2.0, temperature=4.0),
    "logit_mse": blind(dense.logit_mse),
}
"""``(student logits, teacher logits, class) -> nats``; kd has the true label at weight .1."""

MATCHES: dict[str, tuple[Callable[..., Array], float, Head | None]] = {
    "hint": (features.hint, 100.0, linear()),
    "attention": (features.attention_transfer, 1000.0, None),
    "relations": (features.relational_distance, 25.0, None),
    "similarity": (features.similarity, 3000.0, None),
}
"""Loss, its weight (that of the RepDistiller benchmark) and projection; beside kd T=4."""
SHARES = (0.01, 0.1, 1.0)  # of that weight


@dataclass(frozen=True, eq=False)
class Pictures:
    """What all runs share.

    ``data`` as in ``data.images.pictures``; ``labels`` are the rows of which a student learns, the
    first for the comparison of ``losses``; networks are named as ``models.trunks.named`` does it.
    ``shift`` is how far live pictures move, in pixels.
    """

    ctx: Context
    data: str
    seeds: int
    train: int
    dev: int
    test: int
    labels: tuple[int, ...]
    losses: tuple[str, ...]
    teacher: str
    shift: int
    lrs: tuple[float, ...]
    teacher_tune: Tune
    tune: Tune

    @cached_property
    def splits(self) -> images.Pictures:
        """Rows to learn from, to choose on, to report."""
        return images.load(self.data, seed=0, train=self.train, dev=self.dev, test=self.test)

    def model(self, name: str) -> Model:
        """The network of that name (see ``models.trunks.named``)."""
        table = self.splits.train
        high, wide, channels = np.asarray(table["image"]).shape[1:]
        return named(name, (high, wide, channels), np.asarray(table["label"]).shape[1])

    @cached_property
    def taught(self) -> tuple[Model, Params]:
        """The teacher, trained on the labels of all training rows, moved about."""
        model, table = self.model(self.teacher), self.splits.train.without("truth")
        objective = augmented(classify(model, soft_xent), self._move)
        inputs = dict(teacher=self.teacher, table=table.digest(), tune=self.teacher_tune)

        def make() -> Params:
            start, key = model.init(jax.random.key(1)), jax.random.key(0)
            tune = self.teacher_tune
            return fit(objective, start, table, tune, key, axes=model.axes, progress=False).params

        return model, self.ctx.stage("teacher", inputs | {"shift": self.shift}, make)

    @property
    def _move(self) -> Any:
        return partial(crop, padding=self.shift)

    @cached_property
    def told(self) -> Table:
        """The training rows with the teacher's logits."""
        model, params = self.taught
        table = self.splits.train.without("truth")
        logits = predict(_logits(model), params, table, batch=250)
        return table.with_columns(teacher={"classes": np.asarray(logits)})

    @cached_property
    def _held(self) -> tuple[Batch, np.ndarray]:
        """Dev, then test pictures, and their classes."""
        parts = (self.splits.dev, self.splits.test)
        shown = np.concatenate([np.asarray(part["image"]) for part in parts])
        return {"image": shown}, np.concatenate([np.asarray(part["truth"]) for part in parts])

    def drawn(self, count: int) -> list[np.ndarray]:
        """Rows of each seed."""
        if count > self.train:
            raise UserError(f"--labels {count} are more than the {self.train} rows of --train")
        seeds = [np.random.default_rng([2, seed]) for seed in range(self.seeds)]
        return [rng.permutation(self.train)[:count] for rng in seeds]

    def trained(
        self,
        model: Model,
        objective: Callable[[Mapping[str, Array]], Any],
        names: Sequence[str],
        count: int,
        *,
        live: bool = False,
        tables: Sequence[Table] | None = None,
    ) -> tuple[np.ndarray, Tree]:
        """Right answers [names, lrs, seeds, N] on dev and test, and the weights [names, lrs,
        seeds, ...]; ``tables`` [seeds] instead of the rows that ``drawn`` draws."""
        shape = (len(names), len(self.lrs), self.seeds)
        runs = list(np.ndindex(shape))
        rows = self.drawn(count)
        if tables is None:
            tables = [self.told.take(rows[seed]) for seed in range(self.seeds)]
        done = population(
            objective,
            model.init,
            [tables[seed] for _, _, seed in runs],
            self.tune,
            [seed for _, _, seed in runs],
            hyper={
                "lr": np.array([self.lrs[lr] for _, lr, _ in runs], np.float32),
                "loss": np.array([name for name, _, _ in runs], np.int32),
            },
            axes=model.axes,
            frozen={"teacher": self.taught[1]} if live else (),
            probe=_named(model),
            data=self._held[0],
            points=1,
            # convolutions are slower side by side than one after another
            mode="auto" if isinstance(model.config, Mlp) else "map",
        )
        if done.failed:
            name, lr, _ = runs[done.failed[0]]
            raise UserError(f"{names[name]} became NaN at lr {self.lrs[lr]:g}: lower --picture-lrs")
        right = done.curve[:, 0] == self._held[1][None]
        fold = partial(jax.tree.map, lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]))
        return fold(right), fold(done.params)

    def _dev(self, right: np.ndarray) -> np.ndarray:
        """Accuracy on dev [names, lrs], which makes every choice."""
        return right[..., : self.dev].mean((-1, -2))

    def rows(self, right: np.ndarray, names: Sequence[str], **label: Any) -> Iterator[Row]:
        """A row per loss, learning rate and seed; dev chooses the rate of each loss."""
        dev, test = right[..., : self.dev].mean(-1), right[..., self.dev :].mean(-1)
        best = self._dev(right).argmax(-1)
        for at in np.ndindex(test.shape):
            row: Row = dict(block="pictures", **label, divergence=names[at[0]], seed=at[2])
            row |= dict(lr=self.lrs[at[1]], accuracy=float(test[at]), dev=float(dev[at]))
            yield row | dict(chosen=int(at[1] == best[at[0]]))

    def teacher_row(self) -> Row:
        """The teacher on the test."""
        model, params = self.taught
        right = np.asarray(_named(model)(params, data=self._held[0])) == self._held[1]
        score = float(right[self.dev :].mean())
        return dict(block="pictures", part="teacher", student=self.teacher, accuracy=score, seed=0)

    # What is compared

    def compared(self, student: str, mode: str) -> Iterator[Row]:
        """All losses; "stored" logits of the pictures as they are, or a "live" teacher that sees
        the moved pictures that the student sees."""
        model, names = self.model(student), list(self.losses)
        live = mode == "live"

        def objective(row: Mapping[str, Array]) -> Any:
            loss = one_of([LOSSES[name] for name in names], row["loss"])
            teacher = self.taught[0] if live else None
            aim = distill_classes(model, loss, teacher=teacher, targets=True)
            return augmented(aim, self._move) if live else aim

        count = self.labels[0]
        right, _ = self.trained(model, objective, names, count, live=live)
        label = dict(part="losses", student=student, mode=mode, count=count)
        yield from self.rows(right, names, **label)

    def counts(self, student: str, names: tuple[str, ...] = ("ce", "kd T=4")) -> Iterator[Row]:
        """Labels alone against distillation, by the number of rows."""
        model = self.model(student)
        losses = [LOSSES[name] for name in names]

        def objective(row: Mapping[str, Array]) -> Any:
            return distill_classes(model, one_of(losses, row["loss"]), targets=True)

        for count in sorted(self.labels):
            right, _ = self.trained(model, objective, names, count)
            label = dict(part="counts", student=student, mode="stored", count=count)
            yield from self.rows(right, names, **label)

    def matches(self, student: str) -> Iterator[Row]:
        """Features of a live teacher matched beside distillation from it; dev chooses how much of
        the usual weight each gets, together with the learning rate."""
        teacher, count, base = self.taught[0], self.labels[0], self.model(student)
        aim = partial(_beside, LOSSES["kd T=4"])
        for name in ("none", *MATCHES):
            shares = SHARES if name != "none" else (0.0,)
            terms = [_term(name, 1.0)] if name != "none" else []
            model = with_projections(base, teacher, terms, self.told)

            def objective(row: Mapping[str, Array], name: str = name) -> Any:
                share = jnp.asarray(SHARES)[row["loss"]]
                terms = [_term(name, share)] if name != "none" else []
                return match(base, teacher, terms, aim)

            names = [f"{name} x {share:g}" for share in shares]
            right, _ = self.trained(model, objective, names, count, live=True)
            best = int(self._dev(right).max(-1).argmax())
            label: Row = dict(part="matches", student=student, mode="live", count=count)
            label["share"] = shares[best]
            yield from self.rows(right[best : best + 1], [name], **label)

    def generations(self, student: str, many: int = 3) -> Iterator[Row]:
        """Born-again networks (``pipelines.distillation.generations``), a population of them: the
        first learns the labels, ``many`` further ones their parents; one size, the same rows."""
        model, count = self.model(student), self.labels[0]
        tables = [self.told.take(index) for index in self.drawn(count)]
        shown = {"image": np.stack([np.asarray(table["image"]) for table in tables])}
        say = jax.jit(jax.vmap(_logits(model)))

        def train(number: int, last: tuple[list[Row], Params] | None) -> tuple[list[Row], Params]:
            name, taught = "ce", tables
            if last is not None:
                name, told = "kd T=2", np.asarray(say(last[1], shown))
                taught = [
                    table.with_columns(teacher={"classes": told[seed]})
                    for seed, table in enumerate(tables)
                ]
            aim = distill_classes(model, LOSSES[name], targets=True)
            right, params = self.trained(model, lambda row: aim, [name], count, tables=taught)
            label = dict(part="generations", student=student, mode="stored", count=number)
            best = int(self._dev(right)[0].argmax())
            chosen = jax.tree.map(lambda leaf: leaf[0, best], params)
            return list(self.rows(right, [name], **label)), chosen

        for rows, _ in generations(train, count=many + 1):
            yield from rows


def _term(name: str, share: Any) -> Term:
    loss, weight, head = MATCHES[name]
    tap = -2 if name == "attention" else -1  # the last maps; the others match the embeddings
    return Term(loss, tap, tap, weight=share * weight, head=head)


def _beside(loss: Callable[..., Array], student: Model, teacher: Model) -> Any:
    return distill_classes(student, loss, teacher=teacher, targets=True)


def _logits(model: Model) -> Callable[[Params, Batch], Array]:
    return lambda params, batch: forward(model, params, batch).logits


def _named(model: Model) -> Callable[..., Array]:
    """The classes [N] that weights name for the pictures of ``data``."""
    return lambda params, data: forward(model, params, data).logits.argmax(-1)
