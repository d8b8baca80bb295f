"""Losses whose gradient is taken in the forward pass equal their plain forms, chunked or not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.losses import sequence
from w2s_jax.losses.distillation import forward_kl, jsd, reverse_kl
from w2s_jax.losses.sequence import response_sum, token_divergence, token_nll, token_stats
from w2s_jax.losses.sparse import top_k

B, T, D, E, V = 4, 6, 5, 7, 11


def example(seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    return {
        "hidden": jax.random.normal(keys[0], (B, T, D)),
        "unembed": jax.random.normal(keys[1], (D, V)),
        "targets": jax.random.randint(keys[2], (B, T), 0, V),
        "weights": jax.random.normal(keys[3], (B, T)).at[0, :2].set(0.0),
        "teacher": (jax.random.normal(keys[4], (B, T, E)), jax.random.normal(keys[5], (E, V))),
    }


def logps(hidden, unembed, vocab=V):
    return jax.nn.log_softmax((hidden @ unembed)[..., :vocab])


def same(ours, plain, hidden, unembed):
    got, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, unembed)
    want, expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, unembed)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 4, 8, 12])
@pytest.mark.parametrize("vocab", [None, 9])
def test_token_nll_is_the_weighted_sum(chunk, vocab):
    x = example()
    targets = x["targets"] % (vocab or V)

    def plain(hidden, unembed):
        every = logps(hidden, unembed, vocab or V)
        picked = jnp.take_along_axis(every, targets[..., None], -1)[..., 0]
        return 3.0 * -(picked * x["weights"]).sum()  # a factor outside must reach the gradient

    def ours(hidden, unembed):
        total, _ = token_nll(hidden, unembed, targets, x["weights"], chunk=chunk, vocab=vocab)
        return 3.0 * total

    same(ours, plain, x["hidden"], x["unembed"])


DIVERGENCES = {
    "forward": (forward_kl, lambda p, q: (np.exp(p) * (p - q)).sum(-1)),
    "reverse": (reverse_kl, lambda p, q: (jnp.exp(q) * (q - p)).sum(-1)),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_token_divergence_of_a_live_teacher(name, chunk):
    x = example()
    divergence, formula = DIVERGENCES[name]

    def plain(hidden, unembed):
        d = formula(logps(*x["teacher"]), logps(hidden, unembed))
        return (d * x["weights"]).sum()

    def ours(hidden, unembed):
        return token_divergence(
            (hidden, unembed), x["teacher"], x["weights"], divergence, chunk=chunk
        )[0]

    same(ours, plain, x["hidden"], x["unembed"])


def test_the_teacher_gets_no_gradient_and_values_none():
    x = example()

    def loss(teacher):
        return token_divergence((x["hidden"], x["unembed"]), teacher, x["weights"], forward_kl)[0]

    assert not any(leaf.any() for leaf in jax.grad(loss)(x["teacher"]))

    def values(hidden):
        return token_divergence((hidden, x["unembed"]), x["teacher"], jnp.ones((B, T)), forward_kl)[
            1
        ].sum()

    assert not jax.grad(values)(x["hidden"]).any()


@pytest.mark.parametrize("chunk", [None, 2])
def test_all_tokens_stored_are_the_live_teacher(chunk):
    x = example()
    ids = jnp.broadcast_to(jnp.arange(V)[::-1], (B, T, V))
    stored = {"ids": ids, "logits": logps(*x["teacher"])[..., ::-1], "tail": jnp.zeros((B, T))}

    def run(teacher, divergence):
        def loss(hidden, unembed):
            return token_divergence(
                (hidden, unembed), teacher, x["weights"], divergence, chunk=chunk
            )[0]

        return loss

    same(run(stored, top_k), run(x["teacher"], forward_kl), x["hidden"], x["unembed"])


def test_vocabularies_padded_differently_are_one_and_others_are_refused():
    x = example()
    wide = jnp.concatenate([x["teacher"][1], jnp.ones((E, 3))], axis=1)
    narrow = (x["teacher"][0], wide[:, :9])

    def loss(teacher, **kw):
        return token_divergence(
            (x["hidden"], x["unembed"]), teacher, x["weights"], reverse_kl, **kw
        )[0]

    want = loss((x["teacher"][0], x["teacher"][1]), vocab=9)
    np.testing.assert_allclose(loss((x["teacher"][0], wide), vocab=9), want, rtol=1e-5)
    np.testing.assert_allclose(loss(narrow, vocab=9), want, rtol=1e-5)
    with pytest.raises(UserError, match="student has 11 tokens, the teacher 14"):
        loss((x["teacher"][0], wide))
    with pytest.raises(UserError, match="vocab=10"):
        loss(narrow, vocab=10)


def curved(logps, columns):
    """A loss of whole rows that is no sum over tokens."""
    sums = (logps * columns).sum(-1)
    return (sums**2).sum(), {"sums": sums}


@pytest.mark.parametrize("chunk", [None, 1, 6, 12, 24])
def test_response_sum_of_rows(chunk):
    x = example()
    mask = (jnp.arange(T)[None] < jnp.array([6, 3, 1, 0])[:, None]).astype(jnp.float32)

    def ours(hidden, unembed):
        return response_sum(curved, hidden, unembed, x["targets"], mask, x["weights"], chunk=chunk)[
            0
        ]

    def plain(hidden, unembed):
        every = logps(hidden, unembed)
        picked = jnp.take_along_axis(every, x["targets"][..., None], -1)[..., 0]
        return curved(picked * mask, x["weights"])[0]

    same(ours, plain, x["hidden"], x["unembed"])


def test_response_sum_gives_the_values_of_rows_in_their_order():
    x, ones = example(), jnp.ones((B, T))
    args = (x["hidden"], x["unembed"], x["targets"], ones, x["weights"])
    values = [response_sum(curved, *args, chunk=c)[1]["sums"] for c in (None, 12, 6, 1)]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], rtol=1e-5)


def test_token_stats_by_hand():
    # logits are (0, ln 3): probabilities 1/4 and 3/4
    unembed = jnp.array([[0.0, jnp.log(3.0), 5.0]])
    got = token_stats(jnp.ones((1, 2, 1)), unembed, jnp.array([[0, 1]]), vocab=2)
    np.testing.assert_allclose(got["logp"], np.log([[0.25, 0.75]]), rtol=1e-6)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(got["entropy"], [[entropy, entropy]], rtol=1e-6)
    assert got["top1"].tolist() == [[0.0, 1.0]]


def test_logits_are_made_once_and_never_whole(monkeypatch):
    """Products with the vocabulary: one forward, two backward, in a loop of chunks."""
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * V * 2 * B)  # two time steps at once
    x = example()

    def loss(hidden, unembed):
        return token_nll(hidden, unembed, x["targets"], x["weights"])[0]

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x["hidden"], x["unembed"]))
    assert text.count("dot_general") == 3
    assert f"{B},{T},{V}" not in text and f"{B},2,{V}" in text


def test_vmap_over_runs_equals_a_loop():
    x = example()
    hidden = jnp.stack([x["hidden"], -x["hidden"]])

    def loss(hidden):
        return token_nll(hidden, x["unembed"], x["targets"], x["weights"], chunk=8)[0]

    got = jax.vmap(jax.grad(loss))(hidden)
    for a, b in zip(got, hidden, strict=True):
        np.testing.assert_allclose(a, jax.grad(loss)(b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_symmetric_in_its_two_roles(beta):
    a, b = jax.random.normal(jax.random.key(0), (2, 3, V))
    np.testing.assert_allclose(jsd(a, b, beta=beta), jsd(b, a, beta=1 - beta), rtol=1e-4)
    assert (jsd(a, b, beta=beta) > 0).all()
    np.testing.assert_allclose(jsd(a, a, beta=beta), 0, atol=1e-6)


def test_the_ends_of_jsd_are_the_two_kls():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, V))
    np.testing.assert_allclose(jsd(a, b, beta=1e-3) / 1e-3, forward_kl(a, b), rtol=2e-2)
    np.testing.assert_allclose(jsd(a, b, beta=1 - 1e-3) / 1e-3, reverse_kl(a, b), rtol=2e-2)


def test_divergences_ignore_entries_excluded_on_both_sides():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, V))
    longer = [jnp.pad(x, ((0, 0), (0, 2)), constant_values=sequence.EXCLUDED) for x in (a, b)]
    for f in (forward_kl, reverse_kl, partial(jsd, beta=0.3)):
        np.testing.assert_allclose(f(*longer), f(a, b), rtol=1e-5)
        grad = jax.grad(lambda s, f=f: f(s, longer[1]).sum())(longer[0])
        assert np.isfinite(grad).all()


def test_top_k_is_a_lower_bound_that_tightens_with_k():
    a, b = jax.random.normal(jax.random.key(1), (2, 5, V))
    teacher = jax.nn.log_softmax(b)
    full, bounds = forward_kl(a, b), []
    for k in (1, 4, 8, V):
        logits, ids = jax.lax.top_k(teacher, k)
        tail = jnp.clip(1 - jnp.exp(logits).sum(-1), 0) if k < V else jnp.zeros(5)
        bounds.append(top_k(a, {"ids": ids, "logits": logits, "tail": tail}))
    assert (np.diff(np.array(bounds), axis=0) > -1e-5).all()
    np.testing.assert_allclose(bounds[-1], full, rtol=1e-4)


def test_temperature_flattens_both_sides():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, V))
    np.testing.assert_allclose(
        forward_kl(a, b, temperature=2.0), forward_kl(a / 2, b / 2), rtol=1e-5
    )


def test_the_gradients_by_hand_are_those_of_the_formulas():
    a, b = 3.0 * jax.random.normal(jax.random.key(3), (2, 4, V))

    def plain(kind, beta):
        def loss(s):
            q, p = jax.nn.log_softmax(s / 2.0), jax.nn.log_softmax(b / 2.0)
            m = jnp.log(beta * jnp.exp(p) + (1 - beta) * jnp.exp(q))
            forward, reverse = ((jnp.exp(x) * (x - y)).sum(-1) for x, y in ((p, q), (q, p)))
            mixed = [(jnp.exp(x) * (x - m)).sum(-1) for x in (p, q)]
            jensen = beta * mixed[0] + (1 - beta) * mixed[1]
            return {"forward": forward, "reverse": reverse, "jensen": jensen}[kind].sum()

        return loss

    for kind, ours in (("forward", forward_kl), ("reverse", reverse_kl), ("jensen", jsd)):

        def mine(s, beta, kind=kind, ours=ours):
            given = {"beta": beta} if kind == "jensen" else {}
            return ours(s, b, temperature=2.0, **given).sum()

        got = jax.jit(jax.grad(mine))(a, jnp.float32(0.3))  # a schedule gives a traced beta
        np.testing.assert_allclose(got, jax.grad(plain(kind, 0.3))(a), rtol=1e-4, atol=1e-6)
