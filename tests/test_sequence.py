import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from w2s_jax.errors import UserError
from w2s_jax.losses.sequence import token_logps

B, T, D, V = 3, 7, 5, 11


def example(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    unembed = jax.random.normal(keys[1], (D, V), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = (jax.random.uniform(keys[3], (B, T)) < 0.7).astype(jnp.float32)
    weights = jax.random.normal(keys[4], (B, T))
    return hidden, unembed, targets, mask, weights


def plain(hidden, unembed, targets, mask):
    logits = jnp.einsum("btd,dv->btv", hidden, unembed, preferred_element_type=jnp.float32)
    logps = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logps, targets[..., None], -1)[..., 0] * mask


@pytest.mark.parametrize("chunk", [None, 1, 3, 6, 9, 12, 1000])
@pytest.mark.parametrize("jit", [False, True])
def test_values_and_gradients_are_those_of_the_plain_form(chunk, jit):
    hidden, unembed, targets, mask, weights = example()

    def loss(f, hidden, unembed, **kw):
        return (f(hidden, unembed, targets, mask, **kw) * weights).sum()

    def ours(hidden, unembed):
        return loss(token_logps, hidden, unembed, chunk=chunk)

    both = jax.value_and_grad(ours, argnums=(0, 1))
    value, grads = (jax.jit(both) if jit else both)(hidden, unembed)
    want, want_grads = jax.value_and_grad(lambda h, u: loss(plain, h, u), argnums=(0, 1))(
        hidden, unembed
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_by_hand():
    # logits are (0, ln 3): probabilities 1/4 and 3/4.
    hidden = jnp.ones((1, 2, 1))
    unembed = jnp.array([[0.0, jnp.log(3.0)]])
    got = token_logps(hidden, unembed, jnp.array([[0, 1]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(got, np.log([[0.25, 0.75]]), rtol=1e-6)


def test_uniform_logits_give_minus_log_v():
    got = token_logps(
        jnp.zeros((2, 3, D)), jnp.ones((D, V)), jnp.zeros((2, 3), int), jnp.ones((2, 3))
    )
    np.testing.assert_allclose(got, np.full((2, 3), -np.log(V)), rtol=1e-6)


def test_bfloat16_operands_accumulate_in_float32():
    hidden, unembed, targets, mask, weights = example(jnp.bfloat16)
    got = token_logps(hidden, unembed, targets, mask, chunk=6)
    assert got.dtype == jnp.float32
    wide = plain(hidden.astype(jnp.float32), unembed.astype(jnp.float32), targets, mask)
    np.testing.assert_allclose(got, wide, atol=1e-5)

    def loss(h, u):
        return (token_logps(h, u, targets, mask, chunk=6) * weights).sum()

    grads = jax.grad(loss, argnums=(0, 1))(hidden, unembed)
    wants = jax.grad(lambda h, u: (plain(h, u, targets, mask) * weights).sum(), argnums=(0, 1))(
        hidden.astype(jnp.float32), unembed.astype(jnp.float32)
    )
    for grad, want in zip(grads, wants, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(grad.astype(jnp.float32), want, atol=0.05)


@pytest.mark.parametrize("chunk", [None, 6])
def test_masked_tokens_have_no_value_and_exactly_no_gradient(chunk):
    hidden, unembed, targets, mask, weights = example()
    targets = jnp.where(mask > 0, targets, -100)  # the usual ignore index must be harmless

    def loss(hidden, unembed, mask):
        return (token_logps(hidden, unembed, targets, mask, chunk=chunk) * weights).sum()

    d_hidden = jax.grad(loss)(hidden, unembed, mask)
    assert np.all(np.asarray(d_hidden)[np.asarray(mask) == 0] == 0)
    assert np.all(np.abs(np.asarray(d_hidden)[np.asarray(mask) == 1]).sum(-1) > 0)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembed, jnp.zeros((B, T)))
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_the_mask_selects_and_does_not_scale():
    hidden, unembed, targets, mask, _ = example()
    whole = token_logps(hidden, unembed, targets, mask)
    np.testing.assert_array_equal(token_logps(hidden, unembed, targets, 0.5 * mask), whole)


def test_padded_vocabulary_rows_have_no_probability_and_no_gradient():
    hidden, unembed, targets, mask, weights = example()
    targets = targets % 8

    def loss(hidden, unembed, **kw):
        return (token_logps(hidden, unembed, targets, mask, chunk=6, **kw) * weights).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    value, (d_hidden, d_unembed) = both(hidden, unembed, vocab=8)
    want, (want_hidden, want_unembed) = both(hidden, unembed[:, :8])
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, want_hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_unembed[:, :8], want_unembed, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(d_unembed)[:, 8:] == 0)


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


def largest(chunk):
    hidden, unembed, targets, mask, weights = example()

    def loss(hidden, unembed):
        return (token_logps(hidden, unembed, targets, mask, chunk=chunk) * weights).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, unembed)
    return max(np.prod(s, dtype=int) for s in shapes(jaxpr.jaxpr) if V in s)


def test_the_gradient_never_holds_all_tokens_times_vocabulary():
    assert largest(None) == B * T * V
    assert largest(6) == max(2 * B * V, D * V)
    assert largest(1) == max(B * V, D * V)  # a chunk is at least one time step of the batch


def test_vmap_over_runs_equals_a_loop():
    hidden, unembed, targets, mask, _ = example()
    runs = jnp.stack([unembed, 2 * unembed])

    def loss(unembed):
        return token_logps(hidden, unembed, targets, mask, chunk=6).sum()

    together = jax.vmap(jax.grad(loss))(runs)
    one_by_one = jnp.stack([jax.grad(loss)(u) for u in runs])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_a_sharded_batch_stays_sharded_through_the_chunks():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    hidden, unembed, targets, mask, _ = (jnp.concatenate([x] * 4) for x in example())
    unembed = unembed[:D]

    def loss(hidden, unembed, targets, mask):
        return token_logps(hidden, unembed, targets, mask, chunk=24).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    want = step(hidden, unembed, targets, mask)
    placed = [jax.device_put(x, rows) for x in (hidden, targets, mask)]
    program = step.lower(placed[0], unembed, *placed[1:]).compile()
    assert "all-gather" not in program.as_text()
    got = program(placed[0], unembed, *placed[1:])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": jnp.zeros((B, T, D + 1))},
        {"targets": jnp.zeros((B, T - 1), int)},
        {"mask": jnp.zeros((B,))},
        {"chunk": 0},
        {"vocab": 0},
    ],
)
def test_shapes_that_do_not_fit_are_said_in_one_line(change):
    hidden, unembed, targets, mask, _ = example()
    good = {"hidden": hidden, "unembed": unembed, "targets": targets, "mask": mask}
    with pytest.raises(UserError, match="token_logps") as caught:
        token_logps(**{**good, **change})
    assert "\n" not in str(caught.value)
