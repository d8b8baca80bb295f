"""Decoding and scoring by a rule of ``steer``: several models read one text, a rule joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.generate.choose import BLOCK, choose
from w2s_jax.generate.choose import rule as limits
from w2s_jax.generate.decode import bucket, prepare
from w2s_jax.generate.steer import Blend, Rule
from w2s_jax.mesh import rules_context
from w2s_jax.models.cache import empty_cache
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Array, Model, Params, Table

Loaded = tuple[Model, Params, Tokenizer]  # what ``hf.load`` gives
Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Crew:
    """A large model, a small base and E experts made from it: ``models`` and ``params`` in that
    order, 2 + E of each. ``vocab`` tokens are common to all; ``tokenizer`` is the base's."""

    models: tuple[Model, ...]
    params: tuple[Params, ...]
    tokenizer: Tokenizer
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

    Rows of a vocabulary beyond the smallest tokenizer's (padding, tokens added to one expert) are
    left out.

    Raises:
      UserError: no expert, tokenizers whose common ids mean different tokens.
    """
    if not experts:
        raise UserError("steering needs at least one expert; to decode one model use sample")
    everyone = [large, base, *experts]
    vocab = min(tokenizer.size for _, _, tokenizer in everyone)
    for number, (_, _, tokenizer) in enumerate(everyone):
        _check_same(base[2], tokenizer, vocab, _name(number))
    with rules_context(mesh):
        ready = [prepare(model, params) for model, params, _ in everyone]
    models, params = zip(*ready, strict=True)
    return Crew(models, params, base[2], vocab, mesh)


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
    size, how = min(batch, len(prompts)), _split(rule)
    room = min(model.config.max_length for model in crew.models) - tokens
    widths = [bucket(max(map(len, side)), room) for side in sides]
    run = _decoder(crew.models, how.fixed, crew.vocab, tokens)
    ends = jnp.array([*stop] or [-1], jnp.int32)
    found: list[Steered] = []
    with rules_context(crew.mesh):
        for begin in range(0, len(prompts), size):
            rows = np.minimum(np.arange(begin, begin + size), len(prompts) - 1)
            read = [_left(side, rows, width) for side, width in zip(sides, widths, strict=True)]
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
      UserError: no row, a row longer than a model reads.
    """
    tokens, mask = np.asarray(table["tokens"]), np.asarray(table["mask"])[:, 1:] > 0
    count, length = tokens.shape
    if not count or not mask.any():
        raise UserError("steering: the table to score has nothing that its mask asks for")
    how, most = _split(rule), int(mask.sum(1).max())
    run = _scorer(crew.models, how.fixed, crew.vocab, chunk)
    at = np.argsort(~mask, axis=1, kind="stable")[:, :most]  # asked-for places come first
    found = [np.zeros((count, length), kind) for kind in (np.float32, np.float32, np.int32)]
    reads = [name for name in ("tokens", "segment", "position") if name in table]
    size = min(batch, count)
    with rules_context(crew.mesh):
        for begin in range(0, count, size):
            rows = np.minimum(np.arange(begin, begin + size), count - 1)
            part = {name: np.asarray(table[name])[rows] for name in reads}
            said = jax.device_get(run(crew.params, part, at[rows], how.numbers))
            asked = np.take_along_axis(mask[rows], at[rows], axis=1)
            for whole, values in zip(found, said, strict=True):
                whole[rows[:, None], 1 + at[rows]] = np.where(asked, values, 0)
    return Scores(*found)


# The compiled programs ---------------------------------------------------------------------------


class _Split(NamedTuple):
    """A rule as something hashable, which is compiled, and the numbers bound in it."""

    fixed: tuple[Rule, tuple[tuple[str, Any], ...]]
    numbers: dict[str, Array]


def _split(rule: Rule) -> _Split:
    if not isinstance(rule, partial):
        return _Split((rule, ()), {})
    kinds = (int, float, np.ndarray, jax.Array)
    numbers = {k: jnp.float32(v) for k, v in rule.keywords.items() if isinstance(v, kinds)}
    rest = {k: v for k, v in rule.keywords.items() if k not in numbers}
    fixed = {k: _bound(v) if isinstance(v, partial) else v for k, v in rest.items()}
    return _Split((rule.func, tuple(sorted(fixed.items()))), numbers)


@dataclass(frozen=True)
class _Bound:
    """A ``partial`` that equals another of the same function and keywords."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *parts: Any) -> Any:
        return self.function(*parts, **dict(self.keywords))


def _bound(function: partial) -> _Bound:
    return _Bound(function.func, tuple(sorted(function.keywords.items())))


def _joined(fixed: Any, numbers: dict[str, Array], logits: Sequence[Array]) -> Blend:
    large, base, *experts = logits
    rule, settings = fixed
    return rule(large, base, jnp.stack(experts), **dict(settings), **numbers)


def _logits(hidden: Array, unembed: Array, vocab: int) -> Array:
    """Logits [...,V] float32 over the common vocabulary."""
    return jnp.einsum(
        "...d,dv->...v", hidden, unembed[:, :vocab], preferred_element_type=jnp.float32
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Drawn:
    """What was drawn so far: [B,tokens] each, -1 and 0 where nothing; [B] and [] how rows stand."""

    ids: Array
    logps: Array
    alpha: Array
    expert: Array
    alive: Array
    stopped: Array
    faulty: Array
    at: Array


@lru_cache(maxsize=32)
def _decoder(models: tuple[Model, ...], fixed: Any, vocab: int, tokens: int) -> Callable[..., Any]:
    """``run(params, prompts, rows [B], key, numbers of the rule, limits, stop) -> _Drawn``."""

    @jax.jit
    def run(params, prompts, rows, key, numbers, limits, stop) -> _Drawn:
        caches, logits = [], []
        for number, (model, weights) in enumerate(zip(models, params, strict=True)):
            ids, segment = prompts[min(number // 2, 1)]
            cache = empty_cache(model.config, ids.shape[0], ids.shape[1] + tokens)
            output = model.apply(weights, ids, segment=segment, cache=cache)
            caches.append(output.cache)
            logits.append(_logits(output.hidden[:, -1], output.unembed, vocab))
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

        def goes_on(carry):
            return (carry[0].at < tokens) & carry[0].alive.any()

        def step(carry):
            drawn, caches, logits = carry
            blend = _joined(fixed, numbers, logits)
            now = jax.vmap(lambda one: jax.random.fold_in(one, drawn.at))(keys)
            ids, logps, usable = choose(_blocks(blend.logps), now, limits, True)
            drawn = _note(drawn, ids, logps, blend, usable, stop)
            segment = drawn.alive.astype(jnp.int32)[:, None]
            said = [
                model.apply(weights, ids[:, None], segment=segment, cache=cache)
                for model, weights, cache in zip(models, params, caches, strict=True)
            ]
            logits = [_logits(out.hidden[:, 0], out.unembed, vocab) for out in said]
            return drawn, [out.cache for out in said], logits

        begun = _begun(rows.shape[0], tokens)
        return jax.lax.while_loop(goes_on, step, (begun, caches, logits))[0]

    return run


def _blocks(logps: Array) -> Array:
    """[B,V] as ``choose`` takes it: [V,B], V filled up to whole blocks by tokens never drawn."""
    spare = -logps.shape[1] % BLOCK
    return jnp.pad(logps.T, ((0, spare), (0, 0)), constant_values=-jnp.inf)


def _begun(rows: int, tokens: int) -> _Drawn:
    return _Drawn(
        ids=jnp.full((rows, tokens), -1, jnp.int32),
        logps=jnp.zeros((rows, tokens), jnp.float32),
        alpha=jnp.zeros((rows, tokens), jnp.float32),
        expert=jnp.zeros((rows, tokens), jnp.int32),
        alive=jnp.ones(rows, bool),
        stopped=jnp.zeros(rows, bool),
        faulty=jnp.zeros(rows, bool),
        at=jnp.int32(0),
    )


def _note(
    drawn: _Drawn, ids: Array, logps: Array, blend: Blend, usable: Array, stop: Array
) -> _Drawn:
    """The tokens of one step [B], and which rows they end."""
    stops = drawn.alive & (ids[:, None] == stop[None]).any(-1)
    kept, at = drawn.alive & usable & ~stops, drawn.at
    return _Drawn(
        ids=drawn.ids.at[:, at].set(jnp.where(kept, ids, -1)),
        logps=drawn.logps.at[:, at].set(jnp.where(kept, logps, 0.0)),
        alpha=drawn.alpha.at[:, at].set(jnp.where(kept, blend.alpha, 0.0)),
        expert=drawn.expert.at[:, at].set(jnp.where(kept, blend.expert, 0)),
        alive=kept,
        stopped=drawn.stopped | (stops & usable),
        faulty=drawn.faulty | (drawn.alive & ~usable),
        at=at + 1,
    )


@lru_cache(maxsize=32)
def _scorer(models: tuple[Model, ...], fixed: Any, vocab: int, chunk: int) -> Callable[..., Any]:
    """``run(params, columns, at [B,W], numbers) -> (logps, alpha, expert)``, [B,W] each."""

    @jax.jit
    def run(params, columns, at, numbers):
        columns = dict(columns)
        tokens = columns.pop("tokens")
        spare = -at.shape[1] % chunk
        places = jnp.pad(at, ((0, 0), (0, spare)))
        targets = jnp.take_along_axis(tokens, places + 1, axis=1)
        outputs = [
            model.apply(weights, tokens, **columns)
            for model, weights in zip(models, params, strict=True)
        ]

        def part(these):
            places, targets = these
            logits = [
                _logits(
                    jnp.take_along_axis(out.hidden, places[..., None], axis=1), out.unembed, vocab
                )
                for out in outputs
            ]
            blend = _joined(fixed, numbers, logits)
            said = jnp.take_along_axis(blend.logps, targets[..., None], axis=-1)[..., 0]
            return said, blend.alpha, blend.expert

        def chunks(x):
            return x.reshape(x.shape[0], -1, chunk).swapaxes(0, 1)

        found = jax.lax.map(part, (chunks(places), chunks(targets)))
        return [x.swapaxes(0, 1).reshape(at.shape[0], -1)[:, : at.shape[1]] for x in found]

    return run


# On the host -------------------------------------------------------------------------------------


def _check(crew: Crew, sides: Sequence[Ids], tokens: int) -> None:
    most = min(model.config.max_length for model in crew.models)
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
        if max(sizes, default=0) + tokens > most:
            raise UserError(
                f"steering: a prompt of {max(sizes)} tokens and {tokens} new ones exceed the "
                f"{most} that a model reads; shorten the prompt or ask for fewer tokens"
            )
        for i, prompt in enumerate(side):
            if min(prompt) < 0 or max(prompt) >= crew.vocab:
                raise UserError(
                    f"steering: prompt {i} has a token outside 0..{crew.vocab - 1}, the ids that "
                    "all models share; encode it with the base's tokenizer"
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
            raise UserError(
                f"steering: prompt {begin + row}: logits are not finite after {size} tokens; look "
                "for faults in the weights, or compute in float32"
            )
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
