"""Adapters in the folder layout of the ``peft`` package: ``adapter_config.json`` and one file.

PEFT keeps A as [r, in] and B as [out, r] per layer under the names of the model's own modules.
GPT-2 fuses q, k and v in one module: there our three adapters of rank r become one of rank 3r whose
B is block-diagonal, which is the same map.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.models.config import Config
from w2s_jax.models.families import Tensor, weights
from w2s_jax.models.lora import TARGETS, Adapted, lora
from w2s_jax.models.transformer import shapes
from w2s_jax.types import Model, Params
from w2s_jax.workdir import write

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options that change the map; what each must be for ours to be the same.
_FIXED = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
}


def export_adapter(
    model: Adapted, adapters: Params, path: str | Path, *, base: str | None = None
) -> Path:
    """Write the adapters (``params["lora"]``) into a folder that ``peft`` reads; returns it.

    Args:
      base: the base's name or folder, for ``base_model_name_or_path``.

    Raises:
      UserError: adapters of a classifier, or a folder that cannot be written.
    """
    from safetensors.numpy import save

    config = _decoder(model)
    path, tensors = Path(path), dict(_tensors(model, config, adapters))
    try:
        write(path / TENSORS, save(tensors, metadata={"format": "pt"}))
        write(path / CONFIG, json.dumps(_settings(model, config, base), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the adapter to {path}: {error.strerror}") from None
    return path


def load_adapter(path: str | Path, model: Model) -> tuple[Adapted, Params]:
    """``model`` with the adapters of a PEFT folder, and those adapters (float32).

    Modules of different ranks get the largest, filled up with zeros; a module's own scale goes into
    its ``b``. Both leave the map as it was.

    Raises:
      UserError: no or corrupt files, an option that changes the map (DoRA, trained biases, saved
        modules), or tensors that do not fit ``model``.
    """
    folder, config = Path(path), _decoder(model)
    settings, stored = _read_settings(folder / CONFIG), _read_tensors(folder / TENSORS)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    used: set[str] = set()
    for leaf, tensor in _modules(config).items():
        names = [tensor.name.format(i) for i in range(config.layers)]
        found = [name for name in names if f"{name}.lora_A.weight" in stored]
        if not found:
            continue
        pair = _pair(stored, folder, names, tensor, leaf, config, settings)
        if pair[0].any():  # a part of a fused module that was not adapted is zero
            pairs[leaf] = pair
        used |= {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    extra = sorted(set(stored) - used)
    if extra or not pairs:
        what = f"tensors such as {extra[0]} do not belong" if extra else "no tensor belongs"
        raise UserError(
            f"{folder}: {what} to the projections of this {config.family} model of "
            f"{config.layers} layers; the adapter is for another model"
        )
    rank = max(a.shape[-1] for a, _ in pairs.values())
    adapted = lora(model, rank, alpha=settings["lora_alpha"], targets=tuple(pairs))
    scale = adapted.alpha / rank
    return adapted, {
        leaf: {
            "a": jnp.asarray(np.pad(a, [(0, 0), (0, 0), (0, rank - a.shape[-1])])),
            "b": jnp.asarray(np.pad(b / scale, [(0, 0), (0, rank - b.shape[1]), (0, 0)])),
        }
        for leaf, (a, b) in pairs.items()
    }


def _decoder(model: Model) -> Config:
    if not isinstance(model.config, Config):
        raise UserError("the PEFT layout is for adapters of a decoder, not of a classifier on one")
    return model.config


def _modules(config: Config) -> dict[str, Tensor]:
    """Where each projection lies, under the module's name (a tensor's without ``.weight``)."""
    return {
        leaf.removeprefix("layers/"): Tensor(
            tensor.name.removesuffix(".weight"), tensor.transposed, tensor.block
        )
        for leaf, tensor in weights(config).items()
        if leaf.removeprefix("layers/") in TARGETS
    }


def _tensors(model: Adapted, config: Config, adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor of ``adapter_model.safetensors``."""
    modules = _modules(config)
    for name in dict.fromkeys(modules[leaf].name for leaf in model.targets):
        parts = [leaf for leaf in modules if modules[leaf].name == name]
        for i in range(config.layers):
            pairs = [_layer(model, config, adapters, leaf, i) for leaf in parts]
            a = np.concatenate([a for a, _ in pairs], axis=1)
            b = np.zeros((a.shape[1], sum(b.shape[1] for _, b in pairs)), np.float32)
            for k, (_, block) in enumerate(pairs):
                rows, columns = block.shape
                b[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = block
            full = _PREFIX + name.format(i)
            yield f"{full}.lora_A.weight", np.ascontiguousarray(a.T)
            yield f"{full}.lora_B.weight", np.ascontiguousarray(b.T)


def _layer(
    model: Adapted, config: Config, adapters: Params, leaf: str, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """``a`` [in, r] and ``b`` [r, out] of layer ``i``; zero where the leaf is not adapted."""
    if leaf in model.targets:
        a, b = (np.asarray(adapters[leaf][side][i], np.float32) for side in "ab")
        return a, b
    _, source, target = shapes(config)["layers"][leaf].shape
    return np.zeros((source, model.rank), np.float32), np.zeros((model.rank, target), np.float32)


def _settings(model: Adapted, config: Config, base: str | None) -> dict[str, Any]:
    modules = _modules(config)
    mine = {modules[leaf].name: modules[leaf].block[1] for leaf in model.targets}
    short = {name: _short(name, [t.name for t in modules.values()]) for name in mine}
    fused = {short[name]: count for name, count in mine.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.rank,
        "lora_alpha": int(model.alpha) if model.alpha == int(model.alpha) else model.alpha,
        "target_modules": list(short.values()),
        "rank_pattern": {name: count * model.rank for name, count in fused.items()},
        "alpha_pattern": {name: count * model.alpha for name, count in fused.items()},
        "fan_in_fan_out": not any(modules[leaf].transposed for leaf in model.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def _short(name: str, names: list[str]) -> str:
    """The end of a module's name that says which it is: "q_proj", or "attn.c_proj" in GPT-2."""
    last = name.rsplit(".", 1)[-1]
    same = {other for other in names if other.rsplit(".", 1)[-1] == last}
    return last if len(same) == 1 else ".".join(name.split(".")[-2:])


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {CONFIG}; is it an adapter folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object")
    for key, allowed in _FIXED.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(f"{path}: {key}={settings[key]!r} is not supported")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: {key} must be a positive number, got {value!r}")
    return settings


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by the module's own name, as stored."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name.removeprefix(_PREFIX): np.asarray(file.get_tensor(name)) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: save the adapter as safetensors") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}): download or export it again"
        ) from None


def _pair(
    stored: Mapping[str, np.ndarray],
    folder: Path,
    names: list[str],
    tensor: Tensor,
    leaf: str,
    config: Config,
    settings: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """``a`` [L, in, R] and the scaled ``b`` [L, R, out] of a leaf."""
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    _, source, target = shapes(config)["layers"][leaf].shape
    block, count = tensor.block
    for name in names:
        keys = [f"{name}.lora_{side}.weight" for side in "AB"]
        missing = [key for key in keys if key not in stored]
        if missing:
            raise UserError(f"{folder}: the adapter lacks tensor {_PREFIX}{missing[0]}")
        a, b = (stored[key].astype(np.float32) for key in keys)
        rank = a.shape[0]
        if a.shape != (rank, source) or b.shape != (target * count, rank):
            raise UserError(
                f"{folder}: the tensors of {name} are {a.shape} and {b.shape}, the model needs "
                f"({rank}, {source}) and ({target * count}, {rank}); the adapter is for another one"
            )
        alpha = _pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        a, b = _own_block(a, b, block, count)
        lines.append((a.T, b.T * np.float32(scale)))
    if len({a.shape for a, _ in lines}) > 1:
        raise UserError(f"{folder}: the layers of {leaf!r} have different ranks: not supported")
    return np.stack([a for a, _ in lines]), np.stack([b for _, b in lines])


def _own_block(
    a: np.ndarray, b: np.ndarray, block: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """A fused module's A [R, in] and B [n * out, R] for one of its n blocks of rows.

    Where B is block-diagonal (as ``export_adapter`` writes it) the rank is cut to the block's.
    """
    if count == 1:
        return a, b
    rows, rank = b.shape[0] // count, a.shape[0] // count
    mine = b[block * rows : (block + 1) * rows]
    diagonal = a.shape[0] % count == 0 and all(
        not b[i * rows : (i + 1) * rows, j * rank : (j + 1) * rank].any()
        for i in range(count)
        for j in range(count)
        if i != j
    )
    if not diagonal:
        return a, mine
    own = slice(block * rank, (block + 1) * rank)
    return a[own], mine[:, own]


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
