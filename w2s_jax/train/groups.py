"""How many runs of a population train side by side: by measured speed, and by memory."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from w2s_jax.types import State, Tree

MODES = ("auto", "vmap", "batched", "map", "serial")
BATCHED = 8

# What "auto" goes by: the multiplications of an update (weights x rows x tokens). A group makes up
# to TOGETHER of them, in at most 32 runs, where an update makes less than SMALL. Measured on one
# core of an AMD EPYC, MLP heads of 64 inputs, 200 updates of 32 rows, 64 runs: microseconds per run
# and update in groups of
#            1      8     32     64
#   0.04M  14.5    9.5    8.4    7.9-8.7
#   0.10M  17.8   10.7   10.4
#   0.27M  26.9   21.0
#   0.80M  52.7   51.2 (4: 50.1)  71
# Transformers of 7k weights and more, on two cores: groups cost 10 to 17 %.
TOGETHER, SMALL, MOST = 4_000_000, 1_000_000, 32
# Accelerators, a guess that was not measured: all at once, as one small run leaves the chip idle.
SMALL_THERE = 10_000_000_000


def groups(
    mode: str,
    state: State,
    rows: int,
    shared: Tree,
    runs: int,
    devices: list[Any],
    limit: int | None,
    keep_state: bool,
) -> tuple[int, int]:
    """Runs that are vmapped together on a device, and runs of one launch of the program.

    ``mode`` "auto" takes the faster way for models of this size, and no more runs than fit: half of
    a device's memory, less what the runs share, is for those that train (weights, gradients,
    optimiser's state, memory; activations are not counted), half for what is left of those that
    have. Groups are evened out.

    Args:
      state: shapes of one run's first state.
      rows: of an update's micro-batch.
      shared: what all runs read: the frozen weights, the data (``pools``).
      limit: the caller's own largest group.
    """
    each = -(-runs // len(devices))
    widths = {"vmap": each, "batched": BATCHED, "map": 1}
    fits = launch = each
    if mode == "auto":
        frozen = jax.tree.leaves(shared.get("frozen"))
        weights = sum(np.size(leaf) for leaf in [*jax.tree.leaves(state.params), *frozen])
        widths["auto"] = _fastest(weights * rows * _tokens(shared["pools"]), each)
        half = max(room(devices[0]) - _bytes(shared), 0) // 2
        fits = max(1, half // max(_bytes((state.params, state.params, state.opt, state.memory)), 1))
        kept = _bytes((state.params, state.opt, state.memory) if keep_state else state.params)
        launch = max(1, half // max(kept, 1))
    width = min(widths[mode], fits, each, limit or each)
    if launch < each:
        each = max(width, launch // width * width)
    return -(-each // -(-each // width)), each * len(devices)


def _fastest(products: int, each: int) -> int:
    """Runs of a group, from the multiplications of one run's update."""
    if jax.default_backend() != "cpu":
        return each if products < SMALL_THERE else 1
    return min(MOST, TOGETHER // max(products, 1)) if products < SMALL else 1


def _tokens(pools: Tree) -> int:
    """Tokens of a row, over all its columns of tokens; 1 where there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(pools)
    return max(sum(x.shape[-1] for path, x in leaves if path[-1].key == "tokens"), 1)


def room(device: Any) -> int:
    """Bytes of memory that arrays may take on a device: of a CPU its share of half the host's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // 2 // jax.local_device_count()


def _bytes(tree: Tree) -> int:
    shapes = jax.tree.leaves(jax.eval_shape(lambda leaves: leaves, tree))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
