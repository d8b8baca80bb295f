"""A contender's end of the benchmark: wait for one's turn, work, answer with what it took."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Turn:
    """The two pipes to the harness; CPU seconds count every thread of this process."""

    def __init__(self, orders: int, answers: int) -> None:
        self.orders, self.answers = os.fdopen(orders), os.fdopen(answers, "w")
        self.wall = self.cpu = 0.0

    def ready(self, **info: Any) -> None:
        """All that is not timed is done; ``info`` (numbers, text) goes to the report."""
        held = {"rss": memory("VmRSS"), "peak": memory("VmHWM")}
        self._say({"setup_cpu": time.process_time()} | held | info)

    def wait(self) -> int | None:
        """Sleep until it is this side's turn: the number of steps to do, None at the end."""
        line = self.orders.readline().strip()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return int(line) if line else None

    def done(self, **values: Any) -> None:
        """The steps are done, devices included; ``units`` says what they processed."""
        took = {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}
        self._say(took | values | {"peak": memory("VmHWM")})

    def serve(self, block: Callable[[int], dict[str, Any] | None], **info: Any) -> None:
        """``ready``, then ``block(steps)`` at every turn."""
        self.ready(**info)
        while (steps := self.wait()) is not None:
            self.done(**(block(steps) or {}))

    def _say(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self.answers, flush=True)


def memory(name: str = "VmRSS") -> int:
    """Bytes of this process as the kernel counts them (VmRSS now, VmHWM the most so far)."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: list[str]) -> None:
    """``python -m benchmarks.turn module:function '{"option": 1}'``, started by the harness.

    A ``UserError`` ends as one line on stderr.
    """
    if cores := os.environ.get("BENCHMARK_CORES"):
        with contextlib.suppress(AttributeError):  # no such call on macOS
            os.sched_setaffinity(0, map(int, cores.split(",")))
    turn = Turn(int(os.environ["BENCHMARK_ORDERS"]), int(os.environ["BENCHMARK_ANSWERS"]))
    module, name = argv[0].split(":")
    getattr(importlib.import_module(module), name)(turn, **json.loads(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
