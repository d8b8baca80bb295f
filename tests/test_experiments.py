"""Every experiment's tiny preset by its real command line, and the promises of docs/design.md."""

import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import papers

ROOT = Path(__file__).resolve().parents[1]
PAPERS = papers(ROOT / "experiments")
NAMES = [paper["name"] for paper in PAPERS]
CLAIM = {"name", "holds", "statistic", "value", "interval", "level", "seeds"}


def command(name: str, folder: Path, *more: str) -> list[str]:
    flags = ["--preset", "tiny", "--workdir", str(folder), *more]
    return [sys.executable, "-W", "error", "-m", f"experiments.{name}", *flags]


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Two devices, and a compilation cache that the runs of this session share."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("xla"))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache}


def go(environment, name: str, folder: Path, *more: str) -> str:
    done = subprocess.run(
        command(name, folder, *more), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def check_claim(claim: dict) -> None:
    assert claim.keys() == CLAIM
    assert isinstance(claim["holds"], bool) and claim["name"] and claim["statistic"]
    low, high = claim["interval"]
    assert 0 < claim["level"] < 1 and claim["seeds"] >= 1
    if None not in (low, high, claim["value"]):
        assert low <= claim["value"] <= high


def check_figure(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) >= 200
    assert np.any(np.abs(pixels - pixels[0, 0]) > 0.1, axis=-1).mean() > 0.01, f"{path} is blank"
    assert len(path.with_suffix(".csv").read_text().splitlines()) > 1


@pytest.mark.parametrize("name", NAMES)
def test_tiny_preset_keeps_the_promises(name, environment, tmp_path) -> None:
    shown = go(environment, name, tmp_path)
    rows = results(tmp_path)
    assert rows and all(isinstance(v, str | int | float | None) for r in rows for v in r.values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"paper", "preset", "minutes", "claims", "figures"}
    assert (summary["paper"], summary["preset"]) == (name, "tiny")
    assert summary["figures"]
    assert summary["claims"] or name == "pretrain_nano"  # one rung is no ladder yet
    for claim in summary["claims"]:
        check_claim(claim)
        assert claim["name"] in shown
    for figure in summary["figures"]:
        check_figure(tmp_path / figure)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["paper"] == name and "jax" in config["versions"]
    assert str(tmp_path / "summary.json") in shown
    assert not list(tmp_path.rglob(".*")), "temporary files were left"

    before = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / summary["figures"][0]).unlink()
    assert "drawing again" in go(environment, name, tmp_path)
    assert (tmp_path / summary["figures"][0]).is_file()
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_with_the_same_rows(name, environment, tmp_path) -> None:
    go(environment, name, tmp_path / "whole")
    broken = tmp_path / "broken"
    with subprocess.Popen(
        command(name, broken, "--quiet"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if any(broken.glob("*/artefact.*")) or any(broken.glob("*/checkpoints/*")):
                process.kill()
            time.sleep(0.05)
    go(environment, name, broken)
    assert results(broken) == results(tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag(name, environment) -> None:
    tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text(encoding="utf8"))
    (config,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    told = []
    for field, text in zip(config.body, [*config.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{ast.unparse(field)} has no docstring"
            told.append(ast.literal_eval(text.value))
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"],
        cwd=ROOT,
        env={**environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "--preset tiny" in done.stdout
    words = " ".join(re.sub("[│╭╰─]", " ", done.stdout).split())
    assert all(" ".join(text.split()[:4]) in words for text in told)


def test_the_list_names_every_paper_without_importing_one() -> None:
    code = (
        "import runpy, sys\nrunpy.run_module('experiments', run_name='__main__')\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for paper in PAPERS:
        assert paper["name"] in done.stdout and paper["about"] in done.stdout
        assert paper["minutes"] is not None and math.isfinite(paper["minutes"])


def test_the_page_of_papers_agrees_with_the_files() -> None:
    page = (ROOT / "docs" / "papers.md").read_text()
    running = re.findall(r"`(\w+)` \| runs", page)
    assert sorted(running) == sorted(NAMES)
    assert len(set(re.findall(r"arxiv.org/abs/[\d.]+", page))) == 42
