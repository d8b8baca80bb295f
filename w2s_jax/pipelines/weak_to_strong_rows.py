"""What is reported of a supervisor, a student and a ceiling: one row per seed, and their curves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from w2s_jax.metrics.classification import accuracy, auroc, brier, ece, reliability
from w2s_jax.metrics.gap import agreement, agreement_on_errors, median_pgr, pgr
from w2s_jax.pipelines.weak_to_strong import Learned, Side
from w2s_jax.train.log import Log
from w2s_jax.types import Row

if TYPE_CHECKING:
    from w2s_jax.pipelines.study import Study


def compare(
    study: Study,
    block: str,
    models: tuple[Side, Side],
    loss: str,
    runs: tuple[Learned, Learned, Learned],
    **also: str | int,
) -> Iterator[Row]:
    """One row per seed: what supervisor, student and ceiling reach on the test rows.

    Args:
      models: the weak and the strong side.
      runs: supervisors, students and ceilings, [S] each.
      also: further columns of every row.
    """
    weak, strong = models
    taught, student, ceiling = runs
    dev, final = study.dev, study.truth[study.dev :]
    for i, seed in enumerate(study.seeds):
        teacher, pupil, top = (one.test[i][dev:] for one in runs)
        scores = [accuracy(said, final) for said in (teacher, pupil, top)]
        curve, top_curve = ([accuracy(p[dev:], final) for p in r.curve[i]] for r in runs[1:])
        honest = [agreement(p[:dev], taught.test[i][:dev]) for p in student.curve[i]]
        peak = curve[_best_on_dev(study, student.curve[i])]
        yield dict(
            block=block,
            weak=weak.name,
            student=strong.name,
            weak_size=weak.size,
            student_size=strong.size,
            loss=loss,
            seed=int(seed),
            weak_accuracy=scores[0],
            student_accuracy=scores[1],
            ceiling_accuracy=scores[2],
            gap=scores[2] - scores[0],
            pgr=pgr(*scores),
            agreement=agreement(pupil, teacher),
            error_agreement=agreement_on_errors(pupil, teacher, final),
            ceiling_error_agreement=agreement_on_errors(top, teacher, final),
            auroc=auroc(pupil, final),
            ece=ece(pupil, final),
            weak_ece=ece(teacher, final),
            brier=brier(pupil, final),
            honest_stop=curve[int(np.argmax(honest))],
            cheating_stop=peak,
            fall=peak - scores[1],
            ceiling_fall=top_curve[_best_on_dev(study, ceiling.curve[i])] - scores[2],
            **also,
        )


def _best_on_dev(study: Study, curve: np.ndarray) -> int:
    """The first point of a run's curve [P,N,C] that is most often right on the dev rows."""
    truth = study.truth[: study.dev]
    return int(np.argmax([accuracy(point[: study.dev], truth) for point in curve]))


def curves(
    study: Study,
    models: tuple[Side, Side],
    loss: str,
    runs: tuple[Learned, Learned, Learned],
) -> Iterator[Row]:
    """Accuracy and agreement over training, and the calibration of trained student and supervisor.

    Args: as for ``compare``. The rows are those of the blocks "curve" (seed and step) and
    "reliability" (role and bin, the test rows of all seeds together).
    """
    weak, strong = models
    taught, student, ceiling = runs
    truth, dev = study.truth[study.dev :], study.dev
    names = dict(weak=weak.name, student=strong.name, loss=loss)
    for i, seed in enumerate(study.seeds):
        teacher = taught.test[i][dev:]
        for k, step in enumerate(student.steps):
            said, top = student.curve[i][k][dev:], ceiling.curve[i][k][dev:]
            yield names | dict(
                block="curve",
                seed=int(seed),
                step=int(step),
                accuracy=accuracy(said, truth),
                agreement=agreement(said, teacher),
                ceiling_accuracy=accuracy(top, truth),
            )
    for role, test in (("student", student.test), ("weak", taught.test)):
        for row in _reliability(truth, [said[dev:] for said in test]):
            yield names | dict(block="reliability", role=role) | row


def _reliability(truth: np.ndarray, test: Sequence[np.ndarray]) -> list[Row]:
    return reliability(np.concatenate(test), np.tile(truth, len(test)))


def logged(rows: Iterable[Row], workdir: Path, track: Sequence[str]) -> Iterator[Row]:
    """The rows as they come; at the end the training curves among them, of all runs together,
    go to ``metrics.jsonl`` and the trackers: one line per number of updates."""
    lines: dict[int, dict[str, float]] = {}
    for row in rows:
        yield row
        if row["block"] == "curve":
            models = f"{Path(row['weak']).name}-{Path(row['student']).name}"
            name = f"{models}-{row['loss']}-seed{row['seed']}"
            kinds = ("accuracy", "agreement", "ceiling_accuracy")
            lines.setdefault(row["step"], {}).update({f"{name}/{k}": row[k] for k in kinds})
    with contextlib.closing(Log(workdir, track)) as log:
        for step in sorted(lines):
            log.write(step, lines[step])


def summary(rows: list[Row]) -> list[Row]:
    """Per block, pair, loss and setting: accuracies (means over seeds) and the PGR of the means."""
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        if "student_accuracy" in r:
            setting = r.get("method", r.get("labels", ""))
            key = (r["block"], setting, Path(r["weak"]).name, Path(r["student"]).name, r["loss"])
            groups.setdefault(key, []).append(r)
    table = []
    for key, mine in groups.items():
        names = dict(zip(("block", "setting", "weak", "student", "loss"), key, strict=True))
        roles = ("weak_accuracy", "student_accuracy", "ceiling_accuracy")
        mean = {role: float(np.mean([r[role] for r in mine])) for role in roles}
        found = median_pgr(*([v] for v in mean.values()))
        table.append({**names, **mean, "pgr": found.value, "seeds": len(mine)})
    return table
