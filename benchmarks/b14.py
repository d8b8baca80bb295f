"""GPU: model FLOPs utilisation and peak memory of SFT, DPO and KD at 0.5B, 1.5B, 3B and 8B.

Random weights of the published shapes, rows of 2,048 packed tokens. FLOPs are those of the real
tokens: the head counts predictions only, recomputation nothing, a live teacher its forward pass.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import gpu
from benchmarks.harness import Settings, Side, alternate, chosen
from benchmarks.ours import Run
from benchmarks.report import machine, summary
from benchmarks.turn import Turn
from benchmarks.world import FIRST, Lengths, pairs


@dataclass(frozen=True)
class Case:
    """What is trained and how it is made to fit."""

    kind: str
    size: str
    rows: int = 16
    params: str = "float32"
    moments: str = "float32"
    remat: str = "dots"
    rank: int = 0
    teacher: str = ""
    tiny: bool = False


MIXED = {"params": "bfloat16", "moments": "mixed"}
CASES = {
    "SFT 0.5B": Case("sft", "0.5B"),
    "SFT 1.5B": Case("sft", "1.5B"),
    "SFT 3B": Case("sft", "3B", 8, **MIXED),
    "SFT 8B LoRA": Case("sft", "8B", 8, "bfloat16", remat="attention", rank=16),
    "SFT 8B": Case("sft", "8B", 4, "bfloat16", "bfloat16", "full"),
    "DPO 0.5B": Case("dpo", "0.5B"),
    "DPO 1.5B": Case("dpo", "1.5B"),
    "DPO 3B": Case("dpo", "3B", 8, **MIXED),
    "DPO 8B LoRA": Case("dpo", "8B", 8, "bfloat16", remat="attention", rank=16),
    "DPO 8B": Case("dpo", "8B", 4, "bfloat16", "bfloat16", "full"),
    "KD 0.5B from 3B": Case("kd", "0.5B", teacher="3B"),
    "KD 1.5B from 3B": Case("kd", "1.5B", 8, teacher="3B"),
    "KD 3B from 3B": Case("kd", "3B", 4, **MIXED, teacher="3B"),
}


def run(settings: Settings) -> dict[str, Any]:
    """One case after another, each in a process of its own; ``--sides "DPO 1.5B"`` picks some."""
    settings, facts = gpu.required("B14", settings)
    env = {} if settings.tiny else gpu.AUTO
    found: dict[str, dict[str, Any]] = {}
    every = [
        Side(name, "benchmarks.b14:train", asdict(case) | {"tiny": settings.tiny}, env=env)
        for name, case in CASES.items()
        if not settings.tiny or case.size == "0.5B"
    ]
    for side in chosen(every, settings):
        (result,) = alternate([side], settings, steps=1)
        found[side.name] = summary(result, ("wall",))
        if not result.error:
            found[side.name] |= utilisation(result.rows, result.info)
        told = ("failed", "tokens_per_s", "mfu", "device_gb")
        print(f"{side.name:18}", {k: v for k, v in found[side.name].items() if k in told})
    known = [line["mfu"] for line in found.values() if line.get("mfu")]
    told = {"benchmark": "B14", "mfu": min(known, default=None), "of": "lowest MFU"}
    return told | {"cases": found} | facts | machine(settings)


def utilisation(rows: list[dict[str, Any]], info: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, MFU (None where the peak is not known) and peak GB of the device."""
    seconds = statistics.median(row["wall"] for row in rows)
    share = info["flops"] / seconds / info["peak_flops"] if info["peak_flops"] else None
    return {
        "tokens_per_s": round(info["tokens"] / seconds),
        "mfu": None if share is None else round(share, 4),
        "device_gb": max((row.get("device_gb", 0.0) for row in rows), default=0.0) or None,
    }


def train(turn: Turn, **options: Any) -> None:
    """Epochs of four updates by ``fit``."""
    import jax

    from w2s_jax.models.lora import adapters, lora
    from w2s_jax.models.transformer import transformer
    from w2s_jax.objectives import on_base
    from w2s_jax.train.log import peak_flops

    case = Case(**options)
    config = gpu.config(case.size, case.tiny, param_dtype=case.params, remat=case.remat)
    model, key = transformer(config), jax.random.key(0)
    params, frozen = model.init(key), {}
    if case.rank:
        model = lora(model, case.rank)
        frozen, params = {"base": params}, adapters(model, key)
    tables = data(case, config.vocab)
    objective, flops = _objective(case, model, tables, config, frozen)
    if case.kind == "dpo":
        tables = _referenced(case, model, params, frozen, tables)
    if case.rank:
        objective = on_base(objective)
    kind = jax.devices()[0].device_kind
    info = {"flops": flops, "tokens": real(tables), "peak_flops": peak_flops(kind)}
    turns = Run(turn, case.rows, 3, info["tokens"], check=False, info=info)
    turns.tune = {"moments": case.moments}
    turns.train(objective, params, model, tables, frozen or ())


def data(case: Case, vocab: int) -> list[Any]:
    """Four updates' worth of packed rows of about 2,048 tokens."""
    from w2s_jax.data.packing import pack, with_rows, with_targets
    from w2s_jax.data.pairs import pack_pairs

    length, count = (64, 4 * case.rows) if case.tiny else (2048, 4 * case.rows)
    if case.kind == "dpo":
        shape = Lengths(length / 8, length / 6, longest=length // 2)
        made = pairs(2 * count, vocab, shape)
        texts = ([pair[name] for pair in made] for name in ("prompt", "chosen", "rejected"))
        return pack_pairs(*texts, per_row=2, classes=1, multiple=16 if case.tiny else 128)
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(np.log(length / 6), 0.6, 8 * count), 8, length // 2).astype(int)
    keep = np.cumsum(sizes) <= 0.97 * count * length
    documents = [(rng.integers(FIRST, vocab, size), None) for size in sizes[keep]]
    return [with_rows(with_targets(pack(documents, length)))]


def real(tables: list[Any]) -> int:
    """Tokens that are not padding."""
    return sum(int((np.asarray(table["segment"]) > 0).sum()) for table in tables)


def _objective(case: Case, model: Any, tables: list[Any], config: Any, frozen: dict[str, Any]):
    """What is minimised, and the FLOPs of an epoch; a live teacher joins ``frozen``."""
    from functools import partial

    import jax

    from w2s_jax.losses.distillation import forward_kl
    from w2s_jax.losses.preference import dpo
    from w2s_jax.models.transformer import transformer
    from w2s_jax.objectives import distill, language, prefer

    cost = useful(config, tables) * (2 / 3 if case.rank else 1)
    if case.kind == "sft":
        return language(model), cost
    if case.kind == "dpo":
        return prefer(model, partial(dpo, beta=0.1), length_mean=False), cost
    large = gpu.config(case.teacher, case.tiny, param_dtype="bfloat16")
    teacher = transformer(large)
    frozen["teacher"] = teacher.init(jax.random.key(1))
    return distill(model, forward_kl, teacher=teacher), cost + useful(large, tables) / 3


def useful(config: Any, tables: list[Any]) -> float:
    """FLOPs of forward and backward over the real tokens of an epoch."""
    from w2s_jax.models.config import flops_per_token

    total = 0.0
    for table in tables:
        segment = np.asarray(table["segment"])
        tokens, predicted = int((segment > 0).sum()), float(table["targets"]["mask"].sum())
        documents = sum(len(np.unique(row[row > 0])) for row in segment)
        total += tokens * flops_per_token(config, round(tokens / documents))
        total -= 6.0 * config.vocab * config.width * (tokens - predicted)
    return total


def _referenced(case: Case, model: Any, params: Any, frozen: dict[str, Any], tables: list[Any]):
    """The reference column, by the model as it starts."""
    from w2s_jax.columns import add_reference

    whole = {"base": frozen["base"], "lora": params} if case.rank else params
    return add_reference(model, whole, tables, progress=False, batch=case.rows)
