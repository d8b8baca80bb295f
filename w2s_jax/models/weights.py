"""Safetensors folders: our parameter tree from them, slice by slice, and to them, file by file.

bfloat16 goes through numpy (ml_dtypes); torch is never needed. A leaf is read straight into its
shards, so that no host holds a model that is spread over several.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import UserError
from w2s_jax.mesh import shardings
from w2s_jax.models.config import Config
from w2s_jax.models.families import FAMILIES, Tensor, weights
from w2s_jax.models.transformer import shapes
from w2s_jax.types import Model, Params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What older checkpoints carry besides weights: tables that are computed here.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Stored:
    """The open tensors of a folder: name -> file handle, and the folder for messages."""

    handles: Mapping[str, Any]
    folder: Path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return tuple(self.handles[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the stored dtype.

        Raises:
          UserError: a number in it is NaN or infinite.
        """
        values = np.asarray(self.handles[name].get_slice(name)[index])
        if not finite(values):
            raise UserError(
                f"{self.folder}: tensor {name} holds NaN or infinity; the training that wrote it "
                "broke or the file is damaged: take an earlier checkpoint or download it again"
            )
        return values


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Stored]:
    """The tensors of ``model.safetensors`` or of the files of its index.

    Raises:
      UserError: no weights, an index that names an absent file or tensor, a corrupt file.
    """
    with contextlib.ExitStack() as stack:
        if (folder / INDEX).is_file():
            where = _index(folder)
        elif (folder / SINGLE).is_file():
            where = None
        else:
            raise UserError(
                f"{folder} has no {SINGLE} (nor {INDEX}); other weight formats must be "
                "converted to safetensors first"
            )
        files = sorted(set(where.values())) if where else [SINGLE]
        opened = {file: stack.enter_context(_open(folder / file)) for file in files}
        found = {name: file for file in files for name in opened[file].keys()}  # noqa: SIM118
        for name, file in (where or {}).items():
            if found.get(name) != file:
                raise UserError(f"{folder / INDEX} says {name} is in {file}, which lacks it")
        yield Stored({name: opened[file] for name, file in found.items()}, folder)


def finite(values: np.ndarray) -> bool:
    """Whether every number is finite; about as fast as reading them."""
    if values.dtype == jnp.bfloat16:  # numpy knows it only by slow casts: all exponent bits set?
        exponent = np.uint16(0x7F80)
        return not bool(((values.view(np.uint16) & exponent) == exponent).any())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _index(folder: Path) -> dict[str, str]:
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is not a safetensors index: {error!r}") from None


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download the folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}): download or export it again"
        ) from None


def read(folder: Path, model: Model, *, mesh: Mesh | None = None) -> Params:
    """The parameters of ``model`` from a folder, in its ``param_dtype``, sharded over ``mesh``.

    Raises:
      UserError: see ``opened``; a tensor that is missing, of another shape than the config says,
        not finite, or not expected.
    """
    config: Config = model.config
    sizes = shapes(config)
    with opened(folder) as stored:
        table = _table(stored, config)
        placed = None if mesh is None else shardings(model.axes, mesh, sizes)

        def make(path: Any, shape: jax.ShapeDtypeStruct, sharding: Any = None) -> Any:
            leaf = leaf_name(path)

            def part(index: Any) -> np.ndarray:
                real = _real_shape(config, leaf, shape.shape)
                return _padded_part(stored, table[leaf], leaf, real, shape, index)

            if sharding is None:
                return jnp.asarray(part((slice(None),) * len(shape.shape)))
            return jax.make_array_from_callback(shape.shape, sharding, part)

        trees = (sizes,) if placed is None else (sizes, placed)
        return jax.tree_util.tree_map_with_path(make, *trees)


def leaf_name(path: Any) -> str:
    """ "layers/q" for the key path of that leaf."""
    return "/".join(str(entry.key) for entry in path)


def _real_shape(config: Config, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf without the padding of the vocabulary."""
    axis = {"embed": 0, "unembed": 1}.get(leaf)
    return tuple(config.vocab if i == axis else n for i, n in enumerate(shape))


def _padded_part(
    stored: Stored,
    tensor: Tensor,
    leaf: str,
    real: tuple[int, ...],
    shape: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
) -> np.ndarray:
    """``_part`` of a leaf whose ``shape`` has zeros beyond its ``real`` shape."""
    bounds = [w.indices(size)[:2] for w, size in zip(index, shape.shape, strict=True)]
    if any(a >= n for (a, _), n in zip(bounds, real, strict=True)):
        return np.zeros([b - a for a, b in bounds], shape.dtype)  # a shard of padding alone
    inside = [(min(a, n), min(b, n)) for (a, b), n in zip(bounds, real, strict=True)]
    part = _part(stored, tensor, leaf, real, tuple(slice(*pair) for pair in inside))
    missing = [(0, b - a - n) for (a, b), n in zip(bounds, part.shape, strict=True)]
    part = np.pad(part, missing) if any(after for _, after in missing) else part
    return part.astype(shape.dtype)


def _part(
    stored: Stored, tensor: Tensor, leaf: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The numbers of a leaf at ``index``, read from the tensors that hold them."""
    bounds = [slice(*where.indices(size)[:2]) for where, size in zip(index, shape, strict=True)]
    layers = bounds.pop(0) if leaf.startswith("layers/") else None
    if tensor.block[1] > 1:  # our columns begin after the earlier blocks'
        shift = tensor.block[0] * shape[-1]
        bounds[-1] = slice(bounds[-1].start + shift, bounds[-1].stop + shift)
    at = tuple(reversed(bounds)) if tensor.transposed else tuple(bounds)

    def one(name: str) -> np.ndarray:
        value = stored.read(name, at)
        return value.T if tensor.transposed else value

    if layers is None:
        return one(tensor.name)
    return np.stack([one(tensor.name.format(i)) for i in range(layers.start, layers.stop)])


def _table(stored: Stored, config: Config) -> dict[str, Tensor]:
    """``families.weights`` in the names this folder uses; everything checked before reading."""
    prefix = FAMILIES[config.family].prefix
    table = weights(config)
    first = table["embed"].name
    if first not in stored.handles and first.removeprefix(prefix) in stored.handles:
        table = {
            leaf: Tensor(t.name.removeprefix(prefix), t.transposed, t.block)
            for leaf, t in table.items()
        }
    want: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(config)):
        name = leaf_name(path)
        real = _real_shape(config, name, leaf.shape)
        want.update(stored_shapes(table[name], name, real))
    for name, shape in want.items():
        if name not in stored.handles:
            raise UserError(
                f"{stored.folder}: the weights lack tensor {name} that config.json needs"
            )
        if stored.shape(name) != shape:
            raise UserError(
                f"{stored.folder}: tensor {name} has shape {stored.shape(name)}, "
                f"config.json says {shape}"
            )
    _refuse_unexpected(stored, config, set(want))
    return table


def _refuse_unexpected(stored: Stored, config: Config, want: set[str]) -> None:
    extra = {name for name in stored.handles if name not in want and not name.endswith(_BUFFERS)}
    extra -= {"lm_head.weight"} if config.tie else set()
    if extra:
        some = ", ".join(sorted(extra)[:3])
        raise UserError(
            f"{stored.folder}: {len(extra)} tensors do not belong to a {config.family} model of "
            f"this config ({some}{', ...' if len(extra) > 3 else ''})"
        )


def stored_shapes(tensor: Tensor, leaf: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> stored shape of the tensors that hold a leaf of ``shape``."""
    names = [tensor.name]
    if leaf.startswith("layers/"):
        names, shape = [tensor.name.format(i) for i in range(shape[0])], shape[1:]
    shape = (*shape[:-1], shape[-1] * tensor.block[1])
    return dict.fromkeys(names, shape[::-1] if tensor.transposed else shape)


def real_leaves(config: Config, params: Params) -> dict[str, Any]:
    """Leaf name -> weights, without the padding of the vocabulary."""
    leaves = {leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in {"embed", "unembed"} & leaves.keys():
        real = _real_shape(config, name, leaves[name].shape)
        leaves[name] = leaves[name][: real[0], : real[1]]
    return leaves


def tensors(config: Config, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint as (name, contiguous host array), layer by layer."""
    table, leaves = weights(config), real_leaves(config, params)
    fused: dict[str, list[str]] = {}
    for leaf in table:
        fused.setdefault(table[leaf].name, []).append(leaf)
    for name, parts in fused.items():
        parts = sorted(parts, key=lambda leaf: table[leaf].block)
        layers = range(config.layers) if parts[0].startswith("layers/") else [None]
        for i in layers:
            arrays = [np.asarray(leaves[p] if i is None else leaves[p][i]) for p in parts]
            array = np.concatenate(arrays, axis=-1)
            array = array.T if table[parts[0]].transposed else array
            yield (
                name.format(i),
                np.ascontiguousarray(array.astype(jnp.dtype(dtype or array.dtype))),
            )


def _sizes(config: Config, params: Params, dtype: Any) -> dict[str, int]:
    """Bytes of every tensor, in the order of ``tensors``."""
    leaves = real_leaves(config, params)
    sizes: dict[str, int] = {}
    for leaf, tensor in weights(config).items():
        width = jnp.dtype(dtype or leaves[leaf].dtype).itemsize
        for name, shape in stored_shapes(tensor, leaf, leaves[leaf].shape).items():
            sizes.setdefault(name, math.prod(shape) * width)
    return sizes


def write(folder: Path, config: Config, params: Params, dtype: Any, max_shard: int) -> None:
    """Write the tensors into ``folder``: one file, or an index and files of ``max_shard`` bytes."""
    from safetensors.numpy import save_file

    sizes = _sizes(config, params, dtype)
    shards: list[list[str]] = [[]]
    room = max_shard
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    files = [SINGLE] if count == 1 else files
    source = tensors(config, params, dtype)
    for file, names in zip(files, shards, strict=True):
        content = dict(next(source) for _ in names)
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library leaves it readable by its owner alone
    if count > 1:
        where = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
