"""Weak-to-strong with linear probes on frozen features: thousands of runs, one program a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.models.heads import linear
from w2s_jax.objectives import classify
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import Population, one_of, population
from w2s_jax.types import Array, Table, forward


@dataclass(frozen=True)
class Setting:
    """One probe: the names of the features it sees, the labels it learns and its loss."""

    seed: int
    lr: float
    view: str
    label: str
    loss: str


def train(
    settings: Sequence[Setting],
    views: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    rows: np.ndarray,
    losses: Mapping[str, Callable[..., Array]],
    tune: Tune,
    *,
    points: int = 0,
    watch: np.ndarray | None = None,
) -> Population:
    """Linear probes with a bias, from zero, one per setting; narrow views are padded with zeros.

    Args:
      views: features [N,D] by name.
      labels: class probabilities by name, [N,C], or [S,N,C] where each seed has its own.
      rows: [S,n], the rows that each seed trains on; seeds count from 0.
      watch: features [N,D] on which ``curve`` names the classes [R, points, N] int16.

    Raises:
      UserError: a run that diverged.
    """
    width = max(view.shape[1] for view in views.values())
    wide = {n: np.pad(v, ((0, 0), (0, width - v.shape[1]))) for n, v in views.items()}
    tables: dict[tuple[str, str, int], Table] = {}
    for one in settings:
        label = labels[one.label]
        label = label if label.ndim == 2 else label[one.seed]
        columns = {"features": wide[one.view], "label": label}
        tables.setdefault((one.view, one.label, one.seed), Table(columns))
    model = linear(next(iter(labels.values())).shape[-1], width, bias=True)
    seeds, names = [one.seed for one in settings], list(losses)

    def look(params: Any, data: Any) -> Array:
        return forward(model, params, data).logits.argmax(-1).astype("int16")

    seen = {"probe": look, "data": {"features": watch}, "points": points} if points else {}
    done = population(
        lambda row: classify(model, one_of(list(losses.values()), row["loss"])),
        model.init(jax.random.key(0)),
        [tables[one.view, one.label, one.seed] for one in settings],
        tune,
        seeds,
        hyper={
            "lr": np.array([one.lr for one in settings], np.float32),
            "loss": np.array([names.index(one.loss) for one in settings], np.int32),
        },
        rows=rows[seeds],
        axes=model.axes,
        **seen,
    )
    if done.failed:
        first = settings[done.failed[0]]
        raise UserError(f"{len(done.failed)} probes diverged, the first {first}: lower lr")
    return done


def supervisors(
    views: Mapping[str, np.ndarray],
    truth: np.ndarray,
    rows: np.ndarray,
    dev: np.ndarray,
    lrs: Sequence[float],
    tune: Tune,
) -> dict[str, np.ndarray]:
    """A weak probe per view and seed, trained on the truth of ``rows``, heard on every row.

    Args:
      views: features [N,D] by name.
      truth: [N] classes.
      rows: [S,n] rows to train on.
      dev: [S,m] rows on which each view's learning rate is chosen.

    Returns:
      Class probabilities [S,N,C] float32 by name of the view.
    """
    labels = {"truth": one_hot(truth)}
    settings = [
        Setting(seed, lr, view, "truth", "naive")
        for view in views
        for seed in range(len(rows))
        for lr in lrs
    ]
    done = train(settings, views, labels, rows, {"naive": soft_xent}, tune)
    heard = {}
    for number, (name, view) in enumerate(views.items()):
        own = slice(number * len(rows) * len(lrs), (number + 1) * len(rows) * len(lrs))
        logits = view @ done.params["kernel"][own, : view.shape[1]]
        logits += done.params["bias"][own, None]
        logits = logits.reshape(len(rows), len(lrs), *logits.shape[1:])
        best = best_rate(logits.argmax(-1), truth, dev)
        heard[name] = np.asarray(jax.nn.softmax(logits[:, best]))
    return heard


def best_rate(classes: np.ndarray, truth: np.ndarray, dev: np.ndarray) -> int:
    """Which learning rate is right most often on dev, over all seeds.

    classes [S,R,N] named under R rates, truth [N], dev [S,m]; the first of one.
    """
    if classes.shape[1] == 1:
        return 0
    right = [classes[seed][:, rows] == truth[rows] for seed, rows in enumerate(dev)]
    return int(np.mean(right, axis=(0, 2)).argmax())


def best_of(marks: Iterable[tuple[Any, Any, float]]) -> dict[Any, Any]:
    """Of every group the setting with the highest mean mark, from (group, setting, mark); of equal
    ones the first."""
    found: dict[Any, dict[Any, list[float]]] = {}
    for group, setting, mark in marks:
        found.setdefault(group, {}).setdefault(setting, []).append(float(mark))
    means = {
        group: {one: float(np.mean(own)) for one, own in settings.items()}
        for group, settings in found.items()
    }
    return {group: max(own, key=own.__getitem__) for group, own in means.items()}


def check_choices(**lists: Sequence[float]) -> None:
    """Numbers to choose from, by the name of their flag.

    Raises:
      UserError: none, one that is not above 0, or one twice: its runs would pass for more seeds.
    """
    for name, numbers in lists.items():
        fit = all(0 < number < float("inf") for number in numbers)  # no NaN
        if not (numbers and fit and len(set(numbers)) == len(numbers)):
            given = " ".join(map(str, numbers))
            raise UserError(f"--{name} {given}: needs one entry at least, above 0, none twice")


def one_hot(truth: np.ndarray) -> np.ndarray:
    """Classes [N] as probabilities [N,C] float32."""
    return np.eye(int(truth.max()) + 1, dtype=np.float32)[truth]
