"""What a compiled step sends between devices, read from its HLO text; loops count every turn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}  # others carry theirs in their name

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_OP = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCH = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_BOUND = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"compare\((.*?)\), direction=LT")


@dataclass(frozen=True)
class Traffic:
    """Transfers of one kind in one execution: how many, and the bytes of their results on one
    device."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclass
class _Computation:
    lines: list[str] = field(default_factory=list)

    def transfers(self) -> Iterator[tuple[str, str, int]]:
        """(kind, channel, bytes) of each transfer that this computation itself starts."""
        for line in self.lines:
            if found := _OP.search(line):
                result, kind, start = found.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                yield kind, channel[1] if channel else line, _bytes(result, kind, bool(start))


def traffic(text: str) -> dict[str, Traffic]:
    """Transfers by kind in one run of the program whose HLO text this is.

    A loop's body counts as often as the loop turns (once where the text does not say how often).
    What the compiler cut into overlapping pieces (one channel, several fusions) counts once.
    """
    parts, entry = _computations(text)
    done: dict[str, dict[str, dict[str, Traffic]]] = {}

    def visit(name: str) -> dict[str, dict[str, Traffic]]:
        """kind -> channel -> traffic of one execution of a computation and all that it calls."""
        if name in done or name not in parts:
            return done.get(name, {})
        found: dict[str, dict[str, Traffic]] = {}
        done[name] = found  # HLO has no recursion
        for kind, channel, size in parts[name].transfers():
            found.setdefault(kind, {})[channel] = Traffic(1, size)
        for called, turns in _calls(parts, name):
            for kind, channels in visit(called).items():
                mine = found.setdefault(kind, {})
                for channel, one in channels.items():
                    mine[channel] = Traffic(one.count * turns, one.bytes * turns)
        return found

    total = visit(entry)
    sums = {kind: sum(total.get(kind, {}).values(), Traffic()) for kind in KINDS}
    return {kind: one for kind, one in sums.items() if one.count}


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    parts: dict[str, _Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and (header := _HEADER.match(line)):
            name = header[2]
            parts[name] = _Computation()
            entry = name if header[1] else entry
        elif name:
            parts[name].lines.append(line)
    return parts, entry


def _calls(parts: dict[str, _Computation], name: str) -> Iterator[tuple[str, int]]:
    """The computations that ``name`` runs, and how often one execution of it runs each."""
    for line in parts[name].lines:
        if loop := _LOOP.search(line):
            yield loop[2], _turns(line, parts.get(loop[1]))
        elif " while(" not in line:
            for called in _CALLED.findall(line) + _BRANCH.findall(line):
                yield called, 1
            for group in _BRANCHES.findall(line):
                for called in group.split(","):
                    yield called.strip().lstrip("%"), 1


def _turns(line: str, condition: _Computation | None) -> int:
    """How often a loop turns: as annotated, else the constant its counter is compared with."""
    if known := _TURNS.search(line):
        return int(known[1])
    body = "\n".join(condition.lines) if condition else ""
    bounds, less = dict(_BOUND.findall(body)), _LESS.search(body)
    if less:
        for operand in less[1].split(","):
            if operand.strip().split(" ")[-1].lstrip("%") in bounds:
                return int(bounds[operand.strip().split(" ")[-1].lstrip("%")])
    return 1


def _bytes(result: str, kind: str, start: bool) -> int:
    """Bytes of an operation's result; of a started one, of what it will give."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(result)
    ]
    if start and kind != "all-reduce" and len(sizes) > 1:
        return sizes[1]  # (operand, result, contexts)
    return sum(sizes)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return BITS.get(dtype) or (int(digits[0]) if digits else 0)
