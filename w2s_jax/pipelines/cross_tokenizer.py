"""Distillation between models with different tokenizers: texts in, a trained student out.

Both models give every stretch of text that their tokenizers share a probability (``data.spans``).
The teacher's are made once and kept; the student is trained until its own agree, with or without
fine-tuning on the same texts, which alone is the baseline. All are compared in nats per byte of
texts that were held out. Every stage is kept in the workdir: the same call resumes.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax import columns
from w2s_jax.annotate import Fn, kept, predict
from w2s_jax.data import sources, spans, teachers
from w2s_jax.data.packing import with_rows
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.losses.spans import matching
from w2s_jax.metrics.statistics import Interval, interval
from w2s_jax.models import hf
from w2s_jax.models import lora as adapters
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import language, on_base
from w2s_jax.objectives.spans import distill_spans, span_logps
from w2s_jax.pipelines.delta_pairs import held_out
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer, train_bpe
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Model, Objective, Params, Row, Table

ARMS = ("spans", "spans+sft", "sft")
MOST = 2000  # texts that are held out at most, for choosing and for reporting each


@dataclass(frozen=True)
class Texts:
    """What is learned from: ``prompts`` (may be empty) and ``responses``."""

    prompts: list[str]
    responses: list[str]


@dataclass(frozen=True)
class Setting:
    """One way to train: ``temperature`` and ``nll`` as in ``losses.spans.matching``."""

    arm: str
    lr: float
    epochs: float
    temperature: float = 1.0
    nll: float = 0.0

    def objective(self, model: Model) -> Objective:
        """What ``model`` is trained by."""
        if self.arm == "sft":
            return language(model)
        return distill_spans(model, partial(matching, temperature=self.temperature, nll=self.nll))


def settings(
    arm: str,
    lrs: Sequence[float],
    epochs: Sequence[float],
    temperatures: Sequence[float],
    nll: float,
) -> list[Setting]:
    """The grid of an arm, of which development texts choose one."""
    pairs = itertools.product(lrs, epochs)
    if arm == "sft":
        return [Setting(arm, lr, many) for lr, many in pairs]
    share = nll if arm == "spans+sft" else 0.0
    return [
        Setting(arm, lr, n, heat, share) for (lr, n), heat in itertools.product(pairs, temperatures)
    ]


def read(source: str, split: str | None = None) -> Texts:
    """Texts of a file or data set: the columns ``prompt`` and ``response``, or ``text``; of a .txt
    file (or .txt.gz) its paragraphs, which blank lines separate.

    Raises:
      UserError: none of these columns, a value that is not text, see ``sources.records``.
    """
    if re.search(r"\.txt(\.gz)?$", source):
        return Texts(*_blank(_paragraphs(Path(source))))
    rows = sources.records(source, split=split)
    have = list(rows[0]) if len(rows) else []
    names = next((n for n in (("prompt", "response"), ("text",)) if set(n) <= set(have)), None)
    if names is None:
        raise UserError(
            f"{source}: needs a column 'text', or 'prompt' and 'response'; has "
            f"{', '.join(have) or 'no rows'}"
        )
    found = [[row[name] for row in rows] for name in names]
    for name, column in zip(names, found, strict=True):
        for i, value in enumerate(column):
            if not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(f"{source} row {i}: column {name!r} must be text, got {kind}")
    return Texts(*found) if len(found) == 2 else Texts(*_blank(found[0]))


def _blank(texts: list[str]) -> tuple[list[str], list[str]]:
    return [""] * len(texts), texts


def _paragraphs(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return [part.strip("\r\n") for part in re.split(r"\n[ \t\r]*\n", text) if part.strip()]


def written(ctx: Context, side: Side, count: int, tokens: int) -> Texts:
    """``count`` texts that a model writes from nothing at temperature 1; a stage.

    Raises:
      UserError: see ``generate.sample.draw``; a tokenizer without a beginning-of-text token.
    """
    inputs = dict(model=side.digest, count=count, tokens=tokens)

    def make() -> list[str]:
        ctx.say(f"{side.name} writes {count} texts of at most {tokens} tokens")
        given = (side.model, side.params, side.tokenizer, [""] * count, jax.random.key(0))
        return complete(*given, tokens=tokens, temperature=1.0, batch=256, mesh=side.mesh)

    return Texts(*_blank(list(ctx.stage("written", inputs, make))))


@dataclass(frozen=True, eq=False)
class Side:
    """A model with what it takes to run it; ``length`` is the tokens of its rows."""

    name: str
    model: Model
    params: Params
    tokenizer: Tokenizer
    length: int
    mesh: jax.sharding.Mesh | None

    @functools.cached_property
    def digest(self) -> list[str]:
        """What its answers depend on."""
        tokens = self.tokenizer.digest()
        return [columns.digest(self.params), repr(self.model.config), tokens]

    def packed(self, table: Table) -> tuple[Table, spans.Places]:
        """Rows of several texts, only whose spans reach the vocabulary head."""
        packed, places = spans.pack(table, self.length)
        return spans.aimed(with_rows(packed)), places

    @property
    def batch(self) -> int:
        """Rows of a forward pass."""
        tokens = 2 ** (12 if jax.default_backend() == "cpu" else 15)
        return max(1, tokens // self.length)

    def nats(self, params: Params, exam: tuple[Table, spans.Places]) -> np.ndarray:
        """What the model with ``params`` needs for each text's spans, [N] nats."""
        table, places = exam
        said = predict(_scorer(self.model), params, table, batch=self.batch, mesh=self.mesh)
        return -places.gather(said).sum(1, dtype=np.float64)


@functools.lru_cache(maxsize=8)
def _scorer(model: Model) -> Fn:
    return lambda params, batch: span_logps(model, params, batch)


def sides(
    student: str,
    teacher: str,
    length: int,
    texts: Texts,
    *,
    mesh: jax.sharding.Mesh | None,
    vocab: int = 0,
    held: float = 0.0,
    compute: str = "float32",
    remat: str = "none",
    frozen: bool = False,
) -> tuple[Side, Side]:
    """Both models. The teacher's rows may have four times the student's tokens.

    Args:
      vocab: tokens of a tokenizer that the student gets with random weights, trained on what is not
        ``held`` out of ``texts``; 0 for its own.

    Raises:
      UserError: one vocabulary, a length above the student's, see ``hf.load`` and ``train_bpe``.
    """
    dtype = compute if frozen else "float32"
    mine = hf.load(student, mesh=mesh, dtype=dtype, compute=compute, remat=remat)
    theirs = hf.load(teacher, mesh=mesh, dtype=compute, compute=compute)
    if vocab:
        whole = [prompt + said for prompt, said in zip(texts.prompts, texts.responses, strict=True)]
        train = [whole[i] for i in np.flatnonzero(~_out(whole, held))]
        mine = _anew(mine[0].config, train, vocab)
    if teachers.vocabulary(mine[2]) == teachers.vocabulary(theirs[2]):
        raise UserError(
            f"{student} and {teacher} have one vocabulary: distil the whole next-token "
            "distribution, which says more (python -m experiments.distillation_zoo --data ...)"
        )
    most = mine[0].config.max_length
    if not 8 <= length <= most:
        raise UserError(f"rows of {length} tokens: {student} reads 8 to {most}")
    room = min(4 * length, theirs[0].config.max_length)
    return Side(student, *mine, length, mesh), Side(teacher, *theirs, room, mesh)


def _anew(config: Config, texts: list[str], vocab: int) -> tuple[Model, Params, Tokenizer]:
    tokenizer = train_bpe(texts, vocab)
    model = transformer(replace(config, vocab=tokenizer.size))
    return model, jax.jit(model.init)(jax.random.key(0)), tokenizer


def _out(texts: list[str], held: float) -> np.ndarray:
    """Which texts are held out, for choosing and for reporting."""
    return held_out(texts, 2 * held, 2 * MOST)


@dataclass(frozen=True, eq=False)
class Aligned:
    """Texts under both tokenizers, with the teacher's log-probabilities; parts by row number."""

    table: Table
    bytes: np.ndarray
    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    told: Row


def aligned(
    texts: Texts, student: Side, teacher: Side, ctx: Context, *, held: float, end: bool
) -> Aligned:
    """Aligns the texts, asks the teacher once (a stage), and holds two parts out.

    A text that cannot be aligned is left out and counted under its reason. Equal texts are on one
    side of the parts.

    Raises:
      UserError: no text can be aligned, a part is empty.
    """
    paired = spans.pair(
        texts.prompts, texts.responses, student.tokenizer, teacher.tokenizer,
        length=(student.length, teacher.length), on_fault="drop", on_long="cut", end=end,
    )  # fmt: skip
    lost = sum(paired.refused.values())
    ctx.say(f"{len(paired.kept)} texts aligned ({paired.cut} of them cut), {lost} refused")
    for reason, count in sorted(paired.refused.items(), key=lambda item: -item[1])[:5]:
        ctx.say(f"  refused {count}: {reason}")
    whole = [texts.prompts[i] + texts.responses[i] for i in paired.kept]
    out = _out(whole, held)
    dev = out & held_out([("dev", text) for text in whole], 0.5, len(whole))
    parts = dict(train=~out, dev=dev, test=out & ~dev)
    for name, part in parts.items():
        if not part.any():
            raise UserError(
                f"of {len(whole)} texts none is in the part {name!r} with a held-out share of "
                f"{held:g}: give more texts, or change the share"
            )
    table, places = teacher.packed(paired.teacher)
    folder = ctx.folder("teacher", dict(teacher=teacher.digest, table=table.digest()))
    how = (teacher.batch, teacher.mesh, folder, "teacher" if ctx.progress else "")
    said = places.gather(kept(_scorer(teacher.model), teacher.params, table, *how))
    told: Row = dict(texts=len(whole), cut=paired.cut, refused=lost, spans=int(places.count.sum()))
    told |= {f"texts_{name}": int(part.sum()) for name, part in parts.items()}
    rows = {name: np.flatnonzero(part) for name, part in parts.items()}
    return Aligned(spans.with_teacher(paired.student, said), paired.bytes, told=told, **rows)


@dataclass(frozen=True, eq=False)
class Bench:
    """The student, the texts, and how it is trained and measured."""

    student: Side
    data: Aligned
    ctx: Context
    tune: Tune
    rank: int = 0
    save_every: int = 500

    @functools.cached_property
    def exams(self) -> dict[str, Any]:
        """Packed rows of the parts that are held out."""
        parts = dict(dev=self.data.dev, test=self.data.test)
        return {n: self.student.packed(self.data.table.take(part)) for n, part in parts.items()}

    def teacher_nats(self) -> np.ndarray:
        """What the teacher needs for the spans of each test text, [N] nats."""
        rows = self.data.table["spans"]
        return -rows["teacher"][self.data.test].sum(1, dtype=np.float64)

    def table(self, seed: int, count: int) -> Table:
        """The packed training texts of a seed: ``count`` of them drawn, 0 for all."""
        rows = self.data.train
        if count and count < len(rows):
            rows = np.sort(np.random.default_rng([8, seed]).choice(rows, count, replace=False))
        return self.student.packed(self.data.table.take(rows))[0]

    def best(
        self, grid: Sequence[Setting], start: Params, table: Table, seed: int
    ) -> tuple[Setting, Params, float]:
        """The setting of a grid that is best on dev, the student it makes, nats per byte there."""
        size, found = self.data.bytes[self.data.dev].sum(), []
        for setting in grid:
            params = self.trained(setting, start, table, seed)
            found.append((float(self.student.nats(params, self.exams["dev"]).sum() / size), params))
        least = min(range(len(grid)), key=lambda i: found[i][0])
        return grid[least], found[least][1], found[least][0]

    def trained(self, setting: Setting, start: Params, table: Table, seed: int) -> Params:
        """The student's weights after training, adapters merged; resumes from its checkpoint."""
        model: Any = (
            adapters.lora(self.student.model, self.rank) if self.rank else self.student.model
        )
        objective, key = setting.objective(model), jax.random.key(seed)
        tune = replace(self.tune, lr=setting.lr, epochs=setting.epochs)
        params, axes, frozen = start, model.axes, {}
        if self.rank:
            params, axes = adapters.adapters(model, jax.random.fold_in(key, 1)), axes["lora"]
            objective, frozen = on_base(objective), {"base": start}
        inputs = dict(setting=setting, tune=tune, rank=self.rank, seed=seed)
        inputs |= dict(student=columns.digest(start), data=table.digest())
        inputs |= dict(model=repr(self.student.model.config))
        state = fit(
            objective, params, table, tune, key, axes=axes, mesh=self.student.mesh, frozen=frozen,
            workdir=self.ctx.folder(setting.arm, inputs), save_every=self.save_every,
            track=self.ctx.track, progress=self.ctx.progress,
        )  # fmt: skip
        if not self.rank:
            return state.params
        return jax.jit(partial(adapters.merge, model))({"base": start, "lora": state.params})

    def compared(self, nats: dict[str, np.ndarray]) -> Iterator[Row]:
        """A row per model from what each needs for the test texts: nats per byte, and by how much
        that is below the untouched student's and plain fine-tuning's, with intervals over texts."""
        size = self.data.bytes[self.data.test].astype(np.float64)
        teacher = self.teacher_nats().sum() / size.sum()
        for name, own in nats.items():
            row: Row = dict(model=name, nats_per_byte=own.sum() / size.sum())
            row["above_teacher"] = row["nats_per_byte"] - teacher
            for base in ("student", "sft"):
                if base in nats and base != name:
                    found = per_byte(nats[base] - own, size)
                    row |= {f"below_{base}": found.value, f"below_{base}_low": found.low}
                    row |= {f"below_{base}_high": found.high}
            yield row


def per_byte(nats: np.ndarray, size: np.ndarray) -> Interval:
    """The ratio of the sums of ``nats`` and ``size`` [N], with an interval over texts (the ratio
    made linear about its value)."""
    ratio = nats.sum() / size.sum()
    return interval((nats - ratio * size) / size.mean() + ratio)


def run_recipe(
    bench: Bench,
    teacher: str,
    grids: dict[str, list[Setting]],
    *,
    seeds: int = 1,
    count: int = 0,
    scratch: bool = False,
    saved: Callable[[Params], None] = lambda params: None,
) -> Iterator[Row]:
    """Trains the student by every arm, from the same texts in the same order, and compares.

    Args:
      bench, teacher: what is trained; the teacher's name, for the record.
      grids: arm -> settings; dev chooses one for every arm and seed.
      seeds: each draws ``count`` training texts, their order and, with ``scratch``, the student's
        first weights (its folder gives the architecture and the tokenizer).
      saved: takes the first seed's weights of the first arm.

    Returns:
      Rows of ``Bench.compared`` with ``seed``, ``dev`` and what was chosen; one row of counts.
    """
    side, data = bench.student, bench.data
    yield dict(block="texts", student=side.name, teacher=teacher) | data.told
    before = None if scratch else side.nats(side.params, bench.exams["test"])
    for seed in range(seeds):
        start: Params = side.params
        if scratch:
            start = jax.jit(side.model.init)(jax.random.fold_in(jax.random.key(seed), 2))
        table = bench.table(seed, count)
        untouched = side.nats(start, bench.exams["test"]) if before is None else before
        nats, chosen = {"teacher": bench.teacher_nats(), "student": untouched}, {}
        if seed == 0 and nats["teacher"].sum() >= untouched.sum():
            bench.ctx.say("the teacher is not better than the student on the held-out texts")
        for place, (arm, grid) in enumerate(grids.items()):
            setting, params, dev = bench.best(grid, start, table, seed)
            nats[arm] = side.nats(params, bench.exams["test"])
            chosen[arm] = dict(dev=dev, lr=setting.lr, epochs=setting.epochs)
            if arm != "sft":
                chosen[arm] |= dict(temperature=setting.temperature)
            bench.ctx.say(f"seed {seed}, {arm}: {chosen[arm]}")
            if place == 0 and seed == 0:
                saved(params)
        for row in bench.compared(nats):
            yield (
                dict(block="score", seed=seed, rows=len(table)) | row | chosen.get(row["model"], {})
            )
