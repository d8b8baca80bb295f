"""Updates of a task model that break little: two versions and a third that is drawn to both.

MUSCLE (Echterhoff et al. 2024, arXiv 2407.09435). S runs, one per seed, of every version: class
models whose weights all train, or adapters over frozen decoders. A compatible version starts from
the new one and is distilled, token by token, from the old or from the new one by a mask
(``losses.compatibility``). All settings and seeds of a stage are one program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from w2s_jax.annotate import surprise
from w2s_jax.data import arithmetic
from w2s_jax.data.arithmetic_text import Verdict
from w2s_jax.data.text import encode
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.losses.classification import soft_xent
from w2s_jax.losses.compatibility import Mask, compatibility, sequences_less_likely
from w2s_jax.losses.sequence import token_divergence, token_logps
from w2s_jax.mesh import is_axes
from w2s_jax.models import hf
from w2s_jax.models.config import Config, flops_per_token
from w2s_jax.models.lora import Adapted, adapters, lora, shapes
from w2s_jax.models.transformer import shapes as decoder_shapes
from w2s_jax.models.transformer import transformer
from w2s_jax.objectives import classify, distill, distill_classes, language, on_base
from w2s_jax.objectives.base import predicted
from w2s_jax.objectives.distillation import heard
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft, Options, Recipe
from w2s_jax.train.population import one_of, population
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State, Table, Tree, forward

ROWS = 50  # held-out rows that are looked at together


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a task model: ``params`` [S, ...] of what trains, over ``base`` if frozen."""

    name: str
    model: Model
    params: Params
    base: Params | None = None
    tokenizer: Tokenizer | None = None

    @property
    def frozen(self) -> Tree:
        """The weights of all runs, as ``own_teachers`` reads them."""
        return self.params if self.base is None else {"base": self.base, "lora": self.params}

    def run(self, i: int | Array) -> Params:
        """The weights of run ``i``, as ``model.apply`` takes them."""
        return _run(self.frozen, i, self.base is not None)


@dataclass(frozen=True, eq=False)
class Bench:
    """What the trainings of one block share.

    ``tables`` [S] to train on; ``held`` are items as ``said`` reads them, of which ``dev`` [S,n]
    choose settings and ``test`` [m] are reported.
    """

    tables: Sequence[Table]
    tune: Tune
    held: Tree
    dev: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.tables)


@dataclass(frozen=True, eq=False)
class Learned:
    """A version as one setting made it, and what it says of the items held: ``nll`` [S,N] mean nats
    of the right answer, for class models ``logps`` [S,N,C]."""

    version: Version
    setting: Mapping[str, float]
    nll: np.ndarray
    logps: np.ndarray | None


def class_version(name: str, model: Model, seeds: Sequence[int]) -> Version:
    """A class model with weights drawn by each of ``seeds``."""
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    return Version(name, model, jax.device_get(jax.vmap(model.init)(keys)))


def adapted_version(
    name: str, rank: int, alpha: float, seeds: Sequence[int], dtype: str = "float32"
) -> Version:
    """New adapters, drawn by each of ``seeds``, over a pretrained decoder stored in ``dtype``."""
    base, weights, tokenizer = hf.load(name, dtype=dtype)
    model = lora(base, rank, alpha=alpha)
    drawn = [adapters(model, jax.random.key(seed)) for seed in seeds]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    return Version(name, model, params, weights, tokenizer)


def tasked(bench: Bench, version: Version, lrs: Sequence[float]) -> Learned:
    """``version`` fine-tuned on the task, with the learning rate that dev chooses."""
    settings = [{"lr": lr} for lr in lrs]
    frozen = {} if version.base is None else {"base": version.base}
    return best(_trained(bench, version, _task(version.model), settings, frozen), bench)


def compatible(
    bench: Bench,
    old: Version,
    new: Version,
    masks: Sequence[Mask],
    settings: Sequence[Mapping[str, float]],
    *,
    temperature: float = 2.0,
) -> list[Learned]:
    """Versions that start as ``new`` and are distilled from both, one per setting.

    Args:
      settings: ``lr``, ``mask`` (a number among ``masks``; of decoders one more than they are is
        ``sequences_less_likely``) and ``weight`` (lambda: 0 is plain fine-tuning, 1 the
        distillation alone) of each.

    Raises:
      UserError: versions of different vocabularies or numbers of runs; a run that became NaN.
    """
    told = [v.tokenizer.digest() for v in (old, new) if v.tokenizer is not None]
    if len(set(told)) > 1:
        raise UserError(f"{old.name} and {new.name} have different tokenizers: no token to align")
    objective = _compatible(old.model, new.model, tuple(masks), temperature)
    frozen: dict[str, Any] = {"teacher": [old.frozen, new.params]}
    if new.base is not None:
        frozen["base"] = new.base
    return _trained(bench, new, objective, settings, frozen)


def best(learned: Sequence[Learned], bench: Bench) -> Learned:
    """The one whose mean cross-entropy on dev, over all seeds, is lowest: the paper's criterion."""
    return min(learned, key=lambda one: np.take_along_axis(one.nll, bench.dev, axis=1).mean())


def _trained(
    bench: Bench,
    version: Version,
    objective: Callable[[Mapping[str, Array]], Objective],
    settings: Sequence[Mapping[str, float]],
    frozen: Tree,
) -> list[Learned]:
    """All settings and seeds as one population."""
    size, count = len(bench), len(settings)
    names = settings[0].keys()
    hyper = {name: np.repeat(np.array([s[name] for s in settings]), size) for name in names}
    hyper = {k: v.astype(np.int32 if k == "mask" else np.float32) for k, v in hyper.items()}
    hyper["run"] = np.tile(np.arange(size, dtype=np.int32), count)
    data = bench.held if version.base is None else {"base": version.base, **bench.held}
    done = population(
        objective,
        jax.tree.map(lambda leaf: np.concatenate([leaf] * count), version.params),
        [*bench.tables] * count,
        bench.tune,
        [*range(size)] * count,
        hyper=hyper,
        stacked=True,
        axes=version.model.axes["lora"] if version.base is not None else version.model.axes,
        frozen=frozen,
        probe=said(version.model),
        data=data,
        points=1,
    )
    if done.failed:
        worst = dict(settings[done.failed[0] // size])
        raise UserError(f"{version.name} became NaN with {worst}: lower the learning rate")
    learned = []
    for i, setting in enumerate(settings):
        part = slice(i * size, (i + 1) * size)
        params = jax.tree.map(lambda leaf, p=part: leaf[p], done.params)
        made = replace(version, params=params)
        heard = {name: values[part, -1] for name, values in done.curve.items()}
        learned.append(Learned(made, setting, heard["nll"], heard.get("logps")))
    return learned


def own_teachers(objective: Objective, run: int | Array, adapted: bool) -> Objective:
    """``objective`` of one of S runs, each with two teachers of its own.

    ``state.frozen["teacher"]`` holds the weights of the old version (``Version.frozen``) and the
    new one's trained part, all [S, ...]; the objective sees those of number ``run`` []. The new
    version's base is the student's own.
    """

    def own(params: Params, state: State, batch: Batch, key: Array):
        old, new = state.frozen["teacher"]
        new = {"base": state.frozen["base"], "lora": new} if adapted else new
        teachers = [_run(each, run, adapted) for each in (old, new)]
        now = replace(state, frozen={**state.frozen, "teacher": teachers})
        return objective(params, now, batch, key)

    return own


def _run(frozen: Tree, run: int | Array, adapted: bool) -> Params:
    one = jax.tree.map(lambda leaf: leaf[run], frozen["lora"] if adapted else frozen)
    return {"base": frozen["base"], "lora": one} if adapted else one


# One function per model, so that a population's program is compiled once.


@lru_cache(maxsize=64)
def _task(model: Model) -> Callable[[Mapping[str, Array]], Objective]:
    adapted = isinstance(model, Adapted)
    objective = on_base(language(model)) if adapted else classify(model, soft_xent)
    return lambda row: objective


@lru_cache(maxsize=64)
def _compatible(
    old: Model, new: Model, masks: tuple[Mask, ...], temperature: float
) -> Callable[[Mapping[str, Array]], Objective]:
    adapted = isinstance(new, Adapted)

    def objective(row: Mapping[str, Array]) -> Objective:
        how = dict(weight=row["weight"], temperature=temperature)
        losses = [partial(compatibility, mask=mask, **how) for mask in masks]
        if adapted:
            one = on_base(masked(new, old, losses, row["mask"], how))
        else:
            choice = one_of(losses, row["mask"])
            one = distill_classes(new, choice, teacher=[old, new], targets=True)
        return own_teachers(one, row["run"], adapted)

    return objective


def masked(
    new: Model,
    old: Model,
    losses: Sequence[Callable[..., Array]],
    index: Array,
    how: Mapping[str, Any],
) -> Objective:
    """``distill(new, one_of(losses, index), teacher=[old, new], targets=True)``, where the number
    after the last loss is ``compatibility(**how)`` by whole sequences (``segment`` of a row)."""

    def objective(params: Params, state: State, batch: Batch, key: Array):
        mine = predicted(new, params, batch)
        theirs, vocab = heard([old, new], state, batch, mine)
        pairs = ((mine.hidden, mine.unembed), theirs[0])
        ours, olds = [token_logps(h, w, mine.ids, mine.mask, vocab=vocab) for h, w in pairs]
        whole = sequences_less_likely(ours, olds, batch["segment"][:, 1:])

        def divergence(student: Array, teachers: Sequence[Array], columns: Tree) -> Array:
            ids, drawn = columns
            last = partial(compatibility, mask=lambda *_: drawn, **how)
            return jax.lax.switch(index, [*losses, last], student, teachers, ids)

        total, _ = token_divergence(
            *(pairs[0], theirs, mine.mask, divergence), targets=(mine.ids, whole), vocab=vocab
        )
        return total, mine.mask.sum(), Aux({}, state.memory)

    return objective


@lru_cache(maxsize=64)
def said(model: Model) -> Callable[[Params, Tree], dict[str, Array]]:
    """``(params, data) -> {"nll" [N]}`` and, of a class model, ``logps`` [N,C].

    ``data`` has the model's columns [N,...] and ``label``, or (adapters) ``base``, and ``groups``
    [G,ROWS,...] of token columns whose mask is 1 on the answers.
    """

    def classes(params: Params, data: Tree) -> dict[str, Array]:
        logps = jax.nn.log_softmax(forward(model, params, data).logits)
        return {"nll": -(logps * data["label"]).sum(-1), "logps": logps}

    def tokens(params: Params, data: Tree) -> dict[str, Array]:
        whole = {"base": data["base"], "lora": params}

        def one(group: Batch) -> Array:
            heard = surprise(model)(whole, group)
            return heard["nll"] / heard["tokens"]

        return {"nll": jax.lax.map(one, data["groups"]).reshape(-1)}

    return tokens if isinstance(model, Adapted) else classes


# Tasks with a solution in text


def worded(problems: Table, tokenizer: Tokenizer, length: int, *, context: bool) -> Table:
    """Columns ``prompt`` and ``response`` as tokens [N,length]; the mask is 1 on the response and,
    with ``context``, on the prompt too.

    Raises:
      UserError: a problem that is longer.
    """
    table, cut = encode(problems, tokenizer, length=length, eos=True)
    if cut.dropped:
        raise UserError(f"{cut.dropped} problems exceed {length} tokens: raise --length")
    columns = {name: table[name] for name in ("tokens", "segment", "position", "mask")}
    if context:
        columns["mask"] = ((columns["segment"] > 0) & (columns["position"] > 0)).astype(np.float32)
    return Table(columns)


def grouped(table: Table) -> dict[str, Any]:
    """Held-out token columns as ``said`` reads them, the last row repeated to fill a group."""
    count = -(-len(table) // ROWS) * ROWS
    rows = table.batch(np.minimum(np.arange(count), len(table) - 1))
    return {"groups": {k: v.reshape(-1, ROWS, *v.shape[1:]) for k, v in rows.items()}}


def answered(version: Version, i: int, problems: Table, tokens: int) -> dict[str, np.ndarray]:
    """Greedy answers of run ``i``, verified: ``answer`` [N] as ``finals`` writes it and ``credit``
    [N], the share of the reference's steps that are there."""
    prompts, tokenizer = list(problems["prompt"]), version.tokenizer
    if tokenizer is None:
        raise UserError(f"{version.name} has no tokenizer: it cannot answer in words")
    key = jax.random.key(0)  # greedy: not used
    texts = complete(version.model, version.run(i), tokenizer, prompts, key, tokens=tokens)
    pairs = zip(problems["answer"], texts, strict=True)
    verdicts = [arithmetic.verify(answer, text) for answer, text in pairs]
    return {
        "answer": finals(verdicts),
        "credit": np.array([v.credit for v in verdicts]),
    }


def finals(verdicts: Iterable[Verdict]) -> np.ndarray:
    """The final numbers [N] as text, one text per number, "" where there is none."""
    return np.array(["" if v.final is None else str(v.final) for v in verdicts])


def draft(config: Config, tune: Tune, *, length: int, rank: int, flags: Mapping[str, str]) -> Draft:
    """The compatibility step for ``train.plan``, both versions of the architecture ``config``:
    adapters under two live teachers, each with its own frozen base (three forward passes, one
    backward)."""

    def build(options: Options) -> Recipe:
        half = replace(config, dtype="bfloat16", param_dtype="bfloat16")
        student = lora(transformer(replace(half, remat=options.remat)), options.rank)
        small, base, axes = shapes(student), decoder_shapes(half), student.axes
        runs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), small)
        places = jax.tree.map(lambda names: (None, *names), axes["lora"], is_leaf=is_axes)
        frozen = {"base": base, "teacher": [{"base": base, "lora": runs}, runs]}
        where = {"base": axes["base"], "teacher": [{**axes, "lora": places}, places]}
        one = distill(student, compatibility, teacher=[student, student], targets=True)
        size = (options.batch, length)
        columns: Batch = {
            name: jax.ShapeDtypeStruct(size, np.int32) for name in ("tokens", "segment", "position")
        }
        columns["mask"] = jax.ShapeDtypeStruct(size, np.float32)
        numbers = dict(batch=options.batch, micro=options.micro, moments=options.moments)
        flops = flops_per_token(config, length)  # of a step; a forward pass is a third of it
        flops += 2 * flops / 3 - flops_per_token(config, 0) / 3  # frozen weights have no gradients
        tokens = options.batch * length
        return Recipe(
            own_teachers(on_base(one), 0, True), small, axes["lora"],
            replace(tune, **numbers, steps=tune.steps or 1000), columns, tokens, flops * tokens,
            frozen=frozen, places=where, offload=options.offload,
        )  # fmt: skip

    options = Options(tune.batch, tune.micro, "full", tune.moments, False, rank)
    title = f"compatibility adapters of rank {rank}, two live teachers, rows of {length:,} tokens"
    return Draft(title, build, options, flags)
