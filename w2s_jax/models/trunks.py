"""Vision trunks: an MLP, a small CNN, a residual network, a vision transformer; pure functions.

Each reads the column ``image`` [B,H,W,C] (integers are divided by 255, floats taken as they are)
and gives class logits [B,classes] float32 and its taps from shallow to deep, the last of which is
the embedding [B,D] that the class head sees. Nothing has running statistics: where the original
networks have batch norm, ours have group norm, so that an output depends on its picture alone.
The head starts at zero, as all heads here do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.models.backends import platform
from w2s_jax.types import Array, Model, Output, Params, Tree

CONVOLUTIONS = ("auto", "xla", "columns")
DTYPES = ("float32", "bfloat16")
POOLS = ("mean", "cls")


@dataclass(frozen=True)
class Mlp:
    """Dense layers of ``widths`` ReLU units over the flat picture.

    ``image`` is (height, width, channels), ``dtype`` that of the products (float32, bfloat16).

    Raises:
      UserError: sizes below 1, an unknown dtype.
    """

    image: tuple[int, int, int]
    classes: int
    widths: tuple[int, ...] = (256, 128)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check(self, self.classes, *self.widths)


@dataclass(frozen=True)
class Cnn:
    """One 3x3 convolution with ReLU per stage, the later stages with stride 2; mean over places.

    ``conv`` as in ``convolve``; ``image``, ``dtype`` as in ``Mlp``.

    Raises:
      UserError: sizes below 1, a picture too small for so many stages, an unknown option.
    """

    image: tuple[int, int, int]
    classes: int
    widths: tuple[int, ...] = (16, 32, 64)
    dtype: str = "float32"
    conv: str = "auto"

    def __post_init__(self) -> None:
        _check(self, self.classes, len(self.widths), *self.widths)
        _check_stages(self.image, len(self.widths))


@dataclass(frozen=True)
class ResNet:
    """The residual network of He et al. 2015 (arXiv 1512.03385) for small pictures.

    A 3x3 convolution, then three stages of n = (depth - 2) / 6 basic blocks with ``width``, 2 and 4
    times as many channels, the later two halving the sides; shortcuts without weights (every other
    place, missing channels zero); mean over places. A ``width`` of 16 k gives the channels of a
    wide network (Zagoruyko and Komodakis 2016). Group norm with ``groups`` groups stands where the
    paper has batch norm. ``conv``, ``image``, ``dtype`` as in ``Cnn``.

    Raises:
      UserError: a depth that is not 6 n + 2, groups that do not divide the width, a picture too
        small, an unknown option.
    """

    image: tuple[int, int, int]
    classes: int
    depth: int = 20
    width: int = 16
    groups: int = 8
    dtype: str = "float32"
    conv: str = "auto"

    def __post_init__(self) -> None:
        _check(self, self.classes, self.depth, self.width, self.groups)
        _check_stages(self.image, 3)
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(f"ResNet: depth {self.depth} is not 6 n + 2; take 8, 14, 20, ..., 56")
        if self.width % self.groups:
            raise UserError(f"ResNet: {self.groups} groups do not divide width {self.width}")


@dataclass(frozen=True)
class Vit:
    """The vision transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929).

    Square patches of side ``patch``, learned positions, ``layers`` pre-norm blocks of width
    ``width`` with GELU layers of ``ffn`` units (0: four times the width), a last norm. ``pool`` is
    "mean" over patches or "cls", a learned token. ``image``, ``dtype`` as in ``Mlp``.

    Raises:
      UserError: patches that do not tile the picture, heads that do not divide the width, sizes
        below 1, an unknown option.
    """

    image: tuple[int, int, int]
    classes: int
    patch: int = 4
    width: int = 64
    layers: int = 4
    heads: int = 4
    ffn: int = 0
    pool: str = "mean"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check(self, self.classes, self.patch, self.width, self.layers, self.heads)
        high, wide, _ = self.image
        if high % self.patch or wide % self.patch:
            raise UserError(f"Vit: patches of side {self.patch} do not tile {high}x{wide} pictures")
        if self.width % self.heads:
            raise UserError(f"Vit: {self.heads} heads do not divide width {self.width}")
        if self.pool not in POOLS:
            raise UserError(f"Vit: pool {self.pool!r} is unknown; choose one of {', '.join(POOLS)}")


Trunk = Mlp | Cnn | ResNet | Vit
Body = Callable[[Params, Array], tuple[Array, ...]]


@functools.lru_cache(maxsize=64)
def trunk(config: Trunk) -> Model:
    """The network of ``config``, reading ``image`` [B,H,W,C]; the same config, the same ``Model``.

    ``Output.logits`` [B,classes] float32; ``Output.taps``: dense layers [B,D] (``Mlp``), stages
    [B,H,W,D] (``Cnn``, ``ResNet``) or blocks [B,T,D] (``Vit``), and last the embedding [B,D] (an
    ``Mlp``'s last layer is its embedding). Parameters are ``{"body": ..., "head": {"kernel" [D,
    classes], "bias"}}``.

    Raises:
      UserError: when applied to pictures of another shape.
    """
    weights, body, width = _PARTS[type(config)](config)
    head = {
        "kernel": _Weight((width, config.classes), ("embed", "classes")),
        "bias": _Weight((config.classes,), ("classes",)),
    }
    tree = {"body": weights, "head": head}

    def init(key: Array) -> Params:
        leaves, form = jax.tree.flatten(tree)
        keys = jax.random.split(key, len(leaves))
        made = [
            leaf.start(k, leaf.shape, jnp.float32) for leaf, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(form, made)

    def apply(params: Params, image: Array) -> Output:
        if image.shape[1:] != config.image:
            raise UserError(
                f"{type(config).__name__} is made for pictures {_by(config.image)}, "
                f"got {_by(image.shape[1:])}"
            )
        scale = 255.0 if jnp.issubdtype(image.dtype, jnp.integer) else 1.0
        taps = body(params["body"], (image.astype(jnp.float32) / scale).astype(config.dtype))
        head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["head"])
        logits = taps[-1].astype(jnp.float32) @ head["kernel"] + head["bias"][None]
        return Output(logits=logits, taps=taps)

    axes = jax.tree.map(lambda leaf: leaf.axes, tree)
    return Model(init, apply, axes, config, ("image",))


def named(name: str, image: tuple[int, int, int], classes: int) -> Model:
    """The trunk of a short name: "mlp-256-128" and "cnn-16-32" (units or channels per layer),
    "resnet-56" (depth), "vit-64" (width), each with the usual numbers otherwise.

    Raises:
      UserError: a name that is none of these, or what its config raises.
    """
    kind, *numbers = name.split("-")
    sizes = tuple(int(number) for number in numbers if number.isdecimal())
    if len(sizes) == len(numbers) and kind in ("mlp", "cnn"):
        return trunk((Mlp if kind == "mlp" else Cnn)(image, classes, sizes))
    if len(sizes) == len(numbers) == 1 and kind == "resnet":
        return trunk(ResNet(image, classes, depth=sizes[0]))
    if len(sizes) == len(numbers) == 1 and kind == "vit":
        return trunk(Vit(image, classes, width=sizes[0]))
    raise UserError(f"{name!r} names no trunk; write it like mlp-256-128, cnn-16-32, resnet-56")


def convolve(x: Array, kernel: Array, stride: int = 1, how: str = "auto") -> Array:
    """Convolution of [B,H,W,I] with ``kernel`` [K,K,I,O], K odd, (K - 1) / 2 zeros on every side.

    ``how`` "xla" is XLA's own; "columns" lays the K x K neighbourhoods side by side and multiplies
    once. "auto" takes "columns" on a CPU: there XLA's own gradient is 3 times as fast alone, but 14
    to 46 times as slow inside a loop (two cores, 28x28x16 and 8x8x32), and a ``population`` is one.
    """
    size = kernel.shape[0]
    pad = size // 2
    if how == "xla" or (how == "auto" and platform() != "cpu"):
        form = ("NHWC", "HWIO", "NHWC")
        edges = [(pad, pad), (pad, pad)]
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), edges, None, None, form)
    high, wide = (-(-n // stride) for n in x.shape[1:3])
    if size == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    reach = [stride * (n - 1) + 1 for n in (high, wide)]
    shifted = [
        x[:, i : i + reach[0] : stride, j : j + reach[1] : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float = 1e-5) -> Array:
    """Group norm (Wu and He 2018) of [B,H,W,D] over places and the D / ``groups`` channels of each
    group, in float32; the dtype of ``x``."""
    parts = x.astype(jnp.float32).reshape(*x.shape[:3], groups, -1)
    mean = parts.mean((1, 2, 4), keepdims=True)
    centred = parts - mean
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + eps)
    return (unit.reshape(x.shape) * scale + bias).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Layer norm of [...,D] in float32; the dtype of ``x``."""
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (unit * scale + bias).astype(x.dtype)


@dataclass(frozen=True)
class _Weight:
    """One weight: its shape, its logical axes, how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    start: Any = jax.nn.initializers.zeros


_HE = jax.nn.initializers.he_normal()
_SMALL = jax.nn.initializers.normal(0.02)
_ONES = jax.nn.initializers.ones


def _mlp(config: Mlp) -> tuple[Tree, Body, int]:
    high, wide, channels = config.image
    sizes = [high * wide * channels, *config.widths]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    weights = [_dense(a, b, "embed", "ffn", _HE) for a, b in pairs]

    def body(params: Params, image: Array) -> tuple[Array, ...]:
        x, taps = image.reshape(image.shape[0], -1), []
        for layer in params:
            x = jax.nn.relu(_affine(x, layer))
            taps.append(x)
        return tuple(taps) or (x,)

    return weights, body, sizes[-1]


def _cnn(config: Cnn) -> tuple[Tree, Body, int]:
    sizes = [config.image[2], *config.widths]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    weights = [{"kernel": _kernel(a, b), "bias": _Weight((b,), ("norm",))} for a, b in pairs]

    def body(params: Params, x: Array) -> tuple[Array, ...]:
        taps = []
        for number, layer in enumerate(params):
            x = convolve(x, layer["kernel"].astype(x.dtype), min(number, 1) + 1, config.conv)
            x = jax.nn.relu(x + _like(layer["bias"], x))
            taps.append(x)
        return (*taps, _pooled(x))

    return weights, body, sizes[-1]


def _resnet(config: ResNet) -> tuple[Tree, Body, int]:
    widths = [config.width * times for times in (1, 2, 4)]
    blocks = (config.depth - 2) // 6

    def pair(source: int, target: int) -> Tree:
        norms = {
            "scale": _Weight((target,), ("norm",), _ONES),
            "bias": _Weight((target,), ("norm",)),
        }
        return {"kernel": _kernel(source, target), **norms}

    def stage(source: int, target: int) -> Tree:
        return [
            [pair(target if i else source, target), pair(target, target)] for i in range(blocks)
        ]

    sources = [config.width, *widths[:-1]]
    stages = [stage(a, b) for a, b in zip(sources, widths, strict=True)]
    weights = {"stem": pair(config.image[2], config.width), "stages": stages}

    def normed(x: Array, layer: Params, stride: int) -> Array:
        x = convolve(x, layer["kernel"].astype(x.dtype), stride, config.conv)
        scale, bias = (_like(layer[name], x, jnp.float32) for name in ("scale", "bias"))
        return group_norm(x, scale, bias, config.groups)

    def block(x: Array, layers: Sequence[Params], stride: int) -> Array:
        y = normed(jax.nn.relu(normed(x, layers[0], stride)), layers[1], 1)
        x = x[:, ::stride, ::stride]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        return jax.nn.relu(x + y)

    def body(params: Params, x: Array) -> tuple[Array, ...]:
        x, taps = jax.nn.relu(normed(x, params["stem"], 1)), []
        for number, layers in enumerate(params["stages"]):
            for place, one in enumerate(layers):
                x = block(x, one, 2 if number and not place else 1)
            taps.append(x)
        return (*taps, _pooled(x))

    return weights, body, widths[-1]


def _vit(config: Vit) -> tuple[Tree, Body, int]:
    high, wide, channels = config.image
    side, width, heads = config.patch, config.width, config.heads
    ffn, cls = config.ffn or 4 * width, config.pool == "cls"
    tokens = (high // side) * (wide // side) + cls
    norm = {"scale": _Weight((width,), ("norm",), _ONES), "bias": _Weight((width,), ("norm",))}
    block = {
        **{"norm_1": norm, "norm_2": norm},
        "qkv": _dense(width, 3 * width, "embed", "heads", _SMALL),
        "out": _dense(width, width, "heads", "embed", _SMALL),
        "up": _dense(width, ffn, "embed", "ffn", _SMALL),
        "down": _dense(ffn, width, "ffn", "embed", _SMALL),
    }
    weights = {
        "patches": _dense(side * side * channels, width, None, "embed", _SMALL),
        "positions": _Weight((tokens, width), ("position", "embed"), _SMALL),
        "blocks": [block] * config.layers,
        "norm": norm,
    } | ({"cls": _Weight((width,), ("embed",), _SMALL)} if cls else {})

    def body(params: Params, image: Array) -> tuple[Array, ...]:
        x = _affine(_patches(image, side), params["patches"])
        if cls:
            first = jnp.broadcast_to(_like(params["cls"], x), (x.shape[0], 1, width))
            x = jnp.concatenate([first, x], axis=1)
        x, taps = x + params["positions"].astype(x.dtype)[None], []
        for layer in params["blocks"]:
            x = x + _attend(_normed(x, layer["norm_1"]), layer, heads)
            inner = jax.nn.gelu(
                _affine(_normed(x, layer["norm_2"]), layer["up"]), approximate=False
            )
            x = x + _affine(inner, layer["down"])
            taps.append(x)
        x = _normed(x, params["norm"])
        pooled = x[:, 0] if cls else x.astype(jnp.float32).mean(1).astype(x.dtype)
        return (*taps, pooled)

    return weights, body, width


def _attend(x: Array, layer: Params, heads: int) -> Array:
    """Full self-attention over the T tokens of [B,T,D]; softmax in float32."""
    batch, tokens, width = x.shape
    qkv = _affine(x, layer["qkv"]).reshape(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (width // heads) ** -0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(x.dtype), v)
    return _affine(mixed.reshape(x.shape), layer["out"])


def _patches(image: Array, side: int) -> Array:
    """Square patches [B,T,side*side*C] of pictures [B,H,W,C], row by row."""
    count, high, wide, channels = image.shape
    grid = image.reshape(count, high // side, side, wide // side, side, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, side * side * channels)


def _normed(x: Array, norm: Params) -> Array:
    scale, bias = (_like(norm[name], x, jnp.float32) for name in ("scale", "bias"))
    return layer_norm(x, scale, bias)


def _affine(x: Array, layer: Params) -> Array:
    return x @ layer["kernel"].astype(x.dtype) + _like(layer["bias"], x)


def _like(vector: Array, x: Array, dtype: Any = None) -> Array:
    """A vector with the rank of ``x``, for explicit broadcasting."""
    return vector.astype(dtype or x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _pooled(x: Array) -> Array:
    """Mean over places, [B,D] of [B,H,W,D]."""
    return x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)


def _dense(source: int, target: int, come: str | None, go: str, start: Any) -> Tree:
    return {
        "kernel": _Weight((source, target), (come, go), start),
        "bias": _Weight((target,), (go,)),
    }


def _kernel(source: int, target: int) -> _Weight:
    return _Weight((3, 3, source, target), (None, None, "embed", "ffn"), _HE)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check(config: Any, *sizes: int) -> None:
    name = type(config).__name__
    if len(config.image) != 3 or min(*config.image, *sizes) < 1:
        raise UserError(f"{name}: image is (height, width, channels) and all sizes are 1 or more")
    if config.dtype not in DTYPES:
        raise UserError(f"{name}: dtype {config.dtype!r} is unknown; choose {' or '.join(DTYPES)}")
    if getattr(config, "conv", "auto") not in CONVOLUTIONS:
        raise UserError(f"{name}: conv {config.conv!r} is unknown; {', '.join(CONVOLUTIONS)} are")


def _check_stages(image: tuple[int, int, int], stages: int) -> None:
    if min(image[:2]) < 2 ** (stages - 1):
        raise UserError(
            f"pictures {_by(image)} are too small for {stages} stages, each half as wide as the "
            f"one before; {2 ** (stages - 1)} pixels a side are needed"
        )


_PARTS: dict[type, Callable[[Any], tuple[Tree, Body, int]]] = {
    Mlp: _mlp,
    Cnn: _cnn,
    ResNet: _resnet,
    Vit: _vit,
}
