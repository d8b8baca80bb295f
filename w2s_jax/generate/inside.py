"""Responses drawn inside a training step: a pure function of weights, prompts and a key.

Nothing returns to the host between sampling and the update, so an objective may train on what the
model says now (``objectives.on_policy``), in ``fit``, in a population or in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.generate.choose import choose, rule
from w2s_jax.generate.decode import head, prepare
from w2s_jax.generate.sample import encoded
from w2s_jax.models.cache import Cache, empty_cache
from w2s_jax.models.lora import Adapted, joined
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Batch, Model, Params, Table

WHOLE = 2**32  # bytes of weights that are worth a copy on every device while it samples


def respond(
    model: Model,
    params: Params,
    asked: Batch,
    key: Array,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos: int | Sequence[int] = (),
    vocab: int | None = None,
    other: tuple[Model, Params, float] | None = None,
) -> Batch:
    """A response of at most ``tokens`` R to each of B prompts, as columns to train on.

    What a row receives depends on ``key``, its place in the batch and its prompt alone (up to
    rounding), not on padding or on the other rows. No gradient passes through. The loop ends when
    all rows have.

    Args:
      asked: ``tokens``, ``segment`` [B,P], prompts padded on the left (``ask`` makes them); a row
        without a prompt gets no response.
      temperature, top_k, top_p, min_p: as in ``generate.sample.draw``; 0 is greedy.
      eos: ids that end a response; the one that did is part of it, and trained.
      vocab: ids from here on are padding rows of the vocabulary and never drawn; neither are
        those that ``model`` or ``other`` does not have.
      other: ``(model, params, share)``: every token is drawn from the mixture ``share p + (1 -
        share) q`` of that model's distribution p and this one's q (teacher-mixed sampling, MiniLLM,
        arXiv 2306.08543, section 2.2).

    Returns:
      ``tokens`` [B,P+R], each prompt from place 0 on, its response and padding after it, so that
      plain causal attention is exact and any kernel serves; ``targets`` [B,R] of the response's
      tokens; ``policy.old`` [B,R] float32, the log-probability (nats, at temperature 1) of each
      under what it was drawn from.

    Raises:
      UserError: prompts and responses longer than the model allows; a number out of its range.
    """
    config, prompts = model.config, asked["tokens"]
    rows, width = prompts.shape
    _fits(width, tokens, config.max_length)
    real = min(vocab or config.vocab, (other[0] if other else model).config.vocab, config.vocab)
    numbers = rule(temperature, top_k, top_p, min_p, real)
    voices = [_voice(model, params, asked, tokens, real)]
    if other is not None:
        voices.append(_voice(other[0], other[1], asked, tokens, real))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    ends = jnp.asarray(np.atleast_1d(np.asarray(eos, np.int32)))

    def goes_on(carry: _Drawn) -> Array:
        return (carry.step < tokens) & _anyone(carry.alive)

    def draw(carry: _Drawn) -> _Drawn:
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, carry.step)
        says = [voice.says(lane.hidden) for voice, lane in zip(voices, carry.lanes, strict=True)]
        logits = says[0] if other is None else _mixed(says, other[2])
        ids, logps, _ = choose(logits, now, numbers, True)
        ids = jnp.where(carry.alive, ids, 0)
        alive = carry.alive & ~(ids[:, None] == ends[None]).any(-1)
        at = (slice(None), carry.step)
        return _Drawn(
            step=carry.step + 1,
            alive=alive,
            ids=carry.ids.at[at].set(ids),
            logps=carry.logps.at[at].set(jnp.where(carry.alive, logps, 0.0)),
            count=carry.count + carry.alive,
            lanes=tuple(v.hear(ids, alive, x) for v, x in zip(voices, carry.lanes, strict=True)),
        )

    begun = _Drawn(
        step=jnp.int32(0),
        alive=(asked["segment"] > 0).any(-1),
        ids=jnp.zeros((rows, tokens), jnp.int32),
        logps=jnp.zeros((rows, tokens), jnp.float32),
        count=jnp.zeros(rows, jnp.int32),
        lanes=tuple(voice.lane for voice in voices),
    )
    return _columns(asked, jax.lax.while_loop(goes_on, draw, begun))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Lane:
    """What a model remembers of B rows, and its last hidden states [B,D]."""

    cache: Cache
    hidden: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Drawn:
    """The rows after ``step`` draws: which go on, and ``count`` tokens of each so far."""

    step: Array
    alive: Array
    ids: Array
    logps: Array
    count: Array
    lanes: tuple[_Lane, ...]


@dataclass(frozen=True, eq=False)
class _Voice:
    """A model that has read the prompts."""

    model: Model
    params: Params
    says: Any  # hidden [B,D] -> logits [V,B]
    lane: _Lane

    def hear(self, ids: Array, alive: Array, lane: _Lane) -> _Lane:
        """One more token of the rows that go on."""
        segment = alive.astype(jnp.int32)[:, None]
        output = self.model.apply(self.params, ids[:, None], segment=segment, cache=lane.cache)
        return _Lane(output.cache, output.hidden[:, 0])


def _voice(model: Model, params: Params, asked: Batch, tokens: int, vocab: int) -> _Voice:
    model, params = _ready(model, jax.lax.stop_gradient(params))
    rows, width = asked["tokens"].shape
    cache = empty_cache(model.config, rows, width + tokens)
    output = model.apply(params, asked["tokens"], segment=asked["segment"], cache=cache)
    says = head(model, params, vocab)
    return _Voice(model, params, says, _Lane(output.cache, output.hidden[:, -1]))


def _ready(model: Model, params: Params) -> tuple[Model, Params]:
    """Weights for the loop: in the compute dtype, gathered where that is cheap, layers apart.

    Adapters stay beside their base: a base in bfloat16 would round small changes away.
    """
    params = _gathered(model, params)
    if isinstance(model, Adapted):
        model, params = model.base, joined(model, params)
    return prepare(model, params)


def _gathered(model: Model, params: Params) -> Params:
    """Weights of at most ``WHOLE`` bytes a device without their split over fsdp: gathered once a
    response rather than once a token."""
    if not meshes.ruled():
        return params
    axes = jax.tree.map(_unsplit, model.axes, is_leaf=meshes.is_axes)
    mesh: Any = jax.sharding.get_abstract_mesh()
    places = meshes.shardings(axes, mesh, params)
    dtype = jnp.dtype(model.config.dtype)
    sizes = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)) * dtype.itemsize, params, places
    )
    if sum(jax.tree.leaves(sizes)) > WHOLE:
        return params

    def put(names: Any, leaf: Array, place: Any) -> Array:
        matrix = leaf.ndim - (names[:1] == ("layers",)) > 1
        leaf = leaf.astype(dtype) if matrix else leaf  # or twice the bytes would travel
        return jax.lax.with_sharding_constraint(leaf, place)

    return jax.tree.map(put, axes, params, places, is_leaf=meshes.is_axes)


def _unsplit(names: Any) -> Any:
    return tuple(None if name == "embed" else name for name in names)


def _mixed(logits: list[Array], share: float) -> Array:
    """``log(share p + (1 - share) q)`` of the second and the first of two logits [V,B]."""
    q, p = (jax.nn.log_softmax(one, axis=0) for one in logits)
    return jnp.logaddexp(p + jnp.log(share), q + jnp.log1p(-share))


@jax.custom_batching.custom_vmap
def _anyone(alive: Array) -> Array:
    return alive.any()


@_anyone.def_vmap
def _any_run(size: int, batched: Any, alive: Array) -> tuple[Array, bool]:
    # runs that are vmapped end together: a condition per run would copy every cache every step
    return _anyone(alive), False


def _columns(asked: Batch, drawn: _Drawn) -> Batch:
    """Prompts and what was drawn after them, the padding at the end."""
    whole = jnp.concatenate([asked["tokens"], drawn.ids], axis=1)
    size = (asked["segment"] > 0).sum(-1)
    shift = asked["tokens"].shape[1] - size
    length = whole.shape[1]
    index = (jnp.arange(length)[None] + shift[:, None]) % length
    kept = jnp.arange(length)[None] < (size + drawn.count)[:, None]
    whole = jnp.where(kept, jnp.take_along_axis(whole, index, axis=1), 0)
    step = jnp.arange(drawn.ids.shape[1])[None]
    targets = {
        "at": jnp.maximum(size[:, None] - 1 + step, 0),
        "ids": drawn.ids,
        "mask": (step < drawn.count[:, None]).astype(jnp.float32),
        "of": jnp.zeros_like(drawn.ids),
    }
    return {"tokens": whole, "targets": targets, "policy": {"old": drawn.logps}}


def ask(
    table: Table, model: Model, tokenizer: Tokenizer, *, tokens: int, length: int | None = None
) -> Table:
    """The table with the column ``asked`` [N,P]: its prompts, padded on the left.

    Args:
      table: has ``prompt``: text (a beginning-of-text token is put before it where there is one)
        or lists of token ids.
      tokens: the most tokens of a response, for which the model must have room.
      length: P; default the longest prompt, rounded up to a multiple of 8 where there is room.

    Raises:
      UserError: no rows, an empty prompt, one longer than ``length``, or no room for the response.
    """
    column = table["prompt"]
    prompts = encoded(tokenizer, [column[i] for i in range(len(table))])
    sizes = [len(prompt) for prompt in prompts]
    if not all(sizes) or not sizes:
        where = f"prompt {sizes.index(0)} is empty" if sizes else "the table has no prompts"
        raise UserError(f"ask: {where}")
    longest = max(sizes)
    most = model.config.max_length
    width = length or max(longest, min(-(-longest // 8) * 8, most - tokens))
    if longest > width:
        raise UserError(
            f"ask: prompt {sizes.index(longest)} has {longest} tokens, more than the {width} of "
            "the column; shorten it or give a larger length"
        )
    _fits(width, tokens, most)
    ids, segment = (np.zeros((len(sizes), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], segment[row, width - len(prompt) :] = prompt, 1
    return table.with_columns(asked={"tokens": ids, "segment": segment})


def _fits(width: int, tokens: int, most: int) -> None:
    if tokens < 1 or width + tokens > most:
        raise UserError(
            f"prompts of {width} and responses of {tokens} tokens need from 1 to {most} places; "
            "shorten the prompts or ask for fewer tokens"
        )
