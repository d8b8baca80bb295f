"""Losses between features: RepDistiller's numbers, limits, invariances, hand-made cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_world import wave

from w2s_jax.errors import UserError
from w2s_jax.losses import features as f
from w2s_jax.objectives.features import regressor

VECTORS = (
    f.relational_distance,
    f.relational_angle,
    f.similarity,
    f.probabilistic_transfer,
    f.alignment,
)


def learned(loss):
    """Value and gradient of the batch's mean."""
    return jax.jit(jax.value_and_grad(lambda x, y: loss(x, y).mean()))


def variational(student, teacher):
    kernels = [wave(4, 5, phase=2.0), wave(5, 5, phase=3.0), wave(5, 5, phase=4.0)]
    head = regressor()
    params = {"maps": kernels, "scale": np.full(5, 4.993229389, np.float32)}
    return f.variational(*head.apply(params, student, teacher))


# HobbitLong/RepDistiller, run in double precision: the batch's value, the first three numbers of
# its gradient by the student, and the gradient's product with cos(0), cos(1), ...
MAPS, TOKENS = (wave(3, 6, 6, 4), wave(3, 3, 3, 5, phase=1.0)), (wave(5, 4), wave(5, 6, phase=1.0))
REFERENCE = {
    "FitNet": (
        (f.hint, wave(4, 5), wave(4, 5, phase=1.0)),
        (0.35816219928, -0.07035616766, 0.08477547908, 0.04606792050, -0.05566382947),
    ),
    "AT": (
        (f.attention_transfer, *MAPS),
        (0.02669866778, 0.00021320393, 0.00157995999, -0.00052660463, -0.03951300022),
    ),
    "AT of odd sizes": (
        (f.attention_transfer, wave(3, 5, 5, 4), MAPS[1]),
        (0.02385774427, 0.00105673013, -0.00039954270, -0.00132965948, 0.01300155738),
    ),
    "SP": (
        (f.similarity, *TOKENS),
        (0.34031110629, 0.01074438242, -0.01143070779, -0.01824617777, -0.04471045678),
    ),
    "RKD-D": (
        (f.relational_distance, *TOKENS),
        (0.12050774703, -0.00925611709, 0.01548010940, 0.00844548314, -0.10104395371),
    ),
    "RKD-A": (
        (f.relational_angle, *TOKENS),
        (0.16197250165, -0.01055157139, 0.01139048340, 0.01534642429, -0.16687555877),
    ),
    "PKT": (
        (f.probabilistic_transfer, *TOKENS),
        (0.05013809441, -0.00091904238, -0.00068983781, -0.00079157781, -0.00539521256),
    ),
    "VID": (
        (variational, *MAPS),
        (0.86383080468, 0.00048888685, 0.00033534051, -0.00051820797, -0.00310018415),
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_value_and_gradient_are_repdistillers(name):
    (loss, student, teacher), want = REFERENCE[name]
    value, grad = learned(loss)(student, teacher)
    flat = np.asarray(grad, np.float64).ravel()
    got = [value, *flat[:3], flat @ np.cos(np.arange(flat.size))]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_the_variance_of_vid_starts_and_moves_as_repdistillers():
    head = regressor()
    params = head.init(jax.random.key(0), MAPS[0].shape, MAPS[1].shape)
    np.testing.assert_allclose(params["scale"], np.full(5, 4.993229389), rtol=1e-6)
    params["maps"] = [wave(4, 5, phase=2.0), wave(5, 5, phase=3.0), wave(5, 5, phase=4.0)]
    grads = jax.jit(jax.grad(lambda p: f.variational(*head.apply(p, *MAPS)).mean()))(params)
    want = [0.0174107167, 0.0172213427, 0.0175158913, 0.0172885859, 0.0181469522]
    np.testing.assert_allclose(grads["scale"], want, rtol=1e-5)
    want = [8.662111901e-05, -1.264343924e-04, 6.882433681e-04]
    np.testing.assert_allclose(grads["maps"][0].ravel()[:3], want, rtol=1e-3)


def test_the_best_variance_of_vid_is_the_mean_square():
    mean, teacher = wave(4, 3), wave(4, 3, phase=1.0)
    square = ((mean - teacher) ** 2).mean(0)
    scale = jnp.log(jnp.expm1(square - 1e-5))
    slope = jax.grad(lambda s: f.variational(mean, teacher, s).mean())(scale)
    np.testing.assert_allclose(slope, np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("loss", VECTORS)
def test_relations_of_equal_features_are_0_even_where_examples_coincide(loss):
    x = wave(4, 4)
    cases = np.stack([x, x[[0, 0, 1, 2]], np.ones((4, 4), np.float32), np.zeros((4, 4))])
    asked = jax.vmap(learned(loss))
    values, grads = asked(cases, cases)
    want = [0, 0, 1, 1] if loss is f.alignment else [0, 0, 0, 0]  # what is constant tells nothing
    np.testing.assert_allclose(values, want, atol=1e-6)
    assert np.isfinite(grads).all() and abs(grads).max() < 1e-3
    values, grads = asked(cases, cases + 0.1 * wave(4, 4, 4, phase=2.0))
    assert np.isfinite(values).all() and np.isfinite(grads).all() and abs(grads).max() < 100


@pytest.mark.parametrize("loss", [f.hint, f.half_square, f.cosine, f.attention_transfer])
@pytest.mark.parametrize("shape", [(3, 5), (3, 6, 5), (3, 4, 4, 2)])
def test_equal_features_have_nothing_to_learn(loss, shape):
    if loss is f.attention_transfer and len(shape) < 4:
        return
    asked, x = learned(loss), wave(*shape)
    value, grad = asked(x, x)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(grad, np.zeros(shape), atol=1e-5)
    assert np.isfinite(asked(np.zeros_like(x), x)[1]).all()
    sizes = jax.eval_shape(loss, x, x).shape
    assert sizes == (shape[:2] if len(shape) == 3 else (3,))  # per token of tokens


def test_invariances():
    x, y = wave(6, 4), wave(6, 5, phase=1.0)
    turned = 3.0 * (x @ np.linalg.qr(wave(4, 4, phase=3.0))[0])
    moved = turned + 100.0 * wave(1, 4, phase=2.0)
    say = jax.jit(jax.vmap(lambda x: [loss(x, y) for loss in VECTORS]))
    for loss, (first, second, third) in zip(
        VECTORS, say(np.stack([x, turned, moved])), strict=True
    ):
        np.testing.assert_allclose(second, first, rtol=2e-3, atol=1e-6)
        if loss in (f.similarity, f.probabilistic_transfer):
            assert abs(third - first).max() > 1e-3
        else:
            np.testing.assert_allclose(third, first, rtol=2e-2, atol=1e-3)
    maps, other = MAPS
    mixed = 2.0 * maps[..., [2, 0, 3, 1]]
    say = jax.jit(f.attention_transfer)
    np.testing.assert_allclose(say(mixed, other), say(maps, other), rtol=1e-5)


@pytest.mark.parametrize("loss", [f.relational_distance, f.relational_angle, f.alignment])
def test_features_of_any_size_have_relations(loss):
    """Powers of a language model's largest features, or of nearly dead ones, leave float32."""
    x, y = wave(5, 4), wave(5, 6, phase=1.0)
    sizes = np.float32([1.0, 1e-13, 1e10]).reshape(3, 1, 1)
    values, grads = jax.vmap(learned(loss))(sizes * x, np.stack([y] * 3))
    np.testing.assert_allclose(values, values[:1].repeat(3), rtol=1e-4)
    np.testing.assert_allclose(sizes * grads, grads[:1].repeat(3, 0), rtol=1e-3, atol=1e-6)


def test_distances_by_hand():
    line, other = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([[0.0], [2.0], [2.0]])
    # mean distances: (1 + 2 + 3) / 3 = 2, and (2 + 2) / 2 = 2, for two of other's points coincide
    apart = [[0, 0.5 - 1, 1.5 - 1], [0.5 - 1, 0, 1 - 0], [1.5 - 1, 1 - 0, 0]]
    small = np.square(apart) / 2  # none is above 1
    np.testing.assert_allclose(f.relational_distance(line, other), small.mean(1), rtol=1e-5)
    ends = jnp.array([[0.0], [1.0], [9.0]])  # 9 / 6 - 1 = 0.5; of a far pair 1.5, beyond the corner
    near = jnp.array([[0.0], [0.0], [0.0]])
    got = f.relational_distance(ends, near)[0]
    np.testing.assert_allclose(got, (np.square(1 / 6) / 2 + 1.5 - 0.5) / 3, rtol=1e-5)


def test_angles_by_hand():
    corner = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    line = jnp.array([[0.0], [1.0], [2.0]])
    # cosine 0 against 1 at the corner, 1/sqrt 5 against -1 at example 1, 2/sqrt 5 against 1 at 2
    gaps = np.array([1.0, 1 + 5**-0.5, 1 - 2 * 5**-0.5])
    smooth = np.where(gaps < 1, gaps**2 / 2, gaps - 0.5)
    np.testing.assert_allclose(f.relational_angle(corner, line), 2 * smooth / 9, rtol=1e-4)


def test_coinciding_examples_are_not_a_distance_of_a_millionth():
    """RepDistiller clamps squared distances at 1e-12, so that two equal examples lower the mean."""
    x = jnp.array([[0.0], [0.0], [1.0]])
    np.testing.assert_allclose(f.relational_distance(x, 7.0 * x), np.zeros(3), atol=1e-6)
    theirs = np.sqrt(np.maximum((np.asarray(x) - np.asarray(x).T) ** 2, 1e-12)) * (1 - np.eye(3))
    assert theirs[theirs > 0].mean() < 0.67  # ours is 1
    mean = jnp.array([[0.0], [1.0], [2.0]])
    want = np.square([[0, 0.75, -0.5], [0.75, 0, 0.25], [-0.5, 0.25, 0]]).mean(1) / 2
    np.testing.assert_allclose(f.relational_distance(x, mean), want, rtol=1e-5)


def test_features_by_hand():
    a, b = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])
    np.testing.assert_allclose(f.hint(a, b), [2.0])
    np.testing.assert_allclose(f.half_square(a, b), [2.0])
    np.testing.assert_allclose(f.half_square(a[..., None, None], b[..., None, None]), [2.0])
    np.testing.assert_allclose(f.cosine(a, b), [1 - 7 / np.sqrt(5 * 13)], rtol=1e-6)
    np.testing.assert_allclose(f.cosine(a, 0 * b), [1.0])
    student = jnp.array([3.0, 4.0]).reshape(1, 1, 2, 1) ** 0.5
    teacher = jnp.array([0.0, 5.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(f.attention_transfer(student, teacher), [(0.36 + 0.04) / 2])


def test_attention_probabilities():
    teacher = jnp.array([[[[1.0, 0.0], [0.5, 0.5]]]])  # causal: 0 log 0 is 0
    student = jnp.array([[[[1.0, 0.0], [0.25, 0.75]]]])
    want = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(f.attention_kl(student, teacher), [[0.0, want]], rtol=1e-6)
    np.testing.assert_allclose(f.attention_squared(student, teacher), [[0.0, 0.0625]], rtol=1e-6)
    for loss in (f.attention_kl, f.attention_squared):  # padding is seen by itself alone
        pads = jnp.pad(jnp.eye(2), ((2, 0), (2, 0)))[None, None]
        padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 2), (0, 2))) + pads for x in (student, teacher)]
        np.testing.assert_allclose(loss(*padded)[:, :2], loss(student, teacher), rtol=1e-6)
    two = jnp.concatenate(
        [student, 2 * teacher - student], axis=1
    )  # its heads' mean is the teacher
    for loss in (f.attention_kl, f.attention_squared):
        np.testing.assert_allclose(loss(two, teacher), [[0.0, 0.0]], atol=1e-7)
        grad = jax.grad(lambda x, loss=loss: loss(x, teacher).sum())(student)
        assert np.isfinite(grad).all()


def test_contrast_by_plain_arithmetic():
    a, b = wave(4, 3), wave(4, 3, phase=1.0)
    unit = [np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True)) for x in (a, b)]
    scores = unit[0] @ unit[1].T / 0.5
    rows = np.log(np.exp(scores).sum(1)) + np.log(np.exp(scores).sum(0)) - 2 * np.diag(scores)
    np.testing.assert_allclose(f.contrastive(a, b, temperature=0.5), rows, rtol=1e-5)
    positive, negatives = jnp.array([0.3]), jnp.array([[-1.0, 0.5, 0.0]])
    h = [np.exp(x) / (np.exp(x) + 3 / 10) for x in (0.3, -1.0, 0.5, 0.0)]
    want = -np.log(h[0]) - sum(np.log(1 - x) for x in h[1:])
    got = f.noise_contrast(positive, negatives, examples=10)
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_cka_by_its_other_formula():
    x, y = (np.asarray(z - z.mean(0, keepdims=True)) for z in (wave(6, 4), wave(6, 3, phase=1.0)))
    norm = np.linalg.norm
    want = 1 - norm(x.T @ y) ** 2 / norm(x.T @ x) / norm(y.T @ y)
    np.testing.assert_allclose(f.alignment(wave(6, 4), wave(6, 3, phase=1.0)), want, rtol=1e-4)


def test_pooling():
    ramp = jnp.arange(5.0).reshape(1, 5, 1, 1)  # windows 0-1, 1-3, 3-4
    np.testing.assert_allclose(f.pool_maps(ramp, 3, 1).ravel(), [0.5, 2.0, 3.5])
    tokens = jnp.arange(6.0).reshape(1, 3, 2)
    got = f.pool_tokens(tokens, jnp.array([[1, 0, 1]]))
    np.testing.assert_allclose(got, [[2.0, 3.0]])
    np.testing.assert_allclose(f.pool_tokens(tokens, jnp.zeros((1, 3))), [[0.0, 0.0]])
    np.testing.assert_allclose(f.pool_tokens(tokens), [[2.0, 3.0]])


def test_the_teacher_is_not_moved():
    def every(teacher, maps):
        vectors = [
            loss(wave(3, 4), teacher) for loss in (f.hint, f.cosine, f.contrastive, *VECTORS)
        ]
        return sum(v.sum() for v in [*vectors, f.attention_transfer(MAPS[0], maps)])

    grads = jax.jit(jax.grad(every, argnums=(0, 1)))(wave(3, 4, phase=1.0), MAPS[1])
    assert not any(np.any(grad) for grad in grads)


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (f.hint, (3, 4), (3, 5)),
        (f.hint, (3, 6, 4), (3, 5, 4)),
        (f.cosine, (3, 4, 4, 2), (3, 2)),
        (f.attention_transfer, (3, 4), (3, 4)),
        (f.similarity, (3, 6, 4), (3, 6, 4)),
        (f.relational_angle, (3, 4), (2, 4)),
        (f.attention_kl, (1, 2, 3, 3), (1, 2, 4, 4)),
        (f.contrastive, (3, 4), (3, 5)),
    ],
)
def test_features_that_cannot_be_compared_are_refused_in_a_line(loss, student, teacher):
    with pytest.raises(UserError) as error:
        jax.eval_shape(loss, jnp.zeros(student), jnp.zeros(teacher))
    assert "\n" not in str(error.value) and str(student) in str(error.value)
