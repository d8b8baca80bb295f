"""Sampling from a decoder: token ids, texts, or a table with responses and their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.generate import slots
from w2s_jax.generate.choose import rule
from w2s_jax.generate.decode import prepare, programs
from w2s_jax.generate.slots import Row
from w2s_jax.mesh import rules_context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Model, Params, Table


def draw(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[int] = (),
    vocab: int | None = None,
    batch: int = 128,
    every: int = 32,
    logps: bool = True,
    over: Callable[[list[int]], bool] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> list[list[Row]]:
    """Continue each prompt ``samples`` times by at most ``tokens`` tokens.

    A prompt is read once for all its samples. ``batch`` slots are filled anew as rows end. What
    sample j of prompt i receives depends on ``key``, i, j and the prompt alone, up to rounding
    (sums over a cache of another size), not on the other prompts, ``batch`` or ``every``.

    Args:
      prompts: token ids, one non-empty list each.
      temperature: 0 is greedy.
      top_k, top_p, min_p: keep the k most likely tokens (0: all), then the fewest tokens whose
        probability reaches p, then those at least ``min_p`` times as likely as the likeliest.
      stop: ids that end a row; the ending id is not returned.
      vocab: ids from here on are padding rows of the vocabulary and never drawn.
      batch: rows that are continued at once.
      every: tokens between two looks of the host, which takes out what has ended.
      logps: whether log-probabilities are wanted; without, they are 0.
      over: at each look, whether a row's ids hold its end; what follows the end is the caller's
        to cut.
      mesh: the devices over which ``params`` are spread.

    Returns:
      For each prompt its rows, with ids, log-probabilities (nats, of the model's own untempered
      distribution, as in training) and how they finished.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, a prompt and continuation longer
        than the model allows, a number out of its range, logits that are not finite.
    """
    config = model.config
    real = min(config.vocab, vocab or config.vocab)
    numbers = rule(temperature, top_k, top_p, min_p, real)
    counts = dict(tokens=tokens, samples=samples, batch=batch, every=every)
    _check(prompts, counts, config.max_length, config.vocab)
    if not len(prompts):
        return []
    task = slots.Task(
        prompts=prompts,
        samples=samples,
        tokens=tokens,
        stop=tuple(stop),
        numbers=numbers,
        most=config.max_length - tokens,
        slots=batch,
        every=min(every, tokens),
        over=over,
    )
    with rules_context(mesh):
        model, params = prepare(model, params)
        return slots.run(task, programs(model, real, task.every, logps), params, key)


def _check(prompts: Sequence[Sequence[int]], counts: dict[str, int], most: int, vocab: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"sample: {name} must be at least 1, got {count}")
    sizes, tokens = [len(prompt) for prompt in prompts], counts["tokens"]
    if 0 in sizes:
        raise UserError(
            f"sample: prompt {sizes.index(0)} is empty; start it with the beginning-of-text token"
        )
    if max(sizes, default=0) + tokens > most:
        raise UserError(
            f"sample: a prompt of {max(sizes, default=0)} tokens and {tokens} new ones exceed the "
            f"model's {most}; shorten the prompt or ask for fewer tokens"
        )
    for i, prompt in enumerate(prompts):
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise UserError(
                f"sample: prompt {i} has token {wrong}, the model has {vocab}; is the tokenizer "
                "this model's?"
            )


def sample(
    model: Model, params: Params, prompts: Sequence[Sequence[int]], key: Array, **how: Any
) -> list[list[int]]:
    """The new token ids of each prompt's one continuation; arguments and errors as in ``draw``."""
    return [rows[0].ids for rows in draw(model, params, prompts, key, logps=False, **how)]


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    key: Array,
    *,
    tokens: int,
    temperature: float = 0.0,
    **how: Any,
) -> list[str]:
    """The model's continuation of each text, up to its end-of-text token; greedy by default.

    What a text receives depends on ``key``, its place and itself alone; further arguments and
    errors as in ``draw``.
    """
    how = dict(tokens=tokens, temperature=temperature, **_ends(model, tokenizer), **how)
    drawn = sample(model, params, encoded(tokenizer, texts), key, **how)
    return [tokenizer.decode(ids) for ids in drawn]


def generate(
    table: Table,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    *,
    key: Array,
    tokens: int,
    samples: int = 1,
    stop: Sequence[str] = (),
    **how: Any,
) -> Table:
    """Every row ``samples`` times, with what the model responds to its column ``prompt``.

    The contract is that of ``w2s_jax.generate``. Where a stop string ends a response, its ids are
    the fewest that spell it; the last of them may run into the stop string. Stop strings that
    overlap end a response where the first of them is complete.

    Args:
      table: has ``prompt``: text (a beginning-of-text token is put before it where there is one)
        or lists of token ids.
      stop: strings that end a response, besides the end-of-text token.
      how: ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``batch``, ``every``, ``mesh`` as in
        ``draw``.

    Raises:
      UserError: see ``draw``; an empty stop string, a tokenizer with more tokens than the model.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise UserError("generate: a stop string is empty; leave it out or say where to stop")
    column = table["prompt"]
    prompts = encoded(tokenizer, [column[i] for i in range(len(table))])

    def over(ids: list[int]) -> bool:
        return _end(tokenizer.decode(ids), stop) is not None

    how = dict(tokens=tokens, samples=samples, over=over if stop else None, **how)
    drawn = draw(model, params, prompts, key, **_ends(model, tokenizer), **how)
    rows = [_cut(row, tokenizer, stop) for several in drawn for row in several]
    return table.take(np.repeat(np.arange(len(table)), samples)).with_columns(
        response=_column([text for text, _ in rows]),
        finish=np.array([row.finish for _, row in rows], dtype="<U6"),
        sample=np.array([row.sample for _, row in rows], np.int64),
        response_ids=_column([np.array(row.ids, np.int32) for _, row in rows]),
        response_logps=_column([np.array(row.logps, np.float32) for _, row in rows]),
    )


def encoded(tokenizer: Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of texts, after the beginning-of-text token; lists of ids as they are."""
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    told = dict(zip(texts, tokenizer.encode_ids([prompts[i] for i in texts]), strict=True))
    return [
        start + told[i] if i in told else np.asarray(prompt, np.int64).tolist()
        for i, prompt in enumerate(prompts)
    ]


def _ends(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that may be drawn and the one that ends a row."""
    if tokenizer.size > model.config.vocab:
        raise UserError(
            f"generate: the tokenizer has {tokenizer.size} tokens, the model {model.config.vocab}; "
            "use the model's own tokenizer"
        )
    return dict(stop=() if tokenizer.eos is None else (tokenizer.eos,), vocab=tokenizer.size)


def _end(text: str, stop: Sequence[str]) -> int | None:
    """Where the text is to be cut: before the stop string that is complete first."""
    found = [(place + len(end), place) for end in stop if (place := text.find(end)) >= 0]
    return min(found)[1] if found else None


def _cut(row: Row, tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[str, Row]:
    """The text of a row up to its first stop string, and the row with the ids that spell it."""
    text = tokenizer.decode(row.ids)
    end = _end(text, stop)
    if end is None:
        return text, row
    text, size = text[:end], 0
    while size < len(row.ids) and not tokenizer.decode(row.ids[:size]).startswith(text):
        size += 1
    return text, Row(row.prompt, row.sample, row.ids[:size], row.logps[:size], "stop")


def _column(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):  # at once, numpy would stack equal lengths
        column[i] = value
    return column
