"""Matching what is inside a student to what is inside its teacher, beside any other objective.

A ``Term`` compares one tap of the student (``Output.taps``) with one of the teacher. Learned
projections stand on the student's side: a projection of the teacher could make both sides constant.
Each model runs forward once per step, whatever the number of terms.

    terms = [Term(hint, student=1, teacher=2, weight=100.0, head=linear())]
    model = with_projections(student, teacher, terms, table)
    objective = match(student, teacher, terms, lambda s, t: distill_classes(s, kl, teacher=t))
    trained = fit(objective, model.init(key), table, tune, key, frozen={"teacher": weights})
    only_the_student = trained.params["student"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.losses.features import meet, pool_tokens
from w2s_jax.objectives.base import at, frozen, part
from w2s_jax.types import (
    Array,
    Aux,
    Batch,
    Model,
    Objective,
    Output,
    Params,
    State,
    Table,
    Tree,
    forward,
)

Shape = tuple[int, ...]
Memories = dict[str, Tree]
_PROJECTION = 0x70726F6A  # tells the keys of projections from the student's own


@dataclass(frozen=True, eq=False)
class Head:
    """A learned map between features, thrown away after training.

    ``init(key, student_shape, teacher_shape) -> params`` and ``apply(params, student, teacher) ->``
    the arguments of the loss.
    """

    init: Callable[[Array, Shape, Shape], Params]
    apply: Callable[[Params, Array, Array], tuple[Array, ...]]


@dataclass(frozen=True, eq=False)
class Term:
    """One comparison.

    ``loss(student, teacher) -> [B]``, [B,T] of tokens, or [] of a batch (``losses.features``), on
    the taps with these numbers (-1 the last), through ``head`` where there is one, times ``weight``
    (a number, a traced scalar, or a schedule). ``pool`` averages tokens or places first, as losses
    of relations need it of tokens. With ``memory`` (``key ->`` what it is at the start) the loss
    has the keywords ``memory``, ``batch`` and ``key`` and gives ``(values, new memory)``.
    """

    loss: Callable[..., Any]
    student: int = -1
    teacher: int = -1
    weight: Any = 1.0
    head: Head | None = None
    pool: bool = False
    memory: Callable[[Array], Tree] | None = None


def match(
    model: Model,
    teacher: Model,
    terms: Sequence[Term],
    main: Callable[[Model, Model], Objective],
) -> Objective:
    """``main(model, teacher)`` plus, times its weight, each term's mean times the term's weight.

    The mean is over examples (by the column ``weight`` [B], if any) or, of a loss [B,T], over real
    tokens (``segment`` > 0; without it all). Parameters are ``{"student": ..., "projections":
    ...}`` (``with_projections``), the teacher's are ``state.frozen["teacher"]``. ``State.memory``
    is that of ``main`` or, where terms have one, ``match_memory``. Metrics: those of ``main`` and
    ``match_0``, ``match_1``, ... before weighting.

    Args:
      main: makes the main objective from two models that have answered already, so that it costs no
        second forward pass: ``lambda student, teacher: distill(student, forward_kl,
        teacher=teacher)``. It must ask them about the batch as it is.

    Raises:
      UserError: a tap that is not there, features that the loss cannot compare, a main objective
        that asks the models about something else, a memory that was not passed.
    """
    remembers = any(term.memory for term in terms)

    def objective(params: Params, state: State, batch: Batch, key: Array):
        memories = _memories(state) if remembers else {}
        state = replace(state, memory=memories["main"]) if remembers else state
        own, heads = (part(params, k, "with_projections") for k in ("student", "projections"))
        mine = forward(model, own, batch)
        theirs = forward(teacher, jax.lax.stop_gradient(frozen(state, "teacher")), batch)
        asked = main(_answered(model, mine, batch), _answered(teacher, theirs, batch))
        total, weight, aux = asked(own, state, batch, key)
        metrics = dict(aux.metrics)
        for i, term in enumerate(terms):
            pair = _pair(term, i, mine, theirs)
            with _named(term, i):
                head = part(heads, str(i), "with_projections") if term.head else None
                parts = _projected(term, head, *pair, batch)
                values, memories = _said(term, i, parts, memories, batch, key)
            sums = _weighed(values, batch)
            scale = at_progress(term.weight, state.progress)
            total += scale * weight * sums[0] / jnp.where(sums[1] == 0, 1.0, sums[1])
            metrics[f"match_{i}"] = sums
        memory = memories | {"main": aux.memory} if remembers else aux.memory
        return total, weight, Aux(metrics, memory)

    return objective


def match_memory(terms: Sequence[Term], key: Array, main: Tree = ()) -> Tree:
    """``State.memory`` at the start for ``match``: ``main`` is that of the main objective."""
    own = {str(i): t.memory(jax.random.fold_in(key, i)) for i, t in enumerate(terms) if t.memory}
    return own | {"main": main} if own else main


def with_projections(model: Model, teacher: Model, terms: Sequence[Term], table: Table) -> Model:
    """``model`` with the projections that ``terms`` learn: parameters ``{"student": those of
    model, "projections": {number of the term: its own}}``.

    ``init(key)`` draws the student that ``model.init(key)`` draws; applied, it is the student, so
    whatever looks at a model looks at this one. Shapes come from the first row of ``table``.

    Raises:
      UserError: a tap that is not there, or shapes that a projection cannot join.
    """
    batch = table.batch([0])
    mine, theirs = (_shapes(one, batch) for one in (model, teacher))
    pairs = {
        i: jax.eval_shape(partial(_pooled, term), *_pair(term, i, mine, theirs))
        for i, term in enumerate(terms)
        if term.head
    }

    def project(key: Array) -> Params:
        made = {}
        for i, pair in pairs.items():
            own = jax.random.fold_in(key, i)
            made[str(i)] = terms[i].head.init(own, *(x.shape for x in pair))  # type: ignore
        return made

    def init(key: Array) -> Params:
        own = jax.random.fold_in(key, _PROJECTION)
        return {"student": model.init(key), "projections": project(own)}

    def apply(params: Params, x: Array, **columns: Any) -> Output:
        return model.apply(params["student"], x, **columns)

    shapes = jax.eval_shape(project, jax.random.key(0))
    whole = jax.tree.map(lambda leaf: (None,) * leaf.ndim, shapes)
    axes = {"student": model.axes, "projections": whole}
    return Model(init, apply, axes, model.config, model.reads)


def linear() -> Head:
    """The student's channels mapped to the teacher's with a bias (of maps: a 1x1 convolution)."""

    def init(key: Array, student: Shape, teacher: Shape) -> Params:
        return _dense(key, student[-1], teacher[-1])

    def apply(params: Params, student: Array, teacher: Array) -> tuple[Array, ...]:
        student, teacher = meet(student, teacher)
        return _affine(params, student), teacher

    return Head(init, apply)


def regressor(variance: float = 5.0) -> Head:
    """VID's prediction of the teacher (Ahn et al. 2019): three bias-free maps of the channels with
    ReLU between, as wide as the teacher, and a variance per channel that starts at ``variance``
    (RepDistiller's). For ``losses.features.variational``."""

    def init(key: Array, student: Shape, teacher: Shape) -> Params:
        sizes = [student[-1], *[teacher[-1]] * 3]
        keys = jax.random.split(key, 3)
        maps = [_dense(k, a, b)["kernel"] for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]
        start = jnp.log(jnp.expm1(jnp.float32(variance - 1e-5)))
        return {"maps": maps, "scale": jnp.full(teacher[-1:], start)}

    def apply(params: Params, student: Array, teacher: Array) -> tuple[Array, ...]:
        x, teacher = meet(student, teacher)
        for i, kernel in enumerate(params["maps"]):
            x = (jax.nn.relu(x) if i else x) @ kernel
        return x, teacher, params["scale"]

    return Head(init, apply)


def embeddings(width: int = 128) -> Head:
    """CRD's two linear embeddings of ``width`` (Tian et al. 2020), for ``losses.features.
    contrastive``: the one head that learns a map of the teacher too, as the original does, because
    a loss with negatives has nothing to gain from a constant."""

    def init(key: Array, student: Shape, teacher: Shape) -> Params:
        keys = jax.random.split(key)
        sizes = {"student": _flat(student), "teacher": _flat(teacher)}
        return {name: _dense(k, sizes[name], width) for name, k in zip(sizes, keys, strict=True)}

    def apply(params: Params, student: Array, teacher: Array) -> tuple[Array, ...]:
        parts = {"student": student, "teacher": jax.lax.stop_gradient(teacher)}
        return tuple(_affine(params[k], x.reshape(len(x), -1)) for k, x in parts.items())

    return Head(init, apply)


def weighted(objectives: Sequence[Objective], weights: Sequence[Any]) -> Objective:
    """The sum of objectives that share their parameters, each a mean times its weight (a number, a
    traced scalar or a schedule); the memory is threaded through them in order."""

    def objective(params: Params, state: State, batch: Batch, key: Array):
        mean, size, metrics = jnp.zeros(()), jnp.zeros(()), {}
        for i, (one, scale) in enumerate(zip(objectives, weights, strict=True)):
            part, weight, aux = one(params, state, batch, key)
            size = size if i else weight
            mean += at_progress(scale, state.progress) * part / jnp.where(weight == 0, 1.0, weight)
            metrics |= aux.metrics
            state = replace(state, memory=aux.memory)
        return mean * size, size, Aux(metrics, state.memory)

    return objective


def mutual(
    first: Model,
    second: Model,
    loss: Callable[..., Array],
    divergence: Callable[..., Array] = forward_kl,
    *,
    weight: Any = 1.0,
) -> Objective:
    """Deep mutual learning of two classifiers (Zhang et al. 2018): each has ``loss`` on ``label``
    plus ``weight`` times ``divergence(own logits, the other's, detached)``, nats per example.

    Parameters are ``{"first": ..., "second": ...}``. Both move in one update, each from the other
    as it was before. Metric ``agreement``: how often both name one class.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        models = {"first": first, "second": second}
        one, two = (forward(model, params[k], batch).logits for k, model in models.items())
        judge, scale = at(loss, state.progress), at_progress(weight, state.progress)
        towards = at(divergence, state.progress)
        weights = batch.get("weight", jnp.ones(len(one), jnp.float32))
        values = jnp.zeros_like(weights)
        for own, other in ((one, two), (two, one)):
            values += judge(own, batch["label"])
            values += scale * towards(own, jax.lax.stop_gradient(other))
        agree = (one.argmax(-1) == two.argmax(-1)).astype(jnp.float32)
        size = weights.sum()
        aux = Aux({"agreement": ((agree * weights).sum(), size)}, state.memory)
        return (values * weights).sum(), size, aux

    return objective


def at_progress(value: Any, progress: Array) -> Any:
    """A number, or the present value of a schedule."""
    return value(progress) if getattr(value, "is_schedule", False) else value


def _answered(model: Model, output: Output, batch: Batch) -> Model:
    """``model`` after it has been asked about ``batch``: it answers ``output``, nothing else."""

    def apply(params: Params, x: Array, **columns: Any) -> Output:
        if x is not batch[model.reads[0]]:
            raise UserError(
                "match: the main objective asks a model about something else than the batch as it "
                "is; use one that reads it directly (classify, language, distill, distill_classes)"
            )
        return output

    return replace(model, apply=apply)


def _shapes(model: Model, batch: Batch) -> Output:
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(lambda p, b: forward(model, p, b), params, batch)


def _pair(term: Term, i: int, mine: Output, theirs: Output) -> tuple[Any, Any]:
    """The two taps of term number ``i``, or their shapes."""
    pair = []
    for side, output in (("student", mine), ("teacher", theirs)):
        which, count = getattr(term, side), len(output.taps)
        if not count:
            raise UserError(
                f"match: the {side} has no taps; a decoder has those of Config(taps=(...)), a "
                "vision trunk always"
            )
        if not -count <= which < count:
            raise UserError(
                f"match: term {i} asks for tap {which} of the {side}, which has {count}: "
                f"0 to {count - 1}, or -1 for the last"
            )
        pair.append(output.taps[which])
    return pair[0], pair[1]


@contextlib.contextmanager
def _named(term: Term, i: int) -> Iterator[None]:
    """A bad input said of the term."""
    try:
        yield
    except UserError as error:
        taps = f"student tap {term.student}, teacher tap {term.teacher}"
        raise UserError(f"match: term {i} ({taps}): {error}") from None


def _memories(state: State) -> Memories:
    if not isinstance(state.memory, dict) or "main" not in state.memory:
        raise UserError("match: a term has a memory; pass memory=match_memory(terms, key)")
    return state.memory


def _projected(
    term: Term, head: Params | None, student: Array, teacher: Array, batch: Batch
) -> tuple[Array, ...]:
    """The arguments of the term's loss."""
    parts = _pooled(term, student, jax.lax.stop_gradient(teacher), batch=batch)
    return parts if term.head is None else term.head.apply(head, *parts)


def _said(
    term: Term, i: int, parts: tuple[Array, ...], memories: Memories, batch: Batch, key: Array
) -> tuple[Array, Memories]:
    """The values of the term's loss, and the memories with its own moved on."""
    if term.memory is None:
        return term.loss(*parts), memories
    own = jax.random.fold_in(key, _PROJECTION + i)
    values, kept = term.loss(*parts, memory=memories[str(i)], batch=batch, key=own)
    return values, memories | {str(i): kept}


def _pooled(term: Term, *features: Array, batch: Batch | None = None) -> tuple[Array, ...]:
    """The features as they are or, with ``term.pool``, as vectors."""
    if not term.pool:
        return features
    return tuple(pool_tokens(x, _real(batch or {}, x.shape)) for x in features)


def _weighed(values: Array, batch: Batch) -> tuple[Array, Array]:
    """Sum and weight over examples or real tokens; a number [] of the batch counts as a mean."""
    if not values.ndim:
        return values, jnp.ones(())
    weights = batch.get("weight", jnp.ones(len(values), jnp.float32))
    if values.ndim == 2:
        real = _real(batch, values.shape)
        weights = weights[:, None] * (jnp.ones(values.shape) if real is None else real)
    return (jnp.where(weights != 0, values, 0.0) * weights).sum(), weights.sum()


def _real(batch: Batch, shape: Shape) -> Array | None:
    """1 at real tokens, [B,T]; None where features are not tokens of the batch."""
    segment = batch.get("segment")
    if segment is None or segment.shape != shape[:2]:
        return None
    return (segment > 0).astype(jnp.float32)


def _flat(shape: Shape) -> int:
    size = 1
    for n in shape[1:]:
        size *= n
    return size


def _dense(key: Array, source: int, target: int) -> Params:
    kernel = jax.random.normal(key, (source, target)) * source**-0.5
    return {"kernel": kernel, "bias": jnp.zeros(target)}


def _affine(params: Params, x: Array) -> Array:
    bias = params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
    return x.astype(jnp.float32) @ params["kernel"] + bias
