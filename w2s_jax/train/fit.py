"""One training step and one loop, whatever the method: an objective and a table in, a State out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.train.checkpoint import Store
from w2s_jax.train.feed import Feed, order
from w2s_jax.train.log import Log, Meter, Progress
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.step import Step, make_step, start
from w2s_jax.train.watch import Interrupted, NotFinite, Signals, Watch
from w2s_jax.types import Array, Batch, Objective, Params, State, Table, Tree

__all__ = ["Interrupted", "NotFinite", "fit", "make_step", "order", "start"]

HOST = "pinned_host"


def fit(
    objective: Objective,
    params: Params,
    table: Table | Sequence[Table],
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
    offload: bool = False,
) -> State:
    """Train ``params`` on ``table``; the caller's arrays stay valid.

    With ``workdir`` the run resumes from its last checkpoint, as if it had never stopped: same
    parameters bit for bit (on one kind of machine), same rows in ``metrics.jsonl``. The settings
    must be the same, ``tune.micro`` too: it changes the order of additions and the keys drawn.

    Args:
      table: or several, of at most four shapes (lengths); each update draws ``tune.batch`` rows of
        one of them, see ``feed.turn``. One program is compiled per shape.
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
      offload: the optimiser's state waits in the host's memory and visits the device only within
        the update; the numbers stay the same.

    Raises:
      UserError: an empty table, more than four shapes, a batch that does not divide over the mesh,
        a workdir that cannot be written or belongs to another run, ``offload`` on a device without
        host memory; ``NotFinite``; ``Interrupted``.
    """
    tables = [table] if isinstance(table, Table) else list(table)
    seed, steps = _seed(key), tune.total([len(table) for table in tables])
    tx, mesh = optimizer(tune, steps, axes), _host_mesh(mesh) if offload else mesh
    feed = Feed(tables, seed, tune.batch, mesh, steps)
    with meshes.rules_context(mesh), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(feed))
        state, where = _begin(params, tx, steps, memory, axes, mesh, offload)
        store = resumed = None
        if workdir is not None:
            meta = identity(tune, steps, tables, seed, state.params) | dict(config or {})
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


def identity(
    tune: Tune, steps: int, tables: Sequence[Table], seed: tuple[int, ...], params: Params
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that wrote the checkpoint."""
    rows, data = [len(table) for table in tables], [table.digest() for table in tables]
    shapes = jax.tree_util.tree_leaves_with_path(params)
    text = "".join(f"{jax.tree_util.keystr(p)}{x.shape}{x.dtype};" for p, x in shapes)
    return {
        **dataclasses.asdict(tune),
        "steps": steps,
        "rows": rows if len(rows) > 1 else rows[0],
        "data": data if len(data) > 1 else data[0],
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
    offload: bool,
) -> tuple[State, Tree]:
    """The first state in its final place (so that the step compiles once), and that place."""

    def build(params: Params, memory: Tree) -> State:
        # The copy is what the step may consume; the caller keeps the original.
        return start(jax.tree.map(jnp.copy, params), tx, steps, memory=memory)

    if mesh is None:
        return jax.jit(build)(params, memory), None
    shapes = jax.eval_shape(build, params, memory)
    where = _places(shapes, axes, mesh)
    where = _offloaded(where, shapes) if offload else where
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


def _host_mesh(mesh: jax.sharding.Mesh | None) -> jax.sharding.Mesh:
    """``mesh`` (None: the default device alone), whose devices all have pinned host memory."""
    mesh = mesh or meshes.make_mesh(devices=jax.devices()[:1])
    device = mesh.local_devices[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise UserError(
            f"offload: {device.device_kind} has no memory of kind {HOST}, only {', '.join(kinds)}; "
            "train without it, with moments='bfloat16' or with adafactor"
        )
    return mesh


def _offloaded(where: State, shapes: State) -> State:
    """The places of a state whose optimiser keeps its arrays (not its counters) on the host."""
    opt = jax.tree.map(
        lambda place, leaf: place.with_memory_kind(HOST) if leaf.ndim else place,
        where.opt,
        shapes.opt,
    )
    return dataclasses.replace(where, opt=opt)


def _program(step: Step, where: Tree, mesh: jax.sharding.Mesh | None) -> Any:
    """The step as one compiled program that consumes its state but not the frozen weights."""

    def update(state: State, frozen: Tree, batch: Batch, key: Array):
        near = state.opt if where is None else _near(state.opt, where.opt)
        new, metrics = step(dataclasses.replace(state, frozen=frozen, opt=near), batch, key)
        opt = new.opt if where is None else _far(new.opt, where.opt)
        return dataclasses.replace(new, frozen=(), opt=opt), metrics

    out = None if mesh is None else (where, meshes.replicated(mesh))
    return jax.jit(update, donate_argnums=0, out_shardings=out)


def _near(opt: Tree, where: Tree) -> Tree:
    """The optimiser's state on the device: what waits on the host is sent for."""

    def fetch(leaf: Array, place: Any) -> Array:
        far = place.memory_kind == HOST
        return jax.device_put(leaf, place.with_memory_kind("device")) if far else leaf

    return jax.tree.map(fetch, opt, where)


def _far(opt: Tree, where: Tree) -> Tree:
    """The optimiser's state back where it waits."""

    def send(leaf: Array, place: Any) -> Array:
        return jax.device_put(leaf, place) if place.memory_kind == HOST else leaf

    return jax.tree.map(send, opt, where)
