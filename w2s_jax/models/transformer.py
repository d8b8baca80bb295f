"""One decoder that is GPT-2, Llama 2/3, Qwen2.5, Qwen3 and OLMo-2 by configuration.

Parameters are an unboxed dict: ``embed`` [V,D], ``positions`` [P,D] (learned positions only),
``layers/<leaf>`` with a leading depth axis, ``final_norm`` [D] and, untied, ``unembed`` [D,V].
The layout is the same whether the layers are scanned or unrolled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import spmd as core_spmd
from flax.linen import spmd
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.errors import UserError
from w2s_jax.models.attention import mix, plan, rope_angles, rotate
from w2s_jax.models.backends import attend, ways
from w2s_jax.models.cache import Cache, extend, init_cache
from w2s_jax.models.config import Config, RopeScaling, flops_per_token
from w2s_jax.models.maps import attention_maps
from w2s_jax.models.remat import policy
from w2s_jax.types import Array, Model, Output, Params, Tree

__all__ = [
    "Cache",
    "Config",
    "RopeScaling",
    "decode",
    "flops_per_token",
    "init_cache",
    "params_count",
    "shapes",
    "transformer",
    "unstacked",
]


@functools.lru_cache(maxsize=64)
def transformer(config: Config) -> Model:
    """The decoder of ``config`` as two pure functions; the same config gives the same ``Model``.

    ``apply(params, tokens, *, segment=None, position=None, rows=None, cache=None)`` takes [B,T]
    int arrays. Tokens of different ``segment`` never see each other (0 is padding); ``position``
    defaults to the distance from the start of the segment. ``rows`` (``take`` [B,R,L], ``back``
    [B,T,O]: see ``attention.Rows``) says instead who sees whom, so that a token may stand in
    several causal rows. With a ``cache`` (``init_cache``) the tokens follow those already in it
    and ``Output.cache`` is the extended cache.
    """
    module = Decoder(config)
    axes = jax.tree.map(lambda box: box.names, _boxed(config), is_leaf=_is_box)

    @jax.jit
    def init(key: Array) -> Params:
        params = module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda box: box.value, params, is_leaf=_is_box)

    def apply(params, tokens, *, segment=None, position=None, rows=None, cache=None) -> Output:
        length = (tokens if rows is None else rows["take"]).shape[-1]
        if length > config.max_length:
            raise UserError(
                f"model: {length} tokens exceed max_length {config.max_length}; use shorter rows"
            )
        out = module.apply({"params": params}, tokens, segment, position, rows, cache)
        assert isinstance(out, Output)
        return out

    return Model(init=init, apply=apply, axes=axes, config=config)


def decode(output: Output) -> Array:
    """Logits [B,T,V] float32 of an output's hidden states; V is the real vocabulary."""
    logits = jnp.einsum(
        "btd,dv->btv", output.hidden, output.unembed, preferred_element_type=jnp.float32
    )
    return logits[..., : output.vocab]


def params_count(config: Config) -> int:
    """How many numbers the model has; a tied embedding counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def shapes(config: Config) -> Tree:
    """Shape and dtype of every parameter, without making any."""
    return jax.tree.map(lambda box: box.value, _boxed(config), is_leaf=_is_box)


@functools.lru_cache(maxsize=64)
def _boxed(config: Config) -> Tree:
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), token)["params"]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _param(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], *axes: str) -> Array:
    """A parameter in the storage dtype, boxed with its logical axes at init."""
    config: Config = module.config  # pyright: ignore[reportAttributeAccessIssue]
    value = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(config.param_dtype)
    )
    return value  # pyright: ignore[reportReturnType]


def _padded(init: Any, config: Config, axis: int) -> Any:
    """``init`` for the real tokens along ``axis``, zeros for the padding."""

    def make(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        extra = shape[axis] - config.vocab
        real = tuple(n - extra * (i == axis) for i, n in enumerate(shape))
        pads = [(0, extra * (i == axis)) for i in range(len(shape))]
        return jnp.pad(init(key, real, dtype), pads) if extra else init(key, shape, dtype)

    return make


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
    def __call__(
        self, tokens, segment=None, position=None, rows=None, cache: Cache | None = None
    ) -> Output:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        shape = (config.vocab_rows, config.width)
        spread = config.width**-0.5  # the logits of a tied head start near 1
        init = _padded(nn.initializers.normal(spread), config, 0)
        embed = _param(self, "embed", init, shape, "vocab", "embed")
        embed = _constrain(embed, "vocab", "act_embed")  # gather whole rows, sharded by vocabulary
        x = embed[tokens].astype(dtype)
        position, scope, cache = plan(tokens, segment, position, rows, cache)
        if not config.rope:
            init, shape = nn.initializers.normal(0.01), (config.max_length, config.width)
            table = _param(self, "positions", init, shape, "position", "embed")
            x = x + table[position].astype(dtype)
        rope = rope_angles(config, position) if config.rope else None
        x = _constrain(x, "batch", "length", "act_embed")
        x, layers, taps = self._layers(x, rope, scope, cache)
        x = _norm(self, x, "final_norm")
        if config.tie:
            unembed = embed.T
        else:
            shape = (config.width, config.vocab_rows)
            init = _padded(nn.initializers.normal(0.02), config, 1)
            unembed = _param(self, "unembed", init, shape, "embed", "vocab")
        if cache is not None:
            cache = dataclasses.replace(cache, layers=layers)
        real = config.vocab if config.vocab_rows > config.vocab else None
        unembed = unembed.astype(dtype)
        return Output(hidden=x, unembed=unembed, cache=cache, vocab=real, taps=taps)

    @nn.nowrap
    def _layers(self, x, rope, scope, cache: Cache | None):
        config = self.config
        if cache is None and config.scanned and config.taps and not self.is_initializing():
            return self._tapped(x, rope, scope)
        if cache is None and (config.scanned or self.is_initializing()):
            block = Block
            if config.remat != "none":
                block = nn.remat(Block, prevent_cse=False, policy=policy(config.remat))
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=config.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stack(config, name="layers")(x, rope, scope)[0], (), ()
        return self._unrolled(x, rope, scope, cache)

    @nn.nowrap
    def _tapped(self, x, rope, scope):
        """The scan over the layers, keeping the outputs of ``config.taps`` and no others."""
        config, block = self.config, Block(self.config, parent=None)

        def run(params, x):
            return block.apply({"params": params}, x, rope, scope)[0]

        if config.remat != "none":
            run = jax.checkpoint(run, prevent_cse=False, policy=policy(config.remat))

        def body(carry, layer):
            (x, taps), (params, slot) = carry, layer
            x = run(params, x)
            return (x, taps.at[slot].set(x, mode="drop")), None

        count = len(config.taps)  # the slot of a layer that nobody asked for: dropped
        slots = [config.taps.index(i) if i in config.taps else count for i in range(config.layers)]
        taps = _constrain(
            jnp.zeros((count, *x.shape), x.dtype), None, "batch", "length", "act_embed"
        )
        layers = (self.variables["params"]["layers"], jnp.array(slots))
        (x, taps), _ = jax.lax.scan(body, (x, taps), layers)
        return x, (), tuple(taps)

    @nn.nowrap
    def _unrolled(self, x, rope, scope, cache: Cache | None):
        config, block = self.config, Block(self.config, parent=None)
        index = None if cache is None else cache.index - x.shape[1]  # where these tokens start

        def run(mapped, params, x, rope, scope, pair):
            return block.apply({"params": params}, x, rope, scope, pair, mapped)

        if config.remat != "none" and cache is None:
            run = jax.checkpoint(run, policy=policy(config.remat), static_argnums=0)
        run = jax.jit(run, static_argnums=0)  # traced, differentiated, lowered once for all layers
        pairs, outputs, maps, layers = [], [], [], self.variables["params"]["layers"]
        if not isinstance(layers, tuple):
            layers = unstacked(layers, config.layers)
        for i, layer in enumerate(layers):
            pair = None if cache is None else (*cache.layers[i], index)
            mapped = cache is None and i in config.maps
            x, (pair, seen) = run(mapped, layer, x, rope, scope, pair)
            pairs.append(pair)
            outputs.append(x)
            maps += [seen] if mapped else []
        return x, tuple(pairs), (*(outputs[i] for i in config.taps), *maps)


def unstacked(layers: Tree, depth: int) -> tuple[Tree, ...]:
    """The weights of each layer, from leaves with a leading depth axis.

    ``apply`` takes the tuple in place of ``params["layers"]`` wherever it runs unrolled: a decoding
    loop then does not slice the stack at every step.
    """
    # lax.split, whose transpose is one concatenation; indexing would add up padded gradients
    stacked, tree = jax.tree.flatten(layers)
    split = [jax.lax.split(leaf, [1] * depth, axis=0) for leaf in stacked]
    return tuple(
        jax.tree.unflatten(tree, [jnp.squeeze(leaf[i], 0) for leaf in split]) for i in range(depth)
    )


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its residual."""

    config: Config

    @nn.compact
    def __call__(self, x, rope, scope, pair=None, mapped=False):
        pre = self.config.placement == "pre"
        y = _norm(self, x, "attention_norm") if pre else x
        y, beside = self._attention(y, rope, scope, pair, mapped)
        x = x + (y if pre else _norm(self, y, "attention_norm"))
        x = _constrain(x, "batch", "length", "act_embed")
        y = self._ffn(_norm(self, x, "ffn_norm") if pre else x)
        x = x + (y if pre else _norm(self, y, "ffn_norm"))
        return _constrain(x, "batch", "length", "act_embed"), beside

    @nn.nowrap
    def _attention(self, x, rope, scope, pair, mapped):
        """What attention adds; beside it the longer cache and, if ``mapped``, the attention map."""
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
            q, k = rotate(q, rope), rotate(k, rope)
        q = _constrain(q, "batch", "length", "act_heads", None)
        k, v = (_constrain(y, "batch", None, "act_heads", None) for y in (k, v))  # whole rows
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
        seen = attention_maps(q, k, scope) if mapped else None
        if pair is None:
            asked = "xla" if self.is_initializing() else config.attention  # one token: no kernel's
            y = mix(asked, q, k, v, scope)
        else:
            pair = extend(*pair, k, v)
            y = attend(q, pair[0].swapaxes(2, 3), pair[1], scope.mask)
        y = checkpoint_name(y.reshape(batch, length, -1), "attention")
        depth = (2 * config.layers) ** -0.5
        y = _linear(self, y, "o", config.width, "heads", "embed", config.bias == "all", depth)
        return y, (pair, seen)

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


def _linear(module, x, name, size, source, target, biased=False, scale=1.0):
    """``x @ W`` (+ bias) with ``W`` [in, out], initialised to normal(scale / sqrt(in)).

    Where the layer also has ``<name>_a`` [in, r] and ``<name>_b`` [r, out] (``models.lora``),
    ``x @ a @ b`` is added.
    """
    width = x.shape[-1]
    init = nn.initializers.normal(scale * width**-0.5)
    weight = _param(module, name, init, (width, size), source, target).astype(x.dtype)
    # Rows flattened: the weight gradient is then one product without a transposed copy (CPU: 1.2x)
    # unless rows are split over devices, which flattening would undo
    rows = x if ways("length") > 1 else x.reshape(-1, width)
    y = rows @ weight
    if module.has_variable("params", f"{name}_a"):
        a, b = (module.get_variable("params", f"{name}_{side}").astype(x.dtype) for side in "ab")
        y = y + rows @ a @ b
    y = y.reshape(*x.shape[:-1], size)
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
