"""Distillation of any teacher into any student of the same vocabulary, by any of three ways.

Prompts (with responses, for the two ways that need them) in; the student learns from the teacher's
distributions, stored once, made in the step, or made in the step for the student's own answers;
the model is written as a folder. Before and after, student and teacher are compared on prompts
that were held out: on the responses there are, and on what the student answers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from w2s_jax import columns
from w2s_jax import mesh as meshes
from w2s_jax.annotate import predict
from w2s_jax.data import teachers
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
from w2s_jax.pipelines.delta_pairs import held_out
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Batch, Model, Objective, Params, Row, Table, Tree

MODES = ("stored", "live", "on-policy")
Divergence = Callable[..., Array]


@dataclass(frozen=True)
class Words:
    """How texts become rows: at most ``length`` tokens, of which ``answer`` for the response."""

    length: int
    answer: int
    template: str = "auto"
    separator: str = ""


def tokenised(table: Table, tokenizer: Tokenizer, model: Model, words: Words) -> Table:
    """The rows whose prompt fits, with ``asked`` and, where there are responses, token columns and
    ``targets``; long responses are cut.

    Raises:
      UserError: no room for a prompt, no row that fits; see ``pair_tokens.encode_prompts``.
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
    kept = [i for i, head in enumerate(heads) if 0 < len(head) <= room]
    if not kept:
        least = min(map(len, heads), default=0)
        raise UserError(f"no prompt fits in {room} tokens (the shortest has {least})")
    made = table.take(np.array(kept)).with_columns(prompt=_objects([heads[i] for i in kept]))
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


def _objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = [np.asarray(value, np.int32) for value in values]
    return column


def run_recipe(
    data: Table,
    *,
    student: str,
    teacher: str,
    ctx: Context,
    tune: Tune,
    mode: str,
    name: str,
    dense: Divergence,
    stored: Divergence | None,
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
      name: of the divergence, for the record; ``dense`` takes the teacher's logits, ``stored`` the
        columns of a stored teacher, both ``(student, teacher, ids)``.
      held: share of the prompts held out, ``most`` at most.
      rank: of adapters on a frozen student; 0 trains all weights.
      compute, remat: see ``hf.load``; the teacher is stored in ``compute``.
      save: folder for the trained model.

    Returns:
      Rows with ``forward``, ``reverse`` (KL of teacher and student, nats per token of held-out
      responses), ``nll``, and ``own_reverse``, ``own_length`` of the student's own answers.

    Raises:
      UserError: different vocabularies, no responses where they are needed, nothing held out.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if "response" not in data and (mode != "on-policy" or lam < 1):
        raise UserError(f"mode {mode!r} with lam {lam:g} needs a column 'response' in the data")
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
        if stored is None:
            raise UserError(f"{name} needs the whole distribution: use mode live or on-policy")
        train = pair.store(train, top)
    aim = partial(pair.objective, mode=mode, dense=dense, stored=stored, lam=lam, heat=temperature)
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
            "tokens): distil by aligned spans (objectives.spans) or on the teacher's texts"
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
        self,
        model: Model,
        *,
        mode: str,
        dense: Divergence,
        stored: Divergence | None,
        lam: float,
        heat: float,
    ) -> Objective:
        """What ``model`` (the student, or its adapters) is trained by."""
        if mode == "stored":
            assert stored is not None
            return distill(model, stored, targets=True)
        if mode == "live":
            return distill(model, dense, teacher=self.teacher, targets=True, vocab=self.vocab)
        how: Any = dict(tokens=self.answer, lam=lam, temperature=heat, eos=self.ends)
        how |= dict(targets=True, vocab=self.vocab or self.tokenizer.size)
        return on_policy(model, dense, teacher=self.teacher, **how)

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
