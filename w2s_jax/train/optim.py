"""The optimiser's numbers (``Tune``), its schedules, and the optax transform made of them.

What an optimiser keeps per weight of a large matrix, in bytes, by ``Tune.moments``; add the weight
and its gradient (4 and 4, or 2 and 2 with bfloat16 parameters, and 4 more with ``micro`` > 1):

| optimizer | float32 | mixed | bfloat16 |
|-----------|---------|-------|----------|
| adam      | 8       | 6     | 4        |
| adamw     | 8       | 6     | 4        |
| muon      | 4       | 2     | 2        |
| sgd       | 4       | 2     | 2        |
| adafactor | 0       | -     | -        |

Muon keeps what Adam keeps for everything that is not a hidden matrix. Adafactor (Shazeer and Stern
2018, arXiv 1804.04235), without momentum, has a sum per row and per column of matrices whose sides
are 128 or more, and 4 bytes per weight of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from w2s_jax.errors import UserError
from w2s_jax.mesh import is_axes
from w2s_jax.train.precision import in_float32, stored_in_bfloat16
from w2s_jax.types import Params, Tree

OPTIMIZERS = ("adam", "adamw", "adafactor", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
MOMENTS = {  # the fields of optax states that are stored in bfloat16
    "float32": frozenset(),
    "mixed": frozenset({"mu", "trace"}),
    "bfloat16": frozenset({"mu", "trace", "nu"}),
}


@dataclass(frozen=True)
class Tune:
    """How to train: numbers only.

    ``lr``, ``weight_decay``, ``b1``, ``b2``, ``eps``, ``final``, ``adam_scale`` may be traced
    scalars, so that one program can train many of them.

    Raises:
      UserError: a number outside its range, or an unknown optimizer or schedule.
    """

    lr: float = 1e-3
    """Peak learning rate."""
    batch: int = 32
    """Rows per update, over all devices and micro-batches together."""
    epochs: float = 1.0
    """Passes over the table; fractions are allowed."""
    steps: int = 0
    """Number of updates; overrides epochs when above 0."""
    optimizer: Literal["adam", "adamw", "adafactor", "muon", "sgd"] = "adamw"
    """Update rule; muon uses Nesterov Adam for whatever is not a hidden matrix."""
    b1: float = 0.9
    """Decay of the first moment in Adam."""
    b2: float = 0.999
    """Decay of the second moment in Adam."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    momentum: float = 0.95
    """Momentum of muon and sgd."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, times the learning rate; norms and biases never decay."""
    warmup: float = 0.0
    """Share of the run over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Shape after warm-up; wsd is constant to decay_from, then linear."""
    decay_from: float = 0.8
    """Share of the run at which wsd starts to decay."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak (linear, cosine, wsd)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    micro: int = 1
    """Micro-batches per update (gradient accumulation); must divide batch."""
    adam_scale: float = 1.0
    """Learning rate of muon's Adam part, as a multiple of lr."""
    moments: Literal["float32", "mixed", "bfloat16"] = "float32"
    """Stored moments: mixed has only the first, bfloat16 both in 2 bytes, rounded at random."""

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        for name in ("batch", "micro"):
            _range(name, getattr(self, name), low=1)
        for name in ("lr", "epochs", "steps", "eps", "weight_decay", "clip", "final", "adam_scale"):
            _range(name, getattr(self, name), low=0)
        for name in ("b1", "b2", "momentum", "warmup", "decay_from"):
            _range(name, getattr(self, name), low=0, high=1)
        if self.batch % self.micro:
            raise UserError(f"micro={self.micro} does not divide batch={self.batch}")
        _choice("moments", self.moments, tuple(MOMENTS))
        if self.optimizer == "adafactor" and self.moments != "float32":
            raise UserError("optimizer adafactor keeps no moments to store in less; leave moments")
        if self.optimizer == "adam" and _known(self.weight_decay) and self.weight_decay:
            raise UserError("optimizer adam has no weight decay; use adamw")

    def total(self, rows: int | Sequence[int]) -> int:
        """Updates of a run over ``rows`` examples: ``steps``, or ceil(epochs * rows / batch).

        Of several tables each has its own last, partly repeated batch in an epoch.
        """
        one = isinstance(rows, int) or len(rows) == 1
        sizes = [rows] if isinstance(rows, int) else list(rows)
        epoch = sum(size / self.batch if one else -(-size // self.batch) for size in sizes)
        return self.steps or max(1, math.ceil(self.epochs * epoch - 1e-9))


def schedule(tune: Tune, steps: int, lr: Any = None) -> Callable[[Any], jax.Array]:
    """Learning rate as a function of the number of updates done, float32; ``lr`` may be traced.

    Warm-up over w = round(warmup * steps) updates gives lr * (count + 1) / w, so the first update
    is not wasted on 0; the decaying shapes would reach ``final * lr`` at count == ``steps``.
    """
    peak = tune.lr if lr is None else lr
    warm = round(tune.warmup * steps)
    start = max(warm, round(tune.decay_from * steps)) if tune.schedule == "wsd" else warm
    shape = {
        "constant": jnp.ones_like,
        "linear": lambda p: 1 - (1 - tune.final) * p,
        "wsd": lambda p: 1 - (1 - tune.final) * p,
        "cosine": lambda p: tune.final + (1 - tune.final) * 0.5 * (1 + jnp.cos(jnp.pi * p)),
    }[tune.schedule]

    def value(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (count + 1) / max(warm, 1))
        return peak * rise * shape(jnp.clip((count - start) / max(steps - start, 1), 0.0, 1.0))

    return value


def optimizer(
    tune: Tune, steps: int, axes: Tree = None, lr: Any = None
) -> optax.GradientTransformation:
    """The update rule of ``tune`` for a run of ``steps`` updates, in float32 throughout.

    Args:
      axes: logical axis names per weight (``Model.axes``). They tell stacked norms ``[L, D]`` from
        matrices. Without them every leaf of rank 2 or more counts as a matrix to decay.
      lr: replaces ``tune.lr``; may be a traced scalar.

    Raises:
      UserError: muon without ``axes``.
    """
    rate = schedule(tune, steps, lr)
    decay = {"weight_decay": tune.weight_decay, "mask": _decayed(axes)}
    if tune.optimizer == "muon":
        rule = _muon(tune, rate, axes)
    elif tune.optimizer == "sgd":
        rule = optax.chain(
            optax.trace(tune.momentum),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    elif tune.optimizer == "adafactor":
        # Without scaling by the size of the weights, so that lr keeps the meaning it has in Adam.
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    else:
        rule = optax.adamw(rate, b1=tune.b1, b2=tune.b2, eps=tune.eps, **decay)
    rule = optax.chain(optax.clip_by_global_norm(tune.clip), rule) if tune.clip else rule
    names = MOMENTS[tune.moments]
    return in_float32(stored_in_bfloat16(rule, names) if names else rule)


def state_bytes(tx: optax.GradientTransformation, params: Params) -> int:
    """Bytes of the state that ``tx`` keeps for ``params`` (arrays or shapes)."""
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _muon(tune: Tune, rate: Callable[[Any], jax.Array], axes: Tree) -> optax.GradientTransformation:
    """Muon on hidden matrices (Jordan 2024, width-scaled), Nesterov Adam, undecayed, elsewhere."""
    if axes is None:
        raise UserError("optimizer muon needs the logical axes of the weights; pass model.axes")
    return optax.contrib.muon(
        rate,
        beta=tune.momentum,
        eps=tune.eps,
        weight_decay=tune.weight_decay,
        adam_b1=tune.b1,
        adam_b2=tune.b2,
        adam_learning_rate=lambda count: tune.adam_scale * rate(count),
        muon_weight_dimension_numbers=jax.tree.map(_matrix, axes, is_leaf=is_axes),
    )


# Axes along which a weight is a lookup or a read-out rather than a map between hidden states.
_EDGES = {None, "vocab", "classes", "position"}


def _matrix(names: tuple[str | None, ...] | None) -> Any:
    """Which axes a weight maps from and to, or None when it is not a hidden matrix.

    ``embed`` is one side, everything else the other; ``layers`` is neither, so that a stacked
    ``[L, in, out]`` is L separate matrices.
    """
    dims = [i for i, name in enumerate(names or ()) if name != "layers"]
    if len(dims) < 2 or _EDGES & {names[i] for i in dims}:  # type: ignore[index]
        return None
    split = 1 if names[dims[0]] == "embed" else len(dims) - 1  # type: ignore[index]
    return optax.contrib.MuonDimensionNumbers(tuple(dims[:split]), tuple(dims[split:]))


def _decayed(axes: Tree) -> Any:
    """The mask of weights that decay: rank 2 or more once the stacking axis is left out."""
    if axes is None:
        return lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)

    def decays(names: tuple[str | None, ...] | None) -> bool:
        return sum(name != "layers" for name in names or ()) >= 2

    return jax.tree.map(decays, axes, is_leaf=is_axes)


def _known(value: Any) -> bool:
    return isinstance(value, int | float)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")


def _range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    if _known(value) and not (low <= value <= high and math.isfinite(value)):
        bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{name} must be {bound}, got {value}")
