"""Generation: greedy tokens for a batch of prompts, against transformers' generate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks import world
from benchmarks.harness import Settings, Side, alternate
from benchmarks.report import report
from benchmarks.turn import Turn

NEEDS = ("torch", "transformers")
AGREE = 16  # first tokens of a row whose sum the sides must share


def run(settings: Settings) -> dict[str, Any]:
    """``generate`` with a growing and with a static cache, each also with a tuned allocator."""
    shape = world.shape(settings)
    rows, prompt, new = settings.size((32, 64, 128), tiny=(4, 8, 8))
    task = dict(rows=rows, prompt=prompt, new=new, vocab=shape.vocab)
    with world.exported(shape, "model") as (folder,):
        common = {"folder": folder} | task
        theirs = common | {"threads": settings.threads}
        static = theirs | {"cache": "static"}
        call, units = "benchmarks.b10:theirs", float(rows * new)
        sides = [
            Side("transformers", call, theirs, NEEDS, units=units),
            Side("transformers tuned", call, theirs, NEEDS, tuned=True, units=units),
            Side("transformers static", call, static, NEEDS, units=units),
            Side("transformers static tuned", call, static, NEEDS, tuned=True, units=units),
            Side("ours", "benchmarks.b10:ours", common, units=units),
        ]
        results = alternate(sides, settings, steps=1)
    facts = {"model": asdict(shape), **task}
    return report("B10", results, settings, unit="tokens", agree={"first": 1e-3}, **facts)


def prompts(rows: int, prompt: int, vocab: int) -> np.ndarray:
    """Random ids [rows, prompt], the same for every contender."""
    return np.random.default_rng(0).integers(3, vocab, (rows, prompt))


def theirs(
    turn: Turn,
    folder: str,
    rows: int,
    prompt: int,
    new: int,
    vocab: int,
    threads: int,
    cache: str | None = None,
) -> None:
    """``generate`` without an end-of-text token; ``cache`` is its cache_implementation."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts(rows, prompt, vocab))
    how = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    if cache:
        how |= {"cache_implementation": cache, "disable_compile": True}

    def once() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, prompt:]

    def block(steps: int) -> None:
        for _ in range(steps):
            once()

    drawn = once()
    assert drawn.shape == (rows, new), drawn.shape
    turn.serve(block, first=int(drawn[:, :AGREE].sum()))


def ours(turn: Turn, folder: str, rows: int, prompt: int, new: int, vocab: int) -> None:
    """``sample`` with as many slots as prompts."""
    import jax

    from benchmarks.ours import load
    from w2s_jax.generate.sample import sample

    model, params = load(folder)
    ids, key = prompts(rows, prompt, vocab).tolist(), jax.random.key(0)

    def block(steps: int) -> list[list[int]]:
        for _ in range(steps):
            drawn = sample(model, params, ids, key, tokens=new, temperature=0.0, batch=rows)
        return drawn

    drawn = np.array(block(1))
    assert drawn.shape == (rows, new), drawn.shape
    turn.serve(lambda steps: block(steps) and None, first=int(drawn[:, :AGREE].sum()))
