"""The command line with a toy experiment: flags, rows, resuming, stopping, one line per fault."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from w2s_jax import cli
from w2s_jax.errors import UserError
from w2s_jax.train.fit import Interrupted


@dataclass(frozen=True)
class Tune:
    """Numbers of the optimiser."""

    lr: float = 0.1
    """Learning rate."""


@dataclass(frozen=True)
class Config:
    """A toy."""

    task: str = "toy"
    """Name of the task."""
    seeds: int = 3
    """Number of seeds."""
    weak: tuple[str, ...] = ("a", "b")
    """Weak models."""
    tune: Tune = Tune()


MADE: list[int] = []


def run(cfg, ctx):
    """Rows of a toy."""
    if cfg.task == "unknown":
        raise UserError("unknown task\n'unknown'")
    if cfg.task in FAULTS:
        raise FAULTS[cfg.task]
    for seed in range(cfg.seeds):

        def make(seed=seed):
            MADE.append(seed)
            return {"x": np.full(2, seed, np.float32)}

        value = ctx.stage("numbers", {"seed": seed, "lr": cfg.tune.lr}, make)["x"].mean()
        yield {"seed": seed, "value": value, "missing": math.nan}
        if cfg.task == "stop" and seed == 1:
            raise KeyboardInterrupt


def figures(rows, folder):
    """One file."""
    (folder / "a.png").write_text(str(len(rows)))
    return [folder / "a.png"]


def claims(rows):
    """One claim."""
    value = np.float32(np.mean([row["value"] for row in rows]))
    claim = {"name": "positive", "holds": bool(value > 0), "statistic": "mean", "value": value}
    return [{**claim, "interval": (0.0, math.inf), "level": 0.95, "seeds": len(rows)}]


FAULTS = {
    "full": OSError(errno.ENOSPC, "No space left on device", "/data/x"),
    "readonly": OSError(errno.EROFS, "Read-only file system"),
    "denied": PermissionError(errno.EACCES, "Permission denied"),
    "memory": MemoryError(),
    "device": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes\nmore"),
    "wrapped": ValueError("writing checkpoint: No space left on device [os_error=28]"),
}


def go(*argv: object):
    """Run the toy in this process."""
    return cli.main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets={"tiny": {"seeds": 2}, "paper": {"seeds": 5, "tune": Tune(0.5)}},
        paper="toy",
        minutes=1,
        argv=[str(word) for word in argv],
    )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    MADE.clear()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, *argv: object) -> str:
    """The one line with which these arguments are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        go(*argv)
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.startswith("error: ") and shown.count("\n") == 1, shown
    return shown


def test_a_run_leaves_what_it_promises(folder, capsys) -> None:
    summary = go("--preset", "tiny", "--workdir", folder)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows == [
        {"seed": 0, "value": 0.0, "missing": None},
        {"seed": 1, "value": 1.0, "missing": None},
    ]
    claim = {"name": "positive", "holds": True, "statistic": "mean", "value": 0.5}
    assert summary["claims"] == [{**claim, "interval": [0.0, None], "level": 0.95, "seeds": 2}]
    assert summary["figures"] == ["figures/a.png"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["seeds"] == 2 and config["preset"] == "tiny"
    assert {"jax", "flax", "python"} <= config["versions"].keys()
    assert not (folder / "results.part.jsonl").exists()
    shown = capsys.readouterr().out
    assert "positive" in shown and "0.500 [0.000, -]" in shown and str(folder) in shown


def test_explicit_flags_win_over_the_preset(folder) -> None:
    go("--preset", "paper", "--seeds", 1, "--workdir", folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config == {"task": "toy", "seeds": 1, "weak": ["a", "b"], "tune": {"lr": 0.5}}
    go("--preset=tiny", "--tune.lr", 3, "--weak", "c", "--workdir", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())["config"]
    assert config == {"task": "toy", "seeds": 2, "weak": ["c"], "tune": {"lr": 3.0}}


def test_the_default_folder_is_a_function_of_the_config(folder) -> None:
    go("--preset", "tiny")
    go("--preset", "tiny", "--seeds", 1)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names[0] == "toy-tiny" and len(names) == 2 and names[1].startswith("toy-tiny-")


def test_a_finished_run_only_redraws(folder, capsys) -> None:
    first = go("--workdir", folder)
    before = contents(folder)
    (folder / "figures" / "a.png").unlink()
    MADE.clear()
    assert go("--workdir", folder) == first
    assert MADE == [] and contents(folder) == before
    assert "finished" in capsys.readouterr().out


def test_a_stopped_run_resumes(folder, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        go("--workdir", folder, "--task", "stop")
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert f"python -m experiments.toy --workdir {folder} --task stop" in said
    assert not (folder / "results.jsonl").exists()
    assert MADE == [0, 1]
    with pytest.raises(SystemExit):
        go("--workdir", folder, "--task", "stop")
    assert MADE == [0, 1]  # kept stages were read


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_training_that_caught_a_signal_counts_as_stopped(folder, capsys, monkeypatch, name, code):
    monkeypatch.setitem(FAULTS, "caught", Interrupted(f"{name}: saved after step 3 of 9"))
    with pytest.raises(SystemExit) as stop:
        go("--workdir", folder, "--task", "caught")
    assert stop.value.code == code
    assert "Resume with" in capsys.readouterr().err


def test_a_changed_config_is_refused_and_harms_nothing(folder, capsys) -> None:
    go("--workdir", folder)
    before = contents(folder)
    said = refused(capsys, "--workdir", folder, "--seeds", 4, "--tune.lr", 1)
    assert "seeds 3 -> 4" in said and "tune.lr 0.1 -> 1.0" in said and "--fresh" in said
    assert "task" not in said
    assert contents(folder) == before


def test_fresh_keeps_the_earlier_run_aside(folder) -> None:
    go("--workdir", folder)
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    MADE.clear()
    go("--workdir", folder, "--seeds", 1, "--fresh")
    assert MADE == [0]
    assert contents(folder / "earlier-1") == before
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_refused_run_leaves_no_folder(folder, capsys) -> None:
    assert refused(capsys, "--workdir", folder, "--task", "unknown") == (
        "error: unknown task 'unknown'\n"
    )
    assert not folder.exists()
    (folder / "numbers-0123456789abcdef").mkdir(parents=True)
    (folder / "numbers-0123456789abcdef" / "artefact.json").write_text("earlier")
    before = contents(folder)
    refused(capsys, "--workdir", folder, "--task", "unknown")
    assert contents(folder) == before
    go("--workdir", folder)  # the corrected command is not a "changed config"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "3"], ["--seed", "--help"]),
        (["--taks", "x"], ["--taks", "perhaps", "--task"]),
        (["--seeds", "many"], ["--seeds", "many"]),
        (["--seeds"], ["--seeds"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--preset", "huge"], ["'huge'", "laptop, paper, tiny"]),
        (["--track", "paper"], ["--track"]),
        (["--mesh", "rows=2"], ["rows=2"]),
        (["--mesh", "data=7"], ["7 devices"]),
        (["--devices", "0"], ["--devices"]),
        (["--plan", "v5e:8x8"], ["--plan"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_flags_are_one_line(folder, capsys, argv, words) -> None:
    said = refused(capsys, "--workdir", folder, *argv)
    assert all(word in said for word in words), said
    assert not folder.exists()


def test_a_complaint_is_read_in_a_terminal_of_ascii() -> None:
    rule = "-" * 20
    box = f"+- Parsing error -+\n{rule}\n| Missing --a. |\n| Expected 2. |\n{rule}\nFor help"
    assert cli._one_line(box, "run") == "Missing --a. Expected 2.; see run --help"


@pytest.mark.parametrize("code", [0, 3])
def test_a_plan_runs_nothing_and_its_verdict_is_the_exit_code(folder, monkeypatch, code) -> None:
    from w2s_jax.train import plan

    asked = []
    monkeypatch.setattr(plan, "report", lambda *args: asked.append(args) or code)
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ[name])  # put back afterwards
    words = {"presets": {}, "paper": "toy", "minutes": 1, "plan": lambda cfg: ("draft", cfg.seeds)}
    argv = ["--workdir", str(folder), "--seeds", "4", "--plan", "cpu:8", "--mesh", "fsdp=8"]
    try:
        cli.main(Config, run, figures=figures, claims=claims, **words, argv=argv)
        found = 0
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert asked == [(("draft", 4), "cpu:8", "fsdp=8")]
    assert not folder.exists() and MADE == []


def test_a_plan_for_no_known_topology_is_one_line(folder, capsys) -> None:
    words = {"presets": {}, "paper": "toy", "minutes": 1, "plan": lambda cfg: None}
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, figures=figures, claims=claims, **words, argv=["--plan", "v9:2x2"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: topology 'v9:2x2' is unknown")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("full", ["disk is full", "/data/x"]),
        ("readonly", ["read-only"]),
        ("denied", ["permission denied"]),
        ("memory", ["out of memory"]),
        ("device", ["out of device memory", "batch"]),
        ("wrapped", ["disk is full"]),
    ],
)
def test_faults_of_the_machine_are_one_line(folder, capsys, task, words) -> None:
    said = refused(capsys, "--workdir", folder, "--task", task)
    assert all(word in said for word in words), said


def test_a_fault_of_ours_keeps_its_traceback(folder, monkeypatch) -> None:
    monkeypatch.setitem(FAULTS, "bug", ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        go("--workdir", folder, "--task", "bug")


def test_a_full_disk_at_the_end_keeps_the_rows(folder, capsys, monkeypatch) -> None:
    real = cli.files.write

    def full(path, data):
        if path.name == "results.jsonl":
            raise FAULTS["full"]
        real(path, data)

    monkeypatch.setattr(cli.files, "write", full)
    assert "disk is full" in refused(capsys, "--workdir", folder)
    assert len((folder / "results.part.jsonl").read_text().splitlines()) == 3
    monkeypatch.undo()
    MADE.clear()
    go("--workdir", folder)
    assert MADE == []


@pytest.mark.parametrize("name", ["config.json", "results.jsonl"])
def test_damaged_records_are_one_line(folder, capsys, name) -> None:
    go("--workdir", folder)
    (folder / name).write_text('{"half": ')
    said = refused(capsys, "--workdir", folder)
    assert "damaged" in said and "--fresh" in said


def test_a_workdir_that_cannot_be(folder, capsys) -> None:
    folder.write_text("a file")
    assert "cannot write to --workdir" in refused(capsys, "--workdir", folder)
    assert folder.read_text() == "a file"


def test_a_redraw_sees_the_rows_that_the_run_saw(folder) -> None:
    seen = []

    def look(rows):
        seen.append([(type(v), v) for row in rows for k, v in row.items() if k != "missing"])
        return claims(rows)

    words = {"presets": {}, "paper": "toy", "minutes": 1, "argv": ["--workdir", str(folder)]}
    cli.main(Config, run, figures=figures, claims=look, **words)
    cli.main(Config, run, figures=figures, claims=look, **words)
    assert seen[0] == seen[1]


SCRIPT = '''
"""A toy that waits. Expect nothing."""
import time
from dataclasses import dataclass
from w2s_jax.cli import main

@dataclass(frozen=True)
class Config:
    """Toy."""
    seeds: int = 2
    """Number of seeds that pass."""

def run(cfg, ctx):
    ctx.stage("first", {}, lambda: 1)
    import jax
    print("devices", jax.local_device_count(), flush=True)
    time.sleep(60)
    yield {}

main(Config, run, figures=None, claims=None, presets={}, paper="toy", minutes=1)
'''


@pytest.fixture
def script(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    (tmp_path / "toy.py").write_text(textwrap.dedent(SCRIPT).strip())
    return [sys.executable, str(tmp_path / "toy.py")]


def test_help_teaches(script) -> None:
    done = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (
        "A toy that waits",
        "Number of seeds that pass",
        "--preset",
        "examples",
        "--mesh",
    ):
        assert words in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_resume(script, tmp_path, number, code) -> None:
    command = [*script, "--workdir", str(tmp_path / "run"), "--devices", "3"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("devices")), "")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert line == "devices 3\n", said
    assert process.returncode == code
    assert "Resume with: python -m experiments.toy --workdir" in said and "Traceback" not in said
    assert list((tmp_path / "run").glob("first-*/artefact.json"))
