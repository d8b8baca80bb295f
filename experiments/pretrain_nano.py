"""Pretrain the nano family: tiny Llama-layout models on the arithmetic world, or on your text.

A controlled ladder of compute: nano-1 .. nano-4 (7 thousand to 0.8 million parameters) learn to
solve worded sums of one to five steps. They ship with the package; this program made them. Expect
held-out accuracy to rise strictly along the ladder, and a top rung that is strong but imperfect.

  python -m experiments.pretrain_nano --rungs nano-1 nano-2        two rungs, a minute
  python -m experiments.pretrain_nano --preset paper               the shipped family, two seeds
  python -m experiments.pretrain_nano --rungs mine --width 64 --layers 3 --heads 2 --tokens 4e6
  python -m experiments.pretrain_nano --rungs mine --task boolq --data FOLDER --vocab 512
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from w2s_jax import cli, figures
from w2s_jax.annotate import predict, surprise
from w2s_jax.data import arithmetic, tasks
from w2s_jax.data.packing import pack
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.metrics.statistics import claim, proportion_gap, wilson
from w2s_jax.models.transformer import Config as Architecture
from w2s_jax.models.transformer import flops_per_token, params_count, transformer
from w2s_jax.objectives import language
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer, train_bpe
from w2s_jax.train.drafts import draft
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Model, Params, Row, State, Table

LENGTH = 128  # tokens in a packed row
QUESTION_WEIGHT = 0.1  # of a question's tokens in the loss; a solution's weigh 1
TOKENS_PER_DOCUMENT = 64  # mean of `arithmetic.documents`, to know how many to draw
DIFFICULTIES = (1, 2, 3, 4, 5)
HELD_OUT = 900_000  # seed of the test problems; training seeds stay below


@dataclass(frozen=True)
class Rung:
    """A size and how long it is trained."""

    width: int
    layers: int
    heads: int
    tokens: float


RUNGS = {
    "nano-1": Rung(16, 2, 1, 2e6),
    "nano-2": Rung(32, 2, 1, 2e6),
    "nano-3": Rung(64, 3, 2, 2e6),
    "nano-4": Rung(128, 4, 4, 12e6),
}


@dataclass(frozen=True)
class Config:
    """Which rungs to train, and on what."""

    rungs: tuple[str, ...] = ("nano-1", "nano-2", "nano-3")
    """Of the ladder, smallest first; another name takes --width, --layers, --heads, --tokens."""
    seeds: int = 1
    """How many pretraining seeds: other weights, other documents."""
    first: int = 0
    """The first pretraining seed."""
    width: int = 64
    """Hidden width of a rung that is not in the ladder."""
    layers: int = 3
    """Layers of a rung that is not in the ladder."""
    heads: int = 2
    """Attention heads of a rung that is not in the ladder."""
    tokens: float = 4e6
    """Training tokens of a rung that is not in the ladder."""
    scale: float = 1.0
    """Multiplies every rung's training tokens."""
    marks: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Shares of the run (eighths) at which a checkpoint is exported as <name>-seed<k>-<share>."""
    test: int = 200
    """Held-out problems per number of steps."""
    lr: float = 0.02
    """Muon's learning rate; the same for Adam on the rest."""
    batch: int = 16
    """Packed rows of 128 tokens per update."""
    out: str | None = None
    """Folder for the exported models; default <workdir>/models."""
    task: str = "arithmetic"
    """What to read: the arithmetic world, or the text of a task (see --data) without its labels."""
    data: str | None = None
    """Folder or file of the task."""
    vocab: int = 512
    """Size of the byte-level BPE vocabulary trained on a task's text."""
    tokenizer: str | None = None
    """Folder with a tokenizer to use for a task's text instead of training one."""


PRESETS = {
    "tiny": dict(rungs=("nano-1",), scale=0.02, marks=(0.5,), test=10),
    "paper": dict(rungs=tuple(RUNGS), seeds=2, test=400),
}


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Train every rung of every seed; yields one row per rung, checkpoint and difficulty."""
    _check(cfg)
    out = Path(cfg.out) if cfg.out else ctx.workdir / "models"
    for seed in range(cfg.first, cfg.first + cfg.seeds):
        for name in cfg.rungs:
            rung = _rung(cfg, name)
            inputs = dict(
                rung=rung, seed=seed, cfg=replace(cfg, rungs=(), seeds=1, first=0, out=None)
            )
            make = lambda: train_rung(cfg, ctx, name, rung, seed, out)  # noqa: B023, E731
            yield from ctx.stage(f"rung-{name}", inputs, make)


def _check(cfg: Config) -> None:
    if not cfg.rungs:
        raise UserError(f"--rungs needs a name: {', '.join(RUNGS)}, or one of your own")
    if cfg.test < 1 or not all(0 < share <= 1 for share in cfg.marks):
        raise UserError("--test must be at least 1, --marks above 0 and at most 1")
    if cfg.vocab < 259:
        raise UserError(f"--vocab must be at least 259 (bytes and 3 special), got {cfg.vocab}")
    if not (cfg.tokens > 0 and cfg.scale > 0):
        raise UserError(f"--tokens and --scale must be above 0, got {cfg.tokens}, {cfg.scale}")


def _rung(cfg: Config, name: str) -> Rung:
    rung = RUNGS.get(name, Rung(cfg.width, cfg.layers, cfg.heads, cfg.tokens))
    return replace(rung, tokens=rung.tokens * cfg.scale)


def _architecture(rung: Rung, tokens: int) -> Architecture:
    return Architecture(
        vocab=-(-tokens // 16) * 16,
        width=rung.width,
        layers=rung.layers,
        heads=rung.heads,
        rope=1000.0,
        max_length=512,
        eps=1e-6,
    )


def _tune(cfg: Config, steps: int) -> Tune:
    return Tune(
        lr=cfg.lr,
        batch=cfg.batch,
        steps=steps,
        optimizer="muon",
        adam_scale=1.0,
        weight_decay=0.02,
        warmup=min(100 / steps, 0.1),
        schedule="wsd",
        decay_from=0.3,
        final=0.05,
        clip=0.0,
    )


def plan(cfg: Config) -> Draft:
    """The step of the largest rung, which one device trains."""
    _check(cfg)
    size = arithmetic.tokenizer().size if cfg.task == "arithmetic" else cfg.vocab
    rungs = {name: _architecture(_rung(cfg, name), size) for name in cfg.rungs}
    name = max(rungs, key=lambda name: params_count(rungs[name]))
    flags, tune = {"batch": "--batch"}, _tune(cfg, 1000)
    return draft(rungs[name], "sft", tune, length=LENGTH, alone=True, flags=flags, name=name)


def train_rung(cfg: Config, ctx: Context, name: str, rung: Rung, seed: int, out: Path) -> list[Row]:
    """Pretrain one model, export it with its intermediate checkpoints, and measure each."""
    table, tokenizer = corpus(cfg, rung, seed)
    architecture = _architecture(rung, tokenizer.size)
    model = transformer(architecture)
    real = int((table["segment"] > 0).sum())
    steps = 8 * max(1, round(rung.tokens / (real / len(table) * cfg.batch) / 8))
    tune = _tune(cfg, steps)
    stops = {max(1, round(8 * share)) * steps // 8: share for share in cfg.marks} | {steps: 1.0}
    folder = ctx.folder(f"fit-{name}", dict(rung=rung, seed=seed, tune=tune, task=cfg.task))

    def mark(state: State) -> dict[str, float]:
        step = int(state.step)
        if step in stops:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"mark-{step}.npz", *leaves)
        return {}

    objective = language(model)
    state = fit(
        objective,
        model.init(jax.random.key(seed)),
        table,
        tune,
        jax.random.key(1000 + seed),
        axes=model.axes,
        workdir=folder,
        save_every=steps // 8,
        evaluate=mark,
        eval_every=math.gcd(*stops),
        track=tuple(t for t in ctx.track if t != "jsonl"),
        progress=ctx.progress,
        flops=flops_per_token(architecture, LENGTH),
    )
    rows: list[Row] = []
    about = dict(rung=name, seed=seed, params=params_count(architecture))
    for step, share in sorted(stops.items()):
        with np.load(folder / f"mark-{step}.npz") as kept:
            leaves = [kept[f"arr_{i}"] for i in range(len(kept))]
        params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
        place = out / (f"{name}-seed{seed}" + ("" if share == 1.0 else f"-{share:g}"))
        here = about | {"share": share, "tokens": round(step / steps * rung.tokens)}
        found = _export(cfg, model, params, tokenizer, place, here)
        told = ", ".join(
            f"{r['steps']} steps {r['accuracy']:.2f}" if "steps" in r else f"{r['nll']:.3f} nats"
            for r in found
        )
        ctx.say(f"{place.name}: {told}")
        rows += found
    return rows


def _export(
    cfg: Config, model: Model, params: Params, tokenizer: Tokenizer, folder: Path, about: Row
) -> list[Row]:
    """Write a rung as a Hugging Face folder with its card; what it reaches as read back."""
    from w2s_jax.models import hf

    hf.export(model, params, folder, tokenizer, dtype="bfloat16")
    read, weights, _ = hf.load(str(folder), dtype="float32")
    about = about | {"fingerprint": hf.fingerprint(weights)}
    measured = accuracies(cfg, read, weights, tokenizer)
    if cfg.task != "arithmetic":
        about["nll"] = held_out_nll(cfg, read, weights, tokenizer)
    card(folder, cfg, model.config, about, measured)
    words = {key: about[key] for key in ("rung", "seed", "params", "share", "tokens")}
    if not measured:
        return [words | {"nll": about["nll"]}]
    return [words | {"steps": n, **values} for n, values in measured.items()]


def held_out_nll(cfg: Config, model: Model, params: Params, tokenizer: Tokenizer) -> float:
    """Nats per token of a task's test text, which no seed was trained on."""
    splits = tasks.load(cfg.task, seed=0, data=cfg.data)
    texts = [f"{row['prompt']}{row['response']}" for row in splits.test.rows()]
    begin, end = _ends(tokenizer)
    documents = [(begin + ids + end, None) for ids in tokenizer.encode_ids(texts)]
    table = pack(documents, LENGTH, on_long="split")
    said = predict(surprise(model), params, table, batch=64)
    return float(said["nll"].sum() / said["tokens"].sum())


def corpus(cfg: Config, rung: Rung, seed: int) -> tuple[Table, Tokenizer]:
    """Packed training rows, and the tokenizer that made them."""
    if cfg.task == "arithmetic":
        tokenizer = arithmetic.tokenizer()
        count = round(1.02 * rung.tokens / TOKENS_PER_DOCUMENT) + 64
        pairs = arithmetic.documents(seed, count, avoid=set(_test(cfg)["question"].tolist()))
    else:
        pairs, tokenizer = _task_text(cfg, seed)
    prompts = tokenizer.encode_ids([prompt for prompt, _ in pairs])
    responses = tokenizer.encode_ids([response for _, response in pairs])
    begin, end = _ends(tokenizer)
    weight = QUESTION_WEIGHT if cfg.task == "arithmetic" else 1.0
    documents = [
        (begin + p + r + end, [weight] * (len(begin) + len(p)) + [1.0] * (len(r) + len(end)))
        for p, r in zip(prompts, responses, strict=True)
    ]
    return pack(documents, LENGTH, on_long="split"), tokenizer


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return (
        [] if tokenizer.bos is None else [tokenizer.bos],
        [] if tokenizer.eos is None else [tokenizer.eos],
    )


def _task_text(cfg: Config, seed: int) -> tuple[list[tuple[str, str]], Tokenizer]:
    splits = tasks.load(cfg.task, seed=seed, data=cfg.data)
    rows = [row for part in (splits.train, splits.transfer) for row in part.rows()]
    pairs = [(str(row["prompt"]), str(row["response"])) for row in rows]
    if cfg.tokenizer:
        return pairs, Tokenizer.load(cfg.tokenizer)
    return pairs, train_bpe([a + b for a, b in pairs], cfg.vocab)


def _test(cfg: Config) -> Table:
    """The held-out problems: the same for every rung, seed and checkpoint."""
    count = cfg.test * len(DIFFICULTIES)
    return arithmetic.problems(HELD_OUT, count, steps=DIFFICULTIES)


def accuracies(
    cfg: Config, model: Model, params: Params, tokenizer: Tokenizer
) -> dict[int, dict[str, float]]:
    """Greedy accuracy per number of steps, with a 95 % Wilson interval; empty for other text."""
    if cfg.task != "arithmetic":
        return {}
    test = _test(cfg)
    answers = complete(
        model, params, tokenizer, [p + " a :" for p in test["prompt"]], jax.random.key(0), tokens=64
    )
    scores = arithmetic.score(list(test["answer"]), answers)["steps"]
    measured = {}
    for steps, values in scores.items():
        right = round(values["accuracy"] * values["count"])
        bounds = wilson(right, values["count"])
        measured[steps] = dict(
            accuracy=values["accuracy"],
            low=bounds.low,
            high=bounds.high,
            credit=values["credit"],
            count=values["count"],
        )
    return measured


def card(folder: Path, cfg: Config, architecture: Architecture, about: Row, measured: dict) -> None:
    """Write the model card: how it was made, what it weighs, what it can do."""
    one = dict(rungs=(str(about["rung"]),), first=int(about["seed"]))
    facts = {
        "command": cli.again("pretrain_nano", replace(cfg, **one, seeds=1, out=None)),
        "seed": about["seed"],
        "tokens": about["tokens"],
        "share of the run": about["share"],
        "parameters": about["params"],
        "fingerprint of the weights": about["fingerprint"],
        "accuracy": {str(n): values for n, values in measured.items()},
    }
    lines = [
        f"# {folder.name}",
        "",
        f"Llama layout, width {architecture.width}, {architecture.layers} layers, "
        f"{architecture.heads} heads, {about['params']:,} parameters, bfloat16.",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | `{value}` |" for key, value in facts.items() if key != "accuracy"],
        "",
        *_accuracy_lines(measured),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    (folder / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf8")


def _accuracy_lines(measured: dict[int, dict[str, float]]) -> list[str]:
    if not measured:
        return []
    head = ["| steps | greedy accuracy | 95 % interval | problems |", "|---|---|---|---|"]
    return head + [
        f"| {n} | {v['accuracy']:.3f} | {v['low']:.3f} - {v['high']:.3f} | {v['count']} |"
        for n, v in measured.items()
    ]


def final(rows: list[Row]) -> list[Row]:
    """The rows of finished rungs, mean accuracy over difficulties added per (rung, seed)."""
    if any("nll" in r for r in rows):
        return [r for r in rows if r["share"] == 1.0]
    keys = dict.fromkeys((r["rung"], r["seed"]) for r in rows if r["share"] == 1.0)
    means = []
    for rung, seed in keys:
        mine = [r for r in rows if (r["rung"], r["seed"], r["share"]) == (rung, seed, 1.0)]
        total = sum(float(r["count"]) for r in mine)
        right = sum(float(r["accuracy"]) * float(r["count"]) for r in mine)
        bounds = wilson(round(right), round(total))
        mean = dict(accuracy=right / total, low=bounds.low, high=bounds.high)
        mean |= {f"{r['steps']} steps": r["accuracy"] for r in mine}
        about = {name: mine[0][name] for name in ("params", "tokens")}
        means.append(dict(rung=rung, seed=seed) | about | mean)
    return means


def claims(rows: list[Row]) -> list[dict]:
    """Strictly rising along the ladder; the top rung strong but imperfect."""
    means = [m for m in final(rows) if "accuracy" in m]
    rungs = list(dict.fromkeys(m["rung"] for m in means))
    finished, made = [r for r in rows if r["rung"] in rungs and r["share"] == 1.0], []

    def solved(mine: list[Row]) -> tuple[int, int]:
        right = sum(r["accuracy"] * r["count"] for r in mine)
        return round(right), round(sum(r["count"] for r in mine))

    for small, large in zip(rungs[:-1], rungs[1:], strict=True):
        pair = [[r for r in finished if r["rung"] == rung] for rung in (small, large)]
        gap = proportion_gap(solved(pair[0]), solved(pair[1]))
        words = "accuracy gap over problems and seeds, Newcombe"
        seeds = len({r["seed"] for r in pair[1]})
        made.append(claim(f"{large} above {small}", words, gap, above=0.0, seeds=seeds))
    for steps in dict.fromkeys(r["steps"] for r in finished):
        mine = [r for r in finished if (r["rung"], r["steps"]) == (rungs[-1], steps)]
        found = wilson(*solved(mine))
        bound = {"above": 0.9} if steps <= 3 else {"below": 1.0}
        word = "strong (above .9)" if steps <= 3 else "imperfect (below 1)"
        words = "accuracy over problems and seeds, Wilson"
        name = f"{rungs[-1]} {word} on {steps} steps"
        made.append(claim(name, words, found, seeds=len(mine), **bound))
    return made


def figure_ladder(rows: list[Row], folder: Path) -> list[Path]:
    """Held-out accuracy against training tokens, per rung, over its intermediate checkpoints."""
    if not rows:
        return []
    y = "nll" if "nll" in rows[0] else "accuracy"
    told: dict[tuple, list[float]] = {}
    for r in rows:
        told.setdefault((r["rung"], r["seed"], r["tokens"]), []).append(float(r[y]))
    means = [
        {"rung": rung, "seed": seed, "tokens": tokens, y: float(np.mean(values))}
        for (rung, seed, tokens), values in told.items()
    ]
    words = {
        "accuracy": "held-out accuracy, 1 to 5 steps",
        "nll": "nats per token of the test text",
    }
    look = figures.Look(title="The ladder", xlabel="training tokens", ylabel=words[y], logx=True)
    path = folder / "ladder.png"  # a line per seed: two seeds make no interval
    named = {"hue": "rung", "style": "seed", "error": None}
    return [figures.lines(means, "tokens", y, path=path, **named, **look)]


if __name__ == "__main__":
    cli.main(
        Config,
        run,
        figures=figure_ladder,
        claims=claims,
        presets=PRESETS,
        paper="pretrain_nano",
        minutes=5,
        summary=final,
        plan=plan,
    )
