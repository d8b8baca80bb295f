"""Every divergence of `distill`, live teacher, beside forward KL; TRL's step beside each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import world
from benchmarks.harness import Result, Settings, Side, alternate
from benchmarks.ours import Run, load, packed
from benchmarks.peer import NEEDS
from benchmarks.report import ratio, report, several
from benchmarks.turn import Turn

BASE = "forward_kl"
# as many at a time as fit in memory together
GROUPS = {
    "mixtures": ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"),
    "adaptive": ("symmetric", "total_variation", "adaptive_kl", "taid"),
    "targets": ("logit_mse", "hinton", "dkd"),
}


def run(settings: Settings) -> dict[str, Any]:
    """Ratios above 1 are what a divergence costs more than forward KL, which each group has again.

    TRL has forward KL, reverse KL and JSD alone: its GKDTrainer, at the cheapest of these (forward
    KL, as in B5), is what every divergence of ours is held against in ``peer_over``.
    """
    shape, task = world.shape(settings), world.task(settings)
    found = {}
    with world.exported(shape, "student", "teacher") as (student, teacher):
        common = {"folder": student, "teacher": teacher} | task.options()
        theirs = common | {"beta": 0.0, "threads": settings.threads}
        for group, names in GROUPS.items():
            print(group)
            sides = [
                Side("TRL", "benchmarks.peer:gkd", theirs, NEEDS),
                Side("TRL tuned", "benchmarks.peer:gkd", theirs, NEEDS, tuned=True),
            ]
            for name in (BASE, *names):
                sides.append(Side(name, "benchmarks.b18:kd", common | {"method": name}))
            results = alternate(sides, settings, steps=task.steps)
            made = report("B18", results, settings, unit="rows", ours=BASE)
            found[group] = {**made, "sides": _beside(made["sides"], results)}
    return several(found) | task.facts(shape)


def _beside(sides: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """``sides``, ours with how many times more a step of each TRL side costs than theirs."""
    ran = [result for result in results if not result.error]
    peers = [result for result in ran if result.side.needs]
    for mine in ran:
        if peers and mine not in peers:
            over = {peer.side.name: ratio(peer, mine) for peer in peers}
            sides[mine.side.name]["peer_over"] = over
            shown = ", ".join(
                f"{name} {said['median']:.2f}x" for name, said in over.items() if said
            )
            print(f"  over {mine.side.name}: {shown}")
    return sides


def kd(
    turn: Turn,
    folder: str,
    teacher: str,
    data: dict[str, Any],
    batch: int,
    method: str,
    drop: int = 3,
) -> None:
    """Our side: ``distill`` from a live teacher with a divergence of ``_divergences``."""
    from w2s_jax.objectives import distill

    rows = world.rows(data["count"], data["vocab"], world.Lengths(**data["lengths"]))
    model, params = load(folder)
    large, frozen = load(teacher)
    objective = distill(
        model, _divergences()[method], teacher=large, targets=method in ("hinton", "dkd")
    )
    run = Run(turn, 1, drop, len(rows))
    run.train(objective, params, model, packed(rows, batch), {"teacher": frozen})


def _divergences() -> dict[str, Callable[..., Any]]:
    """The divergences with the numbers of their papers."""
    from w2s_jax.losses import distillation as made

    return {
        "forward_kl": made.forward_kl,
        "reverse_kl": made.reverse_kl,
        "jsd": partial(made.jsd, beta=0.5),
        "skew_kl": made.skew_kl,
        "skew_reverse_kl": made.skew_reverse_kl,
        "symmetric": partial(made.symmetric, lam=0.9),
        "total_variation": made.total_variation,
        "adaptive_kl": made.adaptive_kl,
        "taid": partial(made.taid, t=0.4),
        "logit_mse": made.logit_mse,
        "hinton": partial(made.hinton, alpha=0.5, temperature=2.0),
        "dkd": partial(made.dkd, beta=0.5),
    }
