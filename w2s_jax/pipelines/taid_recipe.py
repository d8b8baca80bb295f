"""TAID and its rivals for one large student: conversations, a live teacher, a row per method.

Shing et al. 2025: whole conversations are trained on, prompts included, the teacher answers within
the step, nothing but the divergence is minimised (numbers from the authors' repository).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.annotate import predict
from w2s_jax.columns import digest
from w2s_jax.data.chat import template
from w2s_jax.data.sources import records
from w2s_jax.data.text import tokenise
from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.losses.sequence import token_divergence, token_nll
from w2s_jax.models import hf
from w2s_jax.objectives import language, taid, taid_memory
from w2s_jax.objectives.base import predicted
from w2s_jax.pipelines.taid import METHODS
from w2s_jax.record import Context
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Array, Batch, Model, Objective, Params, Row, Table


def conversations(
    source: str, tokenizer: Any, *, split: str, count: int, chat: str, length: int
) -> Table:
    """Rows of tokens [N,length] of which every token but the first is trained on.

    A row of the source has ``messages`` ({role, content}), or ``prompt`` and ``response``; the
    oldest tokens of a long one are cut.

    Raises:
      UserError: rows of another form; see ``sources.records``, ``tokenise``.
    """
    rows, form = records(source, split=split or None), template(tokenizer, chat)
    texts = []
    for i in range(min(count or len(rows), len(rows))):
        row = rows[i]
        if turns := row.get("messages"):
            texts.append(form.whole(turns[:-1], turns[-1]["content"]))
        elif "prompt" in row and "response" in row:
            texts.append(form.whole(row["prompt"], row["response"]))
        else:
            raise UserError(
                f"{source}, row {i}: a conversation has 'messages', or 'prompt' and 'response'; "
                f"this row has {sorted(row)}"
            )
    table = Table({"prompt": np.array(texts, object)})
    return tokenise(table, tokenizer, length=length, on_long="truncate", eos=True)


def objective_of(name: str, model: Model, teacher: Model, begin: float, alpha: float) -> Objective:
    """The objective of a method of ``taid.METHODS`` with a live teacher; ``alpha`` is the adaptive
    step of TAID, the other methods have their own."""
    method = METHODS[name]
    if method.truth:
        return language(model)

    def divergence(student: Array, said: Array, *, t: Array) -> Array:
        return method.divergence(student, said, t)

    step = alpha if name == "TAID" else method.alphas[0]
    return taid(model, teacher=teacher, divergence=divergence, start=begin, alpha=step)


def run_recipe(
    source: str,
    *,
    student: str,
    teacher: str,
    methods: Sequence[str],
    ctx: Context,
    tune: Tune,
    length: int,
    begin: float,
    alpha: float,
    held: float,
    split: str = "",
    count: int = 0,
    chat: str = "auto",
    compute: str = "float32",
    remat: str = "none",
) -> Iterator[Row]:
    """A row for the untouched student and for it after each method: held-out ``kl`` from the
    teacher and ``nll``, nats per token. Trainings are kept in ``ctx.workdir`` and resume.

    Raises:
      UserError: nothing held out or left to train on; vocabularies that differ; see
        ``conversations``, ``hf.load``, ``fit``.
    """
    if not 0 < held < 1:
        raise UserError(f"--held {held:g} must be a share of the rows, between 0 and 1")
    mesh = meshes.make_mesh(ctx.mesh) if ctx.mesh else None
    model, params, tokenizer = hf.load(student, mesh=mesh, compute=compute, remat=remat)
    other, theirs, words = hf.load(teacher, mesh=mesh, dtype=compute, compute=compute)
    if words.digest() != tokenizer.digest():
        raise UserError(f"{teacher} and {student} have different vocabularies")
    table = conversations(source, tokenizer, split=split, count=count, chat=chat, length=length)
    kept = round(len(table) * held)
    if not 0 < kept < len(table):
        raise UserError(f"--held {held:g} of {len(table)} rows holds out {kept}: change one")
    train, test = table.take(np.arange(kept, len(table))), table.take(np.arange(kept))
    ctx.say(f"{len(train)} conversations to train on, {kept} held out")
    weights = {"student": digest(params), "teacher": digest(theirs), "data": train.digest()}
    about: Row = {"block": "recipe", "teacher": teacher, "lr": tune.lr}
    yield about | {"method": "student"} | judged(model, params, other, theirs, test, mesh)
    for name in methods:
        truth = METHODS[name].truth
        folder = ctx.folder(
            f"train-{name}", weights | {"tune": tune, "begin": begin, "alpha": alpha}
        )
        state = fit(
            objective_of(name, model, other, begin, alpha),
            params,
            train,
            tune,
            jax.random.key(0),
            axes=model.axes,
            mesh=mesh,
            frozen=() if truth else {"teacher": theirs},
            memory=() if truth else taid_memory(),
            workdir=folder,
            save_every=500,
            track=ctx.track,
            progress=ctx.progress,
        )
        said = judged(model, state.params, other, theirs, test, mesh)
        yield about | {"method": name} | said


def judged(
    model: Model, params: Params, teacher: Model, theirs: Params, test: Table, mesh: Any
) -> Row:
    """Means over the weighted tokens of ``test``: ``kl`` from the teacher and ``nll``, nats."""

    def say(both: Params, batch: Batch) -> dict[str, Array]:
        mine = predicted(model, both["mine"], batch)
        other = predicted(teacher, both["theirs"], batch)
        parts, said = (mine.hidden, mine.unembed), (other.hidden, other.unembed)
        vocab = mine.vocab or other.vocab
        _, kl = token_divergence(parts, said, mine.mask, forward_kl, vocab=vocab)
        _, logps = token_nll(*parts, mine.ids, mine.mask, vocab=mine.vocab)
        weight = mine.mask
        return {"kl": (kl * weight).sum(-1), "nll": -(logps * weight).sum(-1), "n": weight.sum(-1)}

    batch = 8 * (mesh.size if mesh is not None else 1)
    sums = predict(say, {"mine": params, "theirs": theirs}, test, batch=batch, mesh=mesh)
    count = float(sums["n"].sum())
    return {name: float(sums[name].sum()) / count for name in ("kl", "nll")}
