"""Many runs in one program: seeds, learning rates, losses, data sets side by side.

The whole training loop is a loop inside one jitted function, so that a run of a small model costs
its arithmetic and nothing else. Runs are split over devices (no collectives) and, on each device,
follow one another in groups that are vmapped (``groups``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax.errors import UserError
from w2s_jax.mesh import is_axes, make_mesh
from w2s_jax.objectives import at
from w2s_jax.train.fit import NotFinite, fit, make_step, start
from w2s_jax.train.groups import MODES, groups
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.pool import arguments, device_columns
from w2s_jax.types import Array, Objective, Params, State, Table, Tree


@dataclass(frozen=True)
class Population:
    """S finished runs, on the host.

    ``params`` [S, ...]; ``metrics`` maps a name to [S, steps] float32; ``curve`` is what ``probe``
    said, [S, points, ...] per leaf, after the numbers of updates in ``steps`` [points]; ``failed``
    are the runs whose loss or gradient was not finite at some update. ``states`` [S, ...] are the
    whole last states (``keep_state``), from which ``split.write_run`` makes checkpoints.
    """

    params: Params
    metrics: dict[str, np.ndarray]
    curve: Tree
    steps: np.ndarray
    failed: tuple[int, ...]
    states: State | None = None

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.params)[0])

    def run(self, i: int) -> tuple[Params, dict[str, np.ndarray], Tree]:
        """Parameters, metrics [steps] and curve [points, ...] of run ``i``."""
        return jax.tree.map(lambda leaf: leaf[i], (self.params, self.metrics, self.curve))


def one_of(losses: Sequence[Callable[..., Array]], index: Array) -> Callable[..., Array]:
    """The loss number ``index`` [] of ``losses``, so that one program trains under all of them.

    For ``classify(model, one_of(losses, row["loss"]))`` or divergences in ``distill``; schedules
    bound in the losses work.
    """

    def chosen(*parts: Any, progress: Any) -> Array:
        return jax.lax.switch(index, [at(loss, progress) for loss in losses], *parts)

    return partial(chosen, progress=_now)


def _now(progress: Array) -> Array:
    return progress


_now.is_schedule = True  # type: ignore[attr-defined]


def population(
    objective: Callable[..., Any],
    params: Params | Callable[[Array], Params],
    tables: Table | Sequence[Table],
    tune: Tune,
    seeds: Sequence[int],
    *,
    hyper: Mapping[str, Any] | None = None,
    rows: Any = None,
    stacked: bool = False,
    axes: Tree = None,
    probe: Callable[..., Tree] | None = None,
    data: Tree = None,
    points: int = 0,
    first: bool = False,
    frozen: Tree = (),
    memory: Tree = (),
    mode: str = "auto",
    runs_at_once: int | None = None,
    keep_state: bool = False,
    devices: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
) -> Population:
    """Train S runs as one program; run ``i`` equals ``fit`` with ``jax.random.key(seeds[i])``.

    Calling it again with the same functions (the same objects), numbers and shapes reuses the
    compiled program; only the arrays change.

    Args:
      objective: an ``Objective``, or, when ``hyper`` names anything but ``lr``, a function from
        one run's other ``hyper`` (traced scalars) to its objective; see ``one_of`` for losses.
      params: a tree that all runs start from; with ``stacked`` a tree [S, ...]; or a function of
        the run's key, called inside the program.
      tables: one table for all runs, or one per run. Columns that several tables share (the same
        array, or equal ones) are stored once.
      seeds: [S] ints, one run each; they may repeat.
      hyper: [S] numbers per name; ``lr`` replaces ``tune.lr``.
      rows: [S, n] ints: the rows of its table that each run trains on; default all.
      axes: logical axes of the weights, for the optimizer.
      probe: ``probe(params)``, or ``probe(params, data)`` when ``data`` is given (large arrays
        belong there, not in the closure), looked at after ``points`` evenly spaced numbers of
        updates, the last included, and before the first update too when ``first``.
      frozen: trees that the objective reads and nothing updates, shared by all runs.
      memory: ``State.memory`` at the start of each run.
      mode: "map" one run after another on each device, "batched" groups of 8, "vmap" all at once,
        "auto" by measured rule and as memory allows (``groups``); "serial" is a loop over ``fit``
        on ``mesh``, for models that one device cannot hold (no ``hyper``; its ``metrics`` are
        empty).
      runs_at_once: largest vmapped group.
      keep_state: bring the optimiser's states too, for checkpoints of single runs.
      devices: default all local ones; runs are split over them.
      mesh: for "serial" only.

    Raises:
      UserError: lengths that differ, an unknown mode, points without a probe or the reverse.
    """
    seeds = [int(seed) for seed in seeds]
    hyper = {name: np.asarray(values) for name, values in (hyper or {}).items()}
    tables = [tables] * len(seeds) if isinstance(tables, Table) else list(tables)
    rows = np.arange(len(tables[0]))[None] if rows is None else np.asarray(rows)
    _check(seeds, hyper, tables, rows, params if stacked else None, mode, mesh)
    steps = tune.total(rows.shape[1])
    if (probe is None) != (points == 0) or not 0 <= points <= steps:
        raise UserError(f"population: probe needs points in 1..{steps}, and points need a probe")
    look = probe if data is None or probe is None else partial(probe, data=data)
    bounds = _bounds(steps, points, first)
    looks = bounds[:, 1] if probe is not None else bounds[:0, 1]
    if mode == "serial":
        settings = {"axes": axes, "frozen": frozen, "memory": memory, "mesh": mesh}
        begin = _starts(params, stacked, seeds)
        return _serial(objective, begin, tables, rows, seeds, tune, look, looks, **settings)
    devices = list(devices or jax.local_devices())[: len(seeds)]
    shared, each = arguments(tables, rows, seeds, tune.batch, steps)
    shared |= {"data": data, "frozen": frozen, "memory": memory, "bounds": bounds}
    each["hyper"] = hyper
    if not callable(params):
        (each if stacked else shared)["params"] = params
    state = _shapes(params, stacked, (tune, steps, _freeze(axes)), memory)
    size = tune.batch // tune.micro
    width, chunk = groups(mode, state, size, shared, len(seeds), devices, runs_at_once, keep_state)
    plan = _Plan(
        objective=objective,
        init=params if callable(params) else None,
        probe=probe,
        with_data=data is not None,
        tune=tune,
        steps=steps,
        axes=_freeze(axes),
        keep_state=keep_state,
        width=width,
        chunk=chunk,
        devices=tuple(devices),
    )
    trained, metrics, curve = _launch(plan, shared, each, len(seeds))
    broken = ~np.isfinite(metrics["loss"]) | ~np.isfinite(metrics["grad_norm"])
    failed = tuple(int(i) for i in np.flatnonzero(broken.any(1)))
    states = trained if keep_state else None
    return Population(trained.params, metrics, curve, looks, failed, states)


@dataclass(frozen=True)
class _Plan:
    """What a compiled program depends on besides shapes; functions count by identity."""

    objective: Callable[..., Any]
    init: Callable[[Array], Params] | None
    probe: Callable[..., Tree] | None
    with_data: bool
    tune: Tune
    steps: int
    axes: Any
    keep_state: bool
    width: int
    chunk: int
    devices: tuple[Any, ...]


def _launch(plan: _Plan, shared: Tree, each: Tree, runs: int) -> Tree:
    """Place the arguments and run, ``plan.chunk`` runs at a time; host arrays [runs, ...].

    Runs are padded to fill the devices' groups, then cut.
    """
    program, mesh = _program(plan)
    lot = len(plan.devices) * plan.width
    full = -(-min(plan.chunk, runs) // lot) * lot
    shared = jax.device_put(shared, NamedSharding(mesh, PartitionSpec()))
    parts = []
    for begin in range(0, runs, full):
        index = np.minimum(np.arange(begin, begin + full), runs - 1)
        mine = each if full == runs else jax.tree.map(lambda leaf, at=index: leaf[at], each)
        mine = jax.device_put(mine, NamedSharding(mesh, PartitionSpec("data")))
        parts.append(jax.device_get(program(shared, mine)))
    if len(parts) == 1:
        return jax.tree.map(lambda leaf: leaf[:runs], parts[0])
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:runs], *parts)


@lru_cache(maxsize=16)
def _program(plan: _Plan) -> tuple[Callable[[Tree, Tree], Tree], Mesh]:
    """The jitted function of (shared, each [S, ...]) and the mesh whose devices share the runs."""
    mesh = make_mesh(f"data={len(plan.devices)}", plan.devices)
    width = plan.width

    def block(shared: Tree, each: Tree) -> Tree:
        one = partial(_run, plan, shared)
        if width == 1:
            return jax.lax.map(one, each)
        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, width, *leaf.shape[1:]), each)
        out = jax.lax.map(jax.vmap(one), groups)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

    whole, split = PartitionSpec(), PartitionSpec("data")
    spread = jax.shard_map(
        block, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )
    return jax.jit(spread), mesh


def _run(plan: _Plan, shared: Tree, mine: Tree) -> tuple[State, dict[str, Array], Tree]:
    """One run from start to finish: last state, metrics [steps], curve [points, ...]."""
    key = jax.random.wrap_key_data(mine["key"])
    row = dict(mine["hyper"])
    tx = optimizer(plan.tune, plan.steps, _thaw(plan.axes), row.pop("lr", None))
    objective = plan.objective(row) if row else plan.objective
    params = plan.init(key) if plan.init else mine.get("params", shared.get("params"))
    params = jax.tree.map(jnp.asarray, params)
    state = start(params, tx, plan.steps, memory=shared["memory"])
    step = make_step(objective, tx, micro=plan.tune.micro)

    frozen = shared["frozen"]

    def batch(i: Array) -> Tree:
        index = shared["rows"][mine["rows"], shared["order"][mine["order"], i]]
        return jax.tree.map(lambda pool, which: pool[which, index], shared["pools"], mine["pools"])

    def advance(state: State, i: Array) -> tuple[State, dict[str, Array]]:
        new, values = step(dataclasses.replace(state, frozen=frozen), batch(i), key)
        return dataclasses.replace(new, frozen=()), values

    def update(i: Array, carry: Tree) -> Tree:
        state, lines = carry
        state, values = advance(state, i)
        return state, jax.tree.map(lambda line, value: line.at[i].set(value), lines, values)

    def segment(carry: Tree, bound: Array) -> tuple[Tree, Tree]:
        carry = jax.lax.fori_loop(bound[0], bound[1], update, carry)
        if plan.probe is None:
            return carry, ()
        seen = {"data": shared["data"]} if plan.with_data else {}
        return carry, plan.probe(carry[0].params, **seen)

    values = jax.eval_shape(advance, state, 0)[1]
    lines = jax.tree.map(lambda value: jnp.zeros((plan.steps, *value.shape)), values)
    (state, lines), curve = jax.lax.scan(segment, (state, lines), shared["bounds"])
    return state if plan.keep_state else dataclasses.replace(state, opt=(), memory=()), lines, curve


def _shapes(params: Any, stacked: bool, plan: tuple[Tune, int, Any], memory: Tree) -> State:
    """Shapes of one run's first state."""
    if callable(params):
        params = _drawn(params)
    else:
        params = jax.eval_shape(lambda tree: tree, params)
        first = 1 if stacked else 0
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[first:], leaf.dtype), params
        )
    leaves, tree = jax.tree.flatten(params)
    return dataclasses.replace(_begun(tuple(leaves), tree, *plan), memory=memory)


@lru_cache(maxsize=64)
def _drawn(init: Callable[[Array], Params]) -> Tree:
    return jax.eval_shape(init, jax.random.key(0))


@lru_cache(maxsize=64)
def _begun(leaves: tuple[Any, ...], tree: Any, tune: Tune, steps: int, axes: Any) -> State:
    tx = optimizer(tune, steps, _thaw(axes))
    return jax.eval_shape(lambda p: start(p, tx, steps), jax.tree.unflatten(tree, leaves))


def _bounds(steps: int, points: int, first: bool) -> np.ndarray:
    """First and last update [segments, 2] between looks; an empty segment is a look at 0."""
    ends = np.round(np.linspace(0, steps, max(points, 1) + 1)).astype(np.int32)
    pairs = np.stack([ends[:-1], ends[1:]], axis=1)
    return np.concatenate([np.zeros((1, 2), np.int32), pairs]) if first and points else pairs


def _freeze(axes: Tree) -> Any:
    """Axes as something hashable."""
    leaves, tree = jax.tree.flatten(axes, is_leaf=is_axes)
    return tuple(leaves), tree


def _thaw(frozen: Any) -> Tree:
    return jax.tree.unflatten(frozen[1], frozen[0])


def _check(
    seeds: Sequence[int],
    hyper: Mapping[str, np.ndarray],
    tables: Sequence[Table],
    rows: np.ndarray,
    stacked: Tree,
    mode: str,
    mesh: Mesh | None,
) -> None:
    """Every argument that has a value per run has S of them, and the tables are alike."""
    runs = len(seeds)
    if mode not in MODES:
        raise UserError(f"population mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "serial" and hyper:
        raise UserError("population: mode 'serial' takes no hyper; give each setting its own Tune")
    if mode != "serial" and mesh is not None:
        raise UserError("population: a mesh is for mode 'serial'; other modes spread the runs")
    counts = {"tables": len(tables)} | {f"hyper {name}": len(v) for name, v in hyper.items()}
    if len(rows) > 1:
        counts["rows"] = len(rows)
    if stacked is not None:
        counts["params"] = len(jax.tree.leaves(stacked)[0])
    wrong = {name: count for name, count in counts.items() if count != runs}
    if wrong or not runs:
        raise UserError(f"population of {runs} seeds, but {wrong or 'no seed at all'}")
    lengths = sorted({len(table) for table in tables})
    names = {tuple(sorted(device_columns(table))) for table in tables}
    if len(lengths) > 1 or len(names) > 1 or not lengths[0]:
        raise UserError(
            f"population tables need one length above 0 and the same columns, got lengths "
            f"{lengths} and columns {sorted(names)}"
        )


def _starts(params: Any, stacked: bool, seeds: Sequence[int]) -> Callable[[int], Params]:
    if callable(params):
        return lambda i: params(jax.random.key(seeds[i]))
    return lambda i: jax.tree.map(lambda leaf: leaf[i], params) if stacked else params


def _serial(
    objective: Objective,
    begin: Callable[[int], Params],
    tables: Sequence[Table],
    rows: np.ndarray,
    seeds: Sequence[int],
    tune: Tune,
    probe: Callable[[Params], Tree] | None,
    looks: np.ndarray,
    **settings: Any,
) -> Population:
    """One ``fit`` after another; the weights of a run that broke are NaN."""
    trained, curves, failed = [], [], []
    for i, seed in enumerate(seeds):
        seen: list[Tree] = []

        def look(state: State, seen: list[Tree] = seen) -> dict[str, float]:
            if probe and int(state.step) in looks:
                seen.append(jax.device_get(probe(state.params)))
            return {}

        params, table = begin(i), tables[i].take(rows[min(i, len(rows) - 1)])
        calls = {"evaluate": look, "eval_every": 1} if probe else {}
        try:
            key = jax.random.key(seed)
            state = fit(objective, params, table, tune, key, progress=False, **calls, **settings)
            params = state.params
        except NotFinite:
            failed.append(i)
            params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
            seen += [jax.device_get(probe(params))] * (len(looks) - len(seen)) if probe else []
        trained.append(jax.device_get(params))
        curves.append(_stack(seen) if probe else ())
    return Population(_stack(trained), {}, _stack(curves), looks, tuple(failed))


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
