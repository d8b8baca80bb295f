"""Distillation as an order of stages: from texts a teacher wrote, and from one's own predecessor.

What is one objective on one table needs no pipeline: ``distill`` with a stored or a live teacher,
``on_policy`` and ``minillm`` go straight into ``fit`` or ``population``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.columns import digest
from w2s_jax.errors import UserError
from w2s_jax.objectives import language
from w2s_jax.pipelines.reinforce import imitation, rollout
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Model, Objective, Params, Table

Generation = TypeVar("Generation")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model, its weights and its tokenizer."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def written(
    ctx: Context,
    teacher: Teacher,
    prompts: Table,
    key: Array,
    *,
    tokens: int,
    samples: int = 1,
    longest: int | None = None,
    **how: Any,
) -> Table:
    """What the teacher answers to each prompt, as rows for ``objectives.language``; a stage.

    It runs once: a rerun reads the rows. Only responses are predicted, with the end token where
    they ended. At temperature 1 their cross-entropy estimates the forward KL of whole responses
    without bias, up to the teacher's entropy.

    Args:
      prompts: has ``prompt`` (text).
      tokens, samples: the most tokens of a response; responses to each prompt.
      longest: see ``data.groups.pack_groups``; default the teacher's ``max_length``.
      how: ``temperature`` (default 1), ``top_k``, ... of ``generate.sample.generate``.

    Raises:
      UserError: see ``generate``.
    """
    numbers = {"tokens": tokens, "samples": samples, "longest": longest, **how}
    inputs = {
        **{name: value for name, value in numbers.items() if name != "mesh"},
        "teacher": [digest(teacher.params), repr(teacher.model.config)],
        "tokenizer": teacher.tokenizer.digest(),
        "prompts": prompts.digest(),
        "key": np.asarray(jax.random.key_data(key)),
    }

    def make() -> Table:
        asked = (teacher.model, teacher.params, teacher.tokenizer, prompts, key)
        said = rollout(*asked, samples=samples, reward=_unjudged, tokens=tokens, **how)
        rows = np.array([len(ids) > 0 for ids in said["trained_ids"]])
        return imitation(said.take(rows), longest=longest or teacher.model.config.max_length)

    return ctx.stage("written", inputs, make)


def _unjudged(said: Table) -> np.ndarray:
    return np.zeros(len(said), np.float32)


def sequence_level(
    ctx: Context,
    student: Model,
    params: Params,
    teacher: Teacher,
    prompts: Table,
    tune: Tune,
    key: Array,
    *,
    objective: Objective | None = None,
    settings: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[Params, Table]:
    """Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the teacher answers the
    prompts once, the student is fine-tuned on its answers. (The paper's answers are the best of a
    beam; here they are sampled, or greedy with ``temperature=0``.)

    The student may have any size; its tokenizer is the teacher's, since rows are token ids.

    Args:
      objective: default ``language(student)``; ``distill`` with a live teacher in
        ``settings["frozen"]`` makes it word-level distillation on the teacher's own text.
      settings: further arguments of ``fit`` (``axes``, ``mesh``, ``frozen``, ``workdir``, ...).
      how: arguments of ``written``.

    Returns:
      The student's weights and the rows it learned from.

    Raises:
      UserError: see ``written`` and ``fit``; a student with fewer tokens than the teacher's
        tokenizer.
    """
    if teacher.tokenizer.size > student.config.vocab:
        raise UserError(
            f"sequence_level: the teacher's tokenizer has {teacher.tokenizer.size} tokens, the "
            f"student {student.config.vocab}; their tokenizers must be one"
        )
    asking, training = jax.random.split(key)
    table = written(ctx, teacher, prompts, asking, **how)
    objective = objective or language(student)
    given = {"progress": ctx.progress, **(settings or {})}
    return fit(objective, params, table, tune, training, **given).params, table


def generations(
    train: Callable[[int, Generation | None], Generation],
    *,
    count: int,
    first: Generation | None = None,
) -> list[Generation]:
    """Born-again networks (Furlanello et al. 2018, arXiv 1805.04770): each generation starts
    afresh and learns from the one before it.

    Args:
      train: a generation from its number and its parent (None: it has none). ``afresh`` trains one
        network at a time; a generation may as well be a population's many.
      count: generations, the first included.
      first: a generation that is there already.

    Returns:
      Every generation, oldest first; see ``ensemble``.

    Raises:
      UserError: a count below 1.
    """
    if count < 1:
        raise UserError(f"generations: count must be at least 1, got {count}")
    lineage = [train(0, None) if first is None else first]
    while len(lineage) < count:
        lineage.append(train(len(lineage), lineage[-1]))
    return lineage


def afresh(
    labels: Objective,
    parent: Objective,
    begin: Callable[[Array], Params],
    table: Table,
    tune: Tune,
    key: Array,
    **settings: Any,
) -> Callable[[int, Params | None], Params]:
    """How ``generations`` trains one network at a time, classifier or decoder.

    Args:
      labels: what a network without a parent learns by (``classify``, ``language``).
      parent: what the others learn by; they find theirs in ``state.frozen["teacher"]``
        (``distill``, ``distill_classes`` with ``teacher=model``).
      begin: weights of a new generation from its key.
      settings: further arguments of ``fit``; what ``frozen`` has besides the teacher is kept.
    """
    held = dict(settings.pop("frozen", ()))
    given: dict[str, Any] = {"progress": False} | settings

    def train(number: int, last: Params | None) -> Params:
        starting, training = jax.random.split(jax.random.fold_in(key, number))
        objective = labels if last is None else parent
        frozen = held if last is None else {**held, "teacher": last}
        return fit(objective, begin(starting), table, tune, training, frozen=frozen, **given).params

    return train


def ensemble(logits: Array | Sequence[Array]) -> Array:
    """Log-probabilities [...,C] of the mean of the distributions of G models, logits [G,...,C]."""
    logps = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    return jax.nn.logsumexp(logps, axis=0) - jnp.log(logps.shape[0])
