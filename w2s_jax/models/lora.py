"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a model whose trained part is small.

The base is an argument of its own, so it stays frozen, is shared by every run of a population, and
is itself the reference policy: ``model.apply(params["base"], ...)`` of the model adapted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.models.config import Config
from w2s_jax.models.heads import Head
from w2s_jax.types import Array, Model, Output, Params, Tree

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapted(Model):
    """A model with adapters: what it was made from, and ``config`` of the model underneath."""

    base: Model
    rank: int
    alpha: float
    targets: tuple[str, ...]


def lora(
    model: Model, rank: int, *, alpha: float | None = None, targets: tuple[str, ...] | None = None
) -> Adapted:
    """``model`` with ``x @ a @ b * alpha / rank`` added to its projections; the same call gives the
    same ``Model``.

    Parameters are ``{"base": <those of model>, "lora": {leaf: {"a" [L,in,r], "b" [L,r,out]}}}``,
    the adapters in float32 whatever the base is stored in. ``b`` starts at zero, hence the adapted
    model starts as the base exactly. Of a classifier the body is adapted and ``lora`` has besides
    ``head``, a full-size change of the head, zero at first. No product of the size of a weight is
    ever formed; ``merge`` does that once, after training.

    Args:
      alpha: default ``2 * rank``, hence a scale of 2 (TRL's default ratio; PEFT's own is 1).
      targets: of ``TARGETS``, default all that the model has.

    Raises:
      UserError: not a decoder or a classifier on one, a frozen body (``probe``), adapters already,
        an unknown target, or a rank below 1 or above the smaller side of a target.
    """
    leaves = _body(model).axes["layers"]
    if targets is None:
        targets = tuple(leaf for leaf in TARGETS if leaf in leaves)
    unknown = [leaf for leaf in targets if leaf not in leaves or leaf not in TARGETS]
    if unknown or not targets:
        have = ", ".join(leaf for leaf in TARGETS if leaf in leaves)
        raise UserError(f"lora: no projection {unknown or ''} to adapt; the model has {have}")
    targets = tuple(leaf for leaf in TARGETS if leaf in targets)
    return _adapted(model, rank, float(2 * rank if alpha is None else alpha), targets)


@lru_cache(maxsize=64)
def _adapted(model: Model, rank: int, alpha: float, targets: tuple[str, ...]) -> Adapted:
    _check_rank(model, rank, targets)

    def init(key: Array) -> Params:
        return {"base": model.init(key), "lora": adapters(adapted, jax.random.fold_in(key, 1))}

    def apply(params: Params, x: Array, **columns: Any) -> Output:
        return model.apply(joined(adapted, params), x, **columns)

    adapted = Adapted(
        init=init,
        apply=apply,
        axes={"base": model.axes, "lora": _axes(model, targets)},
        config=model.config,
        reads=model.reads,
        base=model,
        rank=rank,
        alpha=alpha,
        targets=targets,
    )
    return adapted


def adapters(model: Adapted, key: Array) -> Params:
    """The trained part alone at its start, float32: ``a`` uniform in +-1/sqrt(in), as PEFT draws
    it (Kaiming with a = sqrt(5)), ``b`` and the change of a classifier's head zero."""
    sizes = shapes(model)
    head = sizes.pop("head", {})
    start: dict[str, Any] = {}
    for name, size in sizes.items():
        bound = size["a"].shape[1] ** -0.5
        drawn = jax.random.fold_in(key, TARGETS.index(name))
        start[name] = {
            "a": jax.random.uniform(drawn, size["a"].shape, minval=-bound, maxval=bound),
            "b": jnp.zeros(size["b"].shape),
        }
    if head:
        start["head"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), head)
    return start


def merge(model: Adapted, params: Params) -> Params:
    """The base's parameters with the adapters added: summed in float32, in the base's dtypes."""

    def added(weight: Array, change: Array) -> Array:
        return (weight.astype(jnp.float32) + change).astype(weight.dtype)

    def summed(weight: Array, pair: Params) -> Array:
        a, b = (pair[side].astype(jnp.float32) for side in "ab")
        return added(weight, jnp.einsum("lir,lro->lio", a, b) * (model.alpha / model.rank))

    pairs, body = params["lora"], _inner(model, params["base"])
    layers = dict(body["layers"])
    layers |= {name: summed(layers[name], pairs[name]) for name in model.targets}
    body = {**body, "layers": layers}
    if not isinstance(model.config, Head):
        return body
    return {"body": body, "head": jax.tree.map(added, params["base"]["head"], pairs["head"])}


def shapes(model: Adapted) -> Tree:
    """Shape and dtype of every leaf of the trained part, without making any."""
    base = jax.eval_shape(model.base.init, jax.random.key(0))
    layers = _inner(model, base)["layers"]

    def pair(leaf: Any) -> Params:
        depth, source, target = leaf.shape
        sides = {"a": (depth, source, model.rank), "b": (depth, model.rank, target)}
        return {side: jax.ShapeDtypeStruct(size, jnp.float32) for side, size in sides.items()}

    tree: dict[str, Any] = {name: pair(layers[name]) for name in model.targets}
    if isinstance(model.config, Head):
        tree["head"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), base["head"]
        )
    return tree


def joined(model: Adapted, params: Params) -> Params:
    """The base's tree with ``<leaf>_a`` and (scaled) ``<leaf>_b`` among its layers."""
    pairs, body = params["lora"], _inner(model, params["base"])
    scale = model.alpha / model.rank
    extra = {f"{name}_a": pairs[name]["a"] for name in model.targets}
    extra |= {f"{name}_b": pairs[name]["b"] * scale for name in model.targets}
    body = {**body, "layers": {**body["layers"], **extra}}
    if not isinstance(model.config, Head):
        return body
    head = jax.tree.map(jnp.add, params["base"]["head"], pairs["head"])
    return {"body": body, "head": head}


def _axes(model: Model, targets: tuple[str, ...]) -> Tree:
    """The long sides are split as the weight's are, the rank is whole everywhere."""
    names = _body(model).axes["layers"]
    axes: dict[str, Any] = {}
    for leaf in targets:
        depth, source, target = names[leaf]
        axes[leaf] = {"a": (depth, source, None), "b": (depth, None, target)}
    if isinstance(model.config, Head):
        axes["head"] = model.axes["head"]
    return axes


def _body(model: Model) -> Model:
    """The decoder of a decoder or of a classifier on one."""
    head = model.config if isinstance(model.config, Head) else None
    body = model if head is None else head.body
    if isinstance(model, Adapted) or isinstance(body, Adapted):
        raise UserError("lora: the model has adapters already; merge them first")
    if not isinstance(body.config, Config):
        raise UserError("lora: only a decoder, or a classifier on one, has projections to adapt")
    if head is not None and head.probe:
        raise UserError("lora: a probe has a frozen body; make the classifier with probe=False")
    return body


def _inner(model: Model, params: Params) -> Params:
    return params["body"] if isinstance(model.config, Head) else params


def _check_rank(model: Model, rank: int, targets: tuple[str, ...]) -> None:
    layers = _inner(model, jax.eval_shape(model.init, jax.random.key(0)))["layers"]
    sides = {name: min(layers[name].shape[1:]) for name in targets}
    least = min(sides, key=lambda name: sides[name])
    if rank < 1:
        raise UserError(f"lora: rank must be at least 1, got {rank}")
    if rank > sides[least]:
        raise UserError(
            f"lora: rank {rank} is larger than the matrix {least!r} "
            f"{layers[least].shape[1]}x{layers[least].shape[2]}; use at most {sides[least]}"
        )
