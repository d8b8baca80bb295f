"""The distillation zoo on decoders: divergences x {stored, live, on-policy} x student sizes.

Every student starts from pretrained weights and learns from one teacher on solved problems of the
arithmetic world. The runs of one student in one mode (divergences x learning rates x seeds) are
one population program, which also measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import columns
from w2s_jax.annotate import predict
from w2s_jax.columns import digest
from w2s_jax.data import arithmetic
from w2s_jax.data.packing import with_targets
from w2s_jax.data.text import encode
from w2s_jax.errors import UserError
from w2s_jax.generate.inside import ask, respond
from w2s_jax.losses import distillation as dense
from w2s_jax.losses import sparse
from w2s_jax.losses.classification import ramp
from w2s_jax.models import hf
from w2s_jax.objectives import distill, on_policy, predicted
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import one_of, population
from w2s_jax.types import Array, Batch, Model, Params, Row, Table, Tree

TRAIN, HELD = 81_000_000, 80_000_000  # seeds of problems that never meet
ROWS = 50  # held-out rows that are looked at together
LIKELY = 0.01  # what the teacher gives less is a stray token


def sft(student: Array, teacher: Any, ids: Array) -> Array:
    """Cross-entropy to the token that is there, [...] nats: no distillation at all."""
    logps = jax.nn.log_softmax(student.astype(jnp.float32))
    return -jnp.take_along_axis(logps, ids[..., None], axis=-1)[..., 0]


def blind(divergence: Callable[..., Array], **bound: Any) -> Callable[..., Array]:
    """A divergence that is handed the targets and does not look at them."""

    def told(student: Array, teacher: Any, ids: Array, **scheduled: Any) -> Array:
        return divergence(student, teacher, **scheduled)

    return partial(told, **bound)


KINDS: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "forward_kl": (dense.forward_kl, {}),
    "reverse_kl": (dense.reverse_kl, {}),
    "jsd": (dense.jsd, {"beta": 0.5}),
    "skew_kl": (dense.skew_kl, {"alpha": 0.1}),
    "skew_reverse_kl": (dense.skew_reverse_kl, {"alpha": 0.1}),
    "total_variation": (dense.total_variation, {}),
    "adaptive_kl": (dense.adaptive_kl, {}),
    "taid": (dense.taid, {"t": ramp(0.4, 1.0, over=1.0)}),  # the linear ramp of its schedule
}
STORED = {
    name: blind(partial(sparse.top_k, divergence=kind), **bound)
    for name, (kind, bound) in KINDS.items()
} | {"renormalised": blind(sparse.renormalised), "sft": sft}
DENSE = {name: blind(kind, **bound) for name, (kind, bound) in KINDS.items()}
LOSSES: dict[str, dict[str, Callable[..., Array]]] = {
    "stored": STORED,
    "live": DENSE | {"sft": sft},
    "on-policy": DENSE,
}
"""What a student can learn by in each mode: own answers are no labels for sft."""


@dataclass(frozen=True, eq=False)
class Zoo:
    """What all runs share.

    ``problems`` are each seed's own; ``dev`` and ``test`` count the held-out ones that choose
    learning rates and that are reported, ``own`` those of each that students answer themselves.
    ``length`` and ``answer`` are the most tokens of a problem with its solution and of the latter;
    ``top`` is how many tokens a stored teacher keeps, ``steps`` how long problems are.
    """

    ctx: Context
    teacher: str
    seeds: int
    problems: int
    dev: int
    test: int
    own: int
    length: int
    answer: int
    top: int
    steps: tuple[int, ...]
    lrs: tuple[float, ...]
    tune: Tune

    @cached_property
    def said(self) -> tuple[Model, Params, Tokenizer]:
        """The teacher."""
        return hf.load(self.teacher)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        if self.said[2].eos is None:
            raise UserError(f"{self.teacher} has no end token: answers would never end")
        return self.said[2].eos

    def table(self, seed: int, count: int, avoid: Collection[str] = ()) -> Table:
        """``count`` solved problems as tokens, with ``targets`` and ``asked``."""
        tokenizer = self.said[2]
        drawn = arithmetic.draw(seed, count + count // 8, steps=self.steps, avoid=avoid)
        made, _ = encode(arithmetic.tabulate(drawn), tokenizer, length=self.length, eos=True)
        if len(made) < count:
            raise UserError(f"too few problems fit in {self.length} tokens: raise --length")
        made = with_targets(made.take(np.arange(count)), multiple=self.answer)
        if made["targets"]["ids"].shape[1] != self.answer:
            raise UserError(f"solutions of more than {self.answer} tokens: raise --answer")
        room = self.length - self.answer
        return ask(made, self.said[0], tokenizer, tokens=self.answer, length=room)

    @cached_property
    def held_out(self) -> Table:
        """Dev problems, then test problems."""
        if (self.dev + self.test) % ROWS:
            raise UserError(
                f"dev ({self.dev}) and test ({self.test}) must add up to a multiple of {ROWS}"
            )
        return self.table(HELD, self.dev + self.test)

    @cached_property
    def tables(self) -> list[Table]:
        """What each seed trains on."""
        avoid = set(self.held_out["question"])
        return [self.table(TRAIN + seed, self.problems, avoid) for seed in range(self.seeds)]

    def run(self, student: str, mode: str, names: list[str]) -> Iterator[Row]:
        """Rows of one student under one mode: every divergence, the learning rate chosen on dev."""
        model, params, tokenizer = hf.load(student)
        if tokenizer.digest() != self.said[2].digest():
            raise UserError(f"{student} and {self.teacher} have different tokenizers")
        found = self.ctx.stage(
            f"tokens-{mode}",
            dict(
                student=digest(params), teacher=digest(self.said[1]), names=names, tune=self.tune,
                lrs=self.lrs, top=self.top, answer=self.answer, own=self.own, dev=self.dev,
                tables=[table.digest() for table in (*self.tables, self.held_out)],
            ),
            lambda: self._train(model, params, mode, names),
        )  # fmt: skip
        start = self.ctx.stage(
            "tokens-start",
            dict(
                student=digest(params), teacher=digest(self.said[1]),
                table=self.held_out.digest(), own=self.own, dev=self.dev,
            ),
            lambda: self._look(model, params),
        )  # fmt: skip
        yield from self._rows(student, mode, names, found, start)

    def _train(self, model: Model, params: Params, mode: str, names: list[str]) -> Tree:
        """What ``_probe`` says of every run, [names, lrs, seeds] per leaf."""
        teacher, weights, _ = self.said
        runs = [(n, lr, s) for n in range(len(names)) for lr in self.lrs for s in range(self.seeds)]
        self.ctx.say(f"  {mode}: {len(runs)} runs of {self.tune.total(self.problems)} updates")
        losses = [LOSSES[mode][name] for name in names]
        tables = self.tables
        if mode == "stored":
            folder = self.ctx.folder("teacher", {"weights": digest(weights), "top": self.top})
            store = partial(columns.add_teacher, teacher, weights, k=self.top, folder=folder)
            tables = [store(tables=table, progress=False) for table in tables]
            tables = [t.with_columns(teacher=_loaded(t["teacher"])) for t in tables]
        tables = [_only(table, mode) for table in tables]

        def objective(row: Mapping[str, Array]) -> Any:
            loss = one_of(losses, row["divergence"])
            if mode == "stored":
                return distill(model, loss, targets=True)
            if mode == "live":
                return distill(model, loss, teacher=teacher, targets=True)
            how: Any = dict(tokens=self.answer, eos=self.end, targets=True)
            return on_policy(model, loss, teacher=teacher, **how)

        done = population(
            objective,
            params,
            [tables[seed] for _, _, seed in runs],
            self.tune,
            [seed for _, _, seed in runs],
            hyper={
                "lr": np.array([lr for _, lr, _ in runs], np.float32),
                "divergence": np.array([name for name, _, _ in runs], np.int32),
            },
            axes=model.axes,
            frozen={"teacher": weights} if mode != "stored" else (),
            probe=_probe(model, teacher, self.answer, self.end),
            data=self._data,
            points=1,
        )
        if done.failed:
            name, lr, _ = runs[done.failed[0]]
            raise UserError(f"{names[name]} became NaN at lr {lr:g} ({mode}): lower --lrs")
        shape = (len(names), len(self.lrs), self.seeds)
        return jax.tree.map(lambda leaf: leaf[:, 0].reshape(*shape, -1), done.curve)

    def _look(self, model: Model, params: Params) -> Tree:
        """The same of the student as it was."""
        look = jax.jit(_probe(model, self.said[0], self.answer, self.end))
        return jax.tree.map(np.asarray, look(params, data=self._data))

    @cached_property
    def _data(self) -> Tree:
        """Held-out rows in blocks, with what the teacher says of them; prompts to be answered."""
        teacher, weights, _ = self.said
        table = self.held_out
        said = predict(_logits(teacher), weights, table, batch=ROWS)
        names = ("tokens", "segment", "position", "targets")
        batch = {**Table({n: table[n] for n in names}).batch(np.arange(len(table))), "said": said}
        blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, ROWS, *leaf.shape[1:]), batch)
        index = [*range(self.own), *range(self.dev, self.dev + self.own)]
        prompts = table.take(index).batch(np.arange(len(index)))["asked"]
        return {"blocks": blocks, "asked": prompts, "teacher": weights}

    def _rows(
        self, student: str, mode: str, names: list[str], found: Tree, start: Tree
    ) -> Iterator[Row]:
        """One row per divergence and seed at the learning rate that dev chose, and all rates."""
        dev = slice(None, self.dev)
        best = found["chance"][..., dev].mean((-1, -2)).argmax(-1)
        label = dict(block="tokens", mode=mode, student=student)
        for number, name in enumerate(names):
            for i, lr in enumerate(self.lrs):
                for seed in range(self.seeds):
                    one = jax.tree.map(lambda leaf, at=(number, i, seed): leaf[at], found)
                    row = dict(**label, divergence=name, seed=seed, lr=lr)
                    row |= self._scores(one) | {"chosen": int(i == best[number])}
                    yield row
        yield dict(**label, divergence="start", seed=0, lr=0.0, **self._scores(start), chosen=1)

    def _scores(self, seen: Mapping[str, np.ndarray]) -> Row:
        """Means over the test problems, nats per token where a unit is due."""
        test, own = slice(self.dev, None), slice(self.own, None)  # of all rows, of own answers
        row = {"sampled": float(seen["chance"][test].mean())}
        for name in ("forward", "reverse", "nll", "entropy", "stray"):
            row[name] = float(seen[name][test].sum() / seen["count"][test].sum())
        drift = seen["own_reverse"][own].sum() / max(seen["own_count"][own].sum(), 1)
        row["own_reverse"] = float(drift)
        row["exposure"] = row["own_reverse"] - row["reverse"]
        row["dev"] = float(seen["chance"][: self.dev].mean())
        return row


def _loaded(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A stored column as arrays: a population keeps its tables on the device."""
    return {name: np.asarray(leaf[np.arange(len(leaf))]) for name, leaf in stored.items()}


def _only(table: Table, mode: str) -> Table:
    """The columns that a mode trains on."""
    names = {"tokens", "segment", "position", "targets"}
    names |= {"stored": {"teacher"}, "live": set(), "on-policy": {"asked"}}[mode]
    return Table({name: table[name] for name in names})


def _logits(model: Model) -> Callable[[Params, Batch], Array]:
    def say(params: Params, batch: Batch) -> Array:
        mine = predicted(model, params, batch)
        return mine.hidden @ mine.unembed

    return say


def _probe(model: Model, teacher: Model, answer: int, eos: int) -> Callable[..., dict[str, Array]]:
    """``(params, data) -> {name: [N]}``: sums over each held-out row's solution, and over answers
    that the student samples itself (``own_``)."""
    say, hear = _logits(model), _logits(teacher)

    def row_sums(params: Params, block: Batch) -> dict[str, Array]:
        targets = block["targets"]
        parts = _compared(say(params, block), block["said"], targets["ids"])
        sums = {name: (value * targets["mask"]).sum(-1) for name, value in parts.items()}
        return sums | {"count": targets["mask"].sum(-1), "chance": jnp.exp(-sums["nll"])}

    def probe(params: Params, data: Tree) -> dict[str, Array]:
        seen = jax.lax.map(partial(row_sums, params), data["blocks"])
        seen = {name: value.reshape(-1) for name, value in seen.items()}
        own = respond(model, params, data["asked"], jax.random.key(0), tokens=answer, eos=eos)
        mask = own["targets"]["mask"]
        parts = _compared(say(params, own), hear(data["teacher"], own), own["targets"]["ids"])
        return seen | {
            "own_reverse": (parts["reverse"] * mask).sum(-1),
            "own_count": mask.sum(-1),
        }

    return probe


def _compared(student: Array, teacher: Array, ids: Array) -> dict[str, Array]:
    """What two sets of logits [B,M,V] say of each other and of ``ids``, [B,M] each, nats."""
    q, p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return {
        "forward": (jnp.exp(p) * (p - q)).sum(-1),
        "reverse": (jnp.exp(q) * (q - p)).sum(-1),
        "nll": -jnp.take_along_axis(q, ids[..., None], axis=-1)[..., 0],
        "entropy": -(jnp.exp(q) * q).sum(-1),
        "stray": jnp.where(jnp.exp(p) < LIKELY, jnp.exp(q), 0.0).sum(-1),
    }
