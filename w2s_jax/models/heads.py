"""Heads of classes and rewards: zero-initialised, bias-free, on hidden states or on features.

``classifier`` puts a head on a body; ``features`` is what that head sees, cached once per example
so that many frozen-body probes (``linear``) train as one program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_logps
from w2s_jax.types import Array, Batch, Model, Output, Params, forward

FEATURES = ("last", "mean", "likelihood")
READS = ("tokens", "segment", "position", "mask")


@dataclass(frozen=True)
class Head:
    """What a classifier was built from."""

    body: Model
    classes: int
    feature: str
    probe: bool


def classifier(body: Model, classes: int = 2, feature: str = "last", probe: bool = False) -> Model:
    """A body with a bias-free linear head that starts at exactly zero: logits [B,C] float32, and
    the taps of the body.

    Parameters are ``{"body": ..., "head": {"kernel" [D,C], ...}}``; ``attach`` makes them from a
    trained body. The head reads

    - ``"last"``: the hidden state of the last real token (``segment > 0``; an id proves nothing);
    - ``"mean"``: the mean hidden state over tokens with ``mask > 0``;
    - ``"likelihood"`` (two classes): how surprised the model itself is by the masked tokens. With
      nll_t in nats, F = [(log sum_t exp(2 nll_t) / 2 - 3) / 3, 2 mean_t nll_t - 0.7, 1], and
      s = 20 F w is added as logits (-s/2, s/2) to those of ``"last"``; w [3] starts at zero, and
      gradients reach the body through F. The head hands the model its own latent knowledge.

    Args:
      body: a token model (``Output.hidden`` and ``Output.unembed``).
      probe: train the head alone; no gradient reaches the body.

    Raises:
      UserError: an unknown feature, or ``"likelihood"`` with other than two classes.
    """
    if feature not in FEATURES:
        raise UserError(f"head feature {feature!r} is unknown; choose one of {', '.join(FEATURES)}")
    if feature == "likelihood" and classes != 2:
        raise UserError(f"the likelihood head tells two classes apart, {classes} were asked for")

    def init(key: Array) -> Params:
        return attach(model, body.init(key))

    def apply(params: Params, tokens: Array, **columns: Array) -> Output:
        parts = _read(model.config, params["body"], {"tokens": tokens, **columns})
        logits = parts["hidden"] @ params["head"]["kernel"].astype(jnp.float32)
        if feature == "likelihood":
            s = 20.0 * parts["surprise"] @ params["head"]["likelihood"].astype(jnp.float32)
            logits = logits + jnp.stack([-s / 2, s / 2], axis=-1)
        return Output(logits=logits, taps=parts["taps"])

    head_axes: dict[str, Any] = {"kernel": ("embed", "classes")}
    if feature == "likelihood":
        head_axes["likelihood"] = (None,)
    axes = {"body": body.axes, "head": head_axes}
    model = Model(init, apply, axes, Head(body, classes, feature, probe), READS)
    return model


def reward(body: Model) -> Model:
    """A body with one bias-free linear reward that starts at zero: logits [B,R] float32.

    R is 1, the reward at the last real token (``segment > 0``; without ``segment`` all are real),
    or the number of attention rows of a packed batch (``rows``), each read at its last token: two
    responses to each of P prompts give R = 2 P. Parameters as those of ``classifier``.
    """

    def init(key: Array) -> Params:
        return attach(model, body.init(key))

    def apply(params: Params, tokens: Array, **columns: Array) -> Output:
        hidden = forward(body, params["body"], {"tokens": tokens, **columns}).hidden
        if "rows" in columns:
            ends = _ends(columns["rows"]["take"])
            last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
        else:
            last = _last(hidden, columns.get("segment"))[:, None]
        kernel = params["head"]["kernel"].astype(jnp.float32)
        return Output(logits=(last.astype(jnp.float32) @ kernel)[..., 0])

    axes = {"body": body.axes, "head": {"kernel": ("embed", "classes")}}
    reads = ("tokens", "segment", "position", "rows")
    model = Model(init, apply, axes, Head(body, 1, "last", False), reads)
    return model


def attach(model: Model, body: Params) -> Params:
    """Parameters of the classifier ``model`` around the weights ``body``, its head at zero."""
    width = _width(model.config.body, body)
    head = {"kernel": jnp.zeros((width, model.config.classes), jnp.float32)}
    if model.config.feature == "likelihood":
        head["likelihood"] = jnp.zeros(3, jnp.float32)
    return {"body": body, "head": head}


def features(model: Model, params: Params, batch: Batch) -> Array:
    """What the head of the classifier ``model`` sees, [B,F] float32: the column of ``linear``.

    ``"last"`` and ``"mean"`` give the D hidden units; ``"likelihood"`` gives F = 3 + D with the
    first three scaled by 10, so that a two-class linear head from zero moves as w does under Adam.
    """
    parts = _read(model.config, params["body"], batch)
    if model.config.feature == "likelihood":
        return jnp.concatenate([10.0 * parts["surprise"], parts["hidden"]], axis=-1)
    return parts["hidden"]


def linear(classes: int, width: int, bias: bool = False) -> Model:
    """A linear probe of the column ``features`` [B,width], starting at zero: logits [B,C]."""

    def init(key: Array) -> Params:
        kernel = {"kernel": jnp.zeros((width, classes), jnp.float32)}
        return kernel | ({"bias": jnp.zeros(classes, jnp.float32)} if bias else {})

    def apply(params: Params, features: Array) -> Output:
        logits = features.astype(jnp.float32) @ params["kernel"]
        return Output(logits=logits + params["bias"][None] if bias else logits)

    axes = {"kernel": ("embed", "classes")} | ({"bias": ("classes",)} if bias else {})
    return Model(init, apply, axes, (classes, width, bias), ("features",))


def mlp(classes: int, width: int, hidden: int, layers: int = 1) -> Model:
    """``layers`` hidden layers of ``hidden`` ReLU units over ``features`` [B,width]: logits [B,C].

    He-normal weights, zero biases, and a bias-free output layer that starts at zero.
    """
    sizes = [width] + [hidden] * layers
    he = jax.nn.initializers.he_normal()

    def init(key: Array) -> Params:
        keys = jax.random.split(key, layers) if layers else ()
        body = [
            {"kernel": he(k, (a, b), jnp.float32), "bias": jnp.zeros(b, jnp.float32)}
            for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        return {"body": body, "head": {"kernel": jnp.zeros((sizes[-1], classes), jnp.float32)}}

    def apply(params: Params, features: Array) -> Output:
        x = features.astype(jnp.float32)
        for layer in params["body"]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return Output(logits=x @ params["head"]["kernel"])

    axes = {
        "body": [{"kernel": ("embed", "ffn"), "bias": ("ffn",)}] * layers,
        "head": {"kernel": ("embed", "classes")},
    }
    return Model(init, apply, axes, (classes, width, hidden, layers), ("features",))


def surprise(nll: Array, mask: Array) -> Array:
    """The likelihood features [B,3] of token surprises [B,T] (nats) where ``mask`` [B,T] > 0.

    Zero, with zero gradient, for a row whose mask is empty.
    """
    counts = (mask > 0).astype(jnp.float32)
    some = counts.sum(-1, keepdims=True) > 0
    kept = jnp.where(some, counts, 1.0)  # an empty logsumexp has no gradient
    worst = jax.nn.logsumexp(2.0 * nll, axis=-1, b=kept) / 2.0
    mean = (nll * kept).sum(-1) / kept.sum(-1)
    rows = jnp.stack([(worst - 3.0) / 3.0, 2.0 * mean - 0.7, jnp.ones_like(mean)], axis=-1)
    return jnp.where(some, rows, 0.0)


def _read(head: Head, params: Params, batch: Batch) -> dict[str, Any]:
    """The parts of a head's input: ``hidden`` [B,D] and, for likelihood, ``surprise`` [B,3]; and
    the body's ``taps``."""
    if head.feature != "last" and "mask" not in batch:
        raise UserError(f"the {head.feature!r} head needs column 'mask', got {sorted(batch)}")
    if head.probe:
        params = jax.lax.stop_gradient(params)
    output = forward(head.body, params, batch)
    hidden = output.hidden
    if head.feature == "mean":
        counts = (batch["mask"] > 0).astype(jnp.float32)[..., None]
        mean = (hidden.astype(jnp.float32) * counts).sum(1) / jnp.maximum(counts.sum(1), 1.0)
        return {"hidden": mean, "taps": output.taps}
    parts: dict[str, Any] = {"hidden": _last(hidden, batch.get("segment")).astype(jnp.float32)}
    parts["taps"] = output.taps
    if head.feature == "likelihood":
        mask = batch["mask"][:, 1:]
        logps = token_logps(hidden[:, :-1], output.unembed, batch["tokens"][:, 1:], mask)
        parts["surprise"] = surprise(-logps, mask)
    return parts


def _last(hidden: Array, segment: Array | None) -> Array:
    """Hidden state [B,D] of each row's last real token; without ``segment`` all are real."""
    length = hidden.shape[1]
    if segment is None:
        return hidden[:, -1]
    where = jnp.where(segment > 0, jnp.arange(length)[None], 0).max(-1)
    return jnp.take_along_axis(hidden, where[:, None, None], axis=1)[:, 0]


def _ends(take: Array) -> Array:
    """Places [B,R] of the last tokens of attention rows ``take`` [B,R,L]; 0 for an empty row."""
    last = jnp.maximum((take >= 0).sum(-1) - 1, 0)
    return jnp.maximum(jnp.take_along_axis(take, last[..., None], axis=-1)[..., 0], 0)


def _width(body: Model, params: Params) -> int:
    """Hidden width of a token model, from shapes alone."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    batch = {"tokens": tokens, "segment": tokens, "position": tokens}
    return jax.eval_shape(lambda p, b: forward(body, p, b).hidden, params, batch).shape[-1]
