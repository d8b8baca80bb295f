"""One update of any objective as a pure function: gradients summed over parts, divided once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from w2s_jax.train.precision import apply_updates
from w2s_jax.types import Array, Batch, Objective, Params, State, Tree

Step = Callable[[State, Batch, Array], tuple[State, dict[str, Any]]]

_ROUNDING = 0x726F756E  # tells the key of rounded weights from those of the parts of a batch


def start(
    params: Params,
    tx: optax.GradientTransformation,
    steps: int | Array,
    *,
    frozen: Tree = (),
    memory: Tree = (),
) -> State:
    """The state before the first of ``steps`` updates; pure."""
    return State(
        step=jnp.zeros((), jnp.int32),
        steps=jnp.asarray(steps, jnp.int32),
        params=params,
        opt=tx.init(params),
        frozen=frozen,
        memory=memory,
    )


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    micro: int = 1,
    norms: bool = False,
) -> Step:
    """One update as a pure function ``(state, batch, key) -> (state, metrics)``.

    The batch is taken in ``micro`` parts, part i being rows i, i + micro, ... (so that each part
    stays spread over the devices); sums are added and divided once by the total weight, hence the
    split does not change the gradient. ``key`` is the run's key: part i of update s draws from
    ``fold_in(fold_in(key, s), i)``. Gradients are summed in float32, whatever the weights are
    stored in; bfloat16 weights are rounded at random (see ``precision``). Metrics, all [] float32:
    ``loss``, ``grad_norm`` (before clipping), and what the objective reports. A batch of weight 0
    gives loss 0 and gradient 0.

    Args:
      norms: also return ``metrics["norms"]``, the tree of each leaf's squared gradient norm with
        its first axis kept (``[leaf.shape[0]]``), for naming the layer that broke.
    """

    def step(state: State, batch: Batch, key: Array) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(key, state.step)
        grads, sums, memory = _accumulate(objective, state, batch, key, micro)
        metrics = {name: total / _divisor(weight) for name, (total, weight) in sums.items()}
        divisor = _divisor(sums["loss"][1])
        grads = jax.tree.map(lambda g: g / divisor.astype(_sum_dtype(g)), grads)
        squares = jax.tree.map(_squares, grads)
        metrics["grad_norm"] = jnp.sqrt(sum(leaf.sum() for leaf in jax.tree.leaves(squares)))
        updates, opt = tx.update(grads, state.opt, state.params)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=apply_updates(state.params, updates, jax.random.fold_in(key, _ROUNDING)),
            opt=opt,
            memory=memory,
        )
        return new, metrics | ({"norms": squares} if norms else {})

    return step


def _accumulate(
    objective: Objective, state: State, batch: Batch, key: Array, micro: int
) -> tuple[Tree, dict[str, tuple[Array, Array]], Tree]:
    """Summed gradients, summed (sum, weight) metrics with ``loss`` among them, and the memory."""

    def part(params: Params, memory: Tree, rows: Batch, key: Array):
        now = dataclasses.replace(state, memory=memory)
        total, weight, aux = objective(params, now, rows, key)
        memory = aux.memory if jax.tree.leaves(aux.memory) else memory
        return total, ({"loss": (total, weight)} | aux.metrics, memory)

    gradient = jax.grad(part, has_aux=True)
    if micro == 1:
        rng = jax.random.fold_in(key, 0)
        grads, (sums, memory) = gradient(state.params, state.memory, batch, rng)
        return grads, sums, memory

    def body(carry, xs):
        grads, memory = carry
        i, rows = xs
        rng = jax.random.fold_in(key, i)
        new, (sums, memory) = gradient(state.params, memory, rows, rng)
        return (jax.tree.map(jnp.add, grads, new), memory), sums

    parts = jax.tree.map(
        lambda leaf: leaf.reshape(-1, micro, *leaf.shape[1:]).swapaxes(0, 1), batch
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf)), state.params)
    (grads, memory), sums = jax.lax.scan(body, (zeros, state.memory), (jnp.arange(micro), parts))
    return grads, jax.tree.map(lambda leaf: leaf.sum(0), sums), memory


def _sum_dtype(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _divisor(weight: Array) -> Array:
    return jnp.where(weight == 0, 1, weight)


def _squares(leaf: Array) -> Array:
    squares = jnp.square(leaf.astype(jnp.float32))
    return squares.sum(tuple(range(1, leaf.ndim)))
