"""One decoder that is GPT-2, Llama 2/3, Qwen2.5, Qwen3 and OLMo-2 by configuration.

Parameters are an unboxed dict: ``embed`` [V,D], ``positions`` [P,D] (learned positions only),
``layers/<leaf>`` with a leading depth axis, ``final_norm`` [D] and, untied, ``unembed`` [D,V].
The layout is the same whether the layers are scanned or unrolled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import spmd as core_spmd
from flax.linen import spmd
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.errors import UserError
from w2s_jax.types import Array, Model, Output, Params

_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "outputs": _POLICIES.save_only_these_names("attention", "ffn"),
}
_HIDDEN_SCORE = -1e30


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by ``factor``, short kept."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Config:
    """The architecture; zero in ``kv_heads``, ``head_dim`` or ``ffn`` means the usual value.

    ``family`` is the Hugging Face ``model_type`` that ``models.hf.export`` writes. ``placement``
    "post" is OLMo-2's (the norm on what a sub-layer adds). ``rope`` is the base of the rotary
    frequencies, 0 for learned positions. ``qk_norm`` is "none", "head" (Qwen3) or "all" (OLMo-2,
    one norm over the whole projection); ``bias`` is "none", "qkv" (Qwen2.5) or "all" (GPT-2).
    ``dtype`` is for compute, ``param_dtype`` for what ``init`` makes. ``remat`` is "none" or a
    key of ``REMAT``. ``scan`` None scans deep stacks only (unrolled is faster, scanned compiles
    in a time independent of depth).

    Raises:
      UserError: sizes that do not fit together or an unknown option.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    activation: str = "swiglu"
    norm: str = "rms"
    placement: str = "pre"
    eps: float = 1e-5
    rope: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: str = "none"
    bias: str = "none"
    tie: bool = True
    max_length: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan: bool | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        usual = {
            "kv_heads": self.heads,
            "head_dim": self.width // max(self.heads, 1),
            "ffn": 4 * self.width if self.activation == "gelu" else -(-self.width // 3) * 8,
        }
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        _check(self)

    @property
    def scanned(self) -> bool:
        """Whether the layers run as a scan."""
        return self.layers > 8 if self.scan is None else self.scan


def _check(config: Config) -> None:
    options = {
        "activation": ("swiglu", "gelu"),
        "norm": ("rms", "layer"),
        "placement": ("pre", "post"),
        "qk_norm": ("none", "head", "all"),
        "bias": ("none", "qkv", "all"),
        "remat": ("none", *REMAT),
    }
    for name, allowed in options.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"model: {name}={getattr(config, name)!r} is not one of {allowed}")
    for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_length"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise UserError(
                f"model: {name} must be a positive integer, got {getattr(config, name)}"
            )
    if config.heads % config.kv_heads:
        raise UserError(
            f"model: {config.heads} heads do not divide into {config.kv_heads} key/value heads"
        )
    if config.rope and config.head_dim % 2:
        raise UserError(f"model: rotary positions need an even head_dim, got {config.head_dim}")


def transformer(config: Config) -> Model:
    """The decoder of ``config`` as two pure functions.

    ``apply(params, tokens, *, segment=None, position=None, cache=None)`` takes [B,T] int arrays.
    Tokens of different ``segment`` never see each other (0 is padding); ``position`` defaults to
    the distance from the start of the segment. With a ``cache`` (``init_cache``) the tokens
    follow those already in it and ``Output.cache`` is the extended cache.
    """
    module = Decoder(config)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), token)["params"]
    axes = jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)

    def init(key: Array) -> Params:
        params = module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda box: box.value, params, is_leaf=_is_box)

    def apply(params, tokens, *, segment=None, position=None, cache=None) -> Output:
        if tokens.shape[1] > config.max_length:
            raise UserError(
                f"model: {tokens.shape[1]} tokens exceed max_length {config.max_length}; "
                "use shorter rows"
            )
        out = module.apply({"params": params}, tokens, segment, position, cache)
        assert isinstance(out, Output)
        return out

    return Model(init=init, apply=apply, axes=axes, config=config)


def decode(output: Output) -> Array:
    """Logits [B,T,V] float32 of an output's hidden states."""
    return jnp.einsum(
        "btd,dv->btv", output.hidden, output.unembed, preferred_element_type=jnp.float32
    )


def params_count(config: Config) -> int:
    """How many numbers the model has; a tied embedding counts once."""
    module = Decoder(config)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), token)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def flops_per_token(config: Config, length: int) -> float:
    """Floating-point operations of a training step per token of a causal row of ``length``.

    6 N + 6 L T H h: forward and backward of N weights that multiply (everything but an embedding
    that is only looked up, position tables and vectors), and of scores and mixing over the T/2
    tokens visible on average. Recomputation (remat) is not counted.
    """
    heads = config.heads * config.head_dim
    attention = config.width * (2 * heads + 2 * config.kv_heads * config.head_dim)
    ffn = (3 if config.activation == "swiglu" else 2) * config.width * config.ffn
    weights = config.layers * (attention + ffn) + config.vocab * config.width
    return 6.0 * weights + 6.0 * config.layers * length * heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, one pair of [B,K,S,h] arrays per layer.

    All rows write at the same slot ``index`` [], so that a write is one contiguous update; what a
    slot means is in ``segment`` [B,S] (0: padding or not yet written, never attended by real
    tokens). Prompts of different lengths may therefore be padded on either side, and a finished
    row goes on with segment 0. ``position`` [B] int32 is the next position of each row; padding
    does not advance it.
    """

    layers: tuple[tuple[Array, Array], ...]
    segment: Array
    position: Array
    index: Array


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """An empty cache of ``length`` slots for ``batch`` rows, in the compute dtype."""
    shape = (batch, config.kv_heads, length, config.head_dim)
    pair = lambda: (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))  # noqa: E731
    return Cache(
        layers=tuple(pair() for _ in range(config.layers)),
        segment=jnp.zeros((batch, length), jnp.int32),
        position=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _param(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], *axes: str) -> Array:
    """A parameter in the storage dtype, boxed with its logical axes at init."""
    config: Config = module.config  # pyright: ignore[reportAttributeAccessIssue]
    value = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(config.param_dtype)
    )
    return value  # pyright: ignore[reportReturnType]


def _constrain(x: Array, *names: str | None) -> Array:
    """The logical constraint on an activation, left out where the mesh does not divide an axis."""
    rules: dict[Any, Any] = dict(core_spmd.get_logical_axis_rules())
    if not rules:
        return x
    mesh = jax.sharding.get_abstract_mesh().shape
    fits = [
        None if size % math.prod(mesh.get(axis, 1) for axis in rules.get(name) or ()) else name
        for name, size in zip(names, x.shape, strict=True)
    ]
    return spmd.with_logical_constraint(x, tuple(fits))  # pyright: ignore[reportReturnType]


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    config: Config

    @nn.compact
    def __call__(self, tokens, segment=None, position=None, cache: Cache | None = None) -> Output:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = _param(
            self,
            "embed",
            nn.initializers.normal(0.02),
            (config.vocab, config.width),
            "vocab",
            "embed",
        )
        embed = _constrain(embed, "vocab", "act_embed")  # gather whole rows, sharded by vocabulary
        x = embed[tokens].astype(dtype)
        position, mask, cache = _plan(tokens, segment, position, cache)
        if not config.rope:
            table = _param(
                self,
                "positions",
                nn.initializers.normal(0.01),
                (config.max_length, config.width),
                "position",
                "embed",
            )
            x = x + table.astype(dtype)[position]
        rope = _rope(config, position) if config.rope else None
        x = _constrain(x, "batch", "length", "act_embed")
        x, layers = self._layers(x, rope, mask, cache)
        x = _norm(self, x, "final_norm")
        if config.tie:
            unembed = embed.T
        else:
            shape = (config.width, config.vocab)
            unembed = _param(self, "unembed", nn.initializers.normal(0.02), shape, "embed", "vocab")
        if cache is not None:
            cache = Cache(layers, cache.segment, cache.position, cache.index + tokens.shape[1])
        return Output(hidden=x, unembed=unembed.astype(dtype), cache=cache)

    @nn.nowrap
    def _layers(self, x, rope, mask, cache: Cache | None):
        config = self.config
        if cache is None and (config.scanned or self.is_initializing()):
            block = Block
            if config.remat != "none":
                block = nn.remat(Block, prevent_cse=False, policy=REMAT[config.remat])
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=config.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stack(config, name="layers")(x, rope, mask)[0], ()
        return self._unrolled(x, rope, mask, cache)

    @nn.nowrap
    def _unrolled(self, x, rope, mask, cache: Cache | None):
        config, block = self.config, Block(self.config, parent=None)

        def run(params, x, pair):
            return block.apply({"params": params}, x, rope, mask, pair)

        if config.remat != "none" and cache is None:
            run = jax.checkpoint(run, policy=REMAT[config.remat])
        pairs = []
        # lax.split, whose transpose is one concatenation; indexing would add up padded gradients
        stacked, tree = jax.tree.flatten(self.variables["params"]["layers"])
        split = [jax.lax.split(leaf, [1] * config.layers, axis=0) for leaf in stacked]
        for i in range(config.layers):
            layer = jax.tree.unflatten(tree, [jnp.squeeze(leaf[i], 0) for leaf in split])
            pair = None if cache is None else (*cache.layers[i], cache.index)
            x, pair = run(layer, x, pair)
            pairs.append(pair)
        return x, tuple(pairs)


def _plan(tokens, segment, position, cache: Cache | None):
    """Positions [B,T], mask [B or 1,T,S] of what each token sees, and the cache with the new
    tokens' segments entered."""
    length = tokens.shape[1]
    steps = jnp.arange(length, dtype=jnp.int32)
    if cache is not None:
        if segment is None:
            segment = jnp.ones_like(tokens)
        if position is None:
            real = (segment > 0).astype(jnp.int32)
            position = cache.position[:, None] + jnp.cumsum(real, axis=1) - real
        at = (jnp.int32(0), cache.index)
        seen = jax.lax.dynamic_update_slice(cache.segment, segment.astype(jnp.int32), at)
        slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
        causal = slots[None, :] <= cache.index + steps[:, None]
        mask = causal[None] & (segment[:, :, None] == seen[:, None, :])
        after = jnp.max(jnp.where(segment > 0, position + 1, cache.position[:, None]), axis=1)
        return position, mask, Cache(cache.layers, seen, after, cache.index)
    causal = (steps[:, None] >= steps[None, :])[None]
    if segment is None:
        return (steps[None] if position is None else position), causal, None
    if position is None:
        start = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
        position = steps[None] - jax.lax.cummax(jnp.where(start, steps[None], 0), axis=1)
    return position, causal & (segment[:, :, None] == segment[:, None, :]), None


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its residual."""

    config: Config

    @nn.compact
    def __call__(self, x, rope, mask, pair=None):
        pre = self.config.placement == "pre"
        y = _norm(self, x, "attention_norm") if pre else x
        y, pair = self._attention(y, rope, mask, pair)
        x = x + (y if pre else _norm(self, y, "attention_norm"))
        x = _constrain(x, "batch", "length", "act_embed")
        y = self._ffn(_norm(self, x, "ffn_norm") if pre else x)
        x = x + (y if pre else _norm(self, y, "ffn_norm"))
        return _constrain(x, "batch", "length", "act_embed"), pair

    @nn.nowrap
    def _attention(self, x, rope, mask, pair):
        config = self.config
        batch, length, _ = x.shape
        h, biased = config.head_dim, config.bias != "none"
        q = _linear(self, x, "q", config.heads * h, "embed", "heads", biased)
        k = _linear(self, x, "k", config.kv_heads * h, "embed", "kv_heads", biased)
        v = _linear(self, x, "v", config.kv_heads * h, "embed", "kv_heads", biased)
        if config.qk_norm == "all":
            q, k = _norm(self, q, "q_norm", "heads"), _norm(self, k, "k_norm", "kv_heads")
        q, k, v = (y.reshape(batch, length, -1, h) for y in (q, k, v))
        if config.qk_norm == "head":
            q, k = _norm(self, q, "q_norm", "head_dim"), _norm(self, k, "k_norm", "head_dim")
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        q = _constrain(q, "batch", "length", "act_heads", None)
        k, v = (_constrain(y, "batch", "length", "act_heads", None) for y in (k, v))
        if pair is None:
            y = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        else:
            keys, values, index = pair
            at = (0, 0, index, 0)
            keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(1, 2).astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2).astype(values.dtype), at)
            y, pair = attend(q, keys, values, mask), (keys, values)
        y = checkpoint_name(y.reshape(batch, length, -1), "attention")
        depth = (2 * config.layers) ** -0.5
        return _linear(
            self, y, "o", config.width, "heads", "embed", config.bias == "all", depth
        ), pair

    @nn.nowrap
    def _ffn(self, x):
        config, biased = self.config, self.config.bias == "all"
        y = _linear(self, x, "up", config.ffn, "embed", "ffn", biased)
        if config.activation == "swiglu":
            y = nn.silu(_linear(self, x, "gate", config.ffn, "embed", "ffn")) * y
        else:
            y = nn.gelu(y, approximate=True)
        y = _constrain(y, "batch", "length", "act_ffn")
        depth = (2 * config.layers) ** -0.5
        y = _linear(self, y, "down", config.width, "ffn", "embed", biased, depth)
        return checkpoint_name(y, "ffn")


def attend(q: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention: q [B,T,H,h], keys and values [B,K,S,h], mask [B or 1,T,S] -> [B,T,H,h].

    Scores and softmax are float32. A row that sees nothing averages what is there.
    """
    batch, length, heads, h = q.shape
    groups = keys.shape[1]
    # Query heads of a group ride on the time axis: a plain batched product is 6x faster on CPU
    # than one with a group axis of its own.
    q = (q * h**-0.5).swapaxes(1, 2).reshape(batch, groups, -1, h)
    scores = jnp.einsum("bktd,bksd->bkts", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores.reshape(batch, heads, length, -1), _HIDDEN_SCORE)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype).reshape(batch, groups, -1, keys.shape[2])
    out = jnp.einsum("bkts,bksd->bktd", weights, values, preferred_element_type=jnp.float32)
    # Divided after mixing: h numbers per query instead of S
    out = (out.reshape(batch, heads, length, h) / total).astype(q.dtype)
    return out.swapaxes(1, 2)


def _linear(module, x, name, size, source, target, biased=False, scale=1.0):
    """``x @ W`` (+ bias) with ``W`` [in, out], initialised to normal(scale / sqrt(in))."""
    width = x.shape[-1]
    init = nn.initializers.normal(scale * width**-0.5)
    weight = _param(module, name, init, (width, size), source, target).astype(x.dtype)
    # Rows flattened: the weight gradient is then one product without a transposed copy (CPU: 1.2x)
    y = (x.reshape(-1, width) @ weight).reshape(*x.shape[:-1], size)
    if biased:
        bias = _param(module, f"{name}_bias", nn.initializers.zeros, (size,), target)
        y = y + _like(bias, y)
    return y


def _norm(module, x, name, axis="norm"):
    """RMS or layer norm over the last axis, in float32."""
    config: Config = module.config
    size = x.shape[-1]
    y = x.astype(jnp.float32)
    layer = config.norm == "layer"
    if layer:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.eps)
    y = y * _like(_param(module, name, nn.initializers.ones, (size,), axis).astype(jnp.float32), y)
    if layer:
        bias = _param(module, f"{name}_bias", nn.initializers.zeros, (size,), axis)
        y = y + _like(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def _like(vector: Array, x: Array) -> Array:
    """The vector in the dtype and rank of ``x``, so that broadcasting is spelled out."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def _rope(config: Config, position: Array) -> tuple[Array, Array]:
    """Cosine and sine [B or 1,T,1,h/2] float32 of the rotary angles (Su et al. 2021)."""
    half = jnp.arange(config.head_dim // 2, dtype=jnp.float32)
    rate = config.rope ** (-half / (config.head_dim // 2))
    scaling = config.rope_scaling
    if scaling is not None:
        wave = 2 * jnp.pi / rate
        blend = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
        blend = jnp.clip(blend, 0.0, 1.0)
        rate = blend * rate + (1 - blend) * rate / scaling.factor
    angle = position.astype(jnp.float32)[:, :, None, None] * rate[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate the pairs (x_i, x_{i+h/2}) of [B,T,H,h]: the Hugging Face half-split layout."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
