"""TAID's moving target: the released code's rule, once per update, whatever splits the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from w2s_jax.errors import UserError
from w2s_jax.losses import sequence
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.losses.distillation import taid as taid_kl
from w2s_jax.mesh import make_mesh
from w2s_jax.models.heads import linear
from w2s_jax.objectives import distill, taid, taid_classes, taid_memory
from w2s_jax.train.fit import fit, make_step, start
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Model, Output, Table

KEY = jax.random.key(0)
PLACES = np.arange(12).reshape(4, 3)
SHOWN = np.cos(PLACES).astype(np.float32)
SAID = (2 * np.sin(1.7 * PLACES)).astype(np.float32)
TABLE = Table({"features": SHOWN, "teacher": {"classes": SAID}})
HEAD = linear(3, 3)
RULE = {"start": 0.2, "alpha": 0.3, "beta": 0.5}
TUNE = Tune(lr=1.0, batch=4, steps=8, optimizer="sgd", momentum=0.0, clip=0.0)

# What the released code's TAID (src/distil_losses/taid.py, run under torch) goes through in 8 steps
# of gradient descent with rate 1 on the logits W x of the four examples above, from W = 0.
T = [0.2, 0.2, 0.3200413, 0.4221249, 0.5089604, 0.6, 0.7, 0.8]
MOMENTUM = [0.0, 0.0, 0.0006881, 0.0017612, 0.0035578, 0.0053402, 0.0067645, 0.0078544]
LOSS = [1.0986123, 1.0971005, 1.0939909, 1.0881332, 1.0803829, 1.0715359, 1.0619518, 1.0523177]
WEIGHTS = [
    *(-0.1983598, 0.197411, 0.0009488, -0.2215144, 0.0994056, 0.1221089),
    *(-0.0410097, -0.0899929, 0.1310026),
]
LINE = [0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # without the adaptive rule
# its t where the loss is also computed on validation data after each step, or on two micro-batches
T_VALIDATED = [0.2, 0.32, 0.508788, 0.6452864, 0.7439547, 0.8151923, 0.8665903, 0.9036745]
T_MICRO = [0.2, 0.32, 0.5087709, 0.6452612, 0.7438864, 0.815075, 0.8664367, 0.9035006]


def course(objective, micro=1, steps=8, table=TABLE, model=HEAD, lr=1.0):
    """The states after each of ``steps`` updates on the whole table, and their metrics."""
    tx = optax.sgd(lr)
    params = model.init(KEY)
    state = start(params, tx, steps, memory=taid_memory())
    step = jax.jit(make_step(objective, tx, micro=micro))
    batch, seen = jax.tree.map(jnp.asarray, table.batch(np.arange(len(table)))), []
    for _ in range(steps):
        state, metrics = step(state, batch, KEY)
        seen.append((state, metrics))
    assert step._cache_size() == 1  # t is traced
    return seen


def told(seen, name):
    return [float(metrics[name]) for _, metrics in seen]


@pytest.fixture(scope="module")
def plain():
    return course(taid_classes(HEAD, **RULE))


def test_the_course_is_that_of_the_released_code(plain):
    np.testing.assert_allclose(told(plain, "t"), T, rtol=1e-5)
    np.testing.assert_allclose(told(plain, "loss"), LOSS, rtol=1e-6)
    momentum = [float(state.memory["momentum"]) for state, _ in plain]
    np.testing.assert_allclose(momentum, MOMENTUM, atol=1e-6)
    np.testing.assert_allclose(plain[-1][0].params["kernel"].ravel(), WEIGHTS, atol=2e-6)


def test_micro_batches_do_not_move_it(plain):
    """The released code's schedule moves in each micro-batch, ours once per update."""
    split = course(taid_classes(HEAD, **RULE), micro=2)
    np.testing.assert_allclose(told(split, "t"), told(plain, "t"), rtol=1e-5)
    np.testing.assert_allclose(
        split[-1][0].params["kernel"], plain[-1][0].params["kernel"], atol=1e-6
    )
    for theirs in (T_MICRO, T_VALIDATED):
        assert np.all(np.array(theirs[1:]) > np.array(told(plain, "t")[1:]) + 0.1)


def test_without_the_adaptive_rule_it_is_the_line():
    seen = course(taid_classes(HEAD, **RULE, adaptive=False))
    np.testing.assert_allclose(told(seen, "t"), LINE, rtol=1e-6)


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_t_rises_above_the_line_to_its_end(end):
    seen = course(taid_classes(HEAD, start=0.1, end=end, alpha=0.6), steps=30)
    t = np.array(told(seen, "t"))
    line = 0.1 + (end - 0.1) * np.maximum(np.arange(30) - 1, 0) / 30
    assert np.all(np.diff(t) >= 0) and np.all(t >= line - 1e-6) and np.all(t <= end)
    assert t[-1] == pytest.approx(end, abs=1e-3)


def test_the_divergence_changes_the_course_not_the_gradient(plain):
    other = course(taid_classes(HEAD, divergence=taid_kl, **RULE))
    first = (plain[0][0].params["kernel"], other[0][0].params["kernel"])
    np.testing.assert_allclose(*first, atol=1e-6)
    assert told(other, "loss")[0] < told(plain, "loss")[0] - 0.5  # the target's entropy
    assert told(other, "t")[3] != pytest.approx(told(plain, "t")[3], abs=1e-3)


def test_examples_of_no_weight_are_no_progress():
    """An update that has no loss leaves the last one to be compared with; the line goes on."""
    empty = TABLE.with_columns(weight=np.zeros(4, np.float32))
    seen = course(taid_classes(HEAD, **RULE), table=empty)
    assert np.isinf(float(seen[-1][0].memory["previous"]))
    np.testing.assert_allclose(told(seen, "loss"), 0.0)


@pytest.mark.slow
def test_a_population_goes_the_same_way_as_fit_wherever_it_stops(plain, tmp_path):
    objective = taid_classes(HEAD, **RULE)
    params, table = HEAD.init(KEY), Table({k: TABLE[k] for k in TABLE.columns})
    done = population(objective, params, table, TUNE, [0], memory=taid_memory(), keep_state=True)
    np.testing.assert_allclose(done.metrics["t"][0], T, rtol=1e-5)

    def stop(state):
        if int(state.step) == 5:
            raise RuntimeError("killed")
        return {}

    run = partial(fit, objective, params, table, TUNE, KEY, memory=taid_memory(), progress=False)
    with pytest.raises(RuntimeError, match="killed"):
        run(workdir=tmp_path, save_every=3, evaluate=stop, eval_every=1)
    resumed = run(workdir=tmp_path, save_every=3)
    spread = run(mesh=make_mesh("data=4", jax.devices()[:4]))  # one example on each
    for state in (resumed, spread):
        for name, value in state.memory.items():
            np.testing.assert_allclose(value, done.states.memory[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(state.params["kernel"].ravel(), WEIGHTS, atol=2e-6)


# Tokens

V = 40


def bigrams(width):
    """The smallest model of tokens: the next one by the last alone."""

    def init(key):
        into, out = (jax.random.normal(k, (V, width)) for k in jax.random.split(key))
        return {"in": into, "out": out.T}

    def apply(params, shown, **columns):
        return Output(hidden=params["in"][shown], unembed=params["out"])

    return Model(init, apply, {"in": None, "out": None}, width)


STUDENT, TEACHER = bigrams(8), bigrams(16)


def tokens():
    """Four rows of 12 tokens, two of them padded."""
    rng = np.random.default_rng(0)
    mask = np.ones((4, 12), np.float32)
    mask[:, 0], mask[2:, 7:] = 0, 0
    shown = rng.integers(1, V, (4, 12)).astype(np.int32)
    return {"tokens": jnp.asarray(shown), "mask": jnp.asarray(mask)}


def graded(objective):
    """A function of (student's weights, whatever makes the objective) to the gradient."""
    frozen = {"teacher": TEACHER.init(jax.random.key(1))}
    params = STUDENT.init(KEY)

    def total(params, *numbers):
        state = start(params, optax.sgd(1.0), 10, frozen=frozen, memory=taid_memory())
        return objective(*numbers)(params, state, tokens(), KEY)[0]

    return jax.grad(total), params


def test_the_ends_are_no_gradient_and_that_of_the_forward_divergence():
    grad, params = graded(lambda where: taid(STUDENT, teacher=TEACHER, start=where))
    grad = jax.jit(grad)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad(params, 0.0))) < 1e-6
    plain = jax.jit(graded(lambda: distill(STUDENT, forward_kl, teacher=TEACHER))[0])(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grad(params, 1.0), plain)


def test_no_gradient_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * 2 * V * 4)  # four tokens of each model at once

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.shape for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    grad, params = graded(lambda: taid(STUDENT, teacher=TEACHER))
    found = [s for s in shapes(jax.make_jaxpr(grad)(params).jaxpr) if V in s]
    logits = [np.prod(s) // V for s in found if len(s) == 3]
    assert logits and max(logits) <= 4
    assert max(np.prod(s) for s in found) <= 16 * V  # or the teacher's matrix [D, V]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"start": -0.1}, "between 0 and 1"),
        ({"alpha": 2.0}, "between 0 and 1"),
        ({"start": 0.8, "end": 0.5}, "above end"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, words):
    with pytest.raises(UserError, match=words):
        taid(STUDENT, **numbers)


def test_a_state_without_the_schedule_is_refused():
    with pytest.raises(UserError, match=r"memory=taid_memory\(\)"):
        fit(taid_classes(HEAD), HEAD.init(KEY), TABLE, TUNE, KEY, progress=False)
