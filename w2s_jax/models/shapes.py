"""Published architectures by name, so that a step can be planned without weights or a network.

Facts from the models' config.json on the Hugging Face hub (meta-llama, Qwen, allenai,
openai-community); the tests hold their parameter counts to the published ones.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from w2s_jax.errors import UserError
from w2s_jax.models import hf
from w2s_jax.models.config import Config, RopeScaling
from w2s_jax.models.families import from_hf_config


def _llama(width: int, layers: int, heads: int, ffn: int, factor: float, tie: bool) -> Config:
    return Config(
        vocab=128_256,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        ffn=ffn,
        rope=500_000.0,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        tie=tie,
        max_length=131_072,
    )


def _llama2(width: int, layers: int, heads: int, kv_heads: int, ffn: int, length: int) -> Config:
    return Config(
        vocab=32_000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        rope=10_000.0,
        tie=False,
        max_length=length,
    )


def _qwen(width: int, layers: int, heads: int, groups: int, ffn: int, **more: Any) -> Config:
    traits = dict(vocab=151_936, bias="qkv", eps=1e-6, rope=1e6, max_length=32_768, family="qwen2")
    sizes = dict(width=width, layers=layers, heads=heads, kv_heads=groups, ffn=ffn)
    return Config(**{**sizes, **traits, **more})


def _qwen3(width: int, layers: int, heads: int, ffn: int, **more: Any) -> Config:
    traits = dict(bias="none", qk_norm="head", head_dim=128, max_length=40_960, family="qwen3")
    return _qwen(width, layers, heads, 8, ffn, **{**traits, **more})


def _olmo(width: int, layers: int, heads: int, ffn: int) -> Config:
    return Config(
        vocab=100_352,
        width=width,
        layers=layers,
        heads=heads,
        ffn=ffn,
        placement="post",
        qk_norm="all",
        eps=1e-6,
        rope=500_000.0,
        tie=False,
        max_length=4096,
        family="olmo2",
    )


def _gpt2(width: int, layers: int, heads: int) -> Config:
    return Config(
        vocab=50_257,
        width=width,
        layers=layers,
        heads=heads,
        activation="gelu",
        norm="layer",
        rope=0.0,
        bias="all",
        max_length=1024,
        family="gpt2",
    )


SHAPES: dict[str, Config] = {
    "tinyllama-1.1b": _llama2(2048, 22, 32, 4, 5632, 2048),
    "llama-2-7b-hf": _llama2(4096, 32, 32, 32, 11_008, 4096),
    "llama-2-13b-hf": _llama2(5120, 40, 40, 40, 13_824, 4096),
    "llama-3.1-8b": _llama(4096, 32, 32, 14_336, 8.0, tie=False),
    # Llama 3.1 8B with a padding token, its rows rounded up to a multiple of 8
    "llama-3.1-tulu-3-8b-sft": replace(_llama(4096, 32, 32, 14_336, 8.0, tie=False), vocab=128_264),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, 32.0, tie=True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, 32.0, tie=True),
    "qwen2.5-0.5b": _qwen(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen(1536, 28, 12, 2, 8960, max_length=131_072),
    "qwen2.5-3b": _qwen(2048, 36, 16, 2, 11_008),
    "qwen2.5-7b": _qwen(3584, 28, 28, 4, 18_944, vocab=152_064, tie=False, max_length=131_072),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tie=False),
    "olmo-2-7b": _olmo(4096, 32, 32, 11_008),
    "olmo-2-13b": _olmo(5120, 40, 40, 13_824),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}


def shape(name: str) -> Config:
    """The architecture of a published name (any case, with or without its owner), of a model
    folder or a shipped model, or of a config.json; nothing is downloaded.

    Raises:
      UserError: a name that is none of these, or a config.json that cannot be read.
    """
    path = Path(name)
    if path.suffix == ".json":
        try:
            return from_hf_config(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    if path.is_dir() or name.startswith("nano-"):
        return hf.read_config(hf.locate(name))
    key = name.rsplit("/", 1)[-1].lower()
    key = key if key in SHAPES else key.removesuffix("-instruct")  # trained on, not changed
    if key not in SHAPES:
        near = difflib.get_close_matches(key, SHAPES, n=1, cutoff=0.4)
        hint = f"perhaps {near[0]}; " if near else ""
        raise UserError(
            f"no architecture named {name!r}: {hint}known are {', '.join(SHAPES)}; "
            "or give the path of a config.json"
        )
    return SHAPES[key]
