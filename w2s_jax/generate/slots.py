"""Continuous batching: a fixed number of slots, refilled with new prompts as rows end.

The host looks every few tokens: it takes what was drawn, hands free slots to rows that wait and
makes room in the cache. What a row receives depends on the key, its number and its prompt alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.generate.decode import Drawn, Lanes, Programs, Who, bucket
from w2s_jax.types import Array, Params

READ = 16384  # prompt tokens, padding included, that are read at once


@dataclass
class Row:
    """One continuation: ``ids``, their ``logps`` (nats), and whether it has "stop"ped or reached
    the allowed "length"; "" while it goes on."""

    prompt: int
    sample: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: str = ""


@dataclass
class _Read:
    """Prompts that were read together, and the (row, place among them) that still wait."""

    lanes: Lanes
    length: int
    waiting: deque[tuple[Row, int]]


@dataclass(frozen=True)
class Task:
    """What to continue, and how; ``most`` is the longest a prompt may be, ``over`` says whether a
    row's ids so far hold the end that its text should have."""

    prompts: Sequence[Sequence[int]]
    samples: int
    tokens: int
    stop: tuple[int, ...]
    numbers: dict[str, Array]
    most: int
    slots: int
    every: int
    over: Callable[[list[int]], bool] | None = None


def run(task: Task, run: Programs, params: Params, key: Array) -> list[list[Row]]:
    """All samples of all prompts.

    Raises:
      UserError: a row whose logits are not finite.
    """
    rows = [[Row(i, j) for j in range(task.samples)] for i in range(len(task.prompts))]
    slots = _Slots(task, run, params, key, rows)
    while slots.fill():
        slots.advance()
    return rows


class _Slots:
    """The rows in the slots, the cache on the device, and the prompts that wait."""

    def __init__(
        self, task: Task, run: Programs, params: Params, key: Array, rows: list[list[Row]]
    ) -> None:
        self.task, self.run, self.params, self.key = task, run, params, key
        self.rows = rows
        # Longest first: memory is short at once or never, and caches only get smaller
        self.order = deque(sorted(range(len(rows)), key=lambda i: -len(task.prompts[i])))
        self.size = min(task.slots, len(rows) * task.samples)
        self.here: list[Row | None] = [None] * self.size
        self.read: _Read | None = None
        self.lanes: Lanes | None = None
        self.index = self.length = 0  # where the cache stands, and its slots
        self.stop = np.array(task.stop or (-1,), np.int32)

    def fill(self) -> bool:
        """Give free slots to rows that wait; False when nothing is left to do."""
        while free := [slot for slot, row in enumerate(self.here) if row is None]:
            if self.read is None or not self.read.waiting:
                if not self.order:
                    break
                self.read = self._read()
            self._enter(self.read, free)
        if not self.order and not (self.read and self.read.waiting):
            self._shrink()
        return any(self.here)

    def _read(self) -> _Read:
        """Read the next prompts, as many as there are slots or as fit."""
        prompts = self.task.prompts
        length = bucket(len(prompts[self.order[0]]), self.task.most)
        width = max(1, min(self.size, len(self.rows), READ // length))
        taken = [self.order.popleft() for _ in range(min(width, len(self.order)))]
        ids, segment = (np.zeros((width, length), np.int32) for _ in range(2))
        for place in range(width):
            prompt = prompts[taken[min(place, len(taken) - 1)]]
            ids[place, length - len(prompt) :], segment[place, length - len(prompt) :] = prompt, 1
        waiting = deque((row, place) for place, i in enumerate(taken) for row in self.rows[i])
        return _Read(self.run.begin(self.params, ids, segment), length, waiting)

    def _enter(self, read: _Read, free: list[int]) -> None:
        source = np.full(len(self.here), -1, np.int32)
        if self.lanes is None:
            self.index = read.length
            self.length = bucket(self.index + self._steps(2))
            self.lanes = self.run.empty(
                len(self.here), self.length, np.int32(self.index), read.lanes.hidden
            )
        elif self.index < read.length:
            self._move(max(self._longest(), read.length))
        for slot in free[: len(read.waiting)]:
            self.here[slot], source[slot] = read.waiting.popleft()
        self.lanes = self.run.enter(self.lanes, read.lanes, source)

    def _shrink(self) -> None:
        """Few rows left and none waiting: go on with a quarter of the slots."""
        alive = [slot for slot, row in enumerate(self.here) if row is not None]
        size = len(self.here) // 4
        if not alive or len(alive) > size:
            return
        dead = [slot for slot, row in enumerate(self.here) if row is None]
        self._move(self._longest(), [*alive, *dead][:size])
        self.here = [self.here[slot] for slot in [*alive, *dead][:size]]

    def _longest(self) -> int:
        prompts = self.task.prompts
        return max((len(prompts[r.prompt]) + len(r.ids) for r in self.here if r), default=0)

    def _steps(self, looks: int = 1) -> int:
        """Steps of so many looks of the host, or fewer where every row must have ended by then."""
        least = min((len(row.ids) for row in self.here if row), default=0)
        return min(self.task.every * looks, self.task.tokens - least)

    def _move(self, index: int, slots: Sequence[int] | None = None) -> None:
        """Make room for two looks: the cache then stands at ``index`` and has these slots."""
        assert self.lanes is not None
        self.index, self.length = index, bucket(index + self._steps(2))
        rows = None if slots is None else np.array(slots, np.int32)
        self.lanes = self.run.move(self.lanes, rows, np.int32(index), self.length)

    def advance(self) -> None:
        """Draw some tokens for all rows and take note of them."""
        steps = self._steps()
        if self.index + steps > self.length:
            self._move(self._longest())
        waits = bool(self.order or (self.read and self.read.waiting))
        limits = dict(
            steps=steps,
            tokens=self.task.tokens,
            enough=max(1, len(self.here) // 8) if waits else len(self.here),
        )
        here = [row or Row(0, 0) for row in self.here]
        who = Who(
            row=np.array([row.prompt for row in here], np.int32),
            sample=np.array([row.sample for row in here], np.int32),
            count=np.array([len(row.ids) for row in here], np.int32),
            alive=np.array([row is not None for row in self.here]),
        )
        self.lanes, drawn = self.run.advance(
            self.params,
            self.lanes,
            who,
            self.key,
            self.task.numbers,
            self.stop,
            {name: np.int32(limit) for name, limit in limits.items()},
        )
        drawn = jax.device_get(drawn)
        self.index += int(drawn.ran)
        self._take(drawn)

    def _take(self, drawn: Drawn) -> None:
        for slot, row in enumerate(self.here):
            if row is None:
                continue
            new = int(drawn.count[slot]) - len(row.ids)
            row.ids += drawn.ids[slot, :new].tolist()
            row.logps += drawn.logps[slot, :new].tolist()
            if drawn.faulty[slot]:
                raise UserError(
                    f"sample: prompt {row.prompt} (sample {row.sample}): the model's logits are "
                    f"not finite after {len(row.ids)} tokens; look for faults in the weights, or "
                    "compute in float32"
                )
            if drawn.stopped[slot] or (self.task.over and self.task.over(row.ids)):
                row.finish = "stop"
            elif len(row.ids) == self.task.tokens:
                row.finish = "length"
            if row.finish:
                self.here[slot] = None
