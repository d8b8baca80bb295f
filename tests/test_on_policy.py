"""Sampling inside the step, and the objectives that train on it, by hand and by enumeration."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inside_world import asked, close, state
from jax.extend.core import jaxprs_in_params

from w2s_jax import mesh as meshes
from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.generate.inside import ask, respond
from w2s_jax.generate.sample import sample
from w2s_jax.losses.classification import ramp
from w2s_jax.losses.distillation import forward_kl, reverse_kl
from w2s_jax.models.lora import adapters, lora, merge
from w2s_jax.models.transformer import Config, decode, transformer
from w2s_jax.objectives import distill, minillm, on_base, on_policy, sequence_kl
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Model, Output, Table

CONFIG = Config(vocab=46, width=16, layers=1, heads=2, max_length=64)
MODEL = transformer(CONFIG)
TEACHER = transformer(dataclasses.replace(CONFIG, width=32))
WIDER = transformer(dataclasses.replace(CONFIG, vocab=50))
KEY = jax.random.key(5)
PROMPTS = [[3], [7, 1, 9, 30, 2], [11, 4], [8, 8, 8]]
NEW, EOS = 6, 40
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def params():
    """Random weights, large enough for peaked and prompt-dependent predictions."""
    return jax.tree.map(lambda leaf: 2.0 * leaf, MODEL.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def frozen():
    return {"teacher": jax.tree.map(lambda leaf: 2.0 * leaf, TEACHER.init(jax.random.key(2)))}


draws = jax.jit(partial(respond, MODEL, tokens=NEW, eos=EOS))


@pytest.fixture(scope="module")
def said(params):
    return jax.device_get(draws(params, asked(PROMPTS), KEY))


def responses(said) -> list[list[int]]:
    lengths = said["targets"]["mask"].sum(-1).astype(int)
    return [row[:n].tolist() for row, n in zip(said["targets"]["ids"], lengths, strict=True)]


# --- responses drawn inside a step ----------------------------------------------------------------


@pytest.mark.slow
def test_greedy_is_what_generation_on_the_host_gives(params) -> None:
    host = sample(MODEL, params, PROMPTS, KEY, tokens=NEW, temperature=0.0)
    stop = (host[1][2], host[2][4])
    greedy = partial(respond, MODEL, tokens=NEW, temperature=0.0, eos=stop)
    cut = responses(jax.device_get(jax.jit(greedy)(params, asked(PROMPTS), KEY)))
    whole = [next((row[: i + 1] for i, t in enumerate(row) if t in stop), row) for row in host]
    assert cut == whole and cut != host, "the token that ends a response is part of it"
    assert len({tuple(row) for row in cut}) == len(PROMPTS), "the prompts must matter"


def test_rows_are_prompt_and_response_from_place_0(said) -> None:
    for prompt, row, ids, at, mask in zip(
        PROMPTS, said["tokens"], responses(said), said["targets"]["at"], said["targets"]["mask"],
        strict=True,
    ):  # fmt: skip
        text = [*prompt, *ids]
        assert row.tolist() == text + [0] * (len(row) - len(text))
        for place, token in zip(at[mask > 0], ids, strict=True):
            assert row[place + 1] == token, "a place predicts what stands after it"
        assert at[0] == len(prompt) - 1


def test_the_sampler_and_training_agree_on_log_probabilities(params, said) -> None:
    logps = jax.nn.log_softmax(decode(jax.jit(MODEL.apply)(params, said["tokens"])), axis=-1)
    targets = said["targets"]
    at = np.take_along_axis(np.asarray(logps), targets["at"][..., None], axis=1)
    own = np.take_along_axis(at, targets["ids"][..., None], axis=2)[..., 0] * targets["mask"]
    np.testing.assert_allclose(said["policy"]["old"], own, atol=1e-4)
    assert (said["policy"]["old"][targets["mask"] > 0] < 0).all()


def test_a_row_depends_on_its_place_and_prompt_alone(params, said) -> None:
    others = [[5, 5, 5, 5], PROMPTS[1], [], PROMPTS[3]]
    got = jax.device_get(draws(params, asked(others), KEY))
    mine, theirs = responses(got), responses(said)
    assert (mine[1], mine[3]) == (theirs[1], theirs[3])
    assert mine[2] == [] and not got["targets"]["mask"][2].any(), "no prompt, no response"
    same = responses(jax.device_get(draws(params, asked([PROMPTS[1]] * 4), KEY)))
    assert len(set(map(tuple, same))) > 1 and same[1] == theirs[1]


@pytest.mark.slow
def test_the_width_of_the_padding_does_not_matter(params, said) -> None:
    padded = jax.device_get(draws(params, asked(PROMPTS, width=9), KEY))
    assert responses(padded) == responses(said)
    assert (padded["targets"]["at"] == said["targets"]["at"]).all()


@pytest.mark.slow
def test_runs_drawn_together_are_those_drawn_apart(params) -> None:
    keys = jax.random.split(KEY, 3)
    both = jax.tree.map(lambda a, b, c: jnp.stack([a, b, c]), params, _scaled(params), params)
    run = partial(respond, MODEL, asked=asked(PROMPTS), tokens=NEW, eos=EOS)
    together = jax.jit(jax.vmap(lambda p, k: run(p, key=k)))
    got = jax.device_get(together(both, keys))
    for i, one in enumerate((params, _scaled(params), params)):
        want = jax.device_get(draws(one, asked(PROMPTS), keys[i]))
        assert (got["tokens"][i] == want["tokens"]).all()
    whiles = [e for e in _equations(together.trace(both, keys).jaxpr.jaxpr) if "while" in str(e[0])]
    (condition,) = [p["cond_jaxpr"].jaxpr for _, p in whiles if len(p["body_jaxpr"].out_avals) > 5]
    assert condition.outvars[0].aval.shape == (), "one end for all runs, or caches are copied"


def _scaled(params):
    return jax.tree.map(lambda leaf: 1.5 * leaf, params)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive, equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


CHANCES = np.array([0.1, 0.4, 0.2, 0.3])  # of four tokens, whatever came before
OTHERS = np.array([0.7, 0.1, 0.1, 0.1])


def constant(chances) -> Model:
    def apply(params, tokens, *, segment=None, cache=None):
        hidden = jnp.broadcast_to(jnp.log(jnp.asarray(chances, jnp.float32)), (*tokens.shape, 4))
        return Output(hidden=hidden, unembed=jnp.eye(4), cache=cache)

    return Model(lambda key: {}, apply, {}, Config(vocab=4, width=4, layers=1, heads=1))


@pytest.mark.parametrize(
    ("how", "chances"),
    [
        ({}, CHANCES),
        pytest.param({"temperature": 0.5}, CHANCES**2 / (CHANCES**2).sum(), marks=SLOW),
        pytest.param({"vocab": 3}, [1 / 7, 4 / 7, 2 / 7, 0], marks=SLOW),
        pytest.param({"top_k": 2}, [0, 4 / 7, 0, 3 / 7], marks=SLOW),
        pytest.param(
            {"other": (constant(OTHERS), {}, 0.25)}, 0.25 * OTHERS + 0.75 * CHANCES, marks=SLOW
        ),
    ],
)
def test_frequencies_are_the_chances(how, chances) -> None:
    rows, tokens = 512, 12
    draw = partial(respond, constant(CHANCES), {}, tokens=tokens, **how)
    drawn = jax.jit(draw)(asked([[0]] * rows, 1), KEY)
    ids, old = drawn["targets"]["ids"], drawn["policy"]["old"]
    counts = np.bincount(np.ravel(ids), minlength=4) / (rows * tokens)
    spread = np.sqrt(np.array(chances) * (1 - np.array(chances)) / (rows * tokens))
    assert np.all(np.abs(counts - chances) <= 4 * spread), "four standard errors; exact at 0"
    if "other" in how:
        np.testing.assert_allclose(old, np.log(chances)[ids], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=SLOW)])
def test_only_tokens_that_the_teacher_has_are_drawn(share) -> None:
    """One padded size: the student likes a row that is padding to the teacher."""
    student = constant([0.01, 0.01, 0.01, 0.97])
    teacher = dataclasses.replace(student, config=dataclasses.replace(student.config, vocab=3))
    batch, held = {"asked": asked([[0]] * 8, 1)}, state({"teacher": {}})
    objectives = (
        on_policy(student, forward_kl, teacher=teacher, tokens=4, eos=3),
        minillm(student, teacher=teacher, tokens=4, eos=3, share=share),
    )
    for objective in objectives:
        metrics = jax.jit(objective)({}, held, batch, KEY)[2].metrics
        assert metrics["ended"] == (0, 8) and metrics["length"] == (32, 8)


@pytest.mark.slow
def test_adapters_are_sampled_with(params) -> None:
    model = lora(MODEL, 2)
    added = jax.tree.map(lambda leaf: leaf + 0.3, adapters(model, KEY))
    whole = {"base": params, "lora": added}
    mine = respond(model, whole, asked(PROMPTS), KEY, tokens=NEW, temperature=0.0)
    merged = respond(MODEL, merge(model, whole), asked(PROMPTS), KEY, tokens=NEW, temperature=0.0)
    assert (mine["tokens"] == merged["tokens"]).all()
    bare = respond(MODEL, params, asked(PROMPTS), KEY, tokens=NEW, temperature=0.0)
    assert (mine["tokens"] != bare["tokens"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=2,tensor=2,data=2"])
def test_a_mesh_draws_what_one_device_draws(params, spec) -> None:
    mesh, prompts = meshes.make_mesh(spec), asked([*PROMPTS, *PROMPTS])
    placed = jax.device_put(params, meshes.shardings(MODEL.axes, mesh, params))
    with meshes.rules_context(mesh):
        spread = jax.device_put(prompts, meshes.batch_sharding(mesh))
        got = jax.jit(partial(respond, MODEL, tokens=NEW, eos=EOS))(placed, spread, KEY)
    assert (got["tokens"] == draws(params, prompts, KEY)["tokens"]).all()


def test_prompts_become_a_column() -> None:
    tokenizer = arithmetic.tokenizer()
    model = transformer(dataclasses.replace(CONFIG, vocab=tokenizer.size))
    table = Table({"prompt": np.array(["1 + 2 =", "10 + 20 + 30 ="], object)})
    column = ask(table, model, tokenizer, tokens=8)["asked"]
    texts = [row[kept > 0] for row, kept in zip(column["tokens"], column["segment"], strict=True)]
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    for ids, text in zip(texts, table["prompt"], strict=True):
        assert ids.tolist() == start + tokenizer.encode_ids([text])[0]
    assert (np.diff(column["segment"]) >= 0).all() and column["tokens"].shape[1] % 8 == 0
    for how, words in (
        ({"tokens": 8, "length": 4}, "more than the 4 of the column"),
        ({"tokens": 60}, "need from 1 to 64 places"),
        ({"tokens": 0}, "need from 1 to 64 places"),
    ):
        with pytest.raises(UserError, match=words):
            ask(table, model, tokenizer, **how)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        ask(Table({"prompt": _objects([[1], []])}), model, tokenizer, tokens=8)


def _objects(values):
    column = np.empty(len(values), object)
    column[:] = values
    return column


# --- on-policy distillation -----------------------------------------------------------------------

POLICY = partial(on_policy, MODEL, reverse_kl, teacher=TEACHER, tokens=NEW, eos=EOS)


def given_rows(rows=4):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 46, (rows, 9)).astype(np.int32)
    return {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32), "asked": asked(PROMPTS)}


def value_and_grad(objective, params, frozen, batch, key=KEY, step=0):
    def total(params):
        total, weight, aux = objective(params, state(frozen, step), batch, key)
        return total, (weight, aux.metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@pytest.fixture(scope="module")
def fixed(params, frozen):
    """Value and gradient on the rows that the batch holds."""
    plain = distill(MODEL, reverse_kl, teacher=TEACHER)
    return value_and_grad(plain, params, frozen, given_rows())


def test_only_own_samples_is_distillation_on_them(params, frozen, said) -> None:
    plain = distill(MODEL, reverse_kl, teacher=TEACHER)
    (want, (weight, _)), slopes = value_and_grad(plain, params, frozen, said)
    batch = {"asked": asked(PROMPTS)}
    (total, (mass, metrics)), grads = value_and_grad(POLICY(), params, frozen, batch)
    close((total, mass, grads), (want, weight, slopes))
    lengths = [len(ids) for ids in responses(said)]
    ended = sum(EOS in ids for ids in responses(said))
    assert metrics["length"] == (sum(lengths), 4) and metrics["ended"] == (ended, 4)
    assert mass == sum(lengths) and metrics["own"] == (1, 1)


@pytest.mark.slow
def test_prompts_have_weights_too(params, frozen, said) -> None:
    weight = jnp.array([1.0, 0.0, 2.0, 0.5])
    plain = jax.jit(distill(MODEL, reverse_kl, teacher=TEACHER))
    mask = said["targets"]["mask"] * weight[:, None]
    heavy = {**said, "targets": {**said["targets"], "mask": mask}}
    want = plain(params, state(frozen), heavy, KEY)[:2]
    batch = {"asked": asked(PROMPTS), "weight": weight}
    close(jax.jit(POLICY())(params, state(frozen), batch, KEY)[:2], want)
    whole = jax.jit(sequence_kl(MODEL, teacher=TEACHER, share=0.0))
    close(
        whole(params, state(frozen), {**said, "weight": weight}, KEY)[:2],
        whole(params, state(frozen), heavy, KEY)[:2],
    )


@pytest.mark.slow
def test_no_own_samples_is_distillation(params, frozen, fixed) -> None:
    (total, (weight, looks)), grads = value_and_grad(POLICY(lam=0.0), params, frozen, given_rows())
    close((total, weight, grads), (fixed[0][0], fixed[0][1][0], fixed[1]))
    assert looks == {}


@pytest.mark.slow
def test_a_batch_is_one_or_the_other(params, frozen, fixed) -> None:
    objective = POLICY(lam=0.5)

    @jax.jit
    def both(key):
        def total(params):
            total, weight, aux = objective(params, state(frozen), given_rows(), key)
            return total, (weight, aux.metrics["own"][0])

        return jax.value_and_grad(total, has_aux=True)(params)

    seen = {0: 0, 1: 0}
    for key in jax.random.split(KEY, 8):
        (total, (weight, own)), grads = both(key)
        seen[int(own)] += 1
        if own:
            batch = {"asked": asked(PROMPTS)}
            alone = value_and_grad(POLICY(), params, frozen, batch, jax.random.split(key)[1])
            if seen[1] == 1:
                close((total, weight, grads), (alone[0][0], alone[0][1][0], alone[1]))
        else:
            close((total, weight, grads), (fixed[0][0], fixed[0][1][0], fixed[1]))
    assert min(seen.values()) >= 1


@pytest.mark.slow
def test_the_share_may_follow_the_run(params, frozen) -> None:
    objective = POLICY(lam=ramp(0.0, 1.0, over=0.5))
    for step, own in ((0, 0), (5, 1), (9, 1)):
        metrics = jax.jit(objective)(params, state(frozen, step), given_rows(), KEY)[2].metrics
        assert metrics["own"][0] == own


@pytest.mark.slow
def test_training_brings_the_student_to_its_teacher(params, frozen) -> None:
    """In a population, with the share as a number of each run, in ``fit``, and with adapters."""
    rng = np.random.default_rng(1)
    prompts = asked(rng.integers(1, 46, (64, 5)))
    tokens = rng.integers(1, 46, (64, 9)).astype(np.int32)
    rows = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32), "asked": prompts}
    tune = Tune(lr=5e-3, batch=16, steps=80)

    apart = jax.jit(POLICY())

    def far(weights):
        total, weight, _ = apart(weights, state(frozen), Table(rows).batch(range(64)), KEY)
        return float(total / weight)

    runs = population(
        lambda row: on_policy(
            MODEL, reverse_kl, teacher=TEACHER, tokens=NEW, eos=EOS, lam=row["lam"]
        ),
        params, Table(rows), tune, [0, 0], hyper={"lam": [1.0, 0.0]}, frozen=frozen,
    )  # fmt: skip
    assert runs.metrics["own"].mean(1).tolist() == [1, 0]
    begun = far(params)
    own, given = (far(runs.run(i)[0]) for i in range(2))
    assert own < 0.7 * begun and own < given
    alone = fit(
        POLICY(), params, Table(rows), tune, jax.random.key(0), frozen=frozen, progress=False
    )
    assert far(alone.params) < 0.7 * begun
    model = lora(MODEL, 4)
    adapted = on_base(on_policy(model, reverse_kl, teacher=TEACHER, tokens=NEW, eos=EOS, lam=0.8))
    held = {**frozen, "base": params}
    start = adapters(model, KEY)
    trained = fit(adapted, start, Table(rows), tune, KEY, frozen=held, progress=False).params
    assert far(merge(model, {"base": params, "lora": trained})) < 0.9 * begun


@pytest.mark.parametrize("make", [lambda: POLICY(lam=0.5), lambda: minillm(
    MODEL, teacher=TEACHER, tokens=NEW, eos=EOS)], ids=["on_policy", "minillm"])  # fmt: skip
def test_no_gradient_holds_tokens_times_vocabulary(make, params, frozen, monkeypatch) -> None:
    from w2s_jax.losses import sequence

    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * 2 * 46 * 4)  # a time step of four rows
    objective = make()

    def total(params):
        return objective(params, state(frozen), given_rows(), KEY)[0]

    jaxpr = jax.make_jaxpr(jax.grad(total))(params).jaxpr
    found = {v.aval.shape for out in _outputs(jaxpr) for v in out if 46 in v.aval.shape}
    assert (4, 1, 46) in found, "a chunk of logits"
    assert not [shape for shape in found if np.prod(shape) > 46 * 32], "more than the matrix"


def _outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from _outputs(inner)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, f: POLICY(lam=1.5), "lam is a probability, got 1.5"),
        (lambda p, f: POLICY()(p, state(f), {"tokens": 1}, KEY), "'asked'.*has \\['tokens'\\]"),
        (lambda p, f: draws(p, asked(PROMPTS, width=60), KEY), "prompts of 60 and responses of 6"),
        (lambda p, f: minillm(MODEL, teacher=TEACHER, tokens=3, share=1.0), "share.*got 1.0"),
        (lambda p, f: respond(MODEL, p, asked(PROMPTS), KEY, tokens=2, top_p=0.0), "top_p"),
        (lambda p, f: jax.eval_shape(
            on_policy(MODEL, forward_kl, teacher=WIDER, tokens=3), p,
            state({"teacher": jax.eval_shape(WIDER.init, KEY)}), {"asked": asked(PROMPTS)}, KEY),
         "student has 46 tokens, the teacher 50: pass vocab="),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(call, words, params, frozen) -> None:
    with pytest.raises(UserError, match=words) as fault:
        call(params, frozen)
    assert "\n" not in str(fault.value)
