"""The compiled programs of steering: groups of models read, a rule joins them, a token is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.generate.choose import BLOCK, choose
from w2s_jax.generate.steer import Blend, Rule
from w2s_jax.models.cache import Cache, empty_cache
from w2s_jax.types import Array, Model

# How caches of several models are mapped over: all stand at one slot, or writes would be scatters
TOGETHER: Any = Cache(layers=0, segment=0, position=0, index=None)  # pyright: ignore


class Group(NamedTuple):
    """Models of one architecture that run as one, by their numbers."""

    model: Model
    numbers: tuple[int, ...]


class Parts(NamedTuple):
    """A rule as something hashable, which is compiled, and the numbers bound in it."""

    fixed: tuple[Rule, tuple[tuple[str, Any], ...]]
    numbers: dict[str, Array]


def parts(rule: Rule) -> Parts:
    """A rule with keywords bound by ``functools.partial``, taken apart; float32 numbers."""
    if not isinstance(rule, partial):
        return Parts((rule, ()), {})
    kinds = (int, float, np.ndarray, jax.Array)
    numbers = {k: jnp.float32(v) for k, v in rule.keywords.items() if isinstance(v, kinds)}
    rest = {k: v for k, v in rule.keywords.items() if k not in numbers}
    fixed = {k: _bound(v) if isinstance(v, partial) else v for k, v in rest.items()}
    return Parts((rule.func, tuple(sorted(fixed.items()))), numbers)


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
class Drawn:
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
def decoder(groups: tuple[Group, ...], fixed: Any, vocab: int, tokens: int) -> Callable[..., Any]:
    """``run(params, prompts, rows [B], key, numbers of the rule, limits, stop) -> Drawn``."""

    def reader(model: Model) -> Callable[..., Any]:
        def read(weights, ids, segment, cache):
            output = model.apply(weights, ids, segment=segment, cache=cache)
            return output.cache, _logits(output.hidden[:, -1], output.unembed, vocab)

        return read

    def says(params, caches, words) -> tuple[list[Any], list[Array]]:
        """Caches by group, extended by ``words(number)`` (ids, segment), and logits by number."""
        logits: dict[int, Array] = {}
        extended = []
        for group, weights, cache in zip(groups, params, caches, strict=True):
            read = reader(group.model)
            ids, segment = zip(*map(words, group.numbers), strict=True)
            if len(group.numbers) == 1:
                cache, said = read(weights, ids[0], segment[0], cache)
                said = [said]
            else:
                several = jax.vmap(read, (0, 0, 0, TOGETHER), (TOGETHER, 0))
                cache, said = several(weights, jnp.stack(ids), jnp.stack(segment), cache)
            extended.append(cache)
            logits |= dict(zip(group.numbers, said, strict=True))
        return extended, [logits[number] for number in sorted(logits)]

    @jax.jit
    def run(params, prompts, rows, key, numbers, limits, stop) -> Drawn:
        size, length = prompts[0][0].shape
        caches = [_empty(group, size, length + tokens) for group in groups]
        caches, logits = says(params, caches, lambda number: prompts[min(number // 2, 1)])
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

        def goes_on(carry):
            return (carry[0].at < tokens) & carry[0].alive.any()

        def step(carry):
            drawn, caches, logits = carry
            blend = _joined(fixed, numbers, logits)
            now = jax.vmap(lambda one: jax.random.fold_in(one, drawn.at))(keys)
            ids, logps, usable = choose(_blocks(blend.logps), now, limits, True)
            drawn = _note(drawn, ids, logps, blend, usable, stop)
            words = ids[:, None], drawn.alive.astype(jnp.int32)[:, None]
            return drawn, *says(params, caches, lambda _: words)

        return jax.lax.while_loop(goes_on, step, (_begun(size, tokens), caches, logits))[0]

    return run


def _empty(group: Group, rows: int, length: int) -> Cache:
    cache = empty_cache(group.model.config, rows, length)
    if len(group.numbers) == 1:
        return cache
    return jax.vmap(lambda _: cache, out_axes=TOGETHER)(jnp.arange(len(group.numbers)))


def _blocks(logps: Array) -> Array:
    """[B,V] as ``choose`` takes it: [V,B], V filled up to whole blocks by tokens never drawn."""
    spare = -logps.shape[1] % BLOCK
    return jnp.pad(logps.T, ((0, spare), (0, 0)), constant_values=-jnp.inf)


def _begun(rows: int, tokens: int) -> Drawn:
    return Drawn(
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
    drawn: Drawn, ids: Array, logps: Array, blend: Blend, usable: Array, stop: Array
) -> Drawn:
    """The tokens of one step [B], and which rows they end."""
    stops = drawn.alive & (ids[:, None] == stop[None]).any(-1)
    kept, at = drawn.alive & usable & ~stops, drawn.at
    return Drawn(
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
def scorer(groups: tuple[Group, ...], fixed: Any, vocab: int, chunk: int) -> Callable[..., Any]:
    """``run(params, columns, at [B,W], most, numbers) -> (logps, alpha, expert)``, [B,W] each.

    Of the W places of a row the first ``most`` [] are looked at, ``chunk`` at a time; how many
    they are does not change the program.
    """

    @jax.jit
    def run(params, columns, at, most, numbers):
        columns = dict(columns)
        tokens = columns.pop("tokens")
        heard: dict[int, tuple[Array, Array]] = {}
        for group, weights in zip(groups, params, strict=True):

            def read(weights, model=group.model):
                output = model.apply(weights, tokens, **columns)
                return output.hidden, output.unembed

            if len(group.numbers) == 1:
                heard[group.numbers[0]] = read(weights)
            else:
                several = zip(*jax.vmap(read)(weights), strict=True)
                heard |= dict(zip(group.numbers, several, strict=True))
        places = jnp.pad(at, ((0, 0), (0, -at.shape[1] % chunk)))

        def part(number, found):
            here = jax.lax.dynamic_slice_in_dim(places, number * chunk, chunk, axis=1)
            targets = jnp.take_along_axis(tokens, here + 1, axis=1)
            logits = [
                _logits(jnp.take_along_axis(hidden, here[..., None], axis=1), unembed, vocab)
                for _, (hidden, unembed) in sorted(heard.items())
            ]
            blend = _joined(fixed, numbers, logits)
            said = jnp.take_along_axis(blend.logps, targets[..., None], axis=-1)[..., 0]
            parts = (said, blend.alpha, blend.expert)
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=number * chunk, axis=1)
            return tuple(map(put, found, parts))

        none = jnp.zeros(places.shape, jnp.float32)
        found = (none, none, none.astype(jnp.int32))
        found = jax.lax.fori_loop(0, -(-most // chunk), part, found)
        return [x[:, : at.shape[1]] for x in found]

    return run
