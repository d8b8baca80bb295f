"""Training on a model's own answers: policy gradients, online DPO, expert iteration, best of n.

``rollout`` samples and scores; a *lesson* turns what was sampled into rows to train on (``lesson``
of policy gradients, ``duels`` for DPO); ``online`` repeats: sample, score, a few updates. A reward
is any function of the sampled table, for instance ``verified`` or a reward model's scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import columns
from w2s_jax import mesh as meshes
from w2s_jax.annotate import predict
from w2s_jax.data.arithmetic import verify
from w2s_jax.data.groups import pack_groups
from w2s_jax.data.pairs import pack_pairs
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import generate
from w2s_jax.losses.policy import differ
from w2s_jax.objectives import language, policy_logps
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.feed import order
from w2s_jax.train.fit import fit, make_step, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import Array, Batch, Model, Objective, Params, Row, State, Table, Tree

Reward = Callable[[Table], Any]  # a sampled table -> [rows] numbers, NaN where there is none
Lesson = Callable[[Params, Table], Table | None]  # policy, sampled table -> rows to train on


def rollout(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Table,
    key: Array,
    *,
    samples: int,
    reward: Reward,
    tokens: int,
    temperature: float = 1.0,
    **how: Any,
) -> Table:
    """``samples`` responses to each prompt, one per row, scored.

    Args:
      prompts: has ``prompt`` (text); its other columns are there for the reward to read.
      tokens: the most tokens of a response.
      how: further arguments of ``generate.sample.generate``, but no ``stop``: a response ends
        with the end token, which it is also trained to give.

    Returns:
      The columns of ``generate`` and, on the host, ``reward`` [N samples] float32 (NaN: none),
      ``prompt_ids`` and ``trained_ids`` (with the end token where the response ended).

    Raises:
      UserError: see ``generate``; a reward of another shape.
    """
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    texts = np.asarray(prompts["prompt"], object)
    ids = _objects([begin + one for one in tokenizer.encode_ids(texts.tolist())])
    how = dict(key=key, tokens=tokens, samples=samples, temperature=temperature, **how)
    said = generate(prompts.with_columns(prompt=ids), model, params, tokenizer, **how)
    trained = [
        np.array([*one, *(end if finish == "stop" else [])], np.int32)
        for one, finish in zip(said["response_ids"], said["finish"], strict=True)
    ]
    said = said.with_columns(
        prompt=np.repeat(texts, samples), prompt_ids=said["prompt"], trained_ids=_objects(trained)
    )
    scores = np.asarray(reward(said), np.float32)
    if scores.shape != (len(said),):
        raise UserError(f"rollout: the reward has shape {scores.shape}, not ({len(said)},)")
    return said.with_columns(reward=scores)


def verified(said: Table) -> np.ndarray:
    """1 where the final number of ``response`` is that of ``answer`` (arithmetic, GSM8K), else 0;
    float32."""
    pairs = zip(said["answer"], said["response"], strict=True)
    return np.array([verify(answer, text).correct for answer, text in pairs], np.float32)


def rewards(said: Table) -> np.ndarray:
    """The rewards of a rollout by prompt, [N,G] float32."""
    return np.asarray(said["reward"]).reshape(-1, int(np.max(said["sample"])) + 1)


def summary(said: Table) -> Row:
    """What a rollout looks like: mean ``reward``, ``equal`` (share of prompts whose responses all
    have one reward, and so teach nothing), ``length`` (tokens) and ``ended`` (share)."""
    scores = rewards(said)
    lengths = [len(ids) for ids in said["trained_ids"]]
    return {
        "reward": float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan,
        "equal": 1.0 - float(np.mean(np.asarray(differ(jnp.asarray(scores))))),
        "length": float(np.mean(lengths)),
        "ended": float(np.mean(said["finish"] == "stop")),
    }


# --- lessons ------------------------------------------------------------------------------------


def grouped(
    said: Table,
    advantage: Callable[[Array], Array],
    *,
    drop_equal: bool = False,
    drop_overlong: bool = False,
    **packing: Any,
) -> Table | None:
    """A rollout as the table that ``objectives.reinforce`` reads, one prompt to a row.

    Args:
      advantage: rewards [N,G] -> [N,G]: ``losses.policy.grpo``, ``dr_grpo``, ``rloo`` or another.
      drop_equal: leave out prompts whose responses have equal rewards (DAPO's dynamic sampling,
        arXiv 2503.14476, without sampling others in their place).
      drop_overlong: responses that did not end count nowhere in the loss (overlong filtering, same
        source); their reward still counts in the baseline of the others.
      packing: ``multiple`` and ``longest`` of ``pack_groups``.

    Returns:
      The table with host columns ``reward`` and ``advantages`` [N,G]; None when nothing is left.
    """
    scores = rewards(said)
    count, ways = scores.shape
    told = np.asarray(advantage(jnp.asarray(scores)), np.float32)
    index = np.arange(count * ways).reshape(count, ways)
    responses = [[said["trained_ids"][i] for i in group] for group in index]
    packed = pack_groups(said["prompt_ids"][index[:, 0]], responses, **packing)
    targets, weight = packed["targets"], packed["policy"]["weight"]
    if drop_overlong:
        weight = weight * (said["finish"][index] == "stop")
    own = np.take_along_axis(told, targets["of"], axis=1) * targets["mask"]
    policy = {"weight": weight.astype(np.float32), "advantage": own.astype(np.float32)}
    table = packed.with_columns(policy=policy, reward=scores, advantages=told)
    kept = weight.any(1)
    if drop_equal:
        kept &= np.asarray(differ(jnp.asarray(scores)))
    return table.take(kept) if kept.any() else None


def with_logps(
    table: Table,
    name: str,
    model: Model,
    params: Params,
    *,
    temperature: float = 1.0,
    batch: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> Table:
    """The table with ``policy[name]``: log-probabilities (nats) of every target under ``params``.

    ``name`` is "old" (the policy that sampled) or "ref". They are recomputed by the forward pass
    that training uses rather than taken from the sampler, whose rounding differs, who does not tell
    that of the end token and leaves out padding rows of the vocabulary.
    """
    logps = predict(_logps(model, temperature), params, table, batch=batch, mesh=mesh)
    return table.with_columns(policy={**table["policy"], name: logps})


@lru_cache(maxsize=64)
def _logps(model: Model, temperature: float) -> Any:
    return lambda params, batch: policy_logps(model, params, batch, temperature)


def lesson(
    model: Model,
    advantage: Callable[[Array], Array],
    *,
    old: bool = True,
    reference: Params | None = None,
    **how: Any,
) -> Lesson:
    """``grouped`` with the log-probabilities that the objective asks for.

    Args:
      old: False where each rollout is used for one update only: then the ratio is 1 anyway.
      reference: weights of the policy not to stray from (``reinforce(beta=)``).
      how: arguments of ``grouped``.
    """

    def make(params: Params, said: Table) -> Table | None:
        table = grouped(said, advantage, **{"longest": model.config.max_length, **how})
        for name, weights in (("old", params if old else None), ("ref", reference)):
            if table is not None and weights is not None:
                table = with_logps(table, name, model, weights)
        return table

    return make


def duels(model: Model, reference: Params, *, multiple: int = 16) -> Lesson:
    """For online DPO: of each prompt's responses the best against the worst, where they differ,
    as packed pairs with the log-probabilities of ``reference`` (Guo et al. 2024, arXiv
    2402.04792); train with ``objectives.prefer``."""

    def make(params: Params, said: Table) -> Table | None:
        scores = rewards(said)
        kept = np.flatnonzero(np.asarray(differ(jnp.asarray(scores))))
        if not len(kept):
            return None
        first = kept * scores.shape[1]
        best, worst = first + np.nanargmax(scores[kept], 1), first + np.nanargmin(scores[kept], 1)
        sides = (said["prompt_ids"][first], said["trained_ids"][best], said["trained_ids"][worst])
        (table,) = pack_pairs(*sides, per_row=1, classes=1, multiple=multiple)
        return columns.add_reference(model, reference, table, progress=False)

    return make


# --- orders of stages ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights, and what every round looked like before its updates."""

    params: Params
    history: list[Row]


def online(
    objective: Objective,
    params: Params,
    prompts: Table,
    tune: Tune,
    key: Array,
    *,
    roll: Callable[[Params, Table, Array], Table],
    lesson: Lesson,
    rounds: int,
    per_round: int,
    updates: int = 1,
    axes: Tree = None,
    frozen: Tree = (),
    mesh: jax.sharding.Mesh | None = None,
    note: Callable[[Row], None] | None = None,
) -> Trained:
    """Rounds of: sample from the policy as it is, score, ``updates`` updates on that.

    The optimiser goes on from round to round, and one program serves all rounds of one shape.
    Prompts come in epochs of random order, ``per_round`` at a time.

    Args:
      tune: ``batch`` is rows of the lesson (prompts or pairs) per update; its schedule runs over
        ``rounds * updates``; ``epochs`` and ``steps`` are not read.
      roll: ``(params, prompts, key) -> rollout``.
      lesson: what to train on; None as its result leaves a round without updates.
      frozen: what the objective reads and nobody trains.
      mesh: where to train; ``params`` are spread over it already.
      note: is told the row of each round.

    Returns:
      The weights and a row per round: ``round``, ``summary`` of the rollout, ``rows`` of the
      lesson, and the metrics of the last update.

    Raises:
      UserError: a loss that is not finite.
    """
    seed = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
    sampling, training = jax.random.split(key)
    tx = optimizer(tune, rounds * updates, axes)
    step = program(objective, tx, tune.micro)
    history: list[Row] = []
    with meshes.rules_context(mesh):
        state = start(jax.tree.map(jnp.copy, params), tx, rounds * updates)
        for number in range(rounds):
            asked = prompts.take(order(seed, len(prompts), per_round, number))
            said = roll(state.params, asked, jax.random.fold_in(sampling, number))
            table = lesson(state.params, said)
            row = {"round": number, **summary(said), "rows": 0 if table is None else len(table)}
            if table is not None:
                state, last = _updates(step, state, frozen, table, tune, training, updates, mesh)
                row |= last
            history.append(row)
            if note is not None:
                note(row)
    return Trained(state.params, history)


def program(objective: Objective, tx: Any, micro: int) -> Any:
    """An update as one compiled program that consumes its state but not the frozen weights."""
    step = make_step(objective, tx, micro=micro)

    def update(state: State, frozen: Tree, batch: Batch, key: Array):
        new, metrics = step(dataclasses.replace(state, frozen=frozen), batch, key)
        return dataclasses.replace(new, frozen=()), metrics

    return jax.jit(update, donate_argnums=0)


def _updates(
    step: Any,
    state: State,
    frozen: Tree,
    table: Table,
    tune: Tune,
    key: Array,
    updates: int,
    mesh: jax.sharding.Mesh | None,
) -> tuple[State, Row]:
    """``updates`` updates on one table, and the metrics of the last."""
    first, metrics = int(state.step), {}
    seed = (*np.ravel(jax.random.key_data(key)).tolist(), first)
    mine = meshes.batch_rows(mesh, tune.batch)
    for number in range(updates):
        rows = order(seed, len(table), tune.batch, number)[mine]
        batch = meshes.put_batch(table.batch(rows), mesh, tune.batch)
        state, metrics = step(state, frozen, batch, key)
    last = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(last["loss"]):
        raise UserError(f"online: the loss is {last['loss']} at update {first + updates}; lower lr")
    return state, last


def best(said: Table, count: int = 1) -> Table:
    """The ``count`` responses of highest reward to each prompt (the first of equals); those
    without a reward are never kept. With one it is best-of-n sampling."""
    scores = rewards(said)
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :count]  # NaN is last
    flat = (ranked + np.arange(len(scores))[:, None] * scores.shape[1]).reshape(-1)
    return said.take(flat[np.isfinite(np.asarray(said["reward"])[flat])])


def correct(said: Table, least: float = 1.0) -> Table:
    """The responses whose reward is ``least`` or more."""
    return said.take(np.asarray(said["reward"]) >= least)


def best_of_n_kl(n: int) -> float:
    """``log n - (n - 1) / n`` nats: what KL(best of n || policy) is at most; equality where no two
    responses tie and none is likely (Stiennon et al. 2020; Beirami et al. 2024, arXiv 2401.01879).

    Raises:
      UserError: n below 1.
    """
    if n < 1:
        raise UserError(f"best of n needs at least one sample, got {n}")
    return math.log(n) - (n - 1) / n


def imitation(said: Table, **packing: Any) -> Table:
    """Rows for ``objectives.language``: each response of a rollout after its prompt;
    ``packing`` as in ``grouped``."""
    responses = [[ids] for ids in said["trained_ids"]]
    return pack_groups(said["prompt_ids"], responses, **packing).without("policy")


def expert_iteration(
    model: Model,
    base: Params,
    prompts: Table,
    tune: Tune,
    key: Array,
    *,
    roll: Callable[[Params, Table, Array], Table],
    keep: Callable[[Table], Table] = correct,
    rounds: int,
    restart: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> Trained:
    """Rounds of: sample, keep what is good, fine-tune on it (Anthony et al. 2017; "rejection
    sampling" with one round).

    Args:
      keep: ``correct`` for all good responses, ``best`` for the top one of each prompt.
      restart: fine-tune the base model each round rather than the last round's.

    Raises:
      UserError: nothing is kept in a round; see ``fit``.
    """
    params, history = base, []
    for number in range(rounds):
        sampling, training = jax.random.split(jax.random.fold_in(key, number))
        said = roll(params, prompts, sampling)
        kept = keep(said)
        history.append({"round": number, **summary(said), "rows": len(kept)})
        if not len(kept):
            raise UserError(
                f"expert iteration: no response is kept in round {number}; sample more of them, "
                "take easier prompts or keep the best of each"
            )
        state = fit(
            language(model),
            base if restart else params,
            imitation(kept, longest=model.config.max_length),
            tune,
            training,
            axes=model.axes,
            mesh=mesh,
            progress=False,
        )
        params = state.params
    return Trained(params, history)


def _objects(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):  # at once, numpy would stack equal lengths
        column[i] = value
    return column
