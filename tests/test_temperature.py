"""The temperature that is trained against the student: exact, turned round, without V x tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_world import V, bigrams, shapes, wave

from w2s_jax.data.packing import with_targets
from w2s_jax.errors import UserError
from w2s_jax.losses import sequence
from w2s_jax.losses.temperature import tempered_kl
from w2s_jax.models.heads import linear
from w2s_jax.models.transformer import decode
from w2s_jax.objectives import curriculum, curriculum_classes, with_temperature
from w2s_jax.objectives.temperature import curriculum_instances, reversal, with_predictor
from w2s_jax.train.fit import make_step, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.types import State, Table, forward

KEY = jax.random.key(0)
PROBE = linear(6, 6)


MODEL, TEACHER = bigrams(4), bigrams(6, 48)


def state(frozen, progress):
    return State(jnp.int32(1200 * progress), jnp.int32(1200), (), (), frozen)


def dense(student, teacher, theta, span=20.0):
    """T^2 KL, every derivative by autodiff."""
    warm = 1 + span * jax.nn.sigmoid(theta)
    log_p, log_q = (jax.nn.log_softmax(z / warm) for z in (teacher, student))
    return warm**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("t", [0.5, 3.0])
def test_the_derivative_by_the_temperature_is_autodiffs(t):
    student, teacher = 2 * wave(4, 6), 3 * wave(4, 6, phase=1.0)

    def plain(student, t):
        log_p, log_q = (jax.nn.log_softmax(z / t) for z in (teacher, student))
        value = t**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        return value.sum(), value

    def ours(student, t):
        value, slope = tempered_kl(student, teacher, t)
        return value.sum(), (value, slope)

    @jax.jit
    def both(student, t):
        slopes = jax.jvp(lambda t: plain(student, t)[1], (t,), (1.0,))[1]
        asked = [jax.value_and_grad(fn, argnums=(0, 1), has_aux=True) for fn in (plain, ours)]
        return slopes, *(fn(student, t) for fn in asked)

    slopes, ((_, want), (by_student, _)), ((_, (value, slope)), grads) = both(student, t)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(slope, slopes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(grads[0], by_student, rtol=1e-4, atol=1e-5)
    assert grads[1] == 0  # the slope is a value: what is not asked for does not leak


def test_half_precision_missing_logits_and_a_temperature_for_each():
    student, teacher = (jnp.bfloat16(2 * wave(3, 5, phase=i)) for i in (0.0, 1.0))
    exact = [x.astype(jnp.float32) for x in (student, teacher)]
    gone = [jnp.pad(x, ((0, 0), (0, 2)), constant_values=-jnp.inf) for x in exact]
    each = jnp.array([0.5, 2.0, 7.0])

    def said(student, teacher, t):
        (value, slope), pull = jax.vjp(lambda x: tempered_kl(x, teacher, t), student)
        return value, slope, pull((jnp.ones(value.shape), jnp.zeros(value.shape)))[0]

    @jax.jit
    def asked():
        alone = jax.vmap(said)(*exact, each)  # each with a temperature []
        return alone, said(*exact, each), said(student, teacher, each), said(*gone, each)

    alone, together, rough, missing = asked()
    assert [x.dtype.name for x in rough] == ["float32", "float32", "bfloat16"]
    np.testing.assert_array_equal(missing[2][:, 5:], 0.0)
    missing = *missing[:2], missing[2][:, :5]
    for others, rtol in ((together, 1e-5), (missing, 1e-5), (rough, 1e-2)):
        for a, b in zip(others, alone, strict=True):
            np.testing.assert_allclose(jnp.float32(a), b, rtol=rtol, atol=1e-5)


def test_a_perfect_student_has_no_temperature_to_learn():
    x = wave(3, 5)
    value, slope = jax.jit(tempered_kl)(x, x, 4.0)
    np.testing.assert_allclose([value, slope], np.zeros((2, 3)), atol=1e-5)


# zhengli97/CTKD with its global temperature (theta 1, T = 1 + 20 sigmoid(theta)), in double
# precision: the batch's mean, the first numbers of the student's gradient, and what its optimiser
# is handed for theta when the reversal is whole and when it is a quarter
CTKD = (1.42725215739, (-0.10948427987, 0.06252424643, 0.06881741880))
THETA = {1.0: -0.01183478731, 0.25: -0.00295869683}
# SakanaAI/TAID's port of it on the same logits: what its optimiser is handed for theta in its first
# and fifth epoch
SAKANA = {1: 214.728344071, 5: 110.057470031}


def classes(progress, over=1.0):
    batch = {
        "features": 2 * wave(4, 6),
        "teacher": {"classes": 3 * wave(4, 6, phase=1.0)},
    }
    model = with_temperature(PROBE)
    params = {"student": {"kernel": jnp.eye(6)}, "theta": jnp.float32(1.0)}
    objective = curriculum_classes(PROBE, over=over)

    def mean(params):
        total, weight, aux = objective(params, state((), progress), batch, KEY)
        return total / weight, (forward(model, params, batch).logits, aux)

    (value, (_, aux)), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, grads, aux


@pytest.mark.parametrize(("progress", "share"), [(0.999, 1.0), (1 / 3, 0.25), (0.0, 0.0)])
def test_value_and_gradients_are_ctkds(progress, share):
    value, grads, aux = classes(progress)
    np.testing.assert_allclose(value, CTKD[0], rtol=1e-5)
    # the features are the logits: the kernel's gradient is their product with the logits'
    by_logits = np.linalg.lstsq(2 * wave(4, 6).T, grads["student"]["kernel"], rcond=None)[0]
    np.testing.assert_allclose(by_logits[0, :3], CTKD[1], rtol=1e-3)
    np.testing.assert_allclose(grads["theta"], THETA.get(share, 0.0), rtol=1e-3, atol=1e-7)
    warm, weight = aux.metrics["temperature"]
    np.testing.assert_allclose(warm / weight, 1 + 20 / (1 + np.exp(-1)), rtol=1e-6)


# the released loss of one example at its own temperature (README of zhengli97/CTKD) with the
# released reversal, in double precision; the network is that of ``predictor`` below. The README
# adds 1e-7 to the teacher's probabilities, left out here: at T = 17 it moves theta's gradient by
# 0.2 %.
# The batch's mean, the mean temperature, the first numbers of the student's gradient; the first of
# the kernel's, its product with cos(0), cos(1), ..., and the first of the bias', the output's and
# theta's
INSTANCES = (1.41490385278, 14.4112740675, -0.1088878, 0.06180915, 0.06958611)
PREDICTOR = (-0.02402124, -0.0329916664, 0.00728141, -0.01532693, -0.0267196967)


def predictor():
    return {
        "kernel": wave(12, 5, phase=2.0) / 3,
        "bias": wave(5, phase=3.0),
        "out": wave(5, phase=4.0) / 2,
        "theta": jnp.float32(0.3),
    }


def instances(layers, over=1.0, **columns):
    batch = {"features": 2 * wave(4, 6), "teacher": {"classes": 3 * wave(4, 6, phase=1.0)}}
    params = {"student": {"kernel": jnp.eye(6)}, "predictor": layers}
    objective = curriculum_instances(PROBE, over=over)

    @jax.jit
    def mean(params, progress):
        now = State(1200 * progress, jnp.float32(1200), (), ())

        def loss(params):
            total, weight, aux = objective(params, now, batch | columns, KEY)
            return total / weight, aux.metrics["temperature"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    return lambda progress: mean(params, jnp.float32(progress))


def test_a_temperature_for_each_example_is_ctkds():
    asked = instances(predictor())
    for progress, share in ((1.0, 1.0), (1 / 3, 0.25), (0.0, 0.0)):
        (value, (warm, weight)), grads = asked(progress)
        by_logits = np.linalg.lstsq(2 * wave(4, 6).T, grads["student"]["kernel"], rcond=None)[0]
        got = [value, warm / weight, *by_logits[0, :3]]
        np.testing.assert_allclose(got, INSTANCES, rtol=1e-3)
        made = {name: np.asarray(leaf).ravel() for name, leaf in grads["predictor"].items()}
        firsts = [made[name][0] for name in ("bias", "out", "theta")]
        got = [made["kernel"][0], made["kernel"] @ np.cos(np.arange(60)), *firsts]
        np.testing.assert_allclose(got, share * np.array(PREDICTOR), rtol=1e-3, atol=1e-7)


def test_a_new_predictor_gives_everyone_the_temperature_of_theta():
    model = with_predictor(PROBE, 6, hidden=3)
    params = model.init(KEY)
    np.testing.assert_array_equal(params["student"]["kernel"], PROBE.init(KEY)["kernel"])
    sizes = {"kernel": (12, 3), "bias": (3,), "out": (3,), "theta": ()}
    assert {k: v.shape for k, v in params["predictor"].items()} == sizes
    (value, (warm, weight)), grads = instances(params["predictor"])(0.999)
    want, by_theta, _ = classes(0.999)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(warm / weight, 1 + 20 / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(grads["predictor"]["theta"], by_theta["theta"], rtol=1e-4)
    same = [g["student"]["kernel"] for g in (grads, by_theta)]
    np.testing.assert_allclose(*same, atol=1e-6)
    assert np.any(grads["predictor"]["out"]) and not np.any(grads["predictor"]["kernel"])


def test_examples_of_weight_0_have_no_part_in_temperatures():
    weight = np.float32([1, 0, 2, 0])
    (_, (warm, total)), _ = instances(predictor(), weight=weight)(0.999)
    want = np.array([17.18583231, 8.08918871, 18.49440512, 13.8756726])  # the released code's
    np.testing.assert_allclose([warm, total], [weight @ want, 3], rtol=1e-4)


def test_the_port_in_taids_repository_does_not_reverse():
    """There theta is handed the plain gradient of a cross-entropy, times a factor that falls from 1
    to 0: the temperature gives way instead of resisting, and mostly to the teacher's entropy."""
    student, teacher = 2 * wave(4, 6), 3 * wave(4, 6, phase=1.0)

    def port(theta):
        warm = 1 + 20 * jax.nn.sigmoid(theta)
        p = jax.nn.softmax(teacher / warm)
        return -(warm**2 * (p * jax.nn.log_softmax(student / warm)).sum(-1)).mean()

    entropy = jax.grad(lambda theta: port(theta) - dense(student, teacher, theta).mean())
    slope, entropy = jax.jit(lambda theta: (jax.grad(port)(theta), entropy(theta)))(1.0)
    for epoch, theirs in SAKANA.items():
        factor = (np.cos(np.pi * epoch / 10) + 1) / 2
        np.testing.assert_allclose(factor * slope, theirs, rtol=1e-4)
    ours = classes(0.999)[1]["theta"]
    assert ours < 0 < min(SAKANA.values())
    assert entropy > 0.99 * slope


def test_the_reversal_grows_along_a_cosine():
    got = [reversal(jnp.float32(p), 0.5) for p in (0.0, 0.125, 0.25, 0.5, 0.9)]
    np.testing.assert_allclose(got, [0.0, -(1 - 0.5**0.5) / 2, -0.5, -1.0, -1.0], atol=1e-6)
    for epoch in range(11):  # the released code: after ``epoch`` of 10, of 240
        theirs = (np.cos(epoch * np.pi / 10) + 1) * 0.5 * (0 - -1) + -1
        np.testing.assert_allclose(reversal(jnp.float32(epoch / 240)), theirs, atol=1e-6)


def test_a_reversal_over_nothing_is_whole_at_once():
    got = [reversal(jnp.float32(p), over) for p in (0.0, 0.5) for over in (0.0, jnp.float32(0))]
    np.testing.assert_array_equal(got, -np.ones(4))


def rows(count=4, width=12):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, V, (count, width)).astype(np.int32)
    mask = (rng.random((count, width)) < 0.5).astype(np.float32)
    mask[:, 5] = 2.0
    return Table({"tokens": tokens, "mask": mask})


def whole(table):
    return jax.tree.map(jnp.asarray, table.batch(np.arange(len(table))))


def setting():
    params = with_temperature(MODEL, theta=0.3).init(KEY)
    return params, state({"teacher": TEACHER.init(jax.random.key(2))}, 0.5)


def test_tokens_as_with_all_logits_at_once(monkeypatch):
    params, now = setting()
    batch = whole(rows())
    weight = jnp.linspace(0.0, 2.0, batch["tokens"].shape[0])

    def plain(params):
        mine = decode(forward(MODEL, params["student"], batch))[:, :-1]
        theirs = decode(forward(TEACHER, now.frozen["teacher"], batch))[:, :-1]
        each = batch["mask"][:, 1:] * weight[:, None]
        return (dense(mine, theirs, params["theta"], 2.0) * each).sum()

    objective = curriculum(MODEL, teacher=TEACHER, span=2.0, over=0.5)
    ours = jax.jit(jax.value_and_grad(lambda p, batch: objective(p, now, batch, KEY)[0]))
    want, grads = jax.jit(jax.value_and_grad(plain))(params)
    grads["theta"] = -grads["theta"]
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * 3 * V * 8)  # eight tokens at once
    got, mine = ours(params, {**whole(with_targets(rows())), "weight": weight})
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), mine, grads)
    assert abs(grads["theta"]) > 1.0


def test_no_gradient_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * 2 * 48 * 8)
    params, now = setting()
    batch, objective = whole(rows()), curriculum(MODEL, teacher=TEACHER)
    made = jax.make_jaxpr(jax.grad(lambda p: objective(p, now, batch, KEY)[0]))(params)
    found = [s for s in shapes(made.jaxpr) if {V, 48} & set(s) and len(s) >= 3]
    tokens = [np.prod(s) // s[-1] for s in found]
    assert tokens and max(tokens) <= 8


def test_the_temperature_climbs_what_the_student_descends():
    model = with_temperature(PROBE)
    tune = Tune(lr=0.1, optimizer="sgd", momentum=0.0, clip=0.0, batch=4, steps=1)
    tx = optimizer(tune, 1, model.axes)
    batch = {"features": 2 * wave(4, 6), "teacher": {"classes": 3 * wave(4, 6, phase=1.0)}}
    params = {"student": {"kernel": jnp.eye(6)}, "theta": jnp.float32(-1.0)}
    objective = curriculum_classes(PROBE, over=1e-3)
    begin = start(params, tx, 10)
    begin = State(begin.step + 1, begin.steps, params, begin.opt)
    after = jax.jit(make_step(objective, tx))(begin, batch, KEY)[0].params

    @jax.jit
    def loss(student, theta):
        logits = forward(PROBE, student, batch).logits
        return dense(logits, batch["teacher"]["classes"], theta).mean()

    before = loss(params["student"], params["theta"])
    assert loss(params["student"], after["theta"]) > before > loss(after["student"], -1.0)


def test_what_is_wrong_is_said():
    params, now = setting()
    other = bigrams(4, V - 1)
    now = state({"teacher": jax.eval_shape(other.init, KEY)}, 0.5)
    with pytest.raises(UserError, match="the student has 40 tokens, the teacher 39"):
        jax.eval_shape(curriculum(MODEL, teacher=other), params, now, whole(rows()), KEY)
    with pytest.raises(UserError, match="pass frozen={'teacher': ...}"):
        jax.eval_shape(
            curriculum(MODEL, teacher=TEACHER), params, state({}, 0.5), whole(rows()), KEY
        )
    params, batch = with_temperature(PROBE).init(KEY), {"features": wave(4, 6)}
    with pytest.raises(UserError, match="pass frozen={'teacher': ...}"):
        asked = curriculum_classes(PROBE, teacher=PROBE)
        jax.eval_shape(asked, params, state({}, 0.5), batch, KEY)
    with pytest.raises(UserError, match="live teacher or the column"):
        jax.eval_shape(curriculum_classes(PROBE), params, state((), 0.5), batch, KEY)
    batch["teacher"] = {"classes": wave(4, 6)}
    with pytest.raises(UserError, match="no 'predictor' .* 'theta'.; with_predictor makes them"):
        jax.eval_shape(curriculum_instances(PROBE), params, state((), 0.5), batch, KEY)
    with pytest.raises(UserError, match="no 'theta' among the parameters .'kernel'."):
        jax.eval_shape(curriculum_classes(PROBE), params["student"], state((), 0.5), batch, KEY)
    params = with_predictor(PROBE, 5).init(KEY)
    with pytest.raises(UserError, match="made for 5 classes, not 6"):
        jax.eval_shape(curriculum_instances(PROBE), params, state((), 0.5), batch, KEY)
