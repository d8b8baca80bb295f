"""Contenders in processes of their own, pinned alike, woken in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2s_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# Keeps big buffers mapped between steps and backs them with huge pages: a torch process on a CPU
# otherwise spends much of a step in page faults.
TUNED = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=8589934592",
        "glibc.malloc.trim_threshold=17179869184",
    ]
)


@dataclass(frozen=True)
class Settings:
    """What the command line says; every benchmark gets it."""

    threads: int = 1
    """Cores and threads of every contender."""
    blocks: int = 0
    """Turns of every contender; 0 takes 5, or 2 with --quick."""
    vocab: int = 32_000
    """Vocabulary of the model, where the benchmark trains one."""
    quick: bool = False
    """Fewer and smaller blocks: a look, not a measurement."""
    tiny: bool = False
    """Toy sizes that show only that it runs."""
    sides: str = ""
    """Comma-separated beginnings of the names of the contenders to run; all if not given."""

    def size(self, full: Any, *, quick: Any = None, tiny: Any = None) -> Any:
        """One of three sizes, by ``tiny`` and ``quick``."""
        if self.tiny and tiny is not None:
            return tiny
        return quick if (self.quick or self.tiny) and quick is not None else full

    @property
    def turns(self) -> int:
        """Blocks of every contender."""
        return self.blocks or (1 if self.tiny else 2 if self.quick else 5)


@dataclass(frozen=True)
class Side:
    """A contender: ``call`` is ``module:function`` of ``(turn, **options)``.

    ``needs`` are packages without which it cannot run, ``tuned`` gives it glibc's allocator in the
    setting that suits torch, ``env`` further variables. ``units`` is what one step processes where
    the side does not say.
    """

    name: str
    call: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    tuned: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    units: float = 1.0


@dataclass
class Result:
    """What a contender answered: ``info`` once, a row per block; or ``error``, one line."""

    side: Side
    info: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


class Contender:
    """A running side."""

    def __init__(self, side: Side, settings: Settings) -> None:
        self.side, self.result = side, Result(side)
        absent = [name for name in side.needs if importlib.util.find_spec(name) is None]
        if absent:
            self.result.error = (
                f"{side.name} needs {', '.join(absent)}: pip install 'w2s_jax[parity]'"
            )
            return
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.log = Path(self.folder.name) / "stderr"
        orders, to_side = os.pipe()
        from_side, answers = os.pipe()
        pipes = {"BENCHMARK_ORDERS": str(orders), "BENCHMARK_ANSWERS": str(answers)}
        command = [sys.executable, "-m", "benchmarks.turn", side.call, json.dumps(side.options)]
        self.began = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(side, settings) | pipes,
                pass_fds=(orders, answers),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        os.close(orders)
        os.close(answers)
        self.orders, self.answers = os.fdopen(to_side, "w"), os.fdopen(from_side)
        self.result.info = self._hear()

    def turn(self, steps: int) -> None:
        """One block, unless this side has failed."""
        if self.result.error:
            return
        with contextlib.suppress(BrokenPipeError):
            print(steps, file=self.orders, flush=True)
        row = self._hear()
        if row:
            self.result.rows.append({"units": self.side.units * steps, "steps": steps} | row)

    def close(self) -> None:
        """End of file is the sign to leave."""
        if not hasattr(self, "process"):
            return
        with contextlib.suppress(BrokenPipeError):
            self.orders.close()
        self.answers.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    def _hear(self) -> dict[str, Any]:
        line = self.answers.readline()
        if line.strip():
            return json.loads(line)
        code = self.process.wait()
        said = self.log.read_text(errors="replace")
        lines = [text.strip() for text in said.splitlines() if text.strip()]
        reason = lines[-1][:300] if lines else f"it ended with code {code} and said nothing"
        self.result.error = f"{self.side.name} failed: {reason}"
        return {}


def environment(side: Side, settings: Settings) -> dict[str, str]:
    """Threads, cores and allocator of a contender; nothing else of the caller's settings leaks."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
        env[f"{name}_NUM_THREADS"] = str(settings.threads)
    env |= {"BENCHMARK_CORES": ",".join(map(str, cores(settings.threads)))}
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    env |= {"PYTHONWARNINGS": "ignore", "JAX_PLATFORMS": env.get("JAX_PLATFORMS", "cpu")}
    return env | ({"GLIBC_TUNABLES": TUNED} if side.tuned else {}) | dict(side.env)


def cores(threads: int) -> list[int]:
    """The cores that every contender is pinned to: the last ones this process may use.

    Raises:
      UserError: fewer cores than threads.
    """
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:
        usable = list(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(usable):
        raise UserError(f"--threads {threads}: this machine lets us use 1 to {len(usable)} cores")
    return usable[-threads:]


def alternate(sides: Sequence[Side], settings: Settings, *, steps: int) -> list[Result]:
    """Start every side, then let them take turns of ``steps`` steps, always in the same order.

    Raises:
      UserError: no side is left to run.
    """
    contenders: list[Contender] = []
    with contextlib.ExitStack() as stack:
        for side in chosen(sides, settings):
            contender = Contender(side, settings)
            stack.callback(contender.close)
            contenders.append(contender)
            _note(contender.result.error or f"{side.name}: ready")
        for block in range(settings.turns):
            for contender in contenders:
                failed = bool(contender.result.error)
                contender.turn(steps)
                if contender.result.error:
                    if not failed:
                        _note(contender.result.error)
                    continue
                row = contender.result.rows[-1]
                each = [row[key] / row["steps"] for key in ("cpu", "wall")]
                took = f"{each[0]:.3f} CPU s, {each[1]:.3f} s a step"
                _note(f"block {block + 1} of {settings.turns}, {contender.side.name}: {took}")
    return [contender.result for contender in contenders]


def fresh(sides: Sequence[Side], settings: Settings) -> list[Result]:
    """A new process for every side and block; rows are what it said with ``turn.ready``.

    Each row has besides ``total``, wall seconds from starting the process to its answer, and
    ``cpu``, the CPU seconds of the process until then.
    """
    results = {side.name: Result(side) for side in chosen(sides, settings)}
    for block in range(settings.turns):
        for result in results.values():
            if result.error:
                continue
            contender = Contender(result.side, settings)
            total = time.perf_counter() - getattr(contender, "began", 0.0)
            contender.close()
            result.error = contender.result.error
            if result.error:
                _note(result.error)
                continue
            result.info = contender.result.info
            row = {"units": result.side.units, "cpu": result.info["setup_cpu"], "total": total}
            result.rows.append(row | result.info)
            _note(f"block {block + 1} of {settings.turns}, {result.side.name}: {total:.2f} s")
    return list(results.values())


def call(
    target: str,
    settings: Settings | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run ``module:function(turn, **options)`` in a process of its own and return what it said.

    Raises:
      UserError: it failed; the line says why.
    """
    side = Side(target, target, options, env=env or {})
    contender = Contender(side, settings or Settings())
    contender.close()
    if contender.result.error:
        raise UserError(contender.result.error)
    return contender.result.info


def chosen(sides: Sequence[Side], settings: Settings) -> list[Side]:
    """The sides that ``--sides`` names.

    Raises:
      UserError: it names none of them.
    """
    wanted = [name.strip() for name in settings.sides.split(",") if name.strip()]
    picked = [side for side in sides if not wanted or side.name.startswith(tuple(wanted))]
    if not picked:
        names = ", ".join(side.name for side in sides)
        raise UserError(f"--sides {settings.sides}: the contenders are {names}")
    return picked


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
