"""Objectives of pairs of responses: a preference loss and the forward passes it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.preference import collision
from w2s_jax.losses.sequence import response_sum, token_logps
from w2s_jax.objectives.base import Predicted, at, predicted
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State


def prefer(
    model: Model,
    loss: Callable[..., Array],
    *,
    length_mean: bool = True,
    nll: float = 0.0,
    ld_alpha: float = 1.0,
    wpo: bool = False,
    reference: Model | str = "column",
) -> Objective:
    """Train on pairs with ``loss(chosen, rejected, ref_chosen, ref_rejected)``, nats per pair.

    Pairs are packed (columns of ``data.pairs.pack_pairs``) or one to a row (``chosen`` and
    ``rejected``); both give the same loss and gradients. Metrics, means over pairs: ``accuracy``
    (share in which the margin over the reference is positive), ``margin``, ``chosen_change`` and
    ``rejected_change`` (log-probability minus the reference's), and with a reference ``displaced``
    (share in which the margin grew although the chosen response became less likely).

    Args:
      length_mean: losses see log-probabilities per token of the response rather than sums.
      nll: adds this multiple of the chosen response's mean NLL per token (RPO, CPO, ORPO).
      ld_alpha: weight of the tokens of the longer response beyond the length of the shorter
        (LD-DPO, 2409.06411); stored references are whole sums and cannot be weighed.
      wpo: multiplies a pair's loss (not ``nll``) by ``exp(mean over tokens of log p(y_t) - log
        sum_v p(v)^2)`` of both responses, without a gradient (WPO, 2406.11827, eq. 2).
      reference: ``"column"`` reads ``ref`` (sums in nats, see ``columns.add_reference``); a
        model computes it in every step from ``state.frozen["ref"]`` or, for adapters,
        ``state.frozen["base"]``; ``"none"`` calls ``loss(chosen, rejected)``.

    Raises:
      UserError: the batch holds no pairs, or no reference where one is read; ``ld_alpha`` with
        stored references; ``wpo`` with a loss of many pairs together.
    """
    if isinstance(reference, str) and reference not in ("column", "none"):
        raise UserError(f"prefer: reference must be 'column', 'none' or a model, not {reference!r}")
    if reference == "column" and ld_alpha != 1.0:
        raise UserError(
            "prefer: ld_alpha weighs the reference's tokens too, and the column 'ref' holds their "
            "sums: pass the reference as a model"
        )
    together = getattr(getattr(loss, "func", loss), "is_coupled", False)
    if together and wpo:
        raise UserError("prefer: wpo weighs pairs, and this loss is not a sum over pairs")

    def objective(params: Params, state: State, batch: Batch, key: Array):
        said, pairs = _responses(model, params, batch)
        weight = pairs["weight"]
        ref = _reference(reference, state, batch, pairs, ld_alpha)
        spoken = at(loss, state.progress)

        def losses(logps: Array, columns: Any, expected: Any = None):
            of, mask, weight, ref = columns
            whole, counts = _per_response(logps, of, mask, weight.shape[1])
            sums = _tilted(logps, of, mask, weight.shape[1], ld_alpha)
            counts = jnp.maximum(counts, 1.0)
            scale = counts if length_mean else jnp.ones_like(counts)
            sides = [(x / scale)[..., i] for x in (sums, ref) if x is not None for i in (0, 1)]
            values = spoken(*sides, weight=weight) if together else spoken(*sides)
            if wpo:
                gaps = _per_response(logps - expected, of, mask, weight.shape[1])[0] / counts
                values = values * jnp.exp(jax.lax.stop_gradient(gaps.sum(-1)))
            values = values - nll * (whole / counts)[..., 0]
            return jnp.where(weight > 0, values * weight, 0.0).sum(), _changes(*sides)

        columns = (pairs["of"], said.mask, weight, ref)
        if together:
            total, told = losses(_logps(said), columns)
        else:
            total, told = response_sum(
                losses, said.hidden, said.unembed, said.ids, said.mask, columns,
                token=collision if wpo else None, vocab=said.vocab,
            )  # fmt: skip
        return total, weight.sum(), Aux(means(told, weight), state.memory)

    return objective


def response_logps(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Summed log-probability (nats) and number of tokens of every response, both [B,P,2] float32
    (chosen, rejected); P is 1 for pairs that are not packed.

    Raises:
      UserError: the batch holds no pairs.
    """
    said, pairs = _responses(model, params, batch)
    return _per_response(_logps(said), pairs["of"], said.mask, pairs["weight"].shape[1])


def _logps(said: Predicted) -> Array:
    return token_logps(said.hidden, said.unembed, said.ids, said.mask, vocab=said.vocab)


def compared(
    model: Model, params: Params, state: State, batch: Batch, reference: Model | str
) -> tuple[Array, Array, Array]:
    """Summed log-probabilities [B,P,2] of the policy and of the reference (``"column"`` or a model,
    without a gradient), and weights [B,P].

    Raises:
      UserError: no pairs, or no reference.
    """
    said, pairs = _responses(model, params, batch)
    mine, _ = _per_response(_logps(said), pairs["of"], said.mask, pairs["weight"].shape[1])
    theirs: Any = _reference(reference, state, batch, pairs)
    return mine, theirs, pairs["weight"]


def means(values: dict[str, Array], weight: Array) -> dict[str, tuple[Array, Array]]:
    """Sums and weights, as ``Aux`` has them, of numbers [B,P] per pair."""
    count = weight.sum()
    return {name: ((value * weight).sum(), count) for name, value in values.items()}


def _responses(model: Model, params: Params, batch: Batch) -> tuple[Predicted, dict[str, Array]]:
    """Predictions of both responses side by side, and of [B,M], weight [B,P] of their pairs."""
    if "pairs" in batch:
        said = predicted(model, params, batch)
        return said, {"of": batch["targets"]["of"], **batch["pairs"]}
    both = side_by_side(batch)
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


def side_by_side(batch: Batch) -> Batch:
    """``tokens`` and ``mask`` [2B,T] of pairs that are not packed, chosen before rejected.

    The two of a pair are neighbours, so that a sharded batch stays where it is.

    Raises:
      UserError: the batch holds no pairs.
    """
    if "chosen" not in batch or "rejected" not in batch:
        raise UserError(f"no packed pairs or columns 'chosen' and 'rejected' in {sorted(batch)}")
    sides = [{k: batch[name][k] for k in ("tokens", "mask")} for name in ("chosen", "rejected")]
    return jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *sides)


def _reference(
    reference: Model | str,
    state: State,
    batch: Batch,
    pairs: dict[str, Array],
    ld_alpha: float = 1.0,
) -> Array | None:
    """Summed reference log-probabilities [B,P,2], without a gradient; None without a reference."""
    if isinstance(reference, Model):
        frozen = state.frozen["ref" if "ref" in state.frozen else "base"]
        said, pairs = _responses(reference, jax.lax.stop_gradient(frozen), batch)
        many = pairs["weight"].shape[1]
        sums = _tilted(_logps(said), pairs["of"], said.mask, many, ld_alpha)
        return jax.lax.stop_gradient(sums)
    if reference == "none":
        return None
    if "ref" not in pairs:
        raise UserError("there are no reference log-probabilities: see columns.add_reference")
    return pairs["ref"]


def _changes(chosen: Array, rejected: Array, *ref: Array) -> dict[str, Array]:
    """What is said of every pair, from the log-probabilities that the loss sees."""
    up, down = (chosen - ref[0], rejected - ref[1]) if ref else (chosen, rejected)
    margin = up - down
    told = {
        "accuracy": (margin > 0).astype(jnp.float32),
        "margin": margin,
        "chosen_change": up,
        "rejected_change": down,
    }
    if ref:
        told["displaced"] = ((margin > 0) & (up < 0)).astype(jnp.float32)
    return told


def _per_response(logps: Array, of: Array, mask: Array, pairs: int) -> tuple[Array, Array]:
    """Sums of [n,M] over the tokens of each response, and their number: both [n,P,2]."""
    which = _which(of, mask, pairs)
    sums = _over(which, logps)
    return sums.reshape(-1, pairs, 2), which.sum(1).reshape(-1, pairs, 2)


def _tilted(logps: Array, of: Array, mask: Array, pairs: int, ld_alpha: float) -> Array:
    """Sums [n,P,2] in which the tokens that only the longer response has count ``ld_alpha``."""
    which = _which(of, mask, pairs)
    if ld_alpha != 1.0:
        counts = which.sum(1).reshape(-1, pairs, 2)
        shared = jnp.repeat(counts.min(-1), 2, axis=-1)
        which = jnp.where(which.cumsum(1) > shared[:, None], ld_alpha * which, which)
    return _over(which, logps).reshape(-1, pairs, 2)


def _which(of: Array, mask: Array, pairs: int) -> Array:
    """[n,M,2P] float32: 1 where a token belongs to a response."""
    which = (of[..., None] == jnp.arange(2 * pairs)[None, None]) & (mask > 0)[..., None]
    return which.astype(jnp.float32)


_over = partial(jnp.einsum, "nmr,nm->nr", precision="highest")
