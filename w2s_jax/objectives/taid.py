"""TAID (Shing et al. 2025, arXiv 2501.16937): distillation towards a target that moves.

The target lies between the student as it is (t = 0) and the teacher (t = 1); t rises along a line
and, with the adaptive rule, faster while the loss falls. The rule of the released code (``src/
distil_losses/taid.py``), with n the update, N their number and J_n the loss of update n at its t:

    delta_n = (J_{n-1} - J_n) / J_{n-1},   m <- beta m + (1 - beta) delta_n
    t <- min(end, max(start + (end - start) n / N, t + alpha sigmoid(m) (1 - t)))

The first loss is only remembered. t, m and J live in ``State.memory`` (``taid_memory``). The
released code moves t wherever it computes a loss, on validation batches and in every micro-batch
too; here it moves once per update of training, by the loss over the whole batch and all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import taid_cross_entropy
from w2s_jax.objectives.distillation import Divergence, Teachers, distill, distill_classes
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State

Memory = dict[str, Array]


def taid_memory() -> Memory:
    """``State.memory`` before the first update, for ``fit`` and ``population``; scalars.

    ``t``, ``momentum`` (m) and ``previous`` (J of the last update but one) as in the rule; ``sum``
    and ``weight`` of the loss of update number ``step`` so far, which become its J when the next
    update begins.
    """
    zero = jnp.zeros((), jnp.float32)
    memory = dict.fromkeys(("t", "momentum", "sum", "weight"), zero)
    return memory | {
        "previous": jnp.full((), jnp.inf, jnp.float32),
        "step": jnp.zeros((), jnp.int32),
    }


def taid(
    model: Model,
    *,
    teacher: Teachers = None,
    divergence: Divergence = taid_cross_entropy,
    start: Any = 0.4,
    end: Any = 1.0,
    alpha: Any = 5e-4,
    beta: Any = 0.99,
    adaptive: bool = True,
) -> Objective:
    """TAID of next-token distributions, nats per weighted token; needs ``memory=taid_memory()``.

    The numbers may be traced scalars. Metric ``t``.

    Args:
      teacher: as in ``distill``.
      divergence: ``(student_logits, teacher, *, t) -> [...]``: ``taid_cross_entropy``, by which the
        released code judges progress, or ``taid``, the Kullback-Leibler divergence of the paper.
        Their gradients are one; the cross-entropy contains the target's entropy, which changes
        with t, and so does the course of t. Both are in ``losses.distillation``.
      start, end: where t begins and where it stops.
      alpha: largest adaptive step; 0 is the same as ``adaptive`` False.
      beta: decay of the momentum.
      adaptive: whether t may run ahead of the line from ``start`` to ``end``.

    Raises:
      UserError: numbers out of range; as ``distill``; a state without the memory.
    """
    plain = partial(distill, model, teacher=teacher)
    return _moving(plain, divergence, start, end, alpha if adaptive else 0.0, beta)


def taid_classes(
    model: Model,
    *,
    teacher: Teachers = None,
    divergence: Divergence = taid_cross_entropy,
    start: Any = 0.4,
    end: Any = 1.0,
    alpha: Any = 5e-4,
    beta: Any = 0.99,
    adaptive: bool = True,
) -> Objective:
    """TAID of class distributions, nats per weighted example: ``taid`` over ``distill_classes``."""
    plain = partial(distill_classes, model, teacher=teacher)
    return _moving(plain, divergence, start, end, alpha if adaptive else 0.0, beta)


def _moving(
    plain: Callable[[Divergence], Objective],
    divergence: Divergence,
    start: Any,
    end: Any,
    alpha: Any,
    beta: Any,
) -> Objective:
    """``plain`` of the divergence at the t of ``state.memory``."""
    _check(start=start, end=end, alpha=alpha, beta=beta)

    def objective(params: Params, state: State, batch: Batch, key: Array):
        if not isinstance(state.memory, dict) or "momentum" not in state.memory:
            raise UserError("taid keeps its schedule in the state: pass memory=taid_memory()")
        memory = _advanced(state, start, end, alpha, beta)
        inner = replace(state, memory=())
        now = plain(partial(divergence, t=memory["t"]))
        total, weight, aux = now(params, inner, batch, key)
        seen = {"sum": jax.lax.stop_gradient(total), "weight": weight}
        memory |= {name: memory[name] + value for name, value in seen.items()}
        metrics = aux.metrics | {"t": (memory["t"] * weight, weight)}
        return total, weight, Aux(metrics, memory)

    return objective


def _advanced(state: State, start: Any, end: Any, alpha: Any, beta: Any) -> Memory:
    """The memory as update ``state.step`` reads it: once the step has moved on, what was summed
    is the loss of the update before, and t follows from it. An update of weight 0 has no loss."""
    memory: Memory = state.memory
    t, previous, weight = jnp.maximum(memory["t"], start), memory["previous"], memory["weight"]
    loss = jnp.where(weight > 0, memory["sum"] / jnp.where(weight > 0, weight, 1.0), previous)
    first = jnp.isinf(previous)
    change = jnp.where(first, 0.0, (previous - loss) / (previous + 1e-15))
    momentum = beta * memory["momentum"] + (1 - beta) * change
    line = start + (end - start) * memory["step"] / state.steps
    ahead = t + alpha * jax.nn.sigmoid(momentum) * (1 - t)
    moved = {
        "t": jnp.where(first, t, jnp.minimum(end, jnp.maximum(line, ahead))),
        "momentum": jnp.where(first, 0.0, momentum),
        "previous": loss,
        **dict.fromkeys(("sum", "weight"), jnp.zeros((), jnp.float32)),
        "step": state.step,
    }
    same = memory["step"] == state.step
    kept = memory | {"t": t}
    return {name: jnp.where(same, kept[name], moved[name]) for name in moved}


def _check(**numbers: Any) -> None:
    """Numbers that are not traced lie in [0, 1], and ``start`` is not above ``end``."""
    known = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
    wrong = {name: value for name, value in known.items() if not 0 <= value <= 1}
    if wrong:
        raise UserError(f"taid: start, end, alpha and beta lie between 0 and 1, got {wrong}")
    if known.get("start", 0.0) > known.get("end", 1.0):
        raise UserError(f"taid: start={known['start']} is above end={known['end']}")
