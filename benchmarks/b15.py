"""GPU: tokens generated a second at 0.5B and 3B, bfloat16, 256 rows of 512 + 256 tokens."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import gpu
from benchmarks.harness import Settings, Side, alternate, chosen
from benchmarks.report import machine, summary
from benchmarks.turn import Turn
from benchmarks.world import FIRST


def run(settings: Settings) -> dict[str, Any]:
    """Greedy, no end token: every row makes all its tokens. Reading the prompts is included."""
    settings, facts = gpu.required("B15", settings)
    task = settings.size(
        {"rows": 256, "prompt": 512, "new": 256}, tiny={"rows": 2, "prompt": 8, "new": 4}
    )
    env, found = {} if settings.tiny else gpu.AUTO, {}
    units = float(task["rows"] * task["new"])
    every = [
        Side(size, "benchmarks.b15:decode", {"size": size, "tiny": settings.tiny, **task}, env=env)
        for size in settings.size(("0.5B", "3B"), tiny=("0.5B",))
    ]
    for side in chosen(every, settings):
        (result,) = alternate([side], settings, steps=1)
        found[side.name] = summary(result, ("wall",))
        if not result.error:
            rates = [units / row["wall"] for row in result.rows]
            found[side.name] |= {
                "tokens_per_s": round(statistics.median(rates)),
                "spread": [round(min(rates)), round(max(rates))],
            }
        print(f"{side.name:6}", found[side.name].get("tokens_per_s") or found[side.name])
    return {"benchmark": "B15", "cases": found, **task, **facts, **machine(settings)}


def decode(turn: Turn, size: str, tiny: bool, rows: int, prompt: int, new: int) -> None:
    """``sample`` over all prompts at once."""
    import jax
    import numpy as np

    from w2s_jax.generate.sample import sample
    from w2s_jax.models.transformer import transformer

    config = gpu.config(size, tiny, param_dtype="bfloat16")
    model, key = transformer(config), jax.random.key(0)
    params = model.init(key)
    ids = np.random.default_rng(0).integers(FIRST, config.vocab, (rows, prompt)).tolist()

    def block(steps: int) -> dict[str, float]:
        for _ in range(steps):
            drawn = sample(model, params, ids, key, tokens=new, temperature=0.0, batch=rows)
            assert all(len(row) == new for row in drawn)
        return gpu.peak()

    block(1)
    turn.serve(block)
