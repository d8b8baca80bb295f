"""Pseudo-subclasses of a teacher's embedding (LELP, Loo et al. 2024, arXiv 2409.20449), its rivals,
and students of all of them as one program.

The paper gives the pieces (per-class principal directions of the last embedding, optionally off the
row space of the output weights, a random rotation, a tempered softmax times the class probability,
one cross-entropy over all subclasses). How coordinates are centred and scaled is our reading.

Classes are laid out as [C,M]: M places for subclasses, of which a run uses the first ``splits``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import Population, population
from w2s_jax.types import Array, Aux, Batch, Model, Objective, Params, State, Table, forward

SPLIT = ("lelp", "random", "k-means", "subclass")  # arms that choose a number of subclasses
HOT = ("kd", "embedding", "subclass")  # arms whose students have the teacher's temperature too


@dataclass(frozen=True)
class Pool:
    """Pictures [N,H,W,C], their classes and true subclasses [N]; those from ``known`` on are for
    test. ``rows`` [S,n] are the students', ``taught`` [S,m] the teachers', ``dev`` [S,d]."""

    image: np.ndarray
    label: np.ndarray
    fine: np.ndarray
    known: int
    rows: np.ndarray
    taught: np.ndarray
    dev: np.ndarray


@dataclass(frozen=True)
class Setting:
    """One student: what it is taught and how."""

    seed: int
    arm: str
    splits: int = 1
    beta: float = 0.0
    tau: float = 1.0
    weight: float = 0.0
    off_logits: bool = True
    rotate: bool = True
    lr: float = 0.0


@dataclass(frozen=True)
class Principal:
    """Principal directions of every class, largest first: ``mean`` [C,D], ``vectors`` [C,D,R],
    standard deviations ``spread`` [C,R]; ``outside`` [D,r] are orthonormal and taken out first."""

    mean: np.ndarray
    vectors: np.ndarray
    spread: np.ndarray
    outside: np.ndarray


def principal(
    embeddings: np.ndarray, classes: np.ndarray, count: int, weights: np.ndarray | None = None
) -> Principal:
    """The principal directions of each class's embeddings [N,D], as many as every class has.

    Args:
      classes: [N] of ``count``, what the teacher says (its argmax), so that no label is needed.
      weights: the teacher's output weights [D,C]: their column space, which the logits show
        already, is taken out of the embeddings first (the "null space"). None: it is kept.
    """
    width = embeddings.shape[1]
    outside = np.zeros((width, 0)) if weights is None else _column_space(weights)
    inside = embeddings - embeddings @ outside @ outside.T
    room = min(width - outside.shape[1], *np.bincount(classes, minlength=count))
    mean, vectors, spread = [], [], []
    for number in range(count):
        rows = inside[classes == number]
        mean.append(rows.mean(0) if len(rows) else np.zeros(width))
        _, values, own = np.linalg.svd(rows - mean[-1], full_matrices=False)
        own = own * np.where(own.sum(1, keepdims=True) < 0, -1.0, 1.0)  # the SVD leaves signs free
        vectors.append(own[:room].T)
        spread.append(values[:room] / np.sqrt(max(len(rows), 1)))
    return Principal(np.stack(mean), np.stack(vectors), np.stack(spread), outside)


def projections(
    found: Principal, embeddings: np.ndarray, splits: int, *, rotate: bool = True, seed: int = 0
) -> np.ndarray:
    """Coordinates [N,C,splits] of embeddings [N,D] along the first directions of every class,
    centred and divided by the standard deviation over the class's rows and directions (so that
    beta has no unit).

    Args:
      rotate: turn the directions of each class by a random orthonormal matrix drawn from ``seed``,
        so that all have the same expected variance.

    Raises:
      UserError: there are fewer directions.
    """
    if splits > found.spread.shape[1]:
        raise UserError(
            f"{splits} subclasses, but classes have {found.spread.shape[1]} directions (their "
            "rows, or the embedding's width less what the logits show): ask for fewer"
        )
    rng, basis = np.random.default_rng([seed, splits]), found.vectors[..., :splits]
    if rotate:
        q, r = np.linalg.qr(rng.normal(size=(len(basis), splits, splits)))
        basis = basis @ (q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None])
    scale = np.sqrt(np.square(found.spread[:, :splits]).mean(1)) + 1e-6
    inside = embeddings - embeddings @ found.outside @ found.outside.T
    shift = np.einsum("cd,cds->cs", found.mean, basis)
    return (np.einsum("nd,cds->ncs", inside, basis) - shift) / scale[:, None]


def soften(probabilities: np.ndarray, places: np.ndarray, beta: float) -> np.ndarray:
    """Targets [N,C,S]: class probabilities [N,C] times a softmax of ``projections`` / beta."""
    scores = places / beta
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return probabilities[..., None] * scores / scores.sum(-1, keepdims=True)


def divide(probabilities: np.ndarray, groups: np.ndarray, splits: int) -> np.ndarray:
    """Targets [N,C,S]: all of a class's probability [N,C] on the subclass ``groups`` [N,C] (-1: the
    same on each)."""
    hard = np.eye(splits)[np.maximum(groups, 0)]
    share = np.where(groups[..., None] < 0, 1.0 / splits, hard)
    return probabilities[..., None] * share


def clusters(
    embeddings: np.ndarray,
    classes: np.ndarray,
    count: int,
    rows: np.ndarray,
    splits: int,
    seed: int,
) -> np.ndarray:
    """Groups [N,C]: the nearest of ``splits`` k-means centres of each of ``count`` classes, found
    on ``rows``.

    Raises:
      UserError: a class has fewer rows.
    """
    from sklearn.cluster import KMeans

    groups = []
    for number in range(count):
        members = embeddings[rows[classes[rows] == number]]
        if len(members) < splits:
            raise UserError(f"{splits} clusters of a class with {len(members)} rows: ask for fewer")
        means = KMeans(splits, n_init=4, random_state=seed).fit(members)  # type: ignore[arg-type]
        groups.append(means.predict(embeddings))
    return np.stack(groups, axis=1)


def targets(
    pool: Pool,
    heard: Mapping[str, np.ndarray],
    one: Setting,
    counts: Sequence[int],
    memo: dict[Any, Any],
) -> np.ndarray:
    """What a student is taught about the known rows [known,C,S].

    Args:
      heard: what teachers say: ``logits`` [S,K,N,C,M] of those with ``counts`` [K] subclasses (the
        plain one first), and of the plain ones ``embedding`` [S,N,D], output ``kernel`` [S,D,C].
      memo: empty at first; what many settings share is kept there.
    """
    rows, label = pool.rows[one.seed], pool.label[: pool.known]
    logits = heard["logits"][one.seed, :, : pool.known]
    plain, embedding = logits[0, ..., 0], heard["embedding"][one.seed, : pool.known]
    chances = _softmax(plain / one.tau)
    named, count = plain.argmax(-1), chances.shape[-1]
    if one.arm == "truth":
        return np.eye(count)[label][..., None]
    if one.arm == "subclass":
        own = logits[counts.index(one.splits), ..., : one.splits] / one.tau
        return _softmax(own.reshape(len(own), -1)).reshape(own.shape)
    if one.arm == "lelp":
        weights = heard["kernel"][one.seed] if one.off_logits else None
        seen = embedding[rows], named[rows], count, weights
        found = _once(memo, (one.seed, one.off_logits), lambda: principal(*seen))
        turn = {"rotate": one.rotate, "seed": one.seed}
        return soften(chances, projections(found, embedding, one.splits, **turn), one.beta)
    if one.arm == "k-means":
        seen = embedding, named, count, rows, one.splits, one.seed
        groups = _once(memo, (one.seed, "clusters", one.splits), lambda: clusters(*seen))
        return divide(chances, groups, one.splits)
    if one.arm == "random":
        rng = np.random.default_rng([3, one.seed, one.splits])
        return divide(chances, rng.integers(0, one.splits, chances.shape), one.splits)
    if one.arm == "oracle":
        own = np.arange(count) == label[:, None]
        groups = np.where(own, pool.fine[: pool.known, None], -1)
        return divide(chances, groups, one.splits)
    return chances[..., None]  # distillation, with the embedding or without


def _once(memo: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in memo:
        memo[key] = make()
    return memo[key]


def _softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def wide(targets: np.ndarray, places: int) -> np.ndarray:
    """Targets [N,C,S] as the column ``label`` [N,C*places] float32, zero where no subclass is."""
    count, classes, splits = targets.shape
    padded = np.zeros((count, classes, places), np.float32)
    padded[..., :splits] = targets
    return padded.reshape(count, -1)


def masked(logits: Array, classes: int, places: int, splits: Any) -> Array:
    """The first C*M logits as [B,C,M], where the places from ``splits`` on have no probability."""
    grid = logits[:, : classes * places].reshape(-1, classes, places)
    return jnp.where(jnp.arange(places)[None, None] < splits, grid, -1e9)


def student_loss(
    logits: Array, batch: Batch, *, classes: int, places: int, splits: Any, heat: Any, weight: Any
) -> Array:
    """heat^2 times the cross-entropy to ``label`` at temperature ``heat``, [B] nats; plus
    ``weight`` times the mean squared distance of the logits behind the C*M from ``features``."""
    grid = masked(logits, classes, places, splits) / heat
    logp = jax.nn.log_softmax(grid.reshape(grid.shape[0], -1))
    loss = -jnp.square(heat) * (batch["label"] * logp).sum(-1)
    hint = jnp.square(logits[:, classes * places :] - batch["features"]).mean(-1)
    return loss + weight * hint


def unlike(model: Model, classes: int, places: int) -> Model:
    """``model`` whose head begins with random weights for every place but a class's first.

    No loss here can tell the subclasses of a class from one another, so that those which begin
    alike (a trunk's head begins at 0) stay alike. A run of one subclass is as it was.
    """

    def init(key: Array) -> Params:
        params = model.init(key)
        kernel = params["head"]["kernel"].reshape(-1, classes, places)
        drawn = jax.random.normal(jax.random.fold_in(key, 1), kernel.shape) / len(kernel) ** 0.5
        kernel = jnp.where(jnp.arange(places)[None, None] > 0, drawn, kernel)
        head = params["head"] | {"kernel": kernel.reshape(-1, classes * places)}
        return params | {"head": head}

    return replace(model, init=init)


def teacher_loss(
    logits: Array, batch: Batch, *, classes: int, places: int, splits: Any, weight: float
) -> Array:
    """Cross-entropy of the summed class probabilities to ``label`` [B,C], [B] nats, and for several
    subclasses ``weight`` times what keeps them apart (our reading of Mueller et al. 2020, arXiv
    2002.03936): logits, standardised per example, should be like themselves and no other's."""
    grid = masked(logits, classes, places, splits)
    logp = jax.nn.log_softmax(jax.nn.logsumexp(grid, -1))
    used = grid > -1e8
    count = used.sum((1, 2), keepdims=True)
    mean = jnp.where(used, grid, 0.0).sum((1, 2), keepdims=True) / count
    centred = jnp.where(used, grid - mean, 0.0)
    spread = jnp.sqrt(jnp.square(centred).sum((1, 2), keepdims=True) / count + 1e-6)
    unit = (centred / spread).reshape(grid.shape[0], -1)
    likeness = unit @ unit.T / count[:, 0]
    apart = jax.nn.logsumexp(likeness, -1) - jnp.diagonal(likeness)
    return -(batch["label"] * logp).sum(-1) + jnp.where(splits > 1, weight, 0.0) * apart


def named(logits: Array, classes: int, places: int, splits: Sequence[int]) -> Array:
    """The classes [len(splits), B] int8 of largest summed probability, for each number of
    subclasses that a run may have."""
    sums = [jax.nn.logsumexp(masked(logits, classes, places, s), -1) for s in splits]
    return jnp.stack(sums).argmax(-1).astype(jnp.int8)


def train(
    model: Model,
    loss: Callable[..., Array],
    tables: Sequence[Table],
    tune: Tune,
    seeds: Sequence[int],
    rows: np.ndarray,
    hyper: dict[str, np.ndarray],
    look: Callable[[Params, Batch], Any],
    data: Batch,
) -> Population:
    """One program: ``model`` under ``loss(logits, batch, **hyper)`` once per seed and table; its
    ``curve`` is ``look(params, data)`` at the end.

    Raises:
      UserError: a run that diverged.
    """

    def objective(row: dict[str, Array]) -> Objective:
        def one(params: Params, state: State, batch: Batch, key: Array):
            values = loss(forward(model, params, batch).logits, batch, **row)
            weight = jnp.full((), values.shape[0], jnp.float32)
            return values.sum(), weight, Aux({}, state.memory)

        return one

    done = population(
        *(objective, model.init, tables, tune, seeds),
        **{"hyper": hyper, "rows": rows, "axes": model.axes},
        **{"probe": look, "data": data, "points": 1},
    )
    if done.failed:
        raise UserError(f"{len(done.failed)} runs diverged, the first {done.failed[0]}: lower lrs")
    return done


def _column_space(weights: np.ndarray) -> np.ndarray:
    """Orthonormal columns [D,r] spanning those of ``weights`` [D,C]."""
    vectors, values, _ = np.linalg.svd(np.asarray(weights, np.float64), full_matrices=False)
    return vectors[:, values > 1e-6 * max(values.max(), 1e-30)]
