"""Steps of common methods drawn up from an architecture alone, for ``train.plan``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses import distillation, preference, sparse
from w2s_jax.losses.classification import soft_xent
from w2s_jax.models import lora as adapters
from w2s_jax.models.config import Config, flops_per_token
from w2s_jax.models.heads import classifier, linear
from w2s_jax.models.shapes import shape
from w2s_jax.models.transformer import shapes, transformer
from w2s_jax.objectives import classify, distill, language, on_base, on_policy, prefer
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Draft, Options, Recipe, report
from w2s_jax.train.topology import prepare
from w2s_jax.types import Batch, Model, Objective, Tree

TOP = 64  # tokens that a stored teacher keeps per prediction


@dataclass(frozen=True)
class Flags:
    """What to plan."""

    model: str = "llama-3.1-8b"
    """A published architecture (llama-3.1-8b, qwen2.5-7b, ...), a model folder or a config.json."""
    method: Literal["sft", "dpo", "kd", "gkd"] = "dpo"
    """Language modelling, preference pairs with stored reference, distillation on given rows, or
    on the student's own responses, drawn inside the step (gkd)."""
    topology: str = "v5e:8x8"
    """v4, v5e, v5p or v6e with the shape of a slice, or cpu:N."""
    batch: int = 64
    """Rows, or pairs, per update."""
    length: int = 2048
    """Tokens of a row; of a pair, or with gkd, of prompt and one response together."""
    prompt: int = 0
    """Tokens of the prompt; of a pair both responses share it (stored once), and 0 means pairs as
    two separate rows whose every token is predicted, the most there can be."""
    teacher: str | None = None
    """Distillation: architecture of a live teacher; default a stored one, which gkd cannot use."""
    mesh: str | None = None
    """Device mesh, for instance fsdp=32,tensor=2; default fsdp as far as the batch divides."""
    micro: int = 1
    """Micro-batches per update."""
    remat: str = "full"
    """What the backward pass makes again: none, dots, attention, outputs, full, offload."""
    moments: Literal["float32", "mixed", "bfloat16"] = "float32"
    """How the optimiser's moments are stored."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory."""
    rank: int = 0
    """Rank of adapters on all projections of a frozen base; 0 trains all weights."""
    optimizer: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    """Update rule."""
    dtype: str = "bfloat16"
    """Of compute, and of frozen weights."""
    param_dtype: str = "float32"
    """Of the trained weights."""


def draft(
    config: Config,
    method: str,
    tune: Tune,
    *,
    length: int,
    prompt: int = 0,
    rank: int = 0,
    offload: bool = False,
    teacher: Config | None = None,
    alone: bool = False,
    flags: Mapping[str, str] | None = None,
    name: str = "",
) -> Draft:
    """The step of ``method`` ("sft", "dpo", "kd", "gkd") on the decoder ``config``.

    Args:
      tune: ``batch`` is rows or pairs, ``micro`` the micro-batches.
      length: tokens per row; for pairs and "gkd", of the prompt and one response.
      prompt: tokens of the prompt shared by a pair, one packed pair per row; 0: ``chosen`` and
        ``rejected`` as rows of their own, every token predicted. With "gkd" the rest of ``length``
        is drawn inside the step.
      rank: of adapters over a frozen base in the compute dtype; 0 trains all weights.
      teacher: of a live teacher, for "kd" and "gkd"; None reads stored distributions.
      alone, flags: see ``Draft``.

    Raises:
      UserError: an unknown method, rows longer than the model reads, no room for a response, or
        "gkd" without a teacher or a prompt.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if length > config.max_length:
        raise UserError(f"{length} tokens exceed the {config.max_length} that the model reads")
    if not 0 <= prompt < length:
        raise UserError(f"a window of {length} tokens has no room for a prompt of {prompt}")
    if method == "gkd" and (teacher is None or not prompt):
        raise UserError("gkd needs a live teacher and the length of the prompts it answers")
    build = partial(_build, config, method, tune, length, prompt, teacher)
    kind = f"{method} of rank {rank}" if rank else method
    rows = f"{length:,} tokens" + (f" ({prompt:,} of them the prompt)" if prompt else "")
    options = Options(tune.batch, tune.micro, config.remat, tune.moments, offload, rank)
    title = f"{name or config.family} {kind}, rows of {rows}"
    return Draft(title, build, options, flags or {}, alone)


def _build(
    config: Config,
    method: str,
    tune: Tune,
    length: int,
    prompt: int,
    teacher: Config | None,
    options: Options,
) -> Recipe:
    trained = replace(config, remat=options.remat)
    if options.rank:
        trained = replace(trained, param_dtype=config.dtype)
    model: Model = transformer(trained)
    params, axes = shapes(trained), model.axes
    frozen: dict[str, Tree] = {}
    places: dict[str, Tree] = {}
    if options.rank:
        frozen["base"], places["base"] = params, axes
        model = adapters.lora(model, options.rank)
        params, axes = adapters.shapes(model), model.axes["lora"]
    if teacher is not None:
        teacher = replace(teacher, param_dtype=config.dtype, dtype=config.dtype, remat="none")
        frozen["teacher"], places["teacher"] = shapes(teacher), transformer(teacher).axes
    objective, columns, tokens = METHODS[method](model, options.batch, length, prompt, teacher)
    if options.rank:
        objective = on_base(objective)
    flops = flops_per_token(config, length)
    if options.rank:  # no gradients of the frozen weights
        flops -= flops_per_token(config, 0) / 3
    if teacher is not None:
        flops += flops_per_token(teacher, length) / 3
    if method == "gkd":  # every token passes once more, to be drawn or before one is
        flops += flops_per_token(config, length) / 3
    held = dict(frozen=frozen, places=places) if frozen else {}
    known = (_tuned(tune, options), columns, tokens, flops * tokens)
    return Recipe(objective, params, axes, *known, offload=options.offload, **held)


def _tuned(tune: Tune, options: Options) -> Tune:
    steps = tune.steps or 1000
    return replace(
        tune, batch=options.batch, micro=options.micro, moments=options.moments, steps=steps
    )


def classifying(
    config: Config,
    tune: Tune,
    *,
    length: int,
    feature: str = "last",
    alone: bool = False,
    flags: Mapping[str, str] | None = None,
    name: str = "",
) -> Draft:
    """The step of a two-class head on ``config``, body and head trained (``models.heads``).

    ``alone``, ``flags`` and ``name`` as in ``Draft``; the rest as in ``draft``.
    """

    def build(options: Options) -> Recipe:
        model = classifier(transformer(replace(config, remat=options.remat)), 2, feature)
        columns = _rows(options.batch, length) | {"label": _floats(options.batch, 2)}
        params = jax.eval_shape(model.init, jax.random.key(0))
        flops, tokens = flops_per_token(config, length), options.batch * length
        if feature != "likelihood":  # no vocabulary head
            flops -= 6.0 * config.vocab * config.width
        objective = classify(model, soft_xent)
        known = (columns, tokens, flops * tokens)
        return Recipe(objective, params, model.axes, _tuned(tune, options), *known)

    title = f"{name or config.family} with a head on {feature!r}, rows of {length:,} tokens"
    options = Options(tune.batch, tune.micro, config.remat, tune.moments)
    return Draft(title, build, options, flags or {}, alone)


def probing(
    width: int, tune: Tune, *, classes: int, flags: Mapping[str, str] | None = None
) -> Draft:
    """The step of a linear probe of ``width`` features; no tokens."""
    model = linear(classes, width)

    def build(options: Options) -> Recipe:
        columns = {
            "features": _floats(options.batch, width),
            "label": _floats(options.batch, classes),
        }
        params = jax.eval_shape(model.init, jax.random.key(0))
        known = (_tuned(tune, options), columns, 0, 6.0 * options.batch * width * classes)
        return Recipe(classify(model, soft_xent), params, model.axes, *known)

    title = f"linear probe of {width} features, {classes} classes"
    return Draft(title, build, Options(tune.batch), flags or {}, alone=True)


Method = tuple[Objective, Batch, int]


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _rows(batch: int, length: int) -> Batch:
    """A packed batch of documents."""
    names = ("tokens", "segment", "position")
    return {**{name: _ints(batch, length) for name in names}, "mask": _floats(batch, length)}


def _sft(model: Model, batch: int, length: int, prompt: int, teacher: Config | None) -> Method:
    return language(model), _rows(batch, length), batch * length


def _dpo(model: Model, batch: int, length: int, prompt: int, teacher: Config | None) -> Method:
    objective = prefer(model, partial(preference.dpo, beta=5.0))
    if not prompt:
        side = {"tokens": _ints(batch, length), "mask": _floats(batch, length)}
        side["ref"] = _floats(batch)
        return objective, {"chosen": side, "rejected": dict(side)}, 2 * batch * length
    places, answers = 2 * length - prompt, 2 * (length - prompt)
    targets = {name: _ints(batch, answers) for name in ("at", "ids", "of")}
    columns = {
        **{name: _ints(batch, places) for name in ("tokens", "segment", "position")},
        "targets": {**targets, "mask": _floats(batch, answers)},
        "rows": {"take": _ints(batch, 2, length), "back": _ints(batch, places, 2)},
        "pairs": {"weight": _floats(batch, 1), "ref": _floats(batch, 1, 2)},
    }
    return objective, columns, batch * places


def _kd(model: Model, batch: int, length: int, prompt: int, teacher: Config | None) -> Method:
    columns = _rows(batch, length)
    if teacher is not None:
        objective = distill(model, distillation.forward_kl, teacher=transformer(teacher))
        return objective, columns, batch * length
    bf16 = jax.ShapeDtypeStruct((batch, length, TOP), jnp.bfloat16)
    stored = {"ids": _ints(batch, length, TOP), "logits": bf16, "tail": _floats(batch, length)}
    return distill(model, sparse.top_k), {**columns, "teacher": stored}, batch * length


def _gkd(model: Model, batch: int, length: int, prompt: int, teacher: Config) -> Method:
    objective = on_policy(
        model,
        partial(distillation.jsd, beta=0.5),
        teacher=transformer(teacher),
        tokens=length - prompt,
        vocab=min(model.config.vocab, teacher.vocab),
    )
    asked = dict.fromkeys(("tokens", "segment"), _ints(batch, prompt))
    return objective, {"asked": asked}, batch * length


METHODS: dict[str, Callable[..., Method]] = {"sft": _sft, "dpo": _dpo, "kd": _kd, "gkd": _gkd}


def main(argv: list[str] | None = None) -> None:
    """``python -m w2s_jax.train.plan``; exit code 3 for a step that does not fit, 2 for a fault."""
    import tyro

    about = sys.modules["w2s_jax.train.plan"].__doc__
    given = tyro.cli(Flags, args=argv, prog="python -m w2s_jax.train.plan", description=about)
    try:
        prepare(given.topology)
        sys.exit(report(_asked(given), given.topology, given.mesh))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _asked(given: Flags) -> Draft:
    """The draft that the flags describe."""
    config = replace(
        shape(given.model), dtype=given.dtype, param_dtype=given.param_dtype, remat=given.remat
    )
    if given.teacher and given.method not in ("kd", "gkd"):
        raise UserError("--teacher goes with --method kd or gkd")
    tune = Tune(
        lr=1e-6,
        batch=given.batch,
        micro=given.micro,
        moments=given.moments,
        optimizer=given.optimizer,
    )
    names = [one.name for one in dataclasses.fields(Options)]
    return draft(
        config,
        given.method,
        tune,
        length=given.length,
        prompt=given.prompt,
        rank=given.rank,
        offload=given.offload,
        teacher=shape(given.teacher) if given.teacher else None,
        flags={name: f"--{name}" for name in names},
        name=given.model,
    )
