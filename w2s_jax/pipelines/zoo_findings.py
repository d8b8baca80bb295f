"""What the distillation zoo shows: its claims, figures and table, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from w2s_jax import figures as draw
from w2s_jax.metrics.rows import summarise
from w2s_jax.metrics.statistics import Interval, claim, holm, interval
from w2s_jax.pipelines.zoo_pictures import MATCHES
from w2s_jax.types import Row


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The chosen rows with these values."""
    return [
        row for row in rows
        if row.get("chosen", 1) and all(row.get(name) == value for name, value in wanted.items())
    ]  # fmt: skip


def _column(rows: list[Row], name: str, **wanted: Any) -> np.ndarray:
    """Values of one setting in the order of the seeds."""
    found = sorted(_of(rows, **wanted), key=lambda row: row["seed"])
    return np.array([row[name] for row in found], float)


class Gap(NamedTuple):
    """The claim in words that ``of`` (paired differences, one per seed) of ``what`` is above 0."""

    words: str
    what: str
    of: Interval


def _gap(words: str, first: np.ndarray, second: np.ndarray, what: str) -> list[Gap]:
    """The claim that ``first - second`` is above 0, where both are there."""
    if len(first) != len(second) or not len(first):
        return []
    return [Gap(words, what, interval(first - second))]


def _chance(gap: Interval) -> float:
    """One-sided p-value of the t test whose interval this is; 1 for a single seed."""
    if gap.n == 1:
        return 1.0
    error = (gap.high - gap.value) / stats.t.ppf((1 + gap.level) / 2, gap.n - 1)
    if not error:
        return float(gap.value <= 0)
    return float(stats.t.sf(gap.value / error, gap.n - 1))


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the literature on distillation leads one to expect.

    Each verdict is that of its own interval. Some of so many would hold by chance: ``statistic``
    ends with Holm's p, which answers for all of them together.
    """
    if rows and rows[0]["block"] == "recipe":
        return []
    found: list[Gap] = []
    tokens, pictures = _of(rows, block="tokens"), _of(rows, block="pictures")
    for student in dict.fromkeys(row["student"] for row in tokens):
        mine = _of(tokens, student=student)
        found += _token_claims(mine, student)
    found += _picture_claims(pictures)
    together = holm([_chance(one.of) for one in found])
    words = "{}, mean over seeds, t interval; Holm p {:.2g} of " + str(len(found))
    return [
        claim(one.words, words.format(one.what, p), one.of, above=0)
        for one, p in zip(found, together, strict=True)
    ]


def _token_claims(rows: list[Row], student: str) -> list[Gap]:
    def at(name: str, divergence: str, mode: str = "live") -> np.ndarray:
        return _column(rows, name, divergence=divergence, mode=mode)

    found: list[Gap] = []
    entropy, stray = "entropy, nats per token", "mass on tokens the teacher finds unlikely"
    pairs = (("forward_kl", "reverse_kl"), ("forward_kl", "jsd"), ("jsd", "reverse_kl"))
    for wide, narrow in pairs:
        words = f"{student}: {narrow} seeks modes more than {wide}"
        found += _gap(words, at("entropy", wide), at("entropy", narrow), entropy)
    words = f"{student}: reverse_kl strays less than forward_kl"
    found += _gap(words, at("stray", "forward_kl"), at("stray", "reverse_kl"), stray)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        words = f"{student}: {name} samples better than sft on the same rows"
        found += _gap(words, at("sampled", name), at("sampled", "sft"), "sampled accuracy")
    drift = "reverse KL on own answers minus on given ones, nats per token"
    for name in ("forward_kl", "reverse_kl", "jsd"):
        words = f"{student}: {name} on own answers narrows the exposure gap"
        found += _gap(words, at("exposure", name), at("exposure", name, "on-policy"), drift)
    words = f"{student}: on own answers jsd samples better than on given ones"
    found += _gap(words, at("sampled", "jsd", "on-policy"), at("sampled", "jsd"), "accuracy")
    rough, kept = (at("forward", n, "stored") for n in ("renormalised", "forward_kl"))
    words = f"{student}: the rest of the mass as one event beats renormalising what is stored"
    return found + _gap(words, rough, kept, "held-out KL(teacher, student), nats per token")


def _picture_claims(rows: list[Row]) -> list[Gap]:
    accuracy = "test accuracy"
    found: list[Gap] = []
    part = _of(rows, part="losses")
    for student in dict.fromkeys(row["student"] for row in part):
        for mode in ("stored", "live"):
            mine = _of(part, student=student, mode=mode)
            ce = _column(mine, "accuracy", divergence="ce")
            for name in ("kd T=2", "kd T=4"):
                words = f"{student}, {mode}: {name} above labels alone"
                kd = _column(mine, "accuracy", divergence=name)
                found += _gap(words, kd, ce, accuracy)
    part = _of(rows, part="counts")
    sizes = sorted({row["count"] for row in part})
    if len(sizes) > 1:
        few, many = (
            _column(part, "accuracy", count=size, divergence="kd T=4")
            - _column(part, "accuracy", count=size, divergence="ce")
            for size in (sizes[0], sizes[-1])
        )
        words = f"distillation gains more with {sizes[0]} labels than with {sizes[-1]}"
        found += _gap(words, few, many, accuracy)
    part = _of(rows, part="matches")
    none = _column(part, "accuracy", divergence="none")
    for name in MATCHES:
        words = f"{name} matched beside distillation beats distillation"
        found += _gap(words, _column(part, "accuracy", divergence=name), none, accuracy)
    part = _of(rows, part="generations")
    ages = [_column(part, "accuracy", count=age) for age in (0, 1)]
    return found + _gap("a born-again student beats its parent", ages[1], ages[0], accuracy)


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Both blocks at one look per student, then what each part shows."""
    if rows and rows[0]["block"] == "recipe":
        return []
    tokens, pictures = _of(rows, block="tokens"), _of(rows, block="pictures")
    trained = [row for row in tokens if row["divergence"] != "start"]
    paths = []
    for student in dict.fromkeys(row["student"] for row in trained):
        paths += _token_figures(_of(trained, student=student), folder, student)
    losses = _of(pictures, part="losses")
    for student in dict.fromkeys(row["student"] for row in losses):
        mine = _of(losses, student=student)
        path = folder / f"pictures_{student}.png"
        how: Any = dict(x="divergence", hue="mode", title=f"{student}, test accuracy", height=4.4)
        paths.append(_bars(mine, "accuracy", path, ylabel="accuracy", **how))
    lines: Any = partial(draw.lines, y="accuracy", ylabel="test accuracy")
    if mine := _of(pictures, part="counts"):
        how: Any = dict(x="count", hue="divergence", logx=True, xlabel="labels")
        paths.append(lines(mine, path=folder / "pictures_counts.png", **how))
    if mine := _of(pictures, part="matches"):
        path = folder / "pictures_matches.png"
        words: Any = dict(xlabel="matched beside distillation", ylabel="test accuracy")
        paths.append(_bars(mine, "accuracy", path, x="divergence", **words))
    if mine := _of(pictures, part="generations"):
        path = folder / "pictures_generations.png"
        paths.append(lines(mine, x="count", xlabel="generation", path=path))
    return paths


def _bars(rows: list[Row], y: str, path: Path, **how: Any) -> Path:
    """Bars that begin just below the lowest value."""
    values = [float(row[y]) for row in rows]
    low = min(values) - 0.15 * (max(values) - min(values))
    return draw.bars(rows, y=y, path=path, ylim=(max(low, 0.0), None), **how)


def _token_figures(rows: list[Row], folder: Path, student: str) -> list[Path]:
    bars: Any = partial(_bars, x="divergence", hue="mode", height=4.4)
    mode = "live" if _of(rows, mode="live") else rows[0]["mode"]
    words: Any = dict(xlabel="KL(teacher, student), nats", ylabel="KL(student, teacher)")
    dots: Any = partial(draw.scatter, x="forward", y="reverse", hue="divergence", **words)
    path = folder / f"divergences_{student}.png"
    return [
        bars(rows, "sampled", folder / f"tokens_{student}.png", ylabel="sampled accuracy, test"),
        bars(rows, "entropy", folder / f"entropy_{student}.png", ylabel="entropy, nats per token"),
        draw.bars(
            rows, x="divergence", y="exposure", hue="mode", height=4.4,
            ylabel="reverse KL, own minus given", path=folder / f"exposure_{student}.png",
        ),
        dots(_of(rows, mode=mode), path=path, title=f"{student}, {mode}"),
    ]  # fmt: skip


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds with intervals, the learning rates that dev chose."""
    if rows and rows[0]["block"] == "recipe":
        names = ("training", "mode", "divergence", "forward", "reverse", "nll", "own_reverse")
        return [{name: row.get(name, "") for name in names} for row in rows]
    table = []
    for block, score in (("tokens", "sampled"), ("pictures", "accuracy")):
        mine = [{"part": "", "count": "", "mode": ""} | row for row in _of(rows, block=block)]
        by = ["part", "student", "mode", "count", "divergence"]
        for row in summarise(mine, by, score) if mine else []:
            labels = {name: row.get(name, "") for name in by}
            numbers = {"score": row[score], "low": row["low"], "high": row["high"]}
            table.append({"block": block, **labels, **numbers})
    return table
