"""Rows to summaries: repetitions (seeds) of a measurement become one record with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.metrics.statistics import Interval, interval

Record = dict[str, Any]
Error = Callable[[Sequence[float]], Interval]

SUMMARY = ("low", "high", "coverage", "repeats")


def is_number(value: Any) -> bool:
    """Whether a cell is a number (a bool is not)."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def usable(
    rows: Iterable[Mapping[str, Any]], by: Sequence[str], value: str
) -> list[Mapping[str, Any]]:
    """The rows that have every column of ``by`` and a finite number in ``value``.

    Raises:
      UserError: there is none.
    """
    rows = list(rows)
    found = [r for r in rows if all(k in r for k in [*by, value]) and is_number(r[value])]
    found = [r for r in found if math.isfinite(r[value])]
    if not found:
        have = sorted({key for row in rows for key in row})
        raise UserError(
            f"no row has {[*by, value]} with a finite {value!r}; {len(rows)} rows have {have}"
        )
    return found


def summarise(
    rows: Iterable[Mapping[str, Any]],
    by: Sequence[str],
    value: str,
    error: Error | None = interval,
) -> list[Record]:
    """One record per setting of the columns ``by``: the value, its interval, the repetitions.

    Args:
      rows: measurements; rows equal in ``by`` are repetitions. Rows that lack a column or whose
        value is not finite are left out.
      by: columns that make a setting, in the order of the records' columns.
      value: the measured column.
      error: repetitions -> Interval (``interval``, ``median_interval``); None gives the mean.

    Returns:
      Records with the columns ``by``, ``value``, low, high, coverage (the interval's level) and
      repeats, in order of first appearance. Bounds of one repetition are NaN.

    Raises:
      UserError: no usable row, a column already named like one of the record's own, or one
        ``seed`` twice in a setting: an interval would take two settings for repetitions.
    """
    if taken := set(SUMMARY) & {*by, value}:
        raise UserError(f"rename the column {min(taken)!r}: the summary needs that name")
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in usable(rows, by, value):
        groups.setdefault(tuple(row[n] for n in by), []).append(row)
    table = []
    for key, same in groups.items():
        seeds = [row["seed"] for row in same if "seed" in row]
        if error and len(set(seeds)) < len(seeds):
            setting = dict(zip(by, key, strict=True))
            raise UserError(
                f"{setting} of {value!r} holds a seed twice: tell the settings apart by one more "
                "column, keep fewer rows, or take the mean (error=None)"
            )
        values = [float(row[value]) for row in same]
        alone = Interval(float(np.mean(values)), math.nan, math.nan, math.nan, len(values))
        found = error(values) if error else alone
        spread = (found.low, found.high, found.level, len(values))
        table.append(
            {
                **dict(zip(by, key, strict=True)),
                value: found.value,
                **dict(zip(SUMMARY, spread, strict=True)),
            }
        )
    return table


def where(rows: Iterable[Record], **wanted: Any) -> list[Record]:
    """The rows with these values, as ``where(rows, block="score")``; none that lacks a column."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def values(rows: Iterable[Record], column: str, **wanted: Any) -> np.ndarray:
    """A column of one setting, [S] float64 in the order of the seeds, for paired differences."""
    found = sorted(where(rows, **wanted), key=lambda row: row["seed"])
    return np.array([row[column] for row in found], np.float64)


def overview(
    rows: Iterable[Mapping[str, Any]], by: Sequence[str], value: str, means: Sequence[str] = ()
) -> list[Record]:
    """``summarise`` for a reader: ``by``, ``value``, low, high, and the means of more columns.

    "" stands where a setting has none of a column. Raises as ``summarise``.
    """
    rows = list(rows)
    more: dict[str, dict[tuple, float]] = {}
    for name in means:
        table = summarise(rows, by, name, None)
        more[name] = {tuple(row[key] for key in by): row[name] for row in table}
    return [
        {name: row[name] for name in (*by, value, "low", "high")}
        | {name: found.get(tuple(row[key] for key in by), "") for name, found in more.items()}
        for row in summarise(rows, by, value)
    ]


def pool_bins(rows: Iterable[Mapping[str, Any]], hue: str | None = None) -> list[Record]:
    """Reliability rows of several seeds as one table per ``hue``, bins weighed by their counts.

    Rows are those of ``metrics.classification.reliability`` with the column ``hue`` added; a
    record has hue, low, high, confidence, accuracy, count and share (of the examples).

    Raises:
      UserError: no row has these columns.
    """
    by = [*([hue] if hue else []), "low", "high"]
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in usable(rows, [*by, "count", "confidence"], "accuracy"):
        groups.setdefault(tuple(row[n] for n in by), []).append(row)
    total: dict[tuple, int] = {}
    for key, same in groups.items():
        total[key[:-2]] = total.get(key[:-2], 0) + sum(row["count"] for row in same)
    table = []
    for key, same in sorted(groups.items(), key=lambda item: item[0][-2]):
        weights = [row["count"] for row in same]
        record = dict(zip(by, key, strict=True))
        for name in ("confidence", "accuracy"):
            record[name] = float(np.average([row[name] for row in same], weights=weights))
        record["count"] = int(sum(weights))
        table.append({**record, "share": record["count"] / total[key[:-2]]})
    return table
