"""What the contenders share: the model's shape, its exported weights, and the token ids."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.harness import Settings, call
from benchmarks.turn import Turn

PAD, BOS, EOS, FIRST = 0, 1, 2, 5  # ids below FIRST stand in no row
LR, CLIP, BETA = 1e-5, 1.0, 0.1  # AdamW without decay, constant rate, on both sides


@dataclass(frozen=True)
class Shape:
    """A small Qwen2-like decoder in float32 with tied embeddings."""

    vocab: int = 32_000
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 768

    def times(self, factor: float) -> Shape:
        """About ``factor`` times the weights in the layers: wider, with as many layers."""
        width = round(self.width * factor**0.5 / 64) * 64
        grown = width / self.width
        return Shape(
            self.vocab,
            width,
            self.layers,
            round(self.heads * grown),
            round(self.kv_heads * grown),
            round(self.ffn * grown),
        )


TINY = Shape(vocab=256, width=32, layers=2, heads=4, kv_heads=2, ffn=64)


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts and completions: lognormal with these medians and sigmas, cut to fit."""

    prompt: float = 62.0
    completion: float = 80.0
    prompt_sigma: float = 0.4
    sigma: float = 0.4
    longest: int = 256
    """Most tokens of a prompt with one completion; half of it at most is prompt."""


RAGGED = Lengths(prompt=55.0, completion=69.0, prompt_sigma=0.8, sigma=0.9, longest=1024)
SHORT = Lengths(prompt=6.0, completion=6.0, longest=24)


def config(shape: Shape, **options: Any):
    """The model's config on our side."""
    from w2s_jax.models.config import Config

    return Config(**asdict(shape), bias="qkv", eps=1e-6, max_length=8192, family="qwen2", **options)


def export(turn: Turn, folders: dict[str, int], shape: dict[str, int]) -> None:
    """Write a model folder per entry of ``folders``, path to seed, as Hugging Face reads it."""
    import jax

    from w2s_jax.models import hf
    from w2s_jax.models.transformer import transformer

    model = transformer(config(Shape(**shape)))
    for path, seed in folders.items():
        hf.export(model, model.init(jax.random.key(seed)), path)
    turn.ready()


def shape(settings: Settings) -> Shape:
    """The model that the flags ask for."""
    return settings.size(replace(Shape(), vocab=settings.vocab), tiny=TINY)


@contextlib.contextmanager
def exported(shape: Shape, *names: str) -> Iterator[list[str]]:
    """Folders of models of one shape, each from its own seed; gone after the block."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        folders = [f"{root}/{name}" for name in names]
        seeds = {folder: seed for seed, folder in enumerate(folders)}
        call("benchmarks.world:export", folders=seeds, shape=asdict(shape))
        yield folders


@dataclass(frozen=True)
class Task:
    """How many examples of which lengths, ``batch`` of them an update; a block is one epoch."""

    count: int
    vocab: int
    lengths: Lengths
    batch: int = 4

    @property
    def steps(self) -> int:
        """Updates of an epoch."""
        return self.count // self.batch

    def options(self) -> dict[str, Any]:
        """What every side is told."""
        data = {"count": self.count, "vocab": self.vocab, "lengths": asdict(self.lengths)}
        return {"data": data, "batch": self.batch}

    def facts(self, shape: Shape, paired: bool = False) -> dict[str, Any]:
        """For the report."""
        made = (pairs if paired else rows)(self.count, self.vocab, self.lengths)
        return {"model": asdict(shape), "data": describe(made), "batch": self.batch}


def task(settings: Settings, count: int = 16, quick: int = 8) -> Task:
    """Prompts of about 70 tokens, completions of about 85, at most 256 together."""
    lengths = settings.size(Lengths(), tiny=SHORT)
    return Task(settings.size(count, quick=quick, tiny=4), shape(settings).vocab, lengths)


def pairs(count: int, vocab: int, lengths: Lengths, seed: int = 0) -> list[dict[str, list[int]]]:
    """Preference pairs of random ids, the same for every contender: prompt, chosen, rejected."""
    rng = np.random.default_rng(seed)
    half = lengths.longest // 2

    def length(middle: float, sigma: float, most: int) -> int:
        return int(np.clip(rng.lognormal(np.log(middle), sigma), 4, most))

    made = []
    for _ in range(count):
        prompt = length(lengths.prompt, lengths.prompt_sigma, half)
        room = lengths.longest - prompt
        sizes = (prompt, *(length(lengths.completion, lengths.sigma, room) for _ in range(2)))
        ids = [rng.integers(FIRST, vocab, size).tolist() for size in sizes]
        made.append(dict(zip(("prompt", "chosen", "rejected"), ids, strict=True)))
    return made


def rows(count: int, vocab: int, lengths: Lengths, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts with one completion each: the chosen half of ``pairs``."""
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen"]}
        for pair in pairs(count, vocab, lengths, seed)
    ]


def tokens(examples: list[dict[str, list[int]]]) -> int:
    """Real tokens as a trainer without sharing reads them: the prompt once per completion."""
    return sum(
        len(prompt) + len(ids)
        for example in examples
        for prompt in (example["prompt"],)
        for name, ids in example.items()
        if name != "prompt"
    )


def describe(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Counts and mean lengths, for the report."""
    completions = [ids for x in examples for name, ids in x.items() if name != "prompt"]
    return {
        "examples": len(examples),
        "mean_prompt": round(float(np.mean([len(x["prompt"]) for x in examples])), 1),
        "mean_completion": round(float(np.mean([len(ids) for ids in completions])), 1),
        "tokens": tokens(examples),
    }
