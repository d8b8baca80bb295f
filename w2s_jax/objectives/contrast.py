"""CRD (Tian et al. 2020, arXiv 1910.10699) with its memory of every example's embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.features import noise_contrast, unit
from w2s_jax.objectives.features import Term, embeddings
from w2s_jax.types import Array, Batch, Tree


def remembered(
    examples: int,
    *,
    student: int = -1,
    teacher: int = -1,
    weight: Any = 0.8,
    negatives: int = 16_384,
    width: int = 128,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> Term:
    """The term of ``match`` that tells each example's positive from negatives of the whole data
    set, drawn from a memory; numbers as in RepDistiller.

    The column ``group`` [B] is the example's place among ``examples``. ``State.memory``
    (``match_memory``) holds for it both embeddings of every example [examples, width], moved by
    ``momentum`` when it is met, and the normalisers of both scores, set by the first batch and left
    alone. Anchors are the student's embeddings among the teacher's remembered ones, and the
    reverse. A step reads 2 B (negatives + 1) remembered embeddings; ``losses.features.contrastive``
    is the form without.

    Raises:
      UserError: sizes below 1; a batch without ``group``.
    """
    if min(examples, negatives, width) < 1:
        raise UserError(
            f"remembered needs at least one example, negative and channel, got {examples}, "
            f"{negatives}, {width}"
        )

    def start(key: Array) -> Tree:
        bound = (width / 3) ** -0.5
        banks = jax.random.uniform(key, (2, examples, width), minval=-bound, maxval=bound)
        return {"banks": banks, "normaliser": jnp.full(2, -jnp.inf)}

    numbers = {"negatives": negatives, "temperature": temperature, "momentum": momentum}
    loss = partial(_contrast, **numbers)
    return Term(loss, student, teacher, weight, head=embeddings(width), memory=start)


def _contrast(
    student: Array,
    teacher: Array,
    *,
    memory: Tree,
    batch: Batch,
    key: Array,
    negatives: int,
    temperature: float,
    momentum: float,
) -> tuple[Array, Tree]:
    """Embeddings [B,D] -> the losses [B] of both directions, and the memory afterwards."""
    if "group" not in batch:
        raise UserError("remembered needs the column 'group': each example's place in the memory")
    place, size = batch["group"], memory["banks"].shape[1]
    drawn = jax.random.randint(key, (len(place), negatives), 0, size)
    which = jnp.concatenate([place[:, None], drawn], axis=1)
    own = [unit(x) for x in (student, teacher)]
    losses, normalisers = jnp.zeros(len(place)), []
    for i, anchor in enumerate(own):
        others = memory["banks"][1 - i][which]
        scores = jnp.einsum("bkd,bd->bk", others, anchor) / temperature
        first = jax.nn.logsumexp(scores) + jnp.log(size / scores.size)
        known = memory["normaliser"][i]
        known = jax.lax.stop_gradient(jnp.where(jnp.isinf(known), first, known))
        scores = scores - known
        losses += noise_contrast(scores[:, 0], scores[:, 1:], examples=size)
        normalisers.append(known)
    now = jax.lax.stop_gradient(jnp.stack(own))
    moved = momentum * memory["banks"][:, place] + (1 - momentum) * now
    banks = memory["banks"].at[:, place].set(unit(moved))
    return losses, {"banks": banks, "normaliser": jnp.stack(normalisers)}
