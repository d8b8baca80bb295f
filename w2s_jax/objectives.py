"""Objectives: a loss and the forward passes it needs; all that ``fit`` knows of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import response_sum, token_divergence, token_logps, token_nll
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State, forward


def at(loss: Callable[..., Array], progress: Array) -> Callable[..., Array]:
    """``loss`` with every schedule bound by ``functools.partial`` replaced by its present value.

    A schedule is a function of progress in [0, 1) marked by ``is_schedule`` (see
    ``losses.classification.ramp``); other keywords pass through.
    """
    if not isinstance(loss, partial):
        return loss
    bound = {
        name: value(progress) if getattr(value, "is_schedule", False) else value
        for name, value in loss.keywords.items()
    }
    return partial(loss.func, *loss.args, **bound)


def classify(model: Model, loss: Callable[..., Array]) -> Objective:
    """Train class logits [B,C] on ``label`` [B,C] with a per-example loss [B] (nats).

    The optional column ``weight`` [B] weighs examples. Metric ``agreement``: how often the argmax
    equals that of the label.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        logits, labels = forward(model, params, batch).logits, batch["label"]
        weight = batch.get("weight", jnp.ones(logits.shape[0], jnp.float32))
        losses = at(loss, state.progress)(logits, labels)
        agree = (logits.argmax(-1) == labels.argmax(-1)).astype(jnp.float32)
        total = weight.sum()
        aux = Aux({"agreement": ((agree * weight).sum(), total)}, state.memory)
        return (losses * weight).sum(), total, aux

    return objective


def language(model: Model) -> Objective:
    """Next-token cross-entropy in nats per weighted token.

    The predictions are those of the column ``targets`` or, without it, of ``mask``, where
    ``mask[b,t]`` weighs the prediction of ``tokens[b,t]`` from what precedes it in its segment;
    packing gives the first token of each document weight 0. ``weight`` [B] weighs rows.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        said = predicted(model, params, batch)
        weights = said.mask * batch["weight"][:, None] if "weight" in batch else said.mask
        total, _ = token_nll(said.hidden, said.unembed, said.ids, weights, vocab=said.vocab)
        return total, weights.sum(), Aux({}, state.memory)

    return objective


def prefer(
    model: Model,
    loss: Callable[..., Array],
    *,
    length_mean: bool = True,
    reference: Model | str = "column",
) -> Objective:
    """Train on pairs with ``loss(chosen, rejected, ref_chosen, ref_rejected)``, nats per pair.

    Pairs are packed (columns of ``data.pairs.pack_pairs``) or one to a row (``chosen`` and
    ``rejected``); both give the same loss and gradients. Metrics, means over pairs: ``accuracy``
    (share in which the margin over the reference is positive), ``margin``, ``chosen_change`` and
    ``rejected_change`` (log-probability minus the reference's; both falling is displacement).

    Args:
      length_mean: losses see log-probabilities per token of the response rather than sums.
      reference: ``"column"`` reads ``ref`` (sums in nats, see ``columns.add_reference``); a
        model computes it in every step from ``state.frozen["ref"]`` or, for adapters,
        ``state.frozen["base"]``; ``"none"`` for losses without one (they see zeros).

    Raises:
      UserError: the batch holds no pairs, or no reference where one is read.
    """
    if isinstance(reference, str) and reference not in ("column", "none"):
        raise UserError(f"prefer: reference must be 'column', 'none' or a model, not {reference!r}")

    def objective(params: Params, state: State, batch: Batch, key: Array):
        said, pairs = _responses(model, params, batch)
        weight = pairs["weight"]
        ref = _reference(reference, state, batch, pairs)

        def losses(logps: Array, columns: Any) -> tuple[Array, dict[str, Array]]:
            of, mask, weight, ref = columns
            sums, counts = _per_response(logps, of, mask, weight.shape[1])
            scale = 1.0 / jnp.maximum(counts, 1.0) if length_mean else jnp.ones_like(counts)
            mine, theirs = sums * scale, ref * scale
            values = at(loss, state.progress)(
                mine[..., 0], mine[..., 1], theirs[..., 0], theirs[..., 1]
            )
            change = mine - theirs
            margin = change[..., 0] - change[..., 1]
            said = {
                "accuracy": (margin > 0).astype(jnp.float32),
                "margin": margin,
                "chosen_change": change[..., 0],
                "rejected_change": change[..., 1],
            }
            return jnp.where(weight > 0, values * weight, 0.0).sum(), said

        columns = (pairs["of"], said.mask, weight, ref)
        total, said = response_sum(
            losses, said.hidden, said.unembed, said.ids, said.mask, columns, vocab=said.vocab
        )
        count = weight.sum()
        metrics = {name: ((value * weight).sum(), count) for name, value in said.items()}
        return total, count, Aux(metrics, state.memory)

    return objective


def distill(
    model: Model,
    divergence: Callable[[Array, Any], Array],
    *,
    teacher: Model | None = None,
) -> Objective:
    """A divergence from the teacher's next-token distributions, nats per weighted token.

    The positions are those of ``language``. With ``teacher`` the distributions are made in the
    step from ``state.frozen["teacher"]``, which reads the same columns as the student; without,
    the column ``teacher`` holds them (``losses.distillation.top_k`` reads it).

    Raises:
      UserError: neither a teacher nor the column; vocabularies that differ.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        mine = predicted(model, params, batch)
        theirs: Any
        vocab = mine.vocab
        if teacher is not None:
            other = predicted(teacher, jax.lax.stop_gradient(state.frozen["teacher"]), batch)
            theirs, vocab = (other.hidden, other.unembed), vocab or other.vocab
        elif "teacher" in batch:
            theirs = batch["teacher"]
            if "targets" not in batch:
                theirs = jax.tree.map(lambda leaf: leaf[:, :-1], theirs)
        else:
            raise UserError(
                "distill needs a live teacher or the column 'teacher' (columns.add_teacher)"
            )
        total, _ = token_divergence(
            (mine.hidden, mine.unembed),
            theirs,
            mine.mask,
            at(divergence, state.progress),
            vocab=vocab,
        )
        return total, mine.mask.sum(), Aux({}, state.memory)

    return objective


def on_base(objective: Objective) -> Objective:
    """``objective`` of a model with adapters (``models.lora``), training the adapters alone; the
    base is ``state.frozen["base"]``."""

    def adapted(params: Params, state: State, batch: Batch, key: Array):
        return objective({"base": state.frozen["base"], "lora": params}, state, batch, key)

    return adapted


@dataclass(frozen=True)
class Predicted:
    """Predictions of a batch: ``hidden`` [B,M,D] says ``ids`` [B,M] with loss weight ``mask``."""

    hidden: Array
    unembed: Array
    ids: Array
    mask: Array
    vocab: int | None


def predicted(model: Model, params: Params, batch: Batch) -> Predicted:
    """The model's hidden states where a token is predicted: at ``targets`` where the batch has
    them (so that prompts never reach the vocabulary head), else at all tokens but the last."""
    output = forward(model, params, batch)
    if "targets" not in batch:
        parts = (output.hidden[:, :-1], batch["tokens"][:, 1:], batch["mask"][:, 1:])
    else:
        targets = batch["targets"]
        hidden = jnp.take_along_axis(output.hidden, targets["at"][..., None], axis=1)
        parts = (hidden, targets["ids"], targets["mask"])
    hidden, ids, mask = parts
    return Predicted(hidden, output.unembed, ids, mask, output.vocab)


def response_logps(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Summed log-probability (nats) and number of tokens of every response, both [B,P,2] float32
    (chosen, rejected); P is 1 for pairs that are not packed.

    Raises:
      UserError: the batch holds no pairs.
    """
    said, pairs = _responses(model, params, batch)
    logps = token_logps(said.hidden, said.unembed, said.ids, said.mask, vocab=said.vocab)
    return _per_response(logps, pairs["of"], said.mask, pairs["weight"].shape[1])


def _responses(model: Model, params: Params, batch: Batch) -> tuple[Predicted, dict[str, Array]]:
    """Predictions of both responses side by side, and of [B,M], weight [B,P] of their pairs."""
    if "pairs" in batch:
        said = predicted(model, params, batch)
        return said, {"of": batch["targets"]["of"], **batch["pairs"]}
    if "chosen" not in batch or "rejected" not in batch:
        raise UserError(
            f"prefer needs packed pairs or columns 'chosen' and 'rejected', got {sorted(batch)}"
        )
    # chosen and rejected of a pair stay neighbours, so that a sharded batch stays where it is
    sides = [{k: batch[name][k] for k in ("tokens", "mask")} for name in ("chosen", "rejected")]
    both = jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *sides)
    said = predicted(model, params, both)
    rows = len(batch["chosen"]["tokens"])

    def beside(leaf: Array) -> Array:
        return leaf.reshape(rows, -1, *leaf.shape[2:])

    of = jnp.repeat(jnp.arange(2, dtype=jnp.int32), said.ids.shape[1])
    pairs = {
        "of": jnp.broadcast_to(of[None], (rows, len(of))),
        "weight": batch.get("weight", jnp.ones(rows, jnp.float32))[:, None],
    }
    if "ref" in batch["chosen"]:
        pairs["ref"] = jnp.stack([batch["chosen"]["ref"], batch["rejected"]["ref"]], -1)[:, None]
    beside_all = (beside(said.hidden), said.unembed, beside(said.ids), beside(said.mask))
    return Predicted(*beside_all, said.vocab), pairs


def _reference(
    reference: Model | str, state: State, batch: Batch, pairs: dict[str, Array]
) -> Array:
    """Summed reference log-probabilities [B,P,2], without a gradient."""
    if isinstance(reference, Model):
        frozen = state.frozen["ref" if "ref" in state.frozen else "base"]
        return jax.lax.stop_gradient(response_logps(reference, frozen, batch)[0])
    if reference == "none":
        return jnp.zeros((*pairs["weight"].shape, 2), jnp.float32)
    if "ref" not in pairs:
        raise UserError("prefer needs reference log-probabilities: see columns.add_reference")
    return pairs["ref"]


def _per_response(logps: Array, of: Array, mask: Array, pairs: int) -> tuple[Array, Array]:
    """Sums of [n,M] over the tokens of each response, and their number: both [n,P,2]."""
    which = (of[..., None] == jnp.arange(2 * pairs)[None, None]) & (mask > 0)[..., None]
    which = which.astype(jnp.float32)
    sums = jnp.einsum("nm,nmr->nr", logps, which, precision="highest")
    return sums.reshape(-1, pairs, 2), which.sum(1).reshape(-1, pairs, 2)
