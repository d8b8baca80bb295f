"""LELP: the pieces by hand, its limits, what chooses on dev, claims that can fail."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lelp as paper
from experiments.lelp import Config
from w2s_jax.errors import UserError
from w2s_jax.models import trunks
from w2s_jax.pipelines import lelp
from w2s_jax.pipelines.lelp import Pool, Setting
from w2s_jax.record import Context

RNG = np.random.default_rng(0)
LABEL = np.arange(40) % 2
EMBEDDING = RNG.normal(size=(40, 6)) * np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.2]) + LABEL[:, None]


def test_directions_are_the_principal_ones() -> None:
    found = lelp.principal(EMBEDDING, LABEL, 2)
    for number in (0, 1):
        values, vectors = np.linalg.eigh(np.cov(EMBEDDING[number == LABEL].T, bias=True))
        same = np.abs(np.einsum("ds,ds->s", found.vectors[number], vectors[:, ::-1]))
        np.testing.assert_allclose(same, 1.0, atol=1e-6)
        np.testing.assert_allclose(found.spread[number] ** 2, values[::-1])
    own = lelp.projections(found, EMBEDDING, 3, rotate=False)[np.arange(40), LABEL]
    for number in (0, 1):
        np.testing.assert_allclose(own[number == LABEL].mean(0), 0.0, atol=1e-6)
        np.testing.assert_allclose(own[number == LABEL].std(), 1.0, rtol=1e-5)
        assert np.all(np.diff(own[number == LABEL].std(0)) < 0)  # the largest first


def test_rotation_keeps_lengths_and_evens_the_variances() -> None:
    found = lelp.principal(EMBEDDING, LABEL, 2)
    plain = lelp.projections(found, EMBEDDING, 3, rotate=False)
    turned = [lelp.projections(found, EMBEDDING, 3, seed=seed) for seed in range(200)]
    np.testing.assert_allclose(np.square(turned[0]).sum(-1), np.square(plain).sum(-1))
    assert np.array_equal(lelp.projections(found, EMBEDDING, 3, seed=1), turned[1])
    spread = np.var([one[LABEL == 0, 0] for one in turned], axis=1).mean(0)
    np.testing.assert_allclose(spread, 1.0, rtol=0.15)  # over rotations all directions are alike


def test_what_the_logits_show_is_taken_out() -> None:
    weights = RNG.normal(size=(6, 2))
    found = lelp.principal(EMBEDDING, LABEL, 2, weights)
    np.testing.assert_allclose(np.einsum("cds,dk->csk", found.vectors, weights), 0.0, atol=1e-9)
    moved = EMBEDDING + RNG.normal(size=(40, 2)) @ weights.T
    before, after = (lelp.projections(found, one, 3) for one in (EMBEDDING, moved))
    np.testing.assert_allclose(after, before, atol=1e-9)
    with pytest.raises(UserError, match="5 subclasses, but classes have 4 directions"):
        lelp.projections(found, EMBEDDING, 5)
    with pytest.raises(UserError, match="3 subclasses, but classes have 2 directions"):
        lelp.projections(lelp.principal(EMBEDDING[:4], LABEL[:4], 2), EMBEDDING, 3)


def test_targets_sum_to_the_class_probabilities() -> None:
    chances = RNG.dirichlet([1.0, 1.0], size=40)
    projections = RNG.normal(size=(40, 2, 3))
    soft = lelp.soften(chances, projections, 0.7)
    np.testing.assert_allclose(soft.sum(-1), chances)
    np.testing.assert_allclose(
        soft[0, 1, 2] / soft[0, 1, 0], np.exp((projections[0, 1, 2] - projections[0, 1, 0]) / 0.7)
    )
    assert np.array_equal(lelp.soften(chances, projections[..., :1], 0.7)[..., 0], chances)
    flat, hard = (lelp.soften(chances, projections, beta) for beta in (1e6, 1e-6))
    np.testing.assert_allclose(flat, np.stack([chances / 3] * 3, -1), rtol=1e-4)
    np.testing.assert_allclose(hard.max(-1), chances)
    groups = np.array([[1, -1]])
    expected = [[[0, 0.25, 0, 0], [3 / 16] * 4]]
    np.testing.assert_allclose(lelp.divide(np.array([[0.25, 0.75]]), groups, 4), expected)
    wide = lelp.wide(soft, 5).reshape(40, 2, 5)
    np.testing.assert_allclose(wide[..., :3], soft, rtol=1e-6)
    assert not wide[..., 3:].any()


def test_one_subclass_is_plain_distillation() -> None:
    chances = RNG.dirichlet([1.0, 1.0], size=5).astype(np.float32)
    logits = jnp.asarray(RNG.normal(size=(5, 2 * 4 + 3)), jnp.float32)
    batch = {"label": lelp.wide(chances[..., None], 4), "features": jnp.zeros((5, 3))}

    def mine(logits, heat):
        numbers = {"classes": 2, "places": 4, "splits": 1, "weight": 0.0}
        return lelp.student_loss(logits, batch, heat=heat, **numbers).sum()

    def plain(logits, heat):
        own = logits[:, : 2 * 4 : 4] / heat
        return -(heat**2) * (chances * jax.nn.log_softmax(own)).sum()

    for heat in (1.0, 4.0):
        values = [jax.jit(jax.value_and_grad(f))(logits, heat) for f in (mine, plain)]
        np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-5)
        np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-6)


def test_the_embedding_is_regressed_by_what_stands_behind() -> None:
    logits = jnp.zeros((1, 4)).at[0, 2:].set(jnp.array([1.0, 3.0]))
    batch = {"label": jnp.array([[1.0, 0.0]]), "features": jnp.array([[2.0, 1.0]])}
    numbers = {"classes": 2, "places": 1, "splits": 1, "heat": 1.0}
    losses = [lelp.student_loss(logits, batch, weight=w, **numbers)[0] for w in (0.0, 2.0)]
    np.testing.assert_allclose(losses, [np.log(2), np.log(2) + 2.0 * (1 + 4) / 2], rtol=1e-6)


def test_probabilities_are_summed_not_compared() -> None:
    logits = jnp.array([[2.0, -9.0, 1.5, 1.5]])  # class 0 has the largest, class 1 the most
    np.testing.assert_array_equal(lelp.named(logits, 2, 2, (1, 2))[:, 0], [0, 1])


def test_a_teacher_with_one_subclass_is_a_plain_one() -> None:
    logits = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)

    @jax.jit
    def loss(logits, splits):
        numbers = {"classes": 2, "places": 3, "weight": 0.5}
        batch = {"label": jnp.eye(2)[jnp.arange(len(logits)) % 2]}
        return lelp.teacher_loss(logits, batch, splits=splits, **numbers)

    batch = {"label": np.eye(2)[np.arange(6) % 2]}
    plain = -(batch["label"] * jax.nn.log_softmax(logits[:, ::3])).sum(-1)
    np.testing.assert_allclose(loss(logits, 1), plain, rtol=1e-5)
    # by hand for two rows that use their places in opposite order: cosines are +1 and -1
    two = jnp.array([[1.0, -1.0, 9.0, 1.0, -1.0, 9.0], [-1.0, 1.0, 9.0, -1.0, 1.0, 9.0]])
    apart = np.log(np.e + 1 / np.e) - 1
    np.testing.assert_allclose(loss(two, 2), np.log(2) + 0.5 * apart, rtol=1e-4)
    grad = jax.jit(jax.grad(lambda x: loss(x, 2).sum()))(
        jnp.zeros((2, 6))
    )  # where every teacher starts
    assert np.isfinite(grad).all()


def test_subclasses_do_not_begin_alike() -> None:
    """Subclasses that begin alike stay alike: the loss cannot tell them from one another."""
    plain = trunks.named("mlp-8", (2, 2, 1), 6)
    was, now = (model.init(jax.random.key(0)) for model in (plain, lelp.unlike(plain, 2, 3)))
    assert (was["head"]["kernel"] == 0).all()
    kernel = now["head"]["kernel"].reshape(8, 2, 3)
    assert (kernel[..., 0] == 0).all() and (kernel[..., 1:].std((0, 1)) > 0.1).all()
    jax.tree.map(np.testing.assert_array_equal, was["body"], now["body"])


@pytest.mark.slow
def test_a_teacher_tells_its_subclasses_apart() -> None:
    sizes = {"seeds": 1, "train": 120, "rows": 40, "dev": 20, "test": 20, "splits": (3,)}
    cfg = replace(Config(), teacher="mlp-16", teaching=replace(Config().teaching, lr=1e-2), **sizes)
    logits = paper.teach(cfg, paper.load(cfg))["logits"][0]
    plain, own = logits[0, ..., 0], logits[1, ..., :3]
    assert own.std(-1).mean() > 0.3 * np.abs(own).mean() and np.abs(plain).mean() > 1.0


def pool() -> tuple[Pool, dict[str, np.ndarray]]:
    """Forty rows of two classes whose embeddings are given, thirty of them for training."""
    rows = np.arange(30)[None]
    one = Pool(np.zeros((40, 2, 2, 1)), LABEL, np.arange(40) // 2 % 3, 36, rows, rows, rows)
    logits = np.zeros((1, 2, 40, 2, 3))
    logits[0, 0, :, :, 0] = 8.0 * np.eye(2)[LABEL]
    logits[0, 1] = RNG.normal(size=(40, 2, 3))
    heard = {"logits": logits, "embedding": EMBEDDING[None], "kernel": RNG.normal(size=(1, 6, 2))}
    return one, heard


@pytest.mark.parametrize("arm", ["truth", "kd", "embedding", "oracle", *lelp.SPLIT])
def test_every_arm_teaches_a_distribution(arm) -> None:
    one, heard = pool()
    splits = 3 if arm in ("oracle", *lelp.SPLIT) else 1
    taught = lelp.targets(one, heard, Setting(0, arm, splits, 0.3, 4.0), (1, 3), {})
    assert taught.shape == (36, 2, splits)
    np.testing.assert_allclose(taught.sum((1, 2)), 1.0, rtol=1e-6)
    sums = taught.sum(-1)
    if arm == "truth":
        assert np.array_equal(sums, np.eye(2)[LABEL[:36]])
    elif arm != "subclass":  # all the others share out the plain teacher's probabilities
        np.testing.assert_allclose(sums[np.arange(36), LABEL[:36]], 1 / (1 + np.exp(-2.0)))
    if arm == "oracle":
        assert np.array_equal(taught[np.arange(36), LABEL[:36]].argmax(-1), one.fine[:36])


@pytest.mark.parametrize(
    ("arm", "words"), [("lelp", "classes have 0 directions"), ("k-means", "class with 0 rows")]
)
def test_a_class_that_the_teacher_never_names_is_told(arm, words) -> None:
    one, heard = pool()
    heard["logits"][0, 0, :, 1, 0] = -9.0  # always the first
    with pytest.raises(UserError, match=words):
        lelp.targets(one, heard, Setting(0, arm, 2, 0.3), (1, 3), {})


def row(arm: str, seed: int, dev: float, accuracy: float, **more) -> dict:
    base = {"splits": 1, "beta": 0.0, "tau": 1.0, "weight": 0.0, "lr": 0.1}
    return (
        {"block": "grid", "arm": arm, "seed": seed, "dev": dev, "accuracy": accuracy} | base | more
    )


def results(gain: float) -> list[dict]:
    """Rows of three seeds in which LELP is ``gain`` above everything but the oracle."""
    rows = [
        row(arm, seed, 0.8, 0.8 + 0.001 * seed, splits=splits)
        for seed in range(3)
        for arm in ("truth", "kd", "lelp, S = 1", "embedding", *lelp.SPLIT, "oracle")
        for splits in ((2, 3) if arm in lelp.SPLIT else (1,))
    ]
    for one in rows:
        one["accuracy"] += (gain * (1 + 0.01 * one["seed"])) * (one["arm"] == "lelp")
        one["accuracy"] += 2 * abs(gain) * (1 + 0.01 * one["seed"]) * (one["arm"] == "oracle")
    ablation = [
        row("lelp", seed, 0.8, 0.8 + gain * off + 0.001 * seed * off, splits=2)
        | {"block": "ablation", "off_logits": off, "rotate": turn}
        for seed in range(3)
        for off in (0, 1)
        for turn in (0, 1)
    ]
    return paper.chosen(rows) + ablation


def test_claims_hold_and_fail_with_the_numbers() -> None:
    good = {claim["name"]: claim["holds"] for claim in paper.claims(results(0.02))}
    assert good.pop("lelp better rotated, over S and beta") is False  # no difference was made
    assert all(good.values()) and len(good) == 11
    bad = {claim["name"]: claim["holds"] for claim in paper.claims(results(-0.02))}
    assert {name for name, holds in bad.items() if holds} == {
        "oracle above kd",
        "oracle above lelp",
    }


def test_dev_chooses_and_test_has_no_say() -> None:
    rows = [
        row("lelp", s, dev, test, splits=2, tau=tau)
        for s in (0, 1)
        for tau, dev, test in ((1.0, 0.9, 0.1), (2.0, 0.8, 0.99))
    ]
    rows += [row(arm, s, 0.5, 0.5, splits=2) for s in (0, 1) for arm in ("kd", "random")]
    rows += [row(arm, s, 0.5, 0.5, splits=2) for s in (0, 1) for arm in ("k-means", "subclass")]
    score = [r for r in paper.chosen(rows) if r["block"] == "score" and r["arm"] == "lelp"]
    assert [r["accuracy"] for r in score] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"splits": (1, 2)}, "--splits need 2"),
        ({"betas": ()}, "one entry"),
        ({"lrs": (0.1, 0.1)}, "none twice"),
        ({"weights": (float("nan"),)}, "above 0"),
        ({"apart": float("nan")}, "--apart"),
        ({"taus": (2.0,)}, "must have 1.0"),
        ({"betas": (0.0,)}, "above 0"),
        ({"rows": 2000}, "within --train"),
        ({"classes": 1}, "two or more"),
        ({"classes": 11}, "has only 10 classes"),
        ({"student": "mlp-x"}, "names no trunk"),
        ({"data": "missing.npz"}, "not a readable npz"),
        ({"train": 3000}, "ask for fewer"),
    ],
)
def test_bad_numbers_are_told_before_anything_runs(change, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        next(paper.run(replace(Config(), **change), Context(Path())))
    assert "\n" not in str(caught.value)
