"""Sampling: the cache against full passes, rows on their own, masks, limits, frequencies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.generate.decode import STEP as BUCKET
from w2s_jax.generate.sample import complete, sample
from w2s_jax.models.transformer import Config, decode, init_cache, transformer
from w2s_jax.types import Model, Output

CONFIG = Config(vocab=48, width=16, layers=1, heads=2, max_length=128)
MODEL = transformer(CONFIG)
KEY = jax.random.key(5)
PROMPTS = [[3], [7, 1, 9, 30, 2], [11, 4], list(range(1, BUCKET + 3))]  # the last: next bucket


@pytest.fixture(scope="module")
def params():
    """Random weights, large enough for peaked and prompt-dependent predictions."""
    return jax.tree.map(lambda leaf: 2.0 * leaf, MODEL.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def greedy(params):
    return sample(MODEL, params, PROMPTS, KEY, tokens=6, temperature=0.0)


LENGTH = 64


@jax.jit
def logits_after(params, ids, last):
    """Next-token logits [V] of one right-padded row, without a cache."""
    segment = (jnp.arange(LENGTH) <= last).astype(jnp.int32)[None]
    return decode(MODEL.apply(params, ids[None], segment=segment))[0, last]


def following(params, ids):
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(logits_after(params, padded, len(ids) - 1))


def continued(params, prompt, tokens, stop=(), vocab=None):
    """Greedy decoding by one whole forward pass per token."""
    ids = list(prompt)
    for _ in range(tokens):
        new = int(following(params, ids)[:vocab].argmax())
        if new in stop:
            break
        ids.append(new)
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_whole_passes(params, greedy) -> None:
    assert greedy == [continued(params, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(row) for row in greedy}) == len(PROMPTS), "the prompts must matter"


def test_left_padding_leaves_hidden_states_as_they_are(params) -> None:
    """The prompt and two more tokens through a padded cache, against the bare row."""
    prompt, more, pad = PROMPTS[1], [8, 13], 11
    bare = jax.jit(MODEL.apply)(params, jnp.array([prompt + more])).hidden[0]
    ids = jnp.array([[0] * pad + prompt])
    segment = jnp.array([[0] * pad + [1] * len(prompt)])
    apply = jax.jit(MODEL.apply)
    out = apply(params, ids, segment=segment, cache=init_cache(CONFIG, 1, 32))
    seen = [out.hidden[0, pad:]]
    assert int(out.cache.position[0]) == len(prompt), "padding takes no position"
    for token in more:
        out = apply(params, jnp.array([[token]]), cache=out.cache)
        seen.append(out.hidden[0])
    np.testing.assert_allclose(jnp.concatenate(seen), bare, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_does_not_matter(params, batch) -> None:
    whole = sample(MODEL, params, PROMPTS, KEY, tokens=6)
    assert sample(MODEL, params, PROMPTS, KEY, tokens=6, batch=batch) == whole
    assert whole != sample(MODEL, params, PROMPTS, jax.random.key(6), tokens=6)


def test_a_row_is_drawn_from_its_place_and_prompt_alone(params) -> None:
    whole = sample(MODEL, params, PROMPTS, KEY, tokens=6)
    longer = [[5, 5], PROMPTS[1], [1] * 2 * BUCKET, PROMPTS[3]]
    other = sample(MODEL, params, longer, KEY, tokens=6)
    assert (other[1], other[3]) == (whole[1], whole[3])
    same = sample(MODEL, params, [PROMPTS[3]] * 4, KEY, tokens=6)
    assert len({tuple(row) for row in same}) > 1, "equal prompts have streams of their own"


def test_a_stop_token_ends_its_row_and_is_left_out(params, greedy) -> None:
    place = next(i for i in range(1, 6) if greedy[1][i] not in greedy[1][:i])
    stop = (greedy[1][place], 47)
    cut = sample(MODEL, params, PROMPTS, KEY, tokens=6, temperature=0.0, stop=stop)
    assert cut[1] == greedy[1][:place]
    assert cut == [continued(params, prompt, 6, stop=stop) for prompt in PROMPTS]


def test_a_row_that_ends_at_once_is_empty(params, greedy) -> None:
    prompts, stop = [PROMPTS[0]] * 2, (greedy[0][0],)
    assert sample(MODEL, params, prompts, KEY, tokens=6, temperature=0.0, stop=stop) == [[], []]


def test_padding_of_the_vocabulary_is_never_drawn(params) -> None:
    rows = sample(MODEL, params, [[1]] * 64, KEY, tokens=6, temperature=50.0, vocab=5)
    assert {token for row in rows for token in row} == set(range(5))
    found = sample(MODEL, params, PROMPTS, KEY, tokens=6, temperature=0.0, vocab=5)
    assert found == [continued(params, prompt, 6, vocab=5) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "limit", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=lambda x: next(iter(x))
)
def test_limits_are_greedy(params, greedy, limit) -> None:
    assert sample(MODEL, params, PROMPTS, KEY, tokens=6, **limit) == greedy


def test_limits_that_leave_everything(params) -> None:
    free = sample(MODEL, params, PROMPTS, KEY, tokens=6)
    for limit in ({"top_k": 48}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert sample(MODEL, params, PROMPTS, KEY, tokens=6, **limit) == free


# A model that predicts the same four tokens with these chances whatever came before.
CHANCES = np.array([0.1, 0.4, 0.2, 0.3])
ONE = Config(vocab=4, width=4, layers=1, heads=1, max_length=16)


def constant() -> Model:
    def apply(params, tokens, *, segment=None, cache=None):
        hidden = jnp.broadcast_to(jnp.log(jnp.asarray(CHANCES, jnp.float32)), (*tokens.shape, 4))
        return Output(hidden=hidden, unembed=jnp.eye(4), cache=cache)

    return Model(lambda key: {}, apply, {}, ONE)


FIXED = constant()


@pytest.mark.parametrize(
    ("how", "chances"),
    [
        ({}, CHANCES),
        ({"temperature": 0.5}, CHANCES**2 / (CHANCES**2).sum()),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # .4 does not reach .6, .4 + .3 does
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # of the three left: .44 < .5
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # .3 is three quarters of .4, .2 the half
        ({"top_p": 0.75, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"vocab": 3}, [1 / 7, 4 / 7, 2 / 7, 0]),
    ],
)
def test_frequencies_are_the_chances(how, chances) -> None:
    n, tokens = 512, 12
    rows = sample(FIXED, {}, [[0]] * n, KEY, tokens=tokens, batch=n, **how)
    counts = np.bincount(np.array(rows).ravel(), minlength=4) / (n * tokens)
    spread = np.sqrt(np.array(chances) * (1 - np.array(chances)) / (n * tokens))
    assert np.all(np.abs(counts - chances) <= 4 * spread), "four standard errors; exact at 0"


def test_draws_are_independent_over_rows_and_steps() -> None:
    rows = np.array(sample(FIXED, {}, [[0]] * 512, KEY, tokens=12, batch=512))
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        assert abs((a == b).mean() - (CHANCES**2).sum()) < 0.03  # 4 standard errors


def test_nothing_to_continue() -> None:
    assert sample(FIXED, {}, [], KEY, tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "how", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 14], {}, "a prompt of 14 tokens and 3 new ones exceed the model's 16"),
        ([[1]], {"tokens": 0}, "tokens must be at least 1"),
        ([[1]], {"batch": 0}, "batch must be at least 1"),
        ([[1]], {"top_p": 0.0}, "top_p in"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_k": 5}, "top_k must be from 0 .* to the vocabulary's 4, got 5"),
        ([[1]], {"min_p": 1.0}, "min_p in"),
        ([[1], [2, 4]], {}, "prompt 1 has token 4, the model has 4"),
    ],
)
def test_bad_input_is_one_line(prompts, how, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        sample(FIXED, {}, prompts, KEY, **{"tokens": 3, **how})
    assert "\n" not in str(error.value)


def test_a_prompt_that_just_fits() -> None:
    assert len(sample(FIXED, {}, [[1] * 13], KEY, tokens=3)[0]) == 3


def test_texts_come_back_in_their_order() -> None:
    tokenizer = arithmetic.tokenizer()
    model = transformer(dataclasses.replace(CONFIG, vocab=-(-tokenizer.size // 16) * 16))
    params = jax.tree.map(lambda leaf: 2.0 * leaf, model.init(jax.random.key(2)))
    texts = ["drill : 3 + 4 =", "2", "drill : 9 * 2 = 1 8", "7 -"]
    how = {"tokens": 4, "temperature": 2.0, "batch": 2}
    told = complete(model, params, tokenizer, texts, KEY, **how)
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [start + tokenizer.encode(text) for text in texts]
    ends = {"stop": (tokenizer.eos,), "vocab": tokenizer.size}
    rows = sample(model, params, ids, KEY, **how, **ends)
    assert told == [tokenizer.decode(row) for row in rows] and len(set(told)) > 1
    more = complete(model, params, tokenizer, [*texts, "5", "1"], KEY, **how)
    assert more[:4] == told, "further, shorter texts change no other"
