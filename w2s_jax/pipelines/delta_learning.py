"""Delta learning: answers of weak models, pairs of them, and training on the pairs.

The recipe of Geng et al. 2025 (Tulu-3 students on Qwen2.5 answers): the larger of two weak models
answers better on average, so its answers are ``chosen``; no judge looks at them. Texts come from
models at hand or from files that ``generate.serve`` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from w2s_jax import columns
from w2s_jax.annotate import predict, surprise
from w2s_jax.data.pairs import pad_pairs
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import generate
from w2s_jax.losses.preference import dpo
from w2s_jax.models import hf
from w2s_jax.objectives import language, prefer
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Array, Model, Objective, Params, Table


@dataclass(frozen=True)
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


def loaded(name: str, runs: int) -> Runs:
    """A pretrained model, the same weights for every run."""
    model, params, tokenizer = hf.load(name)
    params = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (runs, *leaf.shape)), params)
    return Runs(name, model, params, tokenizer)


def fine_tuned(given: Runs, tables: Sequence[Table], tune: Tune, seeds: Sequence[int]) -> Runs:
    """Run i after supervised fine-tuning on ``tables[i]`` (columns of ``tokenise``).

    Raises:
      UserError: a run that became NaN.
    """
    return _trained(given, _language(given.model), tables, tune, seeds)


def preferred(
    given: Runs, tables: Sequence[Table], tune: Tune, seeds: Sequence[int], *, beta: float
) -> Runs:
    """Run i after length-normalised DPO on the pairs of ``tables[i]``, which have ``ref``.

    Raises:
      UserError: a run that became NaN.
    """
    return _trained(given, _dpo(given.model, beta), tables, tune, seeds)


def _trained(
    given: Runs, objective: Objective, tables: Sequence[Table], tune: Tune, seeds: Sequence[int]
) -> Runs:
    done = population(
        objective, given.params, tables, tune, seeds, stacked=True, axes=given.model.axes
    )
    if done.failed:
        raise UserError(f"{given.name}: runs {list(done.failed)} became NaN; lower the lr")
    return replace(given, params=done.params)


# One objective per model, so that a population's program is compiled once.
@lru_cache(maxsize=16)
def _language(model: Model) -> Objective:
    return language(model)


@lru_cache(maxsize=16)
def _dpo(model: Model, beta: float) -> Objective:
    return prefer(model, partial(dpo, beta=beta))


def repeated(given: Runs, times: int) -> Runs:
    """All runs ``times`` times over, one block of S after another."""
    params = jax.tree.map(lambda leaf: np.concatenate([leaf] * times), given.params)
    return replace(given, params=params)


def answers(
    given: Runs, i: int, prompts: Table, key: Array, *, tokens: int, temperature: float
) -> list[list[int]]:
    """Token ids of run ``i``'s answers to the column ``prompt``, with the end token where it
    ended by itself; 0 as temperature is greedy."""
    how = dict(key=key, tokens=tokens, temperature=temperature)
    said = generate(prompts, given.model, given.run(i), given.tokenizer, **how)  # pyright: ignore
    end = [] if given.tokenizer.eos is None else [given.tokenizer.eos]
    rows = zip(said["response_ids"], said["finish"], strict=True)
    return [[*ids.tolist(), *(end if finish == "stop" else [])] for ids, finish in rows]


def paired(
    student: Runs,
    i: int,
    prompts: Table,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    length: int,
) -> Table:
    """Pairs [N,length] with the log-probabilities that run ``i`` of the student gives them."""
    start = [] if student.tokenizer.bos is None else [student.tokenizer.bos]
    texts = [start + ids for ids in student.tokenizer.encode_ids(list(prompts["prompt"]))]
    table = pad_pairs(texts, chosen, rejected, length=length)
    return columns.add_reference(student.model, student.run(i), table, progress=False)


def exactness(given: Runs, test: Table) -> np.ndarray:
    """The chance [S, N] that a sample at temperature 1 is exactly what ``mask`` marks in a row."""
    look = _surprise(given.model)
    said = [predict(look, given.run(i), test)["nll"] for i in range(len(given))]
    return np.exp(-np.stack(said))


@lru_cache(maxsize=16)
def _surprise(model: Model) -> Any:
    return surprise(model)
