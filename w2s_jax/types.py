"""The six types everything else is made of: Table, Batch, Output, Model, State, Objective.

Letters: B batch, N examples, T tokens, V vocabulary, C classes, D width, H heads, K top-k or
key/value heads where said, L layers, S runs of a population.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError

Tree = Any
Params = Tree
Array = jax.Array
Batch = dict[str, Any]
Row = dict[str, Any]  # a line of results: text and numbers only

# The column dictionary: a closed list of what may reach a device. A value is (kind, dims after N);
# a nested dict is a sub-table. Adding a name is a reviewed change of docs/design.md.
COLUMNS: dict[str, Any] = {
    "tokens": ("int", "T"),  # token ids
    "mask": ("float", "T"),  # 1 where the loss (or the likelihood feature) counts
    "segment": ("int", "T"),  # document number in a packed row; 0 is padding
    "position": ("int", "T"),  # position within the document
    "label": ("float", "C"),  # class probabilities; hard labels are one-hot
    "truth": ("int", ""),  # evaluation only: never part of a Batch
    "weight": ("float", ""),  # weight of the example in the loss
    "score": ("float", ""),  # a scalar judgement of the example
    "group": ("int", ""),  # grouping (difficulty, domain, ...)
    "ref": ("float", ""),  # reference log-probability of the response, nats
    # the K most likely tokens of the teacher, their log-probabilities and what is left of its mass
    # (T counts the predictions of "targets" where the batch has them); a classifier's logits
    "teacher": {"ids": ("int", "TK"), "logits": ("float", "TK"), "tail": ("float", "T")}
    | {"classes": ("float", "C")},
    # a prompt to be answered within the step, padded on the left; segment 0 is padding
    "asked": dict.fromkeys(("tokens", "segment"), ("int", "P")),
    # stretches of text that two tokenizers share: which of S each of the T predictions belongs to
    # (-1: none), the teacher's log-probability of each, and its weight
    "spans": {"of": ("int", "T"), "teacher": ("float", "S"), "weight": ("float", "S")},
    "chosen": {"tokens": ("int", "T"), "mask": ("float", "T"), "ref": ("float", "")},
    "rejected": {"tokens": ("int", "T"), "mask": ("float", "T"), "ref": ("float", "")},
    # M predictions: which place predicts, what, its loss weight, and which response it belongs to
    "targets": dict.fromkeys(("at", "ids", "of"), ("int", "M")) | {"mask": ("float", "M")},
    # who attends to whom: R plain causal rows of L places each (-1: none), and for every token the
    # flat places r * L + l where it stands (-1: none); its output is read at the first
    "rows": {"take": ("int", "RL"), "back": ("int", "TO")},
    # P pairs packed in one row: weight 0 where there is none, reference of (chosen, rejected)
    "pairs": {"weight": ("float", "P"), "ref": ("float", "PS")},
    # on-policy training: for each of the M predictions its advantage and its log-probability under
    # the sampling policy and the reference; weight 0 for one of P responses that is left out
    "policy": {"weight": ("float", "P")}
    | dict.fromkeys(("advantage", "old", "ref"), ("float", "M")),
    "image": ("any", "HWC"),  # pixels
    "features": ("float", "D"),  # what a frozen body says of the example (probes)
}


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns over N examples; host data. Recipes are pure functions ``Table -> Table``.

    A column is a numpy array ``[N, ...]``, a nested dict of such, or anything with ``len`` and
    fancy indexing that returns numpy (an Arrow or ArrayRecord column: see ``data/table.py``).
    Names of the column dictionary are checked for kind and shape; every other name is host-only
    text or bookkeeping and never reaches a device.

    Raises:
      UserError: unequal lengths, or a dictionary column of the wrong kind or rank.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: _length(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"table columns have different lengths: {lengths}")
        for name, column in self.columns.items():
            if name in COLUMNS:
                _check(name, column, COLUMNS[name])

    def __len__(self) -> int:
        return _length(next(iter(self.columns.values()))) if self.columns else 0

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise UserError(f"no column {name!r}; the table has {sorted(self.columns)}")
        return self.columns[name]

    def take(self, index: Sequence[int] | np.ndarray) -> Table:
        """The rows of ``index`` in that order, in memory."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        return Table({name: _take(column, index) for name, column in self.columns.items()})

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Device data for the rows of ``index``: dictionary columns only, never ``truth``."""
        index = np.asarray(index, np.int64)
        return {
            name: _take(column, index)
            for name, column in self.columns.items()
            if name in COLUMNS and name != "truth"
        }

    def with_columns(self, **columns: Any) -> Table:
        """A table with these columns added or replaced."""
        return Table({**self.columns, **columns})

    def without(self, *names: str) -> Table:
        """A table lacking these columns."""
        return Table({k: v for k, v in self.columns.items() if k not in names})

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per example (nested columns stay nested)."""
        for i in range(len(self)):
            one = self.take([i])
            yield {name: jax.tree.map(lambda leaf: leaf[0], one[name]) for name in one.columns}

    def digest(self) -> str:
        """Content hash (hex): equal tables have equal digests, whatever stores them (but a column
        made when asked for is named by what it depends on)."""
        digest = hashlib.sha256()
        for name in sorted(self.columns):
            _hash(digest, name, self.columns[name], len(self))
        return digest.hexdigest()[:16]


def _length(column: Any) -> int:
    if isinstance(column, Mapping):
        lengths = {_length(leaf) for leaf in column.values()}
        if len(lengths) != 1:
            raise UserError(f"a nested column has leaves of different lengths: {sorted(lengths)}")
        return lengths.pop()
    return len(column)


def _take(column: Any, index: np.ndarray) -> Any:
    if isinstance(column, Mapping):
        return {name: _take(leaf, index) for name, leaf in column.items()}
    return np.asarray(column[index])


def _check(name: str, column: Any, want: Any) -> None:
    if isinstance(want, Mapping):
        if not isinstance(column, Mapping) or not set(column) <= set(want):
            raise UserError(f"column {name!r} must be a sub-table with keys among {sorted(want)}")
        for key, leaf in column.items():
            _check(f"{name}.{key}", leaf, want[key])
        return
    kind, dims = want
    dtype, ndim = getattr(column, "dtype", None), getattr(column, "ndim", None)
    if dtype is None or ndim is None:
        return  # a stored column: checked when it is read
    kinds = {"int": "iu", "float": "fV", "any": "iufV"}[kind]  # bfloat16 has numpy kind V
    if np.dtype(dtype).kind not in kinds or ndim != 1 + len(dims):
        raise UserError(
            f"column {name!r} must be {kind} with {1 + len(dims)} axes, got {dtype} with {ndim}"
        )


def _hash(digest: Any, name: str, column: Any, length: int) -> None:
    if isinstance(column, Mapping):
        for key in sorted(column):
            _hash(digest, f"{name}.{key}", column[key], length)
        return
    if own := getattr(column, "digest", None):  # made when asked for: it says what it depends on
        digest.update(f"{name}:{own()};".encode())
        return
    values = _take(column, np.arange(length))
    digest.update(f"{name}:{values.dtype}:{values.shape};".encode())
    if values.dtype == object:
        digest.update("\x1f".join(map(str, values.tolist())).encode())
    else:
        digest.update(np.ascontiguousarray(values).tobytes())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a model returns. Token models fill ``hidden`` and ``unembed``; classifiers ``logits``.

    ``hidden`` [B,T,D] is after the final norm; ``unembed`` [D,V] maps it to logits, so that
    ``[B,T,V]`` exists only where someone multiplies. ``logits`` [B,C] float32. ``cache`` is the
    key/value cache of a decoder, or None. ``vocab`` is the number of real tokens where the rows of
    the vocabulary are padded, else None. ``taps`` are intermediate features from shallow to deep,
    for matching: [B,H,W,C] of a convolutional stage, [B,T,D] of a block, [B,D] of a dense layer;
    then attention maps [B,H,T,T] where ``Config.maps`` asks for them.
    """

    hidden: Any = None
    unembed: Any = None
    logits: Any = None
    cache: Any = None
    vocab: int | None = field(default=None, metadata={"static": True})
    taps: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Model:
    """Two pure functions and the logical names of the weights. Equal only to itself (a cache key).

    ``init(key) -> Params``; ``apply(params, x, **columns) -> Output`` where ``x`` is the batch
    column ``reads[0]`` and the keywords are those of ``reads[1:]`` that the batch has (see
    ``forward``). ``axes`` mirrors the parameter tree with a tuple of logical axis names (or None)
    per leaf; ``mesh.RULES`` maps the names to mesh axes. ``config`` is the frozen config it was
    built from.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Output]
    axes: Tree
    config: Any
    reads: tuple[str, ...] = ("tokens", "segment", "position", "rows")


def forward(model: Model, params: Params, batch: Batch) -> Output:
    """Apply ``model`` to the columns it reads.

    Raises:
      UserError: the batch lacks the model's main input column.
    """
    first, *rest = model.reads
    if first not in batch:
        raise UserError(f"the model reads column {first!r}, the batch has {sorted(batch)}")
    return model.apply(params, batch[first], **{k: batch[k] for k in rest if k in batch})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything a training step reads and returns.

    ``step`` [] int32 counts updates done, ``steps`` [] int32 the updates planned (schedules read
    ``progress``). ``frozen`` (teacher, reference, LoRA base) is never updated and never saved;
    ``memory`` is what a method carries between steps (EMA, a running threshold).
    """

    step: Array
    steps: Array
    params: Params
    opt: Tree
    frozen: Tree = ()
    memory: Tree = ()

    @property
    def progress(self) -> Array:
        """Share of the run that is done, [] float32 in [0, 1)."""
        return self.step.astype("float32") / self.steps.astype("float32")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """What an objective returns besides its loss.

    ``metrics`` maps a name to ``(sum, weight)``, added over micro-batches and divided once;
    ``memory`` is the new ``State.memory``.
    """

    metrics: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    memory: Tree = ()


# (params, state, batch, key) -> (sum of the loss, its weight, Aux); `fit` divides once, globally.
Objective = Callable[[Params, State, Batch, Array], tuple[Array, Array, Aux]]
