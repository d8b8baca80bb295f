"""Divergences against what the references return, values and gradients of real runs.

Recorded in float64 (torch 2 on CPU; tunix with jax) on the inputs below from: TRL 1.16
(``GKDTrainer.generalized_jsd_loss``), jongwooko/distillm d47e77f (``distillm/losses.py``),
SakanaAI/TAID a062892 (``src/distil_losses``), megvii-research/mdistiller a08d46f (``DKD.py``),
arcee-ai/DistillKit a61c2e7 (``distillkit/lossfuncs``), google/tunix c7d8950
(``distillation/strategies/logit.py``). Three positions, the last of which is padding: the value is
the mean over the first two, the gradient theirs. Where a reference is wrong, the number shows it.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.losses import distillation as d
from w2s_jax.losses import sparse

STUDENT = jnp.asarray(3 * np.sin(1.7 * np.arange(15.0)).reshape(3, 5), jnp.float32)
TEACHER = jnp.asarray(3 * np.cos(0.9 * np.arange(15.0) + 1).reshape(3, 5), jnp.float32)
TARGETS = jnp.array([0, 3, 2])


def stored(teacher, k):
    logits, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
    return {"ids": ids, "logits": logits, "tail": jnp.clip(1 - jnp.exp(logits).sum(-1), 0, 1)}


TOP = stored(TEACHER, 2)
top = partial(partial, sparse.top_k, teacher=TOP)


def mean(divergence, places=2, **more):
    """Mean of the first ``places`` positions, and its gradient there, flat."""

    def loss(student):
        return divergence(student, **more)[:places].mean()

    value, grad = jax.value_and_grad(loss)(STUDENT)
    return float(value), np.asarray(grad[:places]).ravel()


def live(built, **numbers):
    return partial(built, teacher=TEACHER, **numbers)


# what we say, what the reference said: value, gradient
RECORDED = {
    "TRL beta 0": (
        live(d.jsd_or_kl, beta=0),
        2.7215852,
        [-0.382522, 0.353671, 0.004395, -0.005025, 0.029481]
        + [0.072298, -0.293035, -0.069885, 0.232158, 0.058464],
    ),
    "TRL beta .1": (
        live(d.jsd_or_kl, beta=0.1),
        0.1846843,
        [-0.019757, 0.020321, 9.5e-05, -0.00042, -0.000239]
        + [-0.003552, -0.005401, -0.003311, 0.009774, 0.002489],
    ),
    "TRL beta .5": (
        live(d.jsd_or_kl, beta=0.5),
        0.4094077,
        [-0.027347, 0.03876, -0.000634, -0.000935, -0.009844]
        + [-0.02418, -0.005145, -0.004292, 0.02671, 0.006907],
    ),
    "TRL beta 1": (
        live(d.jsd_or_kl, beta=1),
        2.1756315,
        [-0.096717, 0.241586, -0.011427, -0.004324, -0.129117]
        + [-0.392577, -0.016208, -0.01606, 0.319126, 0.10572],
    ),
    "TRL beta .5 at temperature 2": (
        live(d.jsd_or_kl, beta=0.5, temperature=2.0),
        0.1837999,
        [-0.016984, 0.02023, 0.000162, -0.002295, -0.001113]
        + [-0.006031, -0.0096, -0.007069, 0.014718, 0.007982],
    ),
    "DistiLLM reverse KL": (
        live(d.reverse_kl),
        2.1756315,
        [-0.096717, 0.241585, -0.011427, -0.004324, -0.129117]
        + [-0.392577, -0.016208, -0.01606, 0.319126, 0.10572],
    ),
    "DistiLLM JS, its lam .9 the student's share": (
        live(d.jsd, beta=0.1),
        0.1846843,
        [-0.019757, 0.020321, 9.5e-05, -0.00042, -0.000239]
        + [-0.003552, -0.005401, -0.003311, 0.009774, 0.002489],
    ),
    "DistiLLM total variation": (
        live(d.total_variation),
        0.7504672,
        [-0.018777, 0.015975, 0.000379, -0.001168, 0.003591]
        + [0.001995, -0.002189, -0.002797, 0.002393, 0.000598],
    ),
    "DistiLLM skew reverse KL": (
        live(d.skew_reverse_kl, alpha=0.1),
        1.3476371,
        [-0.073699, 0.133394, -0.004016, -0.002932, -0.052748]
        + [-0.113923, -0.012415, -0.011233, 0.109652, 0.02792],
    ),
    "TAID": (
        live(d.taid_cross_entropy, t=0.4),
        1.4269524,
        [-0.094855, 0.141847, -0.003094, -0.002867, -0.041032]
        + [-0.126367, -0.028554, -0.017523, 0.134674, 0.03777],
    ),
    "DistillKit KL at temperature 2": (
        live(d.scaled, temperature=2.0),
        3.5512261,
        [-0.412968, 0.378006, 0.023132, -0.0367, 0.04853]
        + [0.069668, -0.390725, -0.170534, 0.323979, 0.167612],
    ),
    "DistillKit JSD at temperature 2": (
        live(d.scaled, divergence=d.jsd, beta=0.5, temperature=2.0),
        0.7351997,
        [-0.067938, 0.080922, 0.000649, -0.009181, -0.004452]
        + [-0.024122, -0.038401, -0.028277, 0.058871, 0.031929],
    ),
    "DistillKit KL, top 2, zero": (
        partial(sparse.renormalised, teacher=TOP),
        3.0752423,
        [-0.418531, 0.383814, 0.009102, 0.001219, 0.024396]
        + [0.048699, -0.348444, 0.002825, 0.237582, 0.059338],
    ),
    "DistillKit KL, top 2, symmetric uniform": (
        top(),
        2.3809558,
        [-0.382522, 0.343796, 0.008153, 0.001092, 0.029481]
        + [0.072298, -0.293035, 0.002081, 0.174959, 0.043697],
    ),
    "DistillKit JSD, top 2, symmetric uniform": (
        top(divergence=d.jsd, beta=0.5),
        0.3257807,
        [-0.027268, 0.035798, 0.000849, 0.000114, -0.009493]
        + [-0.013364, -0.005025, 0.000173, 0.014575, 0.00364],
    ),
    "DistillKit total variation, top 2, symmetric uniform": (
        top(divergence=d.total_variation),
        0.6755572,
        [-0.018825, 0.01504, 0.000357, 4.8e-05, 0.003381]
        + [0.000876, -0.002201, 1.2e-05, 0.001051, 0.000262],
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_value_and_gradient_are_the_reference_s(name) -> None:
    divergence, value, grad = RECORDED[name]
    got = mean(divergence)
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    np.testing.assert_allclose(got[1], grad, atol=2e-6)


MDISTILLER = [-0.246255, 1.637492, -0.082498, -0.953497, -0.355243]
MDISTILLER += [1.184487, -2.479879, -1.242823, 0.245991, 2.292224]


def test_mdistiller_s_decoupled_distillation() -> None:
    ours = live(d.dkd, targets=TARGETS, alpha=1.0, beta=8.0, temperature=4.0)
    value, grad = mean(ours, places=3)
    np.testing.assert_allclose(value, 20.9160607, rtol=2e-6)
    np.testing.assert_allclose(grad[:10], MDISTILLER, atol=2e-5)
    pair = jnp.array([[1.0, -0.5]]), jnp.array([[0.2, 0.9]])
    binary = d.dkd(*pair, jnp.array([0]), alpha=1.0, beta=8.0, temperature=4.0)
    np.testing.assert_allclose(binary, 0.6025, atol=5e-5)


def test_distillm_s_symmetric_loss_lacks_the_teacher_s_entropy() -> None:
    """Its forward KL and skew KL are cross-entropies, so its symmetric loss sums unlike numbers."""
    p = jax.nn.softmax(TEACHER[:2])
    entropy = -(p * jnp.log(p)).sum(-1).mean()
    grads = {
        "forward_kl": [-0.382522, 0.353671, 0.004395, -0.005025, 0.029481],
        "skew_kl": [-0.114203, 0.134247, -0.000559, -0.003457, -0.016028],
        "symmetric": [-0.125297, 0.252794, -0.009845, -0.004394, -0.113257],
    }
    for built, share, value in (
        (live(d.forward_kl), 1.0, 3.5661044),
        (live(d.skew_kl, alpha=0.1), 1.0, 2.2640457),
        (live(d.symmetric, lam=0.9), 0.1, 2.3146789),
    ):
        got = mean(built)
        np.testing.assert_allclose(got[0] + share * entropy, value, rtol=2e-6)
        np.testing.assert_allclose(got[1][:5], grads[built.func.__name__], atol=2e-6)


def test_distillkit_multiplies_the_total_variation_by_the_squared_temperature() -> None:
    """T^2 keeps a KL's gradient in size; this is above 1, which no total variation is."""
    value, grad = mean(live(d.total_variation, temperature=2.0))
    np.testing.assert_allclose(2.0218544, 4 * value, rtol=2e-6)
    assert value < 1 < 2.0218544
    want = [-0.100792, 0.077347, 0.011911, -0.025137, 0.036671]
    np.testing.assert_allclose(4 * grad[:5], want, atol=2e-6)


def test_distillkit_pulls_a_student_away_from_its_stored_teacher_at_a_temperature() -> None:
    """It flattens the teacher's K + 1 events but the student's whole vocabulary: a student that is
    its teacher has a loss of .0459 at T = 2. Both sides' events flattened, it has none."""
    column = stored(STUDENT, 2)
    theirs_flat = jnp.concatenate([column["logits"], jnp.log(column["tail"])[..., None]], -1) / 2
    theirs_flat = jax.nn.log_softmax(theirs_flat)
    mine = sparse.picked(STUDENT / 2, column["ids"])
    rest = jnp.log(1 - jnp.exp(mine).sum(-1, keepdims=True))
    unlike = d.forward_kl(jnp.concatenate([mine, rest], -1), theirs_flat)
    np.testing.assert_allclose(4 * unlike[:2].mean(), 0.0458644, rtol=1e-4)
    value, grad = mean(partial(sparse.top_k, teacher=column, temperature=2.0))
    assert abs(value) < 1e-6 and np.abs(grad).max() < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_s_trainer_trains_at_temperature_1_whatever_it_is_told() -> None:
    """``GKDConfig.temperature`` is that of sampling alone; the divergence is made at 1."""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer

    class Says(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor(np.array(logits))[None]

        def forward(self, **_):
            return SimpleNamespace(logits=self.logits)

    me = SimpleNamespace(teacher_model=Says(TEACHER), beta=0.5, temperature=2.0)
    me.generalized_jsd_loss = trainer.generalized_jsd_loss
    inputs = dict.fromkeys(("input_ids", "attention_mask")) | {"labels": torch.zeros(1, 3)}
    got = trainer.compute_loss(me, Says(STUDENT), inputs).item()
    sides = STUDENT[:2], TEACHER[:2]
    np.testing.assert_allclose(got, d.jsd(*sides, beta=0.5).mean(), rtol=1e-5)
    assert got > 2 * d.jsd(*sides, beta=0.5, temperature=2.0).mean()


def test_taid_s_adaptive_kl_is_another_loss() -> None:
    """Head by the place in the sorted order, applied to the vocabulary; weights with a gradient;
    no entropy in its forward KL. All three together give its numbers."""

    def theirs(student):
        q, p = jax.nn.log_softmax(student), jax.nn.log_softmax(TEACHER)
        ordered = jnp.sort(jnp.exp(p), axis=-1)  # ascending
        misplaced = jnp.cumsum(ordered, -1) >= 0.5
        gap = jnp.abs(jnp.exp(p) - jnp.exp(q))
        head = (misplaced * gap).sum(-1) / gap.sum(-1)
        cross, reverse = -(jnp.exp(p) * q).sum(-1), (jnp.exp(q) * (q - p)).sum(-1)
        return head * cross + (1 - head) * reverse

    value, grad = mean(theirs)
    np.testing.assert_allclose(value, 2.2659731, rtol=2e-6)
    want = [-0.108871, 0.201524, -0.011876, -0.004431, -0.076346]
    np.testing.assert_allclose(grad[:5], want, atol=2e-6)
    value, grad = mean(live(d.adaptive_kl))
    assert abs(value - 2.2659731) > 0.05 and np.abs(grad[:5] - np.array(want)).max() > 0.05


def test_taid_s_decoupled_distillation_divides_by_padding() -> None:
    """Its sum leaves padding out, its divisor is every position: 2/3 of the loss at 2 of 3."""
    value, grad = mean(live(d.dkd, targets=TARGETS, alpha=1.0, beta=0.5))
    np.testing.assert_allclose(2 / 3 * value, 1.4481399, rtol=2e-6)
    want = [-0.255015, 0.285572, -2.6e-05, -0.009561, -0.02097]
    np.testing.assert_allclose(2 / 3 * grad[:5], want, atol=2e-6)


def test_tunix_hinton_loss_and_its_mean_over_padding() -> None:
    """Its alpha is the divergence's share; it has no mask, so padding is in its mean."""
    built = live(d.hinton, targets=TARGETS, alpha=0.5, temperature=2.0)
    value, grad = mean(built, places=3)
    np.testing.assert_allclose(value, 2.2243855, rtol=2e-6)
    want = [-0.297792, 0.25394, 0.010745, -0.011827, 0.044934]
    np.testing.assert_allclose(grad[:5], want, atol=2e-6)
    assert abs(mean(built)[0] - value) > 0.1


def test_tunix_truncates_both_sides() -> None:
    """``distill_top_k`` = 2: a student 20 nats below on both kept tokens has a KL of -1.2e-08."""

    def truncated(student):
        kept = jnp.take_along_axis(student, TOP["ids"], -1)
        hard = d.hinton(student, TEACHER, TARGETS, alpha=1.0, temperature=1.0)
        return 0.5 * hard + 0.5 * d.scaled(kept, TOP["logits"], temperature=2.0)

    value, grad = mean(truncated, places=3)
    np.testing.assert_allclose(value, 1.7624371, rtol=2e-6)
    want = [-0.294835, 0.127938, 0.003034, 0.000406, 0.163457]
    np.testing.assert_allclose(grad[:5], want, atol=2e-6)
    low = TEACHER.at[jnp.arange(3)[:, None], TOP["ids"]].add(-20.0)
    assert (sparse.top_k(low, TOP) > 5).all()
