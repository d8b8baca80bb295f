"""Learning only where the teacher is sure and the student is not (LLKD, Li et al. 2025).

"Learning with Less" (arXiv 2411.08028) trains on pseudo-labels of which the teacher's confidence
and the student's uncertainty both pass a threshold of the class that moves with training, and
weighs them by both. That much is the paper's; the formulas below are a reconstruction in the usual
self-adaptive form (FreeMatch, Wang et al. 2023), as the paper's own could not be read. With y_i the
teacher's class, conf_i its probability, unc_i the student's entropy over log K:

    c, e        moving averages of the batch means of conf and unc
    c(y), e(y)  the same over examples of class y; unchanged where the batch has none
    select i    where conf_i >= c c(y_i) / max c(.)  and  unc_i >= e e(y_i) / max e(.)
    loss        sum over selected i of conf_i unc_i CE(y_i) / batch

No gradient flows through selection or weights. The thresholds of an update come from the updates
before it, and the averages take in a whole update when the next begins: micro-batches do not
change them. In the first update everything is selected. All examples go backward, those left out
with weight 0: selection saves labels, not arithmetic.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.objectives.base import classes, needed
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State

Memory = dict[str, Any]
ROUNDING = 1e-6  # the mean of equal numbers may come out above them


def selective_memory(classes: int, rows: int = 0) -> Memory:
    """``State.memory`` before the first update.

    ``mean`` [2] and ``by_class`` [2,K]: the moving averages of confidence and uncertainty;
    ``seen`` [K]: updates that had the class; ``sums`` [3,K]: confidence, uncertainty and number of
    the examples of update number ``step`` so far, which join the averages when the next begins.

    Args:
      rows: of the table, to count in ``picked`` [rows] how often each was selected; the column
        ``group`` then numbers the rows. 0 counts nothing.
    """
    memory = {
        "mean": jnp.zeros(2, jnp.float32),
        "by_class": jnp.zeros((2, classes), jnp.float32),
        "seen": jnp.zeros(classes, jnp.float32),
        "sums": jnp.zeros((3, classes), jnp.float32),
        "step": jnp.zeros((), jnp.int32),
    }
    return memory | ({"picked": jnp.zeros(rows, jnp.float32)} if rows else {})


def selective(
    model: Model,
    *,
    decay: Any = 0.99,
    teacher: Any = 1.0,
    student: Any = 1.0,
    weigh: Any = 1.0,
    moving: Any = 1.0,
    fixed: tuple[Any, Any] = (0.0, 0.0),
    keep: Any = 1.0,
    per_selected: Any = 0.0,
) -> Objective:
    """Cross-entropy to the teacher's class where the teacher is sure and the student unsure.

    ``label`` [B,K] has the teacher's probabilities; needs ``memory=selective_memory(K)``. Every
    number may be a traced scalar, so that all arms are one program. Metrics ``selected``: the share
    of the batch; ``confident``, ``uncertain``: the share that passes one of the two conditions;
    ``agreement`` as in ``classify``.

    Args:
      decay: of the moving averages.
      teacher, student: 0 switches this condition off, and its part of the weight.
      weigh: power of the weight ``conf * unc``; 0 is no weights.
      moving: 0 takes the ``fixed`` thresholds (confidence, uncertainty) instead.
      keep: chance with which a selected example is kept, for controls.
      per_selected: 0 divides the loss by the batch, 1 by the sum of the weights.

    Raises:
      UserError: a state without the memory, or with one of other classes; a memory that counts
        rows, and no column ``group``.
    """

    def objective(params: Params, state: State, batch: Batch, key: Array):
        memory = _begun(state, decay)
        logits, labels = classes(model, params, batch), needed(batch, "label")
        if (made := len(memory["seen"])) != labels.shape[-1]:
            raise UserError(
                f"selective_memory({made}) is for {made} classes, not {labels.shape[-1]}"
            )
        named, conf, unc = signals(logits, labels)
        least = moving * thresholds(memory) + (1.0 - moving) * jnp.array(fixed)[:, None] - ROUNDING
        confident = conf >= teacher * least[0][named]
        uncertain = unc >= student * least[1][named]
        chosen = confident & uncertain & jax.random.bernoulli(key, keep, conf.shape)
        power = (conf**teacher * unc**student) ** weigh
        weights = jax.lax.stop_gradient(jnp.where(chosen, power, 0.0))
        losses = soft_xent(logits, jax.nn.one_hot(named, labels.shape[-1]))
        count = jnp.array(float(len(conf)))
        total = per_selected * weights.sum() + (1.0 - per_selected) * count
        metrics = {
            "selected": (chosen.sum().astype(jnp.float32), count),
            "confident": (confident.sum().astype(jnp.float32), count),
            "uncertain": (uncertain.sum().astype(jnp.float32), count),
            "agreement": ((logits.argmax(-1) == named).sum().astype(jnp.float32), count),
        }
        memory = _noted(memory, named, conf, unc, chosen, batch)
        return (losses * weights).sum(), total, Aux(metrics, memory)

    return objective


def signals(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    """The teacher's class [B], its confidence [B] and the student's uncertainty [B] in [0, 1].

    logits [B,K] of the student, labels [B,K] probabilities of the teacher. No gradient.
    """
    logps = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(jnp.float32))
    entropy = -(jnp.exp(logps) * logps).sum(-1) / jnp.log(float(logits.shape[-1]))
    return labels.argmax(-1), labels.max(-1).astype(jnp.float32), entropy


def thresholds(memory: Memory) -> Array:
    """Least confidence and least uncertainty by class, [2,K].

    A class that was not seen yet has the global mean; without any update all are 0.
    """
    seen = memory["seen"] > 0
    own = jnp.where(seen[None], memory["by_class"], 0.0)
    share = own / jnp.maximum(own.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return memory["mean"][:, None] * jnp.where(seen[None], share, 1.0)


def _begun(state: State, decay: Any) -> Memory:
    """The memory at this update: what the update before it noted has joined the averages."""
    memory = state.memory
    if not isinstance(memory, dict) or "by_class" not in memory:
        raise UserError("selective needs memory=selective_memory(classes) in fit or population")
    sums, first = memory["sums"], memory["seen"].sum() == 0
    count = sums[2]
    mean = sums[:2].sum(-1) / jnp.maximum(count.sum(), 1.0)
    own = sums[:2] / jnp.maximum(count, 1.0)[None]
    rate = jnp.where(memory["seen"] > 0, decay, 0.0)[None]
    mixed = jnp.where(count[None] > 0, rate * memory["by_class"] + (1.0 - rate) * own, 0.0)
    new = memory | {
        "mean": jnp.where(first, mean, decay * memory["mean"] + (1.0 - decay) * mean),
        "by_class": jnp.where(count[None] > 0, mixed, memory["by_class"]),
        "seen": memory["seen"] + (count > 0),
        "sums": jnp.zeros_like(sums),
        "step": state.step,
    }
    ended = (state.step > memory["step"]) & (count.sum() > 0)
    return jax.tree.map(lambda a, b: jnp.where(ended, a, b), new, memory | {"step": state.step})


def _noted(
    memory: Memory, named: Array, conf: Array, unc: Array, chosen: Array, batch: Batch
) -> Memory:
    """The memory with this part of the update's batch added."""
    which = jax.nn.one_hot(named, memory["seen"].shape[0])
    part = jnp.stack([conf, unc, jnp.ones_like(conf)]) @ which
    memory = memory | {"sums": memory["sums"] + part}
    if "picked" not in memory:
        return memory
    if "group" not in batch:
        raise UserError("selective_memory(rows=...) needs the column 'group' with row numbers")
    return memory | {"picked": memory["picked"].at[batch["group"]].add(chosen.astype(jnp.float32))}
