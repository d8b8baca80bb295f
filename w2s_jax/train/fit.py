"""One training step and one loop, whatever the method: an objective and a table in, a State out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.train.log import Log, Progress, real_tokens
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Array, Batch, Objective, Params, State, Table, Tree

Step = Callable[[State, Batch, Array], tuple[State, dict[str, Any]]]


class NotFinite(UserError):
    """The loss or a gradient became NaN or infinite; ``step`` and ``rows`` say where."""

    def __init__(self, message: str, step: int, rows: np.ndarray) -> None:
        super().__init__(message)
        self.step, self.rows = step, rows


class Interrupted(UserError):
    """SIGTERM or SIGINT arrived: the update in flight was finished and the state saved."""


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
    ``fold_in(fold_in(key, s), i)``. Metrics, all [] float32: ``loss``, ``grad_norm`` (before
    clipping), and what the objective reports. A batch of weight 0 gives loss 0 and gradient 0.

    Args:
      norms: also return ``metrics["norms"]``, the tree of each leaf's squared gradient norm with
        its first axis kept (``[leaf.shape[0]]``), for naming the layer that broke.
    """

    def step(state: State, batch: Batch, key: Array) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(key, state.step)
        grads, sums, memory = _accumulate(objective, state, batch, key, micro)
        metrics = {name: total / _divisor(weight) for name, (total, weight) in sums.items()}
        divisor = _divisor(sums["loss"][1])
        grads = jax.tree.map(lambda g, p: (g / divisor).astype(p.dtype), grads, state.params)
        squares = jax.tree.map(_squares, grads)
        metrics["grad_norm"] = jnp.sqrt(sum(leaf.sum() for leaf in jax.tree.leaves(squares)))
        updates, opt = tx.update(grads, state.opt, state.params)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
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
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), state.params
    )
    (grads, memory), sums = jax.lax.scan(body, (zeros, state.memory), (jnp.arange(micro), parts))
    return grads, jax.tree.map(lambda leaf: leaf.sum(0), sums), memory


def _divisor(weight: Array) -> Array:
    return jnp.where(weight == 0, 1, weight)


def _squares(leaf: Array) -> Array:
    squares = jnp.square(leaf.astype(jnp.float32))
    return squares.sum(tuple(range(1, leaf.ndim)))


def order(seed: int | tuple[int, ...], rows: int, batch: int, step: int) -> np.ndarray:
    """Row indices [batch] int64 of update ``step``: a pure function, so resuming needs no replay.

    Every epoch is a fresh Philox permutation of the table and batches are cut from the endless
    line of epochs: no row is dropped, no batch is short, and a batch may end one epoch and begin
    the next.
    """
    place = np.arange(step * batch, (step + 1) * batch)
    epochs = place // rows
    index = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index[here] = _permutation(seed, rows, int(epoch))[place[here] % rows]
    return index


@lru_cache(maxsize=4)
def _permutation(seed: int | tuple[int, ...], rows: int, epoch: int) -> np.ndarray:
    entropy = (seed,) if isinstance(seed, int) else seed
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*entropy, epoch])))
    return generator.permutation(rows)


def fit(
    objective: Objective,
    params: Params,
    table: Table,
    tune: Tune,
    key: Array,
    *,
    axes: Tree = None,
    mesh: jax.sharding.Mesh | None = None,
    frozen: Tree = (),
    memory: Tree = (),
    workdir: str | Path | None = None,
    save_every: int = 0,
    keep: int = 2,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    track: tuple[str, ...] = (),
    progress: bool = True,
    flops: float = 0.0,
    config: Mapping[str, Any] | None = None,
) -> State:
    """Train ``params`` on ``table``; the caller's arrays stay valid.

    With ``workdir`` the run resumes from its last checkpoint, as if it had never stopped: same
    parameters bit for bit (on one kind of machine), same rows in ``metrics.jsonl``.

    Args:
      key: typed PRNG key of the run; data order and every update's randomness follow from it.
      axes: logical axis names per weight (``Model.axes``), for sharding, muon and weight decay.
      mesh: where to train; None is the default device.
      frozen: arrays the objective reads and nobody updates; never saved, never donated.
      memory: what the objective carries from update to update.
      save_every: updates between checkpoints; 0 saves only the end (and an interruption).
      keep: how many checkpoints stay.
      evaluate: ``state -> {name: number}``, logged at update 0, every ``eval_every`` updates and
        at the end. It must not keep the arrays: the next update reuses their memory.
      track: of ``"tensorboard"``, ``"wandb"``; see ``log.Log``.
      flops: FLOPs per token, forward and backward, for MFU (``models.transformer``).
      config: more of what the result depends on; a resumed run must have the same.

    Raises:
      UserError: an empty table, a batch that does not divide over the mesh, a workdir that cannot
        be written or belongs to another run; ``NotFinite``; ``Interrupted``.
    """
    if not len(table):
        raise UserError("cannot train on an empty table")
    steps = tune.total(len(table))
    tx = optimizer(tune, steps, axes)
    with meshes.rules_context(mesh), contextlib.ExitStack() as stack:
        state, where = _begin(params, tx, steps, memory, axes, mesh)
        frozen, key = _settle(frozen, mesh), _settle(key, mesh)
        feed = Feed(table, tune.batch, _seed(key), mesh)
        log = Log(workdir, track)
        stack.callback(log.close)
        update = _program(make_step(objective, tx, micro=tune.micro, norms=True), where, mesh)
        first = int(state.step)
        bar = Progress(steps, first, progress)
        stack.callback(bar.close)
        for step in range(first, steps):
            state, metrics = update(state, frozen, feed.take(step), key)
            host = {k: float(v) for k, v in metrics.items() if k != "norms"}
            log.write(step + 1, host)
            bar.update(step + 1, host)
    return dataclasses.replace(state, frozen=frozen)


def _seed(key: Array) -> tuple[int, ...]:
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))


def _begin(
    params: Params,
    tx: optax.GradientTransformation,
    steps: int,
    memory: Tree,
    axes: Tree,
    mesh: jax.sharding.Mesh | None,
) -> tuple[State, Tree]:
    """The first state in its final place (so that the step compiles once), and that place."""

    def build(params: Params, memory: Tree) -> State:
        # The copy is what the step may consume; the caller keeps the original.
        return start(jax.tree.map(jnp.copy, params), tx, steps, memory=memory)

    if mesh is None:
        return jax.jit(build)(params, memory), None
    where = _places(jax.eval_shape(build, params, memory), axes, mesh)
    params = jax.device_put(_local(params), where.params)
    return jax.jit(build, out_shardings=where)(params, _local(memory)), where


def _places(state: State, axes: Tree, mesh: jax.sharding.Mesh) -> State:
    """A sharding per leaf: what the optimiser keeps of a weight lives where the weight does."""
    whole = meshes.replicated(mesh)
    if axes is None:
        return jax.tree.map(lambda _: whole, state)
    params = meshes.shardings(axes, mesh, state.params)
    shapes = jax.tree_util.tree_leaves_with_path(state.params)
    known = {
        path: (leaf.shape, place)
        for (path, leaf), place in zip(shapes, jax.tree.leaves(params), strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        for i in range(len(path)):
            shape, sharding = known.get(path[i:], (None, whole))
            if shape == leaf.shape:
                return sharding
        return whole

    everywhere = jax.tree.map(lambda _: whole, state)
    opt = jax.tree_util.tree_map_with_path(place, state.opt)
    return dataclasses.replace(everywhere, params=params, opt=opt)


def _settle(tree: Tree, mesh: jax.sharding.Mesh | None) -> Tree:
    """``tree`` on the mesh: whole on every device, unless it is spread over this mesh already."""
    if mesh is None:
        return tree

    def put(leaf: Any) -> Any:
        here = getattr(getattr(leaf, "sharding", None), "mesh", None)
        return leaf if here == mesh else jax.device_put(_local(leaf), meshes.replicated(mesh))

    return jax.tree.map(put, tree)


def _local(tree: Tree) -> Tree:
    """Arrays of this process alone as host arrays, which several processes can place together."""
    if jax.process_count() == 1:
        return tree

    def fetch(leaf: Any) -> Any:
        if not getattr(leaf, "is_fully_addressable", True):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _program(step: Step, where: Tree, mesh: jax.sharding.Mesh | None) -> Any:
    """The step as one compiled program that consumes its state but not the frozen weights."""

    def update(state: State, frozen: Tree, batch: Batch, key: Array):
        new, metrics = step(dataclasses.replace(state, frozen=frozen), batch, key)
        return dataclasses.replace(new, frozen=()), metrics

    out = None if mesh is None else (where, meshes.replicated(mesh))
    return jax.jit(update, donate_argnums=0, out_shardings=out)


class Feed:
    """Batches of a run, one placed on the devices ahead of its use."""

    def __init__(
        self, table: Table, batch: int, seed: tuple[int, ...], mesh: jax.sharding.Mesh | None
    ) -> None:
        self.table, self.size, self.seed, self.mesh = table, batch, seed, mesh
        self.mine = meshes.batch_rows(mesh, batch)
        self.ready: tuple[int, Batch, int] | None = None

    def rows(self, step: int) -> np.ndarray:
        """Row indices [batch] of update ``step``."""
        return order(self.seed, len(self.table), self.size, step)

    def prepare(self, step: int) -> None:
        """Start moving the batch of ``step`` to the devices."""
        batch = self.table.batch(self.rows(step)[self.mine])
        self.ready = (step, meshes.put_batch(batch, self.mesh, self.size), real_tokens(batch))

    def take(self, step: int) -> Batch:
        """The batch of ``step``, ready or not."""
        if self.ready is None or self.ready[0] != step:
            self.prepare(step)
        _, batch, self.tokens = self.ready
        self.ready = None
        return batch
