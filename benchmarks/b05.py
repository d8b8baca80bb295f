"""Distillation from a live teacher (forward KL, reverse KL, JSD), against TRL's GKDTrainer."""

from __future__ import annotations

from typing import Any

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.peer import NEEDS
from benchmarks.report import report, several

# TRL's beta: 0 is KL(teacher || student), which we call forward; 1 is KL(student || teacher).
BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}


def run(settings: Settings) -> dict[str, Any]:
    """Student and teacher of one shape; off-policy (lmbda 0) on the same completions."""
    shape, task = world.shape(settings), world.task(settings)
    found = {}
    with world.exported(shape, "student", "teacher") as (student, teacher):
        common = {"folder": student, "teacher": teacher} | task.options()
        for name, beta in BETAS.items():
            print(name)
            theirs = common | {"beta": beta, "threads": settings.threads}
            mine = common | {"beta": beta}
            sides = [
                Side("TRL", "benchmarks.peer:gkd", theirs, NEEDS),
                Side("TRL tuned", "benchmarks.peer:gkd", theirs, NEEDS, tuned=True),
                Side("ours", "benchmarks.ours:kd", mine),
            ]
            results = alternate(sides, settings, steps=task.steps)
            agree = {"loss0": 1e-3}
            found[name] = report("B5", results, settings, unit="rows", agree=agree)
    return several(found) | task.facts(shape)
