"""What the distillation zoo shows: its claims, figures and table, from its rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import figures as draw
from w2s_jax.metrics.rows import summarise
from w2s_jax.metrics.statistics import claim, interval
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


def _gap(words: str, first: np.ndarray, second: np.ndarray, what: str) -> list[dict[str, Any]]:
    """The claim that ``first - second`` is above 0, where both are there."""
    if len(first) != len(second) or not len(first):
        return []
    return [claim(words, f"{what}, mean over seeds, t interval", interval(first - second), above=0)]


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """What the literature on distillation leads one to expect."""
    if rows and rows[0]["block"] == "recipe":
        return []
    found = []
    tokens, pictures = _of(rows, block="tokens"), _of(rows, block="pictures")
    for student in dict.fromkeys(row["student"] for row in tokens):
        mine = _of(tokens, student=student)
        found += _token_claims(mine, student)
    return found + _picture_claims(pictures)


def _token_claims(rows: list[Row], student: str) -> list[dict[str, Any]]:
    def at(name: str, divergence: str, mode: str = "live") -> np.ndarray:
        return _column(rows, name, divergence=divergence, mode=mode)

    found = []
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


def _picture_claims(rows: list[Row]) -> list[dict[str, Any]]:
    found, accuracy = [], "test accuracy"
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
    """Both blocks at one look each, then what each part shows."""
    if rows and rows[0]["block"] == "recipe":
        return []
    tokens, pictures = _of(rows, block="tokens"), _of(rows, block="pictures")
    paths = []
    if tokens:
        trained = [row for row in tokens if row["divergence"] != "start"]
        bars = partial(draw.bars, trained, x="divergence", hue="mode", panel="student", height=5.0)
        paths += [
            bars(y="sampled", ylabel="sampled accuracy, test", path=folder / "tokens.png"),
            bars(y="entropy", ylabel="entropy, nats per token", path=folder / "entropy.png"),
            bars(y="exposure", ylabel="reverse KL, own minus given", path=folder / "exposure.png"),
        ]
        mode = "live" if _of(trained, mode="live") else trained[0]["mode"]
        live = _of(trained, mode=mode)
        dots = partial(draw.scatter, live, panel="student", hue="divergence")
        words: Any = dict(
            xlabel="KL(teacher, student), nats per token", ylabel="KL(student, teacher)"
        )
        paths.append(dots(x="forward", y="reverse", path=folder / "divergences.png", **words))
    part = partial(_of, pictures)
    looks: list[tuple[str, Any, dict[str, Any]]] = [
        ("losses", draw.bars, dict(x="divergence", hue="mode", panel="student", height=5.0)),
        ("counts", draw.lines, dict(x="count", hue="divergence", logx=True, xlabel="labels")),
        ("matches", draw.bars, dict(x="divergence", xlabel="matched beside distillation")),
        ("generations", draw.lines, dict(x="count", xlabel="generation")),
    ]
    for name, kind, how in looks:
        if mine := part(part=name):
            low = min(row["accuracy"] for row in mine)
            how |= {"ylim": (max(0.0, low - 0.05), None)} if kind is draw.bars else {}
            path = folder / f"pictures_{name}.png"
            paths.append(kind(mine, y="accuracy", ylabel="test accuracy", path=path, **how))
    return paths


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
