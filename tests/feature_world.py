"""Numbers by formula and the smallest models with features inside, for tests of matching."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from w2s_jax.types import Model, Output

V = 40


def wave(*shape, phase=0.0):
    """Numbers without a pattern that any language can make, float32."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return np.float32(np.sin(1.7 * i + phase) + 0.3 * np.cos(0.9 * i * i + phase)).reshape(shape)


def bigrams(width, rows=V):
    """Tokens of which each says what follows it; its tap [B,T,width] is the embedding."""

    def init(key):
        return normal(key, {"embed": (V, width), "unembed": (width, rows)})

    def apply(params, tokens, **_):
        hidden, vocab = params["embed"][tokens], V if rows > V else None
        return Output(hidden, params["unembed"], vocab=vocab, taps=(hidden,))

    axes = {"embed": None, "unembed": None}
    return Model(init, apply, axes, (width, rows), ("tokens", "segment"))


def tower(channels, classes=3):
    """Pictures through one map of the channels; taps: the map [B,H,W,C] and its mean [B,C]."""

    def init(key):
        return normal(key, {"kernel": (2, channels), "head": (channels, classes)})

    def apply(params, image):
        maps = jnp.tanh(image @ params["kernel"])
        mean = maps.mean((1, 2))
        return Output(logits=mean @ params["head"], taps=(maps, mean))

    axes = {"kernel": None, "head": None}
    return Model(init, apply, axes, channels, ("image",))


def normal(key, shapes):
    """Normal weights of these shapes."""
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def shapes(jaxpr):
    """The shape of everything that a program makes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)
