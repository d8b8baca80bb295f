"""One door for every experiment: flags from its dataclass, a workdir, rows, figures, a summary."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from w2s_jax import workdir as files
from w2s_jax.errors import UserError
from w2s_jax.record import Context, Job, Row, as_json, execute

RESUME = "run the same command again to resume"


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file hands to ``main``."""

    config: type
    run: Callable[[Any, Context], Iterable[Row]]
    figures: Callable[[list[Row], Path], list[Path]]
    claims: Callable[[list[Row]], list[dict[str, Any]]]
    presets: dict[str, dict[str, Any]]
    paper: str
    minutes: float
    summary: Callable[[list[Row]], list[Row]] | None
    plan: Callable[[Any], Any] | None

    @property
    def command(self) -> str:
        """What a user types to run it."""
        return f"python -m experiments.{self.paper}"


@dataclass(frozen=True)
class Flags:
    """The flags that mean the same in every experiment."""

    preset: str = "laptop"
    """tiny (seconds, a smoke test), laptop (minutes) or paper (the paper's own numbers)."""
    workdir: str | None = None
    """Folder for results; default runs/<experiment>-<preset>, plus a hash if flags differ."""
    mesh: str | None = None
    """Device mesh of data, fsdp, tensor, context, like "fsdp=4,tensor=2"; default all on data."""
    track: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ()
    """Where training curves go besides metrics.jsonl."""
    devices: int | None = None
    """CPU devices to simulate; default one per usable core."""
    distributed: bool = False
    """Join the other hosts of a TPU pod or a cluster job (see docs/scaling.md)."""
    plan: str | None = None
    """Compile the real step for a topology (v5e:8x8, also v4, v5p, v6e, cpu:8) that need not be at
    hand, print what it needs, and stop; exit code 3 when it does not fit."""
    fresh: bool = False
    """Start over: earlier results in the workdir move to earlier-<n> there."""
    quiet: bool = False
    """Print errors and the final table only."""


def main(
    config: type,
    run: Callable[[Any, Context], Iterable[Row]],
    *,
    figures: Callable[[list[Row], Path], list[Path]],
    claims: Callable[[list[Row]], list[dict[str, Any]]],
    presets: dict[str, dict[str, Any]],
    paper: str,
    minutes: float,
    summary: Callable[[list[Row]], list[Row]] | None = None,
    plan: Callable[[Any], Any] | None = None,
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """Run an experiment from the command line and return its summary.

    Args:
      config: frozen dataclass whose defaults are the laptop preset; each field has a docstring.
      run: generator of rows (flat dicts of text and numbers), a function of (config, Context).
      figures: (rows, folder) -> paths of the PNG files it drew.
      claims: rows -> one dict per claim with the keys of ``record.CLAIM``.
      presets: overrides of the config for "tiny", "paper", ...
      paper: name of the experiment's module.
      minutes: what the laptop preset takes on two cores.
      summary: rows -> a short table to print at the end.
      plan: config -> the ``train.plan.Draft`` of its largest step, for ``--plan``.
      argv: the arguments, ``sys.argv[1:]`` by default.

    Raises:
      SystemExit: 2 for a fault that the user can mend (one line on stderr), 130 or 143 when
        interrupted, 0 after ``--help``, 3 for a plan that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    experiment = Experiment(config, run, figures, claims, presets, paper, minutes, summary, plan)
    try:
        with _terminable():
            return _main(experiment, argv)
    except KeyboardInterrupt as stop:
        _stopped(experiment, argv, "SIGTERM" in stop.args)
    except Exception as error:
        if _interrupted(error):
            _stopped(experiment, argv, "SIGTERM" in str(error))
        line = explain(error)
        if line is None:
            raise
        _fail(line)


def explain(error: BaseException) -> str | None:
    """One line for a fault the user can mend, or None for one that deserves its traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller --preset, model or batch"
    if isinstance(error, OSError):
        reasons = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EROFS: "the file system is read-only; choose another --workdir",
            errno.EACCES: "permission denied; choose another --workdir or file",
            errno.EPERM: "not permitted; choose another --workdir or file",
        }
        if error.errno in reasons:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{reasons[error.errno]}; earlier results are kept, {RESUME}"
    text = str(error)
    if "No space left on device" in text:
        return f"the disk is full; free some space; earlier results are kept, {RESUME}"
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return (
            "out of device memory: reduce the batch, length or model, or shard with --mesh fsdp=N"
        )
    return explain(error.__cause__) if error.__cause__ else None


def _interrupted(error: Exception) -> bool:
    from w2s_jax.train.fit import Interrupted

    return isinstance(error, Interrupted)  # training caught the signal and saved its state


def _stopped(experiment: Experiment, argv: list[str], terminated: bool) -> NoReturn:
    words = [word for word in argv if word != "--fresh"]
    again = shlex.join([*experiment.command.split(), *words])
    print(f"\nstopped; what is done is kept. Resume with: {again}", file=sys.stderr)
    raise SystemExit(143 if terminated else 130)


def _main(experiment: Experiment, argv: list[str]) -> dict[str, Any]:
    cfg, flags, base = _parse(experiment, argv)
    _check(cfg, flags)
    if flags.plan is not None:
        return _plan(experiment, cfg, flags)
    _devices(flags)
    tail = "" if cfg == base else f"-{files.digest(as_json(cfg))[:6]}"
    folder = Path(flags.workdir or f"runs/{experiment.paper}-{flags.preset}{tail}")
    ctx = _surroundings(folder.resolve(), flags)
    job = Job(
        paper=experiment.paper,
        preset=flags.preset,
        config=cfg,
        run=experiment.run,
        figures=experiment.figures,
        claims=experiment.claims,
        summary=experiment.summary,
    )
    return execute(job, ctx, fresh=flags.fresh)


def _plan(experiment: Experiment, cfg: Any, flags: Flags) -> dict[str, Any]:
    """Report what the experiment's largest step needs; nothing is run or written."""
    if experiment.plan is None:
        raise UserError(f"--plan: {experiment.paper} has no plan; leave the flag out")
    from w2s_jax.train import topology
    from w2s_jax.train.plan import report

    topology.prepare(str(flags.plan))
    code = report(experiment.plan(cfg), str(flags.plan), flags.mesh)
    if code:
        raise SystemExit(code)
    return {}


def _surroundings(folder: Path, flags: Flags) -> Context:
    import jax

    first = jax.process_index() == 0
    return Context(
        workdir=folder,
        mesh=flags.mesh,
        track=tuple(name for name in flags.track if name != "jsonl"),
        progress=sys.stdout.isatty() and not flags.quiet and first,
        quiet=flags.quiet or not first,
        writes=first,
    )


def _parse(experiment: Experiment, argv: list[str]) -> tuple[Any, Flags, Any]:
    """The config, the common flags, and the config of the preset without further flags."""
    import tyro

    name = _preset(argv)
    known = {"laptop": {}, **experiment.presets}
    if name not in known:
        raise UserError(f"--preset {name!r} is unknown; choose from {', '.join(sorted(known))}")
    base = dataclasses.replace(experiment.config(), **known[name])
    # one flat namespace: the experiment's fields first, then the flags every experiment has
    flat = tyro.conf.arg(name="")
    switch = tyro.conf.FlagCreatePairsOff
    fields = {"config": Annotated[experiment.config, flat], "flags": Annotated[Flags, flat, switch]}
    both = dataclasses.make_dataclass("Both", fields.items())
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                both,
                args=argv,
                default=both(base, Flags(preset=name)),
                prog=experiment.command,
                description=_description(experiment),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(_one_line(complaint.getvalue(), experiment.command)) from None
    return parsed.config, parsed.flags, base


def _preset(argv: list[str]) -> str:
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--preset="):
            return word.removeprefix("--preset=")
    return "laptop"


def _description(experiment: Experiment) -> str:
    about = (experiment.run.__globals__.get("__doc__") or "").strip()
    lines = [about, "", "examples:"]
    lines += [f"  {experiment.command} --preset tiny      seconds: does it work here?"]
    lines += [
        f"  {experiment.command}                    about {experiment.minutes:g} min on 2 cores"
    ]
    lines += [f"  {experiment.command} --seeds 10 --workdir runs/mine"]
    for name, changes in experiment.presets.items():
        lines += [
            "",
            f"--preset {name} sets " + ", ".join(f"{k}={v!r}" for k, v in changes.items()),
        ]
    return "\n".join(lines)


def _one_line(box: str, command: str) -> str:
    """The sentence inside the box that tyro draws, without the box."""
    rows = [row.strip(" │╭╮╰╯─|") for row in box.splitlines()[1:]]
    rows = [row.strip("+-") and row for row in rows]  # rules, where a terminal has ASCII only
    first, *_ = "\n".join(rows).strip("\n").split("\n\n")
    words = first.replace("\n", " ")
    if "Perhaps you meant:" in rows:
        words += f"; perhaps {rows[rows.index('Perhaps you meant:') + 1]}"
    return f"{words}; see {command} --help"


def _check(cfg: Any, flags: Flags) -> None:
    if getattr(cfg, "seeds", 1) < 1:
        raise UserError(f"--seeds must be at least 1, got {cfg.seeds}")
    if flags.devices is not None and flags.devices < 1:
        raise UserError(f"--devices must be at least 1, got {flags.devices}")


def _cores() -> int:
    # not every system has affinities (macOS has none)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _devices(flags: Flags) -> None:
    """Give a CPU one device per core, so that populations use them all; before jax starts."""
    name = "--xla_force_host_platform_device_count"
    earlier = os.environ.get("XLA_FLAGS", "").split()
    set_already = any(word.startswith(name) for word in earlier)
    if flags.devices is not None or not set_already:
        count = flags.devices or _cores()
        kept = [word for word in earlier if not word.startswith(name)]
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"{name}={count}"])
    from w2s_jax import mesh

    if flags.distributed:
        os.environ["W2S_DISTRIBUTED"] = "1"
    mesh.distribute()
    mesh.compilation_cache()
    if flags.mesh is not None:
        mesh.make_mesh(flags.mesh)  # a bad specification fails here, not after an hour


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM arrives as KeyboardInterrupt("SIGTERM"), so that one path saves and leaves."""

    def stop(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def again(paper: str, cfg: Any) -> str:
    """The command of a config: its flags that are not at their defaults."""
    words = ["python", "-m", f"experiments.{paper}"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name}", *(str(item) for item in values)]
    return shlex.join(words)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)
