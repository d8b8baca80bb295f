"""Delta learning (Geng et al. 2025): pairs of weak answers improve a student stronger than both.

Two weak models answer the same problems; the better one's answers are preferred to the worse
one's, whatever each answer is. Length-normalised DPO on such pairs may lift a student that answers
better than both, where fine-tuning on the better answers pulls it down. Two settings:

  shared   all three models are first fine-tuned on solutions of which a share has one wrong step
           (--habits: student, chosen, rejected), so that their errors are of one kind and differ
           in rate
  natural  the pretrained models as they are

A gain is one of the sampled distribution (the chance of sampling the reference solution); greedy
accuracy hardly moves.

This is the post-training block on the nano ladder. --preset paper holds the authors' 8B recipe
(Tulu-3-8B-SFT on Qwen2.5-3B over 1.5B answers) for --plan; its run needs the answers as files.

  python -m experiments.delta_learning --preset paper --plan v5e:8x8
  python -m experiments.delta_learning --pairs chosen.jsonl rejected.jsonl --student FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np

from w2s_jax import cli, columns, figures, mesh
from w2s_jax.data import arithmetic, sources
from w2s_jax.data.arithmetic import RESPONSE, Problem
from w2s_jax.data.arithmetic_mistakes import corrupt
from w2s_jax.data.pairs import pack_pairs
from w2s_jax.data.text import encode
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.losses.preference import dpo
from w2s_jax.metrics.statistics import claim, interval
from w2s_jax.models import hf
from w2s_jax.models.shapes import shape
from w2s_jax.objectives import prefer
from w2s_jax.pipelines import delta_learning as delta
from w2s_jax.pipelines.delta_learning import Runs
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row, Table

SETTINGS = ("shared", "natural")
DATA = (
    "delta",
    "tied",
    "reversed",
)  # what is chosen over what: better > worse, better > better, ...
TEST, PROMPTS, HABIT = 71_000_000, 72_000_000, 73_000_000  # seeds of problems that never meet


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    student: str = "nano-3"
    """The model that is improved: a Hugging Face folder, hub id, or nano-1 .. nano-4."""
    chosen: str = "nano-2"
    """The weak model whose answers are preferred."""
    rejected: str = "nano-2"
    """The weaker model."""
    natural: tuple[str, str] = ("nano-2", "nano-1")
    """Chosen and rejected model of the setting natural."""
    settings: tuple[str, ...] = SETTINGS
    """Of shared, natural."""
    habits: tuple[float, float, float] = (0.35, 0.4, 0.95)
    """Setting shared: share of solutions with a wrong step that student, chosen and rejected learn
    from."""
    seeds: int = 5
    """Repetitions: a seed draws prompts, habits, answers and order."""
    prompts: int = 640
    """Problems that the weak models answer, one pair each."""
    solutions: int = 1600
    """Setting shared: solutions that each model is fine-tuned on first."""
    test: int = 800
    """Held-out problems, the same for all seeds."""
    greedy: int = 200
    """Of these, how many are also answered greedily."""
    length: int = 128
    """Longest prompt and answer in tokens."""
    answer: int = 56
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Of the weak models' answers; 0 is greedy, as in the paper."""
    beta: float = 5.0
    """Strength of the pull to the reference, for mean log-probabilities."""
    tune: Tune = field(
        default_factory=lambda: Tune(
            lr=3e-4, batch=32, optimizer="adam", b2=0.95, warmup=0.25, schedule="cosine", final=0.1
        )
    )
    """How preferences are trained."""
    sft_tune: Tune = field(
        default_factory=lambda: Tune(
            lr=3e-4, batch=32, optimizer="adam", b2=0.95, warmup=0.25, schedule="cosine", final=0.1
        )
    )
    """How the student is fine-tuned on the chosen answers."""
    habit_tune: Tune = field(
        default_factory=lambda: Tune(lr=1e-3, batch=32, optimizer="adam", schedule="linear")
    )
    """How habits are learned."""
    pairs: tuple[str, ...] = ()
    """Two files of answers to the same prompts, chosen and rejected, as generate.serve writes them
    (prompt, response; the student's template already applied): train on these instead."""
    save: str = ""
    """With --pairs: folder for the trained model, in Hugging Face layout."""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        student="nano-2", chosen="nano-1", rejected="nano-1", natural=("nano-1", "nano-1@1"),
        seeds=2, prompts=64, solutions=64, test=40, greedy=10,
    ),
    # The card's headline run: 150k pairs, lr 5e-8, beta 5, batch 32, greedy answers, 2048 tokens
    "paper": dict(
        student="allenai/Llama-3.1-Tulu-3-8B-SFT", chosen="Qwen/Qwen2.5-3B-Instruct",
        rejected="Qwen/Qwen2.5-1.5B-Instruct", pairs=("chosen.jsonl", "rejected.jsonl"),
        length=2048, temperature=0.0, beta=5.0, seeds=1,
        tune=Tune(
            lr=5e-8, batch=32, b2=0.95, warmup=0.03, schedule="cosine", final=0.1, clip=1.0
        ),
    ),
}  # fmt: skip


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: one per setting, seed and training."""
    _check(cfg)
    if cfg.pairs:
        yield from _from_files(cfg, ctx)
        return
    for setting in cfg.settings:
        inputs = dict(vars(cfg), settings=setting, save="", seeds=cfg.seeds)
        yield from ctx.stage(setting, inputs, partial(_setting, cfg, ctx, setting))


def _check(cfg: Config) -> None:
    for name in cfg.settings:
        if name not in SETTINGS:
            raise UserError(f"--settings {name!r} is unknown; choose from {', '.join(SETTINGS)}")
    if len(cfg.pairs) not in (0, 2):
        raise UserError(f"--pairs takes two files, chosen and rejected, got {len(cfg.pairs)}")
    if not all(0 <= share <= 1 for share in cfg.habits):
        raise UserError(f"--habits are shares in [0, 1], got {cfg.habits}")
    if not 0 < cfg.answer < cfg.length:
        raise UserError(f"--answer {cfg.answer} must be less than --length {cfg.length}")


def _setting(cfg: Config, ctx: Context, setting: str) -> list[Row]:
    """All rows of one setting."""
    seeds = range(cfg.seeds)
    names = (cfg.student, cfg.chosen, cfg.rejected)
    if setting == "natural":
        names = (cfg.student, *cfg.natural)
    models = [delta.loaded(name, cfg.seeds) for name in names]
    if setting == "shared":
        habits = zip(models, cfg.habits, strict=True)
        models = [_with_habit(cfg, m, share, number) for number, (m, share) in enumerate(habits)]
        ctx.say(f"{setting}: habits learned")
    student, *weak = models
    prompts = [_prompts(cfg, student, seed) for seed in seeds]
    said = [[_answers(cfg, m, seed, prompts[seed], draw) for seed in seeds]
            for draw, m in enumerate((weak[0], weak[1], weak[0]))]  # fmt: skip
    test = _cut(arithmetic.problems(TEST, cfg.test + cfg.test // 4), student, cfg.length, cfg.test)
    ctx.say(f"{setting}: {3 * cfg.seeds * cfg.prompts} answers drawn")
    better, worse, again = said
    sides = {"delta": (better, worse), "tied": (better, again), "reversed": (worse, better)}
    tables = [
        delta.paired(
            student, seed, prompts[seed], *(s[seed] for s in sides[name]), length=cfg.length
        )
        for name in DATA
        for seed in seeds
    ]
    tuned = delta.preferred(
        delta.repeated(student, len(DATA)), tables, cfg.tune, [*seeds] * len(DATA), beta=cfg.beta
    )
    texts = [_as_text(t["chosen"]) for t in tables[: cfg.seeds]]
    copied = delta.fine_tuned(student, texts, cfg.sft_tune, seeds)
    trained = [("student", student), ("sft", copied)]
    trained += [(f"dpo {name}", _block(tuned, i, cfg.seeds)) for i, name in enumerate(DATA)]
    trained += [("weak chosen", weak[0]), ("weak rejected", weak[1])]
    return [row for name, runs in trained for row in _measured(cfg, setting, name, runs, test)]


def _with_habit(cfg: Config, given: Runs, share: float, number: int) -> Runs:
    """Each run fine-tuned on solutions of its own, of which ``share`` has one wrong step."""
    tables = []
    for seed in range(cfg.seeds):
        drawn = arithmetic.draw(HABIT + 10 * seed + number, cfg.solutions + cfg.solutions // 4)
        rng = Random(f"{seed}-{number}")
        rows = Table(
            {
                "prompt": np.array([_ask(p) for p in drawn], object),
                "response": np.array(
                    [RESPONSE.format(_solution(p, rng, share)) for p in drawn], object
                ),
            }
        )
        tables.append(_cut(rows, given, cfg.length, cfg.solutions))
    return delta.fine_tuned(given, tables, cfg.habit_tune, range(cfg.seeds))


def _cut(rows: Table, given: Runs, length: int, count: int) -> Table:
    """The first ``count`` rows that fit in ``length`` tokens, tokenised."""
    table, _ = encode(rows, given.tokenizer, length=length, eos=True)
    if len(table) < count:
        raise UserError(f"only {len(table)} rows fit in {length} tokens: raise --length")
    return table.take(np.arange(count))


def _solution(problem: Problem, rng: Random, share: float) -> str:
    wrong = float(rng.random() < share)
    return corrupt(problem, rng, outcome_error=wrong, step_error=wrong).text


def _ask(problem: Problem) -> str:
    return arithmetic.PROMPT.format(problem.question)


def _prompts(cfg: Config, student: Runs, seed: int) -> Table:
    """Problems whose prompt leaves room for an answer."""
    drawn = arithmetic.problems(PROMPTS + seed, 2 * cfg.prompts)
    sizes = np.array([len(ids) for ids in student.tokenizer.encode_ids(list(drawn["prompt"]))])
    fits = np.flatnonzero(sizes + 1 + cfg.answer <= cfg.length)
    if len(fits) < cfg.prompts:
        raise UserError(
            f"only {len(fits)} of {len(drawn)} prompts leave room for an answer of {cfg.answer} "
            f"tokens in {cfg.length}: raise --length"
        )
    return drawn.take(fits[: cfg.prompts])


def _answers(cfg: Config, given: Runs, seed: int, prompts: Table, draw: int) -> list[list[int]]:
    key = jax.random.fold_in(jax.random.key(seed), draw)
    asked = Table({"prompt": prompts["prompt"]})
    how = dict(tokens=cfg.answer, temperature=cfg.temperature)
    return delta.answers(given, seed, asked, key, **how)  # pyright: ignore[reportArgumentType]


def _as_text(side: dict[str, np.ndarray]) -> Table:
    return Table({"tokens": side["tokens"], "mask": side["mask"]})


def _block(runs: Runs, i: int, size: int) -> Runs:
    part = slice(i * size, (i + 1) * size)
    return replace(runs, params=jax.tree.map(lambda leaf: leaf[part], runs.params))


def _measured(cfg: Config, setting: str, name: str, runs: Runs, test: Table) -> list[Row]:
    chances = delta.exactness(runs, test).mean(1)
    part = test.take(np.arange(min(cfg.greedy, len(test))))
    rows = []
    for seed, chance in enumerate(chances):
        row: Row = dict(block="posttraining", setting=setting, training=name, seed=seed)
        row["sampled"] = float(chance)
        if len(part):
            ask = (runs.model, runs.run(seed), runs.tokenizer, list(part["prompt"]))
            texts = complete(*ask, jax.random.key(0), tokens=cfg.answer)
            row["greedy"] = arithmetic.score(list(part["answer"]), texts)["accuracy"]
        rows.append(row)
    return rows


def _from_files(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Preference tuning on two files of answers: the authors' recipe, for any student."""
    chosen, rejected = (sources.read(name, columns=("prompt", "response")) for name in cfg.pairs)
    texts = [list(t["prompt"][np.arange(len(t))]) for t in (chosen, rejected)]
    if texts[0] != texts[1]:
        raise UserError(f"{cfg.pairs[0]} and {cfg.pairs[1]} answer different prompts")
    where = mesh.make_mesh(ctx.mesh) if ctx.mesh else None
    model, params, tokenizer = hf.load(cfg.student, mesh=where)
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    prompts = [start + ids for ids in tokenizer.encode_ids(texts[0])]
    sides = [
        [ids + end for ids in tokenizer.encode_ids(list(t["response"][np.arange(len(t))]))]
        for t in (chosen, rejected)
    ]
    fits = [i for i, p in enumerate(prompts) if len(p) < cfg.length - 2]
    cut = [[side[i][: cfg.length - len(prompts[i])] for i in fits] for side in sides]
    ctx.say(f"{len(fits)} pairs; {len(prompts) - len(fits)} left out for prompts that are too long")
    tables = pack_pairs([prompts[i] for i in fits], *cut, per_row=1, length=cfg.length)
    tables = columns.add_reference(model, params, tables, cache=ctx.workdir, mesh=where)
    objective = prefer(model, partial(dpo, beta=cfg.beta))
    state = fit(
        objective, params, tables, cfg.tune, jax.random.key(0), axes=model.axes, mesh=where,
        workdir=ctx.folder("train", dict(vars(cfg), save="")), track=ctx.track,
        progress=ctx.progress,
    )  # fmt: skip
    if cfg.save:
        hf.export(model, state.params, cfg.save, tokenizer)
        ctx.say(f"saved {cfg.save}")
    after = columns.add_reference(model, state.params, tables, mesh=where)
    margins = [_margins(a, b) for a, b in zip(after, tables, strict=True)]
    margin = np.concatenate(margins)
    yield dict(
        block="files", setting="files", training="dpo delta", seed=0, pairs=len(fits),
        accuracy=float((margin > 0).mean()), margin=float(margin.mean()),
    )  # fmt: skip


def _margins(after: Table, before: Table) -> np.ndarray:
    """How much each pair's margin of summed log-probabilities grew, nats."""
    real = np.asarray(before["pairs"]["weight"]) > 0
    change = np.asarray(after["pairs"]["ref"]) - np.asarray(before["pairs"]["ref"])
    return (change[..., 0] - change[..., 1])[real]


def plan(cfg: Config) -> Draft:
    """The preference step of the student, reference log-probabilities as a column."""
    _check(cfg)
    config = replace(shape(cfg.student), dtype="bfloat16", remat="full")
    return drafts.draft(
        config,
        "dpo",
        cfg.tune,
        length=cfg.length,
        flags={"micro": "--tune.micro", "batch": "--tune.batch", "moments": "--tune.moments"},
        name=cfg.student,
    )


def claims(rows: list[Row]) -> list[dict]:
    """The card's shape per setting, each judged by its interval over seeds."""
    made = []
    for setting in dict.fromkeys(r["setting"] for r in rows if r["block"] == "posttraining"):
        mine = [r for r in rows if r["setting"] == setting]
        score = {
            name: np.array([r["sampled"] for r in mine if r["training"] == name])
            for name in dict.fromkeys(r["training"] for r in mine)
        }
        for name, higher, lower in (
            ("DPO on the delta above the student", "dpo delta", "student"),
            ("DPO on the delta above tied pairs", "dpo delta", "dpo tied"),
            ("tied pairs above reversed pairs", "dpo tied", "dpo reversed"),
            ("student above SFT on the chosen answers", "student", "sft"),
            ("student above the better weak model", "student", "weak chosen"),
        ):
            words = "difference of sampled accuracy, mean over seeds, t interval"
            estimate = interval(score[higher] - score[lower])
            made.append(claim(f"{setting}: {name}", words, estimate, above=0))
    return made


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds per setting and training."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r["setting"], r["training"]), []).append(r)
    table = []
    for (setting, training), mine in groups.items():
        row: Row = dict(setting=setting, training=training)
        for name in ("sampled", "greedy", "accuracy", "margin"):
            if name in mine[0]:
                row[name] = float(np.mean([r[name] for r in mine]))
        table.append(row | dict(seeds=len(mine)))
    return table


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Sampled and greedy accuracy after each training."""
    mine = [r for r in rows if r["block"] == "posttraining"]
    return [
        figures.bars(
            mine, "training", key, panel="setting", path=folder / f"{key}.png",
            title=f"Accuracy after training on weak pairs, {key}", ylabel=f"{key} accuracy",
        )
        for key in ("sampled", "greedy")
        if mine and key in mine[0]
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """The command line; see ``cli.main``."""
    return cli.main(
        Config,
        run,
        figures=draw,
        claims=claims,
        presets=PRESETS,
        paper="delta_learning",
        minutes=15,
        summary=summary,
        plan=plan,
        argv=argv,
    )


if __name__ == "__main__":
    main()
