"""GPU: the vocabulary head's loss, 16,384 tokens x 248,320 x 2,048 in bfloat16: ms and peak GB."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu import AUTO, peak, required
from benchmarks.harness import Settings, Side, alternate
from benchmarks.report import report
from benchmarks.turn import Turn

# huggingface/trl pull request 6858, one H100, the same sizes: milliseconds and GB
PUBLISHED = {
    "Cut Cross-Entropy": [92.6, 3.09],
    "one product": [137.0, 47.6],
    "chunked": [224.0, 19.7],
    "Liger": [321.0, 6.05],
}


def run(settings: Settings) -> dict[str, Any]:
    """Forward and backward of ``token_nll`` (gradient in the forward) and of ``token_logps``."""
    settings, facts = required("B13", settings)
    size = settings.size(
        {"tokens": 16_384, "vocab": 248_320, "width": 2_048},
        tiny={"tokens": 64, "vocab": 512, "width": 16},
    )
    env = {} if settings.tiny else AUTO
    sides = [
        Side(name, "benchmarks.b13:head", size | {"name": name}, env=env)
        for name in ("token_logps", "token_nll")
    ]
    results = alternate(sides, settings, steps=settings.size(20, tiny=1))
    best = {"ours": "token_nll", "keys": ("wall", "cpu"), "agree": {"loss0": 1e-3}}
    facts |= {"published_ms_gb": PUBLISHED, **size}
    return report("B13", results, settings, unit="passes", **best, **facts)


def head(turn: Turn, name: str, tokens: int, vocab: int, width: int) -> None:
    """Gradients in the hidden states and the matrix, of the sum over all tokens."""
    import jax
    import jax.numpy as jnp

    from w2s_jax.losses import sequence

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16)
    unembed = jax.random.normal(keys[1], (width, vocab), jnp.bfloat16) * width**-0.5
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocab)
    ones = jnp.ones((1, tokens), jnp.float32)

    def loss(hidden: Any, unembed: Any):
        if name == "token_nll":
            return sequence.token_nll(hidden, unembed, targets, ones)[0]
        return -sequence.token_logps(hidden, unembed, targets, ones).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    begun = time.perf_counter()
    value = jax.block_until_ready(step(hidden, unembed))[0]

    def block(steps: int) -> dict[str, float]:
        for _ in range(steps):
            out = step(hidden, unembed)
        jax.block_until_ready(out)
        return peak()

    turn.serve(block, loss0=float(value) / tokens, first_step=time.perf_counter() - begun)
