"""What goes on around the updates of a run: numbers fetched late, the NaN stop, saving, signals."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.train.checkpoint import Store
from w2s_jax.train.feed import Feed
from w2s_jax.train.log import Log, Meter, Progress
from w2s_jax.types import Batch, State, Tree

LATE = 2  # updates whose numbers are still on the device


class NotFinite(UserError):
    """The loss or a gradient became NaN or infinite; ``step`` and ``rows`` say where."""

    def __init__(self, message: str, step: int, rows: np.ndarray) -> None:
        super().__init__(message)
        self.step, self.rows = step, rows


class Interrupted(UserError):
    """SIGTERM or SIGINT arrived: the update in flight was finished and the state saved."""


@dataclass
class Watch:
    """Looks after a run of ``steps`` updates; each method is called once per update.

    Metrics are fetched two updates late, so that the host never makes the device wait, except
    where an evaluation or a checkpoint needs to know that all is well.
    """

    steps: int
    feed: Feed
    log: Log
    bar: Progress
    meter: Meter
    store: Store | None
    save_every: int
    evaluate: Callable[[State], Mapping[str, float]] | None
    eval_every: int
    pending: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    fetched: int = 0

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of update ``step``; log those that are old enough."""
        self.pending.append((step, metrics))
        self.flush(LATE)

    def flush(self, keep: int = 0) -> None:
        """Fetch and log what is pending, but for the newest ``keep``.

        Raises:
          NotFinite: a loss or gradient is NaN or infinite.
        """
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            norms = metrics.pop("norms")
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not np.isfinite([numbers["loss"], numbers["grad_norm"]]).all():
                raise self._broken(step, numbers, norms)
            self.log.write(step + 1, numbers)
            self.bar.update(step + 1, numbers)
            self._speed(step)

    def look(self, done: int, state: State) -> None:
        """Evaluate when ``done`` updates make it due."""
        if self.evaluate is not None and self._due(self.eval_every, done):
            self.flush()
            numbers = self.evaluate(state)
            if numbers:
                self.log.write(done, numbers)

    def save(self, done: int, state: State, now: bool = False) -> None:
        """Save when ``done`` updates make it due, or ``now``."""
        if self.store is not None and (
            now or done == self.steps or self._due(self.save_every, done)
        ):
            self.flush()
            self.log.sync()  # no checkpoint is newer than its rows
            self.store.save(state)

    def interrupted(self, name: str, done: int) -> Interrupted:
        """The error that ends a run stopped by the signal ``name``."""
        what = f"stopped by {name} after update {done} of {self.steps}"
        if self.store is None:
            return Interrupted(f"{what}; nothing was saved because there is no workdir")
        return Interrupted(
            f"{what}; saved in {self.store.folder}: run the same command again to resume"
        )

    def _due(self, every: int, done: int) -> bool:
        return bool(every) and (done % every == 0 or done == self.steps)

    def _speed(self, step: int) -> None:
        tokens = self.feed.tokens.pop(step)
        self.fetched += 1
        if self.fetched == 1:
            self.meter.read()  # the first update compiles
            return
        self.meter.add(tokens)
        if step + 1 == self.steps or time.perf_counter() - self.meter.since > 10:
            self.log.write(step + 1, self.meter.read(), "speed")

    def _broken(self, step: int, numbers: Mapping[str, float], norms: Tree) -> NotFinite:
        batch, rows, name = self.feed.rows(step)
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        told = [
            f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']} at update {step}",
            f"rows {shown}{' of ' * bool(name)}{name}",
            *_bad_columns(batch, rows),
            _bad_weights(norms),
        ]
        last = self.store and self.store.latest()
        told.append(f"checkpoint {last} is intact" if last else "no checkpoint was written yet")
        return NotFinite("; ".join(told), step, rows)


def _bad_columns(batch: Batch, rows: np.ndarray) -> list[str]:
    """Which columns of the batch are not finite themselves, and in which row first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.dtype.kind in "fV":
            fine = np.isfinite(leaf.astype(np.float32)).reshape(len(rows), -1).all(1)
            if not fine.all():
                found.append(f"column {_name(path)} is not finite in row {rows[~fine][0]}")
    return found


def _bad_weights(norms: Tree) -> str:
    """The first weight, with its index along the first (layer) axis, whose gradient is broken."""
    bad = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(norms):
        broken = np.flatnonzero(~np.isfinite(np.asarray(leaf)))
        if broken.size:
            bad.append(f"{_name(path)}[{broken[0]}]" if leaf.ndim else _name(path))
    if not bad:
        return "every gradient is finite"
    return f"first broken gradient: {bad[0]} ({len(bad)} of {len(jax.tree.leaves(norms))} weights)"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Signals:
    """Within it SIGTERM and SIGINT wait for the end of an update; a second one acts at once.

    With several processes JAX's preemption service makes all of them stop after the same update.
    """

    def __init__(self) -> None:
        self.caught, self.old = "", {}

    def __enter__(self) -> Signals:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self.old.items():
            signal.signal(number, old)

    def reached(self, step: int) -> str:
        """The name of the signal that arrived by update ``step``, or an empty string."""
        if jax.process_count() == 1:
            return self.caught
        from jax.experimental import multihost_utils

        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""

    def _catch(self, number: int, _: Any) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self.old[number])
