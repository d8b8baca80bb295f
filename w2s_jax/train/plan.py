"""Plan before you rent: compile the real step for devices that are not there, and read its needs.

  python -m w2s_jax.train.plan --model llama-3.1-8b --method dpo --batch 64 --topology v5e:8x8

The program is the one that ``fit`` runs (same step, same shardings, donated state), lowered for
shapes alone: no weight is made. Memory is the compiler's own account; FLOPs are the model's own
formula, since the compiler counts a scanned layer once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import jax

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.train import fit as fits
from w2s_jax.train.collectives import Traffic, traffic
from w2s_jax.train.log import peak_flops
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.topology import GIB, Topology, topology
from w2s_jax.types import Batch, Objective, Params, Tree

UNFIT = 3  # exit code of a plan that does not fit
_QUICK = {"xla_backend_optimization_level": 0}  # the same buffers in half the time: nothing is run


@dataclass(frozen=True, eq=False)
class Recipe:
    """One update, down to every shape: leaves are ``ShapeDtypeStruct``.

    ``axes`` are the logical names of ``params``; ``frozen`` and ``places`` (its axes, None for
    whole copies) what the objective reads besides. ``tokens`` and ``flops`` are per update;
    ``offload`` as in ``fit``.
    """

    objective: Objective
    params: Params
    axes: Tree
    tune: Tune
    batch: Batch
    tokens: int
    flops: float
    frozen: Tree = ()
    places: Tree = None
    offload: bool = False


@dataclass(frozen=True)
class Options:
    """What a step can trade for memory: ``Tune.micro`` and ``moments``, ``Config.remat``,
    ``offload`` of ``fit``, and the ``rank`` of adapters (0 trains all weights)."""

    batch: int
    micro: int = 1
    remat: str = "none"
    moments: str = "float32"
    offload: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Draft:
    """A step that can be drawn up in several ways.

    ``flags`` names the flag of each field of ``Options`` that the user can set; only those are
    ever proposed. ``alone`` is a run that one device holds whole (others hold other runs).
    """

    title: str
    build: Callable[[Options], Recipe]
    options: Options
    flags: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes on each device: state and batch, what is alive besides at the worst moment, the
    program, and all of it. Of a step that the compiler gave up on only the last is known."""

    arguments: int
    temporaries: int
    program: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What one update needs; ``flops`` and ``tokens`` of all devices together."""

    topology: Topology
    mesh: str
    sizes: Sizes
    fits: bool
    traffic: dict[str, Traffic]
    flops: float
    tokens: int
    seconds: float
    cpu: float

    def __str__(self) -> str:
        chips = len(self.topology.devices)
        head = f"{self.topology}; mesh {self.mesh}"
        sizes = self.sizes
        if sizes.arguments:
            memory = (
                f"arguments {_gib(sizes.arguments)}, temporaries {_gib(sizes.temporaries)}, "
                f"program {_gib(sizes.program)}: peak {_gib(sizes.peak)}"
            )
        else:
            memory = f"needs {_gib(sizes.peak)} or more (the compiler stopped there)"
        share = sizes.peak / self.topology.memory
        verdict = "fits" if self.fits else "DOES NOT FIT"
        sent = ", ".join(f"{k} {t.count} ({_gib(t.bytes)})" for k, t in self.traffic.items())
        peak = peak_flops(self.topology.devices[0].device_kind)
        least = f", at least {self.flops / chips / peak:.3g} s at peak" if peak else ""
        lines = {
            "memory per device": memory,
            "of what it has": f"{share:.0%} of {_gib(self.topology.memory)}: {verdict}",
            "collectives": (sent or "none") if sizes.arguments else "unknown",
            "per step": f"{self.flops:.3g} model FLOPs, {self.tokens:,} tokens{least}",
            "compiled in": f"{self.seconds:.1f} s ({self.cpu:.1f} s of CPU time)",
        }
        return "\n".join([head, *(f"  {name:18} {text}" for name, text in lines.items())])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def plan(recipe: Recipe, where: Topology, mesh: str | None = None) -> Plan:
    """Compile the step of ``recipe`` for the devices of ``where``.

    Args:
      mesh: as in ``mesh.make_mesh``; default ``default_mesh``.

    Raises:
      UserError: a mesh that the devices or the batch do not divide over.
    """
    spec = mesh or default_mesh(recipe, where)
    devices = meshes.make_mesh(spec, where.devices)
    ways = math.prod(devices.shape[a] for a in meshes.BATCH_AXES)
    if recipe.tune.batch % (recipe.tune.micro * ways):
        raise UserError(
            f"batch {recipe.tune.batch} in {recipe.tune.micro} micro-batches does not divide over "
            f"data x fsdp = {ways} devices of mesh {spec}; use fewer of them, or tensor"
        )
    began, busy = time.perf_counter(), time.process_time()
    sizes, fits_in, sent = Sizes(0, 0, 0, 0), False, {}
    try:
        compiled = _lower(recipe, devices).compile(_QUICK if where.kind == "cpu" else None)
    except Exception as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        sizes = Sizes(0, 0, 0, needed)
    else:
        sizes, sent = _memory(compiled, where.kind), traffic(compiled.as_text())
        fits_in = sizes.peak <= where.memory
    return Plan(
        topology=where,
        mesh=spec,
        sizes=sizes,
        fits=fits_in,
        traffic=sent,
        flops=recipe.flops,
        tokens=recipe.tokens,
        seconds=time.perf_counter() - began,
        cpu=time.process_time() - busy,
    )


def default_mesh(recipe: Recipe, where: Topology) -> str:
    """fsdp over as many devices as divide the rows of a micro-batch, tensor over the rest."""
    count = len(where.devices)
    fsdp = math.gcd(count, recipe.tune.batch // recipe.tune.micro)
    rest = f",tensor={count // fsdp}" if count > fsdp else ""
    return f"fsdp={fsdp}{rest}"


def _lower(recipe: Recipe, mesh: jax.sharding.Mesh) -> Any:
    """The update as ``fit`` would run it, on shapes."""
    tx = optimizer(recipe.tune, recipe.tune.total(1), recipe.axes)
    with meshes.rules_context(mesh):
        state, places = _state(recipe, tx, mesh)
        whole = meshes.replicated(mesh)
        frozen = _placed(recipe.frozen, jax.tree.map(lambda _: whole, recipe.frozen))
        if recipe.places is not None:
            held = meshes.shardings(recipe.places, mesh, recipe.frozen)
            frozen = _placed(recipe.frozen, held)
        rows = meshes.batch_sharding(mesh)
        batch = _placed(recipe.batch, jax.tree.map(lambda _: rows, recipe.batch))
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = fits.make_step(recipe.objective, tx, micro=recipe.tune.micro, norms=True)
        update = fits._program(step, places, mesh)
        return update.lower(_placed(state, places), frozen, batch, _placed(key, whole))


def _state(recipe: Recipe, tx: Any, mesh: jax.sharding.Mesh) -> tuple[Tree, Tree]:
    """Shapes of the state and where ``fit`` puts it."""
    state = jax.eval_shape(lambda params: fits.start(params, tx, 1), recipe.params)
    places = fits._places(state, recipe.axes, mesh)
    return state, fits._offloaded(places, state) if recipe.offload else places


def _placed(shapes: Tree, places: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def _memory(compiled: Any, kind: str) -> Sizes:
    said = compiled.memory_analysis()
    program = said.generated_code_size_in_bytes
    arguments = said.argument_size_in_bytes
    fresh = said.output_size_in_bytes - said.alias_size_in_bytes
    if kind == "cpu":  # its peak leaves the temporaries out
        peak = arguments + fresh + said.temp_size_in_bytes
    else:  # its temporaries are the sum over memory spaces; the peak is that of HBM
        peak = said.peak_memory_in_bytes
    return Sizes(arguments, peak - arguments, program, peak + program)


def _needed(error: str) -> int | None:
    """Bytes that a program needs according to the compiler's refusal; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", error)
    if not found:
        return 0
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * units[unit])


def report(draft: Draft, name: str, mesh: str | None = None) -> int:
    """Print the plan of ``draft`` on the topology ``name`` and, where it does not fit, the two
    cheapest changes that make it fit; returns the exit code, 0 or ``UNFIT``.

    Raises:
      UserError: see ``topology`` and ``plan``.
    """
    where = topology(name)
    if draft.alone:
        where, mesh = dataclasses.replace(where, devices=where.devices[:1]), None
    print(f"{draft.title}, batch {draft.options.batch}", flush=True)
    found = plan(draft.build(draft.options), where, mesh)
    print(found, flush=True)
    if found.fits:
        return 0
    print("looking for the cheapest changes that make it fit", flush=True)
    changes = list(advise(draft, where, mesh))
    for i, (flags, better) in enumerate(changes, 1):
        peak = better.sizes.peak
        share = peak / where.memory
        print(f"  {i}. {flags}: {_gib(peak)} per device ({share:.0%}), mesh {better.mesh}")
    if not changes:
        print("  none found: take more devices or a smaller model")
    return UNFIT


def advise(
    draft: Draft, where: Topology, mesh: str | None = None, want: int = 2, most: int = 12
) -> Iterator[tuple[str, Plan]]:
    """The ``want`` cheapest changes under which ``draft`` fits, as (flags, plan); each compiled.

    At most ``most`` are compiled to the end; more of what already fits is left out.
    """
    fitting: list[Mapping[str, Any]] = []
    tried = 0
    for change in _candidates(draft):
        if any(set(small) <= set(change) for small in fitting):
            continue
        options = dataclasses.replace(draft.options, **change)
        try:
            recipe = draft.build(options)
            spec = mesh or default_mesh(recipe, where)
            if _held(recipe, where, spec) > where.memory:
                continue  # the state alone is too large
            found = plan(recipe, where, mesh)
        except UserError:
            continue  # parts that do not divide the batch, or not over the devices
        tried += found.sizes.arguments > 0  # a refusal takes seconds
        if found.fits:
            fitting.append(change)
            yield " ".join(_said(draft.flags[k], v) for k, v in change.items()), found
        if len(fitting) == want or tried == most:
            return


def _said(flag: str, value: Any) -> str:
    return flag if value is True else f"{flag} {value}"


# (cost, field, value): roughly the percent of speed that each change costs, or that it is worth to
# avoid; a smaller batch and adapters change the experiment itself, hence come last.
def _costs(options: Options) -> list[tuple[float, str, Any]]:
    order = ("none", "dots", "attention", "outputs", "full")
    stricter = order[order.index(options.remat) + 1 :] if options.remat in order else ("full",)
    remat = {"attention": 15, "full": 30}
    return [
        *((2.0 * i, "micro", options.micro * 2**i) for i in (1, 2, 3, 4)),
        *([(3.0, "moments", "bfloat16")] if options.moments != "bfloat16" else []),
        *((float(cost), "remat", name) for name, cost in remat.items() if name in stricter),
        *([(25.0, "offload", True)] if not options.offload else []),
        *((50.0 * i, "batch", options.batch // 2**i) for i in (1, 2)),
        *([(60.0, "rank", 16)] if not options.rank else []),
    ]


def _candidates(draft: Draft) -> list[dict[str, Any]]:
    """Sets of up to three changes, the cheapest first."""
    single = [one for one in _costs(draft.options) if one[1] in draft.flags]
    sets = [
        (sum(cost for cost, _, _ in chosen), {name: value for _, name, value in chosen})
        for size in (1, 2, 3)
        for chosen in combinations(single, size)
        if len({name for _, name, _ in chosen}) == size
    ]
    return [change for _, change in sorted(sets, key=lambda one: one[0])]


def _held(recipe: Recipe, where: Topology, spec: str) -> int:
    """Bytes per device of the state and the frozen weights, which no schedule can avoid."""
    mesh = meshes.make_mesh(spec, where.devices)
    tx = optimizer(recipe.tune, recipe.tune.total(1), recipe.axes)
    leaves = jax.tree.leaves(_placed(*_state(recipe, tx, mesh)))
    near = [leaf for leaf in leaves if leaf.sharding.memory_kind != fits.HOST]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in near
    )


if __name__ == "__main__":
    from w2s_jax.train.drafts import main

    main()
