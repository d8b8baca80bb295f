"""Losses between the features of a student and a teacher: element by element, by where they are
large, by how examples relate, by what one tells of the other.

Features are vectors [B,D], tokens [B,T,D] or maps [B,H,W,C], any float dtype; values are float32.
A loss gives one number per example [B] or, of tokens, per token [B,T], so that its mean over a
batch (over the real tokens) is the published number. The larger of two maps is averaged down to the
smaller. No gradient reaches the teacher. Weights beside a cross-entropy are those of RepDistiller's
scripts (github.com/HobbitLong/RepDistiller, commit of 2024).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError

Array = jax.Array


def hint(student: Array, teacher: Array) -> Array:
    """Mean squared difference (Romero et al. 2015, FitNets; as in RepDistiller, weight 100)."""
    return _mean((_met(student, teacher, "hint")) ** 2)


def half_square(student: Array, teacher: Array) -> Array:
    """``||student - teacher||^2 / 2`` as FitNets' eq. 3 has it: a sum, so it grows with the size
    of the features."""
    return _mean(_met(student, teacher, "half_square") ** 2, jnp.sum) / 2


def cosine(student: Array, teacher: Array) -> Array:
    """``1 - cos`` of the angle between two features (along the channels), in [0, 2]; where one of
    them is 0 the cosine counts as 0."""
    _alike(student, teacher, "cosine")
    student, teacher = meet(student, teacher)
    return 1.0 - _spread((unit(student) * unit(teacher)).sum(-1))


def attention_transfer(student: Array, teacher: Array) -> Array:
    """Mean squared difference of two pictures of where maps [B,H,W,C] are large, each the mean of
    squares over the channels (whose number may differ) as a vector of length 1 (Zagoruyko and
    Komodakis 2017, AT; weight 1000)."""
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise _mismatch("attention_transfer", "maps [B,H,W,C]", student, teacher)
    student, teacher = meet(student, teacher)
    return jnp.mean((_energy(student) - _energy(teacher)) ** 2, axis=-1)


def attention_squared(student: Array, teacher: Array) -> Array:
    """Mean squared difference of attention probabilities [B,H,T,T] -> [B,T], over heads and the
    keys that a token sees, so that padding changes nothing; heads are averaged first where their
    numbers differ. TinyBERT's loss (Jiao et al. 2020), which fits the scores before their softmax.
    """
    student, teacher = _heads(student, teacher)
    keys = ((student > 0) | (teacher > 0)).any(1).sum(-1)
    return jnp.mean((student - teacher) ** 2, axis=1).sum(-1) / jnp.maximum(keys, 1)


def attention_kl(student: Array, teacher: Array) -> Array:
    """``KL(teacher || student)`` of attention probabilities [B,H,T,T] -> [B,T] nats (Wang et al.
    2020, MiniLM), the mean over heads, which are averaged first where their numbers differ."""
    student, teacher = _heads(student, teacher)
    seen = teacher > 0  # 0 log 0 is 0; what the student rounds to 0 has a very low probability
    p, q = (jnp.log(jnp.where(seen, jnp.maximum(x, 1e-30), 1.0)) for x in (teacher, student))
    return jnp.mean((teacher * (p - q)).sum(-1), axis=1)


def relational_distance(student: Array, teacher: Array) -> Array:
    """Smooth L1 of the distances between examples, in units of their mean (Park et al. 2019,
    RKD-D; weight 25). Number [b] is the mean over all B partners of example b.

    Invariant to rotation, translation and scale. Distances that float32 cannot tell from 0 are 0
    and have no part in the mean.
    """
    student, teacher = _vectors(student, teacher, "relational_distance")
    difference = _scaled_distances(student) - _scaled_distances(teacher)
    return jnp.mean(_smooth(difference), axis=-1)


def relational_angle(student: Array, teacher: Array) -> Array:
    """Smooth L1 of the cosines of the angles that examples span (Park et al. 2019, RKD-A; weight
    50). Number [b] is the mean over the B^2 angles at example b; takes B^3 numbers of memory.

    Invariant to rotation, translation and scale; the cosine at coinciding examples is 0.
    """
    student, teacher = _vectors(student, teacher, "relational_angle")
    return jnp.mean(_smooth(_cosines(student) - _cosines(teacher)), axis=(1, 2))


def similarity(student: Array, teacher: Array) -> Array:
    """``||N(S S') - N(T T')||_F^2 / B^2`` (Tung and Mori 2019, SP; weight 3000), N making rows of
    length 1. Number [b] is row b's share times B. Invariant to orthogonal maps and to scale."""
    student, teacher = _vectors(student, teacher, "similarity")
    return jnp.mean((unit(_gram(student)) - unit(_gram(teacher))) ** 2, axis=-1)


def probabilistic_transfer(student: Array, teacher: Array) -> Array:
    """KL of the two conditional probabilities that example b picks a partner, by cosine similarity
    (Passalis and Tefas 2018, PKT), divided by B; RepDistiller's form with weight 30000."""
    student, teacher = _vectors(student, teacher, "probabilistic_transfer")
    q, p = (_picks(unit(x)) for x in (student, teacher))
    return jnp.mean(p * (jnp.log(p + 1e-7) - jnp.log(q + 1e-7)), axis=-1)


def alignment(student: Array, teacher: Array) -> Array:
    """``1 - CKA`` (linear; Kornblith et al. 2019), one number [] per batch, in [0, 1].

    Invariant to orthogonal maps, translation and scale; 1 where all examples coincide.
    """
    student, teacher = _vectors(student, teacher, "alignment")
    a, b = (unit(_gram(_centred(x)).ravel()) for x in (student, teacher))
    return 1.0 - (a * b).sum()


def variational(mean: Array, teacher: Array, scale: Array) -> Array:
    """``mean of [log s^2 + (teacher - mean)^2 / s^2] / 2`` nats (Ahn et al. 2019, VID; weight 1).

    Args:
      mean: what the student's features predict of the teacher's.
      scale: [D], one for each channel; the variance is ``s^2 = softplus(scale) + 1e-5``.
    """
    square = _met(mean, teacher, "variational") ** 2
    variance = (jax.nn.softplus(scale) + 1e-5).reshape((1,) * (square.ndim - 1) + scale.shape)
    return _mean(jnp.log(variance) + square / variance) / 2


def contrastive(student: Array, teacher: Array, *, temperature: float = 0.07) -> Array:
    """Which of the batch's teacher features is mine, and the reverse, as two classifications
    [B] nats (InfoNCE, van den Oord et al. 2018); features [B,D] are made unit vectors.

    The contrastive form that needs no memory: negatives are the other examples of the batch.
    """
    _alike(student, teacher, "contrastive")
    student, teacher = _vectors(student, teacher, "contrastive")
    scores = _product(unit(student), unit(teacher)) / temperature
    mine = jnp.diagonal(scores)
    totals = [jax.nn.logsumexp(scores, axis=axis) for axis in (0, 1)]
    return totals[0] + totals[1] - 2.0 * mine


def noise_contrast(positive: Array, negatives: Array, *, examples: int) -> Array:
    """Telling one positive from K negatives drawn from N ``examples`` (Tian et al. 2020, CRD, eq.
    18; weight 0.8): ``-log h(positive) - sum_k log(1 - h(negative_k))``, h = x / (x + K / N).

    Args:
      positive: [B] scores, nats: ``log x = cosine / temperature - log normaliser``.
      negatives: [B,K] scores of the same kind.

    Returns:
      [B] nats, float32.
    """
    noise = jnp.log(negatives.shape[-1] / examples)
    found, passed = (x.astype(jnp.float32) - noise for x in (positive, negatives))
    return jax.nn.softplus(-found) + jax.nn.softplus(passed).sum(-1)


def pool_tokens(features: Array, mask: Array | None = None) -> Array:
    """Means [B,D] over the tokens [B,T,D] where ``mask`` [B,T] is not 0, or over places [B,H,W,D];
    vectors stay. A row without tokens gives 0."""
    features = features.astype(jnp.float32)
    if features.ndim == 3 and mask is not None:
        counts = (mask != 0).astype(jnp.float32)[..., None]
        return (features * counts).sum(1) / jnp.maximum(counts.sum(1), 1.0)
    return features.mean(tuple(range(1, features.ndim - 1)))


def pool_maps(features: Array, high: int, wide: int) -> Array:
    """Maps [B,H,W,C] averaged to [B,high,wide,C]; windows as adaptive average pooling has them."""
    features = jnp.einsum("ih,bhwc->biwc", _windows(features.shape[1], high), features)
    return jnp.einsum("jw,bhwc->bhjc", _windows(features.shape[2], wide), features)


def meet(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both in float32, the teacher detached, the larger of two maps averaged to the smaller."""
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    student = student.astype(jnp.float32)
    if student.ndim == teacher.ndim == 4 and student.shape[1:3] != teacher.shape[1:3]:
        sides = [min(pair) for pair in zip(student.shape[1:3], teacher.shape[1:3], strict=True)]
        student, teacher = (pool_maps(x, *sides) for x in (student, teacher))
    return student, teacher


def unit(x: Array) -> Array:
    """Vectors of length 1 along the last axis; what is 0 stays 0 and has no gradient."""
    squares = (x * x).sum(-1, keepdims=True)
    some = squares > 1e-24
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, squares, 1.0)), 0.0)


def _windows(size: int, parts: int) -> Array:
    """[parts, size]: row i averages places floor(i size / parts) to ceil((i+1) size / parts)."""
    place, i = np.arange(size)[None], np.arange(parts)[:, None]
    inside = (place >= i * size // parts) & (place < -(-(i + 1) * size // parts))
    return jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.float32)


def _met(student: Array, teacher: Array, name: str) -> Array:
    """The difference of two features that have met."""
    _alike(student, teacher, name)
    student, teacher = meet(student, teacher)
    return student - teacher


def _alike(student: Array, teacher: Array, name: str) -> None:
    sizes = [
        (x.ndim, x.shape[0], x.shape[-1], x.ndim == 3 and x.shape[1]) for x in (student, teacher)
    ]
    if sizes[0] != sizes[1]:
        raise _mismatch(name, "features alike in all but the size of maps", student, teacher)


def _mismatch(name: str, needs: str, student: Array, teacher: Array) -> UserError:
    return UserError(
        f"{name} needs {needs}, got the student's {student.shape} and the teacher's "
        f"{teacher.shape}; match other layers or add a projection"
    )


def _mean(values: Array, reduce=jnp.mean) -> Array:
    """One number per example of vectors and maps, per token of tokens."""
    return reduce(values, axis=(1, 2, 3) if values.ndim == 4 else -1)


def _spread(values: Array) -> Array:
    """Numbers per place [B,H,W] as one per example."""
    return values.mean((1, 2)) if values.ndim == 3 else values


def _energy(x: Array) -> Array:
    squares = jnp.mean(x * x, axis=-1)
    return unit(squares.reshape(len(squares), -1))


def _heads(student: Array, teacher: Array) -> tuple[Array, Array]:
    if student.ndim != 4 or student.shape[2:] != teacher.shape[2:] or len(student) != len(teacher):
        raise _mismatch("attention maps", "[B,H,T,T] of one length", student, teacher)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    student = student.astype(jnp.float32)
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)


def _vectors(student: Array, teacher: Array, name: str) -> tuple[Array, Array]:
    """Both as [B,D] float32, maps flattened, the teacher detached."""
    if 3 in (student.ndim, teacher.ndim):
        raise _mismatch(name, "one vector per example (pool the tokens first)", student, teacher)
    if len(student) != len(teacher):
        raise _mismatch(name, "the same examples", student, teacher)
    teacher = jax.lax.stop_gradient(teacher)
    return tuple(x.reshape(len(x), -1).astype(jnp.float32) for x in (student, teacher))  # type: ignore


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _gram(x: Array) -> Array:
    return _product(x, x)


def _centred(x: Array) -> Array:
    """Examples [B,D] about their mean, in units of a power of 2 that makes them about 1 (which
    rounds nothing): for what is of no scale, and whose powers would leave float32."""
    x = x - x.mean(0, keepdims=True)
    exponent = jnp.frexp(jax.lax.stop_gradient(abs(x).max()))[1]
    return x * jnp.ldexp(jnp.float32(1.0), -jnp.clip(exponent, -120, 120))


def _squares(x: Array) -> tuple[Array, Array]:
    """Products of centred examples [B,B] (centring keeps distances, and float32 from cancelling)
    and squared distances [B,B], 0 where they are no more than rounding; of no scale."""
    gram = _gram(_centred(x))
    norms = jnp.diagonal(gram)
    both = norms[:, None] + norms[None, :]
    squares = both - 2.0 * gram
    return gram, jnp.where(squares > 1e-6 * both, squares, 0.0)


def _lengths(squares: Array) -> tuple[Array, Array]:
    """Roots, and 1 over them; 0 of 0, without a gradient there."""
    safe = jnp.where(squares > 0, squares, 1.0)
    inverse = jax.lax.rsqrt(safe)
    return jnp.where(squares > 0, safe * inverse, 0.0), jnp.where(squares > 0, inverse, 0.0)


def _scaled_distances(x: Array) -> Array:
    squares = _squares(x)[1]
    lengths = _lengths(squares)[0]
    total = lengths.sum()
    return lengths * ((squares > 0).sum() / jnp.where(total > 0, total, 1.0))


def _cosines(x: Array) -> Array:
    """[B,B,B]: at example i, the cosine between those towards j and towards k."""
    gram, squares = _squares(x)
    inverse = _lengths(squares)[1]
    norms = jnp.diagonal(gram)[:, None, None]
    products = gram[None] - gram[:, :, None] - gram[:, None, :] + norms
    return products * inverse[:, :, None] * inverse[:, None, :]


def _picks(x: Array) -> Array:
    similar = (_gram(x) + 1.0) / 2.0
    return similar / similar.sum(-1, keepdims=True)


def _smooth(x: Array) -> Array:
    """Smooth L1 with its corner at 1."""
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)
