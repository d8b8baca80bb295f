"""Objectives: a loss and the forward passes it needs; all that ``fit`` knows of a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from w2s_jax.losses.sequence import token_logps
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
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        logits, labels = forward(model, params, batch).logits, batch["label"]
        weight = batch.get("weight", jnp.ones(logits.shape[0], jnp.float32))
        losses = at(loss, state.progress)(logits, labels)
        agree = (logits.argmax(-1) == labels.argmax(-1)).astype(jnp.float32)
        total = weight.sum()
        aux = Aux({"agreement": ((agree * weight).sum(), total)}, state.memory)
        return (losses * weight).sum(), total, aux

    return objective


def language(model: Model) -> Objective:
    """Next-token cross-entropy in nats per weighted token.

    ``mask[b,t]`` weighs the prediction of ``tokens[b,t]`` from what precedes it in its segment;
    packing gives the first token of each document weight 0.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        output = forward(model, params, batch)
        mask = batch["mask"][:, 1:]
        if "weight" in batch:
            mask = mask * batch["weight"][:, None]
        logps = token_logps(output.hidden[:, :-1], output.unembed, batch["tokens"][:, 1:], mask)
        return -(logps * mask).sum(), mask.sum(), Aux({}, state.memory)

    return objective
