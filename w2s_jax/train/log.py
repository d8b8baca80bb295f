"""Where a run's numbers go: JSON lines, TensorBoard, W&B, a progress bar; tokens/s and MFU."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError

TRACKERS = ("tensorboard", "wandb")

# Dense bfloat16 peak in FLOP/s per device, by ``device_kind`` (vendors' data sheets, no sparsity).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s of a device of this ``device_kind``; None where it is not known (CPU)."""
    names = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(names, key=len)] if names else None


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding; 0 for a batch without tokens."""
    if "segment" in batch:
        return int(np.count_nonzero(np.asarray(batch["segment"]) > 0))
    if "tokens" in batch and "mask" in batch:
        return int(np.count_nonzero(np.asarray(batch["mask"]) > 0))
    nested = sum(real_tokens(leaf) for leaf in batch.values() if isinstance(leaf, Mapping))
    return nested + (np.asarray(batch["tokens"]).size if "tokens" in batch else 0)


class Meter:
    """Rates since the last reading: updates/s, tokens/s, and MFU where the peak is known.

    MFU = tokens/s * ``flops`` (per token, forward and backward) / (devices * peak).
    """

    def __init__(self, flops: float, devices: Iterable[Any]) -> None:
        devices = list(devices)
        peak = peak_flops(devices[0].device_kind)
        self.scale = flops / (len(devices) * peak) if peak and flops else None
        self.since = time.perf_counter()
        self.updates = self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count one update over ``tokens`` real tokens."""
        self.updates += 1
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """The rates, and a new start."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        rates = {"seconds": seconds, "updates_per_second": self.updates / seconds}
        if self.tokens:
            rates["tokens_per_second"] = self.tokens / seconds
            if self.scale:
                rates["mfu"] = rates["tokens_per_second"] * self.scale
        self.since, self.updates, self.tokens = now, 0, 0
        return rates


class Log:
    """Rows of a run under ``workdir``: ``metrics.jsonl`` and ``speed.jsonl``; trackers by name.

    ``metrics.jsonl`` holds only what is a function of the run's inputs, so that an interrupted and
    resumed run leaves the same file as an uninterrupted one; wall-clock rates go to
    ``speed.jsonl``. Without ``workdir``, or on any but the first process, nothing is written.

    Args:
      step: the update to resume after; later rows are dropped. -1 starts afresh.
      track: any of ``"tensorboard"``, ``"wandb"``.

    Raises:
      UserError: an unknown tracker or one that is not installed; ``workdir`` cannot be written.
    """

    def __init__(self, workdir: str | Path | None, track: Iterable[str] = (), step: int = -1):
        self.files: dict[str, Any] = {}
        self.board = self.wandb = None
        track = tuple(track)
        for name in track:
            if name not in TRACKERS:
                raise UserError(f"tracker {name!r} is unknown; choose of {', '.join(TRACKERS)}")
        if workdir is None and track:
            raise UserError(f"tracking with {', '.join(track)} needs a workdir")
        if workdir is None or jax.process_index() > 0:
            return
        folder = Path(workdir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics", "speed"):
                self.files[name] = _resume(folder / f"{name}.jsonl", step)
        except OSError as error:
            raise UserError(f"cannot write into workdir {folder}: {error.strerror}") from error
        if "tensorboard" in track:
            self.board = _tensorboard(folder, step)
        if "wandb" in track:
            self.wandb = _wandb(folder)

    def write(self, step: int, metrics: Mapping[str, float], file: str = "metrics") -> None:
        """Append one row; ``file`` is ``"metrics"`` or ``"speed"``.

        Raises:
          UserError: the disk is full or gone.
        """
        if file not in self.files:
            return
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        try:
            self.files[file].write(json.dumps(row) + "\n")
            self.files[file].flush()  # a killed process then loses at most the row in flight
        except OSError as error:
            path = self.files[file].name
            raise UserError(
                f"cannot write {path}: {error.strerror}; rows up to here stay"
            ) from error
        for name, value in metrics.items():
            if self.board is not None:
                self.board.add_scalar(name, float(value), step)
        if self.wandb is not None:
            self.wandb.log(dict(row), step=step)

    def sync(self) -> None:
        """Force the rows to disk, so that no checkpoint is newer than its rows."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close files and trackers."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        self.files = {}
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _resume(path: Path, step: int) -> Any:
    """The file opened for appending, without rows after ``step`` and without a torn last line."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, path)
    return path.open("a")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tracking with tensorboard needs tensorboardX: pip install tensorboardX"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step >= 0 else None)


def _wandb(folder: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("tracking with wandb needs wandb: pip install wandb") from error
    name = "-".join(folder.resolve().parts[-2:])
    return wandb.init(project="w2s_jax", dir=str(folder), id=name, name=name, resume="allow")


class Progress:
    """A bar on a terminal; elsewhere one plain line now and then, never more than ~20 in all."""

    def __init__(self, total: int, start: int = 0, show: bool = True) -> None:
        show = show and jax.process_index() == 0
        self.total, self.every, self.bar = total, max(1, total // 10), None
        self.plain = show and not sys.stderr.isatty()
        self.last = time.perf_counter()
        if show and not self.plain:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` updates are done."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.plain and (step % self.every == 0 or step == self.total):
            if time.perf_counter() - self.last < 5 and step < self.total:
                return  # short runs say only that they ended
            self.last = time.perf_counter()
            print(f"step {step}/{self.total}  loss {metrics['loss']:.4f}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
