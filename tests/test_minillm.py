"""MiniLLM: the gradient of a divergence of whole responses, by enumeration of all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inside_world import asked, close, state

from w2s_jax.losses.minillm import later, later_sum, two_terms, whitened
from w2s_jax.losses.policy import ppo_clip
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import minillm, sequence_kl

KEY = jax.random.key(5)
FEW = Config(vocab=4, width=8, layers=1, heads=2, max_length=16)
SMALL = transformer(FEW)
LONGEST, END = 3, 3  # of four tokens the last ends


def every_response(longest=LONGEST):
    """All responses to one prompt: those that ended, and those cut at the greatest length."""
    found = []
    for size in range(1, longest + 1):
        for body in itertools.product(range(END), repeat=size - 1):
            last = range(END + 1) if size == longest else [END]
            found += [[*body, token] for token in last]
    return found


def enumerated(longest=LONGEST):
    said, prompt = every_response(longest), [1, 2]
    tokens = np.zeros((len(said), 2 + longest), np.int32)
    ids, mask = np.zeros((len(said), longest), np.int32), np.zeros((len(said), longest), np.float32)
    for row, one in enumerate(said):
        tokens[row, : 2 + len(one)] = prompt + one
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
    at = np.tile(1 + np.arange(longest, dtype=np.int32), (len(said), 1))
    return {"tokens": tokens, "targets": {"at": at, "ids": ids, "mask": mask, "of": 0 * ids}}


@pytest.fixture(scope="module")
def two():
    return [jax.tree.map(lambda x: 2.0 * x, SMALL.init(jax.random.key(i))) for i in (1, 2)]


@jax.jit
def logps_of(params, batch):
    """All next-token log-probabilities [N,R,V], and those of the responses [N,R]."""
    targets = batch["targets"]
    wide = jax.nn.log_softmax(decode(SMALL.apply(params, batch["tokens"])), -1)[:, 1:-1]
    own = jnp.take_along_axis(wide, targets["ids"][..., None], 2)[..., 0] * targets["mask"]
    return wide, own


def expected_gradient(objective, params, teacher, batch, chances):
    """Sum over responses of their chance times the gradient: the chance is the loss weight."""
    mask = batch["targets"]["mask"] * np.asarray(chances, np.float32)[:, None]
    rows = {**batch, "targets": {**batch["targets"], "mask": mask}}
    held = state({"teacher": teacher})
    return jax.jit(jax.grad(lambda p: objective(p, held, rows, KEY)[0]))(params)


def test_the_expected_gradient_is_that_of_the_sequence_level_reverse_kl(two) -> None:
    student, teacher = two
    batch = enumerated()
    p = logps_of(teacher, batch)[1].sum(-1)

    def divergence(params):
        q = logps_of(params, batch)[1].sum(-1)
        return (jnp.exp(q) * (q - p)).sum()

    chances = np.exp(logps_of(student, batch)[1].sum(-1))
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-5)
    want = jax.jit(jax.grad(divergence))(student)
    objective = sequence_kl(SMALL, teacher=SMALL, share=0.0, returns=later_sum)
    got = expected_gradient(objective, student, teacher, batch, chances)
    close(got, want, atol=1e-4)


@pytest.mark.slow
def test_without_what_follows_the_gradient_is_another(two) -> None:
    student, teacher = two
    batch = enumerated()
    chances = np.exp(logps_of(student, batch)[1].sum(-1))
    whole = sequence_kl(SMALL, teacher=SMALL, share=0.0, returns=later_sum)
    short = sequence_kl(SMALL, teacher=SMALL, share=0.0, loss=lambda logps, old, later: 0.0 * logps)
    given = (student, teacher, batch, chances)
    want, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected_gradient(one, *given))])
        for one in (whole, short)
    )
    assert np.linalg.norm(want - other) > 0.1 * np.linalg.norm(want)


@pytest.mark.slow
def test_a_mixture_is_weighed_token_by_token(two) -> None:
    """Two tokens, drawn from 0.4 teacher: weights make the first token's own step exact, while
    what follows it is judged under the mixture."""
    student, teacher = two
    share, batch = 0.4, enumerated(2)
    wide_p, p = logps_of(teacher, batch)
    wide, q = logps_of(student, batch)
    mixed = jnp.log(share * jnp.exp(p) + (1 - share) * jnp.exp(q)) * batch["targets"]["mask"]
    firsts = np.array([len(one) == 2 for one in every_response(2)])
    chance = jnp.exp(mixed)

    def closed(params):
        wide_q, q_now = logps_of(params, batch)
        kl = (jnp.exp(wide_q) * (wide_q - wide_p)).sum(-1)
        second = jnp.where(firsts, jnp.exp(mixed[:, 0] + mixed[:, 1]), 0.0)
        then = kl[0, 0] + (second * kl[:, 1]).sum()  # the weight of a second token is 1 on average
        rewards = jnp.where(firsts, chance[:, 1] * (p - q)[:, 1], 0.0)
        return then - (jnp.exp(q_now[:, 0]) * rewards).sum()

    del wide
    want = jax.grad(closed)(student)
    objective = sequence_kl(SMALL, teacher=SMALL, share=share, returns=later_sum)
    got = expected_gradient(objective, student, teacher, batch, np.exp(mixed.sum(-1)))
    close(got, want, atol=1e-4)
    stored = sequence_kl(SMALL, teacher=SMALL, returns=later_sum)
    batch["policy"] = {"old": mixed}
    again = expected_gradient(stored, student, teacher, batch, np.exp(mixed.sum(-1)))
    close(again, want, atol=1e-4)


@pytest.mark.slow
def test_what_is_drawn_has_the_divergence_that_enumeration_gives(two) -> None:
    student, teacher = two
    batch = enumerated()
    q, p = (logps_of(w, batch)[1].sum(-1) for w in two)
    mean = float((np.exp(q) * (q - p)).sum())
    spread = float(np.sqrt((np.exp(q) * (q - p - mean) ** 2).sum()))
    rows = 2048
    objective = minillm(SMALL, teacher=SMALL, tokens=LONGEST, share=0.0, eos=END)
    prompts = {"asked": asked([[1, 2]] * rows, 2)}
    metrics = jax.jit(objective)(student, state({"teacher": teacher}), prompts, KEY)[2].metrics
    total, count = metrics["sequence_kl"]
    assert abs(total / count - mean) < 4 * spread / np.sqrt(rows)
    assert metrics["ratio"][0] == metrics["ratio"][1]
    # a second update on responses that other weights drew has their log-probabilities to go by
    mixed = minillm(SMALL, teacher=SMALL, tokens=LONGEST, share=0.2, eos=END)
    ratio = jax.jit(mixed)(student, state({"teacher": teacher}), prompts, KEY)[2].metrics["ratio"]
    assert ratio[0] / ratio[1] == pytest.approx(1, abs=0.05) and ratio[0] != ratio[1]


def test_returns_are_of_what_comes_after() -> None:
    """LMOps and TRL (gamma 1) give [2.5, 3, 4 | 1, -1] here: the same from the token itself on."""
    rewards = jnp.array([[1.5, 2.0, 4.0, 9.0], [3.0, -1.0, 7.0, 7.0]])
    mask = jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    assert later(rewards, mask).tolist() == [[3, 4, 0, 0], [-1, 0, 0, 0]]
    assert later_sum(rewards, mask).tolist() == [[6, 4, 0, 0], [-1, 0, 0, 0]]


def test_whitened_returns_by_hand() -> None:
    """``later`` gives [3, 4, 0 | -1, 0]: mean 1.2, variance 18.8 / 4."""
    rewards = jnp.array([[1.5, 2.0, 40.0, 9.0], [3.0, -1.0, 7.0, 7.0]])
    mask = jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    got = whitened(rewards, mask, most=4.0)
    plain = np.array([[3, 4, 0], [-1, 0, 1.2]]) - 1.2
    np.testing.assert_allclose(
        got[:, :3], plain / np.sqrt((plain**2).sum() / 4), rtol=1e-3, atol=1e-6
    )
    assert not got[:, 3].any() and not got[1, 2]


def test_the_clip_drops_tokens_whose_ratio_ran_away() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 3))
    sampled = {
        "ids": jnp.zeros(3, jnp.int32),
        "old": jnp.log(jnp.array([0.5, 0.25, 0.25])),
        "later": jnp.array([1.0, 1.0, -1.0]),
        "weight": jnp.zeros(3),
    }
    total = lambda z: two_terms(z, logits, sampled, loss=ppo_clip).sum()  # noqa: E731
    slopes = jax.jit(jax.grad(total))(logits)
    # -ratio * later * d log q: at ratio 2 a good token is left alone, a bad one is not
    own = np.array([0.5, -0.3, -0.2])
    np.testing.assert_allclose(slopes, [-own, 0 * own, 2 * own], atol=1e-6)
    assert two_terms(logits, logits, sampled).tolist() == pytest.approx([-1, -2, 2])


@pytest.mark.slow
def test_rows_of_a_corpus_are_read_beside(two) -> None:
    student, teacher = two
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (3, 6)).astype(np.int32)
    batch = {"tokens": tokens, "mask": np.ones((3, 6), np.float32), "asked": asked([[1, 2]] * 3, 2)}
    how = dict(teacher=SMALL, tokens=LONGEST, eos=END)
    held = state({"teacher": teacher})
    totals = [minillm(SMALL, corpus=c, **how)(student, held, batch, KEY) for c in (0.0, 2.0)]
    nll = -np.mean(
        np.take_along_axis(
            np.asarray(jax.nn.log_softmax(decode(SMALL.apply(student, tokens)), -1))[:, :-1],
            tokens[:, 1:, None], 2,
        )
    )  # fmt: skip
    (bare, weight, _), (both, _, _) = totals
    assert float((both - bare) / weight) == pytest.approx(2 * nll, rel=1e-4)
    light = {**batch, "mask": 0.01 * batch["mask"]}  # less than one token altogether
    again = minillm(SMALL, corpus=2.0, **how)(student, held, light, KEY)[0]
    assert float(again) == pytest.approx(float(both), rel=1e-5)
