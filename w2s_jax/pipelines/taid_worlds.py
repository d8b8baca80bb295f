"""Where distillation objectives are compared: arithmetic solutions, digits, kernel regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.annotate import predict
from w2s_jax.data import arithmetic, images
from w2s_jax.data.text import tokenise
from w2s_jax.errors import UserError
from w2s_jax.losses import distillation as losses
from w2s_jax.losses.classification import soft_xent
from w2s_jax.losses.sequence import EXCLUDED
from w2s_jax.models import hf
from w2s_jax.models.heads import mlp
from w2s_jax.models.transformer import decode
from w2s_jax.objectives import classify, taid, taid_classes
from w2s_jax.pipelines.taid import TRUTH, World
from w2s_jax.theory import self_distillation as theory
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Array, Batch, Model, Params, Row, Table, forward

DEV, TEST, TRAIN = 74_000_000, 75_000_000, 76_000_000  # seeds of problems that never meet
TOP, BOTTOM = 10, 0.2  # the paper's head and tail of a teacher's ranking: tokens, share of them


# The arithmetic world


def arithmetic_world(
    *,
    student: Sequence[str],
    scratch: bool,
    teachers: Sequence[str],
    steps: Sequence[int],
    length: int,
    sizes: tuple[int, int, int],
    rows: int,
    tune: Tune,
    start: float,
) -> World:
    """Whole texts of problems with solutions; run i begins as shipped student i, in turns, or
    with random weights.

    Args:
      sizes: rows of training, dev and test.

    Raises:
      UserError: students or teachers that do not share a vocabulary; too few problems that fit.
    """
    model, first, tokenizer = hf.load(student[0])
    own = [first, *(hf.load(name)[1] for name in student[1:])]
    train, dev, test = _texts(tokenizer, steps, length, sizes)
    held = Table({name: np.concatenate([dev[name], test[name]]) for name in dev.columns})
    tables = {TRUTH: train.with_columns(teacher={"logits": _certain(train, model.config.vocab)})}
    heard = {}
    for name in teachers:
        teacher, params, theirs = hf.load(name)
        if theirs.digest() != tokenizer.digest() or teacher.config.vocab != model.config.vocab:
            raise UserError(f"{name} and {student[0]} have different vocabularies")
        tables[name] = train.with_columns(teacher={"logits": complete(teacher, params, train)})
        heard[name] = complete(teacher, params, held)[:, :-1]
    spoken = ("tokens", "segment", "position", "mask", "teacher")
    tables = {n: Table({k: t[k] for k in spoken}) for n, t in tables.items()}

    def begin(seeds: Sequence[int]) -> Params:
        if scratch:
            return jax.vmap(model.init)(jnp.stack([jax.random.key(seed) for seed in seeds]))
        picked = [own[seed % len(own)] for seed in seeds]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *picked)

    data = _held(held, np.stack([*heard.values()]), len(dev), tokenizer.size)
    how = dict(tables=tables, rows=rows, tune=tune, start=start)
    return World(taid, model, begin, judge=_judge(model), data=data, **how)  # pyright: ignore


def _texts(
    tokenizer: Any, steps: Sequence[int], length: int, sizes: tuple[int, int, int]
) -> list[Table]:
    """Training, dev and test rows [n,length] without a common question; ``mask`` is 1 on every
    token but the first, ``solution`` on those of the solution."""
    made, seen = [], set()
    for seed, size in zip((TRAIN, DEV, TEST), sizes, strict=True):
        asked = size + size // 4 + 8
        drawn = arithmetic.problems(seed, asked, steps=tuple(steps), avoid=seen)
        table = tokenise(drawn, tokenizer, length=length, eos=True)
        if len(table) < size:
            raise UserError(f"only {len(table)} of {asked} problems fit in --length {length}")
        table = table.take(np.arange(size))
        seen |= set(table["question"])
        whole = (np.asarray(table["segment"]) > 0).astype(np.float32)
        whole[:, 0] = 0
        made.append(table.with_columns(mask=whole, solution=np.asarray(table["mask"])))
    return made


def complete(model: Model, params: Params, table: Table) -> np.ndarray:
    """Log-probabilities [N,T,V] float32 of every next token: a complete stored teacher."""

    def say(params: Params, batch: Batch) -> Array:
        return jax.nn.log_softmax(decode(forward(model, params, batch)))

    return predict(say, params, table, batch=64)


def _certain(table: Table, vocab: int) -> np.ndarray:
    """The truth as a teacher, [N,T,V]: the token that came has all probability."""
    tokens = np.asarray(table["tokens"])
    following = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # the last is never asked
    return np.where(np.eye(vocab, dtype=bool)[following], 0.0, EXCLUDED).astype(np.float32)


def _held(held: Table, heard: np.ndarray, dev: int, words: int) -> dict[str, Any]:
    """What ``_judge`` reads of dev and test rows: ``heard`` [K,N,T-1,V] and its head and tail."""
    order = np.argsort(-heard[..., :words], axis=-1, kind="stable").argsort(-1)
    wide = np.pad(order, [(0, 0)] * 3 + [(0, heard.shape[-1] - words)], constant_values=-1)
    split = np.arange(len(held))[None] < dev
    names = ("tokens", "segment", "position", "mask", "solution")
    return {
        **{name: np.asarray(held[name]) for name in names},
        "teacher": heard,
        "head": (wide >= 0) & (wide < TOP),
        "tail": wide >= words - round(BOTTOM * words),
        "split": np.concatenate([split, ~split]).astype(np.float32),
    }


def _judge(model: Model) -> Callable[[Params, Any], Any]:
    """Means over the predictions of dev and of test [2], against each teacher [2,K]: ``kl`` and
    ``nll`` (nats per token), ``right`` (share of solution tokens named first), ``exact`` (share of
    solutions all of whose tokens are), ``agree`` (share of tokens of the solution that teacher
    and student both name first), ``head`` and ``tail`` (probability mass)."""

    def look(params: Params, data: Any) -> dict[str, Array]:
        logps = jax.nn.log_softmax(decode(forward(model, params, data))[:, :-1])
        following, probs = data["tokens"][:, 1:], jnp.exp(logps)
        every, solution = data["mask"][:, 1:], data["solution"][:, 1:]

        def mean(values: Array, weight: Array) -> Array:
            sums = data["split"] @ (values * weight).sum(-1)
            return sums / (data["split"] @ weight.sum(-1))

        def against(heard: Array, head: Array, tail: Array) -> dict[str, Array]:
            kl = (jnp.exp(heard) * (heard - logps)).sum(-1)
            both = (heard.argmax(-1) == first).astype(jnp.float32)
            found = {"head": mean((probs * head).sum(-1), every)}
            found |= {"tail": mean((probs * tail).sum(-1), every)}
            return found | {"kl": mean(kl, every), "agree": mean(both, solution)}

        first = logps.argmax(-1)
        right = (first == following).astype(jnp.float32)
        nll = -jnp.take_along_axis(logps, following[..., None], axis=-1)[..., 0]
        whole = (right >= solution).all(-1).astype(jnp.float32)
        found = jax.lax.map(lambda x: against(*x), (data["teacher"], data["head"], data["tail"]))
        return {
            **jax.tree.map(lambda leaf: leaf.T, found),
            **{"nll": mean(nll, every), "right": mean(right, solution)},
            "exact": data["split"] @ whole / data["split"].sum(-1),
        }

    return look


def teacher_rows(world: World) -> Iterator[Row]:
    """What the judge would say of the teachers themselves, on test."""
    data, test = world.data, world.data["split"][1]
    every, solution = data["mask"][:, 1:] * test[:, None], data["solution"][:, 1:] * test[:, None]
    following = data["tokens"][:, 1:]
    for name, logps, *masks in zip(
        world.teachers, data["teacher"], data["head"], data["tail"], strict=True
    ):
        right = logps.argmax(-1) == following
        nll = -np.take_along_axis(logps, following[..., None], -1)[..., 0]
        head, tail = ((np.exp(logps) * mask).sum(-1) for mask in masks)
        whole = (right | (solution == 0)).all(-1)
        yield {
            **{"block": "teacher", "teacher": name},
            **{"nll": float((nll * every).sum() / every.sum())},
            **{"right": float((right * solution).sum() / solution.sum())},
            **{"exact": float((whole * test).sum() / test.sum())},
            **{"head": float((head * every).sum() / every.sum())},
            **{"tail": float((tail * every).sum() / every.sum())},
        }


# Digits


def digits_world(
    *, data: str, sizes: tuple[int, int, int], hidden: tuple[int, int], tune: Tune, start: float
) -> World:
    """Pictures for networks of one hidden layer: ``hidden`` units of the teacher, of the student.

    The teacher learns from labels of the training rows, with ``tune``.

    Raises:
      UserError: as ``images.pictures``.
    """
    train, dev, test = sizes
    shown, truth = images.pictures(data, train + dev, test)
    shown = shown.reshape(len(shown), -1)
    label = np.eye(int(truth.max()) + 1, dtype=np.float32)[truth]
    teacher, model = (mlp(label.shape[1], shown.shape[1], width) for width in hidden)
    known = Table({"features": shown[:train], "label": label[:train]})
    taught = population(classify(teacher, soft_xent), teacher.init, known, tune, [0])
    said = np.asarray(forward(teacher, taught.run(0)[0], {"features": shown}).logits)
    sure = np.where(label > 0, 0.0, EXCLUDED).astype(np.float32)
    tables = {
        name: Table({"features": shown[:train], "teacher": {"classes": logits[:train]}})
        for name, logits in ((TRUTH, sure), ("mlp", said))
    }

    def look(params: Params, data: Any) -> dict[str, Array]:
        logits = forward(model, params, data).logits
        kl = losses.forward_kl(logits, data["said"])[None]
        right = (logits.argmax(-1) == data["truth"]).astype(jnp.float32)
        both = (logits.argmax(-1) == data["said"].argmax(-1)).astype(jnp.float32)
        mean = data["split"] / data["split"].sum(-1, keepdims=True)
        return {"kl": (mean @ kl.T), "accuracy": mean @ right, "agree": mean @ both}

    split = np.arange(dev + test)[None] < dev
    held = {
        **{"features": shown[train:], "truth": truth[train:], "said": said[train:]},
        "split": np.concatenate([split, ~split]).astype(np.float32),
    }
    init = jax.jit(jax.vmap(model.init))

    def begin(seeds: Sequence[int]) -> Params:
        return init(jnp.stack([jax.random.key(seed) for seed in seeds]))

    how = dict(tables=tables, rows=train, tune=tune, start=start, judge=look, data=held)
    return World(taid_classes, model, begin, **how)  # pyright: ignore


# Kernel regression


def theory_rows(seeds: int, *, points: int, ratio: float, rounds: int) -> Iterator[Row]:
    """Norms of the targets of ``rounds`` rounds, in units of what a fit may miss, by repeated
    self-distillation and by TAID, for noisy sines and a Gaussian kernel (see docs/theory.md)."""
    for seed in range(seeds):
        rng = np.random.default_rng([seed])
        x = np.sort(rng.uniform(0, 1, points))
        y = np.sin(2 * np.pi * x) + 0.3 * rng.normal(size=points)
        gram = np.exp(-((x[:, None] - x[None]) ** 2) / 0.02) + 0.1 * np.eye(points)
        values, targets = theory.eigenbasis(gram, y)
        tolerance = float(targets @ targets) / points / ratio**2
        floor = theory.taid_floor(ratio, rounds)
        for name, course in (
            ("self-distillation", theory.self_distillation(targets, values, tolerance, rounds)),
            ("TAID", theory.taid(targets, values, tolerance, rounds)),
        ):
            row = {"block": "theory", "method": name, "seed": seed}
            for n, norm in enumerate(course.ratios):
                yield row | {"round": n, "norm": float(norm), "floor": float(floor[n])}
