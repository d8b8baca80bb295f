"""``python -m experiments``: every paper with one line and the minutes it takes, importing none."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, TypeGuard


def papers(folder: Path) -> list[dict[str, Any]]:
    """Name, first line and expected minutes of each experiment, read from its source."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf8"))
        call = next((node for node in ast.walk(tree) if _is_main(node)), None)
        if call is None:
            continue
        words = {word.arg: word.value for word in call.keywords}
        about = (ast.get_docstring(tree) or "").splitlines() or [""]
        minutes = words.get("minutes")
        found.append(
            {
                "name": path.stem,
                "about": about[0],
                "minutes": minutes.value if isinstance(minutes, ast.Constant) else None,
            }
        )
    return found


def _is_main(node: ast.AST) -> TypeGuard[ast.Call]:
    """``main(...)`` or ``cli.main(...)``."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("main", "cli.main")


def show() -> None:
    """Print the list."""
    rows = papers(Path(__file__).parent)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        minutes = "" if row["minutes"] is None else f"{row['minutes']:>4g} min  "
        print(f"  {row['name']:<{width}}  {minutes}{row['about']}")
    print("\npython -m experiments.<name> --help explains each; minutes are for two CPU cores")


if __name__ == "__main__":
    show()
