"""The stages of weak-to-strong generalization, each for all seeds at once.

``learn`` trains one side (a pretrained body with a classification head) on S tables and keeps only
what it says of other rows; everything else is which labels it is given: the truth (supervisor,
ceiling), a supervisor's (student), a student's (bootstrapping, strong-to-strong).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from w2s_jax.annotate import predict, probabilities
from w2s_jax.data import text
from w2s_jax.data.tasks import Splits
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.models import hf
from w2s_jax.models.heads import Head, attach, classifier, features, linear
from w2s_jax.objectives import classify, language
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import one_of, population
from w2s_jax.types import Array, Batch, Model, Objective, Params, State, Table, Tree
from w2s_jax.workdir import digest

CHUNK = 100  # rows of a test set scored at once inside a population program
SERIAL = 200_000_000  # weights above which runs follow one another, sharded over the mesh


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models: a classifier around pretrained weights, ready to be trained.

    ``params`` are where every run starts, or stacked [S, ...] when ``stacked`` (each run its own
    start). ``size`` counts the weights of the pretrained body.
    """

    name: str
    model: Model
    params: Params
    tokenizer: Tokenizer
    size: int
    stacked: bool = False

    @property
    def body(self) -> Model:
        """The pretrained model under the head."""
        return self.model.config.body

    def digest(self) -> str:
        """Content hash of weights, architecture, tokenizer and head: the key of cached stages."""
        head = self.model.config
        if isinstance(head, Head):
            head = (head.body.config, head.classes, head.feature, head.probe)
        return f"{hf.fingerprint(self.params)}-{self.tokenizer.digest()}-{digest(head)}"


@dataclass(frozen=True)
class Learned:
    """What S trained runs say, class probabilities float32.

    ``test`` [S,N,C] of the test rows; ``ask`` [S,M,C] of each run's own other rows (M = 0 if none
    were asked); ``curve`` [S,P,N,C] of the test rows after ``steps`` [P] updates.
    """

    test: np.ndarray
    ask: np.ndarray
    curve: np.ndarray
    steps: np.ndarray

    def pick(self, runs: Sequence[int] | np.ndarray) -> Learned:
        """Some of the runs."""
        return Learned(self.test[runs], self.ask[runs], self.curve[runs], self.steps)


def join(parts: Sequence[Learned]) -> Learned:
    """The runs of all parts, one after another; of one length and looked at equally often."""
    names = ("test", "ask", "curve")
    whole = {name: np.concatenate([getattr(one, name) for one in parts]) for name in names}
    return Learned(**whole, steps=parts[0].steps)


def side(name: str, *, feature: str = "last", mesh: Any = None) -> Side:
    """Load a pretrained model (folder, hub id or shipped name) and put a zero head on it.

    Raises:
      UserError: see ``models.hf.load``.
    """
    body, params, tokenizer = hf.load(name, mesh=mesh)
    model = _classifier(body, feature)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Side(name, model, attach(model, params), tokenizer, size)


def reheaded(given: Side, feature: str) -> Side:
    """The side with a fresh head that reads ``feature`` (see ``models.heads.classifier``)."""
    model = _classifier(given.body, feature)
    return replace(given, model=model, params=attach(model, given.params["body"]))


@lru_cache(maxsize=64)
def _classifier(body: Model, feature: str) -> Model:
    return classifier(body, 2, feature)


def readable(
    splits: Sequence[Splits],
    tokenizers: Sequence[Tokenizer],
    length: int,
    limits: Mapping[str, int] | None = None,
) -> list[Splits]:
    """Splits whose rows every tokenizer keeps within ``length`` tokens, with BOS and EOS.

    The rows that are left are balanced again and cut to what the seed with the fewest has, so that
    all seeds are one program and rows stay aligned between tokenizers. ``limits`` are the most rows
    per split (even; default all). ``dev`` is left alone: the study stops on rows of ``test``.

    Raises:
      UserError: a split without a readable row of some class.
    """
    distinct = list({t.digest(): t for t in tokenizers}.values())
    parts = {}
    for name in ("train", "transfer", "test"):
        tables = [getattr(one, name) for one in splits]
        rows = [_readable_rows(table, distinct, length) for table in tables]
        most = min(len(side) for sides in rows for side in sides)
        most = min(most, (limits or {}).get(name, 2 * most) // 2)
        if most == 0:
            raise UserError(
                f"split {name!r} has no row of some class in {length} tokens; raise --length"
            )
        kept = [np.sort(np.concatenate([side[:most] for side in sides])) for sides in rows]
        parts[name] = [table.take(index) for table, index in zip(tables, kept, strict=True)]
    return [
        replace(one, **{name: tables[i] for name, tables in parts.items()})
        for i, one in enumerate(splits)
    ]


def _readable_rows(table: Table, tokenizers: Sequence[Tokenizer], length: int) -> list[np.ndarray]:
    """The rows of each class that are short enough for every tokenizer."""
    texts = [p + r for p, r in zip(table["prompt"], table["response"], strict=True)]
    kept = np.ones(len(table), bool)
    for tokenizer in tokenizers:
        kept &= np.array([len(ids) + 2 <= length for ids in tokenizer.encode_ids(texts)])
    return [np.flatnonzero(kept & (np.asarray(table["truth"]) == side)) for side in (0, 1)]


def tokenised(tables: Sequence[Table], tokenizer: Tokenizer, length: int) -> list[Table]:
    """Each table with token columns ``length`` wide.

    Raises:
      UserError: a row of more tokens (see ``readable``), and what ``text.tokenise`` raises.
    """
    return [text.tokenise(table, tokenizer, length=length, on_long="error") for table in tables]


def learn(
    given: Side,
    tables: Sequence[Table],
    tune: Tune,
    seeds: Sequence[int],
    *,
    test: Table,
    ask: Sequence[Table] | None = None,
    losses: Sequence[Callable[..., Array]] = (soft_xent,),
    which: Sequence[int] | None = None,
    rows: np.ndarray | None = None,
    points: int = 1,
    devices: Sequence[Any] | None = None,
    mesh: Any = None,
) -> Learned:
    """Train S runs and keep what they say.

    Args:
      tables: [S] training rows with ``label``.
      seeds: [S]; a seed fixes the order of the rows.
      test: rows whose predictions are followed over training (``points`` looks) and kept.
      ask: [S] further rows to label once trained.
      losses, which: run i trains with ``losses[which[i]]``; all in one program.
      rows: [S,n] rows of each table to train on; default all.
      devices: where the runs are spread; default all local ones.
      mesh: what each run of a model above ``SERIAL`` weights is sharded over.

    Raises:
      UserError: a run that became NaN, and what ``population`` raises.
    """
    chosen = np.zeros(len(seeds), np.int32) if which is None else np.asarray(which, np.int32)
    objective = _objective(given.model, tuple(losses))
    ask = [] if ask is None else ask
    if given.size > SERIAL:
        starts = _starts(given, len(seeds))
        parts = [
            _one(start, objective({"loss": int(loss)}), table, tune, seed, test, more, points, mesh)
            for start, loss, table, seed, more in zip(
                starts, chosen, _rows(tables, rows), seeds, ask or [None] * len(seeds), strict=True
            )
        ]
        return join(parts)
    done = population(
        objective,
        given.params,
        tables,
        tune,
        seeds,
        hyper={"loss": chosen},
        rows=rows,
        stacked=given.stacked,
        axes=given.model.axes,
        probe=_look(given.model),
        data=_chunks(test),
        points=points,
        devices=devices,
    )
    if done.failed:
        raise UserError(
            f"{given.name}: runs {list(done.failed)} became NaN; lower the learning rate"
        )
    curve = done.curve[:, :, : len(test)]
    asked = answer(given.model, done.params, ask) if ask else _nothing(curve)
    return Learned(curve[:, -1], asked, curve, done.steps)


def _rows(tables: Sequence[Table], rows: np.ndarray | None) -> list[Table]:
    if rows is None:
        return list(tables)
    return [table.take(chosen) for table, chosen in zip(tables, rows, strict=True)]


def _nothing(curve: np.ndarray) -> np.ndarray:
    return np.zeros((len(curve), 0, curve.shape[-1]), np.float32)


def _starts(given: Side, runs: int) -> Iterator[Side]:
    """The side that each run starts from."""
    for i in range(runs):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], given.params) if given.stacked else None
        yield given if mine is None else replace(given, params=mine, stacked=False)


def _one(
    given: Side,
    objective: Objective,
    table: Table,
    tune: Tune,
    seed: int,
    test: Table,
    ask: Table | None,
    points: int,
    mesh: Any,
) -> Learned:
    """One run of a large model, sharded over ``mesh``."""
    say, steps = _say(given.model), tune.total(len(table))
    stops = np.round(np.linspace(0, steps, points + 1)).astype(int)[1:]
    curve: list[np.ndarray] = []

    def look(state: State) -> dict[str, float]:
        if int(state.step) in stops:
            curve.append(predict(say, state.params, test, mesh=mesh))
        return {}

    state = fit(
        objective,
        given.params,
        table,
        tune,
        jax.random.key(seed),
        axes=given.model.axes,
        mesh=mesh,
        evaluate=look,
        eval_every=int(np.gcd.reduce(stops)),
    )
    seen = np.stack(curve)[None]
    asked = _nothing(seen) if ask is None else predict(say, state.params, ask, mesh=mesh)[None]
    return Learned(seen[:, -1], asked, seen, stops)


def answer(model: Model, params: Params, tables: Sequence[Table]) -> np.ndarray:
    """Class probabilities [S,M,C] of S runs (``params`` [S, ...]), each on its own table."""
    say = _say(model)
    runs = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(len(tables))]
    return np.stack([predict(say, p, table) for p, table in zip(runs, tables, strict=True)])


@lru_cache(maxsize=64)
def _say(model: Model) -> Callable[[Params, Batch], Tree]:
    return probabilities(model)


@lru_cache(maxsize=64)
def _objective(model: Model, losses: tuple[Callable[..., Array], ...]) -> Callable[[Any], Any]:
    """One run's objective from the number of its loss."""
    return lambda hyper: classify(model, one_of(losses, hyper["loss"]))


@lru_cache(maxsize=64)
def _look(model: Model) -> Callable[[Params, Tree], Array]:
    """Probabilities [N,C] of rows in chunks [K,CHUNK,...]."""

    def look(params: Params, data: Tree) -> Array:
        say = _say(model)
        parts = jax.lax.map(lambda rows: say(params, rows), data)
        return parts.reshape(-1, parts.shape[-1])

    return look


def _chunks(table: Table) -> Tree:
    """The rows of a table as [K,CHUNK,...], the last row repeated to fill up."""
    count = -(-len(table) // CHUNK)
    index = np.minimum(np.arange(count * CHUNK), len(table) - 1)
    rows = {k: v for k, v in table.batch(index).items() if k != "label"}
    return jax.tree.map(lambda leaf: leaf.reshape(count, CHUNK, *leaf.shape[1:]), rows)


def adapt(given: Side, tables: Sequence[Table], tune: Tune, seeds: Sequence[int]) -> Side:
    """Generative fine-tuning: language modelling on the task's text, labels unseen.

    Burns et al. 2023 (reward modelling): both good and bad responses, before any weak label. Run
    i reads ``tables[i]``, so the result is a stacked side. The whole text is trained on.

    Raises:
      UserError: a run that became NaN.
    """
    body = given.body
    texts = [_as_text(table) for table in tables]
    done = population(_language(body), given.params["body"], texts, tune, seeds, axes=body.axes)
    if done.failed:
        raise UserError(
            f"{given.name}: generative runs {list(done.failed)} became NaN; lower its lr"
        )
    params = jax.vmap(lambda one: attach(given.model, one))(done.params)
    return replace(given, params=params, stacked=True)


@lru_cache(maxsize=16)
def _language(body: Model) -> Any:
    return language(body)


def _as_text(table: Table) -> Table:
    """Every real token but the first is a target."""
    mask = (np.asarray(table["segment"]) > 0).astype(np.float32)
    mask[:, 0] = 0.0
    names = ("tokens", "segment", "position")
    return Table({**{name: table[name] for name in names}, "mask": mask})


def frozen(given: Side, tables: Sequence[Table]) -> tuple[Side, list[Table]]:
    """The linear-probe form: tables of what the untouched body says, and a linear side on them."""
    see = _see(given.model)
    cache: dict[int, np.ndarray] = {}

    def column(table: Table) -> np.ndarray:
        key = id(table["tokens"])
        if key not in cache:
            cache[key] = predict(see, given.params, table)
        return cache[key]

    probes = []
    for table in tables:
        kept = {name: table[name] for name in ("label", "truth") if name in table}
        probes.append(Table({"features": column(table), **kept}))
    model = _linear(probes[0]["features"].shape[-1])
    return replace(given, model=model, params=model.init(jax.random.key(0))), probes


@lru_cache(maxsize=64)
def _see(model: Model) -> Callable[[Params, Batch], Array]:
    return lambda params, batch: features(model, params, batch)


@lru_cache(maxsize=64)
def _linear(width: int) -> Model:
    return linear(2, width)


def hard(probabilities: np.ndarray) -> np.ndarray:
    """One-hot argmax, float32, of probabilities [...,C]."""
    return np.eye(probabilities.shape[-1], dtype=np.float32)[probabilities.argmax(-1)]


def flip(truth: np.ndarray, wrong: int, seed: int) -> np.ndarray:
    """One-hot labels [N,2] of ``truth`` [N] with ``wrong`` of them, chosen at random, turned over:
    a supervisor whose errors follow no pattern."""
    labels = np.asarray(truth).copy()
    chosen = np.random.default_rng(seed).choice(len(labels), wrong, replace=False)
    labels[chosen] = 1 - labels[chosen]
    return np.eye(2, dtype=np.float32)[labels]


def relabel(table: Table, probabilities: np.ndarray) -> Table:
    """The table with a model's probabilities [N,C] in place of its labels; the truth leaves too."""
    return table.without("truth").with_columns(label=np.asarray(probabilities, np.float32))
