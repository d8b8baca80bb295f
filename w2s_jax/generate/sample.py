"""Sampling from a decoder: one prefill, then a loop over a key/value cache that ends when all rows do."""

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

BUCKET = 16  # prompts are padded to a multiple of this, so few lengths are compiled


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
    ``batch``.

    Args:
      prompts: token ids, one non-empty list per row.
      temperature: 0 is greedy.
      top_k, top_p: keep the k most likely tokens (0: all), then the smallest set of tokens whose
        probability reaches p.
      stop: ids that end a row; the ending id is not returned.
      vocab: ids from here on are padding rows of the vocabulary and never drawn.

    Returns:
      The new token ids of each row.

    Raises:
      UserError: an empty prompt, or a prompt and continuation longer than the model allows.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("sample: a prompt is empty; start it with the beginning-of-text token")
    longest = max(map(len, prompts), default=0)
    length = -(-longest // BUCKET) * BUCKET
    if longest + tokens > model.config.max_length:
        raise UserError(
            f"sample: a prompt of {longest} tokens and {tokens} new ones exceed the model's "
            f"{model.config.max_length}"
        )
    length = min(length, model.config.max_length - tokens)
    program = _program(model, tokens, temperature, top_k, top_p, tuple(stop), vocab)
    size, results = min(batch, len(prompts)), []
    for begin in range(0, len(prompts), size):
        rows = np.minimum(np.arange(begin, begin + size), len(prompts) - 1)
        ids, segment = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
        for i, row in enumerate(rows):
            prompt = prompts[row]
            ids[i, length - len(prompt) :], segment[i, length - len(prompt) :] = prompt, 1
        drawn, sizes = jax.device_get(program(params, ids, segment, key, rows.astype(np.int32)))
        kept = min(size, len(prompts) - begin)
        results += [drawn[i, : sizes[i]].tolist() for i in range(kept)]
    return results


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

    @jax.jit
    def run(params: Params, ids: Array, segment: Array, key: Array, row: Array):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
        cache = init_cache(model.config, ids.shape[0], ids.shape[1] + tokens)
        output = model.apply(params, ids, segment=segment, cache=cache)
        drawn = choose(output, keys, jnp.int32(0))

        def go_on(carry):
            return (carry[0] < tokens) & ~carry[3].all()

        def advance(carry):
            step, now, cache, done, out, sizes = carry
            done = done | ends(now)
            out = out.at[:, step].set(jnp.where(done, 0, now))
            sizes = jnp.where(done, sizes, step + 1)
            alive = jnp.where(done, 0, 1)[:, None].astype(jnp.int32)
            output = model.apply(params, now[:, None], segment=alive, cache=cache)
            return step + 1, choose(output, keys, step + 1), output.cache, done, out, sizes

        rows = ids.shape[0]
        out, sizes = jnp.zeros((rows, tokens), jnp.int32), jnp.zeros(rows, jnp.int32)
        start = (jnp.int32(0), drawn, output.cache, jnp.zeros(rows, bool), out, sizes)
        _, _, _, _, out, sizes = jax.lax.while_loop(go_on, advance, start)
        return out, sizes

    return run


def _filter(logits: Array, top_k: int, top_p: float) -> Array:
    """Logits [B,V] with -inf outside the top k and outside the nucleus of mass ``top_p``."""
    if top_k:
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

    Texts are sorted by length first, so that a batch wastes little padding.

    Raises:
      UserError: see ``sample``.
    """
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = [start + tokenizer.encode(text) for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drawn = sample(
        model,
        params,
        [prompts[i] for i in order],
        key,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        stop=() if tokenizer.eos is None else (tokenizer.eos,),
        vocab=tokenizer.size,
        batch=batch,
    )
    results = [""] * len(texts)
    for i, ids in zip(order, drawn, strict=True):
        results[i] = tokenizer.decode(ids)
    return results
