"""Reading a stored teacher in random batches: our column, an Arrow data set, and bare memory maps.

All three hold the same made-up top-64 records. The memory map is what the disk cache can give: the
rows of a batch copied as they lie, nothing put in its place. The Arrow data set is how distillation
toolkits keep logits: a row of nested lists per example, read as numpy arrays.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Settings, Side, alternate
from benchmarks.report import report
from benchmarks.turn import Turn
from w2s_jax.data import teachers
from w2s_jax.types import Table

TOP, VOCAB, LENGTH, BATCH = 64, 151_936, 256, 32


def run(settings: Settings) -> dict[str, Any]:
    """Ratios are CPU seconds per prediction over those of our column."""
    rows, batches = (128, 4) if settings.tiny else (2048, 32)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        store(Path(root), rows)
        common = {"root": root, "rows": rows}
        needs = {"arrow": ("datasets",)}
        names = {"memory map": "mapped", "Arrow data set": "arrow", "ours": "ours"}
        sides = [
            Side(name, f"benchmarks.b19:{of}", common, needs.get(of, ()))
            for name, of in names.items()
        ]
        results = alternate(sides, settings, steps=batches)
    facts: dict[str, Any] = {"top": TOP, "vocab": VOCAB, "length": LENGTH, "batch": BATCH}
    facts["rows"] = rows
    return report("B19", results, settings, unit="predictions", **facts)


def made(rows: int) -> tuple[Table, dict[str, np.ndarray]]:
    """A table whose every place but the first is predicted, and what a teacher might say of it."""
    rng = np.random.default_rng(0)
    shape = (rows, LENGTH)
    mask = np.ones(shape, np.float32)
    mask[:, 0] = 0
    table = Table({"tokens": rng.integers(0, VOCAB, shape).astype(np.int32), "mask": mask})
    wide = (rows, LENGTH, TOP)
    said = {
        "ids": rng.integers(0, VOCAB, wide, np.int32),
        "logits": -5 - rng.random(wide, np.float32),
        "tail": rng.random(shape, np.float32),
    }
    return table, said


def store(root: Path, rows: int) -> None:
    """The three stores of the same records."""
    table, said = made(rows)
    kept = teachers.predicted(table.batch(np.arange(rows)))

    def make(spans: Any) -> Any:
        for begin, end in spans:
            yield begin, kept[begin:end], {name: part[begin:end] for name, part in said.items()}

    about = teachers.About("made up", VOCAB, TOP)
    teachers.write(root / "ours", table, about, make, say=lambda line: None)
    record = np.dtype([("ids", "<i4", TOP), ("logits", "<f2", TOP), ("tail", "<f4")])
    flat = np.zeros((rows, LENGTH), record)
    for name, part in said.items():
        flat[name] = part
    np.save(root / "mapped.npy", flat)
    with contextlib.suppress(ImportError):
        import datasets

        columns = {"ids": said["ids"], "logits": said["logits"].astype(np.float16)}
        datasets.Dataset.from_dict(
            {**columns, "tail": said["tail"]},
            features=datasets.Features(
                ids=datasets.Array2D((LENGTH, TOP), "int32"),
                logits=datasets.Array2D((LENGTH, TOP), "float16"),
                tail=datasets.Sequence(datasets.Value("float32")),
            ),
        ).save_to_disk(str(root / "arrow"))


def _serve(turn: Turn, rows: int, read: Any) -> None:
    rng = np.random.default_rng(1)

    def block(steps: int) -> dict[str, float]:
        for _ in range(steps):
            read(rng.permutation(rows)[:BATCH])
        return {"units": float(steps * BATCH * (LENGTH - 1))}

    block(1)
    turn.serve(block)


def ours(turn: Turn, root: str, rows: int) -> None:
    """The column as ``fit`` asks for it."""
    table = teachers.read(Path(root) / "ours", made(rows)[0])
    _serve(turn, rows, lambda index: table.batch(index)["teacher"])


def mapped(turn: Turn, root: str, rows: int) -> None:
    """The records of the rows, copied as they lie."""
    flat = np.load(Path(root) / "mapped.npy", mmap_mode="r")
    _serve(turn, rows, lambda index: flat[index])


def arrow(turn: Turn, root: str, rows: int) -> None:
    """A data set on disk with numpy arrays as its format."""
    import datasets

    found = datasets.load_from_disk(str(Path(root) / "arrow")).with_format("numpy")
    _serve(turn, rows, lambda index: found[index.tolist()])
