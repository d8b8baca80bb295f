"""Masked distillation from two versions: by hand, its limits, its gradient, its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from w2s_jax.errors import UserError
from w2s_jax.losses import compatibility as masks
from w2s_jax.losses import sequence
from w2s_jax.losses.compatibility import compatibility
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.models.heads import linear
from w2s_jax.models.lora import lora
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import distill, distill_classes, on_base
from w2s_jax.pipelines import muscle
from w2s_jax.train.population import one_of
from w2s_jax.types import State, forward

KEY = jax.random.key(0)
STUDENT, OLD, NEW = 2.0 * np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
TARGETS = np.array([0, 1, 2, *STUDENT[3:5].argmax(-1), OLD[5].argmax()], np.int32)
FAST = jax.jit(compatibility, static_argnames="mask")
ALL = (masks.student_wrong, masks.old_right, masks.always_old, masks.less_likely)


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def by_hand(student, old, new, y, drawn, weight):
    """One token, by the paper's formula at T = 2."""
    teacher, q = softmax((old if drawn else new) / 2), softmax(student / 2)
    kl = sum(p * (np.log(p) - np.log(r)) for p, r in zip(teacher, q, strict=True))
    return weight * kl - (1 - weight) * np.log(softmax(student)[y])


def test_half_precision_logits_lose_nothing_more():
    student, old, new = (jnp.bfloat16(x) for x in (STUDENT, OLD, NEW))
    exact = [x.astype(jnp.float32) for x in (student, old, new)]
    for weight in (0.0, 0.5):
        got = FAST(student, [old, new], TARGETS, weight=weight)
        want = FAST(exact[0], exact[1:], TARGETS, weight=weight)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("mask", ALL)
def test_every_mask_by_hand(mask, weight):
    rows = [[np.asarray(x[i]) for x in (STUDENT, OLD, NEW)] for i in range(6)]
    says = {
        masks.student_wrong: lambda s, o, y: s.argmax() != y,
        masks.old_right: lambda s, o, y: o.argmax() == y,
        masks.always_old: lambda s, o, y: True,
        masks.less_likely: lambda s, o, y: softmax(s)[y] < softmax(o)[y],
    }[mask]
    drawn = [says(s, o, y) for (s, o, _), y in zip(rows, TARGETS, strict=True)]
    assert mask is masks.always_old or 0 < sum(drawn) < 6, "the case tests nothing"
    np.testing.assert_array_equal(mask(STUDENT, OLD, TARGETS), drawn)
    pairs = zip(rows, TARGETS, drawn, strict=True)
    want = [by_hand(*row, y, m, weight) for row, y, m in pairs]
    got = FAST(STUDENT, [OLD, NEW], TARGETS, mask=mask, weight=weight)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_pass_neither_the_mask_nor_the_teachers():
    def loss(student, old, new, mask):
        return compatibility(student, [old, new], TARGETS, mask=mask).sum()

    slope = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for mask in ALL:
        got = slope(STUDENT, OLD, NEW, mask)
        teacher = np.where(np.asarray(mask(STUDENT, OLD, TARGETS))[:, None], OLD, NEW)
        pairs = zip(STUDENT, teacher, strict=True)
        pull = np.stack([softmax(s / 2) - softmax(t / 2) for s, t in pairs]) / 2
        np.testing.assert_allclose(got[0], pull, atol=1e-6)  # T^-1, and no factor T^2
        assert not np.any(got[1]) and not np.any(got[2])


def test_limits():
    """A student that is the new version and right everywhere stays; so does one of two alike."""
    right = np.eye(5, dtype=np.float32)[TARGETS] * 8 + 0.1 * NEW
    pull = jax.grad(lambda s: compatibility(s, [OLD, right], TARGETS).sum())(right)
    np.testing.assert_allclose(pull, 0, atol=1e-6)
    both = FAST(STUDENT, [NEW, NEW], TARGETS)
    np.testing.assert_allclose(both, forward_kl(STUDENT, NEW, temperature=2.0), rtol=1e-6)
    plain = FAST(STUDENT, [OLD, NEW], TARGETS, weight=0.0)
    want = -jax.nn.log_softmax(STUDENT)[jnp.arange(6), TARGETS]
    np.testing.assert_allclose(plain, want, rtol=1e-4)
    with pytest.raises(UserError, match="two teachers"):
        compatibility(STUDENT, OLD, TARGETS)
    with pytest.raises(UserError, match="two teachers"):
        compatibility(STUDENT, [OLD], TARGETS)


# Through the objectives

V = 48
BASE = transformer(Config(vocab=V, width=16, layers=1, heads=2, ffn=24, max_length=64))
SMALL = transformer(Config(vocab=V, width=8, layers=1, heads=1, ffn=12, max_length=64))
MODEL, BEFORE = lora(BASE, 2), lora(SMALL, 2)


def shaken(model, seed):
    """Weights with adapters that do something."""
    params = model.init(jax.random.key(seed))
    noise = [0.3 * jax.random.normal(jax.random.key(seed + 9), x.shape) for x in _leaves(params)]
    return {**params, "lora": jax.tree.unflatten(jax.tree.structure(params["lora"]), noise)}


def _leaves(params):
    return jax.tree.leaves(params["lora"])


def test_tokens_under_two_live_teachers_by_plain_arithmetic_and_without_tokens_times_vocabulary(
    monkeypatch,
):
    old, new, mine = shaken(BEFORE, 1), shaken(MODEL, 2), shaken(MODEL, 3)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, V, (4, 16)), jnp.int32)
    mask = jnp.asarray(rng.random((4, 16)) < 0.6, jnp.float32)
    batch = {"tokens": tokens, "mask": mask}
    divergence = partial(compatibility, weight=0.7)
    objective = on_base(distill(MODEL, divergence, teacher=[BEFORE, MODEL], targets=True))
    frozen = {"base": mine["base"], "teacher": [old, new]}
    now = State(jnp.int32(0), jnp.int32(10), mine["lora"], (), frozen)

    def plain(params):
        pairs = ((MODEL, {**mine, "lora": params}), (BEFORE, old), (MODEL, new))
        mine_, old_, new_ = (decode(forward(m, p, batch))[:, :-1] for m, p in pairs)
        teachers = [jax.lax.stop_gradient(each) for each in (old_, new_)]
        return (divergence(mine_, teachers, tokens[:, 1:]) * mask[:, 1:]).sum()

    want, slope = jax.jit(jax.value_and_grad(plain))(mine["lora"])
    monkeypatch.setattr(sequence, "LIMIT", {"cpu": 4 * 12 * 3 * V, "accelerator": 1})
    call = jax.value_and_grad(lambda p: objective(p, now, batch, KEY)[:2], has_aux=True)
    (got, weight), pull = jax.jit(call)(mine["lora"])
    assert weight == mask[:, 1:].sum()
    np.testing.assert_allclose(got, want, rtol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), pull, slope)
    closed = jax.make_jaxpr(call)(mine["lora"])
    assert largest(closed.jaxpr) <= 12 * V


def test_whole_sequences_by_hand() -> None:
    student = -np.array([[1.0, 3.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    old = -np.array([[2.0, 1.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    sequence = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])  # sums -4 < -3; -3 > -4; a tie
    got = masks.sequences_less_likely(student, old, sequence)
    np.testing.assert_array_equal(got, [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


def test_the_mask_of_whole_sequences_among_those_of_tokens(monkeypatch):
    old, new, mine = shaken(BEFORE, 1), shaken(MODEL, 2), shaken(MODEL, 3)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, V, (4, 16)), jnp.int32)
    segment = jnp.asarray(np.repeat([[1] * 9 + [2] * 6 + [0]], 4, axis=0), jnp.int32)
    mask = (segment > 0).astype(jnp.float32).at[:, 9].set(0)
    batch = {"tokens": tokens, "segment": segment, "mask": mask}
    frozen = {"base": mine["base"], "teacher": [old, new]}
    now = State(jnp.int32(0), jnp.int32(10), mine["lora"], (), frozen)
    how = dict(weight=0.7)
    losses = [partial(compatibility, mask=each, **how) for each in ALL]

    def both(params, index):
        whole = {**mine, "lora": params}
        one = muscle.masked(MODEL, BEFORE, losses, index, how)
        choice = one_of(losses, index)
        tokenwise = distill(MODEL, choice, teacher=[BEFORE, MODEL], targets=True)
        return one(whole, now, batch, KEY)[0], tokenwise(whole, now, batch, KEY)[0]

    def plain(params):
        pairs = ((MODEL, {**mine, "lora": params}), (BEFORE, old), (MODEL, new))
        said, before, after = (decode(forward(m, p, batch))[:, :-1] for m, p in pairs)
        ids, kept = tokens[:, 1:], mask[:, 1:]
        gap = kept * (masks._logp(said, ids) - masks._logp(before, ids))
        less = [gap[:, part].sum(1, keepdims=True) < 0 for part in (slice(0, 8), slice(8, 15))]
        drawn = jnp.concatenate([jnp.repeat(less[0], 8, 1), jnp.repeat(less[1], 7, 1)], 1)
        teachers = [jax.lax.stop_gradient(each) for each in (before, after)]
        values = compatibility(said, teachers, ids, mask=lambda *_: drawn, **how)
        return (values * kept).sum(), drawn

    (want, drawn), slope = jax.jit(jax.value_and_grad(plain, has_aux=True))(mine["lora"])
    assert 0 < drawn.mean() < 1, "the case tests nothing"
    monkeypatch.setattr(sequence, "LIMIT", {"cpu": 4 * 12 * 3 * V, "accelerator": 1})
    call = jax.jit(jax.value_and_grad(lambda p, i: both(p, i)[0]))
    got, pull = call(mine["lora"], len(ALL))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), pull, slope)
    ours, theirs = jax.jit(both)(mine["lora"], 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def largest(jaxpr) -> int:
    """The largest number of tokens that have a whole vocabulary in one array."""
    found = [
        int(np.prod(var.aval.shape[:-1]))
        for equation in jaxpr.eqns
        for var in equation.outvars
        if getattr(var.aval, "shape", ())[-1:] == (V,) and var.aval.ndim > 2
    ]
    deeper = [largest(inner) for eq in jaxpr.eqns for inner in jaxprs_in_params(eq.params)]
    return max([0, *found, *deeper])


def test_classes_under_two_live_teachers():
    model = linear(5, 5)
    back = jnp.asarray(np.linalg.pinv(STUDENT))
    mine, old, new = ({"kernel": back @ x} for x in (STUDENT, OLD, NEW))
    batch = {"features": STUDENT, "label": jax.nn.one_hot(TARGETS, 5)}
    objective = distill_classes(model, compatibility, teacher=[model, model], targets=True)
    now = State(jnp.int32(0), jnp.int32(10), mine, (), {"teacher": [old, new]})
    total, weight, _ = objective(mine, now, batch, KEY)
    says = [forward(model, p, batch).logits for p in (mine, old, new)]
    np.testing.assert_allclose(total, FAST(says[0], says[1:], TARGETS).sum(), rtol=1e-5)
    assert weight == 6
