"""Distil a teacher into a student that has another tokenizer, and say what it brought.

The texts are cut into the stretches that both tokenizers share, and the teacher's probability of
each is made once. The student is trained to give them the same ("spans"), with fine-tuning on the
same texts ("spans+sft"), and by fine-tuning alone ("sft"); all are compared in nats per byte of
held-out texts with the untouched student and the teacher. Where several learning rates, epochs or
temperatures are given, every arm has those that are best for it on other held-out texts. A text
that one of the two does not spell as it is, is left out and counted. No paper: the shape to look
for is spans below fine-tuning, as long as texts are few. The default teaches a small decoder that
reads pieces of words by the nano family, which reads whole words.

  python -m experiments.cross_tokenizer --teacher FOLDER --student FOLDER --vocab 0 \\
      --data texts.jsonl --seeds 1 --count 0 --lrs 1e-5 --epochs 2 --save OUT
  python -m experiments.cross_tokenizer --teacher FOLDER --student FOLDER --vocab 0 \\
      --write 2000 --scratch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from w2s_jax import cli
from w2s_jax import figures as draw
from w2s_jax import mesh as meshes
from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.metrics.statistics import Interval, claim, interval
from w2s_jax.models import hf
from w2s_jax.pipelines.cross_tokenizer import (
    ARMS,
    Bench,
    Texts,
    aligned,
    read,
    run_recipe,
    settings,
    sides,
    written,
)
from w2s_jax.pipelines.probes import check_choices
from w2s_jax.record import Context
from w2s_jax.train.optim import Tune
from w2s_jax.types import Params, Row

ADAM = Tune(batch=4, optimizer="adamw", b2=0.95, schedule="cosine", warmup=0.1, clip=1.0)


@dataclass(frozen=True)
class Config:
    """What is distilled, and the numbers."""

    teacher: str = "nano-3"
    """A model folder, a shipped model such as nano-3, or a hub id."""
    student: str = "nano-2"
    """The same; it must have another tokenizer, unless --vocab gives it one."""
    vocab: int = 290
    """Tokens of a byte-level BPE that is trained on the training texts, for a student of random
    weights and the architecture of --student; 0 for the tokenizer that it has."""
    problems: int = 1600
    """The texts: so many solved problems of the arithmetic world ..."""
    data: str = ""
    """... or a file or data set with a column text, or prompt and response; or a .txt file ..."""
    split: str = ""
    """Split of --data, for data sets that have several."""
    write: int = 0
    """... or so many texts that the teacher writes from nothing."""
    tokens: int = 200
    """With --write: the most tokens of a text."""
    count: int = 100
    """Training texts, drawn anew for every seed; 0 for all that are not held out."""
    held: float = 0.1
    """Share of the texts held out to choose settings on; as many again to report on."""
    length: int = 256
    """Tokens in a row of the student; texts are packed, longer ones cut where both have a cut."""
    arms: tuple[Literal["spans", "spans+sft", "sft"], ...] = ARMS
    """What to train; --save writes the first, the last two are what it is compared with."""
    temperatures: tuple[float, ...] = (20.0,)
    """Of the spans' probabilities: at 1 improbable spans count little, far above 1 all alike."""
    nll: float = 1.0
    """Weight of fine-tuning in spans+sft; matching has 1."""
    lrs: tuple[float, ...] = (3e-3,)
    """Learning rates."""
    epochs: tuple[float, ...] = (16.0, 32.0, 64.0)
    """Passes over the training texts."""
    end: bool = False
    """Match the probability of ending, too, where a text was not cut."""
    seeds: int = 5
    """Runs; a seed draws the training texts, their order, and random weights."""
    scratch: bool = False
    """Begin with random weights: the student's folder gives architecture and tokenizer."""
    rank: int = 0
    """Rank of adapters on a frozen student; 0 trains all weights."""
    compute: str = "float32"
    """Dtype of the arithmetic, bfloat16 on accelerators."""
    remat: str = "none"
    """What the backward pass makes again (none, dots, attention, outputs, full)."""
    tune: Tune = ADAM
    """How the student trains; learning rate and epochs give way to --lrs and --epochs."""
    save: str = ""
    """Folder for the trained model, in Hugging Face layout."""


PRESETS = {
    "tiny": {"teacher": "nano-1", "student": "nano-1", "problems": 150, "count": 40, "seeds": 2}
    | {"arms": ("spans", "sft"), "epochs": (1.0,)}
}


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows of ``run_recipe``.

    Raises:
      UserError: see ``check``, ``sides``, ``read``, ``written`` and ``aligned``.
    """
    check(cfg)
    where = meshes.make_mesh(ctx.mesh) if ctx.mesh else None
    how: Any = dict(mesh=where, compute=cfg.compute, remat=cfg.remat, frozen=cfg.rank > 0)
    pieces: Any = dict(vocab=cfg.vocab, held=cfg.held)
    texts = given(cfg)
    student, teacher = sides(cfg.student, cfg.teacher, cfg.length, texts, **pieces, **how)
    if cfg.write:
        texts = written(ctx, teacher, cfg.write, cfg.tokens)
    data = aligned(texts, student, teacher, ctx, held=cfg.held, end=cfg.end)

    def saved(params: Params) -> None:
        if cfg.save:
            ctx.say(f"saved {hf.export(student.model, params, cfg.save, student.tokenizer)}")

    numbers = (cfg.lrs, cfg.epochs, cfg.temperatures, cfg.nll)
    grids = {arm: settings(arm, *numbers) for arm in cfg.arms}
    bench = Bench(student, data, ctx, cfg.tune, cfg.rank)
    scratch = cfg.scratch or cfg.vocab > 0
    more: Any = dict(seeds=cfg.seeds, count=cfg.count, scratch=scratch, saved=saved)
    yield from run_recipe(bench, cfg.teacher, grids, **more)


def given(cfg: Config) -> Texts:
    """The texts that do not wait for the teacher."""
    if cfg.data:
        return read(cfg.data, cfg.split or None)
    if cfg.write:
        return Texts([], [])
    solved = arithmetic.problems(8, cfg.problems).rows()
    texts = [row["prompt"] + row["response"] for row in solved]
    return Texts([""] * len(texts), texts)


def check(cfg: Config) -> None:
    """What can be refused before a model is read.

    Raises:
      UserError: then.
    """
    for name in ("teacher", "student"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: name a model folder, a shipped model or a hub id")
    if cfg.data and cfg.write:
        raise UserError("texts come from --data, or from the teacher itself with --write: give one")
    if cfg.write and cfg.vocab:
        raise UserError("--write: a new tokenizer needs texts before the teacher writes: --vocab 0")
    check_choices(lrs=cfg.lrs, epochs=cfg.epochs, temperatures=cfg.temperatures)
    if not cfg.arms or len(set(cfg.arms)) < len(cfg.arms):
        raise UserError("--arms needs one entry at least, and none twice")
    least = dict(problems=1, vocab=0, write=0, tokens=2, count=0, rank=0, nll=0)
    for name, bound in least.items():
        if not getattr(cfg, name) >= bound:
            raise UserError(f"--{name} must be at least {bound}, got {getattr(cfg, name)}")
    if not 0 < cfg.held < 0.5:
        raise UserError(f"--held is a share above 0 and below .5, got {cfg.held:g}")
    if cfg.rank and (cfg.scratch or cfg.vocab):
        raise UserError("--rank: adapters on random weights (--vocab, --scratch) learn nothing")
    place = Path(cfg.save)
    taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if cfg.save and taken and not (place / "config.json").is_file():
        raise UserError(f"--save {place} exists and is not a model folder: give another place")


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """Whether matching spans is below plain fine-tuning and below the untouched student, in nats
    per byte; intervals over seeds or, of one seed, over its test texts."""
    told = {"student": "the untouched student", "sft": "fine-tuning on the same texts"}
    found = []
    for model in ARMS:
        for base, words in told.items():
            own = [row for row in rows if row.get("model") == model and f"below_{base}" in row]
            if not own:
                continue
            over, estimate = "seeds", interval([row[f"below_{base}"] for row in own])
            if len(own) == 1:
                low, high = (own[0][f"below_{base}_{end}"] for end in ("low", "high"))
                over, estimate = "texts", Interval(estimate.value, low, high, 0.95, 1)
            name = f"{model} is below {words}"
            statistic = f"nats per byte, interval over {over}"
            found.append(claim(name, statistic, estimate, above=0.0, seeds=len(own)))
    return found


def summary(rows: list[Row]) -> list[Row]:
    """Means over seeds, with intervals where there are several."""
    scores = [row for row in rows if row["block"] == "score"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in scores):
        own = [row for row in scores if row["model"] == model]
        line: Row = dict(model=model)
        for name in ("nats_per_byte", "above_teacher", "below_student", "below_sft"):
            values = [row[name] for row in own if name in row]
            line[name] = _text(interval(values)) if values else ""
        lines.append(line)
    return lines


def _text(found: Interval) -> str:
    if found.n == 1:
        return f"{found.value:.4f}"
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Nats per byte of the teacher and of the trained students."""
    scores = [row for row in rows if row["block"] == "score" and row["model"] != "student"]
    path, words = folder / "nats_per_byte.png", "nats per byte of held-out texts"
    return [draw.bars(scores, "model", "nats_per_byte", path=path, xlabel="", ylabel=words)]


def main(argv: list[str] | None = None) -> dict:
    """The command line; see ``cli.main``."""
    return cli.main(
        Config,
        run,
        figures=figures,
        claims=claims,
        presets=PRESETS,
        paper="cross_tokenizer",
        minutes=5,
        summary=summary,
        argv=argv,
    )


if __name__ == "__main__":
    main()
