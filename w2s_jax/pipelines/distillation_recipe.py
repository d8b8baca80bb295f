"""Distillation of any teacher into any student of the same vocabulary, by any of three ways.

Prompts (with responses, for the two ways that need them) in; the student learns from the teacher's
distributions, stored once, made in the step, or made in the step for the student's own answers;
the model is written as a folder. Before and after, student and teacher are compared on prompts
that were held out: on the responses there are, and on what the student answers itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax import columns
from w2s_jax import mesh as meshes
from w2s_jax.annotate import predict
from w2s_jax.data import sources, teachers
from w2s_jax.data.packing import with_targets
from w2s_jax.data.pair_tokens import encode_answers, encode_prompts
from w2s_jax.errors import UserError
from w2s_jax.generate.inside import ask, respond
from w2s_jax.losses.distillation import forward_kl, reverse_kl
from w2s_jax.losses.sequence import token_divergence, token_logps
from w2s_jax.models import hf
from w2s_jax.models import lora as adapters
from w2s_jax.objectives import distill, on_base, on_policy, predicted
from w2s_jax.objectives.base import Predicted
from w2s_jax.pipelines.delta_pairs import held_out, host_column
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Batch, Model, Objective, Params, Row, Table, Tree

MODES = ("stored", "live", "on-policy")
UNKNOWN = 0.01  # the largest share of unknown tokens that texts may have
Divergence = Callable[..., Array]


@dataclass(frozen=True)
class Words:
    """How texts become rows: at most ``length`` tokens, of which ``answer`` for the response."""

    length: int
    answer: int
    template: str = "auto"
    separator: str = ""


def texts(source: str, *, split: str | None = None, count: int = 0) -> Table:
    """The first ``count`` rows of a source (0: all): ``prompt`` (texts or conversations) and,
    where the source has it, ``response`` (texts).

    Raises:
      UserError: no prompts, a value that is no text; see ``sources.records``.
    """
    rows = sources.records(source, split=split)
    have = list(rows[0]) if len(rows) else []
    if "prompt" not in have:
        raise UserError(f"{source}: needs a column 'prompt', has {', '.join(have) or 'no rows'}")
    some = [rows[i] for i in range(min(count or len(rows), len(rows)))]
    found = {}
    for name, kinds in (("prompt", (str, list)), ("response", (str,))):
        if name in have:
            values = [row.get(name) for row in some]
            odd = next((i for i, v in enumerate(values) if not isinstance(v, kinds) or not v), None)
            if odd is not None:
                raise UserError(
                    f"{source}: row {odd} has the {name} {values[odd]!r}, which is no text; drop it"
                )
            found[name] = host_column(values)
    return Table(found)


def tokenised(table: Table, tokenizer: Tokenizer, model: Model, words: Words) -> Table:
    """The rows whose prompt fits, with ``asked`` and, where there are responses, token columns and
    ``targets``; long responses are cut.

    Raises:
      UserError: no room for a prompt, no row that fits, words that the tokenizer does not know; see
        ``pair_tokens.encode_prompts``.
    """
    room = words.length - words.answer
    how: Any = dict(template=words.template, separator=words.separator)
    if not 0 < words.answer < words.length:
        raise UserError(f"answers of {words.answer} tokens leave no prompt in {words.length}")
    prompts = list(table["prompt"])
    if "response" in table:
        texts = (prompts, list(table["response"]), tokenizer)
        heads, said = encode_answers(*texts, **how)
    else:
        heads, said = encode_prompts(prompts, tokenizer, **how), None
    _known([*heads, *(said or ())], tokenizer)
    kept = [i for i, head in enumerate(heads) if 0 < len(head) <= room]
    if not kept:
        least = min(map(len, heads), default=0)
        raise UserError(f"no prompt fits in {room} tokens (the shortest has {least})")
    ids = host_column([np.asarray(heads[i], np.int32) for i in kept])
    made = table.take(np.array(kept)).with_columns(prompt=ids)
    made = ask(made, model, tokenizer, tokens=words.answer, length=room)
    if said is None:
        return made
    rows = [(heads[i], said[i][: words.answer]) for i in kept]
    shape = (len(rows), words.length)
    tokens, segment, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape)
    for row, (head, rest) in enumerate(rows):
        size = len(head) + len(rest)
        tokens[row, :size], segment[row, :size] = [*head, *rest], 1
        mask[row, len(head) : size] = 1.0
    position = np.where(segment > 0, np.arange(words.length, dtype=np.int32)[None], 0)
    made = made.with_columns(
        tokens=tokens, segment=segment, position=position, mask=mask.astype(np.float32)
    )
    return with_targets(made, multiple=words.answer)


def _known(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    unknown = sum(list(row).count(tokenizer.unk) for row in rows if tokenizer.unk is not None)
    share = unknown / max(sum(map(len, rows)), 1)
    if share > UNKNOWN:
        raise UserError(
            f"the tokenizer cannot encode the texts: {share:.0%} of the tokens are unknown; use "
            "models whose tokenizer covers them"
        )


def _room_for(folder: str) -> None:
    """Refuses a place for the trained model before it is trained."""
    place = Path(folder).absolute()
    full = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if full and not (place / "config.json").is_file():
        raise UserError(f"--save {folder} exists and is not a model folder: give another place")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=place.parent).cleanup()
    except OSError as error:
        raise UserError(f"--save {folder} cannot be written: {error.strerror}") from None


def run_recipe(
    data: Table,
    *,
    student: str,
    teacher: str,
    ctx: Context,
    tune: Tune,
    mode: str,
    name: str,
    divergence: Divergence,
    words: Words,
    lam: float = 1.0,
    temperature: float = 1.0,
    top: int = 64,
    held: float = 0.05,
    most: int = 500,
    rank: int = 0,
    compute: str = "float32",
    remat: str = "none",
    save: str = "",
    save_every: int = 500,
    seed: int = 0,
) -> Iterator[Row]:
    """Distil ``teacher`` into ``student``; a row for the untouched and one for the trained student.

    Every stage (the stored teacher, checkpoints) is kept in ``ctx.workdir``: the same call resumes.

    Args:
      data: ``prompt`` (texts or conversations) and, unless ``mode`` is "on-policy" with ``lam`` 1,
        ``response`` (texts).
      mode: "stored" (the teacher's ``top`` tokens, made once), "live", or "on-policy": a batch of
        the student's own answers with probability ``lam``, sampled at ``temperature``.
      divergence: ``(student, teacher, ids) -> nats``; ``teacher`` are its logits, or the columns
        of a stored one; ``name`` is for the record.
      held: share of the prompts held out, ``most`` at most.
      rank: of adapters on a frozen student; 0 trains all weights.
      compute, remat: see ``hf.load``; the teacher is stored in ``compute``.
      save: folder for the trained model.

    Returns:
      Rows with ``forward``, ``reverse`` (KL of teacher and student, nats per token of held-out
      responses), ``nll``, and ``own_reverse``, ``own_length`` of the student's own answers.

    Raises:
      UserError: different vocabularies, no responses where they are needed, nothing held out, a
        place for the model that cannot be written.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if "response" not in data and (mode != "on-policy" or lam < 1):
        raise UserError(f"mode {mode!r} with lam {lam:g} needs a column 'response' in the data")
    if save:
        _room_for(save)
    where = meshes.make_mesh(ctx.mesh) if ctx.mesh else None
    kept = compute if rank else "float32"
    mine = hf.load(student, mesh=where, dtype=kept, compute=compute, remat=remat)
    theirs = hf.load(teacher, mesh=where, dtype=compute, compute=compute)
    pair = Pair(*mine, *theirs[:2], where, ctx, words.answer)
    vocabulary(student, mine[2], teacher, theirs[2])
    apart = held_out(list(data["prompt"]), held, most)
    if not apart.any() or apart.all():
        raise UserError(
            f"of {len(data)} prompts {int(apart.sum())} fall in a held-out share of {held:g}: "
            "change the share, or give more prompts"
        )
    encoded = partial(tokenised, tokenizer=mine[2], model=mine[0], words=words)
    train, test = encoded(data.take(~apart)), encoded(data.take(apart))
    ctx.say(f"{len(train)} prompts to train on, {len(test)} held out")
    common: Row = dict(block="recipe", mode=mode, divergence=name, rows=len(train), held=len(test))
    yield common | dict(training="student") | pair.compared(pair.params, test)
    if mode == "stored":
        train = pair.store(train, top)
    aim = partial(pair.objective, divergence, mode=mode, lam=lam, heat=temperature)
    inputs = dict(name=name, mode=mode, lam=lam, heat=temperature, top=top)
    new = pair.trained(aim, train, tune, inputs, rank=rank, seed=seed, save_every=save_every)
    if save:
        ctx.say(f"saved {hf.export(pair.model, new, save, pair.tokenizer)}")
    yield common | dict(training="distilled") | pair.compared(new, test)


def vocabulary(student: str, mine: Tokenizer, teacher: str, theirs: Tokenizer) -> None:
    """Refuses two models whose ids mean different tokens.

    Raises:
      UserError: then.
    """
    if teachers.vocabulary(mine) != teachers.vocabulary(theirs):
        raise UserError(
            f"{student} and {teacher} have different vocabularies ({mine.size} and {theirs.size} "
            "tokens): python -m experiments.cross_tokenizer distils by aligned spans"
        )


@dataclass(frozen=True)
class Pair:
    """The two models, where they live and where their stages are kept."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    teacher: Model
    weights: Params
    mesh: jax.sharding.Mesh | None
    ctx: Context
    answer: int

    @property
    def vocab(self) -> int | None:
        """How many tokens both have, where their matrices are padded to different sizes."""
        mine, theirs = self.model.config.vocab, self.teacher.config.vocab
        return None if mine == theirs else min(mine, theirs)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return () if self.tokenizer.eos is None else (self.tokenizer.eos,)

    def store(self, table: Table, top: int) -> Table:
        """The table with the teacher's ``top`` tokens, kept in the workdir."""
        folder = self.ctx.workdir / "teacher"
        how: Any = dict(tokenizer=self.tokenizer, mesh=self.mesh, progress=self.ctx.progress)
        top = min(top, self.tokenizer.size)
        columns.add_teacher(self.teacher, self.weights, table, top, folder, **how)
        mine = dict(vocab=self.model.config.vocab, tokenizer=self.tokenizer)
        return teachers.read(folder, table, **mine)

    def objective(
        self, divergence: Divergence, model: Model, *, mode: str, lam: float, heat: float
    ) -> Objective:
        """What ``model`` (the student, or its adapters) is trained by."""
        if mode == "stored":
            return distill(model, divergence, targets=True)
        if mode == "live":
            return distill(model, divergence, teacher=self.teacher, targets=True, vocab=self.vocab)
        how: Any = dict(tokens=self.answer, lam=lam, temperature=heat, eos=self.ends)
        how |= dict(targets=True, vocab=self.vocab or self.tokenizer.size)
        return on_policy(model, divergence, teacher=self.teacher, **how)

    def trained(
        self,
        aim: Callable[[Model], Objective],
        table: Table,
        tune: Tune,
        inputs: dict[str, Any],
        *,
        rank: int,
        seed: int,
        save_every: int,
    ) -> Params:
        """The student's weights after training, adapters merged; resumes from its checkpoint."""
        model: Any = adapters.lora(self.model, rank) if rank else self.model
        key, objective = jax.random.key(seed), aim(model)
        start, axes, frozen = self.params, model.axes, {"teacher": self.weights}
        if rank:
            start, axes = adapters.adapters(model, jax.random.fold_in(key, 1)), axes["lora"]
            frozen, objective = frozen | {"base": self.params}, on_base(objective)
        digests = dict(student=columns.digest(self.params), teacher=columns.digest(self.weights))
        inputs = inputs | digests | dict(rank=rank, seed=seed, tune=tune, data=table.digest())
        names = {"tokens", "segment", "position", "targets", "asked", "teacher"}
        state = fit(
            objective, start, Table({n: table[n] for n in names if n in table}), tune, key,
            axes=axes, mesh=self.mesh, frozen=frozen, workdir=self.ctx.folder("train", inputs),
            save_every=save_every, track=self.ctx.track, progress=self.ctx.progress,
        )  # fmt: skip
        if not rank:
            return state.params
        return jax.jit(partial(adapters.merge, model))({"base": self.params, "lora": state.params})

    def compared(self, params: Params, test: Table) -> Row:
        """How far the student with ``params`` is from the teacher on held-out prompts."""
        both = {"student": params, "teacher": self.weights}
        rows = max(1, 4096 // test["asked"]["tokens"].shape[1] // 4)
        how: Any = dict(batch=min(rows, len(test)), mesh=self.mesh)
        own = predict(self._answered, both, Table({"asked": test["asked"]}), **how)
        row: Row = dict(own_reverse=float(own["reverse"].sum() / own["count"].sum()))
        row["own_length"] = float(own["count"].mean())
        if "targets" in test:
            names = ("tokens", "segment", "position", "targets")
            seen = predict(self._read, both, Table({n: test[n] for n in names}), **how)
            for name in ("forward", "reverse", "nll"):
                row[name] = float(seen[name].sum() / seen["count"].sum())
        return row

    def _read(self, both: Params, batch: Batch) -> Tree:
        """Sums over each row's response, [B] nats."""
        mine = predicted(self.model, both["student"], batch)
        theirs = predicted(self.teacher, both["teacher"], batch)
        logps = token_logps(mine.hidden, mine.unembed, mine.ids, mine.mask, vocab=mine.vocab)
        sums = {"nll": -(logps * mine.mask).sum(-1), "count": mine.mask.sum(-1)}
        for name, divergence in (("forward", forward_kl), ("reverse", reverse_kl)):
            sums[name] = self._apart(mine, theirs, divergence)
        return sums

    def _answered(self, both: Params, batch: Batch) -> Tree:
        """The same of answers that the student gives itself, at temperature 1."""
        own = respond(
            self.model, both["student"], batch["asked"], jax.random.key(0), tokens=self.answer,
            eos=self.ends, vocab=self.tokenizer.size,
        )  # fmt: skip
        mine = predicted(self.model, both["student"], own)
        theirs = predicted(self.teacher, both["teacher"], own)
        return {"reverse": self._apart(mine, theirs, reverse_kl), "count": mine.mask.sum(-1)}

    def _apart(self, mine: Predicted, theirs: Predicted, divergence: Divergence) -> Array:
        """The divergence of both models summed over each row, [B] nats."""
        sides = (mine.hidden, mine.unembed), (theirs.hidden, theirs.unembed)
        vocab = self.vocab or mine.vocab or theirs.vocab
        return (token_divergence(*sides, mine.mask, divergence, vocab=vocab)[1] * mine.mask).sum(-1)
