"""Figures from rows: each saves a PNG and a CSV of exactly what was drawn.

Rows are dicts, one measurement each; rows that share the drawn columns and differ in others (seeds)
are repetitions. Rows that lack a drawn column, or whose value is not finite, are left out (the CSV
counts what remains). Everything is drawn from the table that becomes the CSV. Only the object
interface of matplotlib: no pyplot, no global state.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.metrics.rows import Error, Record, is_number, pool_bins, summarise, usable
from w2s_jax.metrics.statistics import interval

# Okabe and Ito (2008): tell-apart colours for the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}
REFERENCES = ((0, (4, 3)), (0, (1, 2)), (0, (8, 3, 1, 3)))


class Look(TypedDict, total=False):
    """What every figure understands: words, scale and reference lines.

    ``title``; ``xlabel`` and ``ylabel`` (the column's name by default; write units in them);
    ``logx`` for sizes; ``ylim`` (low, high); ``references`` {label: y} dashed horizontal lines;
    ``diagonal`` the line y = x; ``height`` inches.
    """

    title: str
    xlabel: str
    ylabel: str
    logx: bool
    ylim: tuple[float | None, float | None]
    references: Mapping[str, float]
    diagonal: bool
    height: float


def lines(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    path: str | Path,
    hue: str | None = None,
    style: str | None = None,
    panel: str | None = None,
    error: Error | None = interval,
    **look: Unpack[Look],
) -> Path:
    """``y`` against ``x``, one line per ``hue`` (colour) and ``style`` (dashes), bands over seeds.

    Args:
      rows: measurements; see the module.
      x: column of the horizontal axis; words are placed in order of appearance.
      y: column of the vertical axis, numbers.
      path: the PNG; the CSV stands beside it. Folders are made.
      hue: column that gives the colour; numbers get a sequence of colours.
      style: column that gives dashes and markers.
      panel: column that gives one panel each, side by side with one vertical axis.
      error: repetitions -> Interval (``interval``: mean and t; ``median_interval``); None draws
        the mean alone. One repetition has no band.
      **look: see ``Look``.

    Returns:
      The path of the PNG.

    Raises:
      UserError: no row has the columns, or the files cannot be written.
    """
    table = summarise(rows, _names([panel, hue, style, x]), y, error)
    chart = _Chart(table, x, y, hue, style, panel, look)

    def draw(ax: Any, part: list[Record]) -> None:
        for group in chart.groups(part):
            group = [group[i] for i in np.argsort(chart.at(group), kind="stable")]
            at = chart.at(group)
            middle, low, high = (_numbers(group, name) for name in (y, "low", "high"))
            colour = chart.colour(group[0])
            every = max(1, len(group) // 12)
            ax.plot(at, middle, color=colour, markevery=every, **chart.shape(group[0]))
            ax.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
            if len(group) == 1:  # a band over one place has no width
                ax.errorbar(at, middle, _spread(middle, low, high), color=colour, capsize=3)

    return chart.save(path, draw)


def bars(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    path: str | Path,
    hue: str | None = None,
    panel: str | None = None,
    error: Error | None = interval,
    **look: Unpack[Look],
) -> Path:
    """A bar of ``y`` per ``x``, grouped by ``hue``, with intervals over seeds.

    Arguments, result and errors as ``lines``; ``x`` is always placed as words.
    """
    table = summarise(rows, _names([panel, hue, x]), y, error)
    chart = _Chart(table, x, y, hue, None, panel, look, words=True)
    hues = chart.levels(hue)
    width = 0.8 / max(len(hues), 1)

    def draw(ax: Any, part: list[Record]) -> None:
        for group in chart.groups(part):
            place = hues.index(group[0][hue]) - (len(hues) - 1) / 2 if hue else 0.0
            at = chart.at(group) + place * width
            middle, low, high = (_numbers(group, name) for name in (y, "low", "high"))
            ax.bar(at, middle, 0.92 * width, color=chart.colour(group[0]))
            spread = _spread(middle, low, high)
            ax.errorbar(at, middle, spread, fmt="none", ecolor="#333333", capsize=3, lw=1.2)
        ax.grid(False, axis="x")

    return chart.save(path, draw)


def scatter(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    path: str | Path,
    hue: str | None = None,
    style: str | None = None,
    panel: str | None = None,
    **look: Unpack[Look],
) -> Path:
    """One point per row: ``y`` against ``x``, coloured by ``hue``, marked by ``style``.

    Arguments, result and errors as ``lines``; ``diagonal=True`` adds the line y = x.
    """
    names = _names([panel, hue, style, x])
    table = [{**{n: row[n] for n in names}, y: float(row[y])} for row in usable(rows, names, y)]
    chart = _Chart(table, x, y, hue, style, panel, look, joined=False)

    def draw(ax: Any, part: list[Record]) -> None:
        for group in chart.groups(part):
            points = (chart.at(group), _numbers(group, y))
            ax.plot(*points, color=chart.colour(group[0]), alpha=0.8, **chart.shape(group[0]))

    return chart.save(path, draw)


def heatmap(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    value: str,
    *,
    path: str | Path,
    panel: str | None = None,
    label: str | None = None,
    **look: Unpack[Look],
) -> Path:
    """The mean of ``value`` as a colour over the grid of ``x`` and ``y``, both numbers.

    White is 0, and a black line is drawn where the value changes its sign. ``label`` names the
    colours (by default the column). Cells that no row speaks of stay empty. Other arguments,
    result and errors as ``lines``.
    """
    table = summarise(rows, _names([panel, x, y]), value, None)
    chart = _Chart(table, x, y, None, None, panel, look)
    across, up = chart.levels(x), chart.levels(y)
    most = max(abs(row[value]) for row in table) or 1.0

    def draw(ax: Any, part: list[Record]) -> None:
        cells = np.full((len(up), len(across)), np.nan)
        for row in part:
            cells[up.index(row[y]), across.index(row[x])] = row[value]
        colours = {"cmap": "RdBu", "vmin": -most, "vmax": most, "shading": "nearest"}
        mesh = ax.pcolormesh(across, up, cells, rasterized=True, **colours)
        if np.nanmin(cells) < 0 < np.nanmax(cells):
            ax.contour(across, up, cells, levels=[0.0], colors="#222222", linewidths=1.8)
        if part[-1] is table[-1]:  # one scale for all panels
            ax.figure.colorbar(mesh, ax=ax, label=label or _words(value))
        ax.grid(False)

    return chart.save(path, draw)


def reliability_diagram(
    rows: Iterable[Mapping[str, Any]],
    *,
    path: str | Path,
    hue: str | None = None,
    **look: Unpack[Look],
) -> Path:
    """Accuracy against confidence per bin, above the share of examples in each bin.

    Rows are those of ``metrics.classification.reliability`` (low, high, count, confidence,
    accuracy), with a ``hue`` column added; bins that occur several times (seeds) are pooled by
    count. Result and errors as ``lines``.
    """
    table = pool_bins(rows, hue)
    chart = _Chart(table, "confidence", "accuracy", hue, None, None, look)

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], **_reference(0))
        for group in chart.groups(table):
            colour = chart.colour(group[0])
            top.plot(chart.at(group), _numbers(group, "accuracy"), color=colour, marker="o")
            middle = (_numbers(group, "low") + _numbers(group, "high")) / 2
            bottom.plot(middle, _numbers(group, "share"), color=colour, drawstyle="steps-mid")
        least = min(row["low"] for row in table)
        bottom.set(xlim=(least, 1), ylim=(0, None), ylabel="share")
        bottom.set_xlabel(look.get("xlabel", "confidence"))
        top.set(ylim=look.get("ylim", (0, 1.02)), ylabel=look.get("ylabel", "accuracy"))
        top.set_title(look.get("title", ""))

    size = (6.2, look.get("height", 4.8))
    return _write(table, path, draw, chart.handles(["calibrated"]), size)


@dataclass(frozen=True)
class _Chart:
    """A table and which of its columns is what: colours, places, legend and axes follow."""

    table: list[Record]
    x: str
    y: str
    hue: str | None
    style: str | None
    panel: str | None
    look: Look
    words: bool = False
    joined: bool = True

    def levels(self, column: str | None) -> list[Any]:
        """Numbers in order; words as they first appear."""
        values = list(dict.fromkeys(row[column] for row in self.table)) if column else []
        return sorted(values) if all(is_number(v) for v in values) else values

    def groups(self, part: list[Record]) -> Iterator[list[Record]]:
        """The records of ``part`` that share colour and style."""
        found: dict[tuple, list[Record]] = {}
        for row in part:
            found.setdefault(tuple(row[c] for c in _names([self.hue, self.style])), []).append(row)
        yield from found.values()

    def colour(self, row: Record) -> Any:
        if not self.hue:
            return COLOURS[0]
        levels = self.levels(self.hue)
        place = levels.index(row[self.hue])
        if len(levels) <= len(COLOURS) and not all(is_number(v) for v in levels):
            return COLOURS[place]
        from matplotlib import colormaps

        return colormaps["viridis"](0.88 * place / max(len(levels) - 1, 1))

    def shape(self, row: Record) -> dict[str, Any]:
        """Dashes (of joined points) and marker."""
        place = self.levels(self.style).index(row[self.style]) if self.style else 0
        dash = DASHES[place % len(DASHES)] if self.joined else "none"
        return {"linestyle": dash, "marker": MARKERS[place % len(MARKERS)]}

    def categorical(self) -> bool:
        return self.words or not all(is_number(row[self.x]) for row in self.table)

    def at(self, part: list[Record]) -> np.ndarray:
        """Where the records stand on the horizontal axis."""
        if not self.categorical():
            return _numbers(part, self.x)
        places = self.levels(self.x)
        return np.array([places.index(row[self.x]) for row in part], float)

    def handles(self, dashed: Iterable[str]) -> list[Any]:
        """Legend entries: for colour and style a heading and the levels, then reference lines."""
        from matplotlib.lines import Line2D

        found = []
        for column in _names([self.hue, self.style]):
            found.append(Line2D([], [], linestyle="none", label=_words(column)))
            for value in self.levels(column):
                one = next(row for row in self.table if row[column] == value)
                colour = self.colour(one) if column == self.hue else "#444444"
                plain = {"linestyle": "-" if self.joined else "none", "marker": MARKERS[0]}
                if self.words:  # a bar
                    plain = {"linestyle": "none", "marker": "s", "markersize": 9}
                shape: dict[str, Any] = self.shape(one) if column == self.style else plain
                found.append(Line2D([], [], color=colour, label=f"  {_text(value)}", **shape))
        lines = [Line2D([], [], label=label, **_reference(i)) for i, label in enumerate(dashed)]
        return found + lines

    def save(self, path: str | Path, draw: Callable[[Any, list[Record]], None]) -> Path:
        """One panel per level of ``panel``, drawn from the table that becomes the CSV."""
        panels = self.levels(self.panel)
        references = self.look.get("references", {})

        def whole(figure: Any) -> None:
            axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
            for place, ax in enumerate(axes):
                part = self.table
                if self.panel:
                    part = [row for row in part if row[self.panel] == panels[place]]
                    ax.set_title(_text(panels[place]))
                draw(ax, part)
                self.dress(ax)
            axes[0].set_ylabel(self.look.get("ylabel", _words(self.y)))
            if title := self.look.get("title"):
                figure.suptitle(title, x=0.01, ha="left", fontsize=13)

        dashed = [*references, *(["y = x"] if self.look.get("diagonal") else [])]
        size = (2.2 + 3.4 * max(len(panels), 1), self.look.get("height", 3.8))
        return _write(self.table, path, whole, self.handles(dashed), size)

    def dress(self, ax: Any) -> None:
        """Scale, ticks, labels, reference lines."""
        references = self.look.get("references", {})
        for place, value in enumerate(references.values()):
            ax.axhline(value, zorder=1, **_reference(place))
        if self.look.get("diagonal"):
            ends = np.array([*ax.get_xlim(), *ax.get_ylim()])
            span = [ends.min(), ends.max()]
            ax.plot(span, span, zorder=1, scalex=False, scaley=False, **_reference(len(references)))
        values = self.levels(self.x)
        if self.categorical():
            ax.set_xticks(range(len(values)), [_text(v) for v in values])
            if len(values) * max(len(_text(v)) for v in values) > 40:
                steep = 30 if len(values) <= 11 else 45  # lines of text must not touch
                for label in ax.get_xticklabels():
                    label.set(rotation=steep, ha="right", rotation_mode="anchor")
        elif self.look.get("logx"):
            if values[0] <= 0:
                raise UserError(f"a logarithmic axis needs {self.x!r} > 0, got {values[0]}")
            ax.set_xscale("log")
            if len(values) <= 8:
                ax.set_xticks(values, [_short(v) for v in values], minor=False)
                ax.set_xticks([], minor=True)
        ax.set_xlabel(self.look.get("xlabel", _words(self.x)))
        if "ylim" in self.look:
            ax.set_ylim(*self.look["ylim"])


def _reference(place: int) -> dict[str, Any]:
    dash = REFERENCES[place % len(REFERENCES)]
    return {"color": "#777777", "linestyle": dash, "linewidth": 1.3}


def _names(columns: Iterable[str | None]) -> list[str]:
    return [name for name in dict.fromkeys(columns) if name]


def _numbers(rows: Iterable[Record], column: str) -> np.ndarray:
    return np.array([row[column] for row in rows], np.float64)


def _spread(middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of the error bars; never below zero, which rounding may give."""
    return np.maximum(np.stack([middle - low, high - middle]), 0.0)


def _words(column: str) -> str:
    return column.replace("_", " ")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    """1234567 -> 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _write(
    table: list[Record],
    path: str | Path,
    draw: Callable[[Any], None],
    legend: list[Any],
    size: tuple[float, float],
) -> Path:
    """Render to PNG, write the table beside it; each file appears whole or not at all."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path = path if path.suffix == ".png" else path.with_name(path.name + ".png")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if legend:
            figure.legend(handles=legend, loc="outside right upper")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".png.part")
            figure.savefig(part, format="png", dpi=160)
            os.replace(part, path)
            part = path.with_suffix(".csv.part")
            with open(part, "w", newline="", encoding="utf8") as file:
                writer = csv.DictWriter(file, list(table[0]))
                writer.writeheader()
                writer.writerows(table)
            os.replace(part, path.with_suffix(".csv"))
        except OSError as problem:
            raise UserError(f"cannot write the figure {path}: {problem}") from problem
    return path
