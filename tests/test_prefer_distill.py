"""Objectives of pairs and of teachers, and the promise that none holds tokens times vocabulary."""

import inspect
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from w2s_jax.data.groups import pack_groups
from w2s_jax.data.packing import with_targets
from w2s_jax.data.pairs import pack_pairs, pad_pairs
from w2s_jax.errors import UserError
from w2s_jax.losses import distillation, sequence, sparse
from w2s_jax.losses.classification import soft_xent
from w2s_jax.losses.distillation import forward_kl, jsd, reverse_kl
from w2s_jax.losses.policy import ppo_clip, response_mean, sequence_mean, token_mean
from w2s_jax.losses.preference import aot, dpo, kto, simpo
from w2s_jax.losses.sparse import top_k
from w2s_jax.models.heads import classifier
from w2s_jax.models.lora import lora
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import (
    classify,
    distill,
    language,
    on_base,
    prefer,
    reinforce,
    response_logps,
    unpaired,
)
from w2s_jax.types import State, Table, forward

KEY = jax.random.key(0)
V = 48
MODEL = transformer(Config(vocab=V, width=16, layers=2, heads=2, ffn=24, max_length=64))
PARAMS = MODEL.init(KEY)
TEACHER = transformer(Config(vocab=V, width=24, layers=1, heads=2, ffn=24, max_length=64))


def state(frozen=()):
    return State(jnp.int32(0), jnp.int32(10), PARAMS, (), frozen)


def pairs(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.integers(1, V, rng.integers(1, 9)) for _ in range(count)] for _ in range(3)]


def rows(count=4, width=16):
    rng = np.random.default_rng(1)
    table = {
        "tokens": rng.integers(1, V, (count, width)).astype(np.int32),
        "mask": (rng.random((count, width)) < 0.5).astype(np.float32),
    }
    table["mask"][:, 5] = 1.0
    return Table(table)


def whole(table):
    return jax.tree.map(jnp.asarray, table.batch(np.arange(len(table))))


def referenced(table, params=PARAMS):
    sums, _ = response_logps(MODEL, params, whole(table))
    return table.with_columns(pairs={**table["pairs"], "ref": np.asarray(sums)})


@pytest.mark.parametrize("length_mean", [True, False])
def test_the_first_dpo_loss_is_ln_2(length_mean):
    (table,) = pack_pairs(*pairs(), classes=1)
    objective = prefer(MODEL, partial(dpo, beta=5.0), length_mean=length_mean)
    total, weight, aux = jax.jit(objective)(PARAMS, state(), whole(referenced(table)), KEY)
    assert weight == 6
    np.testing.assert_allclose(total / weight, np.log(2), atol=1e-5)
    assert abs(float(aux.metrics["margin"][0])) < 1e-4


def test_dpo_by_hand():
    got = dpo(*jnp.array([[-1.0], [-3.0], [-2.0], [-2.5]]), beta=2.0)  # margin 2 * (2 - 0.5) = 3
    np.testing.assert_allclose(got, [np.log1p(np.exp(-3.0))], rtol=1e-6)
    swapped = dpo(*jnp.array([[-1.0], [-3.0], [-2.0], [-2.5]]), beta=2.0, smoothing=1.0)
    np.testing.assert_allclose(swapped, [np.log1p(np.exp(3.0))], rtol=1e-6)


@pytest.mark.parametrize("length_mean", [True, False])
def test_a_pair_by_plain_arithmetic(length_mean):
    prompt, chosen, rejected = [3, 4], [5, 6, 7], [8]
    other = MODEL.init(jax.random.key(1))

    def logp(params, response):
        tokens = jnp.array([prompt + response])
        logps = jax.nn.log_softmax(decode(forward(MODEL, params, {"tokens": tokens})))[0]
        total = sum(logps[len(prompt) - 1 + i, t] for i, t in enumerate(response))
        return total / (len(response) if length_mean else 1)

    change = [logp(PARAMS, y) - logp(other, y) for y in (chosen, rejected)]
    want = np.log1p(np.exp(-0.3 * (change[0] - change[1])))
    objective = prefer(MODEL, partial(dpo, beta=0.3), length_mean=length_mean, reference=MODEL)
    for table in (
        pad_pairs([prompt], [chosen], [rejected]),
        *pack_pairs([prompt], [chosen], [rejected]),
    ):
        total, _, aux = objective(PARAMS, state({"ref": other}), whole(table), KEY)
        np.testing.assert_allclose(total, want, rtol=1e-4)
        np.testing.assert_allclose(aux.metrics["chosen_change"][0], change[0], rtol=1e-3)
        np.testing.assert_allclose(aux.metrics["rejected_change"][0], change[1], rtol=1e-3)


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_a_pair_without_a_reference_by_plain_arithmetic(nll):
    prompt, chosen, rejected = [3, 4], [5, 6, 7], [8]

    def mean(response):
        tokens = jnp.array([prompt + response])
        logps = jax.nn.log_softmax(decode(forward(MODEL, PARAMS, {"tokens": tokens})))[0]
        return np.mean([logps[len(prompt) - 1 + i, t] for i, t in enumerate(response)])

    want = np.log1p(np.exp(-2.0 * (mean(chosen) - mean(rejected)) + 0.5)) - nll * mean(chosen)
    loss = partial(simpo, beta=2.0, target_margin=0.5)
    objective = prefer(MODEL, loss, reference="none", nll=nll)
    for table in (
        pad_pairs([prompt], [chosen], [rejected]),
        *pack_pairs([prompt], [chosen], [rejected]),
    ):
        total, _, aux = objective(PARAMS, state(), whole(table), KEY)
        np.testing.assert_allclose(total, want, rtol=1e-4)
        assert "displaced" not in aux.metrics  # nothing to have moved away from


def test_weight_zero_leaves_a_pair_out():
    three = [texts[:3] for texts in pairs()]
    objective = prefer(MODEL, partial(simpo, beta=1.0), reference="none", nll=0.5)
    full = objective(PARAMS, state(), whole(pack_pairs(*three, per_row=3)[0]), KEY)
    part = objective(PARAMS, state(), whole(pack_pairs(*three, per_row=4)[0]), KEY)
    assert full[1] == part[1] == 3
    np.testing.assert_allclose(full[0], part[0], rtol=1e-5)


def test_what_is_missing_is_said():
    (table,) = pack_pairs(*pairs(), classes=1)
    with pytest.raises(UserError, match="reference log-probabilities"):
        prefer(MODEL, partial(dpo, beta=1.0))(PARAMS, state(), whole(table), KEY)
    with pytest.raises(UserError, match="packed pairs or columns 'chosen'"):
        prefer(MODEL, partial(dpo, beta=1.0))(PARAMS, state(), whole(rows()), KEY)
    with pytest.raises(UserError, match="reference must be"):
        prefer(MODEL, dpo, reference="live")
    with pytest.raises(UserError, match="live teacher or the column"):
        distill(MODEL, top_k)(PARAMS, state(), whole(rows()), KEY)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, partial(jsd, beta=0.5)])
def test_distilling_from_a_live_teacher_by_plain_arithmetic(divergence):
    table, theirs = rows(), TEACHER.init(jax.random.key(2))
    batch = whole(table)

    def plain(params):
        a = decode(forward(MODEL, params, batch))[:, :-1]
        b = decode(forward(TEACHER, theirs, batch))[:, :-1]
        return (divergence(a, b) * batch["mask"][:, 1:]).sum()

    def ours(params, batch=batch):
        objective = distill(MODEL, divergence, teacher=TEACHER)
        return objective(params, state({"teacher": theirs}), batch, KEY)[0]

    want, grads = jax.value_and_grad(plain)(PARAMS)
    for given in (batch, whole(with_targets(table))):
        got, mine = jax.value_and_grad(ours)(PARAMS, given)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, grads)


def test_a_row_s_weight_weighs_its_predictions_as_in_language():
    theirs = TEACHER.init(jax.random.key(2))
    row_weights = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
    table, held = rows().with_columns(weight=row_weights), state({"teacher": theirs})
    batch = whole(table)
    mask = batch["mask"][:, 1:] * row_weights[:, None]
    sides = [decode(forward(m, p, batch))[:, :-1] for m, p in ((MODEL, PARAMS), (TEACHER, theirs))]
    want = (forward_kl(*sides) * mask).sum()
    live = jax.jit(distill(MODEL, forward_kl, teacher=TEACHER))
    for given in (batch, whole(with_targets(table))):
        total, weight, _ = live(PARAMS, held, given, KEY)
        np.testing.assert_allclose((total, weight), (want, mask.sum()), rtol=1e-5)


def test_vocabularies_with_other_padding_are_refused_unless_the_real_tokens_are_named():
    config = Config(vocab=V, width=8, layers=1, heads=2, max_length=64)
    one, other = (transformer(replace(config, vocab=n, pad_vocab=V)) for n in (V - 8, V - 4))
    held = state({"teacher": jax.eval_shape(other.init, KEY)})

    def asked(model, **how):
        objective = distill(model, forward_kl, teacher=other, **how)
        return jax.eval_shape(objective, jax.eval_shape(model.init, KEY), held, whole(rows()), KEY)

    with pytest.raises(UserError, match="have 40 and 44 real tokens: pass vocab="):
        asked(one)
    asked(one, vocab=V - 8)
    asked(transformer(config))


def stored(table, k):
    """The teacher column for every place of ``table`` (or for its targets)."""
    theirs = TEACHER.init(jax.random.key(2))
    batch = whole(table)
    logps = jax.nn.log_softmax(decode(forward(TEACHER, theirs, batch)))
    if "targets" in table:
        logps = jnp.take_along_axis(logps, batch["targets"]["at"][..., None], axis=1)
    logits, ids = jax.lax.top_k(logps, k)
    tail = jnp.clip(1 - jnp.exp(logits).sum(-1), 0)
    column = {"ids": ids, "logits": logits, "tail": tail}
    return table.with_columns(teacher=jax.tree.map(np.asarray, column)), theirs


def test_a_stored_teacher_of_all_tokens_is_the_live_one():
    for table in (rows(), with_targets(rows())):
        table, theirs = stored(table, V)
        live = distill(MODEL, forward_kl, teacher=TEACHER)
        kept = distill(MODEL, top_k)
        a = live(PARAMS, state({"teacher": theirs}), whole(table), KEY)
        b = kept(PARAMS, state(), whole(table), KEY)
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4)
        assert a[1] == b[1]


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


def sampled():
    """Responses with advantages, three to a prompt."""
    prompts, *responses = pairs(8)
    table = pack_groups(prompts, list(zip(*responses, pairs(8, 1)[1], strict=True)), multiple=10)
    policy = {"advantage": np.ones_like(table["targets"]["mask"]), **table["policy"]}
    return table.with_columns(policy=policy)


# every divergence with the numbers it needs: of two sets of logits, with targets, of stored columns
LIVE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric": partial(distillation.symmetric, lam=0.9),
    "jsd": partial(jsd, beta=0.5),
    "jsd_or_kl": partial(distillation.jsd_or_kl, beta=jnp.float32(0.5)),
    "skew_kl": distillation.skew_kl,
    "skew_reverse_kl": distillation.skew_reverse_kl,
    "total_variation": distillation.total_variation,
    "adaptive_kl": distillation.adaptive_kl,
    "taid": partial(distillation.taid, t=jnp.float32(0.4)),
    "taid_cross_entropy": partial(distillation.taid_cross_entropy, t=0.4),
    "logit_mse": distillation.logit_mse,
    "scaled": partial(distillation.scaled, temperature=2.0),
}
TARGETED = {
    "hinton": partial(distillation.hinton, alpha=0.5, temperature=2.0),
    "dkd": partial(distillation.dkd, beta=2.0, temperature=2.0),
}
STORED = {
    name: partial(sparse.top_k, divergence=each)
    for name, each in LIVE.items()
    if name not in ("logit_mse", "jsd_or_kl")
}
STORED |= {"renormalised": sparse.renormalised, "sampled": sparse.sampled}


def test_the_lists_of_divergences_are_whole():
    kinds = (LIVE | TARGETED, {"top_k": top_k} | STORED)
    for module, named in zip((distillation, sparse), kinds, strict=True):
        found = {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
            and not name.startswith("_")
            and {"student", "teacher"} <= set(inspect.signature(value).parameters)
        }
        assert found <= set(named)


def every_distillation():
    """The same of each divergence: a live teacher, one with targets, a stored one."""
    plain, live = state(), state({"teacher": TEACHER.init(jax.random.key(2))})
    kept = stored(with_targets(rows()), 4)[0]
    return {
        **{
            f"distill {name}": (distill(MODEL, each, teacher=TEACHER), PARAMS, live, rows())
            for name, each in LIVE.items()
        },
        **{
            f"distill {name} of targets": (
                distill(MODEL, each, teacher=TEACHER, targets=True),
                PARAMS,
                live,
                with_targets(rows()),
            )
            for name, each in TARGETED.items()
        },
        **{
            f"distill stored {name}": (distill(MODEL, each), PARAMS, plain, kept)
            for name, each in STORED.items()
        },
        "distill stored hinton of targets": (
            distill(MODEL, partial(TARGETED["hinton"], divergence=top_k), targets=True),
            PARAMS,
            plain,
            kept,
        ),
    }


@lru_cache
def every_objective():
    """Name -> (objective, params, state, batch): one entry per objective and form of its batch."""
    (packed,) = pack_pairs(*pairs(16), classes=1, per_row=2)
    packed = referenced(packed)
    head = classifier(MODEL, feature="likelihood")
    adapted = lora(MODEL, 2)
    both = adapted.init(KEY)
    labelled = rows().with_columns(label=np.full((4, 2), 0.5, np.float32))
    loss = partial(dpo, beta=1.0)
    plain = state()
    return {
        "language": (language(MODEL), PARAMS, plain, rows()),
        "language on targets": (language(MODEL), PARAMS, plain, with_targets(rows())),
        "classify": (classify(head, soft_xent), head.init(KEY), plain, labelled),
        "prefer": (prefer(MODEL, loss), PARAMS, plain, packed),
        "prefer padded": (
            prefer(MODEL, partial(simpo, beta=2.0), reference="none", nll=1.0),
            PARAMS,
            plain,
            pad_pairs(*pairs()),
        ),
        "prefer live": (
            prefer(MODEL, loss, reference=MODEL),
            PARAMS,
            state({"ref": PARAMS}),
            packed,
        ),
        "prefer wpo": (prefer(MODEL, loss, wpo=True, nll=1.0), PARAMS, plain, packed),
        "prefer ld": (
            prefer(MODEL, loss, ld_alpha=0.5, reference=MODEL),
            PARAMS,
            state({"ref": PARAMS}),
            packed,
        ),
        "prefer aot": (prefer(MODEL, partial(aot, beta=1.0)), PARAMS, plain, packed),
        "unpaired": (
            unpaired(MODEL, partial(kto, beta=1.0)),
            PARAMS,
            plain,
            packed.with_columns(label=np.ones((len(packed), 2), np.float32)),
        ),
        "prefer adapters": (
            on_base(prefer(adapted, loss, reference=MODEL)),
            both["lora"],
            state({"base": both["base"]}),
            packed,
        ),
        "reinforce": (reinforce(MODEL, ppo_clip, token_mean), PARAMS, plain, sampled()),
        "reinforce responses": (
            reinforce(MODEL, ppo_clip, sequence_mean, pool=response_mean),
            PARAMS,
            plain,
            sampled(),
        ),
        "reinforce live": (
            reinforce(MODEL, ppo_clip, token_mean, beta=0.1, reference=MODEL),
            PARAMS,
            state({"ref": PARAMS}),
            sampled(),
        ),
        **every_distillation(),
    }


NAMES = (
    "language",
    "language on targets",
    "classify",
    "prefer",
    "prefer padded",
    "prefer live",
    "prefer wpo",
    "prefer ld",
    "prefer aot",
    "unpaired",
    "prefer adapters",
    "reinforce",
    "reinforce responses",
    "reinforce live",
    *(f"distill {name}" for name in LIVE),
    *(f"distill {name} of targets" for name in TARGETED),
    *(f"distill stored {name}" for name in STORED),
    "distill stored hinton of targets",
)


def test_the_list_of_objectives_is_whole():
    assert set(NAMES) == set(every_objective())


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_holds_tokens_times_vocabulary(name, monkeypatch):
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * V * 8)  # eight tokens at once
    objective, params, now, table = every_objective()[name]
    batch = whole(table)

    def loss(params):
        return objective(params, now, batch, KEY)[0]

    found = [s for s in shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) if V in s]
    logits = [np.prod(s) // V for s in found if len(s) == 3]
    assert logits and max(logits) <= 8  # tokens whose logits exist at once
    assert max(np.prod(s) for s in found) <= max(8, 24) * V  # or a matrix [D, V]
