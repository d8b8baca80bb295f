"""Distillation at a temperature that is trained against the student.

CTKD (Li et al. 2023, arXiv 2211.16231): the temperature ascends the loss that the student descends,
first not at all and then with a weight that grows to 1, from easy to hard. As the released code
(github.com/zhengli97/CTKD) has it with one global temperature,

    T = start + span * sigmoid(theta),   loss = T^2 KL(teacher_T || student_T),
    the gradient by theta times c,       c = -(1 - cos(pi progress / over)) / 2 up to ``over``.

There c is constant over each epoch; here it moves with every update. ``curriculum_instances`` is
the paper's other variant, a temperature for each example from a network of two layers that sees
what student and teacher said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_divergence
from w2s_jax.losses.temperature import tempered_kl
from w2s_jax.objectives.base import part, predicted
from w2s_jax.objectives.distillation import distill_classes, heard, weighed
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Output, Params, State

_PREDICTOR = 0x70726564  # tells the key of the predictor from the student's own


def with_temperature(model: Model, theta: float = 1.0) -> Model:
    """``model`` with the scalar that is trained beside it: parameters ``{"student": those of model,
    "theta": []}``; applied, it is the student. The released code starts ``theta`` at 1."""

    def init(key: Array) -> Params:
        return {"student": model.init(key), "theta": jnp.float32(theta)}

    def apply(params: Params, x: Array, **columns: Any) -> Output:
        return model.apply(params["student"], x, **columns)

    return Model(init, apply, {"student": model.axes, "theta": ()}, model.config, model.reads)


def with_predictor(model: Model, classes: int, *, hidden: int = 64, theta: float = 1.0) -> Model:
    """``model`` with the network of ``curriculum_instances`` beside it: parameters ``{"student":
    those of model, "predictor": {"kernel" [2 classes, hidden], "bias", "out" [hidden], "theta"
    []}}``; applied, it is the student.

    Every theta is ``theta`` at the start, as that of ``with_temperature`` is. The released part of
    the original does not say how wide its hidden layer is.
    """

    def init(key: Array) -> Params:
        drawn = jax.random.normal(jax.random.fold_in(key, _PREDICTOR), (2 * classes, hidden))
        layers = {
            "kernel": drawn * (2 * classes) ** -0.5,
            "bias": jnp.zeros(hidden),
            "out": jnp.zeros(hidden),
            "theta": jnp.float32(theta),
        }
        return {"student": model.init(key), "predictor": layers}

    def apply(params: Params, x: Array, **columns: Any) -> Output:
        return model.apply(params["student"], x, **columns)

    whole = {"kernel": (None, None), "bias": (None,), "out": (None,), "theta": ()}
    axes = {"student": model.axes, "predictor": whole}
    return Model(init, apply, axes, model.config, model.reads)


def curriculum(
    model: Model,
    *,
    teacher: Model,
    start: Any = 1.0,
    span: Any = 20.0,
    over: Any = 10 / 240,
) -> Objective:
    """CTKD of next-token distributions, nats per weighted token; parameters as
    ``with_temperature`` has them, the teacher live in ``state.frozen["teacher"]``.

    Exact, with no more logits at once than ``distill`` has. Metric ``temperature``. The numbers may
    be traced scalars.

    Args:
      start, span: the temperature lies between ``start`` and ``start + span``.
      over: share of the run after which the reversal is whole (10 of 240 epochs).

    Raises:
      UserError: parameters without ``theta``, vocabularies that differ.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        theta = part(params, "theta", "with_temperature")
        live, fixed = _temperature(theta, state, start, span, over)
        mine = predicted(model, params["student"], batch)
        theirs, vocab = heard(teacher, state, batch, mine)
        divergence = partial(tempered_kl, temperature=fixed)
        pair = (mine.hidden, mine.unembed)
        weights = weighed(mine, batch)
        total, (_, slopes) = token_divergence(pair, theirs, weights, divergence, vocab=vocab)
        total += jax.lax.stop_gradient((weights * slopes).sum()) * (live - fixed)
        size = weights.sum()
        return total, size, Aux({"temperature": (fixed * size, size)}, state.memory)

    return objective


def curriculum_classes(
    model: Model,
    *,
    teacher: Model | None = None,
    start: Any = 1.0,
    span: Any = 20.0,
    over: Any = 10 / 240,
) -> Objective:
    """CTKD of class distributions, nats per weighted example: ``curriculum`` over
    ``distill_classes``, whose ``teacher`` may be the column of logits as well."""

    def same(theta: Array, mine: Array, theirs: Array) -> Array:
        return theta

    return _classes(model, teacher, ("theta", "with_temperature"), same, (start, span, over))


def curriculum_instances(
    model: Model,
    *,
    teacher: Model | None = None,
    start: Any = 1.0,
    span: Any = 20.0,
    over: Any = 10 / 240,
) -> Objective:
    """CTKD with a temperature for each example, nats per weighted example; parameters as
    ``with_predictor`` has them, all else as ``curriculum_classes``.

    ``T_i = start + span sigmoid(theta_i)``, theta_i of the two layers (ReLU between) on the logits
    of teacher and student side by side; an example's loss is ``T_i^2 KL`` at its own temperature,
    and the network's gradient is turned round as theta's is. The student learns from the loss at
    the temperatures as they are, not from what it could do to them. Metric ``temperature``: the
    mean.

    Raises:
      UserError: parameters without ``predictor``, or one made for another number of classes.
    """

    def each(layers: Params, mine: Array, theirs: Array) -> Array:
        return _predicted(layers, theirs, mine)

    return _classes(model, teacher, ("predictor", "with_predictor"), each, (start, span, over))


def _classes(
    model: Model,
    teacher: Model | None,
    where: tuple[str, str],
    theta: Callable[..., Array],
    heat: tuple[Any, Any, Any],
) -> Objective:
    """CTKD of classes with ``theta(part, mine, theirs)``, a scalar or one per example; ``where``
    names the part of the parameters that it reads, and what makes it."""

    def objective(params: Params, state: State, batch: Batch, key: Array):
        told, seen = part(params, *where), []

        def divergence(mine: Array, theirs: Array) -> Array:
            live, fixed = _temperature(theta(told, mine, theirs), state, *heat)
            value, slope = tempered_kl(mine, theirs, fixed)
            seen.append(jnp.broadcast_to(fixed, value.shape))
            return value + slope * (live - fixed)

        asked = distill_classes(model, divergence, teacher=teacher)
        total, size, aux = asked(params["student"], state, batch, key)
        weight = batch.get("weight", jnp.ones(len(seen[0]), jnp.float32))
        metrics = aux.metrics | {"temperature": ((seen[0] * weight).sum(), size)}
        return total, size, Aux(metrics, aux.memory)

    return objective


def reversal(progress: Array, over: Any = 10 / 240) -> Array:
    """What multiplies the gradient by theta: from 0 down to -1 along a cosine over the first
    ``over`` of the run, then -1 (with ``over`` 0 at once)."""
    part = jnp.where(progress < over, progress / jnp.where(over > 0, over, 1.0), 1.0)
    return -0.5 * (1.0 - jnp.cos(jnp.pi * part))


def _temperature(
    theta: Array, state: State, start: Any, span: Any, over: Any
) -> tuple[Array, Array]:
    """The temperature twice: once with a gradient to theta, turned round, and once without."""
    theta = theta.astype(jnp.float32)
    still = jax.lax.stop_gradient(theta)
    turned = still + reversal(state.progress, over) * (theta - still)
    live = start + span * jax.nn.sigmoid(turned)
    return live, jax.lax.stop_gradient(live)


def _predicted(layers: Params, teacher: Array, student: Array) -> Array:
    """theta of each example, [B]."""
    said = jax.lax.stop_gradient(jnp.concatenate([teacher, student], axis=-1)).astype(jnp.float32)
    if (made := layers["kernel"].shape[0]) != said.shape[-1]:
        raise UserError(
            f"with_predictor was made for {made // 2} classes, not {said.shape[-1] // 2}"
        )
    inner = jax.nn.relu(said @ layers["kernel"] + layers["bias"][None])
    return inner @ layers["out"] + layers["theta"]
