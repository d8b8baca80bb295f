"""Distillation between different tokenizers: the likelihood of stretches of text both cut alike.

The teacher's log-probability of every span is made once, as the column ``spans.teacher``
(``data.spans``, ``span_logps`` under ``annotate.predict``); the student's is the sum of those of
its tokens. Approximate likelihood matching (Minixhofer, Vulic and Ponti 2025, arXiv 2503.20083)
without their choice of spans by tokenization bias.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_logps
from w2s_jax.losses.spans import binary_kl
from w2s_jax.objectives.base import at, predicted
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State


def span_logps(model: Model, params: Params, batch: Batch) -> Array:
    """Log-probability [B,S] of every span of the column ``spans``, in nats; 0 where there is none.

    ``spans.of`` [B,T] numbers the spans of the predictions of ``tokens`` or of ``targets``; -1 is
    none. No [B,T,V] is made; entries of padded vocabulary rows have probability 0.

    Raises:
      UserError: the batch lacks the column.
    """
    return _spans(model, params, batch)[0]


def distill_spans(model: Model, divergence: Callable[..., Array] = binary_kl) -> Objective:
    """A divergence of the spans' likelihoods (``losses.spans``), nats per weighted span.

    Metrics per weighted span: ``gap``, the teacher's log-probability less the student's, and
    ``tokens``, the student's tokens.

    Raises:
      UserError: the batch lacks ``spans`` with ``teacher`` (``data.spans.with_teacher``).
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        if "teacher" not in batch.get("spans", ()):
            raise UserError(
                "distill_spans needs the column 'spans' with 'teacher' (data.spans.with_teacher)"
            )
        mine, tokens = _spans(model, params, batch)
        theirs, weight = batch["spans"]["teacher"], batch["spans"]["weight"]
        some = weight != 0
        # where there is no span, numbers that any divergence and its gradient can bear
        mine, theirs = jnp.where(some, mine, -1.0), jnp.where(some, theirs, -1.0)
        values = jnp.where(some, at(divergence, state.progress)(mine, theirs, tokens), 0.0)
        total = weight.sum()
        gap = (weight * (theirs - mine)).sum()
        metrics = {"gap": (gap, total), "tokens": ((weight * tokens).sum(), total)}
        return (weight * values).sum(), total, Aux(metrics, state.memory)

    return objective


def _spans(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Log-probabilities [B,S] and numbers of tokens [B,S] of the spans."""
    if "spans" not in batch:
        raise UserError(f"the batch lacks the column 'spans' (data.spans.pair): {sorted(batch)}")
    said = predicted(model, params, batch)
    of = batch["spans"]["of"] if "targets" in batch else batch["spans"]["of"][:, 1:]
    some = (of >= 0).astype(jnp.float32)
    logps = token_logps(said.hidden, said.unembed, said.ids, some, vocab=said.vocab)
    rows, place = jnp.arange(of.shape[0])[:, None], jnp.maximum(of, 0)
    empty = jnp.zeros(batch["spans"]["weight"].shape, jnp.float32)
    return empty.at[rows, place].add(logps), empty.at[rows, place].add(some)
