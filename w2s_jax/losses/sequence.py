"""The vocabulary head without ``[B, T, V]`` logits: made chunk by chunk, used, and dropped.

``token_logps`` gives log-probabilities that anything may be made of; its backward pass makes the
logits a second time. Where the loss is a weighted sum over tokens (``token_nll``,
``token_divergence``) or over rows (``response_sum``), ``head_sum`` takes the gradient of a chunk
while its logits are there, so they are made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.losses import chunks

Array = jax.Array
Tree = Any


def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    mask: Array,
    *,
    chunk: int | None = None,
    vocab: int | None = None,
) -> Array:
    """Log-probability of every target token, ``log softmax(hidden @ unembed)[target]``, in nats.

    The logits are made chunk by chunk (time steps of the whole batch, so a sharded batch stays
    sharded), multiplied in the operands' dtype and accumulated in float32. The forward keeps one
    log-sum-exp per token; the backward makes each chunk's logits again.

    Args:
      hidden: [B, T, D] final hidden states, any float dtype.
      unembed: [D, V] output matrix, any float dtype.
      targets: [B, T] integer ids, already shifted by the caller: ``targets[b, t]`` is the token
        that ``hidden[b, t]`` predicts.
      mask: [B, T]; positions with 0 give exactly 0 and no gradient, whatever their target.
      chunk: tokens whose logits exist together, rounded to whole time steps (at least one);
        None takes about 512 MB of logits per CPU device and 1 GB per accelerator.
      vocab: number of real entries when the rows of the matrix are padded; ids from ``vocab`` on
        have probability 0.

    Returns:
      [B, T] float32 log-probabilities in nats.

    Raises:
      UserError: shapes that do not fit together, or a chunk or vocab that is not positive.
    """
    _check(hidden, unembed, targets, mask, chunk, vocab)
    steps = _steps(hidden.shape[0], hidden.shape[1], unembed.shape[1], chunk)
    kept = mask > 0
    real = _real(unembed, vocab)
    logps: Any = _logps(steps, real, hidden, unembed, jnp.where(kept, targets, 0))
    return jnp.where(kept, logps, 0.0)


def token_nll(
    hidden: Array,
    unembed: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int | None = None,
    vocab: int | None = None,
) -> tuple[Array, Array]:
    """``(-sum(weights * logps), logps)`` of the arguments of ``token_logps``, in nats.

    The sum [] carries the gradient, taken chunk by chunk in the forward pass: three products with
    the matrix instead of the four of a recomputing backward. ``logps`` [B, T] is for looking at.
    """
    _check(hidden, unembed, targets, weights, chunk, vocab)
    kept = weights != 0
    columns = (jnp.where(kept, targets, 0), weights)

    def nll(logits: Array, columns: Tree) -> tuple[Array, Array]:
        targets, weights = columns
        logps = jnp.where(weights != 0, pick(logits, targets), 0.0)
        return -(weights * logps).sum(), logps

    return head_sum(nll, hidden, unembed, columns, chunk=chunk, vocab=vocab)


def token_divergence(
    student: tuple[Array, Array],
    teacher: Tree,
    weights: Array,
    divergence: Callable[..., Any],
    *,
    targets: Tree = None,
    chunk: int | None = None,
    vocab: int | None = None,
) -> tuple[Array, Tree]:
    """``(sum(weights * d), d)`` with ``d`` [B, T] a divergence of two next-token distributions.

    Args:
      student: ``(hidden [B,T,D], unembed [D,V])``; the sum carries their gradient.
      teacher: ``(hidden [B,T,E], unembed [E,W])`` of a live teacher, whose logits are made chunk
        by chunk as well, a list of such pairs, or a dict of columns [B,T,...] (a stored teacher).
        No gradient reaches it.
      weights: [B, T].
      divergence: ``(student_logits, teacher) -> [...]`` nats per token, where ``student_logits``
        are [..., V] and ``teacher`` is logits [..., V] float32, a list of those, or the chunk of
        those columns. Of a tuple the first is summed, all are returned.
      targets: [B, T] ids, or a tree of such columns, which ``divergence`` then has as a third
        argument [...].
      chunk: see ``token_logps``; a live teacher's logits count as well.
      vocab: number of real tokens; both sides' further entries have probability 0.

    Raises:
      UserError: see ``token_logps``; a live teacher whose vocabulary is another.
    """
    hidden, unembed = student
    live = not isinstance(teacher, dict)
    several = isinstance(teacher, list)
    matrices: list[Any] = []
    if live:
        pairs = teacher if several else [teacher]
        teacher, matrices = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for matrix in matrices:
            vocab = _common(unembed.shape[1], matrix.shape[1], vocab)
    _check(hidden, unembed, weights, weights, chunk, vocab)
    if chunk is None and live:
        chunk = _chunk(unembed.shape[1] + sum(matrix.shape[1] for matrix in matrices))

    def total(logits: Array, columns: Tree) -> tuple[Array, Tree]:
        said, weights, targets = columns
        if live:
            width, parts = logits.shape[-1], zip(said, matrices, strict=True)
            said = [_widened(_logits(h, m, _real(m, vocab)), width) for h, m in parts]
            said = said if several else said[0]
        parts = (logits, said) if targets is None else (logits, said, targets)
        values = jax.tree.map(lambda v: jnp.where(weights != 0, v, 0.0), divergence(*parts))
        first = values[0] if isinstance(values, tuple) else values
        return (weights * first).sum(), values

    columns = jax.lax.stop_gradient((teacher, weights, targets))
    return head_sum(total, hidden, unembed, columns, chunk=chunk, vocab=vocab)


def _widened(logits: Array, width: int) -> Array:
    """Logits [..., W] cut or padded to ``width`` entries; the added ones have no probability."""
    short = width - logits.shape[-1]
    if short <= 0:
        return logits[..., :width]
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, short)]
    return jnp.pad(logits, padding, constant_values=EXCLUDED)


def response_sum(
    fn: Callable[..., tuple[Array, Tree]],
    hidden: Array,
    unembed: Array,
    targets: Array,
    mask: Array,
    columns: Tree,
    *,
    whole: bool = True,
    token: Callable[[Array], Array] | None = None,
    chunk: int | None = None,
    vocab: int | None = None,
) -> tuple[Array, Tree]:
    """``sum of fn(logps [n,T], columns [n,...])`` over groups of n whole rows, and its values.

    For losses of whole responses (DPO and its family) that are sums over the rows of a batch:
    ``fn`` gives ``(sum [], values)`` where values are [n, ...] and carry no gradient. With
    ``token``, a number per token from its logits [..., V] -> [...], ``fn`` has those [n,T] (0 where
    the mask is), without a gradient, as a third argument. When not even one row's logits fit in a
    chunk, ``token_logps`` with its second making of the logits takes over; ``whole`` False is for
    sums over tokens, which may be cut anywhere. Arguments as ``token_logps``.
    """
    _check(hidden, unembed, targets, mask, chunk, vocab)
    kept = mask > 0
    targets = jnp.where(kept, targets, 0)
    width, (batch, length) = unembed.shape[1], targets.shape
    groups = _groups(batch, length, chunk or _chunk(width)) if whole else 0
    if groups is None:
        logps = token_logps(hidden, unembed, targets, mask, chunk=chunk, vocab=vocab)
        if token is None:
            return fn(logps, columns)
        look = partial(_look, token)
        told = head_sum(look, hidden, unembed, (), chunk=chunk, vocab=vocab)[1]
        return fn(logps, columns, jnp.where(kept, told, 0.0))

    def total(logits: Array, columns: Tree) -> tuple[Array, Tree]:
        targets, kept, columns = columns
        logps = jnp.where(kept, pick(logits, targets), 0.0)
        if token is None:
            return fn(logps, columns)
        told = token(jax.lax.stop_gradient(logits))
        return fn(logps, columns, jnp.where(kept, told, 0.0))

    columns = (targets, kept, columns)
    return head_sum(total, hidden, unembed, columns, chunk=chunk, vocab=vocab, groups=groups)


def _look(token: Callable[[Array], Array], logits: Array, _: Tree) -> tuple[Array, Array]:
    return jnp.zeros(()), token(logits)


def token_stats(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    chunk: int | None = None,
    vocab: int | None = None,
) -> dict[str, Array]:
    """``logp``, ``entropy`` (nats) and ``top1`` (1 where the target is most likely), each [B, T]
    float32; for looking at, without a gradient. Arguments as ``token_logps``."""
    _check(hidden, unembed, targets, targets, chunk, vocab)

    def stats(logits: Array, columns: Tree) -> tuple[Array, dict[str, Array]]:
        logps = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(logps, columns[..., None], axis=-1)[..., 0]
        entropy = -jnp.where(jnp.isfinite(logps), jnp.exp(logps) * logps, 0.0).sum(-1)
        top1 = (logits.argmax(-1) == columns).astype(jnp.float32)
        return jnp.zeros(()), {"logp": logp, "entropy": entropy, "top1": top1}

    return head_sum(stats, hidden, unembed, targets, chunk=chunk, vocab=vocab)[1]


def head_sum(
    fn: Callable[[Array, Tree], tuple[Array, Tree]],
    hidden: Array,
    unembed: Array,
    columns: Tree,
    *,
    chunk: int | None = None,
    vocab: int | None = None,
    groups: int = 0,
) -> tuple[Array, Tree]:
    """``sum of fn(logits, columns)`` over chunks of a batch; gradient taken as the logits pass.

    Args:
      fn: ``(logits [b,t,V] float32, columns [b,t,...]) -> (sum [], values)``: any function whose
        total over the batch is the sum over chunks. Values [b,t,...] carry no gradient.
      hidden, unembed: [B,T,D] and [D,V]; the returned sum carries their gradient and no other.
      columns: tree of [B,T,...].
      chunk: tokens whose logits exist together (see ``token_logps``).
      groups: cut the batch into this many groups of whole rows rather than into time steps.

    Returns:
      The sum [] float32 and the values, joined to [B,T,...].
    """
    real = _real(unembed, vocab)
    batch, length, _ = hidden.shape
    frozen = jax.lax.stop_gradient((hidden, unembed, columns))

    def one(matrix: Array, hidden: Array, columns: Tree):
        logits = _logits(hidden, matrix, real)
        total, pull, values = jax.vjp(lambda z: fn(z, columns), logits, has_aux=True)
        (d_logits,) = pull(jnp.ones_like(total))
        d_hidden, d_unembed = _products(d_logits, hidden, matrix)
        return total, values, d_hidden, d_unembed

    steps = _steps(batch, length, unembed.shape[1], chunk)
    if groups == 1 or (not groups and steps >= length):
        total, values, d_hidden, d_unembed = one(frozen[1], frozen[0], frozen[2])
    else:
        split, join = partial(chunks.split, steps=steps), partial(chunks.join, length=length)
        if groups:
            split, join = partial(chunks.deal, groups=groups), chunks.gather

        def body(carry: tuple[Array, Array], x: Tree):
            total, values, d_hidden, d_unembed = one(frozen[1], *x)
            return (carry[0] + total, carry[1] + d_unembed), (values, d_hidden)

        xs = jax.tree.map(split, (frozen[0], frozen[2]))
        zero = (jnp.zeros(()), jnp.zeros(unembed.shape, jnp.float32))
        (total, d_unembed), ys = jax.lax.scan(body, zero, xs)
        values, d_hidden = jax.tree.map(join, ys)
    d_unembed = d_unembed.astype(unembed.dtype)
    return _attach(total, hidden, unembed, d_hidden, d_unembed), jax.lax.stop_gradient(values)


@jax.custom_vjp
def _attach(total: Array, hidden: Array, unembed: Array, d_hidden: Array, d_unembed: Array):
    """``total``, known to have the gradients ``d_hidden`` and ``d_unembed``."""
    return total


def _attach_forward(total, hidden, unembed, d_hidden, d_unembed):
    return total, (d_hidden, d_unembed)


def _attach_backward(saved, grad):
    d_hidden, d_unembed = saved
    scaled = tuple((grad * d.astype(jnp.float32)).astype(d.dtype) for d in saved)
    return None, *scaled, jnp.zeros_like(d_hidden), jnp.zeros_like(d_unembed)


_attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def pick(logits: Array, targets: Array) -> Array:
    """``log_softmax(logits)[target]``, [..., V] and [...] -> [...]."""
    return _pick_forward(logits, targets)[0]


def _pick_forward(logits: Array, targets: Array) -> tuple[Array, Any]:
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - total, (logits, targets, total)


def _pick_backward(saved: Any, grad: Array) -> tuple[Array, None]:
    # compared with an iota: the scatter that a gather transposes to would pass over memory again
    logits, targets, total = saved
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    hit = ids == targets[..., None]
    return grad[..., None] * (hit - jnp.exp(logits - total[..., None])), None


pick.defvjp(_pick_forward, _pick_backward)


def _check(
    hidden: Any, unembed: Any, targets: Any, mask: Any, chunk: int | None, vocab: int | None
) -> None:
    if hidden.ndim != 3 or unembed.ndim != 2 or hidden.shape[2] != unembed.shape[0]:
        raise UserError(
            f"token_logps needs hidden [B,T,D] and unembed [D,V], got {hidden.shape} and "
            f"{unembed.shape}"
        )
    if targets.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        raise UserError(
            f"token_logps needs targets and mask of shape {hidden.shape[:2]}, got "
            f"{targets.shape} and {mask.shape}"
        )
    if (chunk is not None and chunk < 1) or (vocab is not None and vocab < 1):
        raise UserError(f"token_logps: chunk and vocab must be positive, got {chunk} and {vocab}")


def _common(ours: int, theirs: int, vocab: int | None) -> int | None:
    """The number of real tokens that a student and a teacher matrix share."""
    if vocab is None and ours != theirs:
        raise UserError(
            f"the student has {ours} tokens, the teacher {theirs}: pass vocab= when the rest is "
            "padding of one tokenizer, else use sequence-level distillation"
        )
    if vocab is not None and vocab > min(ours, theirs):
        raise UserError(f"vocab={vocab} is more than the student's {ours} or teacher's {theirs}")
    return vocab


def _real(unembed: Array, vocab: int | None) -> int | None:
    return None if vocab is None or vocab >= unembed.shape[1] else vocab


def _chunk(width: int) -> int:
    """Tokens whose logits may exist together, over all devices of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()  # its devices need not be at hand (train.plan)
    platform = getattr(mesh.abstract_device, "platform", None) or jax.default_backend()
    limit = LIMIT["cpu" if platform == "cpu" else "accelerator"]
    return max(1, limit * max(mesh.size, 1) // (4 * width))


EXCLUDED = -1e30  # logits of padding rows: no probability, and finite, so that 0 times it is 0
# bytes of float32 logits per device
LIMIT = {"cpu": 2**29, "accelerator": 2**30}


def _steps(batch: int, length: int, width: int, chunk: int | None) -> int:
    """Time steps per chunk, evened out so that the last chunk is padded least."""
    chunk = chunk or _chunk(width)
    steps = max(1, min(length, chunk // max(batch, 1)))
    count = -(-length // steps) if length else 1
    return -(-length // count)


def _groups(batch: int, length: int, chunk: int) -> int | None:
    """The fewest equal groups of rows whose tokens fit in a chunk; None when one row does not."""
    ways = math.gcd(batch, max(jax.sharding.get_abstract_mesh().size, 1))
    for groups in range(1, batch // ways + 1):
        if batch % (groups * ways) == 0 and batch // groups * length <= chunk:
            return groups
    return None


def _logits(hidden: Array, unembed: Array, vocab: int | None) -> Array:
    logits = jnp.einsum("btd,dv->btv", hidden, unembed, preferred_element_type=jnp.float32)
    if vocab is not None:
        real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) < vocab
        logits = jnp.where(real, logits, EXCLUDED)
    return logits


def _products(d_logits: Array, hidden: Array, unembed: Array) -> tuple[Array, Array]:
    """Gradients of a chunk's hidden states (in their dtype) and of the matrix (float32)."""
    # The two products run in the dtype of the weights, as the forward does.
    d_logits = d_logits.astype(jnp.promote_types(hidden.dtype, unembed.dtype))
    d_hidden = jnp.einsum("btv,dv->btd", d_logits, unembed, preferred_element_type=jnp.float32)
    d_unembed = jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_unembed


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logps(steps: int, vocab: int | None, hidden: Array, unembed: Array, targets: Array) -> Array:
    return _forward(steps, vocab, hidden, unembed, targets)[0]


def _forward(
    steps: int, vocab: int | None, hidden: Array, unembed: Array, targets: Array
) -> tuple[Array, Any]:
    def one(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logps, (_, _, total) = _pick_forward(_logits(hidden, unembed, vocab), targets)
        return logps, total

    length = hidden.shape[1]
    if steps >= length:
        logps, total = one(hidden, targets)
    else:
        xs = (chunks.split(hidden, steps), chunks.split(targets, steps))
        _, ys = jax.lax.scan(lambda _, x: (None, one(*x)), None, xs)
        logps, total = (chunks.join(y, length) for y in ys)
    return logps, (hidden, unembed, targets, total)


def _backward(steps: int, vocab: int | None, saved: Any, grad: Array) -> tuple[Array, Array, None]:
    hidden, unembed, targets, total = saved

    def one(hidden: Array, targets: Array, total: Array, grad: Array) -> tuple[Array, Array]:
        logits = _logits(hidden, unembed, vocab)
        return _products(_pick_backward((logits, targets, total), grad)[0], hidden, unembed)

    length = hidden.shape[1]
    if steps >= length:
        d_hidden, d_unembed = one(hidden, targets, total, grad)
        return d_hidden, d_unembed.astype(unembed.dtype), None

    def body(d_unembed: Array, x: Any) -> tuple[Array, Array]:
        d_hidden, more = one(*x)
        return d_unembed + more, d_hidden

    xs = tuple(chunks.split(x, steps) for x in (hidden, targets, total, grad))
    d_unembed, d_hidden = jax.lax.scan(body, jnp.zeros(unembed.shape, jnp.float32), xs)
    return chunks.join(d_hidden, length), d_unembed.astype(unembed.dtype), None


_logps.defvjp(_forward, _backward)
