"""Decoding and scoring by a rule of ``steer``: several models read one text, a rule joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.generate.choose import rule as limits
from w2s_jax.generate.decode import bucket, prepare
from w2s_jax.generate.steer import Rule
from w2s_jax.generate.steer_programs import Group, decoder, parts, scorer
from w2s_jax.mesh import rules_context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Model, Params, Table

Loaded = tuple[Model, Params, Tokenizer]  # what ``hf.load`` gives
Ids = Sequence[Sequence[int]]
SMALL = 2**26  # bytes of weights up to which models are stacked, which copies them


@dataclass(frozen=True, eq=False)
class Crew:
    """A large model (number 0), a small base (1) and E experts made from it (2 ..).

    ``groups`` say which of them run together, ``params`` are a group's weights, stacked [G, ...]
    where it has several. ``vocab`` tokens are common to all, ``most`` is the longest text that
    all read; ``tokenizer`` is the base's.
    """

    groups: tuple[Group, ...]
    params: tuple[Params, ...]
    tokenizer: Tokenizer
    most: int
    vocab: int
    mesh: jax.sharding.Mesh | None = None


@dataclass(frozen=True)
class Steered:
    """One continuation. Per token: ``ids``, ``logps`` (nats, of the joined distribution before any
    temperature or limit), ``alpha`` and ``expert`` as in ``steer.Blend``; ``finish`` "stop" or
    "length"."""

    ids: np.ndarray
    logps: np.ndarray
    alpha: np.ndarray
    expert: np.ndarray
    finish: str


class Scores(NamedTuple):
    """Per token of given texts [N,T], for the prediction of token t from those before it; 0 where
    the mask is 0. ``logps`` in nats."""

    logps: np.ndarray
    alpha: np.ndarray
    expert: np.ndarray


def crew(
    large: Loaded,
    base: Loaded,
    experts: Sequence[Loaded],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Crew:
    """Models that share a vocabulary, ready to decode; adapters are merged.

    Rows of a vocabulary beyond the smallest tokenizer's or model's (padding, tokens added to one
    expert) are left out.

    Raises:
      UserError: no expert, tokenizers whose common ids mean different tokens.
    """
    if not experts:
        raise UserError("steering needs at least one expert; to decode one model use sample")
    everyone = [large, base, *experts]
    vocab = min(min(tokenizer.size, model.config.vocab) for model, _, tokenizer in everyone)
    for number, (_, _, tokenizer) in enumerate(everyone):
        _check_same(base[2], tokenizer, vocab, _name(number))
    with rules_context(mesh):
        ready = [prepare(model, params) for model, params, _ in everyone]
    groups, params = _grouped(ready)
    most = min(model.config.max_length for model, _ in ready)
    return Crew(groups, params, base[2], most, vocab, mesh)


def _grouped(
    ready: Sequence[tuple[Model, Params]],
) -> tuple[tuple[Group, ...], tuple[Params, ...]]:
    """Small models of one architecture together (less to compile, fewer calls), others alone."""
    together: dict[Any, list[int]] = {}
    for number, (model, params) in enumerate(ready):
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= SMALL
        together.setdefault(model if small else number, []).append(number)
    groups = tuple(Group(ready[of[0]][0], tuple(of)) for of in together.values())
    stacked = [[ready[number][1] for number in group.numbers] for group in groups]
    return groups, tuple(
        of[0] if len(of) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *of)
        for of in stacked
    )


def _name(number: int) -> str:
    return ("the large model", "the base")[number] if number < 2 else f"expert {number - 2}"


def _check_same(base: Tokenizer, other: Tokenizer, vocab: int, name: str) -> None:
    if other.digest() == base.digest():
        return
    for index in range(vocab):
        if other.token(index) != base.token(index):
            raise UserError(
                f"steering: token {index} is {base.token(index)!r} for the base and "
                f"{other.token(index)!r} for {name}; logits can only be added within one "
                "vocabulary, choose models of one family"
            )


def decode(
    crew: Crew,
    rule: Rule,
    prompts: Ids,
    key: Array,
    *,
    tokens: int,
    expert_prompts: Ids | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[int] = (),
    batch: int = 128,
) -> list[Steered]:
    """Continue each prompt by at most ``tokens`` tokens of the joined distribution.

    All models read the same tokens, each into a cache of its own, in one compiled loop. What a
    prompt receives depends on ``key``, its number and itself, up to rounding, not on the others.

    Args:
      rule: ``steer.proxy`` or ``steer.fused``, numbers bound by ``functools.partial``. Bound
        numbers and arrays are arguments of the compiled program, other things part of it.
      prompts: token ids, one non-empty list each.
      expert_prompts: what the experts read instead (their chat template), one per prompt.
      temperature: 0 is greedy; ``top_k``, ``top_p``, ``min_p`` as in ``sample.draw``.
      stop: ids that end a row; the ending id is not returned.
      batch: rows at once.

    Raises:
      UserError: an empty prompt, an id outside the common vocabulary, a prompt and continuation
        longer than a model allows, a number out of its range, logits that are not finite.
    """
    if tokens < 1 or batch < 1:
        raise UserError(f"steering: tokens and batch must be at least 1, got {tokens} and {batch}")
    numbers = limits(temperature, top_k, top_p, min_p, crew.vocab)
    sides = [prompts, prompts if expert_prompts is None else expert_prompts]
    _check(crew, sides, tokens)
    if not len(prompts):
        return []
    size, how = min(batch, len(prompts)), parts(rule)
    width = bucket(max(len(prompt) for side in sides for prompt in side), crew.most - tokens)
    run = decoder(crew.groups, how.fixed, crew.vocab, tokens)
    ends = jnp.array([*stop] or [-1], jnp.int32)
    found: list[Steered] = []
    with rules_context(crew.mesh):
        for begin in range(0, len(prompts), size):
            rows = np.minimum(np.arange(begin, begin + size), len(prompts) - 1)
            read = [_left(side, rows, width) for side in sides]
            drawn = run(crew.params, read, rows, key, how.numbers, numbers, ends)
            found += _rows(jax.device_get(drawn), begin, min(size, len(prompts) - begin))
    return found


def generate(table: Table, crew: Crew, rule: Rule, *, key: Array, tokens: int, **how: Any) -> Table:
    """What the joined models respond to the column ``prompt`` (text, or lists of ids).

    The contract is that of ``w2s_jax.generate`` for one sample, with two columns beside it:
    ``alpha`` and ``expert`` (object: float32 and int32 arrays per row). ``how`` as in ``decode``;
    greedy by default.
    """
    asked = list(table["prompt"][np.arange(len(table))])
    ends = () if crew.tokenizer.eos is None else (crew.tokenizer.eos,)
    rows = decode(crew, rule, encoded(crew.tokenizer, asked), key, tokens=tokens, stop=ends, **how)
    return table.with_columns(
        response=_column([crew.tokenizer.decode(row.ids.tolist()) for row in rows]),
        finish=np.array([row.finish for row in rows], dtype="<U6"),
        sample=np.zeros(len(rows), np.int64),
        response_ids=_column([row.ids for row in rows]),
        response_logps=_column([row.logps for row in rows]),
        alpha=_column([row.alpha for row in rows]),
        expert=_column([row.expert for row in rows]),
    )


def encoded(tokenizer: Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of texts, after the beginning-of-text token; lists of ids as they are."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return [
        start + tokenizer.encode(one) if isinstance(one, str) else [int(i) for i in one]
        for one in prompts
    ]


def score(crew: Crew, rule: Rule, table: Table, *, batch: int = 32, chunk: int = 8) -> Scores:
    """Log-probabilities of given texts under the joined distribution, no cache.

    ``table`` has ``tokens`` and ``mask`` [N,T] and, if need be, ``segment`` and ``position``;
    ``mask[t]`` above 0 asks for the prediction of token t. The models run on ``batch`` rows; the
    rule sees ``batch`` x ``chunk`` predictions at a time.

    Raises:
      UserError: no row, a row longer than a model reads, an id outside the common vocabulary,
        logits that are not finite.
    """
    tokens, mask = np.asarray(table["tokens"]), np.asarray(table["mask"])[:, 1:] > 0
    count, length = tokens.shape
    if not count or not mask.any():
        raise UserError("steering: the table to score has nothing that its mask asks for")
    _check_table(crew, tokens)
    how, most = parts(rule), np.int32(mask.sum(1).max())
    run = scorer(crew.groups, how.fixed, crew.vocab, chunk)
    at = np.argsort(~mask, axis=1, kind="stable")  # asked-for places come first
    found = [np.zeros((count, length), kind) for kind in (np.float32, np.float32, np.int32)]
    reads = [name for name in ("tokens", "segment", "position") if name in table]
    size = min(batch, count)
    with rules_context(crew.mesh):
        for begin in range(0, count, size):
            rows = np.minimum(np.arange(begin, begin + size), count - 1)
            part = {name: np.asarray(table[name])[rows] for name in reads}
            said = jax.device_get(run(crew.params, part, at[rows], most, how.numbers))
            asked = np.take_along_axis(mask[rows], at[rows], axis=1)
            faulty = ~np.isfinite(np.where(asked, said[0], 0)).all(1)
            if faulty.any():
                raise UserError(_faulty(f"row {rows[faulty.argmax()]}"))
            for whole, values in zip(found, said, strict=True):
                whole[rows[:, None], 1 + at[rows]] = np.where(asked, values, 0)
    return Scores(*found)


def _check(crew: Crew, sides: Sequence[Ids], tokens: int) -> None:
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"steering: {len(sides[0])} prompts but {len(sides[1])} for the experts; need one each"
        )
    for side in sides:
        sizes = [len(prompt) for prompt in side]
        if 0 in sizes:
            raise UserError(
                f"steering: prompt {sizes.index(0)} is empty; start it with the beginning-of-text "
                "token"
            )
        if max(sizes, default=0) + tokens > crew.most:
            raise UserError(
                f"steering: a prompt of {max(sizes)} tokens and {tokens} new ones exceed the "
                f"{crew.most} that a model reads; shorten the prompt or ask for fewer tokens"
            )
        for i, prompt in enumerate(side):
            if min(prompt) < 0 or max(prompt) >= crew.vocab:
                raise UserError(
                    f"steering: prompt {i} has a token outside 0..{crew.vocab - 1}, the ids that "
                    "all models share; encode it with the base's tokenizer"
                )


def _check_table(crew: Crew, tokens: np.ndarray) -> None:
    if tokens.shape[1] > crew.most:
        raise UserError(
            f"steering: rows of {tokens.shape[1]} tokens exceed the {crew.most} that a model reads"
        )
    if tokens.min() < 0 or tokens.max() >= crew.vocab:
        raise UserError(
            f"steering: the table to score has a token outside 0..{crew.vocab - 1}, the ids that "
            "all models share; encode it with the base's tokenizer"
        )


def _faulty(where: str) -> str:
    return (
        f"steering: {where}: logits are not finite; look for faults in the weights, or compute in "
        "float32"
    )


def _left(prompts: Ids, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segment [B,width] of some prompts, padded on the left."""
    ids, segment = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for place, row in enumerate(rows):
        size = len(prompts[row])
        ids[place, width - size :], segment[place, width - size :] = prompts[row], 1
    return ids, segment


def _rows(drawn: Any, begin: int, count: int) -> list[Steered]:
    found = []
    for row in range(count):
        size = int((drawn.ids[row] >= 0).sum())
        if drawn.faulty[row]:
            raise UserError(_faulty(f"prompt {begin + row} after {size} tokens"))
        ids, logps, alpha, expert = (
            x[row, :size] for x in (drawn.ids, drawn.logps, drawn.alpha, drawn.expert)
        )
        finish = "stop" if drawn.stopped[row] else "length"
        found.append(Steered(ids, logps, alpha, expert, finish))
    return found


def _column(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):  # at once, numpy would stack equal lengths
        column[i] = value
    return column
