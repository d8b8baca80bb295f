"""MUSCLE (Echterhoff et al. 2024): model updates that stay compatible.

A task model is replaced by a new version, and some answers that were right become wrong: negative
flips. A compatible version starts as the new one and is distilled from the new version where it is
itself right and from the old one where it is wrong; the arms are other masks, the same with
cross-entropy, plain fine-tuning for as long, and the average of both versions. Each update comes in
two cases: "same" (the old version is as good as the new one) and "better" (it is far worse).

Block classes: small networks on thumbnails of digits (or of an npz file). Block tokens: adapters on
pretrained nano models, a task of the arithmetic world, greedy answers checked by the verifier, and
how scores flip (share of right steps, log-probability of the reference). Learning rates are chosen
on dev for the versions and kept for what starts from them, as in the paper; lambda on dev.

  python -m experiments.muscle --blocks classes --data mnist.npz --train 5000 --dev 1000 --test 5000
  python -m experiments.muscle --preset paper --plan v5p:2x2x2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from w2s_jax.cli import main
from w2s_jax.data import arithmetic, images, sources
from w2s_jax.errors import UserError
from w2s_jax.losses import compatibility as masks
from w2s_jax.metrics import flips
from w2s_jax.models.heads import mlp
from w2s_jax.models.shapes import shape
from w2s_jax.models.vision import thumbnails
from w2s_jax.pipelines import muscle
from w2s_jax.pipelines import muscle_report as report
from w2s_jax.pipelines.muscle import Bench, Learned, Version
from w2s_jax.pipelines.muscle_report import AVERAGE, BLOCKS, CASES, NEW, PLAIN
from w2s_jax.pipelines.probes import one_hot
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row, Table

MASKS = (masks.student_wrong, masks.old_right, masks.always_old, masks.less_likely)
# arm: number of its mask, and whether cross-entropy is added (Table 7 of the paper)
Arms = dict[str, tuple[int, bool]]
ARMS: Arms = {
    "student wrong": (0, False),
    "student wrong + CE": (0, True),
    "old right": (1, False),
    "always old": (2, False),
    "less likely + CE": (3, True),
}
# Block tokens alone: a class is a sequence of one, of which it would be "less likely + CE"
SEQUENCES: Arms = {"sequences less likely + CE": (len(MASKS), True)}
HELD, TASK = 81_000_000, 82_000_000  # seeds of problems that never meet
NETS = Tune(batch=32, epochs=40, optimizer="adam", schedule="cosine", clip=0.0)
LORA = Tune(batch=32, epochs=3, optimizer="adam", schedule="cosine", warmup=0.1)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    blocks: tuple[str, ...] = BLOCKS
    """Which blocks to run: classes, tokens."""
    seeds: int = 20
    """Block classes: runs per setting; a seed draws dev, weights and the order of the rows."""
    data: str = ""
    """Block classes: an npz file of pictures (x_train, y_train, x_test, y_test); empty:
    scikit-learn's digits."""
    train: int = 600
    """Block classes: rows to train on, the same for all versions of a seed."""
    dev: int = 197
    """Block classes: rows that choose learning rates and lambda."""
    test: int = 1000
    """Block classes: rows for the reported numbers."""
    side: int = 3
    """Block classes: side of the thumbnails in pixels; where a network gets all its training rows
    right, the paper's mask is never on."""
    hidden: int = 12
    """Block classes: hidden units of the new version, and of the old one in case same."""
    narrow: int = 3
    """Block classes: hidden units of the old version in case better."""
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    """Block classes: learning rates of the versions, to choose from on dev."""
    tune: Tune = NETS
    """Block classes: how networks train, versions and what starts from them."""
    new: str = "nano-2@1"
    """Block tokens: the base of the new version: a model folder, hub id or nano-1 .. nano-4."""
    olds: tuple[str, ...] = ("nano-2", "nano-1")
    """Block tokens: bases of the old version, as good (case same) and far worse (case better)."""
    task: str = ""
    """Block tokens: a file of problems (question, answer ending in #### n); empty: the arithmetic
    world, facts in random order."""
    exam: str = ""
    """Block tokens: with --task, a file of test problems; empty: some of --task."""
    token_seeds: int = 5
    """Block tokens: runs per setting; a seed draws problems, adapters and order."""
    problems: int = 640
    """Block tokens: problems to train on, the same for all versions of a seed."""
    token_dev: int = 200
    """Block tokens: problems that choose learning rates and lambda."""
    token_test: int = 600
    """Block tokens: problems for the reported numbers."""
    steps: tuple[int, ...] = (1, 2)
    """Block tokens: operations in a problem of the arithmetic world."""
    length: int = 80
    """Block tokens: most tokens of a problem with its solution."""
    answer: int = 40
    """Block tokens: most tokens of an answer."""
    context: bool = True
    """Block tokens: whether the loss counts the tokens of the problem too, as in the paper."""
    rank: int = 8
    """Block tokens: rank of the adapters."""
    alpha: float = 16.0
    """Block tokens: adapters are scaled by alpha / rank."""
    token_lrs: tuple[float, ...] = (3e-3, 1e-2)
    """Block tokens: learning rates of the versions, to choose from on dev."""
    token_tune: Tune = LORA
    """Block tokens: how adapters train."""
    lambdas: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Weights of the distillation where cross-entropy is added (unreported in the paper), to choose
    from on dev."""
    temperature: float = 2.0
    """Of the distillation, without a factor T^2."""
    dtype: str = "float32"
    """Block tokens: dtype of the frozen bases."""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        seeds=2, train=100, dev=50, test=100, narrow=12, lrs=(1e-2,), tune=replace(NETS, epochs=2),
        new="nano-1@1", olds=("nano-1",), token_seeds=2, problems=16, token_dev=50,
        token_test=50, steps=(1,), length=64, answer=24, rank=2, token_lrs=(1e-2,),
        token_tune=replace(LORA, batch=8, epochs=1), lambdas=(0.5,),
    ),
    # Rank, alpha, epochs, learning rate, accumulation and the 80/20 split of GSM8K's 7.5k are the
    # paper's. The batch is not reported: 8 devices, a row each, times 8; 500 updates of warm-up are
    # then 53 % of 938. The models are one of its four updates, Llama 1 to 2.
    "paper": dict(
        blocks=("tokens",), new="meta-llama/Llama-2-7b-hf", olds=("huggyllama/llama-7b",),
        task="gsm8k_train.jsonl", exam="gsm8k_test.jsonl", token_seeds=1, problems=5978,
        token_dev=1495, token_test=1319, length=1024, answer=512, rank=128, alpha=256.0,
        token_lrs=(1e-4,), lambdas=(0.5,), dtype="bfloat16",
        token_tune=Tune(
            lr=1e-4, batch=64, micro=8, epochs=10, optimizer="adamw", schedule="constant",
            warmup=0.53,
        ),
    ),
}  # fmt: skip


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: one per block, case, model and seed."""
    _check(cfg)
    for block, make in (("classes", _classes), ("tokens", _tokens)):
        if block in cfg.blocks:
            ctx.say(f"{block} ...")
            yield from ctx.stage(block, dict(vars(cfg), blocks=()), partial(make, cfg, ctx))


def _check(cfg: Config) -> None:
    if unknown := sorted(set(cfg.blocks) - set(BLOCKS)):
        raise UserError(f"--blocks: {', '.join(unknown)} unknown; choose from {', '.join(BLOCKS)}")
    if not 1 <= len(cfg.olds) <= len(CASES):
        raise UserError("--olds takes one base (case same) or two (cases same and better)")
    if not (cfg.lrs and cfg.token_lrs and cfg.lambdas):
        raise UserError("--lrs, --token_lrs and --lambdas need one entry each at least")
    if not all(0 < weight < 1 for weight in cfg.lambdas):
        raise UserError(f"--lambdas lie between 0 and 1, got {cfg.lambdas}")
    counts = (cfg.train, cfg.dev, cfg.test, cfg.problems, cfg.token_dev, cfg.token_test)
    if min(*counts, cfg.token_seeds) < 1:
        raise UserError("--train, --dev, --test and their --token counterparts must be above 0")
    sizes = dict(side=cfg.side, hidden=cfg.hidden, narrow=cfg.narrow, rank=cfg.rank)
    sizes |= dict(answer=cfg.answer, alpha=cfg.alpha, temperature=cfg.temperature)
    for name, value in sizes.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be above 0 and finite, got {value:g}")
    if not all(0 < lr < math.inf for lr in (*cfg.lrs, *cfg.token_lrs)):
        raise UserError(f"--lrs and --token_lrs must be above 0, got {cfg.lrs}, {cfg.token_lrs}")
    if not cfg.blocks:
        raise UserError("--blocks takes classes, tokens or both")


def settings(cfg: Config, lr: float, arms: Arms = ARMS) -> list[dict[str, float]]:
    """Every training that starts from the new version: arms with their lambdas, and plain."""
    found = [{"lr": lr, "mask": 0, "weight": 0.0}]
    for mask, mixed in arms.values():
        found += [{"lr": lr, "mask": mask, "weight": w} for w in (cfg.lambdas if mixed else (1.0,))]
    return found


def picked(learned: list[Learned], bench: Bench, arms: Arms = ARMS) -> dict[str, Learned]:
    """Per arm its training; where there are several lambdas, the best on dev."""
    plain = next(one for one in learned if one.setting["weight"] == 0)
    found = {PLAIN: plain}
    for arm, (mask, mixed) in arms.items():
        mine = [
            one
            for one in learned
            if one.setting["mask"] == mask and (0 < one.setting["weight"] < 1) == mixed
        ]
        found[arm] = muscle.best([one for one in mine if one is not plain], bench)
    return found


def _starts(
    cfg: Config, bench: Bench, old: Learned, new: Learned, arms: Arms
) -> dict[str, Learned]:
    """The new version and all that starts from it, one per arm."""
    todo = settings(cfg, new.setting["lr"], arms)
    made = muscle.compatible(
        bench, old.version, new.version, MASKS, todo, temperature=cfg.temperature
    )
    return {NEW: new, **picked(made, bench, arms)}


# Block classes


def _classes(cfg: Config, ctx: Context) -> list[Row]:
    bench, truth = _pictures(cfg)
    width, count = bench.held["features"].shape[1], bench.held["label"].shape[1]

    def version(name: str, hidden: int, first: int) -> Learned:
        net = mlp(count, width, hidden)
        seeds = range(first, first + cfg.seeds)
        return muscle.tasked(bench, muscle.class_version(name, net, seeds), cfg.lrs)

    new = version("new", cfg.hidden, cfg.seeds)
    rows = []
    for case, hidden in zip(CASES, (cfg.hidden, cfg.narrow), strict=True):
        ctx.say(f"  case {case}")
        old = version(f"old, case {case}", hidden, 0)
        rows += _class_rows(case, bench, truth, old, _starts(cfg, bench, old, new, ARMS))
    return rows


def _pictures(cfg: Config) -> tuple[Bench, np.ndarray]:
    """Every seed divides the rows that are not for test anew; and the classes of the test."""
    known = cfg.train + cfg.dev
    shown, truth = images.pictures(cfg.data, known, cfg.test)
    seen = np.asarray(thumbnails(shown, cfg.side))
    first = seen[:known]
    seen = ((seen - first.mean(0)) / (first.std(0) + 0.01 * first.std())).astype(np.float32)
    labels = one_hot(truth)
    drawn = np.stack([np.random.default_rng([1, s]).permutation(known) for s in range(cfg.seeds)])
    held = {"features": seen, "label": labels}
    tables = [
        Table({name: column[rows[cfg.dev :]] for name, column in held.items()}) for rows in drawn
    ]
    test = np.arange(known, len(truth))
    return Bench(tables, cfg.tune, held, drawn[:, : cfg.dev], test), truth[known:]


def _class_rows(
    case: str, bench: Bench, truth: np.ndarray, old: Learned, models: dict[str, Learned]
) -> list[Row]:
    def heard(one: Learned) -> np.ndarray:
        assert one.logps is not None
        return one.logps[:, bench.test]

    before, last = heard(old), {name: heard(one) for name, one in models.items()}
    last[AVERAGE] = np.logaddexp(before, last[NEW])
    rows = []
    for name, logps in last.items():
        for seed in range(len(bench)):
            row = _row("classes", case, name, seed, models.get(name))
            row |= _flips(before[seed].argmax(-1), logps[seed].argmax(-1), truth)
            rows.append(row)
    return rows


def _row(block: str, case: str, model: str, seed: int, learned: Learned | None) -> Row:
    row: Row = {"block": block, "case": case, "model": model, "seed": seed}
    return row | (dict(learned.setting) if learned else {})


def _flips(old: np.ndarray, new: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((new == truth).mean()),
        "old_accuracy": float((old == truth).mean()),
        "nfr": flips.nfr(old, new, truth),
        "pfr": flips.pfr(old, new, truth),
        "nfr_mc": flips.nfr_mc(old, new, truth),
    }


# Block tokens


def _tokens(cfg: Config, ctx: Context) -> list[Row]:
    held, drawn = problems(cfg)
    seeds = range(cfg.token_seeds)

    def fresh(name: str, first: int) -> Version:
        numbers = [first + seed for seed in seeds]
        return muscle.adapted_version(name, cfg.rank, cfg.alpha, numbers, cfg.dtype)

    start = fresh(cfg.new, cfg.token_seeds)
    assert start.tokenizer is not None
    worded = partial(muscle.worded, tokenizer=start.tokenizer, length=cfg.length)
    tables = [worded(table, context=cfg.context) for table in drawn]
    groups = muscle.grouped(worded(held, context=False))
    dev = np.tile(np.arange(cfg.token_dev), (cfg.token_seeds, 1))
    bench = Bench(tables, cfg.token_tune, groups, dev, np.arange(cfg.token_dev, len(held)))
    new = muscle.tasked(bench, start, cfg.token_lrs)
    rows, test = [], held.take(bench.test)
    for case, name in zip(CASES, cfg.olds, strict=False):
        ctx.say(f"  case {case}: {name} -> {cfg.new}")
        old = muscle.tasked(bench, fresh(name, 0), cfg.token_lrs)
        made = _starts(cfg, bench, old, new, ARMS | SEQUENCES)
        rows += _token_rows(cfg, case, bench, test, old, made)
    return rows


def problems(cfg: Config) -> tuple[Table, list[Table]]:
    """Dev, then test problems; and each seed's own to train on (of a file: a draw of the rest)."""
    held, size = cfg.token_dev + cfg.token_test, cfg.problems
    if not cfg.task:
        how: dict[str, Any] = dict(steps=cfg.steps, shuffled=1.0)
        first = arithmetic.problems(HELD, held, **how)
        avoid = set(first["question"])
        seeds = range(TASK, TASK + cfg.token_seeds)
        return first, [arithmetic.problems(s, size, avoid=avoid, **how) for s in seeds]
    first = _given(cfg.task, size + (cfg.token_dev if cfg.exam else held))
    rest = np.arange(cfg.token_dev if cfg.exam else held, len(first))
    draws = [np.random.default_rng([1, s]).permutation(rest)[:size] for s in range(cfg.token_seeds)]
    parts = first.take(np.arange(rest[0]))
    if cfg.exam:
        exam = _given(cfg.exam, cfg.token_test).take(np.arange(cfg.token_test))
        parts = Table({name: np.concatenate([parts[name], exam[name]]) for name in parts.columns})
    return parts, [first.take(index) for index in draws]


def _given(path: str, least: int) -> Table:
    """The problems of a file in an order that is always the same."""
    found = sources.read(path)
    if len(found) < least:
        raise UserError(f"{path} has {len(found)} rows, {least} are asked for: ask for fewer")
    texts = {
        "prompt": [arithmetic.PROMPT.format(text) for text in found["question"]],
        "response": [arithmetic.RESPONSE.format(text) for text in found["answer"]],
        "answer": list(found["answer"]),
    }
    table = Table({name: np.array(column, object) for name, column in texts.items()})
    return table.take(np.random.default_rng(0).permutation(len(table)))


def _token_rows(
    cfg: Config, case: str, bench: Bench, test: Table, old: Learned, models: dict[str, Learned]
) -> list[Row]:
    """Greedy answers for the flips; the log-probability of the reference (mean nats of a token) and
    the share of right steps for those of scores."""
    answers = muscle.finals(arithmetic.verify(text, text) for text in test["answer"])
    rows = []
    for seed in range(len(bench)):
        before = muscle.answered(old.version, seed, test, cfg.answer)
        for name, one in models.items():
            after = muscle.answered(one.version, seed, test, cfg.answer)
            row = _row("tokens", case, name, seed, one)
            row |= _flips(before["answer"], after["answer"], answers)
            logps = (-each.nll[seed, bench.test] for each in (old, one))
            for score, pair in (
                ("logp", tuple(logps)),
                ("credit", (before["credit"], after["credit"])),
            ):
                row |= {f"{score}_{k}": v for k, v in flips.shift(*pair)._asdict().items()}
                row[score] = float(pair[1].mean())
            rows.append(row)
    return rows


def plan(cfg: Config) -> Draft:
    """The compatibility step of block tokens; the old version counts as large as the new one (Llama
    1 and 2 of 7B are)."""
    _check(cfg)
    names = {"batch": "--token_tune.batch", "micro": "--token_tune.micro", "rank": "--rank"}
    how = dict(length=cfg.length, rank=cfg.rank, flags=names)
    return muscle.draft(shape(cfg.new), cfg.token_tune, **how)  # pyright: ignore


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=report.figures,
        claims=report.claims,
        presets=PRESETS,
        paper="muscle",
        minutes=2,
        summary=report.summary,
        plan=plan,
    )
