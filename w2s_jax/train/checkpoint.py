"""Checkpoints: written by orbax in the background, checked before use, read onto any mesh.

``<folder>/<step>/`` holds ``params``, ``opt`` (the optimiser's state, the objective's memory, the
step count) and ``meta`` (what the run depends on, as JSON). A folder appears under its name only
when it is complete, so a killed process leaves the last complete checkpoint. ``sums.json`` has a
checksum per file: orbax itself does not notice a changed byte in the values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Params, State, Tree

SUMS = "sums.json"


class Store:
    """The checkpoints under one folder.

    Args:
      keep: how many stay; with 2 or more a damaged one costs only the updates since the one before.
      meta: what the run depends on (JSON); a checkpoint with other values is refused.

    Raises:
      UserError: the folder cannot be made or written (here, in ``save`` or in ``close``).
    """

    def __init__(self, folder: str | Path, keep: int, meta: Mapping[str, Any]) -> None:
        self.folder, self.meta = Path(folder).absolute(), json.loads(json.dumps(dict(meta)))
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = _manager(self.folder, keep)

    def save(self, state: State) -> None:
        """Start writing ``state`` (not its ``frozen``) as checkpoint ``state.step``.

        Returns once the values are copied; the caller may then donate them.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self.manager.all_steps():
            return
        with self._writing():
            self.manager.wait_until_finished()
            self._seal()
            self._room(state)
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    opt=ocp.args.StandardSave(_rest(state)),
                    meta=ocp.args.JsonSave(self.meta),
                ),
                force=True,
            )

    def restore(self, like: State) -> State | None:
        """The newest sound checkpoint in the shapes, dtypes and places of ``like``; None if none.

        A damaged checkpoint is moved to ``<folder>.damaged`` with one line on stderr, and the one
        before it is taken.

        Raises:
          UserError: it was written by a run with another ``meta``; or every checkpoint is damaged.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            fault = _agreed(lambda step=step: damage(self.folder / str(step)))
            fault = fault or self._compare(step)
            if not fault:
                try:
                    return self._read(step, like)
                except Exception as error:  # whatever orbax and tensorstore raise on bad files
                    fault = _line(error)
            self._discard(step, fault)
        if steps:
            raise UserError(
                f"no checkpoint under {self.folder} can be read; they were moved to "
                f"{self.folder.name}.damaged beside it: run again to start from the beginning"
            )
        return None

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.manager.latest_step()

    def close(self) -> None:
        """Wait until everything is written."""
        with self._writing():
            try:
                self.manager.wait_until_finished()
                self._seal()
            finally:
                self.manager.close()

    def _read(self, step: int, like: State) -> State:
        import orbax.checkpoint as ocp

        place = jax.tree.map(_abstract, {"params": like.params, "opt": _rest(like)})
        read = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(place["params"]),
                opt=ocp.args.StandardRestore(place["opt"]),
            ),
        )
        return dataclasses.replace(like, params=read["params"], **read["opt"])

    def _compare(self, step: int) -> str:
        """Refuse a checkpoint of another run; says what is wrong when that cannot be told."""
        try:
            saved = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
        except (OSError, ValueError):
            return "meta is unreadable"
        now = self.meta
        fields = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
        if fields:
            changes = ", ".join(f"{f} ({saved.get(f)} -> {now.get(f)})" for f in fields)
            raise UserError(
                f"{self.folder.parent} belongs to a run with other settings: {changes}; "
                "use another workdir, or the old settings to resume"
            )
        return ""

    def _discard(self, step: int, fault: str) -> None:
        if jax.process_index() == 0:
            print(f"checkpoint {step} in {self.folder} is damaged ({fault})", file=sys.stderr)
            aside = self.folder.with_name(self.folder.name + ".damaged")
            with self._writing():
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / str(step), ignore_errors=True)
                os.replace(self.folder / str(step), aside / str(step))
        self.manager.reload()

    def _room(self, state: State) -> None:
        """Refuse early what would fail halfway: a disk without room for one more checkpoint."""
        leaves = jax.tree.leaves((state.params, _rest(state)))
        need = sum(leaf.nbytes for leaf in leaves)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"{need / 1e6:.1f} MB are needed, the disk has {free / 1e6:.1f} MB left")

    def _seal(self) -> None:
        """Write checksums beside complete checkpoints that lack them."""
        for step in self.manager.all_steps() if jax.process_index() == 0 else ():
            folder = self.folder / str(step)
            if folder.is_dir() and not (folder / SUMS).exists():
                part = folder / (SUMS + ".part")
                part.write_text(json.dumps(_sums(folder)))
                os.replace(part, folder / SUMS)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot write checkpoints into {self.folder}: {_line(error)}; "
                "those already complete are untouched"
            ) from error


def read_params(folder: str | Path, like: Params, step: int | None = None) -> Params:
    """The weights of checkpoint ``step`` (the newest by default) in the places of ``like``.

    Raises:
      UserError: no such checkpoint, or it cannot be read.
    """
    import orbax.checkpoint as ocp

    manager = _manager(Path(folder).absolute(), None)
    step = manager.latest_step() if step is None else step
    if step not in manager.all_steps():
        raise UserError(f"no checkpoint {'' if step is None else step} under {folder}")
    args = ocp.args.StandardRestore(jax.tree.map(_abstract, like))
    try:
        return manager.restore(step, args=ocp.args.Composite(params=args))["params"]
    except Exception as error:
        raise UserError(f"checkpoint {step} under {folder}: {_line(error)}") from error
    finally:
        manager.close()


def damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint; empty when nothing is known to be."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except FileNotFoundError:
        return ""  # killed between the checkpoint and its checksums: reading will tell
    except (OSError, ValueError):
        return f"{SUMS} is unreadable"
    for name, (size, crc) in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc(path) != crc:
            return f"{name} was truncated or changed"
    return ""


def _manager(folder: Path, keep: int | None) -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

    _quiet()
    policy = checkpoint_managers.LatestN(keep) if keep else None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=keep is not None, create=False
    )
    return ocp.CheckpointManager(folder, item_names=("params", "opt", "meta"), options=options)


def _quiet() -> None:
    """Orbax reports through absl what it also raises; keep only what is raised."""
    logger = logging.getLogger("absl")
    if _foreign not in logger.filters:
        logger.addFilter(_foreign)


def _foreign(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _rest(state: State) -> dict[str, Tree]:
    return {"opt": state.opt, "memory": state.memory, "step": state.step, "steps": state.steps}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _agreed(fault: Any) -> str:
    """The first process looks and all hear the same, or they would restore different steps."""
    if jax.process_count() == 1:
        return fault()
    from jax.experimental import multihost_utils

    found = fault() if jax.process_index() == 0 else ""
    bad = multihost_utils.broadcast_one_to_all(np.asarray(bool(found)))
    return found or ("see the first process" if bad else "")


def _sums(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_size, _crc(path))
        for path in files
        if not path.name.startswith(SUMS)
    }


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _line(error: BaseException) -> str:
    """The first line of an error, short."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
