"""On Giant's Shoulders (Fan et al. 2024): small experts steer a large model while it decodes.

A large model answers with its own logits plus the logit shift that fine-tuning gave to a small
model. Proxy tuning adds the shift with a fixed weight; dynamic fusion solves for the weight at
every token, so that the large model moves as far (in KL, both ways) as the small one did. Nothing
large is trained. Arms: the large model, the small base, its expert, proxy tuning at --alphas,
dynamic fusion, and the large model fine-tuned (the ceiling); then all experts at hand at once.

The laptop run has three sub-tasks in the arithmetic world (one changes what is asked, one how steps
are written, one how answers end; see pipelines.dynamic_logit_fusion). Large model and base first
see a few examples of each among plain problems; a specialist sees one sub-task. An answer is right
when all of it is. Two kinds of summary stand side by side: the ratio of average scores (the
paper's headline, 96.4 %) and the share of the gap between large model and ceiling that is recovered
(90.5 % in the same table of the paper).

With --data any models are steered on any questions with answers, experts trained on the way or
given by name:

  python -m experiments.dynamic_logit_fusion --large FOLDER --base FOLDER --experts FOLDER \\
      --data questions.jsonl
  python -m experiments.dynamic_logit_fusion --preset paper --plan v5e:4x4
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import figures as draw
from w2s_jax.cli import main
from w2s_jax.errors import UserError
from w2s_jax.generate.steer import Search, golden, grid
from w2s_jax.metrics.statistics import Interval, claim, interval
from w2s_jax.models.shapes import shape
from w2s_jax.pipelines import dynamic_logit_fusion as blocks
from w2s_jax.pipelines.dynamic_logit_fusion import DYNAMIC, World
from w2s_jax.pipelines.dynamic_logit_fusion_given import Given, run_given
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

TUNE = Tune(
    lr=1e-2, batch=16, epochs=2, optimizer="muon", adam_scale=0.3, warmup=0.05, schedule="linear"
)
NEAR = 0.05  # accuracy: "never far below"


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    large: str = "nano-3"
    """The model that is steered: a Hugging Face folder, hub id, or nano-1 .. nano-4."""
    base: str = "nano-1"
    """The small model that the experts are made from."""
    alphas: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Fixed weights of proxy tuning; 1 is its own."""
    most: float = 2.0
    """Dynamic fusion: weights from 0 to this."""
    golden: bool = False
    """Golden-section search instead of the grid of tenths."""
    seeds: int = 5
    """Repetitions: a seed draws all training data and their order."""
    general: int = 900
    """Plain problems that large model and base see first."""
    few: int = 100
    """Examples of each sub-task among them."""
    solutions: int = 1000
    """Examples of one sub-task that a specialist learns from."""
    dev: int = 64
    """Held-out problems per sub-task on which the best fixed weight is chosen."""
    test: int = 128
    """Held-out problems per sub-task that are reported."""
    steps: tuple[int, ...] = (1, 2)
    """Numbers of operations in a problem."""
    length: int = 80
    """Longest prompt and answer in tokens."""
    answer: int = 40
    """Longest answer in tokens."""
    tune: Tune = TUNE
    """How generalists and specialists are trained."""
    data: tuple[str, ...] = ()
    """Models by name: files of questions with answers and a split (train, test), one per task."""
    experts: tuple[str, ...] = ()
    """With --data: an expert per file; none: --base is fine-tuned on each train split."""
    ceilings: tuple[str, ...] = ()
    """With --data: the large model fine-tuned, one per file; none leaves the ceiling out."""
    count: int = 0
    """With --data: the first so many test questions; 0 for all."""
    separator: str = "\n"
    """With --data: text between question and answer."""
    rank: int = 0
    """With --data: rank of the experts' adapters; 0 trains all weights."""
    batch: int = 128
    """With --data: prompts decoded at once."""
    compute: str = "float32"
    """With --data: dtype of weights and products, bfloat16 on accelerators."""


PRESETS: dict[str, dict[str, Any]] = {
    # one architecture, and prompts of one size: little to compile
    "tiny": dict(
        large="nano-1@1", base="nano-1", alphas=(1.0,), seeds=2, general=32, few=8, solutions=32,
        dev=4, test=12, answer=12, tune=replace(TUNE, epochs=1.0),
    ),
    # The card: 13B steered by LoRA experts of rank 64 (Adam, lr 1e-4, batch 128, 3 epochs), greedy
    # at batch 256. Full fine-tuning of the experts has lr 2e-5. The adapters' alpha, warm-up and
    # prompts are not known; TruthfulQA takes the chat models as experts (--experts).
    "paper": dict(
        large="meta-llama/Llama-2-13b-hf", base="meta-llama/Llama-2-7b-hf", seeds=1,
        data=("gsm8k.jsonl",), rank=64, batch=256, length=1024, answer=512, compute="bfloat16",
        tune=Tune(lr=1e-4, batch=128, epochs=3, optimizer="adam"),
    ),
}  # fmt: skip


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: accuracy and likelihood per task, arm and seed; weights; picks; the identity."""
    _check(cfg)
    how = blocks.rules(cfg.alphas, _search(cfg))
    if cfg.data:
        names = Given.__dataclass_fields__
        yield from run_given(Given(**{name: getattr(cfg, name) for name in names}), how, ctx)
        return
    numbers = {name: getattr(cfg, name) for name in World.__dataclass_fields__ if name != "ctx"}
    world = World(ctx=ctx, **numbers)
    who = blocks.cast(world, cfg.large, cfg.base)
    told = dict(large=cfg.large, base=cfg.base, alphas=cfg.alphas, search=_search(cfg))
    parts: dict[str, Callable[[int], Iterator[Row]]] = {
        "single": lambda seed: blocks.single_expert(world, who, seed, how),
        "several": lambda seed: blocks.several_experts(world, who, seed, how[DYNAMIC]),
        "identity": lambda seed: blocks.identity(world, who, seed, how[DYNAMIC]),
    }
    for seed in range(cfg.seeds):
        for name, part in parts.items():
            make = partial(_listed, part, seed)
            yield from world.stage(name, make, seed=seed, **told)
        ctx.say(f"seed {seed} is measured")


def _listed(part: Callable[[int], Iterator[Row]], seed: int) -> list[Row]:
    return list(part(seed))


def _search(cfg: Config) -> Search:
    if cfg.golden:
        return partial(golden, high=cfg.most)
    return partial(grid, alphas=tuple(i / 10 for i in range(round(10 * cfg.most) + 1)))


def _check(cfg: Config) -> None:
    if not 0 < cfg.most <= 10:
        raise UserError(f"--most is the largest weight, above 0 and at most 10, got {cfg.most:g}")
    if not all(map(math.isfinite, cfg.alphas)):
        raise UserError(f"--alphas must be finite numbers, got {cfg.alphas}")
    if 1.0 not in cfg.alphas:
        raise UserError(f"--alphas must hold 1, the weight of proxy tuning, got {cfg.alphas}")
    if not 0 < cfg.answer < cfg.length:
        raise UserError(f"--answer {cfg.answer} must be less than --length {cfg.length}")
    if (cfg.experts or cfg.ceilings) and not cfg.data:
        raise UserError("--experts and --ceilings need --data, questions with answers to ask them")
    if min(cfg.general, cfg.few, cfg.solutions, cfg.dev, cfg.test) < 1:
        raise UserError("--general, --few, --solutions, --dev and --test must be at least 1")
    if min(cfg.rank, cfg.count) < 0:
        raise UserError("--rank and --count must not be negative")


# Claims ------------------------------------------------------------------------------------------


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """The paper's order of arms, what fixed weights lack, how the weight moves, the two ratios."""
    found = [*_orders(rows), *_fixed(rows), *_moves(rows)]
    if "ceiling" in _arms(rows):
        found += _headlines(rows)
    return found


def _table(rows: list[Row], key: str, block: str = "tasks") -> dict[str, np.ndarray]:
    """``key`` per arm, [tasks, seeds], tasks and seeds in order of appearance."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["block"] == block and key in row:
            found.setdefault(row["arm"], {}).setdefault(row["task"], []).append(row[key])
    return {arm: np.array(list(tasks.values())) for arm, tasks in found.items()}


def _arms(rows: list[Row]) -> set[str]:
    return {row["arm"] for row in rows if row["block"] == "tasks"}


PROXY = "proxy 1"
NAMES = {
    "large": "the large model",
    "expert": "the small expert",
    PROXY: "proxy tuning",
    DYNAMIC: "dynamic fusion",
}
ORDERS = (
    (DYNAMIC, PROXY),
    (PROXY, "expert"),
    (DYNAMIC, "expert"),
    ("expert", "large"),
    (PROXY, "large"),
    (DYNAMIC, "large"),
)


def _orders(rows: list[Row]) -> Iterator[dict[str, Any]]:
    for key, words, sign in (("accuracy", "accuracy", 1), ("nll", "likelihood", -1)):
        mean = {arm: sign * values.mean(0) for arm, values in _table(rows, key).items()}
        what = "accuracy" if key == "accuracy" else "nats per token of the references, negated"
        for high, low in ORDERS:
            yield claim(
                f"{NAMES[high]} above {NAMES[low]}, {words}",
                f"difference of mean {what} over tasks, t interval over seeds",
                interval(mean[high] - mean[low]),
                above=0.0,
            )


def _fixed(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Fixed weights against one another and against the dynamic one, chosen on dev."""
    dev, test = _table(rows, "dev"), _table(rows, "accuracy")
    fixed = [arm for arm in test if arm.startswith("proxy")]
    if not dev or not fixed:
        return
    on_dev = np.stack([dev[arm] for arm in fixed]).mean(-1)  # [weights, tasks]
    on_test = np.stack([test[arm] for arm in fixed])  # [weights, tasks, seeds]
    each, over = on_dev.argmax(0), int(on_dev.mean(1).argmax())
    best = np.stack([on_test[weight, task] for task, weight in enumerate(each)])
    if len(fixed) > 1:
        yield claim(
            "no single fixed weight suits every task",
            "accuracy of the best weight per task - of the best for all, both chosen on dev",
            interval((best - on_test[over]).mean(0)),
            above=0.0,
        )
    apart = test[DYNAMIC] - best
    worst = int(apart.mean(1).argmin())
    task = _tasks(rows)[worst]
    yield claim(
        "dynamic fusion is never far below the best fixed weight",
        f"accuracy - that of the weight best on dev, worst task ({task}), t interval over seeds",
        interval(apart[worst]),
        above=-NEAR,
    )


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows if row["block"] == "tasks"))


def _moves(rows: list[Row]) -> Iterator[dict[str, Any]]:
    spread = _table(rows, "alpha_std")
    if DYNAMIC in spread:
        yield claim(
            "the weight varies from token to token",
            "standard deviation over tokens, mean over tasks, t interval over seeds",
            interval(spread[DYNAMIC].mean(0)),
            above=0.05,
        )
    shares = _picks(rows)
    leads = {
        task: np.array(of[task]) - np.max([of[other] for other in of if other != task], axis=0)
        for task, of in shares.items()
        if task in of and len(of) > 1
    }
    if leads:
        worst = min(leads, key=lambda task: leads[task].mean())
        yield claim(
            "a task's own expert is picked most often",
            f"share of tokens - that of the next expert, worst task ({worst}), t over seeds",
            interval(leads[worst]),
            above=0.0,
        )
    several, plain = _table(rows, "accuracy", "several"), _table(rows, "accuracy")
    if several:
        words = "dynamic fusion of several experts above the large model, accuracy"
        what = "difference of mean accuracy over tasks, t interval over seeds"
        lead = several[DYNAMIC].mean(0) - plain["large"].mean(0)
        yield claim(words, what, interval(lead), above=0.0)
    ones = _by_seed([row for row in rows if row["block"] == "identity"], "ones")
    if len(ones):
        yield claim(
            "where the large model is the base, the weight is 1",
            "share of tokens with weight 1 of those with any, mean over tasks, t over seeds",
            interval(ones),
            above=0.99,
        )


def _picks(rows: list[Row]) -> dict[str, dict[str, list[float]]]:
    """Per task and expert the share of tokens, [seeds]."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["block"] == "picks":
            found.setdefault(row["task"], {}).setdefault(row["expert"], []).append(row["share"])
    return found


def _by_seed(rows: list[Row], key: str) -> np.ndarray:
    """Means over tasks, one per seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return np.array([np.mean([row[key] for row in rows if row["seed"] == s]) for s in seeds])


def _headlines(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """The paper's ratio of averages, and the share of the gap, with one expert and with several."""
    for block, words in (("tasks", "one expert"), ("several", "several experts")):
        score = {arm: values.mean(0) for arm, values in _table(rows, "accuracy", block).items()}
        if DYNAMIC not in score or "ceiling" not in score:
            continue
        large = _table(rows, "accuracy")["large"].mean(0)
        fused, ceiling = score[DYNAMIC], score["ceiling"]
        yield claim(
            f"{words}: over .7 of the ceiling's score",
            "ratio of accuracies averaged over tasks, t interval over seeds",
            _ratio(fused, ceiling),
            above=0.7,
        )
        yield claim(
            f"{words}: over half of the gap recovered",
            "(dynamic - large) / (ceiling - large) of mean accuracies, t interval over seeds",
            _ratio(fused - large, ceiling - large),
            above=0.5,
        )


def _ratio(part: np.ndarray, whole: np.ndarray) -> Interval:
    """Of [S] numbers, over seeds; nothing is said where there is no whole in one of them."""
    if (whole <= 0).any():
        return Interval(np.nan, np.nan, np.nan, 0.95, len(whole))
    return interval(part / whole)


# Figures, summary, plan --------------------------------------------------------------------------

ORDER = {"base": 0, "large": 1, "expert": 2, "ceiling": 4}  # the rest between


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Accuracy and likelihood per task and arm, the weights used, and who is picked."""
    return list(_figures(rows, folder))


def _figures(rows: list[Row], folder: Path) -> Iterator[Path]:
    tasks = [row for row in rows if row["block"] == "tasks"]
    tasks.sort(key=lambda row: ORDER.get(row["arm"], 3))
    bars = partial(draw.bars, x="task", xlabel="")
    words = "accuracy (whole answers)"
    yield bars(tasks, y="accuracy", hue="arm", path=folder / "accuracy.png", ylabel=words)
    words = "nats per token of reference answers"
    yield bars(tasks, y="nll", hue="arm", path=folder / "nll.png", ylabel=words)
    yield draw.lines(
        [row for row in rows if row["block"] == "weights"],
        *("weight", "share"),
        hue="task",
        path=folder / "weights.png",
        title="Dynamic fusion: which weights are used",
        xlabel="weight",
        ylabel="share of tokens",
    )
    picks = [row for row in rows if row["block"] == "picks"]
    if picks:
        path, title = folder / "picks.png", "All experts at hand: which one acts"
        yield bars(picks, y="share", hue="expert", path=path, title=title, ylabel="share of tokens")


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds: accuracy per task, its average, nats per token, mean weight."""
    table = []
    for block in ("tasks", "several"):
        accuracy, nll = _table(rows, "accuracy", block), _table(rows, "nll", block)
        weights = _table(rows, "alpha", block)
        for arm, values in accuracy.items():
            row: Row = {"experts": "one" if block == "tasks" else "several", "arm": arm}
            row |= dict(zip(_tasks(rows), values.mean(1).tolist(), strict=True))
            row |= {"average": float(values.mean()), "nll": float(nll[arm].mean())}
            table.append(row | ({"weight": float(weights[arm].mean())} if arm in weights else {}))
    return table


def plan(cfg: Config) -> Draft:
    """The experts' fine-tuning step on the small base."""
    _check(cfg)
    config = replace(shape(cfg.base), dtype="bfloat16", remat="full")
    flags = dict(rank="--rank", micro="--tune.micro", batch="--tune.batch")
    how: Any = dict(length=min(cfg.length, config.max_length), rank=cfg.rank, flags=flags)
    return drafts.draft(config, "sft", cfg.tune, name=cfg.base, **how)


if __name__ == "__main__":
    main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="dynamic_logit_fusion",
        minutes=2,
        summary=summary,
        plan=plan,
    )
