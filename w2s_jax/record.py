"""What a run leaves behind: config.json, results.jsonl, figures, summary.json, kept stages."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from w2s_jax import workdir as files
from w2s_jax.errors import UserError
from w2s_jax.types import Row

CLAIM = ("name", "holds", "statistic", "value", "interval", "level", "seeds")


@dataclass(frozen=True)
class Job:
    """An experiment with its flags resolved: what ``execute`` runs and writes down."""

    paper: str
    preset: str
    config: Any
    run: Callable[[Any, Context], Iterable[Row]]
    figures: Callable[[list[Row], Path], list[Path]]
    claims: Callable[[list[Row]], list[dict[str, Any]]]
    summary: Callable[[list[Row]], list[Row]] | None = None


@dataclass(frozen=True)
class Context:
    """What a run may know of its surroundings.

    ``workdir`` is the folder of the run; ``mesh`` the specification for ``mesh.make_mesh`` or
    None; ``track`` names sinks of training curves beside metrics.jsonl; ``progress`` says whether
    a person watches a terminal; ``writes`` is False on the processes of a multi-host job that
    leave files alone.
    """

    workdir: Path
    mesh: str | None = None
    track: tuple[str, ...] = ()
    progress: bool = False
    quiet: bool = False
    writes: bool = True

    def folder(self, name: str, inputs: dict[str, Any]) -> Path:
        """``workdir/<name>-<hash of inputs>``: where this stage may keep checkpoints."""
        return self.workdir / f"{name}-{files.digest(inputs)}"

    def stage(self, name: str, inputs: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The value of ``make()``, kept under a hash of ``inputs`` and read again by a rerun.

        Everything that changes the value must be in ``inputs`` (see ``workdir.digest``); for what
        a value may hold see ``workdir.cached``.
        """
        return files.cached(self.folder(name, inputs), make, self.say, self.writes)

    def kept(self, name: str, inputs: dict[str, Any]) -> bool:
        """Whether ``stage`` would find this value on disk."""
        return any(self.folder(name, inputs).glob("artefact.*"))

    def say(self, text: str) -> None:
        """Print one line at once, unless the run is quiet."""
        if not self.quiet:
            print(text, flush=True)


def execute(job: Job, ctx: Context, *, fresh: bool = False) -> dict[str, Any]:
    """Run ``job`` in ``ctx.workdir`` (or draw a finished one again) and return its summary.

    Raises:
      UserError: the folder cannot be written, is damaged, or holds a run with another config.
    """
    import jax
    from jax.experimental import multihost_utils

    before = _names(ctx.workdir) if ctx.writes else None
    if ctx.writes:
        _open(job, ctx, fresh)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")
    ctx.say(
        f"{job.paper}, preset {job.preset}: {jax.device_count()} {jax.devices()[0].platform} "
        f"device(s), results in {ctx.workdir}"
    )
    try:
        rows, minutes = _rows(job, ctx)
    except UserError:
        if ctx.writes:
            _withdraw(ctx.workdir, before)
        raise
    return _finish(job, ctx, rows, minutes)


def _open(job: Job, ctx: Context, fresh: bool) -> None:
    folder = ctx.workdir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh and (aside := files.move_aside(folder)):
            ctx.say(f"earlier results moved to {aside}")
        earlier = _read_json(folder / "config.json")
        if earlier and files.started(folder):
            _same(earlier.get("config", {}), as_json(job.config), folder)
        _write_config(job, folder, earlier.get("minutes", 0.0) if earlier else 0.0)
    except OSError as error:
        raise UserError(f"cannot write to --workdir {folder}: {error.strerror}") from error


def _names(folder: Path) -> set[str] | None:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def _withdraw(folder: Path, before: set[str] | None) -> None:
    """Undo ``_open`` where the run ended before it made anything (None: there was no folder)."""
    part = folder / "results.part.jsonl"
    if part.exists() and not part.stat().st_size:
        part.unlink()
    new = (_names(folder) or set()) - (before or set())
    if new == {"config.json"}:
        (folder / "config.json").unlink()
        if before is None:
            folder.rmdir()


def _same(earlier: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    old, new = _flat(earlier), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        told = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
        raise UserError(
            f"{folder} holds a run with another config ({told}): "
            "choose another --workdir, or --fresh to start over and keep the old one aside"
        )


def _write_config(job: Job, folder: Path, minutes: float) -> None:
    versions = {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    record = {
        "paper": job.paper,
        "preset": job.preset,
        "config": as_json(job.config),
        "versions": {"python": sys.version.split()[0], **versions},
        "minutes": minutes,
    }
    files.write(folder / "config.json", json.dumps(record, indent=2) + "\n")


def _rows(job: Job, ctx: Context) -> tuple[list[Row], float]:
    """The rows of a finished run, or those of a new one, with the minutes they took."""
    done = ctx.workdir / "results.jsonl"
    config = _read_json(ctx.workdir / "config.json")
    spent = config.get("minutes", 0.0) if config else 0.0
    if done.exists():
        ctx.say("this run is finished: drawing again (--fresh runs it anew)")
        return _parse_rows(done.read_text(encoding="utf8"), done), spent
    began, rows = time.monotonic(), []
    part = ctx.workdir / "results.part.jsonl"
    try:
        with open(part if ctx.writes else os.devnull, "w", encoding="utf8") as stream:
            for row in job.run(job.config, ctx):
                rows.append(row)
                stream.write(_line(row))
                stream.flush()
    finally:
        spent += (time.monotonic() - began) / 60
        if ctx.writes and part.exists():
            with contextlib.suppress(OSError):  # a full disk has its own message
                _write_config(job, ctx.workdir, spent)
    text = "".join(map(_line, rows))
    if ctx.writes:
        files.write(done, text)
        part.unlink()
    return _parse_rows(text, done), spent  # what a redraw will read


def _finish(job: Job, ctx: Context, rows: list[Row], minutes: float) -> dict[str, Any]:
    claims = [{key: _plain(claim[key]) for key in CLAIM} for claim in job.claims(rows)]
    record = {
        "paper": job.paper,
        "preset": job.preset,
        "minutes": round(minutes, 2),
        "claims": claims,
        "figures": [],
    }
    if not ctx.writes:
        return record
    folder = ctx.workdir / "figures"
    folder.mkdir(exist_ok=True)
    drawn = job.figures(rows, folder)
    record["figures"] = [str(Path(path).relative_to(ctx.workdir)) for path in drawn]
    files.write(ctx.workdir / "summary.json", json.dumps(record, indent=2) + "\n")
    if job.summary is not None:
        print("\n" + table(job.summary(rows)))
    print("\n" + table([_shown(claim) for claim in claims]))
    print(f"\nfigures  {folder}\nrows     {ctx.workdir / 'results.jsonl'}")
    print(f"summary  {ctx.workdir / 'summary.json'}", flush=True)
    return record


def table(rows: list[Row]) -> str:
    """Rows as text columns, numbers to three decimals."""
    if not rows:
        return "(no rows)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _shown(claim: dict[str, Any]) -> Row:
    low, high = claim["interval"] or (None, None)
    return {
        "claim": claim["name"],
        "holds": "yes" if claim["holds"] else "no",
        "statistic": claim["statistic"],
        "value": f"{_cell(claim['value'])} [{_cell(low)}, {_cell(high)}]",
        "level": claim["level"],
        "seeds": claim["seeds"],
    }


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _line(row: Row) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON without NaN: numpy scalars as numbers, what is not finite as null."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse_rows(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path} line {number} is damaged: --fresh runs it anew") from None
        rows.append({key: math.nan if item is None else item for key, item in row.items()})
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged: restore it, or --fresh runs it anew") from None


def as_json(cfg: Any) -> dict[str, Any]:
    """The config as JSON gives it back: tuples are lists, paths are text."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves
