"""Orders of stages of distillation: a teacher's texts, generations of one architecture."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.losses.classification import soft_xent
from w2s_jax.losses.distillation import forward_kl
from w2s_jax.models.heads import linear
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import classify, distill, distill_classes, language
from w2s_jax.pipelines.distillation import (
    Teacher,
    afresh,
    ensemble,
    generations,
    sequence_level,
    written,
)
from w2s_jax.record import Context
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import State, Table, forward

KEY = jax.random.key(3)
WIDTH, CLASSES = 5, 3
PROBE = linear(CLASSES, WIDTH)


def examples(rows=48) -> Table:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    label = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, rows)]
    return Table({"features": features, "label": label})


def test_each_generation_learns_from_the_one_before() -> None:
    """Of a convex problem that is trained to its end every generation is the first."""
    table, tune = examples(), Tune(lr=0.1, batch=48, steps=150)
    again = distill_classes(PROBE, forward_kl, teacher=PROBE)
    train = afresh(classify(PROBE, soft_xent), again, PROBE.init, table, tune, KEY)
    lineage = generations(train, count=3)
    say = lambda params: forward(PROBE, params, table.batch(range(48))).logits  # noqa: E731
    first, second, third = (jax.nn.softmax(say(params)) for params in lineage)
    np.testing.assert_allclose(second, first, atol=0.02)
    np.testing.assert_allclose(third, first, atol=0.03)
    label = np.asarray(table["label"])
    assert np.abs(first - label).mean() > 0.2, "the labels are noise, which they do not follow"
    begun = PROBE.init(jax.random.split(jax.random.fold_in(KEY, 1))[0])
    assert not np.allclose(begun["kernel"], lineage[0]["kernel"], atol=0.05), "it starts afresh"
    # a teacher that is there already is generation 0
    (same, grown) = generations(train, count=2, first=lineage[0])
    assert same is lineage[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grown, lineage[1])
    with pytest.raises(UserError, match="count must be at least 1, got 0"):
        generations(train, count=0)


def test_a_generation_may_be_of_any_kind() -> None:
    """The oldest has no parent, the others are told their number and what came before them."""
    seen = []

    def train(number: int, last: str | None) -> str:
        seen.append((number, last))
        return f"{last or 'ann'} {number}"

    assert generations(train, count=3) == ["ann 0", "ann 0 1", "ann 0 1 2"]
    assert seen == [(0, None), (1, "ann 0"), (2, "ann 0 1")]
    assert generations(train, count=2, first="eve") == ["eve", "eve 1"]


def test_an_ensemble_averages_probabilities() -> None:
    logits = np.log(np.array([[[3.0, 1.0]], [[1.0, 4.0]]]))
    np.testing.assert_allclose(np.exp(ensemble(logits)), [[19 / 40, 21 / 40]], rtol=1e-6)


# --- a teacher's texts ----------------------------------------------------------------------------

CONFIG = Config(vocab=1, width=32, layers=1, heads=2, max_length=48)


@pytest.fixture(scope="module")
def world():
    tokenizer = arithmetic.tokenizer()
    model = transformer(dataclasses.replace(CONFIG, vocab=tokenizer.size))
    params = jax.tree.map(lambda leaf: 2.0 * leaf, model.init(KEY))
    texts = [f"{i} + {i + 3} =" for i in range(8)]
    return Teacher(model, params, tokenizer), Table({"prompt": np.array(texts, object)})


@pytest.mark.slow
def test_the_teacher_writes_once(world, tmp_path) -> None:
    teacher, prompts = world
    ctx = Context(tmp_path, quiet=True)
    ask = partial(written, ctx, teacher, prompts, KEY, tokens=6, temperature=0.0)
    rows = ask()
    texts = prompts["prompt"].tolist()
    said = complete(teacher.model, teacher.params, teacher.tokenizer, texts, KEY, tokens=6)
    for i, text in enumerate(said):
        targets = jax.tree.map(lambda leaf, i=i: leaf[i], rows["targets"])
        ids = targets["ids"][targets["mask"] > 0]
        assert teacher.tokenizer.decode(ids[ids != teacher.tokenizer.eos].tolist()) == text
    (kept,) = tmp_path.glob("written-*")
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert ask().digest() == rows.digest()
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    written(ctx, teacher, prompts, KEY, tokens=5, temperature=0.0)
    assert len(list(tmp_path.glob("written-*"))) == 2, "another length is another stage"


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_writes(world, tmp_path) -> None:
    teacher, prompts = world
    student = transformer(dataclasses.replace(teacher.model.config, width=16))
    ctx, tune = Context(tmp_path, quiet=True), Tune(lr=0.02, batch=8, steps=120)
    begun = student.init(jax.random.key(1))
    how = dict(tokens=6, temperature=0.0)
    params, rows = sequence_level(ctx, student, begun, teacher, prompts, tune, KEY, **how)

    def loss(params):
        held = State(jnp.int32(0), jnp.int32(1), (), (), (), ())
        total, weight, _ = language(student)(params, held, rows.batch(range(8)), KEY)
        return float(total / weight)

    assert loss(params) < 0.2 < 1 < loss(begun)
    texts = prompts["prompt"].tolist()
    mine = complete(student, params, teacher.tokenizer, texts, KEY, tokens=6)
    theirs = complete(teacher.model, teacher.params, teacher.tokenizer, texts, KEY, tokens=6)
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) >= 6
    # on the same text, from the teacher's distributions
    word = distill(student, forward_kl, teacher=teacher.model)
    told = {"frozen": {"teacher": teacher.params}}
    given = (ctx, student, begun, teacher, prompts, tune, KEY)
    other, again = sequence_level(*given, objective=word, settings=told, **how)
    assert again.digest() == rows.digest() and loss(other) < 1
    narrow = transformer(dataclasses.replace(CONFIG, vocab=5))
    with pytest.raises(UserError, match="the student 5; their tokenizers must be one"):
        sequence_level(ctx, narrow, {}, *given[3:], **how)


@pytest.mark.slow
def test_generations_of_a_decoder(world, tmp_path) -> None:
    teacher, prompts = world
    rows = written(Context(tmp_path, quiet=True), teacher, prompts, KEY, tokens=6, temperature=0.0)
    model, tune = teacher.model, Tune(lr=0.01, batch=8, steps=40)
    again = distill(model, forward_kl, teacher=model)
    train = afresh(language(model), again, model.init, rows, tune, KEY)
    first, second = generations(train, count=2)
    starting, training = jax.random.split(jax.random.fold_in(KEY, 1))
    held = {"teacher": first}
    want = fit(
        again, model.init(starting), rows, tune, training, frozen=held, progress=False
    ).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), second, want)
