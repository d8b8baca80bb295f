"""GPU: many small runs as one program against the same runs one by one: probes, a small decoder."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks import gpu, world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.report import report, several
from benchmarks.turn import Turn


def run(settings: Settings) -> dict[str, Any]:
    """64 probes of 128 hidden units; 8 decoders of about 5 million weights, 50 updates each."""
    settings, facts = gpu.required("B16", settings)
    env = {} if settings.tiny else gpu.AUTO
    hidden, runs, steps = settings.size((128, 64, 200), tiny=(16, 4, 3))
    probe = {"hidden": hidden, "steps": steps, "runs": runs}
    small = replace(world.Shape(), vocab=4096, layers=4)
    shape = asdict(settings.size(small, tiny=world.TINY))
    many, updates = settings.size((8, 50), tiny=(2, 2))
    decoder = {"runs": many, "steps": updates, "shape": shape}
    cases = {
        "probes": (
            Side("one by one", "benchmarks.b08:ours_serial", probe, env=env, units=runs),
            Side("ours", "benchmarks.b08:ours", probe, env=env, units=runs),
        ),
        "decoder": (
            Side("one by one", "benchmarks.b16:decoders", decoder | {"at_once": 1}, env=env),
            Side("ours", "benchmarks.b16:decoders", decoder | {"at_once": many}, env=env),
        ),
    }
    found = {}
    for name, sides in cases.items():
        print(name)
        results = alternate(sides, settings, steps=1)
        agree = {"accuracy": 2e-3, "loss": 1e-3}
        how = {"unit": "runs", "keys": ("wall", "cpu"), "agree": agree}
        found[name] = report("B16", results, settings, **how, **facts)
    return several(found)


def decoders(turn: Turn, runs: int, steps: int, shape: dict[str, Any], at_once: int) -> None:
    """Decoders from different seeds on random tokens; ``at_once`` of them in a program."""
    import jax

    from w2s_jax.models.transformer import transformer
    from w2s_jax.objectives import language
    from w2s_jax.train.optim import Tune
    from w2s_jax.train.population import population
    from w2s_jax.types import Table

    model = transformer(world.config(world.Shape(**shape)))
    length = 64
    rng = np.random.default_rng(0)
    tokens = rng.integers(world.FIRST, shape["vocab"], (128, length), np.int32)
    table = Table({"tokens": tokens, "mask": np.ones((128, length), np.float32)})
    tune, objective = Tune(batch=8, steps=steps), language(model)

    def block(count: int) -> dict[str, float]:
        last = []
        for start in range(0, runs * count, at_once):
            seeds = [seed % runs for seed in range(start, start + at_once)]
            done = population(objective, model.init, table, tune, seeds)
            last += done.metrics["loss"][:, -1].tolist()
        return {"units": float(runs * count), "loss": float(np.mean(last))} | gpu.peak()

    jax.block_until_ready(jax.numpy.zeros(()))
    turn.serve(block, loss=block(1)["loss"])
