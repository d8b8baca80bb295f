"""Divergences by their formulas, bounds and limits; stored teachers against whole ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.losses import distillation as d
from w2s_jax.losses import sparse
from w2s_jax.losses.sequence import EXCLUDED, token_divergence

V = 11
STUDENT, TEACHER = 2.0 * jax.random.normal(jax.random.key(0), (2, 4, V))
TARGETS = jnp.array([0, 3, V - 1, 3])
WEIGHTS = jnp.array([1.0, -2.0, 0.5, 3.0])
stop = jax.lax.stop_gradient


def kl(a, b):
    return (jnp.exp(a) * (a - b)).sum(-1)


def mix(a, b, share):
    return jnp.log(share * jnp.exp(a) + (1 - share) * jnp.exp(b))


def plain_adaptive(q, p):
    order = jnp.argsort(-p, axis=-1)
    gap, mass = (
        jnp.take_along_axis(stop(x), order, -1)
        for x in (jnp.abs(jnp.exp(p) - jnp.exp(q)), jnp.exp(p))
    )
    head = jnp.cumsum(mass, -1) - mass < 0.5
    share = (gap * head).sum(-1) / gap.sum(-1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def plain_between(q, p, t):
    return jax.nn.log_softmax(stop((1 - t) * q + t * p))


def plain_mse(q, p):
    gap = (q - q.mean(-1, keepdims=True)) - (p - p.mean(-1, keepdims=True))
    return (gap**2).mean(-1)


# what is built -> its formula of the two log-softmaxes (student, teacher)
FORMULAS = {
    "forward_kl": (d.forward_kl, lambda q, p: kl(p, q)),
    "reverse_kl": (d.reverse_kl, lambda q, p: kl(q, p)),
    "symmetric": (partial(d.symmetric, lam=0.3), lambda q, p: 0.7 * kl(p, q) + 0.3 * kl(q, p)),
    "jsd": (
        partial(d.jsd, beta=0.2),
        lambda q, p: 0.2 * kl(p, mix(p, q, 0.2)) + 0.8 * kl(q, mix(p, q, 0.2)),
    ),
    "skew_kl": (partial(d.skew_kl, alpha=0.1), lambda q, p: kl(p, mix(p, q, 0.1))),
    "skew_reverse_kl": (partial(d.skew_reverse_kl, alpha=0.1), lambda q, p: kl(q, mix(q, p, 0.1))),
    "total_variation": (
        d.total_variation,
        lambda q, p: 0.5 * jnp.abs(jnp.exp(p) - jnp.exp(q)).sum(-1),
    ),
    "adaptive_kl": (d.adaptive_kl, plain_adaptive),
    "taid": (partial(d.taid, t=0.4), lambda q, p: kl(plain_between(q, p, 0.4), q)),
    "taid_cross_entropy": (
        partial(d.taid_cross_entropy, t=0.4),
        lambda q, p: -(jnp.exp(plain_between(q, p, 0.4)) * q).sum(-1),
    ),
}
LIVE = {name: built for name, (built, _) in FORMULAS.items()}
LIVE["jsd_or_kl"] = partial(d.jsd_or_kl, beta=jnp.float32(0.2))
# an f-divergence shrinks where events are lumped
LUMPED = ("forward_kl", "reverse_kl", "symmetric", "jsd", "skew_kl", "skew_reverse_kl")
LUMPED += ("total_variation", "jsd_or_kl")
TARGETED = {
    "hinton": partial(d.hinton, alpha=0.3, temperature=2.0),
    "dkd": partial(d.dkd, alpha=0.7, beta=3.0, temperature=2.0),
}
EVERY = {
    **LIVE,
    "logit_mse": d.logit_mse,
    **{name: partial(lambda s, p, f: f(s, p, TARGETS), f=f) for name, f in TARGETED.items()},
}


def both(f, *args):
    """The values and the gradient of their weighted sum by the first argument."""
    values, pull = jax.vjp(lambda x: f(x, *args[1:]), args[0])
    return values, pull(jnp.resize(WEIGHTS, values.shape))[0]


def same(got, want, rtol=1e-4, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula(name) -> None:
    built, formula = FORMULAS[name]

    def plain(student, teacher):
        return formula(jax.nn.log_softmax(student / 1.5), jax.nn.log_softmax(teacher / 1.5))

    same(both(partial(built, temperature=1.5), STUDENT, TEACHER), both(plain, STUDENT, TEACHER))


def plain_dkd(student, teacher, alpha, beta, temperature):
    hit = jax.nn.one_hot(TARGETS, V) > 0
    q, p = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
    mine, theirs = (jnp.where(hit, jnp.exp(x), 0).sum(-1) for x in (q, p))
    target = theirs * jnp.log(theirs / mine) + (1 - theirs) * jnp.log((1 - theirs) / (1 - mine))
    q, p = (jax.nn.log_softmax(x / temperature - 1000.0 * hit) for x in (student, teacher))
    return temperature**2 * (alpha * target + beta * kl(p, q))


def test_decoupled_and_hinton_by_their_formulas() -> None:
    plain = partial(plain_dkd, alpha=0.7, beta=3.0, temperature=2.0)
    same(both(EVERY["dkd"], STUDENT, TEACHER), both(plain, STUDENT, TEACHER))

    def hinton(student, teacher):
        hard = -jnp.take_along_axis(jax.nn.log_softmax(student), TARGETS[:, None], -1)[:, 0]
        soft = kl(jax.nn.log_softmax(teacher / 2), jax.nn.log_softmax(student / 2))
        return 0.3 * hard + 0.7 * 4.0 * soft

    same(both(EVERY["hinton"], STUDENT, TEACHER), both(hinton, STUDENT, TEACHER))
    same(both(d.logit_mse, STUDENT, TEACHER), both(plain_mse, STUDENT, TEACHER))


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("taid_cross_entropy", "hinton")])
def test_zero_at_the_teacher_and_above_elsewhere(name) -> None:
    values, grad = both(EVERY[name], TEACHER, TEACHER)
    np.testing.assert_allclose(values, 0, atol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-5)
    assert (EVERY[name](STUDENT, TEACHER) > 1e-3).all()


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_the_bounds(scale) -> None:
    a, b = scale * STUDENT, scale * TEACHER
    variation = d.total_variation(a, b)
    for divergence in (d.forward_kl, d.reverse_kl):  # Pinsker
        assert (variation <= jnp.sqrt(divergence(a, b) / 2) + 1e-6).all()
    assert ((variation > 0) & (variation <= 1 + 1e-5)).all()
    for share in (0.02, 0.5, 0.9):
        entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
        assert (d.jsd(a, b, beta=share) <= entropy + 1e-4).all()
        for skewed in (d.skew_kl, d.skew_reverse_kl):
            assert (skewed(a, b, alpha=share) <= -np.log(share) + 1e-4).all()
    if scale > 1:  # disjoint: the bounds are reached
        far = jnp.array([[200.0, 0.0]]), jnp.array([[0.0, 200.0]])
        np.testing.assert_allclose(d.jsd(*far, beta=0.5), np.log(2), rtol=1e-6)
        np.testing.assert_allclose(d.skew_kl(*far, alpha=0.1), -np.log(0.1), rtol=1e-6)
        np.testing.assert_allclose(d.total_variation(*far), 1, rtol=1e-6)


def test_the_limits_of_skew_and_of_high_temperature() -> None:
    for skewed, whole in ((d.skew_kl, d.forward_kl), (d.skew_reverse_kl, d.reverse_kl)):
        near = both(partial(skewed, alpha=1e-5), STUDENT, TEACHER)
        same(near, both(whole, STUDENT, TEACHER), rtol=1e-2, atol=1e-3)
    hot = both(partial(d.scaled, temperature=100.0), STUDENT, TEACHER)
    cold = both(lambda s, p: 0.5 * d.logit_mse(s, p), STUDENT, TEACHER)
    same(hot, cold, rtol=0.05, atol=2e-3)


def test_the_gradient_of_scaled_keeps_its_size() -> None:
    for temperature in (1.0, 4.0):
        q, p = (jax.nn.softmax(x / temperature) for x in (STUDENT, TEACHER))
        grad = both(partial(d.scaled, temperature=temperature), STUDENT, TEACHER)[1]
        np.testing.assert_allclose(grad, WEIGHTS[:, None] * temperature * (q - p), atol=1e-5)
    half = d.scaled(STUDENT, TEACHER, temperature=2.0, divergence=d.jsd, beta=0.5)
    same(half, 4 * d.jsd(STUDENT, TEACHER, beta=0.5, temperature=2.0))


def test_the_ends_of_the_target_that_moves() -> None:
    for moved in (d.taid, d.taid_cross_entropy):
        still = both(partial(moved, t=0.0), STUDENT, TEACHER)[1]
        np.testing.assert_allclose(still, 0, atol=1e-6)
        whole = both(partial(moved, t=1.0), STUDENT, TEACHER)[1]
        np.testing.assert_array_equal(whole, both(d.forward_kl, STUDENT, TEACHER)[1])
    entropy = -(jax.nn.softmax(TEACHER) * jax.nn.log_softmax(TEACHER)).sum(-1)
    same(d.taid_cross_entropy(STUDENT, TEACHER, t=1.0), d.forward_kl(STUDENT, TEACHER) + entropy)


def test_decoupling_takes_the_kl_apart() -> None:
    sure = jnp.take_along_axis(jax.nn.softmax(TEACHER), TARGETS[:, None], -1)[:, 0]

    def together(student, teacher):
        target = d.dkd(student, teacher, TARGETS, alpha=1.0, beta=0.0)
        others = d.dkd(student, teacher, TARGETS, alpha=0.0, beta=1.0)
        return target + (1 - sure) * others

    same(both(together, STUDENT, TEACHER), both(d.forward_kl, STUDENT, TEACHER))


def test_of_two_classes_nothing_is_left_beside_the_target() -> None:
    a, b, true = STUDENT[:, :2], TEACHER[:, :2], jnp.array([0, 1, 1, 0])
    values, grad = both(partial(d.dkd, alpha=0.0, beta=8.0, targets=true), a, b)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(grad, 0)
    same(d.dkd(a, b, true, alpha=1.0, beta=8.0), d.forward_kl(a, b))


def test_the_exact_ends_of_the_jensen_shannon_divergence() -> None:
    ends = {0.0: d.forward_kl, 1.0: d.reverse_kl, 0.3: partial(d.jsd, beta=0.3)}
    for beta, want in ends.items():
        for number in (beta, jnp.float32(beta)):
            got = both(partial(d.jsd_or_kl, beta=number), STUDENT, TEACHER)
            same(got, both(want, STUDENT, TEACHER), rtol=1e-6, atol=1e-7)
    runs = jax.vmap(lambda beta: d.jsd_or_kl(STUDENT, TEACHER, beta=beta))(jnp.array([*ends]))
    same(runs, jnp.stack([want(STUDENT, TEACHER) for want in ends.values()]))


def test_the_head_of_a_teacher_by_hand() -> None:
    p = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    want = [[False, True, False, True], [False, True, False, False], [True] * 4]
    assert d._head(p, 0.5).tolist() == want
    assert d._head(p, 0.75)[0].tolist() == [False, True, True, True]
    # gaps .4 in the head, .2 + .2 outside: half of each KL
    q = jnp.array([[0.3, 0.5, 0.0, 0.2]]).at[0, 2].set(1e-30)
    p = jnp.array([[0.1, 0.9, 1e-30, 1e-30]])
    half = 0.5 * d.forward_kl(jnp.log(q), jnp.log(p)) + 0.5 * d.reverse_kl(jnp.log(q), jnp.log(p))
    np.testing.assert_allclose(d.adaptive_kl(jnp.log(q), jnp.log(p)), half, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_exist_counts_nothing(name) -> None:
    low = jnp.broadcast_to(jnp.array([EXCLUDED, -jnp.inf]), (4, 2))
    a, b = (jnp.concatenate([x, low], -1) for x in (STUDENT, TEACHER))
    values, grad = both(EVERY[name], a, b)
    same((values, grad[:, :V]), both(EVERY[name], STUDENT, TEACHER))
    np.testing.assert_array_equal(grad[:, V:], 0)


@pytest.mark.parametrize("name", EVERY)
def test_numbers_stay_finite_and_half_precision_is_widened(name) -> None:
    for sides in ((3e4 * STUDENT, TEACHER), (STUDENT, 3e4 * TEACHER)):
        assert all(np.isfinite(x).all() for x in both(EVERY[name], *sides))
    half = [x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER)]
    wide = [x.astype(jnp.float32) for x in half]
    (values, grad), want = both(EVERY[name], *half), both(EVERY[name], *wide)
    assert values.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    same((values, grad.astype(jnp.float32)), want, rtol=1e-2, atol=1e-4)
    same(values, want[0])


@pytest.mark.parametrize("name", EVERY)
def test_nothing_reaches_the_teacher(name) -> None:
    grad = jax.grad(lambda p: EVERY[name](STUDENT, p).sum())(TEACHER)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", ["scaled", "hinton", "dkd"])
def test_nothing_reaches_the_temperature(name) -> None:
    built = {
        "scaled": d.scaled,
        "hinton": partial(d.hinton, targets=TARGETS, alpha=0.3),
        "dkd": partial(d.dkd, targets=TARGETS, beta=3.0),
    }[name]
    assert jax.grad(lambda t: built(STUDENT, TEACHER, temperature=t).sum())(2.0) == 0


def test_numbers_may_differ_between_runs() -> None:
    numbers = jnp.array([0.1, 0.8])
    for built, what in ((d.symmetric, "lam"), (d.taid, "t"), (d.forward_kl, "temperature")):
        got = jax.vmap(lambda x, f=built, what=what: f(STUDENT, TEACHER, **{what: x}))(numbers)
        for one, number in zip(got, numbers, strict=True):
            same(one, built(STUDENT, TEACHER, **{what: float(number)}))


@pytest.mark.parametrize("name", ["reverse_kl", "adaptive_kl", "dkd"])
def test_rows_that_weigh_nothing_give_nothing(name) -> None:
    hidden = jax.random.normal(jax.random.key(3), (2, 4, 5))
    matrices = jax.random.normal(jax.random.key(4), (2, 5, V))
    divergence, targets = {**LIVE, **TARGETED}[name], None
    if name in TARGETED:
        targets = jnp.tile(TARGETS, (2, 1))

    def loss(matrix, weights):
        sides = (hidden, matrix), (hidden, matrices[1])
        total, values = token_divergence(*sides, weights, divergence, targets=targets)
        return total, values

    some = jnp.zeros((2, 4)).at[0, 1].set(1.0)
    (total, values), grad = jax.value_and_grad(loss, has_aux=True)(matrices[0], 0 * some)
    assert total == 0 and not values.any() and not grad.any()
    assert loss(matrices[0], some)[0] > 0


BAD = {
    "beta must be above 0 and below 1, not 0; jsd_or_kl": partial(d.jsd, beta=0),
    "jsd: beta must be above 0 and below 1, not 1.0": partial(d.jsd, beta=1.0),
    "jsd_or_kl: beta must be from 0 to 1, not 1.5": partial(d.jsd_or_kl, beta=1.5),
    "skew_kl: alpha must be above 0": partial(d.skew_kl, alpha=0.0),
    "skew_reverse_kl: alpha must be above 0": partial(d.skew_reverse_kl, alpha=-1.0),
    "symmetric: lam must be from 0 to 1": partial(d.symmetric, lam=2.0),
    "taid: t must be from 0 to 1": partial(d.taid, t=-0.1),
    "adaptive_kl: head must be above 0": partial(d.adaptive_kl, head=1.0),
    "temperature must be above 0, not 0": partial(d.forward_kl, temperature=0),
    "hinton: alpha must be from 0 to 1": partial(
        d.hinton, targets=TARGETS, alpha=1.1, temperature=1.0
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_a_number_out_of_range_is_one_line(words) -> None:
    with pytest.raises(UserError, match=words):
        BAD[words](STUDENT, TEACHER)


def test_logits_that_do_not_fit_are_one_line() -> None:
    wrong: list[Any] = [TEACHER[:, 1:], TEACHER[:1], {"ids": TARGETS}, [TEACHER, TEACHER]]
    for teacher in wrong:
        with pytest.raises(UserError, match="like the student's"):
            d.forward_kl(STUDENT, teacher)
    with pytest.raises(UserError, match="a stored teacher has ids, logits, tail"):
        sparse.top_k(STUDENT, TEACHER)
    with pytest.raises(UserError, match="got .'ids'"):
        sparse.renormalised(STUDENT, {"ids": TARGETS})
    with pytest.raises(UserError, match="do not fit logits"):
        sparse.renormalised(STUDENT, {"ids": TARGETS, "logits": TARGETS})
    with pytest.raises(UserError, match="a count of 1 or more"):
        sparse.draw(jax.random.key(0), TEACHER, 0)


def stored(teacher, k):
    logits, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
    return {"ids": ids, "logits": logits, "tail": jnp.clip(1 - jnp.exp(logits).sum(-1), 0, 1)}


def lumped(student, column):
    """Log-probabilities of the kept tokens and of all others, by a softmax and a sum."""
    kept = jax.nn.one_hot(column["ids"], V).sum(-2) > 0
    q = jax.nn.log_softmax(student)
    rest = jnp.log(jnp.where(kept, 0, jnp.exp(q)).sum(-1, keepdims=True))
    return jnp.concatenate([jnp.take_along_axis(q, column["ids"], -1), rest], -1)


@pytest.mark.parametrize("name", LIVE)
def test_a_stored_teacher_under_every_divergence(name) -> None:
    divergence = partial(sparse.top_k, divergence=LIVE[name])
    whole = both(divergence, STUDENT, stored(TEACHER, V))
    same(whole, both(LIVE[name], STUDENT, TEACHER), atol=1e-4)
    column = stored(TEACHER, 3)
    theirs = jnp.concatenate([column["logits"], jnp.log(column["tail"])[..., None]], -1)
    plain = lambda s, column: LIVE[name](lumped(s, column), theirs)  # noqa: E731
    same(both(divergence, STUDENT, column), both(plain, STUDENT, column), atol=2e-5)


@pytest.mark.parametrize("temperature", [4.0, 20.0])
def test_with_all_tokens_kept_no_others_gain_at_a_temperature(temperature) -> None:
    kept = partial(sparse.top_k, divergence=d.scaled, temperature=temperature)
    whole = partial(d.scaled, temperature=temperature)
    got = both(kept, STUDENT, stored(TEACHER, V))
    same(got, both(whole, STUDENT, TEACHER), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LUMPED)
def test_more_kept_tokens_bound_the_divergence_tighter(name) -> None:
    bounds = [sparse.top_k(STUDENT, stored(TEACHER, k), divergence=LIVE[name]) for k in (1, 3, 7)]
    bounds.append(LIVE[name](STUDENT, TEACHER))
    assert (np.diff(np.array(bounds), axis=0) > -1e-5).all()


def test_options_reach_the_divergence_of_a_stored_teacher() -> None:
    column = stored(TEACHER, 3)
    options = {"beta": 0.2, "temperature": 2.0}
    want = sparse.top_k(STUDENT, column, divergence=partial(d.jsd, **options))
    same(sparse.top_k(STUDENT, column, divergence=d.jsd, **options), want)
    got = TARGETED["hinton"](STUDENT, stored(TEACHER, V), TARGETS, divergence=sparse.top_k)
    same(got, TARGETED["hinton"](STUDENT, TEACHER, TARGETS), rtol=1e-3)


def test_without_a_tail_the_bucket_is_the_renormalised_teacher() -> None:
    column = stored(TEACHER, 3)
    norm = jax.nn.logsumexp(column["logits"], -1, keepdims=True)
    sure = {**column, "logits": column["logits"] - norm, "tail": jnp.zeros(4)}
    got, want = both(sparse.top_k, STUDENT, sure), both(sparse.renormalised, STUDENT, column)
    same(got, want, atol=1e-4)
    for name in LUMPED:  # a student's mass where the teacher has none is finite
        parts = both(partial(sparse.top_k, divergence=LIVE[name]), STUDENT, sure)
        assert all(np.isfinite(x).all() for x in parts)


def test_renormalised_teaches_that_nothing_else_exists() -> None:
    whole = both(sparse.renormalised, STUDENT, stored(TEACHER, V))
    same(whole, both(d.forward_kl, STUDENT, TEACHER))
    column = stored(TEACHER, 3)
    kept = jax.nn.one_hot(column["ids"], V).sum(-2) > 0
    grad = jax.grad(lambda s: sparse.renormalised(s, column).sum())(TEACHER)
    assert (grad[~kept] > 0).all()  # even at the teacher itself
    grad = jax.grad(lambda s: sparse.top_k(s, column).sum())(TEACHER)
    np.testing.assert_allclose(grad, 0, atol=1e-5)  # the residual event does not


def test_a_student_that_never_says_a_kept_token_is_seen() -> None:
    """A softmax of both sides over the kept tokens is 0 for such a student (tunix: -1.2e-08)."""
    column = stored(TEACHER, 3)
    student = TEACHER.at[jnp.arange(4)[:, None], column["ids"]].add(-20.0)
    kept = jnp.take_along_axis(student, column["ids"], -1)
    np.testing.assert_allclose(d.forward_kl(kept, column["logits"]), 0, atol=1e-5)
    assert (sparse.top_k(student, column) > 5).all()
    assert (sparse.renormalised(student, column) > 5).all()


def test_sampled_tokens_weigh_what_they_should() -> None:
    """Each token once, weighed by its probability, is the expectation: the cross-entropy."""
    everything = {"ids": jnp.tile(jnp.arange(V), (4, 1)), "logits": jax.nn.log_softmax(TEACHER)}
    got = both(sparse.sampled, STUDENT, everything)
    same(got, both(partial(d.taid_cross_entropy, t=1.0), STUDENT, TEACHER))
    even = sparse.draw(jax.random.key(1), TEACHER, 8)
    np.testing.assert_allclose(even["logits"], np.log(1 / 8), atol=1e-5)
    assert even["ids"].shape == (4, 8) and even["tail"].shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_under_either_proposal(temperature) -> None:
    column = sparse.draw(jax.random.key(1), TEACHER, 20_000, temperature=temperature)
    np.testing.assert_allclose(jnp.exp(column["logits"]).sum(-1), 1, atol=0.04)
    want = both(partial(d.taid_cross_entropy, t=1.0), STUDENT, TEACHER)
    same(both(sparse.sampled, STUDENT, column), want, rtol=0.05, atol=0.05)
