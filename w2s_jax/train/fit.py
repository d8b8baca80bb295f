"""One training step and one loop, whatever the method: an objective and a table in, a State out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.train.checkpoint import Store
from w2s_jax.train.log import Log, Meter, Progress
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.watch import Feed, Interrupted, NotFinite, Signals, Watch
from w2s_jax.types import Array, Batch, Objective, Params, State, Table, Tree

__all__ = ["Interrupted", "NotFinite", "fit", "make_step", "order", "start"]

Step = Callable[[State, Batch, Array], tuple[State, dict[str, Any]]]


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
      evaluate: ``state -> {name: number}``, logged before the first update, every ``eval_every``
        updates (0: never) and at the end. It must not keep the arrays: the next update consumes
        them.
      track: of ``"tensorboard"``, ``"wandb"``; see ``log.Log``.
      flops: FLOPs per token, forward and backward, for MFU (``models.transformer``).
      config: more of what the result depends on; a resumed run must have the same.

    Raises:
      UserError: an empty table, a batch that does not divide over the mesh, a workdir that cannot
        be written or belongs to another run; ``NotFinite``; ``Interrupted``.
    """
    if not len(table):
        raise UserError("cannot train on an empty table")
    rows, seed, steps = len(table), _seed(key), tune.total(len(table))
    tx = optimizer(tune, steps, axes)
    with meshes.rules_context(mesh), contextlib.ExitStack() as stack:
        state, where = _begin(params, tx, steps, memory, axes, mesh)
        store = resumed = None
        if workdir is not None:
            meta = _meta(tune, steps, table, seed, state.params) | dict(config or {})
            store = stack.enter_context(
                contextlib.closing(Store(Path(workdir) / "checkpoints", keep, meta))
            )
            resumed = store.restore(state)
        state = state if resumed is None else resumed
        first = int(state.step)
        log = Log(workdir, track, -1 if resumed is None else first)
        bar = Progress(steps, first, progress)
        stack.enter_context(contextlib.closing(log))
        stack.enter_context(contextlib.closing(bar))
        feed = Feed(table, partial(order, seed, rows, tune.batch), tune.batch, mesh)
        meter = Meter(flops, mesh.devices.flat if mesh else jax.devices()[:1])
        watch = Watch(steps, feed, log, bar, meter, store, save_every, evaluate, eval_every)
        frozen, key = meshes.replicate(frozen, mesh), meshes.replicate(key, mesh)
        update = _program(make_step(objective, tx, micro=tune.micro, norms=True), where, mesh)
        state = _loop(update, state, frozen, key, watch)
    return dataclasses.replace(state, frozen=frozen)


def _loop(update: Any, state: State, frozen: Tree, key: Array, watch: Watch) -> State:
    """The updates that are left; ``state`` is consumed."""
    first, steps, feed = int(state.step), watch.steps, watch.feed
    with Signals() as signals:
        if not first:
            watch.look(0, dataclasses.replace(state, frozen=frozen))
        for step in range(first, steps):
            state, metrics = update(state, frozen, feed.take(step), key)
            if step + 1 < steps:
                feed.prepare(step + 1)
            watch.record(step, metrics)
            stop = signals.reached(step)
            watch.look(step + 1, dataclasses.replace(state, frozen=frozen))
            watch.save(step + 1, state, now=bool(stop))
            if stop:
                raise watch.interrupted(stop, step + 1)
        watch.flush()
    return state


def _seed(key: Array) -> tuple[int, ...]:
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))


def _meta(
    tune: Tune, steps: int, table: Table, seed: tuple[int, ...], params: Params
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that wrote the checkpoint."""
    shapes = jax.tree_util.tree_leaves_with_path(params)
    text = "".join(f"{jax.tree_util.keystr(p)}{x.shape}{x.dtype};" for p, x in shapes)
    return {
        **dataclasses.asdict(tune),
        "steps": steps,
        "rows": len(table),
        "data": table.digest(),
        "key": list(seed),
        "weights": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


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
    params = jax.device_put(meshes.local(params), where.params)
    return jax.jit(build, out_shardings=where)(params, meshes.local(memory)), where


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


def _program(step: Step, where: Tree, mesh: jax.sharding.Mesh | None) -> Any:
    """The step as one compiled program that consumes its state but not the frozen weights."""

    def update(state: State, frozen: Tree, batch: Batch, key: Array):
        new, metrics = step(dataclasses.replace(state, frozen=frozen), batch, key)
        return dataclasses.replace(new, frozen=()), metrics

    out = None if mesh is None else (where, meshes.replicated(mesh))
    return jax.jit(update, donate_argnums=0, out_shardings=out)
