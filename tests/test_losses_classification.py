from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from w2s_jax.errors import UserError
from w2s_jax.losses import classification as module
from w2s_jax.losses.classification import (
    aux_confidence,
    confidence_window,
    entropy_confidence,
    half_threshold,
    logconf,
    midweak,
    product,
    quantile_threshold,
    ramp,
    ref_schedule,
    soft_xent,
)

# Six examples, and what a torch transcription of the published formulae gives for them.
F = jnp.array(
    [[0.25, -0.26], [1.28, 0.21], [-1.07, 0.72], [2.61, 1.89], [-1.41, -2.53], [-1.25, 0.08]]
)
Q = jnp.array([[0.14, 0.86], [0.97, 0.03], [0.27, 0.73], [0.82, 0.18], [0.14, 0.86], [0.46, 0.54]])
TORCH = {
    "xent": [0.9089133, 0.3270122, 0.6377022, 0.5261940, 1.2455778, 0.8464588],
    "logconf": [0.9303333, 0.3173822, 0.4927122, 0.4873140, 0.9566179, 0.6629189],
    "product": [0.9634489, 0.2955113, 0.2491610, 0.4200117, 1.3527200, 0.5961065],
    "entropy": [0.8347379, 0.3993666, 0.5695423, 0.5580309, 1.0392777, 0.7463734],
}
TORCH_GRADIENT = {
    "logconf": [0.5268065, -0.2344031, -0.0459273, -0.2013930, 0.3559887, -0.1128407],
    "product": [0.5917390, -0.2548431, 0.0901348, -0.2948685, 0.7096515, -0.0626058],
}
LOSSES = {
    "xent": soft_xent,
    "aux": partial(aux_confidence, alpha=0.3),
    "logconf": partial(logconf, alpha=0.3),
    "product": partial(product, alpha=2.0, beta=0.5),
    "entropy": partial(entropy_confidence, alpha=0.3),
    "window": partial(confidence_window, radius=0.2),
}


def logits_of(probs):
    return jnp.log(jnp.asarray(probs))


@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_the_torch_transcription(name):
    np.testing.assert_allclose(LOSSES[name](F, Q), TORCH[name], rtol=1e-5)


@pytest.mark.parametrize("name", TORCH_GRADIENT)
def test_gradients_are_those_of_the_torch_transcription(name):
    grad = jax.grad(lambda f: LOSSES[name](f, Q).sum())(F)
    np.testing.assert_allclose(grad[:, 0], TORCH_GRADIENT[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad.sum(-1), np.zeros(6), atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_float32_per_example_under_jit_for_bfloat16_logits(name):
    got = jax.jit(LOSSES[name])(F.astype(jnp.bfloat16), Q)
    assert got.shape == (6,) and got.dtype == jnp.float32
    want = LOSSES[name](F.astype(jnp.bfloat16).astype(jnp.float32), Q)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_soft_xent_by_hand():
    # q = (1/4, 3/4), p = (1/2, 1/2) gives ln 2; a one-hot label gives -ln p.
    got = soft_xent(logits_of([[0.5, 0.5], [0.2, 0.8]]), jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    np.testing.assert_allclose(got, [np.log(2), -np.log(0.2)], rtol=1e-6)


def test_soft_xent_gradient_is_p_minus_q():
    check_grads(lambda f: soft_xent(f, Q), (F,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    grad = jax.grad(lambda f: soft_xent(f, Q).sum())(F)
    np.testing.assert_allclose(grad, jax.nn.softmax(F) - Q, atol=1e-6)


def test_aux_confidence_by_hand():
    # p_1 = .9 .6 .3 .2; the mean weak label is 1/4, so only the first is hardened to 1.
    probs = np.array([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3], [0.8, 0.2]])
    labels = jnp.full((4, 2), jnp.array([0.75, 0.25]))
    hard = np.array([[0, 1], [1, 0], [1, 0], [1, 0]])
    target = 0.5 * np.asarray(labels) + 0.5 * hard
    got = aux_confidence(logits_of(probs), labels, alpha=0.5)
    np.testing.assert_allclose(got, -(target * np.log(probs)).sum(-1), rtol=1e-5)
    # With a fixed cut at 1/2 the second is positive too.
    fixed = aux_confidence(logits_of(probs), labels, alpha=1.0, threshold=lambda p, q: 0.5)
    np.testing.assert_allclose(fixed, -np.log([0.9, 0.6, 0.7, 0.8]), rtol=1e-5)
    half = aux_confidence(logits_of(probs), labels, alpha=1.0, threshold=half_threshold)
    np.testing.assert_allclose(half, -np.log([0.9, 0.6, 0.7, 0.8]), rtol=1e-5)


def test_aux_confidence_of_many_classes_hardens_to_the_argmax():
    probs = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    labels = jnp.full((2, 3), 1 / 3)
    got = aux_confidence(logits_of(probs), labels, alpha=1.0)
    np.testing.assert_allclose(got, -np.log([0.5, 0.6]), rtol=1e-5)


@pytest.mark.parametrize("positives", range(9))
def test_quantile_threshold_gives_exactly_the_weak_share(positives):
    p1 = jax.random.uniform(jax.random.key(positives), (8,))
    q1 = jnp.full((8,), positives / 8)
    t = quantile_threshold(jnp.stack([1 - p1, p1], 1), jnp.stack([1 - q1, q1], 1))
    assert int((p1 > t).sum()) == positives


@pytest.mark.parametrize("size", [1, 5, 32, 300])
def test_order_statistics_equal_those_of_a_sort(size):
    values = jnp.round(jax.random.uniform(jax.random.key(size), (size,)), 2)  # with ties
    ordered = [-jnp.inf, *jnp.sort(values), jnp.inf]
    for place in (-1, 0, size // 2, size - 1, size):
        assert module._ordered(values, jnp.int32(place)) == ordered[place + 1]
    for share in (0.0, 0.37, 0.5, 1.0):
        got = module._quantile(values, jnp.float32(share))
        np.testing.assert_allclose(got, jnp.quantile(values, share), rtol=1e-6)


@pytest.mark.parametrize("size", [4, 7, 32])
def test_half_threshold_splits_the_batch(size):
    p1 = jax.random.uniform(jax.random.key(size), (size,))
    probs = jnp.stack([1 - p1, p1], 1)
    assert int((p1 > half_threshold(probs, probs)).sum()) == size // 2


@pytest.mark.parametrize("name", ["aux", "logconf", "entropy"])
def test_alpha_zero_is_soft_xent_and_alpha_one_ignores_the_labels(name):
    loss = LOSSES[name].func
    np.testing.assert_allclose(loss(F, Q, alpha=0.0), soft_xent(F, Q), rtol=1e-6)
    other = jnp.tile(Q.mean(0)[None], (6, 1))  # other labels with the same class share
    np.testing.assert_allclose(loss(F, Q, alpha=1.0), loss(F, other, alpha=1.0), rtol=1e-6)


def test_alpha_may_differ_by_example():
    alpha = jnp.array([0.0, 0.5, 1.0, 0.0, 0.5, 1.0])
    got = aux_confidence(F, Q, alpha=alpha)
    for i, a in enumerate([0.0, 0.5, 1.0]):
        want = aux_confidence(F, Q, alpha=a)
        np.testing.assert_allclose(got[i::3], want[i::3], rtol=1e-6)


def test_product_limits():
    np.testing.assert_allclose(product(F, Q, beta=0.0), soft_xent(F, Q), rtol=1e-6)
    # alpha = 0 leaves the entropy of p, also where a label is exactly 0.
    hard = jnp.array([[1.0, 0.0]] * 6)
    p = jax.nn.softmax(F)
    np.testing.assert_allclose(product(F, hard, alpha=0.0), -(p * jnp.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(product(F, hard), soft_xent(F, hard), rtol=1e-6)
    sure = product(jnp.array([[200.0, -200.0]]), jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(sure, [400.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["aux", "logconf", "entropy", "product"])
def test_targets_are_detached(name):
    # Recover the target (a, 1-a) from the loss; were it constant, the gradient is p - target.
    logps = jax.nn.log_softmax(F)
    a = (LOSSES[name](F, Q) + logps[:, 1]) / (logps[:, 1] - logps[:, 0])
    grad = jax.grad(lambda f: LOSSES[name](f, Q).sum())(F)
    np.testing.assert_allclose(grad, jnp.exp(logps) - jnp.stack([a, 1 - a], 1), atol=1e-5)


def test_confidence_window_by_hand():
    probs = np.array([[0.6, 0.4], [0.1, 0.9], [0.35, 0.65]])
    labels = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    got = confidence_window(logits_of(probs), labels, radius=0.2)
    np.testing.assert_allclose(got, [-np.log(0.4), 0.0, -np.log(0.65)], rtol=1e-5)
    grad = jax.grad(lambda f: confidence_window(f, labels, radius=0.2).sum())(logits_of(probs))
    assert np.all(np.asarray(grad)[1] == 0) and np.all(np.asarray(grad)[[0, 2]] != 0)
    np.testing.assert_allclose(confidence_window(F, Q, radius=0.51), soft_xent(F, Q))


def test_midweak_is_the_median_weak_confidence():
    labels = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    np.testing.assert_allclose(midweak(labels), 0.2, rtol=1e-5)


def test_schedules_by_hand():
    linear, ref = ramp(0.0, 0.75, over=0.2), ref_schedule(0.5)
    for schedule, at, want in [
        (linear, (0, 0.1, 0.2, 0.9, 1), (0, 0.375, 0.75, 0.75, 0.75)),
        (ref, (0, 0.05, 0.1, 0.11, 1), (0, 0.025, 0.05, 0.5, 0.5)),
    ]:
        np.testing.assert_allclose([float(schedule(x)) for x in at], want, atol=1e-7)
    assert float(ramp(0.2, 0.4, over=0)(0.0)) == pytest.approx(0.4)
    for schedule in (linear, ref):
        assert schedule.is_schedule
        assert jax.jit(schedule)(jnp.float32(0.5)).dtype == jnp.float32
    with pytest.raises(UserError, match="over"):
        ramp(0, 1, over=1.5)


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_shapes_are_said(name):
    with pytest.raises(UserError, match=r"\[B,C\]"):
        LOSSES[name](F, Q[:3])


def test_logconf_counts_the_example_at_the_quantile_as_class_0():
    # p_0 = .1 .3 .6 .8 .9 and share 1/2: the quantile is .6 itself, which hardens to class 0.
    p0 = np.array([0.1, 0.3, 0.6, 0.8, 0.9])
    got = logconf(logits_of(np.stack([p0, 1 - p0], 1)), jnp.full((5, 2), 0.5), alpha=1.0)
    np.testing.assert_allclose(got, -np.log([0.9, 0.7, 0.6, 0.8, 0.9]), rtol=1e-5)


def test_logconf_refuses_three_classes():
    with pytest.raises(UserError, match="aux_confidence"):
        logconf(jnp.zeros((2, 3)), jnp.ones((2, 3)) / 3, alpha=0.5)
