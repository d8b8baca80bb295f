"""Causal self-attention by different kernels: XLA everywhere (in tiles on a CPU), cuDNN on GPU,
splash on TPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import spmd
from jax.sharding import PartitionSpec

from w2s_jax.errors import UserError
from w2s_jax.models import tiles
from w2s_jax.types import Array

_HIDDEN_SCORE = -1e30
_BLOCK = 256  # queries whose scores exist together in a long row
_PARTS = 8  # parts of a row with keys of their own length
_LONG, _LARGE = 2048, 2**30  # tokens of a row, bytes of scores: then scores are not kept
_LANES = 128  # the width of a TPU register: splash works on multiples of it
_TILES = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv"),
    *("block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
)


def causal(
    asked: str, q: Array, k: Array, v: Array, segment: Array | None, lengths: Array | None = None
) -> Array:
    """Causal attention within segments: q [B,T,H,h], k and v [B,T,K,h] -> [B,T,H,h].

    ``asked`` is ``Config.attention``; ``segment`` [B,T] or None; ``lengths`` [B] int32 is the
    number of tokens of each row that matter, or None for all (a hint: the others may hold
    anything finite).

    Raises:
      UserError: a back end asked for by name that this batch or device does not allow.
    """
    name = choose(asked, q, k, segment)
    if name == "splash":
        return splash(q, k, v, segment)
    if name == "cudnn":
        return cudnn(q, k, v, lengths)
    if _tiled(q, segment):
        return tiles.causal(q, k, v, segment, lengths)
    return xla(q, k, v, segment)


def _tiled(q: Any, segment: Any | None) -> bool:
    """Whether the CPU's own form of "xla" is faster: no mesh to split it, rows that are worth it
    (measured at head_dim 32: from 128 tokens, from 256 where segments are compared)."""
    alone = math.prod(_axes()[0].values()) == 1
    return platform() == "cpu" and alone and q.shape[1] >= (128 if segment is None else 256)


def choose(asked: str, q: Any, k: Any, segment: Any | None) -> str:
    """The back end for these shapes on the devices of the mesh (no mesh: the default ones).

    Raises:
      UserError: see ``causal``.
    """
    kind = platform()
    name = {"gpu": "cudnn", "tpu": "splash"}.get(kind, "xla") if asked == "auto" else asked
    if name == "xla":
        return name
    check = _no_cudnn if name == "cudnn" else _no_splash
    fault = check(kind, q, k, segment)
    if fault is None:
        return name
    if asked == "auto":
        return "xla"
    raise UserError(f'model: attention={name!r} cannot serve this batch: {fault}; use "auto"')


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the devices compiled for, at hand or not."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def _axes() -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """Sizes of the mesh axes and the mesh axes of each logical name (empty without a mesh)."""
    rules: dict[Any, Any] = dict(spmd.get_logical_axis_rules())
    sizes = dict(jax.sharding.get_abstract_mesh().shape) if rules else {}
    return sizes, {name: tuple(axes or ()) for name, axes in rules.items()}


def ways(name: str) -> int:
    """Over how many devices the logical axis ``name`` is split."""
    sizes, rules = _axes()
    return math.prod(sizes.get(axis, 1) for axis in rules.get(name, ()))


def _no_cudnn(kind: str, q: Any, k: Any, segment: Any | None) -> str | None:
    """Why cuDNN cannot do this exactly, or None."""
    if kind != "gpu":
        return f"cuDNN needs an NVIDIA GPU, the devices are {kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"cuDNN takes head_dim up to 128 in steps of 8, not {q.shape[3]}"
    if segment is not None:
        return 'cuDNN cannot keep segments apart; give the batch attention "rows" instead'
    return _unsplit(q, k)


def _no_splash(kind: str, q: Any, k: Any, segment: Any | None) -> str | None:
    """Why the splash kernel cannot do this exactly, or None."""
    if kind != "tpu":
        return f"the splash kernel needs TPUs, the devices are {kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the splash kernel takes bfloat16 or float32, not {q.dtype}"
    if q.shape[3] % 64:
        return f"the splash kernel takes head_dim in steps of 64, not {q.shape[3]}"
    if q.shape[1] < _LANES:
        return f"the splash kernel takes rows from {_LANES} tokens, not {q.shape[1]}"
    return _unsplit(q, k)


def _unsplit(q: Any, k: Any) -> str | None:
    split = ways("act_heads")
    if ways("length") > 1:
        return "the kernel needs whole rows, the mesh splits them over its context axis"
    if q.shape[2] % split or k.shape[2] % split:
        return f"{q.shape[2]} heads and {k.shape[2]} key/value heads do not divide over {split}"
    return None


def xla(q: Array, k: Array, v: Array, segment: Array | None) -> Array:
    """The reference: rows from 512 tokens go in blocks of queries that skip the keys after them.

    Where the scores of a layer would be large, those of each block are made again in the backward
    pass. A row split over devices stays so: each mixes the whole keys for its own queries.
    """
    batch, length, heads, _ = q.shape
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    sizes, _ = _axes()
    scores = 4 * batch * heads * length * length // max(1, math.prod(sizes.values()))
    lean = length >= _LONG or scores >= _LARGE
    split = ways("length") if length % ways("length") == 0 else 1
    if split > 1:  # heads of a group ride on the time axis below, which a split axis cannot bear
        keys, values = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (keys, values))
    step = _step(length // split)
    if split > 1 or length < 2 * _BLOCK:
        step, part = (step if lean else length // split), length
    else:
        part = step * -(-length // (_PARTS * step))
    parts = []
    for start in range(0, length, part):
        stop = min(start + part, length)
        own, seen = (None, None) if segment is None else (segment[:, start:stop], segment[:, :stop])
        queries = (q[:, start:stop], jnp.arange(start, stop), own)
        run = functools.partial(
            _block, keys=keys[:, :, :stop], values=values[:, :, :stop], seen=seen
        )
        parts.append(_blocks(jax.checkpoint(run) if lean else run, queries, split, step))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _step(length: int) -> int:
    """Queries per block: the largest divisor up to ``_BLOCK`` that is worth a pass, else all."""
    sizes = range(_BLOCK, _BLOCK // 4 - 1, -1)
    return next((n for n in sizes if length % n == 0), length)


def _blocks(run: Callable[..., Array], queries: Any, split: int, step: int) -> Array:
    """``run`` on queries (q, places, segments), ``step`` of each of ``split`` stretches a time."""
    batch, length, *rest = queries[0].shape
    if length == split * step:
        return run(*queries)

    def cut(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], split, -1, step, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x.reshape(shape), axis + 1, 0)
        return x.reshape(*x.shape[: axis + 1], split * step, *x.shape[axis + 3 :])

    q, places, own = queries
    cuts = (cut(q, 1), cut(places, 0), None if own is None else cut(own, 1))
    out = jax.lax.map(lambda x: run(*x), cuts)
    out = jnp.moveaxis(out.reshape(-1, batch, split, step, *rest), 0, 2)
    return out.reshape(batch, length, *rest)


def _block(
    q: Array, places: Array, own: Array | None, *, keys: Array, values: Array, seen: Array | None
) -> Array:
    """Queries at ``places`` [Q] of segments ``own`` [B,Q] over keys of segments ``seen`` [B,S]."""
    mask = (places[:, None] >= jnp.arange(keys.shape[2])[None, :])[None]
    if own is not None and seen is not None:
        mask = mask & (own[:, :, None] == seen[:, None, :])
    return attend(q, keys, values, mask)


def attend(q: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention: q [B,T,H,h], keys and values [B,K,S,h], mask [B or 1,T,S] -> [B,T,H,h].

    Scores and softmax are float32. A row that sees nothing averages what is there.
    """
    batch, length, heads, h = q.shape
    groups = keys.shape[1]
    # Query heads of a group ride on the time axis: a plain batched product is 6x faster on CPU
    # than one with a group axis of its own.
    q = q.swapaxes(1, 2).reshape(batch, groups, -1, h)
    scores = jnp.einsum("bktd,bksd->bkts", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * h**-0.5
    scores = jnp.where(mask[:, None], scores, _HIDDEN_SCORE)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype).reshape(batch, groups, -1, keys.shape[2])
    out = jnp.einsum("bkts,bksd->bktd", weights, values, preferred_element_type=jnp.float32)
    # Divided after mixing: h numbers per query instead of S
    out = (out.reshape(batch, heads, length, h) / total).astype(q.dtype)
    return out.swapaxes(1, 2)


def cudnn(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    """cuDNN's flash attention through JAX: plain causal rows, no segments."""
    if lengths is not None:
        lengths = jnp.maximum(lengths, 1).astype(jnp.int32)  # an empty row has no softmax
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def splash(
    q: Array, k: Array, v: Array, segment: Array | None, *, interpret: bool = False
) -> Array:
    """The Pallas splash kernel, per device on its own rows and heads where a mesh is set."""
    length = q.shape[1]
    pad = -length % _LANES
    scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)

    def lay(x: Array) -> Array:  # [B,T,H,h] -> [B,H,T',h]; what pads the end is seen by none
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))

    places = (lay(scaled), lay(k), lay(v))
    if segment is not None:
        places += (jnp.pad(segment.astype(jnp.int32), ((0, 0), (0, pad))),)
    run: Callable[..., Array] = functools.partial(_splash_local, interpret)
    sizes, rules = _axes()
    if math.prod(sizes.values()) > 1:
        rows = rules["batch"] if q.shape[0] % ways("batch") == 0 else None
        spec = PartitionSpec(rows, rules["act_heads"], None, None)
        specs = (spec, spec, spec, PartitionSpec(rows, None))[: len(places)]
        run = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
    return run(*places)[:, :, :length].swapaxes(1, 2)


def _splash_local(interpret: bool, q: Array, k: Array, v: Array, segment: Any = None) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    _, heads, length, _ = q.shape
    size = next(n for n in (512, 256, _LANES) if length % n == 0)
    tiles: dict[str, Any] = dict.fromkeys(_TILES, size)
    kernel: Any = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**tiles),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if segment is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, library.SegmentIds(s, s)))(q, k, v, segment)
