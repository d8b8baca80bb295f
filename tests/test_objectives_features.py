"""Matching terms beside any objective: the sum, one forward pass each, projections, memories."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_world import V, bigrams, shapes, tower, wave

from w2s_jax.errors import UserError
from w2s_jax.losses import features as f
from w2s_jax.losses import sequence
from w2s_jax.losses.classification import ramp, soft_xent
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.mesh import is_axes
from w2s_jax.models.lora import lora
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import (
    Term,
    augmented,
    classify,
    distill,
    distill_classes,
    language,
    match,
    match_memory,
    mutual,
    on_base,
    remembered,
    taid_classes,
    taid_memory,
    weighted,
    with_projections,
)
from w2s_jax.objectives.features import embeddings, linear, regressor
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import State, Table, forward

KEY = jax.random.key(0)
STUDENT, TEACHER = tower(4), tower(6)
THEIRS = TEACHER.init(jax.random.key(1))


def state(memory=(), frozen=THEIRS, progress=0.5):
    now = jnp.int32(100 * progress), jnp.int32(100)
    return State(*now, (), (), {"teacher": frozen}, memory)


def pictures(count=6):
    label = np.eye(3, dtype=np.float32)[np.arange(count) % 3]
    weight = np.float32([1, 2, 0, 1, 1, 3])[:count]
    return Table({"image": wave(count, 4, 4, 2), "label": label, "weight": weight})


def whole(table):
    return jax.tree.map(jnp.asarray, table.batch(np.arange(len(table))))


def taught(student, teacher):
    return distill_classes(student, forward_kl, teacher=teacher)


TERMS = (
    Term(f.hint, 0, 0, 2.0, linear()),
    Term(f.relational_distance, weight=ramp(0.0, 8.0, over=1.0)),
    Term(f.variational, 0, 0, 1.0, regressor()),
    Term(f.contrastive, weight=0.5, head=embeddings(5)),
    Term(f.alignment, 0, 1, 3.0, pool=True),
)


def test_the_sum_by_plain_arithmetic():
    table, model = pictures(), with_projections(STUDENT, TEACHER, TERMS, pictures())
    params, batch = model.init(KEY), whole(pictures())
    objective = match(STUDENT, TEACHER, TERMS, taught)
    total, weight, aux = jax.jit(objective)(params, state(), batch, KEY)
    plain = jax.jit(taught(STUDENT, TEACHER))(params["student"], state(), batch, KEY)
    weights = table["weight"]

    @jax.jit
    def by_hand(params):
        mine, theirs = forward(STUDENT, params["student"], batch), forward(TEACHER, THEIRS, batch)
        heads, taps = params["projections"], (mine.taps[1], theirs.taps[1])
        bias = heads["0"]["bias"].reshape(1, 1, 1, -1)
        mapped = mine.taps[0] @ heads["0"]["kernel"] + bias
        sides = zip(taps, ("student", "teacher"), strict=True)
        values = [
            f.hint(mapped, theirs.taps[0]),
            f.relational_distance(*taps),
            f.variational(*regressor().apply(heads["2"], mine.taps[0], theirs.taps[0])),
            f.contrastive(*(tap @ heads["3"][side]["kernel"] for tap, side in sides)),
        ]
        means = [(weights * v).sum() / weights.sum() for v in values]
        return jnp.array([*means, f.alignment(mine.taps[0].mean((1, 2)), taps[1])])

    means = by_hand(params)
    want = plain[0] / weight + np.dot([2.0, 4.0, 1.0, 0.5, 3.0], means)
    assert weight == plain[1] == weights.sum()
    np.testing.assert_allclose(total / weight, want, rtol=1e-5)
    seen = {name: s / w for name, (s, w) in aux.metrics.items()}
    assert seen["agreement"] == plain[2].metrics["agreement"][0] / weight
    np.testing.assert_allclose([seen[f"match_{i}"] for i in range(5)], means, rtol=1e-5)


def rows(width, padding=0):
    """Four texts of ``width`` tokens and as much padding, with tokens of its own."""
    rng = np.random.default_rng(0)
    tokens = np.full((4, width + padding), 7, np.int32)
    tokens[:, :width] = rng.integers(1, V, (4, width))
    real = (np.arange(width + padding) < width)[None].repeat(4, 0)
    return Table({"tokens": tokens, "mask": np.float32(real), "segment": np.int32(real)})


def test_padding_is_not_matched():
    """google/tunix's strategies take the mean over all positions, padding too (feature_projection
    and feature_pooling.py: ``jnp.mean`` of the whole array): their loss moves with the padding."""
    student, teacher = bigrams(4), bigrams(4, 48)
    terms = (Term(f.hint), Term(f.cosine), Term(f.similarity, pool=True))
    params = {"student": student.init(KEY), "projections": {}}
    now = state(frozen=teacher.init(jax.random.key(1)))

    def main(student, teacher):
        return distill(student, forward_kl, teacher=teacher)

    def said(batch):
        total, weight, aux = match(student, teacher, terms, main)(params, now, batch, KEY)
        taps = [
            forward(m, p, batch).taps[0]
            for m, p in ((student, params["student"]), (teacher, now.frozen["teacher"]))
        ]
        tunix = jnp.mean(jnp.square(taps[0] - taps[1]))
        seen = [aux.metrics[f"match_{i}"] for i in range(3)]
        return total / weight, [s / w for s, w in seen], tunix

    asked = jax.jit(said)
    short, padded = (asked(whole(rows(6, padding=n))) for n in (0, 6))
    np.testing.assert_allclose(padded[0], short[0], rtol=1e-5)
    np.testing.assert_allclose(padded[1], short[1], rtol=1e-5)
    np.testing.assert_allclose(short[1][0], short[2], rtol=1e-5)
    assert abs(padded[2] - short[2]) > 0.01


def counted(model, calls):
    def apply(params, x, **columns):
        calls.append(x.shape)
        return model.apply(params, x, **columns)

    return type(model)(model.init, apply, model.axes, model.config, model.reads)


def test_each_model_runs_once_and_no_gradient_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * V * 16)  # of 28 tokens
    mine, theirs = [], []
    student, teacher = counted(bigrams(4), mine), counted(bigrams(6, 48), theirs)
    terms = (Term(f.hint, head=linear()), Term(f.similarity, pool=True))
    model = with_projections(bigrams(4), bigrams(6, 48), terms, rows(8))

    def main(student, teacher):
        both = language(student), distill(student, forward_kl, teacher=teacher)
        return weighted(both, [1.0, 0.5])

    objective, batch = match(student, teacher, terms, main), whole(rows(8))
    now = state(frozen=teacher.init(KEY))
    params = model.init(KEY)
    made = jax.make_jaxpr(jax.grad(lambda p: objective(p, now, batch, KEY)[0]))(params)
    assert mine == theirs == [(4, 8)]
    found = [s for s in shapes(made.jaxpr) if {V, 48} & set(s[-1:]) and len(s) == 3]
    assert found and max(np.prod(s[:2]) for s in found) <= 16


def test_terms_of_weight_0_change_nothing_and_a_population_weighs_them():
    """Runs of one program with their own weights; the run without is the main objective in fit."""
    terms, table = (Term(f.hint, 0, 0, 1.0, linear()),), pictures()
    model = with_projections(STUDENT, TEACHER, terms, table)

    def objective(row):
        weighed = (Term(f.hint, 0, 0, row["beta"], linear()),)
        return match(STUDENT, TEACHER, weighed, taught)

    tune = Tune(batch=3, steps=8, lr=0.03)
    frozen, hyper = {"teacher": THEIRS}, {"beta": [0.0, 20.0]}
    runs = population(
        objective, model.init, table, tune, [0, 0], hyper=hyper, frozen=frozen, axes=model.axes
    )
    first, last = runs.metrics["match_0"][:, 0], runs.metrics["match_0"][:, -2:].mean(1)
    assert first[0] == first[1] and last[1] < 0.7 * last[0]
    key, alone = jax.random.key(0), taught(STUDENT, TEACHER)
    plain = fit(alone, STUDENT.init(key), table, tune, key, frozen=frozen, progress=False)
    got = runs.run(0)[0]["student"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, plain.params)


def test_a_model_with_projections_is_the_student():
    model = with_projections(STUDENT, TEACHER, TERMS, pictures())
    params = model.init(KEY)
    for name, leaf in STUDENT.init(KEY).items():
        np.testing.assert_array_equal(params["student"][name], leaf)
    assert sorted(params["projections"]) == ["0", "2", "3"]
    assert params["projections"]["0"]["kernel"].shape == (4, 6)
    axes = jax.tree.map(lambda names: 0, model.axes, is_leaf=is_axes)
    assert jax.tree.structure(axes) == jax.tree.structure(params)
    batch = whole(pictures())
    got, want = forward(model, params, batch), forward(STUDENT, params["student"], batch)
    np.testing.assert_array_equal(got.logits, want.logits)


# HobbitLong/RepDistiller's CRD in double precision, two steps on one batch: value, the first three
# numbers of the gradient by the student's features and by the teacher's embedding, and what the
# memories have for the first example afterwards
CRD = [
    (18.1309078602, -0.3386174094, 0.2568752856, 0.6113410064),
    (25.4253390524, -2.0292342951, 1.2901493997, 2.6550835821),
]
CRD_TEACHER = [
    (-1.4891991724, 1.4797897222, 0.3436128030),
    (-2.5955575103, 1.8627815718, -0.1222952305),
]
CRD_MEMORY = [
    (0.8040989987, -0.2241573296, -0.5506162838),
    (-0.2239585379, -0.7795909679, 0.5848764793),
]


def test_crd_with_its_memory_is_repdistillers(monkeypatch):
    drawn = jnp.array([[1, 3, 2, 6, 0], [0, 4, 4, 1, 5], [6, 3, 2, 1, 0]])
    monkeypatch.setattr(jax.random, "randint", lambda *_: drawn)
    term = remembered(7, negatives=5, width=3)
    maps = {"student": wave(4, 3, phase=2.0), "teacher": wave(6, 3, phase=3.0)}
    params = {name: {"kernel": jnp.asarray(m), "bias": jnp.zeros(3)} for name, m in maps.items()}
    banks = jnp.stack([wave(7, 3, phase=5.0), wave(7, 3, phase=6.0)]) / 2
    memory = term.memory(KEY) | {"banks": banks}
    batch = {"group": jnp.array([2, 0, 5])}

    @jax.jit
    def step(student, params, memory):
        def mean(student, params):
            parts = term.head.apply(params, student, wave(3, 6, phase=1.0))
            values, new = term.loss(*parts, memory=memory, batch=batch, key=KEY)
            return values.mean(), new

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(student, params)

    for want, by_teacher in zip(CRD, CRD_TEACHER, strict=True):
        (value, memory), (by_student, grads) = step(wave(3, 4), params, memory)
        np.testing.assert_allclose([value, *by_student.ravel()[:3]], want, rtol=1e-3)
        np.testing.assert_allclose(grads["teacher"]["kernel"].ravel()[:3], by_teacher, rtol=1e-3)
    np.testing.assert_allclose(memory["banks"][:, 2], CRD_MEMORY, rtol=1e-4)
    np.testing.assert_allclose(np.exp(memory["normaliser"]), [614.7935, 10811.31], rtol=1e-3)


def test_memories_are_kept_apart():
    terms = (Term(f.hint, 0, 0, 1.0, linear()), remembered(6, negatives=4, width=3))
    table = pictures().with_columns(group=np.arange(6))
    model = with_projections(STUDENT, TEACHER, terms, table)
    memory = match_memory(terms, KEY, main=taid_memory())
    objective = match(STUDENT, TEACHER, terms, lambda s, t: taid_classes(s, teacher=t))
    params, now = jax.eval_shape(model.init, KEY), state(memory)
    after = jax.eval_shape(objective, params, now, whole(table), KEY)[2].memory
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    assert match_memory(terms[:1], KEY, main=1.0) == 1.0


def test_mutual_learning_by_plain_arithmetic():
    batch, params = whole(pictures()), {"first": STUDENT.init(KEY), "second": THEIRS}

    def apart(own, other):  # moves both, unless one is held
        return jnp.square(own - other).sum(-1)

    def plain(params):
        one = forward(STUDENT, params["first"], batch).logits
        two = forward(TEACHER, params["second"], batch).logits
        fixed = jax.lax.stop_gradient((one, two))
        values = soft_xent(one, batch["label"]) + soft_xent(two, batch["label"])
        values += 0.5 * apart(one, fixed[1]) + 0.5 * apart(two, fixed[0])
        return (values * batch["weight"]).sum()

    objective = mutual(STUDENT, TEACHER, soft_xent, apart, weight=0.5)
    ours = jax.jit(jax.value_and_grad(lambda p: objective(p, state(), batch, KEY)[0]))
    got, want = ours(params), jax.jit(jax.value_and_grad(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def check(terms, message, *, main=taught, student=STUDENT, teacher=TEACHER, table=None, **columns):
    table = (table or pictures()).with_columns(**columns)
    params = {"student": student.init(KEY), "projections": {}}
    objective = match(student, teacher, terms, main)
    with pytest.raises(UserError, match=message) as error:
        jax.eval_shape(objective, params, state(frozen=teacher.init(KEY)), whole(table), KEY)
    assert "\n" not in str(error.value)


def test_what_is_wrong_is_said_in_a_line():
    silent = type(STUDENT)(
        STUDENT.init,
        lambda p, x: type(STUDENT.apply(p, x))(logits=STUDENT.apply(p, x).logits),
        STUDENT.axes,
        (),
        STUDENT.reads,
    )
    check([Term(f.hint)], "the student has no taps", student=silent)
    check([Term(f.hint)], "the teacher has no taps", teacher=silent)
    check([Term(f.hint, 2)], "asks for tap 2 of the student, which has 2: 0 to 1")
    check([Term(f.hint, 0, -3)], "asks for tap -3 of the teacher")
    check([Term(f.hint)], r"term 0 \(student tap -1, teacher tap -1\): hint needs.*\(6, 4\)")
    check([Term(f.similarity, pool=True), Term(f.hint, 0, 1)], "term 1 .*hint needs features alike")
    check([remembered(6)], "pass memory=match_memory")
    changed = partial(augmented, augment=lambda key, image: image[:, ::-1])
    check([], "something else than the batch", main=lambda s, t: changed(classify(s, soft_xent)))
    objective, batch = (
        match(STUDENT, TEACHER, [Term(f.hint, 0, 0, head=linear())], taught),
        whole(pictures()),
    )
    plain = STUDENT.init(KEY)
    for params, now, words in (
        (plain, state(), r"no 'student' .*\['head', 'kernel'\]; with_projections makes them"),
        ({"student": plain, "projections": {}}, state(), r"term 0 .*no '0' among"),
        ({"student": plain, "projections": {}}, replace(state(), frozen=()), "frozen={'teacher'"),
    ):
        with pytest.raises(UserError, match=words):
            jax.eval_shape(objective, params, now, batch, KEY)
    with pytest.raises(UserError, match="which has 2"):
        with_projections(STUDENT, TEACHER, [Term(f.hint, 5, head=linear())], pictures())
    with pytest.raises(UserError, match="column 'group'"):
        remembered(6).loss(*jnp.zeros((2, 3, 128)), memory={}, batch={}, key=KEY)
    with pytest.raises(UserError, match="at least one example"):
        remembered(0)


BASE = transformer(Config(vocab=V, width=8, layers=1, heads=2, ffn=8, max_length=16, taps=(0,)))
ADAPTED = lora(BASE, 2, targets=("q", "down"))


def spoken(student, teacher):
    return distill(student, forward_kl, teacher=teacher)


@pytest.mark.slow
def test_matching_trains_adapters_and_projections_over_a_frozen_base():
    terms, teacher = (Term(f.hint, weight=3.0, head=linear()),), bigrams(6)
    model = with_projections(ADAPTED, teacher, terms, rows(6))
    params = model.init(KEY)
    shaken = {"down": {"a": 0.1, "b": 0.1}, "q": {"a": 0.1, "b": 0.0}}
    lora_part = jax.tree.map(jnp.add, params["student"]["lora"], shaken)
    params["student"] = {"base": params["student"]["base"], "lora": lora_part}
    trained = {**params, "student": lora_part}  # what ``fit`` is given
    frozen = {"teacher": teacher.init(jax.random.key(1)), "base": params["student"]["base"]}
    objective, batch = match(ADAPTED, teacher, terms, spoken), whole(rows(6))
    now = State(jnp.int32(0), jnp.int32(9), (), (), frozen)
    both = [
        jax.jit(jax.value_and_grad(lambda p, fn=fn: fn(p, now, batch, KEY)[0]))
        for fn in (on_base(objective), objective)
    ]
    (got, grads), (want, everything) = both[0](trained), both[1](params)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    want = {**everything, "student": everything["student"]["lora"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want)
    assert all(
        abs(leaf).max() > 1e-4
        for leaf in (grads["student"]["q"]["b"], grads["projections"]["0"]["kernel"])
    )
    axes = jax.tree.map(
        lambda _: 0, {**model.axes, "student": model.axes["student"]["lora"]}, is_leaf=is_axes
    )
    assert jax.tree.structure(axes) == jax.tree.structure(trained)


def test_adapters_that_are_none_are_refused_in_a_line():
    params, batch = ADAPTED.init(KEY), whole(rows(6))
    now = State(jnp.int32(0), jnp.int32(9), (), (), {"base": params["base"]})
    objective = on_base(language(ADAPTED))
    with pytest.raises(UserError, match=r"adapters alone .*got \['base', 'lora'\]"):
        jax.eval_shape(objective, params, now, batch, KEY)
    with pytest.raises(UserError, match="frozen={'base': ...}"):
        jax.eval_shape(objective, params["lora"], replace(now, frozen=()), batch, KEY)
