"""Delta learning: answers of weak models, pairs of them, and training on the pairs.

The recipe of Geng et al. 2025 (Tulu-3 students on Qwen2.5 answers): the larger of two weak models
answers better on average, so its answers are ``chosen``; no judge looks at them. Here for models
that train side by side, one run per seed; ``delta_recipe`` is the same for one large model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import columns
from w2s_jax.annotate import surprise
from w2s_jax.data.pairs import alike, pack_pairs
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import generate
from w2s_jax.losses.preference import dpo
from w2s_jax.models import hf
from w2s_jax.objectives import language, prefer
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Array, Model, Objective, Params, Table

PER_ROW = 4  # pairs in a packed row
ROWS = 32  # rows of the test that are scored at once
GRAIN = 32  # their lengths are rounded up to this
Answers = list[list[int]]  # token ids of each answer


class Method(NamedTuple):
    """A preference loss as ``objectives.prefer`` takes it."""

    loss: Callable[..., Array] = partial(dpo, beta=5.0)
    length_mean: bool = True
    reference: str = "column"
    nll: float = 0.0


@dataclass(frozen=True, eq=False)
class Runs:
    """A model whose S runs have weights of their own: ``params`` [S, ...] per leaf."""

    name: str
    model: Model
    params: Params
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.params)[0])

    def run(self, i: int) -> Params:
        """The weights of run ``i``."""
        return jax.tree.map(lambda leaf: leaf[i], self.params)


@dataclass(frozen=True, eq=False)
class Trained:
    """What training made of ``Runs`` under one learning rate.

    ``chances`` [S,N] of the test's rows (see ``chances``), [S,points,N] in ``curve`` after the
    numbers of updates in ``steps``; ``metrics`` [S,updates] are those of the objective.
    """

    runs: Runs
    lr: float
    chances: np.ndarray
    curve: np.ndarray
    steps: np.ndarray
    metrics: dict[str, np.ndarray]


def loaded(name: str, runs: int) -> Runs:
    """A pretrained model, the same weights for every run."""
    model, params, tokenizer = hf.load(name)
    params = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (runs, *leaf.shape)), params)
    return Runs(name, model, params, tokenizer)


def fine_tuned(
    given: Runs, tables: Sequence[Table], tune: Tune, test: Table, *, lrs: Sequence[float] = ()
) -> list[Trained]:
    """Run i after supervised fine-tuning on ``tables[i]`` (columns of ``tokenise``), once per
    learning rate (default: that of ``tune``).

    Raises:
      UserError: a run that became NaN.
    """
    return _trained(given, _language(given.model), tables, tune, test, lrs, 1)


def preferred(
    given: Runs,
    tables: Sequence[Table],
    tune: Tune,
    test: Table,
    *,
    method: Method,
    lrs: Sequence[float] = (),
    points: int = 1,
) -> list[Trained]:
    """Run i after preference training on the pairs of ``tables[i]`` (see ``paired``), once per
    learning rate; ``tune.batch`` counts pairs. Looks at the test ``points`` times.

    Raises:
      UserError: a run that became NaN; a batch that is no multiple of the pairs in a row.
    """
    if tune.batch % PER_ROW:
        raise UserError(f"a batch of {tune.batch} pairs is no multiple of {PER_ROW}")
    rows = replace(tune, batch=tune.batch // PER_ROW)
    return _trained(given, _prefer(given.model, method), tables, rows, test, lrs, points)


def _trained(
    given: Runs,
    objective: Objective,
    tables: Sequence[Table],
    tune: Tune,
    test: Table,
    lrs: Sequence[float],
    points: int,
) -> list[Trained]:
    """All learning rates and seeds as one population; the test is scored inside it."""
    lrs = list(lrs) or [tune.lr]
    seeds, (data, place) = len(given), _in_rows(test)
    done = population(
        objective,
        jax.tree.map(lambda leaf: np.concatenate([leaf] * len(lrs)), given.params),
        [*tables] * len(lrs),
        tune,
        [*range(seeds)] * len(lrs),
        hyper={"lr": np.repeat(np.array(lrs, np.float32), seeds)},
        stacked=True,
        axes=given.model.axes,
        probe=_chances(given.model),
        data=data,
        points=points,
    )
    if done.failed:
        worst = sorted({lrs[i // seeds] for i in done.failed})
        raise UserError(f"{given.name}: runs became NaN at lr {worst}; lower the learning rate")
    curves = _joined(done.curve, 2)[..., place]
    made = []
    for i, lr in enumerate(lrs):
        part = slice(i * seeds, (i + 1) * seeds)
        runs = replace(given, params=jax.tree.map(lambda leaf, p=part: leaf[p], done.params))
        curve = curves[part]
        metrics = {name: values[part] for name, values in done.metrics.items()}
        made.append(Trained(runs, lr, curve[:, -1], curve, done.steps, metrics))
    return made


# One function per model and method, so that a population's program is compiled once.


@lru_cache(maxsize=64)
def _language(model: Model) -> Objective:
    return language(model)


@lru_cache(maxsize=64)
def _prefer(model: Model, method: Method) -> Objective:
    return prefer(model, **method._asdict())


@lru_cache(maxsize=64)
def _chances(model: Model) -> Callable[[Params, Any], list[Array]]:
    """Chances [n,ROWS] of each group of rows that ``_in_rows`` made."""
    look = surprise(model)

    def chances(params: Params, data: Any) -> list[Array]:
        return [jax.lax.map(lambda part: jnp.exp(-look(params, part)["nll"]), g) for g in data]

    return chances


def _in_rows(test: Table) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Tokens and mask [n,ROWS,T] of the test's rows in groups of like length, the last row of each
    group repeated to fill up; and where each row [N] then stands."""
    length = test["mask"].shape[1]
    sizes = np.max(np.where(np.asarray(test["mask"]) > 0, np.arange(length) + 1, 0), 1)
    groups, place, at = [], np.zeros(len(test), np.int64), 0
    for size, index in _like_length(np.minimum(-(-sizes // GRAIN) * GRAIN, length)):
        count = _filled(len(index))
        part = test.batch(index[np.minimum(np.arange(count), len(index) - 1)])
        groups.append({k: part[k][:, :size].reshape(-1, ROWS, size) for k in ("tokens", "mask")})
        place[index] = at + np.arange(len(index))
        at += count
    return groups, place


def _like_length(width: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Widths and the rows of each, ascending. Rows join the next width where that makes no more
    tokens with the filling: each width is a program of its own."""
    found: list[tuple[int, np.ndarray]] = []
    for size in np.unique(width):
        index = np.flatnonzero(width == size)
        if found:
            last, short = found[-1]
            apart = _filled(len(short)) * last + _filled(len(index)) * size
            if _filled(len(short) + len(index)) * size <= apart:
                index = np.concatenate([found.pop()[1], index])
        found.append((int(size), index))
    return found


def _filled(count: int) -> int:
    """Rows with those that fill the last ``ROWS`` up."""
    return -(-count // ROWS) * ROWS


def chances(given: Runs, test: Table) -> np.ndarray:
    """The chance [S,N] that a sample at temperature 1 is exactly what ``mask`` marks in a row."""
    look, (data, place) = jax.jit(_chances(given.model)), _in_rows(test)
    said = [_joined(look(given.run(i), data), 0)[place] for i in range(len(given))]
    return np.stack(said)


def _joined(groups: Sequence[Any], lead: int) -> np.ndarray:
    """Groups [..., n, ROWS] with ``lead`` axes before, end to end: [..., rows]."""
    flat = [np.asarray(g).reshape(*np.shape(g)[:lead], -1) for g in groups]
    return np.concatenate(flat, axis=-1)


def answers(
    given: Runs, i: int, prompts: Table, key: Array, *, tokens: int, temperature: float
) -> Answers:
    """Token ids of run ``i``'s answers to the column ``prompt``, with the end token where it
    ended by itself; 0 as temperature is greedy."""
    how = dict(key=key, tokens=tokens, temperature=temperature)
    said = generate(prompts, given.model, given.run(i), given.tokenizer, **how)  # pyright: ignore
    end = [] if given.tokenizer.eos is None else [given.tokenizer.eos]
    rows = zip(said["response_ids"], said["finish"], strict=True)
    return [[*ids.tolist(), *(end if finish == "stop" else [])] for ids, finish in rows]


def paired(
    student: Runs,
    prompts: Sequence[Table],
    chosen: Sequence[Answers],
    rejected: Sequence[Answers],
) -> list[Table]:
    """Packed pairs, one table per run and all of one shape, with the log-probabilities that run i
    of the student gives to its pairs.

    Raises:
      UserError: runs with different numbers of pairs.
    """
    tokenizer = student.tokenizer
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    tables = []
    for asked, better, worse in zip(prompts, chosen, rejected, strict=True):
        texts = [start + ids for ids in tokenizer.encode_ids(list(asked["prompt"]))]
        tables += pack_pairs(texts, better, worse, per_row=PER_ROW, classes=1, multiple=64)
    return [
        columns.add_reference(student.model, student.run(i), table, progress=False)
        for i, table in enumerate(alike(tables))
    ]


def worded(student: Runs, prompts: Table, said: Answers, length: int) -> Table:
    """Prompts and answers as token columns [N,length], to be fine-tuned on; the mask is 1 on the
    answers."""
    tokenizer = student.tokenizer
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    texts = [start + ids for ids in tokenizer.encode_ids(list(prompts["prompt"]))]
    tokens = np.zeros((len(said), length), np.int32)
    segment, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for row, (head, rest) in enumerate(zip(texts, said, strict=True)):
        size = len(head) + len(rest)
        tokens[row, :size], segment[row, :size] = [*head, *rest], 1
        mask[row, len(head) : size] = 1.0
    position = np.where(segment > 0, np.arange(length, dtype=np.int32), 0)
    return Table({"tokens": tokens, "segment": segment, "position": position, "mask": mask})
