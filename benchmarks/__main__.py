"""``python -m benchmarks``: the list; ``python -m benchmarks B2``: one of them; ``all``: each."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Settings
from w2s_jax.errors import UserError

HERE = Path(__file__).resolve().parent


def listing() -> dict[str, str]:
    """Name and first docstring line of every benchmark, without importing any."""
    found = {}
    for path in sorted(HERE.glob("b[0-9][0-9].py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        found[f"B{int(path.stem[1:])}"] = text.split("\n")[0]
    return found


def parser() -> argparse.ArgumentParser:
    """The flags: one per field of ``Settings``."""
    lines = [f"  {name:4} {line}" for name, line in listing().items()]
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="The last line printed is JSON with both figures, the ratio and its spread.",
        epilog="benchmarks:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("which", nargs="?", help="B1, B2, ... or all; nothing lists them")
    made.add_argument("--threads", type=int, default=1, help="cores of every contender")
    made.add_argument("--blocks", type=int, default=0, help="turns of every contender (5)")
    made.add_argument("--vocab", type=int, default=32_000, help="vocabulary of the model")
    made.add_argument("--quick", action="store_true", help="fewer, smaller blocks: a look only")
    made.add_argument("--tiny", action="store_true", help="toy sizes: shows only that it runs")
    made.add_argument("--sides", default="", help="contenders to run, by the start of their names")
    return made


def one(name: str, settings: Settings) -> dict[str, Any]:
    """Run a benchmark in this process.

    Raises:
      UserError: there is none of that name; a contender failed.
    """
    names = listing()
    if name not in names:
        raise UserError(f"no benchmark {name}; there are {', '.join(names)} and all")
    return importlib.import_module(f"benchmarks.b{int(name[1:]):02d}").run(settings)


def everything(settings: Settings) -> dict[str, Any]:
    """Each benchmark in a process of its own; what one prints last, or the line it failed with."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            flags += [f"--{field.name}"] + ([] if value is True else [str(value)])
    found: dict[str, Any] = {}
    for name in listing():
        print(f"== {name} {listing()[name]}", flush=True)
        command = [sys.executable, "-m", "benchmarks", name, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        print("\n".join(lines[:-1] if done.returncode == 0 else lines[-1:]), flush=True)
        last = lines[-1] if lines else f"ended with code {done.returncode}"
        found[name] = json.loads(last) if done.returncode == 0 else {"failed": last}
    print(f"\n{'':5}{'ratio':>8}  {'spread':17}against")
    for name, line in found.items():
        spread = " .. ".join(f"{x:.2f}" for x in line.get("spread") or [])
        value = f"{line['ratio']:8.2f}" if line.get("ratio") else f"{'-':>8}"
        print(f"{name:5}{value}  {spread:17}{line.get('against') or line.get('failed') or ''}")
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 for a fault said in one line."""
    flags = vars(parser().parse_args(argv))
    which = flags.pop("which")
    if which is None:
        for name, line in listing().items():
            print(f"{name:4} {line}")
        return 0
    try:
        settings = Settings(**flags)
        name = which.upper()
        line = everything(settings) if name == "ALL" else one(name, settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
