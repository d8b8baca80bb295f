"""What the GPU benchmarks share: asking for one, its memory, and published shapes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from benchmarks.harness import Settings, call
from benchmarks.turn import Turn
from w2s_jax.errors import UserError

# JAX_PLATFORMS of the contenders: empty lets JAX take the GPU
AUTO = {"JAX_PLATFORMS": ""}

# Qwen2.5 (0.5B, 1.5B, 3B) and Llama 3.1 (8B), as their config.json say
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"width": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ffn": 4864},
    "1.5B": {"width": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "ffn": 8960},
    "3B": {"width": 2048, "layers": 36, "heads": 16, "kv_heads": 2, "ffn": 11008},
    "8B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336},
    "tiny": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64},
}
QWEN = {"vocab": 151_936, "bias": "qkv", "rope": 1e6, "eps": 1e-6, "family": "qwen2"}
LLAMA = {"vocab": 128_256, "tie": False, "rope": 5e5}


def required(name: str, settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """Settings and facts for a machine with a GPU; with ``--tiny`` a CPU does.

    Raises:
      UserError: there is no GPU.
    """
    threads = max(settings.threads, min(4, os.cpu_count() or 1))
    if settings.tiny:
        return settings, {"device": "cpu"}
    settings = replace(settings, threads=threads)
    found = call("benchmarks.gpu:device", settings, AUTO)
    if found["platform"] != "gpu":
        raise UserError(f"{name} needs a GPU and JAX sees none here; --tiny shows that it runs")
    return settings, {"device": found["kind"]}


def device(turn: Turn) -> None:
    """Say what JAX computes on."""
    import jax

    first = jax.devices()[0]
    turn.ready(platform=first.platform, kind=first.device_kind)


def peak() -> dict[str, float]:
    """``{"device_gb": ...}``: the most of the first device's memory so far; nothing on a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    most = stats.get("peak_bytes_in_use")
    return {} if most is None else {"device_gb": most / 1e9}


def config(size: str, tiny: bool, **options: Any):
    """The published shape, in bfloat16."""
    from w2s_jax.models.config import Config

    rest = {"max_length": 8192, "dtype": "bfloat16"} | (LLAMA if size == "8B" else QWEN) | options
    if tiny:
        size, rest = "tiny", rest | {"vocab": 256}
    return Config(**{**SHAPES[size], **rest})
