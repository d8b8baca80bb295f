"""Vision trunks and augmentation: torch computes the same, gradients are finite, taps in order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data import augment
from w2s_jax.errors import UserError
from w2s_jax.losses.classification import soft_xent
from w2s_jax.mesh import make_mesh, shardings
from w2s_jax.models import trunks
from w2s_jax.models.trunks import Cnn, Mlp, ResNet, Vit, trunk
from w2s_jax.objectives import classify, distill_classes
from w2s_jax.objectives.augmented import augmented
from w2s_jax.train.fit import fit, start
from w2s_jax.train.optim import Tune, optimizer
from w2s_jax.train.population import population
from w2s_jax.types import Aux, Table, forward

SIDE = (8, 8, 2)
CONFIGS = {
    "mlp": Mlp(SIDE, 3, (12, 6)),
    "cnn": Cnn(SIDE, 3, (4, 6)),
    "resnet": ResNet(SIDE, 3, depth=8, width=4, groups=2),
    "vit": Vit(SIDE, 3, width=8, layers=2, heads=2),
    "vit_cls": Vit(SIDE, 3, width=8, layers=1, heads=2, pool="cls"),
}
SHAPES = {
    "mlp": [(5, 12), (5, 6)],
    "cnn": [(5, 8, 8, 4), (5, 4, 4, 6), (5, 6)],
    "resnet": [(5, 8, 8, 4), (5, 4, 4, 8), (5, 2, 2, 16), (5, 16)],
    "vit": [(5, 4, 8), (5, 4, 8), (5, 8)],
    "vit_cls": [(5, 5, 8), (5, 8)],
}


def pictures(count: int = 5, shape=SIDE) -> jax.Array:
    return jax.random.uniform(jax.random.key(7), (count, *shape))


def drawn(config):
    """The model with weights that are nowhere zero, so that every part of it matters."""
    model = trunk(config)
    params = model.init(jax.random.key(1))
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return model, jax.tree.unflatten(form, moved)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("resnet", "vit")))
        for name in CONFIGS
    ],
)
def test_logits_are_the_head_on_the_last_tap(name) -> None:
    model, params = drawn(CONFIGS[name])
    image = pictures()

    def square(params, image):
        out = forward(model, params, {"image": image})
        return jnp.square(out.logits).sum(), out

    run = jax.jit(jax.grad(square, has_aux=True))
    grads, out = run(params, image)
    assert [tap.shape for tap in out.taps] == SHAPES[name]
    head = params["head"]
    logits = np.asarray(out.taps[-1]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])[None]
    np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-5)
    # an output depends on its picture alone: no statistics of the batch
    np.testing.assert_allclose(run(params, image[::-1])[1].logits[::-1], out.logits, atol=1e-4)
    assert trunk(CONFIGS[name]) is model
    sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(grads)]
    assert np.isfinite(sizes).all() and min(sizes) > 0
    shardings(model.axes, make_mesh("data=8"), params)  # every axis name is known


def test_a_fresh_head_says_nothing() -> None:
    model = trunk(CONFIGS["cnn"])
    out = forward(model, model.init(jax.random.key(0)), {"image": pictures()})
    assert not np.any(out.logits) and np.any(out.taps[-1])


def test_bytes_are_pixels_out_of_255() -> None:
    model, params = drawn(CONFIGS["mlp"])
    image = np.arange(128, dtype=np.uint8).reshape(1, *SIDE)
    floats = forward(model, params, {"image": jnp.asarray(image / np.float32(255))}).logits
    np.testing.assert_allclose(forward(model, params, {"image": image}).logits, floats, rtol=1e-5)


def test_half_precision_is_close() -> None:
    model, params = drawn(Vit(SIDE, 3, width=8, layers=1, heads=2))
    half = trunk(Vit(SIDE, 3, width=8, layers=1, heads=2, dtype="bfloat16"))
    exact, out = (jax.jit(one.apply)(params, pictures()) for one in (model, half))
    assert out.logits.dtype == jnp.float32 and out.taps[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(out.logits, exact.logits, atol=0.1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (7, 5)])
def test_convolution_by_columns_is_torchs(stride, shape) -> None:
    torch = pytest.importorskip("torch")
    x = pictures(2, (*shape, 3))
    kernel = jax.random.normal(jax.random.key(3), (3, 3, 3, 4))
    theirs = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1),
        stride=stride,
        padding=1,
    ).permute(0, 2, 3, 1)
    for how in ("xla", "columns"):
        mine = trunks.convolve(x, kernel, stride, how)
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_residual_network_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    model, params = drawn(CONFIGS["resnet"])
    f, body = torch.nn.functional, jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)

    def normed(x, layer, stride):
        x = f.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), stride=stride, padding=1)
        return f.group_norm(x, 2, layer["scale"], layer["bias"])

    x = torch.tensor(np.asarray(pictures())).permute(0, 3, 1, 2)
    x = f.relu(normed(x, body["body"]["stem"], 1))
    for number, ((first, second),) in enumerate(body["body"]["stages"]):
        y = normed(f.relu(normed(x, first, 2 if number else 1)), second, 1)
        x = x[:, :, ::2, ::2] if number else x
        x = f.relu(y + f.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))
    logits = x.mean((2, 3)) @ body["head"]["kernel"] + body["head"]["bias"]
    mine = forward(model, params, {"image": pictures()}).logits
    np.testing.assert_allclose(mine, logits.numpy(), rtol=1e-3, atol=1e-3)


def test_transformer_block_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    model, params = drawn(CONFIGS["vit_cls"])
    body = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params["body"])
    (layer,) = body["blocks"]
    block = torch.nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    names = {"self_attn.out_proj": "out", "linear1": "up", "linear2": "down"}
    weights = {
        "self_attn.in_proj_weight": layer["qkv"]["kernel"].mT,
        "self_attn.in_proj_bias": layer["qkv"]["bias"],
    }
    for theirs, mine in names.items():
        weights[f"{theirs}.weight"] = layer[mine]["kernel"].mT
        weights[f"{theirs}.bias"] = layer[mine]["bias"]
    for number in (1, 2):
        weights[f"norm{number}.weight"] = layer[f"norm_{number}"]["scale"]
        weights[f"norm{number}.bias"] = layer[f"norm_{number}"]["bias"]
    block.load_state_dict(weights)
    x = torch.tensor(np.asarray(pictures())).permute(0, 3, 1, 2)
    kernel = body["patches"]["kernel"].reshape(4, 4, 2, 8).permute(3, 2, 0, 1)
    x = torch.nn.functional.conv2d(x, kernel, body["patches"]["bias"], stride=4)
    x = torch.cat([body["cls"].expand(5, 1, 8), x.flatten(2).transpose(1, 2)], 1)
    with torch.no_grad():
        x = block(x + body["positions"])
        norm = (body["norm"]["scale"], body["norm"]["bias"])
        last = torch.nn.functional.layer_norm(x[:, 0], (8,), *norm, 1e-6)
    out = forward(model, params, {"image": pictures()})
    np.testing.assert_allclose(out.taps[0], x.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(out.taps[1], last.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cnn((3, 8, 1), 2), "too small for 3 stages"),
        (lambda: ResNet((3, 3, 1), 2), "too small for 3 stages"),
        (lambda: ResNet(SIDE, 2, depth=18), "not 6 n"),
        (lambda: ResNet(SIDE, 2, width=6), "do not divide"),
        (lambda: Vit(SIDE, 2, patch=3), "do not tile"),
        (lambda: Vit(SIDE, 2, width=6), "do not divide"),
        (lambda: Vit(SIDE, 2, pool="max"), "mean, cls"),
        (lambda: Mlp(SIDE, 0), "1 or more"),
        (lambda: Mlp(SIDE, 2, dtype="float8"), "float32 or bfloat16"),
        (lambda: Cnn(SIDE, 2, conv="fft"), "auto, xla, columns"),
    ],
)
def test_shapes_that_do_not_fit_are_told(make, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_pictures_of_another_shape_are_refused() -> None:
    model, params = drawn(CONFIGS["mlp"])
    with pytest.raises(UserError, match="Mlp is made for pictures 8x8x2, got 4x4x1"):
        forward(model, params, {"image": pictures(2, (4, 4, 1))})


@pytest.mark.slow
def test_a_population_of_networks_equals_single_runs() -> None:
    model = trunk(Cnn(SIDE, 2, (4,)))
    label = np.eye(2, dtype=np.float32)[np.arange(12) % 2]
    table = Table({"image": np.asarray(pictures(12)), "label": label})
    tune = Tune(lr=1e-2, batch=4, steps=3)
    objective = classify(model, soft_xent)
    both = population(objective, model.init, table, tune, [0, 1], mode="vmap")
    alone = fit(
        objective,
        model.init(jax.random.key(1)),
        table,
        tune,
        jax.random.key(1),
        axes=model.axes,
        progress=False,
    )
    for mine, theirs in zip(*map(jax.tree.leaves, (both.run(1)[0], alone.params)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_crop_is_a_shift_with_zeros() -> None:
    image = jnp.arange(1.0, 37.0).reshape(1, 6, 6, 1)
    padded = np.pad(np.asarray(image)[0, ..., 0], 2)
    windows = [padded[i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    seen = set()
    crop = jax.jit(partial(augment.crop, padding=2))
    for seed in range(60):
        got = np.asarray(crop(jax.random.key(seed), image))[0, ..., 0]
        (which,) = [n for n, window in enumerate(windows) if np.array_equal(window, got)]
        seen.add(which)
    assert len(seen) > 15  # of 25 places
    assert np.array_equal(augment.crop(jax.random.key(0), image, padding=0), image)


def test_flips_and_holes() -> None:
    image = pictures(64)
    flipped = np.asarray(augment.flip(jax.random.key(0), image))
    mirrored = np.array_equal
    kinds = [
        (mirrored(b, a), mirrored(b, a[:, ::-1]))
        for a, b in zip(np.asarray(image), flipped, strict=True)
    ]
    assert all(one != other for one, other in kinds)
    assert 15 < sum(other for _, other in kinds) < 49
    holed = np.asarray(augment.cutout(jax.random.key(1), image, side=4))
    gone = (holed == 0).all(-1).sum((1, 2))
    assert gone.max() == 16 and gone.min() >= 4  # a quarter is left at a corner
    assert np.array_equal(holed[holed != 0], np.asarray(image)[holed != 0])


def test_teacher_and_student_see_one_augmented_picture() -> None:
    model, params = drawn(CONFIGS["mlp"])
    image = pictures(4)
    state = start(params, optimizer(Tune(), 1), 1, frozen={"teacher": params})
    change = augment.chain(augment.flip, partial(augment.crop, padding=2))

    def gap(mine, theirs):
        return jnp.square(mine - theirs).sum(-1)

    objective = augmented(distill_classes(model, gap, teacher=model), change)
    total, _, _ = objective(params, state, {"image": image}, jax.random.key(0))
    assert total == 0.0  # the same weights on the same pictures

    def shown(params, state, batch, key):
        return (
            batch["image"].sum(),
            jnp.ones(()),
            Aux({"image": (batch["image"], jnp.ones(()))}, ()),
        )

    seen = [
        augmented(shown, change)(params, state, {"image": image}, jax.random.key(seed))[2]
        for seed in (0, 0, 1)
    ]
    first, again, other = (np.asarray(aux.metrics["image"][0]) for aux in seen)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    with pytest.raises(UserError, match="column 'image'"):
        objective(params, state, {"features": image}, jax.random.key(0))
