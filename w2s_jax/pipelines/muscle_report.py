"""What the rows of an update say: claims, figures and a summary.

A row is one model of one block and case in one seed: ``accuracy``, ``old_accuracy``, ``nfr``,
``pfr``, ``nfr_mc`` against the old version.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import figures as draw
from w2s_jax.metrics.rows import summarise
from w2s_jax.metrics.statistics import Interval, claim, interval
from w2s_jax.types import Row

BLOCKS = ("classes", "tokens")
CASES = ("same", "better")
PLAIN, AVERAGE, NEW = "plain", "average", "new"
OURS = ("student wrong", "student wrong + CE")  # the arms that the claims are about
MARGIN = 0.005  # of accuracy: what "no less accurate" allows
OVER = "mean over seeds, test, t interval"


def values(rows: list[Row], block: str, case: str, model: str, column: str) -> np.ndarray:
    """A column of one model [S], in the order of the seeds."""
    mine = [r for r in rows if (r["block"], r["case"], r["model"]) == (block, case, model)]
    return np.array([r[column] for r in sorted(mine, key=lambda r: r["seed"])], np.float64)


def relative(change: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Values [S] whose mean is the ratio of the means of ``change`` and ``base`` [S], linearised
    (delta method), so that an interval over seeds is the ordinary one."""
    ratio = change.mean() / base.mean()
    return ratio + (change - ratio * base) / base.mean()


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the paper reports, per block and case."""
    found = []
    for block in BLOCKS:
        cases = [case for case in CASES if len(values(rows, block, case, NEW, "nfr"))]
        for case in cases:
            found += _case(rows, block, case)
        if len(cases) == len(CASES):
            found += [_more_in_same(rows, block, arm) for arm in OURS]
    return found


def _case(rows: list[Row], block: str, case: str) -> list[dict[str, Any]]:
    of = partial(values, rows, block, case)

    def said(words: str, numbers: np.ndarray, **bound: Any) -> dict[str, Any]:
        return claim(f"{block}, {case}: {words}", OVER, interval(numbers), **bound)

    flips, accuracy = of(NEW, "nfr"), of(NEW, "accuracy")
    found = [said("new breaks right answers", flips, above=0.0)]
    gap = accuracy - of(NEW, "old_accuracy")
    if case == "same":
        found.append(said("new no less accurate than old", gap, above=-MARGIN))
    else:
        found.append(said("new more accurate than old", gap, above=0.0))
    for arm in OURS:
        change, gain = of(arm, "nfr") - flips, of(arm, "accuracy") - accuracy
        beside = of(arm, "nfr") - of(PLAIN, "nfr")
        found += [
            said(f"{arm} breaks fewer than new", change, below=0.0),
            said(f"{arm} no less accurate than new", gain, above=-MARGIN),
            said(f"{arm} breaks fewer than plain", beside, below=0.0),
        ]
    against = of(OURS[0], "accuracy") - of("always old", "accuracy")
    return [*found, said(f"{OURS[0]} no less accurate than always old", against, above=-MARGIN)]


def _more_in_same(rows: list[Row], block: str, arm: str) -> dict[str, Any]:
    """The relative reduction is larger where the versions are equally good."""
    cut = {}
    for case in CASES:
        base = values(rows, block, case, NEW, "nfr")
        change = base - values(rows, block, case, arm, "nfr")
        cut[case] = relative(change, base) if base.mean() > 0 else np.full(len(base), np.nan)
    difference = cut["same"] - cut["better"]
    nothing = Interval(np.nan, np.nan, np.nan, 0.95, len(difference))
    estimate = interval(difference) if np.isfinite(difference).all() else nothing
    words = f"{block}: {arm} cuts a larger share of the flips in case same than in better"
    return claim(words, "difference of shares, delta method, t interval", estimate, above=0.0)


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Flips per model, changes over the new version, and flips of scores."""
    paths = []
    for block in dict.fromkeys(row["block"] for row in rows):
        mine = [row for row in rows if row["block"] == block]
        look: Any = dict(ylabel="share of test items", title=f"Negative flips, block {block}")
        path = folder / f"{block}_flips.png"
        paths.append(draw.bars(mine, "model", "nfr", hue="case", path=path, **look))
        title = f"Over the new version, block {block} (always old left out)"
        look = dict(ylabel="compatible less new", title=title)
        path = folder / f"{block}_changes.png"
        moved = _changes(mine)
        paths.append(draw.bars(moved, "model", "change", hue="of", panel="case", path=path, **look))
        if block == "tokens":
            paths.append(_scores(mine, folder / "tokens_scores.png"))
    return paths


def _changes(rows: list[Row]) -> list[Row]:
    """Flips and accuracy of every model less those of the new version of the same seed; but for
    "always old", which becomes the old version: beside its losses nothing else is seen."""
    new = {(r["case"], r["seed"]): r for r in rows if r["model"] == NEW}
    kinds = {"nfr": "negative flips", "pfr": "positive flips", "accuracy": "accuracy"}
    return [
        dict(row, of=words, change=row[key] - new[row["case"], row["seed"]][key])
        for row in rows
        if row["model"] not in (NEW, "always old")
        for key, words in kinds.items()
    ]


def _scores(rows: list[Row], path: Path) -> Path:
    kinds = {"logp_nfr": "log-probability of the reference", "credit_nfr": "share of right steps"}
    some = [dict(row, score=words, falls=row[k]) for row in rows for k, words in kinds.items()]
    look: Any = dict(ylabel="share of items whose score falls", title="Flips of scores")
    return draw.bars(some, "model", "falls", hue="score", panel="case", path=path, **look)


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds per block, case and model, with the interval of the flips."""
    by = ["block", "case", "model"]
    table = summarise(rows, by, "nfr")
    for key in ("pfr", "nfr_mc", "accuracy", "old_accuracy"):
        for row, other in zip(table, summarise(rows, by, key), strict=True):
            row[key] = other[key]
    return [{k: v for k, v in row.items() if k not in ("coverage", "repeats")} for row in table]
