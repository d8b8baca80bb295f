"""Delta learning (Geng et al. 2025): pairs of weak answers improve a student stronger than both.

Two weak models answer the same problems; the better one's answers are preferred to the worse
one's, whatever each answer is. Length-normalised DPO on such pairs may lift a student that answers
better than both, where fine-tuning on the better answers pulls it down. Blocks (--blocks):

  weak_pairs        pairs of many weak models, labelled by a verifier
  sections          a graded style: three sections over two, tied, reversed, imitated
  self_improvement  the student's own greedy answers over a smaller model's
  post_training     pairs by model size, in two settings (--settings), then what the gain depends
                    on (--analyses)

Settings: in "shared" all models are first fine-tuned on solutions of which a share has one wrong
step (--habits), so that their errors are of one kind and differ in rate; in "natural" they are the
pretrained models as they are. Learning rates (--lrs) are chosen on development problems, results
are those of test problems. "Sampled" accuracy is the chance that a sample is exactly the reference
solution; greedy accuracy stands beside it.

--preset paper is the authors' 8B recipe (Tulu-3-8B-SFT on Qwen2.5-3B over 1.5B answers, as they
published them; their prompts can be answered anew by servers of the two models). With
--pairs, --data or --questions any student is trained by that recipe instead:

  python -m experiments.delta_learning --preset paper --plan v5e:8x8
  python -m experiments.delta_learning --student FOLDER --pairs chosen.jsonl rejected.jsonl
  python -m experiments.delta_learning --student FOLDER --data preferences.jsonl
  python -m experiments.delta_learning --preset paper --data "" --columns --questions PROMPTS \\
      --servers http://one:8000 http://two:8000
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from w2s_jax import cli
from w2s_jax.errors import UserError
from w2s_jax.losses import preference as loss
from w2s_jax.models.shapes import shape
from w2s_jax.objectives import prefer
from w2s_jax.pipelines import delta_analyses as analyses
from w2s_jax.pipelines import delta_pairs
from w2s_jax.pipelines import delta_studies as studies
from w2s_jax.pipelines.delta_claims import claims
from w2s_jax.pipelines.delta_figures import draw
from w2s_jax.pipelines.delta_learning import Method, Runs
from w2s_jax.pipelines.delta_recipe import run_recipe, same_number
from w2s_jax.pipelines.delta_world import Bench
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row, Table

BLOCKS = ("weak_pairs", "sections", "self_improvement", "post_training")
ANALYSES = ("ladder", "labels", "losses", "saturation", "bases", "optimisation", "overlap")
SETTINGS = ("shared", "natural")
LOSSES = {  # means per token but for the sums that are named so
    "dpo": Method(partial(loss.dpo, beta=5.0)),
    "dpo_sum": Method(partial(loss.dpo, beta=0.1), length_mean=False),
    "ipo": Method(partial(loss.ipo, beta=1.0)),
    "hinge": Method(partial(loss.hinge, beta=5.0)),
    "apo_zero": Method(partial(loss.apo_zero, beta=5.0)),
    "simpo": Method(partial(loss.simpo, beta=2.5, target_margin=1.25), reference="none"),
    "orpo": Method(partial(loss.orpo, beta=0.1), reference="none", nll=1.0),
    "rpo": Method(partial(loss.dpo, beta=5.0), nll=1.0),
}
ADAM = Tune(lr=1e-4, batch=32, optimizer="adam", b2=0.95, warmup=0.25, schedule="cosine", final=0.1)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    blocks: tuple[str, ...] = BLOCKS
    """Studies to run: weak_pairs, sections, self_improvement, post_training."""
    settings: tuple[str, ...] = SETTINGS
    """Of post_training: shared, natural."""
    analyses: tuple[str, ...] = ANALYSES
    """After post_training: ladder, labels, losses, saturation, bases, optimisation, overlap."""
    student: str = "nano-3"
    """The model that is improved: a Hugging Face folder, hub id, or nano-1 .. nano-4."""
    shared: tuple[str, str] = ("nano-2", "nano-2")
    """Setting shared: the models that become the better and the worse weak model by habit."""
    natural: tuple[str, str] = ("nano-2", "nano-1")
    """Setting natural: the better and the worse weak model."""
    ladder: tuple[str, ...] = ("nano-1:0.5", "nano-1", "nano-2:0.25", "nano-2:0.5", "nano-2")
    """Weak models of weak_pairs and of the analysis of all pairs; name:0.5 is a checkpoint half
    way through pretraining."""
    bases: tuple[str, ...] = ("nano-3@1", "nano-2@1", "nano-1@1", "nano-2", "nano-2:0.5", "nano-1")
    """Analysis bases, in threes: another student, its better and its worse weak model."""
    habits: tuple[float, float, float] = (0.35, 0.4, 0.95)
    """Share of solutions with a wrong step that student, better and worse weak model learn from."""
    shares: tuple[float, ...] = (0.0, 0.33, 0.67, 1.0)
    """Analysis overlap: shares of the weak models' mistakes that are of the student's kind."""
    sizes: tuple[int, ...] = (80, 160, 320, 640)
    """Analysis saturation: numbers of pairs."""
    betas: tuple[float, ...] = (1.0, 5.0, 25.0)
    """Analysis optimisation: strengths of the pull to the reference."""
    epochs: float = 3.0
    """Analysis optimisation: passes over the pairs, at the highest of lrs."""
    seeds: int = 5
    """Repetitions: a seed draws prompts, habits, answers and order."""
    prompts: int = 640
    """Problems that the weak models answer, one pair each."""
    solutions: int = 1600
    """Solutions that a habit is learned from."""
    dev: int = 400
    """Held-out problems that choose the learning rate, the same for all seeds."""
    test: int = 800
    """Held-out problems that are reported."""
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
    lrs: tuple[float, ...] = (5e-5, 2e-4, 4e-4)
    """Learning rates among which development problems choose; ladder and losses leave out the
    highest."""
    tune: Tune = ADAM
    """How preferences are trained; a row of a batch is a pair."""
    sft_tune: Tune = ADAM
    """How the student is fine-tuned on the chosen answers."""
    habit_tune: Tune = field(
        default_factory=lambda: Tune(lr=1e-3, batch=32, optimizer="adam", schedule="linear")
    )
    """How habits are learned."""
    pairs: tuple[str, ...] = ()
    """Recipe: two files of answers to the same prompts, chosen and rejected (generate.serve)."""
    data: str = ""
    """Recipe: a preference file or data set of any usual format, instead of --pairs."""
    questions: str = ""
    """Recipe: prompts (file or data set) that the two models of --natural answer."""
    servers: tuple[str, ...] = ()
    """With --questions: where the models are served, an address each or one for both; here if
    none."""
    columns: tuple[str, ...] = ()
    """With --data: the better and the worse model's column, where it has a column per model."""
    split: str = ""
    """Of --data or --questions: which split."""
    count: int = 0
    """Recipe: the first so many rows; 0 for all."""
    template: str = "auto"
    """Recipe: chat template of the student: auto (its own), tulu, none, or a file."""
    separator: str = ""
    """Recipe, without a template: text between prompt and answer."""
    held: float = 0.05
    """Recipe: share of the prompts held out to measure on."""
    exam: str = ""
    """Recipe: questions with known answers (question, answer ending in #### n) for exact match."""
    exam_split: str = "test"
    """Which split of --exam; empty where it has none."""
    exam_count: int = 200
    """The first so many questions of --exam; 0 for all."""
    loss: str = "dpo"
    """Recipe: dpo (with --beta), or another name of the analysis losses."""
    sft: bool = False
    """Recipe: also fine-tune on the chosen answers, with --sft-tune."""
    rank: int = 0
    """Recipe: rank of adapters on a frozen student; 0 trains all weights."""
    compute: str = "float32"
    """Recipe: dtype of the arithmetic, bfloat16 on accelerators."""
    remat: str = "none"
    """Recipe: what the backward pass makes again (none, dots, attention, outputs, full)."""
    save: str = ""
    """Recipe: folder for the trained model, in Hugging Face layout."""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        settings=("shared",), student="nano-2", shared=("nano-1", "nano-1"),
        natural=("nano-1", "nano-1:0.5"),
        ladder=("nano-1:0.25", "nano-1:0.5", "nano-1"), analyses=("ladder", "optimisation"),
        bases=("nano-1", "nano-1:0.5", "nano-1:0.25"),
        shares=(0.0, 1.0), sizes=(16, 32, 64), betas=(5.0,), epochs=1.0, seeds=2, prompts=64,
        solutions=64, dev=12, test=20, greedy=10, lrs=(1e-4, 2e-4),
    ),
    # The card's headline run: 150k pairs, lr 5e-8, beta 5, batch 32, greedy answers, 2048 tokens
    "paper": dict(
        student="allenai/Llama-3.1-Tulu-3-8B-SFT",
        natural=("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        data="scottgeng00/delta_learning_model_ladder", split="train", count=150_000,
        columns=("qwen-2.5-3b-instruct", "qwen-2.5-1.5b-instruct"), length=2048, answer=2048,
        temperature=0.0, beta=5.0, seeds=1, compute="bfloat16", remat="full",
        tune=Tune(
            lr=5e-8, batch=32, b2=0.95, warmup=0.03, schedule="cosine", final=0.1, clip=1.0
        ),
    ),
}  # fmt: skip


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows: one per block, training and seed."""
    _check(cfg)
    if cfg.pairs or cfg.data or cfg.questions:
        yield from _recipe(cfg, ctx)
        return
    bench = _bench(cfg, ctx)
    for block in cfg.blocks:
        if block != "post_training":
            yield from _kept(cfg, ctx, block, partial(STUDIES[block], cfg, bench))
            continue
        for setting in cfg.settings:
            rows = _kept(cfg, ctx, setting, partial(_post_training, cfg, bench, setting))
            yield from rows
            home = "natural" if len(cfg.settings) == 1 and setting == "natural" else "shared"
            for name in cfg.analyses:
                if setting == (HOME[name] if len(cfg.settings) > 1 else home):
                    make = partial(_analysed, cfg, bench, setting, name, _picked(rows))
                    yield from _kept(cfg, ctx, name, make)


# Which setting an analysis belongs to; with one setting only, to that one.
HOME = dict.fromkeys(ANALYSES, "shared") | {"ladder": "natural", "bases": "natural"}


def _check(cfg: Config) -> None:
    for flag, known in (("blocks", BLOCKS), ("settings", SETTINGS), ("analyses", ANALYSES)):
        for name in getattr(cfg, flag):
            if name not in known:
                raise UserError(f"--{flag} {name!r} is unknown; choose from {', '.join(known)}")
    if not all(0 <= share <= 1 for share in (*cfg.habits, *cfg.shares)):
        raise UserError(f"--habits and --shares lie in [0, 1], got {cfg.habits}, {cfg.shares}")
    if cfg.loss not in LOSSES:
        raise UserError(f"--loss {cfg.loss!r} is unknown; choose from {', '.join(LOSSES)}")
    if len(cfg.columns) not in (0, 2):
        raise UserError(f"--columns names two, the better and the worse, got {len(cfg.columns)}")
    if cfg.pairs or cfg.data or cfg.questions:
        return
    if not 0 < cfg.answer < cfg.length:
        raise UserError(f"--answer {cfg.answer} must be less than --length {cfg.length}")
    if len(cfg.bases) % 3:
        raise UserError(f"--bases names students with two weak models each, got {cfg.bases}")
    if not cfg.lrs or len(cfg.ladder) < 2:
        raise UserError("--lrs needs a learning rate, --ladder two models")


def _bench(cfg: Config, ctx: Context) -> Bench:
    names = [f for f in Bench.__dataclass_fields__ if f not in ("ctx", "method")]
    method = Method(partial(loss.dpo, beta=cfg.beta))
    return Bench(ctx=ctx, method=method, **{name: getattr(cfg, name) for name in names})


def _kept(cfg: Config, ctx: Context, name: str, make: Any) -> list[Row]:
    """The rows of one study, from the workdir if they are there."""
    ctx.say(f"{name} ...")
    return ctx.stage(name, dict(vars(cfg), save="", blocks=(), analyses=()), make)


def _weak_pairs(cfg: Config, bench: Bench) -> list[Row]:
    weak = [bench.loaded(name) for name in cfg.ladder]
    return studies.weak_pairs(bench, bench.loaded(cfg.student), weak)


def _sections(cfg: Config, bench: Bench) -> list[Row]:
    return studies.sections(bench, shown=max(cfg.greedy, 10), longest=cfg.length - 56)


def _self(cfg: Config, bench: Bench) -> list[Row]:
    student, smaller = bench.loaded(cfg.student), bench.loaded(cfg.natural[0])
    return studies.self_improvement(bench, student, smaller)


STUDIES = {"weak_pairs": _weak_pairs, "sections": _sections, "self_improvement": _self}


def _cast(cfg: Config, bench: Bench, setting: str) -> tuple[Runs, Runs, Runs]:
    return studies.cast(bench, setting, cfg.habits, cfg.shared, cfg.natural)


def _post_training(cfg: Config, bench: Bench, setting: str) -> list[Row]:
    return studies.post_training(bench, setting, *_cast(cfg, bench, setting))


def _picked(rows: list[Row]) -> float:
    """The learning rate that development problems chose for pairs of the delta."""
    return next(r["lr"] for r in rows if r["training"] == "dpo delta" and r["picked"])


def _analysed(cfg: Config, bench: Bench, setting: str, name: str, lr: float) -> list[Row]:
    if name == "ladder":
        rungs = [bench.loaded(rung) for rung in cfg.ladder]
        return analyses.ladder(bench, bench.loaded(cfg.student), rungs, cfg.lrs[:2])
    if name == "bases":
        models = [bench.loaded(model) for model in cfg.bases]
        return analyses.bases(
            bench, list(zip(models[::3], models[1::3], models[2::3], strict=True))
        )
    if name == "overlap":
        models = (cfg.student, *cfg.shared)
        return analyses.overlap(bench, models, cfg.habits, cfg.shares, "operand", lr)
    student, better, worse = _cast(cfg, bench, setting)
    if name == "labels":
        return analyses.labels(bench, student, better, worse, lr)
    if name == "losses":
        return analyses.losses(bench, student, better, worse, LOSSES, cfg.lrs[:2])
    if name == "saturation":
        return analyses.saturation(bench, student, better, worse, cfg.sizes, lr)
    methods = {beta: Method(partial(loss.dpo, beta=beta)) for beta in cfg.betas}
    points = min(10, int(cfg.epochs * cfg.prompts / cfg.tune.batch))
    return analyses.optimisation(
        bench, student, better, worse, methods, max(cfg.lrs), epochs=cfg.epochs, points=points
    )


def _recipe(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Preference tuning of any student on pairs from files, data sets or served models."""
    how = dict(length=cfg.length, template=cfg.template, separator=cfg.separator)
    columns = (cfg.columns[0], cfg.columns[1]) if cfg.columns else None
    pairs = delta_pairs.gathered(
        ctx, student=cfg.student, files=cfg.pairs, data=cfg.data, questions=cfg.questions,
        models=cfg.natural, servers=cfg.servers, split=cfg.split or None, columns=columns,
        count=cfg.count, tokens=cfg.answer, temperature=cfg.temperature, **how,  # pyright: ignore
    )  # fmt: skip
    method = LOSSES[cfg.loss]
    if cfg.loss == "dpo":
        method = Method(partial(loss.dpo, beta=cfg.beta))
    exam = _exam(cfg) if cfg.exam else None
    yield from run_recipe(
        pairs, student=cfg.student, ctx=ctx, tune=cfg.tune,
        objective=partial(prefer, **method._asdict()), referred=method.reference == "column",
        sft=cfg.sft_tune if cfg.sft else None, held=cfg.held, exam=exam,
        verify=same_number if exam is not None else None, tokens=cfg.answer, rank=cfg.rank,
        compute=cfg.compute, remat=cfg.remat, save=cfg.save, **how,  # pyright: ignore
    )  # fmt: skip


def _exam(cfg: Config) -> Table:
    split = cfg.exam_split or None
    return delta_pairs.asked(cfg.exam, split=split, count=cfg.exam_count, column="question")


def plan(cfg: Config) -> Draft:
    """The preference step of the student, reference log-probabilities as a column."""
    _check(cfg)
    config = replace(shape(cfg.student), dtype="bfloat16", remat="full")
    return drafts.draft(
        config,
        "dpo",
        cfg.tune,
        length=cfg.length,
        rank=cfg.rank,
        flags={
            "rank": "--rank",
            "micro": "--tune.micro",
            "batch": "--tune.batch",
            "moments": "--tune.moments",
        },
        name=cfg.student,
    )


NUMBERS = ("sampled", "greedy", "sections", "gain", "ranked", "accuracy", "margin", "exact")


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds per block and training, the picked learning rates only."""
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        if r.get("picked", 1) and r["block"] not in ("ladder", "optimisation"):
            what = [str(r[k]) for k in ("setting", "student", "share", "pairs", "label", "loss")
                    if k in r and r["block"] != "weak_pairs"]  # fmt: skip
            groups.setdefault((r["block"], " ".join(what), r.get("training", "")), []).append(r)
    table = []
    for (block, what, training), mine in groups.items():
        row: Row = dict(block=block, what=what, training=training)
        for name in NUMBERS:
            if name in mine[0]:
                row[name] = float(np.mean([r[name] for r in mine]))
        table.append(row | dict(seeds=len(mine)))
    return table


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
