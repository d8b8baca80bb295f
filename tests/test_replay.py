"""DistiLLM's schedule of own answers: the threshold, the coin, what is kept, and a run of it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inside_world import asked

from w2s_jax.errors import UserError
from w2s_jax.losses.distillation import skew_kl
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.objectives import distill
from w2s_jax.pipelines.replay import Threshold, keep, replayed, source
from w2s_jax.train.optim import Tune
from w2s_jax.types import Table, forward

CONFIG = Config(vocab=12, width=16, layers=1, heads=2, max_length=32)
MODEL = transformer(CONFIG)
TEACHER = transformer(dataclasses.replace(CONFIG, width=24))
KEY = jax.random.key(3)


def test_the_threshold_rises_only_with_the_loss() -> None:
    """By hand: 2.09 is below 2 + .1, 2.1 is not; then the loss must rise above 2.2."""
    threshold = Threshold(0.85, 2.0)
    for loss, share in ((2.09, 0.85), (1.0, 0.85), (2.1, 0.95), (2.15, 0.95), (2.3, 1.0), (9, 1.0)):
        threshold = threshold.after(loss)
        assert threshold.share == pytest.approx(share)
    assert threshold.loss == 9


@pytest.mark.parametrize(
    ("coin", "progress", "full", "where"),
    [
        (0.0, 0.0, True, "asked"),
        (0.59, 0.0, True, "asked"),
        (0.6, 0.0, True, "given"),
        (0.29, 0.5, True, "asked"),
        (0.31, 0.5, True, "kept"),
        (0.31, 0.5, False, "asked"),
        (0.61, 0.5, False, "given"),
    ],
)
def test_where_rows_come_from(coin, progress, full, where) -> None:
    assert source(coin, 0.6, progress, full) == where


def test_nothing_is_asked_at_threshold_0() -> None:
    assert {source(c, 0.0, p, False) for c in (0.0, 0.5) for p in (0.0, 0.9)} == {"given"}


def test_the_newest_answers_are_kept() -> None:
    def said(*ids):
        return Table({"tokens": np.array(ids)[:, None], "targets": {"ids": np.array(ids)[:, None]}})

    kept = keep(None, said(1, 2, 3), 4)
    kept = keep(kept, said(4, 5, 6), 4)
    assert kept["tokens"].ravel().tolist() == kept["targets"]["ids"].ravel().tolist()
    assert kept["tokens"].ravel().tolist() == [3, 4, 5, 6]


def rows():
    tokens = np.random.default_rng(0).integers(1, 12, (32, 8)).astype(np.int32)
    prompts = asked([row[:3].tolist() for row in tokens], 3)
    return Table({"tokens": tokens, "mask": np.ones((32, 8), np.float32), "asked": prompts})


@pytest.mark.slow
def test_a_run_asks_keeps_and_learns() -> None:
    table = rows()
    student, teacher = (
        jax.tree.map(lambda leaf: 2.0 * leaf, model.init(jax.random.key(i)))
        for i, model in enumerate((MODEL, TEACHER))
    )
    objective = distill(MODEL, partial(skew_kl, alpha=0.1), teacher=TEACHER)
    run = partial(
        replayed, objective, MODEL, student, table, tune=Tune(lr=1e-2, batch=8, steps=48), key=KEY,
        every=4, tokens=5, eos=0, capacity=24, frozen={"teacher": teacher},
    )  # fmt: skip
    losses = iter(np.arange(100.0))
    rising = run(validate=lambda params: next(losses))
    shares = [row["threshold"] for row in rising.history]
    np.testing.assert_allclose(shares, np.minimum(np.arange(13) / 10, 1))
    end = rising.history[-1]
    assert end["step"] == 48 == end["asked"] + end["kept"] + end["given"]
    assert min(end[name] for name in ("asked", "kept", "given")) >= 4
    assert end["asked"] >= 3, "24 answers are kept before any is used again"

    @jax.jit
    def far(params):
        pairs = ((MODEL, params), (TEACHER, teacher))
        said = [forward(model, weights, table.batch(range(32))) for model, weights in pairs]
        return skew_kl(*(one.hidden @ one.unembed for one in said)).mean()

    assert far(rising.params) < 0.7 * far(student)
    again = run(validate=lambda params: 1.0, tune=Tune(lr=1e-2, batch=8, steps=6)).history
    assert [row["step"] for row in again] == [0, 4, 6] and again[-1]["given"] == 6


@pytest.mark.parametrize(
    ("table", "how", "words"),
    [
        (Table({"tokens": np.ones((4, 3), np.int32)}), {}, "'asked'.*has \\['tokens'\\]"),
        (None, {"capacity": 7}, "capacity \\(7\\) must be at least the batch of 8"),
        (None, {"every": 0}, "every \\(0\\) at least 1"),
        (None, {"validate": lambda params: jnp.nan}, "update 0 the validation loss is nan"),
    ],
)
def test_what_cannot_be_done_is_one_line(table, how, words) -> None:
    given = {"validate": lambda params: 1.0, "every": 4, "tokens": 5} | how
    with pytest.raises(UserError, match=words) as fault:
        replayed(
            distill(MODEL, skew_kl, teacher=TEACHER), MODEL, {}, table or rows(),
            Tune(batch=8), KEY, **given,
        )  # fmt: skip
    assert "\n" not in str(fault.value)
