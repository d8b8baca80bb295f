"""Sampling from a decoder: one prefill, then a loop over a key/value cache until all rows end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.models.transformer import init_cache
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Model, Output, Params

BUCKET = 32  # prompts are padded to this times a power of two, so few lengths are compiled


def sample(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    vocab: int | None = None,
    batch: int = 128,
) -> list[list[int]]:
    """Continue each prompt by at most ``tokens`` tokens.

    What row i receives depends on ``key``, i and its prompt alone, not on the other rows or on
    ``batch``. Rows are taken by length, so that a batch pads little and ends together.

    Args:
      prompts: token ids, one non-empty list per row.
      temperature: 0 is greedy.
      top_k, top_p: keep the k most likely tokens (0: all), then the smallest set of tokens whose
        probability reaches p.
      stop: ids that end a row; the ending id is not returned.
      vocab: ids from here on are padding rows of the vocabulary and never drawn.
      batch: rows that are continued at once.

    Returns:
      The new token ids of each row.

    Raises:
      UserError: an empty prompt, a prompt and continuation longer than the model allows, or a
        number out of its range.
    """
    most = model.config.max_length - tokens
    _check(prompts, most, dict(tokens=tokens, batch=batch), temperature, top_k, top_p)
    program = _program(model, tokens, temperature, top_k, top_p, tuple(stop), vocab)
    size = max(1, min(batch, len(prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        full = rows + [rows[-1]] * (size - len(rows))
        ids, segment = _left_padded([prompts[i] for i in full], most)
        drawn, sizes = program(params, ids, segment, key, np.array(full, np.int32))
        drawn, sizes = jax.device_get((drawn, sizes))
        for i, row in enumerate(rows):
            results[row] = drawn[i, : sizes[i]].tolist()
    return results


def _check(
    prompts: Sequence[Sequence[int]],
    most: int,
    counts: dict[str, int],
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"sample: {name} must be at least 1, got {count}")
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise UserError(
            "sample: temperature and top_k must be at least 0 and top_p in (0, 1], got "
            f"{temperature}, {top_k} and {top_p}"
        )
    sizes = [len(prompt) for prompt in prompts]
    if 0 in sizes:
        raise UserError(
            f"sample: prompt {sizes.index(0)} is empty; start it with the beginning-of-text token"
        )
    if max(sizes, default=0) > most:
        tokens = counts["tokens"]
        raise UserError(
            f"sample: a prompt of {max(sizes)} tokens and {tokens} new ones exceed the model's "
            f"{most + tokens}; shorten the prompt or ask for fewer tokens"
        )


def _left_padded(prompts: Sequence[Sequence[int]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segments [B,T] int32, padding (segment 0) on the left, T at most ``most``."""
    length, longest = BUCKET, max(map(len, prompts))
    while length < longest:
        length *= 2
    length = min(length, most)
    ids, segment = (np.zeros((len(prompts), length), np.int32) for _ in range(2))
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :], segment[i, length - len(prompt) :] = prompt, 1
    return ids, segment


@lru_cache(maxsize=32)
def _program(
    model: Model,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: tuple[int, ...],
    vocab: int | None,
):
    """The jitted sampler: (params, ids [B,T], segment [B,T], key, row [B]) -> (drawn, sizes)."""

    def choose(output: Output, keys: Array, step: Array) -> Array:
        logits = jnp.einsum(
            "bd,dv->bv",
            output.hidden[:, -1],
            output.unembed,
            preferred_element_type=jnp.float32,
        )
        if vocab is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab, logits, -jnp.inf)
        if temperature == 0.0:
            return logits.argmax(-1).astype(jnp.int32)
        logits = _filter(logits / temperature, top_k, top_p)
        steps = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(steps, logits).astype(jnp.int32)

    def ends(drawn: Array) -> Array:
        if not stop:
            return jnp.zeros(drawn.shape, bool)
        return (drawn[:, None] == jnp.asarray(stop, jnp.int32)[None]).any(-1)

    def note(step: Array, drawn: Array, done: Array, out: Array, sizes: Array):
        """Row by row: has it ended, what it has drawn, how much of that counts."""
        done = done | ends(drawn)
        out = out.at[:, step].set(jnp.where(done, 0, drawn))
        return done, out, jnp.where(done, sizes, step + 1)

    @jax.jit
    def run(params: Params, ids: Array, segment: Array, key: Array, row: Array):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
        cache = init_cache(model.config, ids.shape[0], ids.shape[1] + tokens)
        output = model.apply(params, ids, segment=segment, cache=cache)

        def go_on(carry):
            return (carry[0] < tokens) & ~carry[3].all()

        def advance(carry):
            step, drawn, cache, done, out, sizes = carry
            alive = jnp.where(done, 0, 1)[:, None].astype(jnp.int32)
            output = model.apply(params, drawn[:, None], segment=alive, cache=cache)
            drawn = choose(output, keys, step)
            return step + 1, drawn, output.cache, *note(step, drawn, done, out, sizes)

        rows, first = ids.shape[0], jnp.int32(0)
        drawn = choose(output, keys, first)
        out, sizes = jnp.zeros((rows, tokens), jnp.int32), jnp.zeros(rows, jnp.int32)
        begun = note(first, drawn, jnp.zeros(rows, bool), out, sizes)
        last = jax.lax.while_loop(go_on, advance, (first + 1, drawn, output.cache, *begun))
        return last[4], last[5]

    return run


def _filter(logits: Array, top_k: int, top_p: float) -> Array:
    """Logits [B,V] with -inf outside the top k and outside the nucleus of mass ``top_p``."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    key: Array,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch: int = 128,
) -> list[str]:
    """The model's continuation of each text, up to its end-of-text token; greedy by default.

    What a text receives depends on ``key``, its place and itself alone (see ``sample``).

    Raises:
      UserError: see ``sample``.
    """
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    drawn = sample(
        model,
        params,
        [start + ids for ids in tokenizer.encode_ids(texts)],
        key,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        stop=() if tokenizer.eos is None else (tokenizer.eos,),
        vocab=tokenizer.size,
        batch=batch,
    )
    return [tokenizer.decode(ids) for ids in drawn]
