"""Objectives that compare with a teacher's distributions: of next tokens, of classes.

A divergence is ``(student_logits, teacher) -> [...]`` nats (``losses.distillation``), or with
``targets`` ``(student_logits, teacher, ids) -> [...]`` where it needs what is true as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_divergence
from w2s_jax.objectives.base import Predicted, at, frozen, predicted
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State, forward

Divergence = Callable[..., Array]
Teachers = Model | Sequence[Model] | None


def distill(
    model: Model,
    divergence: Divergence,
    *,
    teacher: Teachers = None,
    targets: bool = False,
    vocab: int | None = None,
) -> Objective:
    """A divergence from the teacher's next-token distributions, nats per weighted token.

    The positions and their weights, ``weight`` [B] of rows among them, are those of ``language``.
    With ``teacher`` the distributions are made in the
    step from ``state.frozen["teacher"]``, which reads the same columns as the student; without,
    the column ``teacher`` holds them (``losses.sparse.top_k`` reads it). Of several teachers
    (a sequence of models and one of weights) the divergence has a list of logits.

    Args:
      targets: hand the divergence the tokens that were predicted, as a third argument.
      vocab: real tokens, where the matrices of student and teacher are padded differently.

    Raises:
      UserError: neither a teacher nor the column; vocabularies that differ.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        mine = predicted(model, params, batch)
        theirs, real = heard(teacher, state, batch, mine, vocab)
        weights = weighed(mine, batch)
        total, _ = token_divergence(
            (mine.hidden, mine.unembed),
            theirs,
            weights,
            at(divergence, state.progress),
            targets=mine.ids if targets else None,
            vocab=real,
        )
        return total, weights.sum(), Aux({}, state.memory)

    return objective


def weighed(mine: Predicted, batch: Batch) -> Array:
    """The loss weights [B,M] of predictions: their mask times the ``weight`` of their row."""
    return mine.mask * batch["weight"][:, None] if "weight" in batch else mine.mask


def heard(
    teacher: Teachers, state: State, batch: Batch, mine: Predicted, vocab: int | None = None
) -> tuple[Any, int | None]:
    """What ``token_divergence`` takes as its teacher, and how many tokens are real: ``vocab``,
    or what student and teachers say.

    Raises:
      UserError: neither a teacher nor the column; real tokens that differ, without ``vocab``.
    """
    if teacher is None:
        if "teacher" not in batch:
            raise UserError(
                "distill needs a live teacher or the column 'teacher' (columns.add_teacher)"
            )
        stored = batch["teacher"]
        if "targets" not in batch:
            stored = jax.tree.map(lambda leaf: leaf[:, :-1], stored)
        return stored, vocab or mine.vocab
    weights = jax.lax.stop_gradient(frozen(state, "teacher"))
    single = isinstance(teacher, Model)
    pairs = [(teacher, weights)] if single else zip(teacher, weights, strict=True)
    said = [predicted(one, its, batch) for one, its in pairs]
    real = vocab or _agreed([one.vocab for one in (mine, *said)])
    theirs = [(one.hidden, one.unembed) for one in said]
    return theirs[0] if single else theirs, real


def _agreed(sizes: list[int | None]) -> int | None:
    known = sorted({size for size in sizes if size})
    if len(known) > 1:
        raise UserError(
            f"student and teacher have {' and '.join(map(str, known))} real tokens: pass vocab= "
            "when these are one tokenizer's, else use sequence-level distillation"
        )
    return known[0] if known else None


def distill_classes(
    model: Model,
    divergence: Divergence,
    *,
    teacher: Teachers = None,
    targets: bool = False,
) -> Objective:
    """A divergence from the teacher's class distributions, nats per example.

    With ``teacher`` the logits are made in the step from ``state.frozen["teacher"]`` (so that both
    see one augmented picture), else they are the column ``teacher.classes`` [B,C]. The optional
    column ``weight`` [B] weighs examples. Metric ``agreement``: how often both name one class.

    Args:
      targets: hand the divergence the class [B] that is likeliest by ``label`` [B,C], as a third
        argument.

    Raises:
      UserError: neither a teacher nor the column; ``targets`` without ``label``.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        logits = forward(model, params, batch).logits
        said = jax.lax.stop_gradient(_classes(teacher, state, batch))
        parts = (logits, said, _label(batch)) if targets else (logits, said)
        weight = batch.get("weight", jnp.ones(logits.shape[0], jnp.float32))
        values = jnp.where(weight != 0, at(divergence, state.progress)(*parts), 0.0)
        first = said[0] if isinstance(said, list) else said
        agree = (logits.argmax(-1) == first.argmax(-1)).astype(jnp.float32)
        total = weight.sum()
        aux = Aux({"agreement": ((agree * weight).sum(), total)}, state.memory)
        return (values * weight).sum(), total, aux

    return objective


def _classes(teacher: Teachers, state: State, batch: Batch) -> Any:
    if teacher is None:
        if "classes" not in batch.get("teacher", ()):
            raise UserError(
                "distill_classes needs a live teacher or the column 'teacher' with 'classes'"
            )
        return batch["teacher"]["classes"].astype(jnp.float32)
    weights = frozen(state, "teacher")
    if isinstance(teacher, Model):
        return forward(teacher, weights, batch).logits
    pairs = zip(teacher, weights, strict=True)
    return [forward(one, its, batch).logits for one, its in pairs]


def _label(batch: Batch) -> Array:
    if "label" not in batch:
        raise UserError(f"a divergence with targets needs the column 'label', got {sorted(batch)}")
    return batch["label"].argmax(-1)
