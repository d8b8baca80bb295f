"""Devices: the mesh, where weights and batches live on it, several hosts, the compilation cache.

Logical axis names say what an axis of an array is; ``RULES`` says over which mesh axes it is split.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from w2s_jax.errors import UserError
from w2s_jax.types import Tree

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")

# Logical name -> mesh axes. Weights and activations have different names: an activation's batch
# axis takes fsdp, so its width must not, while a weight's width may.
RULES: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    # weights
    ("layers", None),
    ("vocab", ("tensor",)),
    ("position", None),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", None),
    ("ffn", ("tensor",)),
    ("norm", None),
    ("classes", None),
    # activations
    ("batch", BATCH_AXES),
    ("length", ("context",)),
    ("act_embed", None),
    ("act_heads", ("tensor",)),
    ("act_ffn", ("tensor",)),
    ("act_vocab", ("tensor",)),
)


def make_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor, context from ``"data=2,fsdp=4,tensor=1"``.

    Context splits long rows: every token-wise product runs on a stretch of the row, and each
    device attends from its stretch to the keys and values of the whole row. An axis left out is
    1, except data, which takes the devices that are left; ``-1`` asks for that by name.
    ``devices`` defaults to all devices of all processes.

    Raises:
      UserError: an unknown or repeated axis, a size that is no number, sizes that do not multiply
        to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _parse(spec or "")
    free = [name for name, size in sizes.items() if size == -1] or ["data"] * ("data" not in sizes)
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh {spec!r}: at most one axis may be -1")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {spec!r} asks for {known} devices or a multiple, there are {len(devices)}"
            if free
            else f"mesh {spec!r} asks for {math.prod(shape)} devices, there are {len(devices)}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parse(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(-1|[1-9]\d*)", part)
        if not match or match[1] not in AXES or match[1] in sizes:
            raise UserError(
                f"mesh {spec!r}: {part!r} is not one of {', '.join(AXES)} (each once) = a size; "
                'write it like "data=2,fsdp=4"'
            )
        sizes[match[1]] = int(match[2])
    return sizes


def shardings(axes: Tree, mesh: Mesh, shapes: Tree) -> Tree:
    """A ``NamedSharding`` per weight, from its logical axis names and ``RULES``.

    A mesh axis is left out where it does not divide the dimension, or where an earlier dimension
    of the same weight has it: such a weight is replicated along it, which is always right.

    Args:
      axes: tuple of logical names (or None) per weight.
      shapes: the weights, or anything with ``shape``, in the same tree.

    Raises:
      UserError: a logical name that ``RULES`` lacks, or a rank that differs from the names.
    """
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, _spec(names, mesh, tuple(leaf.shape))),
        axes,
        shapes,
        is_leaf=is_axes,
    )


def is_axes(leaf: Any) -> bool:
    """Whether ``leaf`` is one weight's axis names: None, or a tuple of names and None."""
    return leaf is None or (
        isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)
    )


def _spec(names: Sequence[str | None] | None, mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    rules, taken = dict(RULES), set()
    spec: list[Any] = []
    if names is not None and len(names) != len(shape):
        raise UserError(f"logical axes {tuple(names)} do not fit a weight of shape {shape}")
    for name, size in zip(names or (), shape, strict=False):
        if name is not None and name not in rules:
            raise UserError(f"logical axis {name!r} has no rule in mesh.RULES")
        wanted = tuple(a for a in rules.get(name or "") or () if a not in taken)
        if wanted and size % math.prod(mesh.shape[a] for a in wanted) == 0:
            taken.update(wanted)
            spec.append(wanted[0] if len(wanted) == 1 else wanted)
        else:
            spec.append(None)
    return PartitionSpec(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp; the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_rows(mesh: Mesh | None, size: int) -> np.ndarray:
    """Which rows [n] of a global batch of ``size`` this process has to supply.

    Raises:
      UserError: the batch does not divide over the data and fsdp axes.
    """
    if mesh is None:
        return np.arange(size)
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if size % ways:
        raise UserError(f"batch {size} does not divide over data x fsdp = {ways} devices")
    slices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in slices if index]))


def put_batch(batch: Mapping[str, Any], mesh: Mesh | None, size: int) -> dict[str, Any]:
    """The global batch on the devices, from the rows (``batch_rows``) this process holds."""
    if mesh is None:
        return jax.device_put(dict(batch))
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            sharding, leaf, (size, *leaf.shape[1:])
        ),
        dict(batch),
    )


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """``tree`` whole on every device of the mesh, except leaves already spread over it."""
    if mesh is None:
        return tree

    whole = replicated(mesh)

    def put(leaf: Any) -> Any:
        if getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh:
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.device_put(local(jax.random.key_data(leaf)), whole)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(local(leaf), whole)

    return jax.tree.map(put, tree)


def local(tree: Tree) -> Tree:
    """With several processes, arrays of this one as host arrays, which all can place together."""
    if jax.process_count() == 1:
        return tree

    def fetch(leaf: Any) -> Any:
        mine = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        return np.asarray(leaf) if mine else leaf

    return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def rules_context(mesh: Mesh | None) -> Iterator[None]:
    """Within it, logical constraints on activations mean ``RULES`` on ``mesh`` (None: nothing)."""
    if mesh is None:
        yield
        return
    from flax.core import spmd

    with jax.set_mesh(mesh), spmd.logical_axis_rules(RULES):
        yield


def ruled() -> bool:
    """Whether code is being traced within ``rules_context`` of a mesh."""
    from flax.core import spmd

    return bool(spmd.get_logical_axis_rules())


def distribute() -> bool:
    """Join the other processes when a coordinator is configured; True when there are several.

    Configured means ``JAX_COORDINATOR_ADDRESS`` (with ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``), or a cluster scheduler that JAX recognises when
    ``W2S_DISTRIBUTED=1``. Must run before anything else touches a device.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif os.environ.get("W2S_DISTRIBUTED") == "1":
        jax.distributed.initialize()
    else:
        return False
    return jax.process_count() > 1


def compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, however small; returns the folder.

    Defaults to ``JAX_COMPILATION_CACHE_DIR``, else ``w2s_jax/xla`` in the user's cache folder.

    Raises:
      UserError: the folder cannot be made or written.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(cache) / "w2s_jax" / "xla"
    path = Path(folder or default).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the compilation cache {path}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
