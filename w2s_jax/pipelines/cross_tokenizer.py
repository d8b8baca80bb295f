"""Distil a teacher into a student that has another tokenizer, and say what it brought.

  python -m w2s_jax.pipelines.cross_tokenizer --teacher FOLDER --student FOLDER \\
      --data texts.jsonl --save OUT
  python -m w2s_jax.pipelines.cross_tokenizer --teacher FOLDER --student FOLDER \\
      --write 2000 --scratch --seeds 3 --count 300 --lrs 1e-3 3e-3 --epochs 4 16

The texts (columns text, or prompt and response; or paragraphs of a .txt file; or what the teacher
writes itself) are cut into the stretches that both tokenizers share. The teacher's probability of
each is made once. The student is trained to give them the same ("spans"), with fine-tuning on the
same texts ("spans+sft"), and by fine-tuning alone ("sft"); all are compared in nats per byte of
held-out texts with the untouched student and the teacher. Where several learning rates, epochs or
temperatures are given, every arm has those that are best for it on other held-out texts. A text
that one of the two does not spell as it is, is left out and counted. After any stop the same
command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from w2s_jax import cli
from w2s_jax import figures as draw
from w2s_jax import mesh as meshes
from w2s_jax import workdir as files
from w2s_jax.errors import UserError
from w2s_jax.metrics.statistics import Interval, claim, interval
from w2s_jax.models import hf
from w2s_jax.pipelines.cross_tokenizer_recipe import (
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
from w2s_jax.record import Context, Job, as_json, execute
from w2s_jax.train.fit import Interrupted
from w2s_jax.train.optim import Tune
from w2s_jax.types import Params, Row

COMMAND = "python -m w2s_jax.pipelines.cross_tokenizer"
ADAM = Tune(batch=16, optimizer="adamw", b2=0.95, schedule="cosine", warmup=0.1, clip=1.0)


@dataclass(frozen=True)
class Config:
    """What is distilled, and the numbers."""

    teacher: str = ""
    """A model folder, a shipped model such as nano-3, or a hub id."""
    student: str = ""
    """The same, with another tokenizer."""
    data: str = ""
    """Texts: a file or data set with a column text, or prompt and response; or a .txt file."""
    split: str = ""
    """Split of --data, for data sets that have several."""
    write: int = 0
    """Instead of --data: so many texts that the teacher writes from nothing."""
    tokens: int = 200
    """With --write: the most tokens of a text."""
    count: int = 0
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
    lrs: tuple[float, ...] = (1e-4,)
    """Learning rates."""
    epochs: tuple[float, ...] = (2.0,)
    """Passes over the training texts."""
    end: bool = False
    """Match the probability of ending, too, where a text was not cut."""
    seeds: int = 1
    """Runs; a seed draws the training texts, their order, and weights with --scratch."""
    scratch: bool = False
    """Begin with random weights: the student's folder gives architecture and tokenizer."""
    rank: int = 0
    """Rank of adapters on a frozen student; 0 trains all weights."""
    compute: str = "float32"
    """Dtype of the arithmetic, bfloat16 on accelerators."""
    remat: str = "none"
    """What the backward pass makes again (none, dots, attention, outputs, full)."""
    tune: Tune = field(default=ADAM)
    """How the student trains; learning rate and epochs give way to --lrs and --epochs."""
    save: str = ""
    """Folder for the trained model, in Hugging Face layout."""


@dataclass(frozen=True)
class Flags:
    """Where it runs and what it leaves."""

    workdir: str | None = None
    """Folder for results and stages; default runs/cross_tokenizer-<hash of the flags>."""
    mesh: str | None = None
    """Device mesh of data, fsdp, tensor, context, like "fsdp=4,tensor=2"; default one device."""
    track: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ()
    """Where training curves go besides metrics.jsonl."""
    fresh: bool = False
    """Start over: earlier results in the workdir move to earlier-<n> there."""
    quiet: bool = False
    """Print errors and the final table only."""


def run(cfg: Config, ctx: Context) -> Iterator[Row]:
    """Rows of ``run_recipe``.

    Raises:
      UserError: see ``check``, ``sides``, ``read``, ``written`` and ``aligned``.
    """
    check(cfg)
    where = meshes.make_mesh(ctx.mesh) if ctx.mesh else None
    how: Any = dict(mesh=where, compute=cfg.compute, remat=cfg.remat, frozen=cfg.rank > 0)
    texts = read(cfg.data, cfg.split or None) if cfg.data else Texts([], [])
    student, teacher = sides(cfg.student, cfg.teacher, cfg.length, **how)
    if cfg.write:
        texts = written(ctx, teacher, cfg.write, cfg.tokens)
    data = aligned(texts, student, teacher, ctx, held=cfg.held, end=cfg.end)

    def saved(params: Params) -> None:
        if cfg.save:
            ctx.say(f"saved {hf.export(student.model, params, cfg.save, student.tokenizer)}")

    numbers = (cfg.lrs, cfg.epochs, cfg.temperatures, cfg.nll)
    grids = {arm: settings(arm, *numbers) for arm in cfg.arms}
    bench = Bench(student, data, ctx, cfg.tune, cfg.rank)
    more: Any = dict(seeds=cfg.seeds, count=cfg.count, scratch=cfg.scratch, saved=saved)
    yield from run_recipe(bench, cfg.teacher, grids, **more)


def check(cfg: Config) -> None:
    """What can be refused before a model is read.

    Raises:
      UserError: then.
    """
    for name in ("teacher", "student"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: name a model folder, a shipped model or a hub id")
    if bool(cfg.data) == (cfg.write > 0):
        raise UserError("texts come from --data, or from the teacher itself with --write: give one")
    for name in ("arms", "lrs", "epochs", "temperatures"):
        if not getattr(cfg, name) or len(set(getattr(cfg, name))) < len(getattr(cfg, name)):
            raise UserError(f"--{name} needs one entry at least, and none twice")
    for name in ("lrs", "epochs", "temperatures"):
        if not all(0 < value < float("inf") for value in getattr(cfg, name)):
            raise UserError(f"--{name} must be above 0, got {getattr(cfg, name)}")
    for name, least in (("seeds", 1), ("tokens", 2), ("count", 0), ("rank", 0), ("nll", 0)):
        if not getattr(cfg, name) >= least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(cfg, name)}")
    if not 0 < cfg.held < 0.5:
        raise UserError(f"--held is a share above 0 and below .5, got {cfg.held:g}")
    if cfg.scratch and cfg.rank:
        raise UserError("--scratch with --rank: adapters on random weights learn nothing")
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
    """Nats per byte of every model."""
    scores = [row for row in rows if row["block"] == "score"]
    path = folder / "nats_per_byte.png"
    return [draw.bars(scores, "model", "nats_per_byte", path=path)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line; returns the summary.

    Raises:
      SystemExit: 2 for a fault that the user can mend (one line on stderr), 130 when interrupted.
    """
    import tyro

    flat, switch = tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff
    parts = {"config": Annotated[Config, flat, switch], "flags": Annotated[Flags, flat, switch]}
    both = make_dataclass("Both", parts.items())
    given: Any = tyro.cli(both, args=argv, prog=COMMAND, description=__doc__)
    cfg, flags = given.config, given.flags
    try:
        check(cfg)
        meshes.distribute()
        meshes.compilation_cache()
        folder = flags.workdir or f"runs/cross_tokenizer-{files.digest(as_json(cfg))[:6]}"
        job = Job("cross_tokenizer", "given", cfg, run, figures, claims, summary)
        return execute(job, _surroundings(Path(folder).resolve(), flags), fresh=flags.fresh)
    except (KeyboardInterrupt, Interrupted):
        print("\nstopped; what is done is kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if (line := cli.explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def _surroundings(folder: Path, flags: Flags) -> Context:
    import jax

    first = jax.process_index() == 0
    return Context(
        workdir=folder,
        mesh=flags.mesh,
        track=tuple(name for name in flags.track if name != "jsonl"),
        progress=sys.stdout.isatty() and not flags.quiet and first,
        quiet=flags.quiet or not first,
        writes=first,
    )


if __name__ == "__main__":
    main()
