"""On-policy distillation: the student is compared with its teacher on what it says itself.

Responses are drawn inside the step (``generate.inside``) from the weights as they are, so these
are ordinary objectives: they read the column ``asked`` and a teacher in ``state.frozen``. No
gradient passes through the sampling. Under ``on_base`` adapters are sampled with and trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.generate.inside import respond
from w2s_jax.losses.minillm import later, two_terms
from w2s_jax.losses.policy import importance
from w2s_jax.losses.sequence import token_divergence, token_logps
from w2s_jax.models.lora import Adapted
from w2s_jax.objectives.base import frozen, language, predicted
from w2s_jax.objectives.distillation import Divergence, distill, heard, weighed
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State

Told = tuple[Array, Array, Aux]


def on_policy(
    model: Model,
    divergence: Divergence,
    *,
    teacher: Model,
    tokens: int,
    lam: float | Array | Callable[[Array], Array] = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos: int | Sequence[int] = (),
    vocab: int | None = None,
    targets: bool = False,
) -> Objective:
    """A divergence from the teacher on the student's own responses, nats per response token.

    GKD (Agarwal et al. 2024, arXiv 2306.13649, algorithm 1; ImitKD, Lin et al. 2020, with
    ``lam`` a schedule that rises): with probability ``lam`` a batch is answered by the student as
    it is and the divergence taken on its responses, else on the rows that the batch holds. One of
    both is computed (in a vmapped population both are); each micro-batch draws for itself.

    Metrics: ``own`` (share of batches the student answered) and, over those, ``length`` (tokens of
    a response) and ``ended`` (share that the end token ended).

    Args:
      divergence, teacher, targets: as in ``distill``; the teacher is a live one.
      tokens: the most tokens of a response.
      lam: a probability, a schedule of progress, or a traced scalar; 0 is ``distill``, 1 needs no
        column but ``asked``.
      temperature, top_k, top_p, min_p, eos: of the sampling, see ``generate.inside.respond``.
      vocab: real tokens, where the vocabularies of student and teacher are padded differently.

    Raises:
      UserError: ``lam`` outside [0, 1]; no column ``asked``; see ``respond`` and ``distill``.
    """
    if isinstance(lam, int | float) and not 0 <= lam <= 1:
        raise UserError(f"on_policy: lam is a probability, got {lam}")
    given = distill(model, divergence, teacher=teacher, targets=targets, vocab=vocab)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos=eos)
    real = _shared(model, teacher, vocab)
    answer = partial(answered, model, tokens=tokens, vocab=real, **how)

    def own(params: Params, state: State, batch: Batch, key: Array) -> Told:
        said, looks = answer(params, batch, key)
        total, weight, aux = given(params, state, said, key)
        return total, weight, Aux({**aux.metrics, **looks, "own": _one(1.0)}, aux.memory)

    def fixed(params: Params, state: State, batch: Batch, key: Array) -> Told:
        total, weight, aux = given(params, state, batch, key)
        none = (jnp.float32(0), jnp.float32(0))
        looks = {"length": none, "ended": none, "own": _one(0.0)}
        return total, weight, Aux({**aux.metrics, **looks}, aux.memory)

    if isinstance(lam, int | float) and lam in (0, 1):
        return own if lam else given

    def objective(params: Params, state: State, batch: Batch, key: Array) -> Told:
        share = lam(state.progress) if callable(lam) else lam
        coin, key = jax.random.split(key)
        either = jax.random.uniform(coin) < share
        trained = "lora" if isinstance(model, Adapted) else None
        return _either(either, own, fixed, params, trained, state, batch, key)

    return objective


def minillm(
    model: Model,
    *,
    teacher: Model,
    tokens: int,
    share: float = 0.2,
    loss: Callable[[Array, Array, Array], Array] = importance,
    returns: Callable[[Array, Array], Array] = later,
    corpus: float = 0.0,
    eos: int | Sequence[int] = (),
    vocab: int | None = None,
) -> Objective:
    """MiniLLM (Gu et al. 2024, arXiv 2306.08543): the reverse KL of whole responses.

    Tokens are drawn, at temperature 1, from a mixture of teacher and student in which the teacher
    has ``share`` (0.2 in the authors' scripts), and ``sequence_kl`` makes the update. As the
    authors do: ``returns=whitened, loss=ppo_clip``. They also reuse every sample for four epochs
    (see ``sequence_kl``); here every step draws its own, so the ratio to the sampling policy is 1
    but for the mixture. Metrics: ``length`` and ``ended`` as in ``on_policy``, and those of
    ``sequence_kl``.

    Args:
      loss, returns: see ``sequence_kl``.
      corpus: multiple of the next-token loss of the rows that the batch holds besides ``asked``
        (text of a pre-training corpus, in the paper), which is added.

    Raises:
      UserError: ``share`` outside [0, 1); see ``on_policy``.
    """
    if not 0 <= share < 1:
        raise UserError(f"minillm: the teacher's share of the mixture is in [0, 1), got {share}")
    how: dict[str, Any] = dict(share=share, loss=loss, returns=returns, vocab=vocab)
    update = sequence_kl(model, teacher=teacher, **how)
    text = language(model)

    def objective(params: Params, state: State, batch: Batch, key: Array) -> Told:
        mixed = (teacher, frozen(state, "teacher"), share) if share else None
        drawn = dict(tokens=tokens, vocab=_shared(model, teacher, vocab), other=mixed)
        said, looks = answered(model, params, batch, key, eos=eos, **drawn)
        total, weight, aux = update(params, state, said, key)
        if corpus:
            read, of, _ = text(params, state, batch, key)
            total = total + corpus * read * weight / jnp.where(of > 0, of, 1.0)
        return total, weight, Aux({**aux.metrics, **looks}, aux.memory)

    return objective


def sequence_kl(
    model: Model,
    *,
    teacher: Model,
    share: float | None = None,
    loss: Callable[[Array, Array, Array], Array] = importance,
    returns: Callable[[Array, Array], Array] = later,
    vocab: int | None = None,
) -> Objective:
    """The gradient of KL(student || teacher) of whole responses from sampled ones, per token.

    Reads ``tokens`` and ``targets`` as ``respond`` makes them, one response to a row. With
    ``returns=later_sum`` and responses drawn from the student its expectation, as a sum over
    tokens, is exactly that gradient. Importance weights are those of single tokens, as in the
    authors' code: for responses drawn from a mixture an approximation. The value of the loss
    estimates nothing; the metrics do: ``sequence_kl`` (log q - log p, nats per response as it was
    drawn) and ``ratio`` (mean weight). For several updates on the same responses use
    ``pipelines.reinforce.online`` with ``lesson(model, jnp.zeros_like)``, which notes ``old``.

    Args:
      share: of the teacher in the mixture that the present weights drew from; None reads
        ``policy.old``, the log-probabilities with which earlier weights drew.
      loss: of the long-term part, see ``losses.minillm.two_terms``.
      returns: what a token led to, from the rewards ``log p - log q``: ``later``, ``later_sum`` or
        ``whitened`` of ``losses.minillm``. A mean over the batch is one over a micro-batch.

    Raises:
      UserError: see ``distill``.
    """
    terms = partial(two_terms, loss=loss)

    def objective(params: Params, state: State, batch: Batch, key: Array) -> Told:
        mine = predicted(model, params, batch)
        theirs, real = heard(teacher, state, batch, mine, vocab)
        weights = weighed(mine, batch)
        look = partial(token_logps, targets=mine.ids, mask=mine.mask, vocab=real)
        q = jax.lax.stop_gradient(look(mine.hidden, mine.unembed))
        p = look(*theirs)
        if share is None:
            old = jnp.where(mine.mask > 0, batch["policy"]["old"], 0.0)
        else:  # from the same pass as q: what the sampler says is rounded differently
            old = jnp.logaddexp(q + math.log(1 - share), p + math.log(share)) if share else q
        sampled = {
            "ids": mine.ids,
            "old": old,
            "later": returns(p - q, mine.mask),
            "weight": jnp.exp(q - old),
        }
        student = (mine.hidden, mine.unembed)
        total, _ = token_divergence(student, theirs, weights, terms, targets=sampled, vocab=real)
        rows = (mine.mask.sum(-1) > 0).sum(dtype=jnp.float32)
        looks = {
            "sequence_kl": ((q - p).sum(), rows),
            "ratio": ((sampled["weight"] * mine.mask).sum(), mine.mask.sum()),
        }
        return total, weights.sum(), Aux(looks, state.memory)

    return objective


def answered(
    model: Model, params: Params, batch: Batch, key: Array, *, eos: int | Sequence[int], **how: Any
) -> tuple[Batch, dict[str, tuple[Array, Array]]]:
    """The batch of responses to the column ``asked``, and what is reported of them.

    Raises:
      UserError: no such column; see ``respond``.
    """
    if "asked" not in batch:
        raise UserError(
            "on-policy distillation needs the column 'asked' (generate.inside.ask), the batch has "
            f"{sorted(batch)}"
        )
    said = respond(model, params, batch["asked"], key, eos=eos, **how)
    said |= {name: batch[name] for name in ("weight",) if name in batch}
    mask, ids = said["targets"]["mask"], said["targets"]["ids"]
    rows = (mask.sum(-1) > 0).sum(dtype=jnp.float32)
    ends = jnp.atleast_1d(jnp.asarray(eos, jnp.int32))
    ended = ((ids[..., None] == ends[None, None]).any(-1) & (mask > 0)).any(-1)
    return said, {"length": (mask.sum(), rows), "ended": (ended.sum(dtype=jnp.float32), rows)}


def _shared(model: Model, teacher: Model, vocab: int | None) -> int:
    """The tokens that may be drawn: those that the teacher has as well."""
    return vocab or min(model.config.vocab, teacher.config.vocab)


def _one(value: float) -> tuple[Array, Array]:
    return jnp.float32(value), jnp.float32(1)


def _either(
    first: Array,
    yes: Objective,
    no: Objective,
    params: Params,
    trained: str | None,
    *rest: Any,
) -> Told:
    """What one of two objectives says, the other never run.

    Each takes its gradient where it runs: through a branch that is differentiated from outside,
    what both keep for their backward passes would be alive together. ``trained`` names the part
    of the parameters that has a gradient.
    """
    mine = params if trained is None else params[trained]
    params, still = jax.lax.stop_gradient((params, mine))

    def run(objective: Objective) -> Callable[[Params], Any]:
        def total(mine: Params) -> tuple[Array, tuple[Array, Aux]]:
            whole = mine if trained is None else {**params, trained: mine}
            total, weight, aux = objective(whole, *rest)
            return total, (weight, aux)

        return jax.value_and_grad(total, has_aux=True)

    (total, (weight, aux)), grads = jax.lax.cond(first, run(yes), run(no), still)
    return _known(total, mine, grads), weight, aux


@jax.custom_vjp
def _known(total: Array, params: Params, grads: Params) -> Array:
    """``total``, known to have the gradient ``grads``."""
    return total


def _known_forward(total: Array, params: Params, grads: Params) -> tuple[Array, Params]:
    return total, grads


def _known_backward(grads: Params, grad: Array) -> tuple[None, Params, Params]:
    scaled = jax.tree.map(lambda g: (grad * g.astype(jnp.float32)).astype(g.dtype), grads)
    return None, scaled, jax.tree.map(jnp.zeros_like, grads)


_known.defvjp(_known_forward, _known_backward)
