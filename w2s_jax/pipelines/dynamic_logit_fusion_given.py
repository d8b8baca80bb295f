"""Steering models given by name (folder, hub id) on files of questions with answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from w2s_jax import mesh as meshes
from w2s_jax.columns import digest
from w2s_jax.data.pair_tokens import MOST_UNKNOWN, encode_answers
from w2s_jax.errors import UserError
from w2s_jax.generate.steer import Rule
from w2s_jax.generate.steer_loop import Loaded, crew
from w2s_jax.models import hf
from w2s_jax.models import lora as adapters
from w2s_jax.objectives import language, on_base
from w2s_jax.pipelines.delta_pairs import asked, host_column
from w2s_jax.pipelines.delta_recipe import same_number
from w2s_jax.pipelines.dynamic_logit_fusion import DYNAMIC, Exam, alone, histogram, together
from w2s_jax.record import Context
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Row, Table

SAMPLE = 500  # rows that are looked at for tokens that nobody knows


@dataclass(frozen=True)
class Given:
    """Names and numbers: files ``data`` (one per task), ``experts`` and ``ceilings`` (a name per
    task, or none). Without experts the base is fine-tuned on each file's train split, by adapters
    of ``rank`` (0: all weights)."""

    large: str
    base: str
    experts: tuple[str, ...]
    ceilings: tuple[str, ...]
    data: tuple[str, ...]
    count: int
    separator: str
    length: int
    answer: int
    tune: Tune
    rank: int
    batch: int
    compute: str


def run_given(given: Given, how: dict[str, Rule], ctx: Context) -> Iterator[Row]:
    """Rows as the world's blocks "tasks", "weights" and, with several experts, "several".

    Raises:
      UserError: not one expert (or ceiling) per file, a file without answers, rows that are too
        long, models of different vocabularies.
    """
    for name in ("experts", "ceilings"):
        count = len(getattr(given, name))
        if count not in (0, len(given.data)):
            raise UserError(f"--{name}: {count} for {len(given.data)} files of --data; one each")
    where = meshes.make_mesh(ctx.mesh) if ctx.mesh else None
    load = partial(hf.load, mesh=where, dtype=given.compute, compute=given.compute)
    base = load(given.base)
    exams = {source: _exam(given, source, base[2]) for source in given.data}
    large = load(given.large)
    experts = [load(name) for name in given.experts] or [
        _specialist(given, base, source, ctx, where) for source in given.data
    ]
    ask = partial(_kept, ctx, given)
    for number, (source, exam) in enumerate(exams.items()):
        labels: Row = dict(block="tasks", task=source, seed=0)
        models = dict(large=large, base=base, expert=experts[number])
        if given.ceilings:
            models["ceiling"] = load(given.ceilings[number])
        for arm, model in models.items():
            yield from ask(labels | dict(arm=arm), partial(alone, model, exam, batch=given.batch))
        people = crew(large, base, [experts[number]], mesh=where)
        for arm, rule in how.items():
            heard = partial(together, people, rule, exam, batch=given.batch)
            yield from ask(labels | dict(arm=arm), heard)
    if len(experts) < 2:
        return
    people = crew(large, base, experts, mesh=where)
    for source, exam in exams.items():
        heard = partial(together, people, how[DYNAMIC], exam, batch=given.batch)
        labels = dict(block="several", task=source, seed=0, arm=DYNAMIC)
        yield from ask(labels, heard, experts=list(exams))


def _kept(
    ctx: Context, given: Given, labels: Row, hear: Any, experts: Sequence[str] = ()
) -> list[Row]:
    """The rows of one measurement, from the workdir if they are there."""

    def make() -> list[Row]:
        heard = hear()
        rows = [labels | heard.row(0)]
        if labels["arm"] == DYNAMIC and not experts:
            rows += histogram(heard.weights(0), {k: labels[k] for k in ("task", "seed")})
        shares = heard.picks(0, len(experts)) if experts else ()
        for expert, share in zip(experts, shares, strict=True):
            plain = {k: labels[k] for k in ("task", "seed")}
            rows.append({**plain, "block": "picks", "expert": expert, "share": float(share)})
        return rows

    return ctx.stage("exam", dict(given=given, **labels), make)


def _exam(given: Given, source: str, tokenizer: Any) -> Exam:
    table = _encoded(given, source, "test", tokenizer, given.count)
    return Exam(table, 0, given.answer, _same)


def _same(said: str, wanted: str) -> bool:
    """The same last number where the reference marks one, else the same words."""
    if "####" in wanted:
        return same_number(said, wanted)
    return said.strip().lower() == wanted.strip().lower()


def _encoded(given: Given, source: str, split: str, tokenizer: Any, count: int) -> Table:
    """Prompts as ids, reference answers as ``response``, and the token columns of both."""
    rows = asked(source, split=split, count=count)
    if "answer" not in rows:
        raise UserError(f"--data {source}: no column 'answer' beside the questions")
    texts = [str(text) for text in rows["answer"]]
    share = tokenizer.unknown_share([*map(str, rows["prompt"][:SAMPLE]), *texts[:SAMPLE]])
    if share > MOST_UNKNOWN:
        raise UserError(
            f"--data {source}: {share:.0%} of the tokens are unknown to the base's tokenizer; use "
            "models whose tokenizer covers the text"
        )
    plain: Any = dict(template="none", separator=given.separator)
    heads, rest = encode_answers(list(rows["prompt"]), texts, tokenizer, **plain)
    fits = [i for i in range(len(heads)) if len(heads[i]) + len(rest[i]) <= given.length]
    if not fits:
        raise UserError(f"--data {source}: no row fits in {given.length} tokens; raise --length")
    tokens = np.zeros((len(fits), given.length), np.int32)
    segment, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for row, i in enumerate(fits):
        head, size = len(heads[i]), len(heads[i]) + len(rest[i])
        tokens[row, :size], segment[row, :size] = [*heads[i], *rest[i]], 1
        mask[row, head:size] = 1.0
    columns = dict(tokens=tokens, segment=segment, mask=mask)
    prompts = host_column([np.asarray(heads[i], np.int32) for i in fits])
    return Table(dict(prompt=prompts, response=host_column([texts[i] for i in fits]), **columns))


def _specialist(given: Given, base: Loaded, source: str, ctx: Context, where: Any) -> Loaded:
    """The base fine-tuned on the train split of one file; resumes from its checkpoint."""
    model, params, tokenizer = base
    table = _encoded(given, source, "train", tokenizer, 0)
    trained: Any = adapters.lora(model, given.rank) if given.rank else model
    key, aim = jax.random.key(0), language(trained)
    start, axes, frozen = params, trained.axes, ()
    if given.rank:
        start, axes = adapters.adapters(trained, jax.random.fold_in(key, 1)), axes["lora"]
        frozen, aim = {"base": params}, on_base(aim)
    inputs = dict(data=table.digest(), rank=given.rank, tune=given.tune, base=digest(params))
    state = fit(
        aim, start, table, given.tune, key, axes=axes, mesh=where, frozen=frozen,
        workdir=ctx.folder("expert", inputs), save_every=500, track=ctx.track,
        progress=ctx.progress,
    )  # fmt: skip
    if not given.rank:
        return model, state.params, tokenizer
    merged = jax.jit(partial(adapters.merge, trained))({"base": params, "lora": state.params})
    return model, merged, tokenizer
