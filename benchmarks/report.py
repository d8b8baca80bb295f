"""What the contenders' blocks add up to: ratios block by block, a table, one JSON line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Result, Settings, cores
from w2s_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "trl")


def ratio(peer: Result, ours: Result, key: str = "cpu") -> dict[str, float] | None:
    """How many times less of ``key`` a unit costs us: median, min and max over the blocks."""
    pairs = zip(peer.rows, ours.rows, strict=False)
    values = [(a[key] / a["units"]) / (b[key] / b["units"]) for a, b in pairs if b[key] > 0]
    if not values:
        return None
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in spread.items()}


def disagreement(results: Sequence[Result], agree: Mapping[str, float]) -> str:
    """One line on the first figure of ``info`` in which two sides differ too much, or nothing."""
    for key, tolerance in agree.items():
        values = {r.side.name: r.info[key] for r in results if r.info.get(key) is not None}
        if not values:
            continue
        low, high = min(values.values()), max(values.values())
        finite = all(map(math.isfinite, values.values()))
        if not finite or high - low > tolerance * max(abs(low), abs(high)):
            shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            return f"the sides disagree in {key}: {shown}; no ratio means anything"
    return ""


def summary(result: Result, keys: Sequence[str]) -> dict[str, Any]:
    """A contender's figures: medians over its blocks per step and per unit, and its info."""
    if result.error:
        return {"failed": result.error}
    out: dict[str, Any] = {}
    for key in keys:
        values = [row[key] / row.get("steps", 1) for row in result.rows if key in row]
        if values:
            out[f"{key}_per_step"] = _figures(statistics.median(values))
            out[f"units_per_{key}"] = _figures(
                statistics.median(row["units"] / row[key] for row in result.rows if row.get(key))
            )
    peaks = [row["peak"] for row in result.rows if "peak" in row]
    out |= {"peak_mb": round(max(peaks) / 2**20)} if peaks else {}
    return out | {"blocks": len(result.rows), **{k: _figures(v) for k, v in result.info.items()}}


def report(
    name: str,
    results: Sequence[Result],
    settings: Settings,
    *,
    unit: str,
    ours: str = "ours",
    against: str = "",
    keys: Sequence[str] = ("cpu", "wall"),
    agree: Mapping[str, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Print the table and return what goes into the JSON line.

    Args:
      unit: what is counted, "pairs" or "tokens".
      ours: name of our side; every other side gets a ratio to it.
      against: the side whose ratio leads; default the first.
      keys: which figures of the rows to compare, the first leads; less is better.
      agree: largest relative difference between the sides per figure of ``ready``.

    Raises:
      UserError: sides disagree, or ours failed.
    """
    mine = next((r for r in results if r.side.name == ours), None)
    if mine is not None and mine.error:
        raise UserError(mine.error)
    if fault := disagreement(results, agree or {}):
        raise UserError(fault)
    peers = [r for r in results if r is not mine]
    sides = {r.side.name: summary(r, keys) for r in results}
    for result in peers:
        if mine is not None and not result.error:
            sides[result.side.name]["ratio"] = {key: ratio(result, mine, key) for key in keys}
    table(sides, unit, keys)
    lead = sides.get(against or (peers[0].side.name if peers else ""), {}).get("ratio", {})
    best = lead.get(keys[0]) or {}
    return {
        "benchmark": name,
        "ratio": best.get("median"),
        "spread": [best.get("min"), best.get("max")] if best else None,
        "of": f"{keys[0]} per {unit}",
        "against": against or (peers[0].side.name if peers else None),
        "sides": sides,
        **extra,
        **machine(settings),
    }


def several(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of several cases; the case with the smallest ratio leads."""
    known = {case: r for case, r in reports.items() if r["ratio"] is not None}
    worst = min(known, key=lambda case: known[case]["ratio"]) if known else next(iter(reports))
    lead = reports[worst]
    shared = {k: v for k, v in lead.items() if k not in ("sides", "ratio", "spread")}
    kept = ("ratio", "spread", "share", "first_mb", "sides")
    cases = {case: {k: r[k] for k in kept if k in r} for case, r in reports.items()}
    return shared | {k: lead[k] for k in ("ratio", "spread")} | {"case": worst, "cases": cases}


def table(sides: Mapping[str, Mapping[str, Any]], unit: str, keys: Sequence[str]) -> None:
    """The same for people."""
    for name, row in sides.items():
        if "failed" in row:
            print(f"{name:28} {row['failed']}")
            continue
        parts = [
            f"{row[f'{key}_per_step']:10.4g} {key}" for key in keys if f"{key}_per_step" in row
        ]
        parts += [f"{row[f'units_per_{keys[0]}']:10.4g} {unit} per {keys[0]}"] if parts else []
        for key, value in (row.get("ratio") or {}).items():
            if value:
                parts.append(
                    f"{key} x{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"
                )
        print(f"{name:28} " + "  ".join(parts))


def machine(settings: Settings) -> dict[str, Any]:
    """Versions, threads, cores, processor, load: what a figure depends on besides the code."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "threads": settings.threads,
        "cores": cores(settings.threads),
        "cpu": _cpu(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "quick": settings.quick or settings.tiny,
    }


def _cpu() -> str:
    values: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), value.strip())
    if "model name" not in values:
        return platform.processor() or platform.machine()
    family = f"family {values.get('cpu family')} model {values.get('model')}"
    return f"{values['model name']} ({family}), {os.cpu_count()} cores"


def _figures(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
