"""Named groups of devices that need not be at hand: TPU slices, and any number of CPU devices."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from w2s_jax.errors import UserError

GIB = 2**30

# Memory of a chip and what the compiler lets a program use of it, GiB (cloud.google.com/tpu/docs;
# the second as libtpu 0.0.42 states it when a program is too large).
CHIPS: dict[str, tuple[float, float]] = {
    "v4": (32, 30.75),
    "v5e": (16, 15.75),
    "v5p": (95, 95.74),
    "v6e": (32, 31.25),
}
FLAT = ("v5e", "v6e")  # slices are two-dimensional; the others have three dimensions
COUNT = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class Topology:
    """Devices to compile for; ``memory`` is what a program may use of one, in bytes."""

    name: str
    kind: str
    devices: Sequence[Any]
    memory: int

    def __str__(self) -> str:
        what = "chip" if self.kind != "cpu" else "simulated device"
        count, size = len(self.devices), f"{self.memory / GIB:.4g} GiB"
        return f"{self.name}: {count} {what}{'s' * (count > 1)} with {size}{' each' * (count > 1)}"


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (8, 8)) of "v5e:8x8", ("cpu", (8,)) of "cpu:8".

    Raises:
      UserError: another form, an unknown kind of chip, or a shape that the kind does not have.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not match or (match[1] not in CHIPS and match[1] != "cpu"):
        raise UserError(
            f"topology {name!r} is unknown; write cpu:8, or one of {', '.join(CHIPS)} with a "
            'shape, like "v5e:8x8" or "v5p:2x2x1"'
        )
    kind, sizes = match[1], tuple(int(n) for n in match[2].split("x"))
    rank = 1 if kind == "cpu" else 2 if kind in FLAT else 3
    if len(sizes) != rank:
        form = {1: "cpu:8", 2: f"{kind}:4x4", 3: f"{kind}:2x2x1"}[rank]
        raise UserError(f"topology {name!r}: {kind} takes {rank} sizes, as in {form}")
    return kind, sizes


def prepare(name: str) -> None:
    """Set up this process to compile for ``name``; before JAX has looked for devices.

    Raises:
      UserError: see ``parse``.
    """
    kind, sizes = parse(name)
    if kind == "cpu":
        words = [w for w in os.environ.get("XLA_FLAGS", "").split() if not w.startswith(COUNT)]
        os.environ["XLA_FLAGS"] = " ".join([*words, f"{COUNT}={sizes[0]}"])
    os.environ["JAX_PLATFORMS"] = "cpu"  # leave accelerators that are at hand to others
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    _libtpu_alone()


def _libtpu_alone() -> None:
    """Tell libtpu that it runs without TPUs; effective until it is loaded."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud machine what it is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at once are fine: no device is used
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-64",  # any: keeps libtpu from guessing aloud
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)


def topology(name: str) -> Topology:
    """The devices of ``name``: "v4:2x2x2", "v5e:8x8", "v5p:2x2x1", "v6e:4x4", "cpu:8".

    TPU slices need the package libtpu (``pip install -e ".[tpu]"``) but no TPU.

    Raises:
      UserError: an unknown name, a shape that does not exist, libtpu not installed, or fewer CPU
        devices than asked for.
    """
    import jax

    kind, sizes = parse(name)

    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < sizes[0]:
            raise UserError(
                f"topology {name!r}: this process has {len(devices)} CPU devices; start it with "
                f"XLA_FLAGS={COUNT}={sizes[0]}"
            )
        return Topology(name, kind, devices[: sizes[0]], _host_memory() // sizes[0])
    return Topology(name, kind, _slice(name, kind), int(CHIPS[kind][1] * GIB))


def _slice(name: str, kind: str) -> Sequence[Any]:
    """Compile-only devices of a TPU slice."""
    try:
        importlib.import_module("libtpu")
    except ImportError as error:
        raise UserError(
            f'planning for {name} needs libtpu: pip install -e ".[tpu]" (no TPU is needed)'
        ) from error
    from jax.experimental import topologies

    _libtpu_alone()
    # one device per chip, as JAX shows v4 on a real slice
    more = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **more).devices
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"topology {name!r} does not exist: {said.removeprefix('INVALID_ARGUMENT: ')}"
        ) from error


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
