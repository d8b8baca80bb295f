"""Objectives of one example: its class, or the next tokens of its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_nll
from w2s_jax.models.lora import TARGETS
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State, forward


def at(loss: Callable[..., Array], progress: Array) -> Callable[..., Array]:
    """``loss`` with every schedule bound by ``functools.partial`` replaced by its present value.

    A schedule is a function of progress in [0, 1) marked by ``is_schedule`` (see
    ``losses.classification.ramp``); other keywords pass through.
    """
    if not isinstance(loss, partial):
        return loss
    bound = {
        name: value(progress) if getattr(value, "is_schedule", False) else value
        for name, value in loss.keywords.items()
    }
    return partial(loss.func, *loss.args, **bound)


def classify(model: Model, loss: Callable[..., Array]) -> Objective:
    """Train class logits [B,C] on ``label`` [B,C] with a per-example loss [B] (nats).

    The optional column ``weight`` [B] weighs examples. Metric ``agreement``: how often the argmax
    equals that of the label.

    Raises:
      UserError: a batch without ``label``, a model of tokens.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        logits, labels = classes(model, params, batch), needed(batch, "label")
        weight = batch.get("weight", jnp.ones(logits.shape[0], jnp.float32))
        losses = at(loss, state.progress)(logits, labels)
        agree = (logits.argmax(-1) == labels.argmax(-1)).astype(jnp.float32)
        total = weight.sum()
        aux = Aux({"agreement": ((agree * weight).sum(), total)}, state.memory)
        return (losses * weight).sum(), total, aux

    return objective


def language(model: Model) -> Objective:
    """Next-token cross-entropy in nats per weighted token.

    The predictions are those of the column ``targets`` or, without it, of ``mask``, where
    ``mask[b,t]`` weighs the prediction of ``tokens[b,t]`` from what precedes it in its segment;
    packing gives the first token of each document weight 0. ``weight`` [B] weighs rows.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        said = predicted(model, params, batch)
        weights = said.mask * batch["weight"][:, None] if "weight" in batch else said.mask
        total, _ = token_nll(said.hidden, said.unembed, said.ids, weights, vocab=said.vocab)
        return total, weights.sum(), Aux({}, state.memory)

    return objective


def on_base(objective: Objective) -> Objective:
    """``objective`` of a model with adapters (``models.lora``), training the adapters alone; the
    base is ``state.frozen["base"]``.

    Where an objective has its model under ``student`` (``match``, ``curriculum``), so have the
    trained parameters the adapters; what stands beside them is trained as it is.

    Raises:
      UserError: parameters that are not adapters, or no base.
    """

    def adapted(params: Params, state: State, batch: Batch, key: Array):
        inside = "student" in params
        own = params["student"] if inside else params
        if not set(own) <= {*TARGETS, "head"}:
            raise UserError(f"on_base trains adapters alone (lora.adapters), got {sorted(own)}")
        whole = {"base": frozen(state, "base"), "lora": own}
        return objective({**params, "student": whole} if inside else whole, state, batch, key)

    return adapted


def classes(model: Model, params: Params, batch: Batch) -> Array:
    """Class logits [B,C] of a classifier.

    Raises:
      UserError: the model is none.
    """
    logits = forward(model, params, batch).logits
    if logits is None:
        raise UserError("the objective needs class logits; put heads.classifier on the model")
    return logits


def needed(batch: Batch, name: str) -> Array:
    """The column ``name``.

    Raises:
      UserError: the batch lacks it.
    """
    if name not in batch:
        raise UserError(f"the objective needs the column {name!r}, the batch has {sorted(batch)}")
    return batch[name]


def frozen(state: State, name: str) -> Params:
    """The frozen weights ``name``.

    Raises:
      UserError: there are none.
    """
    if name not in state.frozen:
        raise UserError(f"the objective reads frozen weights: pass frozen={{{name!r}: ...}}")
    return state.frozen[name]


def part(params: Params, name: str, maker: str) -> Params:
    """The part ``name`` of parameters that ``maker`` makes.

    Raises:
      UserError: it is not there.
    """
    if name not in params:
        raise UserError(f"no {name!r} among the parameters {sorted(params)}; {maker} makes them")
    return params[name]


@dataclass(frozen=True)
class Predicted:
    """Predictions of a batch: ``hidden`` [B,M,D] says ``ids`` [B,M] with loss weight ``mask``."""

    hidden: Array
    unembed: Array
    ids: Array
    mask: Array
    vocab: int | None


def predicted(model: Model, params: Params, batch: Batch) -> Predicted:
    """The model's hidden states where a token is predicted: at ``targets`` where the batch has
    them (so that prompts never reach the vocabulary head), else at all tokens but the last.

    Raises:
      UserError: a model of classes, or a batch with neither ``targets`` nor ``mask``.
    """
    output = forward(model, params, batch)
    if output.hidden is None:
        raise UserError("the objective needs a model of tokens, this one gives classes")
    if "targets" not in batch:
        mask = needed(batch, "mask")
        parts = (output.hidden[:, :-1], batch["tokens"][:, 1:], mask[:, 1:])
    else:
        targets = batch["targets"]
        hidden = jnp.take_along_axis(output.hidden, targets["at"][..., None], axis=1)
        parts = (hidden, targets["ids"], targets["mask"])
    hidden, ids, mask = parts
    return Predicted(hidden, output.unembed, ids, mask, output.vocab)
