"""The distillation zoo: every divergence, in every way of having a teacher, beside one another.

Not a paper but the comparison that its readers rebuild: which divergence, from which source, for
which student. Blocks (--blocks):

  tokens    decoders of the nano family on solved problems of the arithmetic world: divergences x
            {stored: the teacher's top tokens, made once; live: its whole distribution, made in the
            step; on-policy: the same on the student's own answers, sampled in the step} x students
  pictures  digits, or any pictures (--pictures mnist.npz): losses x {stored logits; live: teacher
            and student see one moved picture} x students, then fewer labels, matched features and
            born-again students

All runs of one student in one mode (losses x learning rates x seeds) are one program. Learning
rates are chosen on development data for every loss by itself; results are those of test data. For
"sft" and "ce" the teacher says nothing: they learn the same rows from their labels.

With --data any student is distilled from any teacher of the same vocabulary, at any size:

  python -m experiments.distillation_zoo --data prompts.jsonl --students FOLDER --teacher FOLDER \\
      --modes on-policy --divergences reverse_kl --save OUT
  python -m experiments.distillation_zoo --preset paper --plan v5e:8x8
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from w2s_jax import cli
from w2s_jax.errors import UserError
from w2s_jax.models.shapes import shape
from w2s_jax.pipelines import zoo_tokens
from w2s_jax.pipelines.distillation_recipe import MODES, Words, run_recipe, texts
from w2s_jax.pipelines.zoo_findings import claims, figures, summary
from w2s_jax.pipelines.zoo_pictures import LOSSES, Pictures
from w2s_jax.pipelines.zoo_tokens import Zoo
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft
from w2s_jax.types import Row

BLOCKS = ("tokens", "pictures")
PARTS = ("losses", "counts", "matches", "generations")
ADAM = Tune(batch=16, epochs=1, optimizer="adam", b2=0.95, schedule="cosine", warmup=0.1, clip=1.0)
SMALL = Tune(batch=50, steps=1000, optimizer="adam", schedule="cosine", clip=0.0)


@dataclass(frozen=True)
class Config:
    """The numbers of the experiment; the defaults are the laptop preset."""

    blocks: tuple[str, ...] = BLOCKS
    """What to compare: tokens, pictures."""
    seeds: int = 5
    """Runs per setting: a seed draws the rows and their order (of pictures also the weights). The
    recipe is one run."""
    teacher: str = "nano-3"
    """Tokens: the teacher, nano-1 .. nano-4; with --data a folder or hub id."""
    students: tuple[str, ...] = ("nano-1", "nano-2")
    """Tokens: pretrained students, smaller than the teacher."""
    modes: tuple[str, ...] = MODES
    """Tokens: stored, live, on-policy."""
    divergences: tuple[str, ...] = ("sft", *zoo_tokens.KINDS)
    """Tokens: what to compare; "renormalised" joins those of a stored teacher."""
    problems: int = 1600
    """Tokens: problems to learn from, each seed its own."""
    steps: tuple[int, ...] = (1, 2, 3)
    """Tokens: steps of a problem's solution."""
    dev: int = 200
    """Tokens: held-out problems that choose learning rates."""
    test: int = 600
    """Tokens: held-out problems that are reported."""
    own: int = 100
    """Tokens: of each of these, how many the students answer themselves."""
    length: int = 96
    """Tokens: longest problem with its solution."""
    answer: int = 40
    """Tokens: longest solution."""
    top: int = 8
    """Tokens: how many a stored teacher keeps per prediction."""
    lrs: tuple[float, ...] = (1e-3, 4e-3)
    """Tokens: learning rates to choose from on dev."""
    tune: Tune = ADAM
    """Tokens: how students train; its learning rate gives way to --lrs."""
    pictures: str = ""
    """Pictures: an npz file or a name (mnist, fashion_mnist, cifar10, cifar100); empty: digits."""
    parts: tuple[str, ...] = PARTS
    """Pictures: losses, counts (fewer labels), matches (of features), generations."""
    losses: tuple[str, ...] = tuple(LOSSES)
    """Pictures: what to compare."""
    picture_teacher: str = "cnn-32-64"
    """Pictures: stages of 32 and 64 channels; mlp-16 is one layer of 16 units."""
    picture_students: tuple[str, ...] = ("mlp-8", "mlp-32", "cnn-8-16")
    """Pictures: the students; counts and generations take the second, matches the last."""
    picture_train: int = 1000
    """Pictures: rows that the teacher learns from."""
    picture_dev: int = 197
    """Pictures: rows that choose learning rates."""
    picture_test: int = 600
    """Pictures: rows that are reported."""
    labels: tuple[int, ...] = (200, 50, 1000)
    """Pictures: rows that a student learns from; the first in all parts, all in counts."""
    shift: int = 1
    """Pictures: pixels by which live pictures, and the teacher's in training, are moved."""
    picture_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Pictures: learning rates to choose from on dev."""
    picture_tune: Tune = SMALL
    """Pictures: how students train; its learning rate gives way to --picture-lrs."""
    teacher_tune: Tune = field(default_factory=lambda: replace(SMALL, lr=1e-2, steps=3000))
    """Pictures: how the teacher trains."""
    data: str = ""
    """Recipe: prompts, with responses unless all of it is on-policy (columns prompt, response)."""
    split: str = ""
    """Recipe: split of --data, for data sets that have several."""
    count: int = 0
    """Recipe: the first so many rows; 0 for all."""
    template: str = "auto"
    """Recipe: chat template: auto (the tokenizer's own), tulu, none, or a file."""
    separator: str = ""
    """Recipe, without a template: text between prompt and response."""
    held: float = 0.05
    """Recipe: share of the prompts held out to measure on."""
    lam: float = 1.0
    """Recipe, on-policy: share of batches that the student answers itself (GKD's lambda)."""
    temperature: float = 1.0
    """Recipe, on-policy: of the student's answers."""
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
        parts=("losses", "counts"), seeds=2, teacher="nano-2", students=("nano-1",),
        divergences=("forward_kl",),
        problems=32, steps=(1,), dev=20, test=30, own=4, length=64, answer=24, lrs=(1e-3,),
        picture_teacher="mlp-32", picture_students=("mlp-8",), picture_lrs=(1e-2,),
        picture_train=200, picture_dev=50, picture_test=100, labels=(60,),
        losses=("ce", "kd T=4"), modes=("stored", "on-policy"),
        picture_tune=replace(SMALL, steps=20),
        teacher_tune=replace(SMALL, lr=1e-2, steps=50),
    ),
    # no paper's: a 7B teacher into a 0.5B student on the student's own answers, with the loss and
    # learning rate that TRL's DistillationTrainer has by default
    "paper": dict(
        blocks=(), seeds=1, teacher="Qwen/Qwen2.5-7B-Instruct",
        students=("Qwen/Qwen2.5-0.5B-Instruct",), modes=("on-policy",),
        divergences=("reverse_kl",), data="trl-lib/ultrafeedback-prompt", split="train",
        length=1024, answer=512, compute="bfloat16", remat="full",
        tune=Tune(lr=1e-6, batch=64, epochs=1, schedule="linear", clip=1.0),
    ),
}  # fmt: skip


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows of the blocks, or of the recipe where there is --data."""
    _check(cfg)
    if cfg.data:
        yield from _recipe(cfg, ctx)
        return
    if "tokens" in cfg.blocks:
        yield from _tokens(cfg, ctx)
    if "pictures" in cfg.blocks:
        yield from _pictures(cfg, ctx)


def _check(cfg: Config) -> None:
    known: dict[str, tuple[str, ...]] = dict(blocks=BLOCKS, modes=MODES, parts=PARTS)
    known |= dict(divergences=tuple(zoo_tokens.STORED), losses=tuple(LOSSES))
    for flag, names in known.items():
        for name in getattr(cfg, flag):
            if name not in names:
                raise UserError(f"--{flag} {name!r} is unknown; choose from {', '.join(names)}")
    lists = ("students", "modes", "divergences", "lrs", "parts", "losses", "labels")
    for name in (*lists, "picture_students", "picture_lrs", *(() if cfg.data else ("blocks",))):
        flag, values = f"--{name.replace('_', '-')}", getattr(cfg, name)
        if not values:
            raise UserError(f"{flag} needs one entry at least")
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{flag} names {twice[0]} twice: its runs would count twice")
    _check_numbers(cfg)


def _check_numbers(cfg: Config) -> None:
    least = dict.fromkeys(("shift", "count", "rank"), 0)
    least |= dict.fromkeys(("seeds", "problems", "dev", "test", "own", "top", "labels"), 1)
    least |= dict.fromkeys(("picture_train", "picture_dev", "picture_test"), 1)
    for name, low in least.items():
        given = getattr(cfg, name)
        if np.min(given) < low:
            raise UserError(f"--{name.replace('_', '-')} must be {low} or more, got {given}")
    for lr in (*cfg.lrs, *cfg.picture_lrs):
        replace(cfg.tune, lr=lr)  # refuses a rate that is none
    if not 0 < cfg.answer < cfg.length:
        raise UserError(f"--answer {cfg.answer} must be less than --length {cfg.length}")
    if cfg.own > min(cfg.dev, cfg.test):
        raise UserError(f"--own {cfg.own} is more than --dev {cfg.dev} or --test {cfg.test}")
    if not 0 <= cfg.lam <= 1:
        raise UserError(f"--lam is a share of batches, from 0 to 1, got {cfg.lam:g}")
    if not 0 < cfg.held < 1:
        raise UserError(f"--held is a share of held-out prompts, between 0 and 1: {cfg.held:g}")


def _tokens(cfg: Config, ctx: Context) -> Iterator[Row]:
    names = [f.name for f in fields(Zoo) if f.name != "ctx"]
    zoo = Zoo(ctx=ctx, **{name: getattr(cfg, name) for name in names})
    usable = {mode: _usable(cfg, mode) for mode in cfg.modes}
    if not any(usable.values()):
        raise UserError(
            f"none of --divergences {' '.join(cfg.divergences)} is for --modes "
            f"{' '.join(cfg.modes)}: sft needs given rows, renormalised a stored teacher"
        )
    for student in cfg.students:
        ctx.say(f"{student} from {cfg.teacher}")
        for mode, losses in usable.items():
            if losses:
                yield from zoo.run(student, mode, losses)


def _usable(cfg: Config, mode: str) -> list[str]:
    """What of --divergences makes sense in a mode."""
    names = [name for name in cfg.divergences if name in zoo_tokens.LOSSES[mode]]
    alone = mode == "stored" and "forward_kl" in names and "renormalised" not in names
    return [*names, "renormalised"] if alone else names


def _pictures(cfg: Config, ctx: Context) -> Iterator[Row]:
    zoo = Pictures(
        ctx=ctx, data=cfg.pictures, seeds=cfg.seeds, train=cfg.picture_train,
        dev=cfg.picture_dev, test=cfg.picture_test, labels=cfg.labels, losses=cfg.losses,
        teacher=cfg.picture_teacher, shift=cfg.shift,
        lrs=cfg.picture_lrs, teacher_tune=cfg.teacher_tune, tune=cfg.picture_tune,
    )  # fmt: skip
    yield zoo.teacher_row()
    several = cfg.picture_students
    middle = several[min(1, len(several) - 1)]
    for student in several if "losses" in cfg.parts else ():
        for mode in ("stored", "live"):
            yield from _kept(cfg, zoo, "compared", student, mode)
    for part, student in (("counts", middle), ("matches", several[-1]), ("generations", middle)):
        if part in cfg.parts:
            yield from _kept(cfg, zoo, part, student)


def _kept(cfg: Config, zoo: Pictures, what: str, *which: str) -> list[Row]:
    """The rows of one comparison, from the workdir if they are there."""
    zoo.ctx.say(f"pictures: {what} {' '.join(which)}")
    parts = (zoo.splits.train, zoo.splits.dev, zoo.splits.test)
    inputs = dict(config=cfg, what=what, which=which, data=[part.digest() for part in parts])
    return zoo.ctx.stage(what, inputs, lambda: list(getattr(zoo, what)(*which)))


def _recipe(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Distillation of one teacher into one student on prompts from a file or a data set."""
    for flag in ("students", "modes", "divergences"):
        if len(getattr(cfg, flag)) != 1:
            raise UserError(f"with --data name one of --{flag}, not {len(getattr(cfg, flag))}")
    (student,), (mode,), (name,) = cfg.students, cfg.modes, cfg.divergences
    if name not in zoo_tokens.LOSSES[mode]:
        why = "learns from given responses" if name == "sft" else "is for stored teachers"
        raise UserError(f"--divergences {name} {why}: --modes {mode} has none")
    yield from run_recipe(
        texts(cfg.data, split=cfg.split or None, count=cfg.count), student=student,
        teacher=cfg.teacher, ctx=ctx, tune=cfg.tune, mode=mode, name=name,
        divergence=zoo_tokens.LOSSES[mode][name], lam=cfg.lam, temperature=cfg.temperature,
        words=Words(cfg.length, cfg.answer, cfg.template, cfg.separator), top=cfg.top,
        held=cfg.held, rank=cfg.rank, compute=cfg.compute, remat=cfg.remat, save=cfg.save,
    )  # fmt: skip


def plan(cfg: Config) -> Draft:
    """The step of the first student in the first mode; on-policy, its sampling included."""
    _check(cfg)
    student, teacher = (replace(shape(n), dtype="bfloat16") for n in (cfg.students[0], cfg.teacher))
    own = cfg.modes[0] == "on-policy"
    flags = {"rank": "--rank", "micro": "--tune.micro", "batch": "--tune.batch"}
    return drafts.draft(
        replace(student, remat="full"), "gkd" if own else "kd", cfg.tune, length=cfg.length,
        prompt=cfg.length - cfg.answer if own else 0, rank=cfg.rank,
        teacher=None if cfg.modes[0] == "stored" else teacher,
        flags=flags | {"moments": "--tune.moments"}, name=cfg.students[0],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """The command line; see ``cli.main``."""
    return cli.main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="distillation_zoo",
        minutes=10,
        summary=summary,
        plan=plan,
        argv=argv,
    )


if __name__ == "__main__":
    main()
