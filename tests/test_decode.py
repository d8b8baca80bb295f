"""Slots: log-probabilities as in training, refilling, samples, stop strings, tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.generate import decode, slots
from w2s_jax.generate.choose import BLOCK, _limited
from w2s_jax.generate.sample import draw, generate, sample
from w2s_jax.losses.sequence import token_logps
from w2s_jax.models.cache import empty_cache, settle
from w2s_jax.models.lora import lora, merge
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.types import Table

CONFIG = Config(vocab=48, width=16, layers=1, heads=4, kv_heads=2, max_length=96)
MODEL = transformer(CONFIG)
KEY = jax.random.key(3)
SIZES = (3, 40, 1, 7, 12, 5, 2)
PROMPTS = [np.random.default_rng(n).integers(1, 48, n).tolist() for n in SIZES]


def weights(model, scale=2.0):
    return jax.tree.map(lambda leaf: scale * leaf, model.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


@pytest.fixture(scope="module")
def drawn(params):
    """Three samples of each prompt, all prompts at once."""
    return draw(MODEL, params, PROMPTS, KEY, tokens=9, samples=3)


def ids(rows):
    return [[row.ids for row in several] for several in rows]


KINDS = {
    "llama": {"tie": False},
    "padded vocabulary": {"vocab": 45, "pad_vocab": 16},
    "gpt2": dict(activation="gelu", norm="layer", rope=0.0, bias="all", kv_heads=4),
    "qwen3": {"qk_norm": "head"},
    "olmo2": dict(qk_norm="all", placement="post"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_training(kind) -> None:
    """One pass over prompt and response, without a cache, as every loss sees them."""
    model = transformer(dataclasses.replace(CONFIG, **KINDS[kind]))
    params = weights(model)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
    rows = draw(model, params, prompts, KEY, tokens=5, temperature=1.7, top_k=20, batch=2, every=2)
    whole, mask = np.zeros((3, 11), np.int32), np.zeros((3, 11), np.float32)
    for i, [row] in enumerate(rows):
        begin, end = len(prompts[i]), len(prompts[i]) + len(row.ids)
        whole[i, :end], mask[i, begin:end] = prompts[i] + row.ids, 1

    @jax.jit
    def trained(params):
        output = model.apply(params, whole)
        hidden, unembed = output.hidden[:, :-1], output.unembed
        return token_logps(hidden, unembed, whole[:, 1:], mask[:, 1:], vocab=output.vocab)

    want = np.asarray(trained(params))
    for i, [row] in enumerate(rows):
        got = want[i][mask[i, 1:] > 0]
        assert len(row.logps) == 5 and row.finish == "length"
        np.testing.assert_allclose(row.logps, got, atol=1e-4)
        assert np.all(got < -1e-3), "sharp predictions would hide a fault"


@pytest.mark.parametrize("how", [dict(batch=2, every=3), dict(batch=5)])
def test_slots_and_looks_change_nothing(params, drawn, how) -> None:
    again = draw(MODEL, params, PROMPTS, KEY, tokens=9, samples=3, **how)
    assert ids(again) == ids(drawn)
    for some, same in zip(again, drawn, strict=True):
        for a, b in zip(some, same, strict=True):
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


def test_a_sample_depends_on_its_number_and_prompt_alone(params, drawn) -> None:
    single = draw(MODEL, params, PROMPTS[:2], KEY, tokens=9)
    assert ids(single) == [several[:1] for several in ids(drawn)[:2]]
    assert len({tuple(row.ids) for several in drawn for row in several}) == 3 * len(PROMPTS)


def test_rows_of_different_ends_through_few_slots(params) -> None:
    """Rows stop at different places: slots are refilled, and at the end there are fewer of them."""
    prompts = [[i] for i in range(1, 41)]
    how = dict(tokens=24, stop=(5, 20))
    wide = draw(MODEL, params, prompts, KEY, batch=40, **how)
    narrow = draw(MODEL, params, prompts, KEY, batch=9, every=4, **how)
    assert ids(narrow) == ids(wide)
    sizes = {len(row.ids) for [row] in wide}
    assert len(sizes) > 5 and {row.finish for [row] in wide} == {"stop", "length"}
    assert all((len(row.ids) == 24) == (row.finish == "length") for [row] in wide)


def test_a_prompt_is_read_once_and_nothing_is_compiled_twice(params) -> None:
    programs, read = decode.programs(MODEL, 48, 4, True), []

    def begin(params, ids, segment):
        read.append(len(ids))
        return programs.begin(params, ids, segment)

    task = slots.Task(
        prompts=PROMPTS[2:], samples=4, tokens=8, stop=(), numbers={}, most=80, slots=5, every=4
    )
    model, prepared = decode.prepare(MODEL, params)
    counted = dataclasses.replace(programs, begin=begin)
    first = slots.run(task, counted, prepared, KEY)
    assert sum(read) == len(task.prompts), "20 rows, 5 prompts"
    compiled = programs.advance._cache_size(), programs.begin._cache_size()
    again = slots.run(task, counted, prepared, jax.random.key(4))
    assert (programs.advance._cache_size(), programs.begin._cache_size()) == compiled
    assert ids(first) == ids(again), "greedy"


def test_adapters_generate_as_their_merged_model(params) -> None:
    adapted = lora(MODEL, 2)
    both = {"base": params, "lora": adapted.init(jax.random.key(2))["lora"]}
    both["lora"] = jax.tree.map(lambda leaf: leaf + 0.5, both["lora"])
    how = dict(tokens=4, temperature=0.0)
    got = sample(adapted, both, PROMPTS[:3], KEY, **how)
    assert got == sample(MODEL, merge(adapted, both), PROMPTS[:3], KEY, **how)
    assert got != sample(MODEL, params, PROMPTS[:3], KEY, **how)


def test_buckets_are_few_and_hold() -> None:
    sizes = sorted({decode.bucket(n) for n in range(1, 2000)})
    assert sizes == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(decode.bucket(n) >= n for n in range(1, 2000)) and decode.bucket(40, 45) == 45


@pytest.mark.parametrize("index", [6, 4, 9])
def test_a_moved_cache_keeps_what_precedes_its_place(index) -> None:
    cache = empty_cache(CONFIG, 3, 8)
    marks = jnp.broadcast_to(jnp.arange(1, 9)[None], (3, 8))
    (keys, values), *rest = cache.layers
    keys, values = keys + marks[:, None, None], values + marks[:, None, :, None]
    cache = dataclasses.replace(
        cache, layers=((keys, values), *rest), segment=marks, index=jnp.int32(6)
    )
    moved = settle(cache, jnp.array([2, 0]), jnp.int32(index), 10)
    want = [i - index + 6 if 1 <= i - index + 6 <= 8 else 0 for i in range(1, 11)]
    assert moved.segment.tolist() == [want, want] and int(moved.index) == index
    assert moved.layers[0][0][1, 1, 3].tolist() == want
    assert moved.layers[0][1][1, 1, :, 3].tolist() == want


@pytest.mark.parametrize("how", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 1}])
def test_limits_keep_what_sorting_keeps(how) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (BLOCK, 5)).astype(np.float32)
    logits[::3] = -np.inf
    numbers = {name: jnp.asarray(value) for name, value in how.items()}
    got = np.isfinite(np.asarray(_limited(jnp.asarray(logits), numbers)))
    for column, kept in zip(logits.T, got.T, strict=True):
        chances = np.exp(column) / np.exp(column).sum()
        order = np.argsort(-chances)
        before = np.cumsum(chances[order]) - chances[order]
        count = how.get("top_k") or int((before < how.get("top_p", 0)).sum())
        want = set(order[:count]) if count else set(np.flatnonzero(chances >= 0.1 * chances.max()))
        assert set(np.flatnonzero(kept)) == want


TOKENIZER = arithmetic.tokenizer()
SPEAKER = transformer(dataclasses.replace(CONFIG, vocab=TOKENIZER.size))
TEXTS = ["drill : 3 + 4 =", "2", "7 -"]


@pytest.fixture(scope="module")
def speech():
    """Weights and two responses per text, nothing stopping them but the end of the text."""
    params = weights(SPEAKER, 1.0)
    table = Table({"prompt": np.array(TEXTS, object), "group": np.array([4, 5, 6])})
    told = generate(table, SPEAKER, params, TOKENIZER, key=KEY, tokens=12, samples=2)
    return params, table, told


def test_a_table_of_responses(speech) -> None:
    params, table, told = speech
    assert told["prompt"].tolist() == [text for text in TEXTS for _ in range(2)]
    assert told["group"].tolist() == [4, 4, 5, 5, 6, 6] and told["sample"].tolist() == [0, 1] * 3
    start = [] if TOKENIZER.bos is None else [TOKENIZER.bos]
    prompts = [start + TOKENIZER.encode(text) for text in TEXTS]
    ends = {"stop": (TOKENIZER.eos,), "vocab": TOKENIZER.size}
    rows = draw(SPEAKER, params, prompts, KEY, tokens=12, samples=2, **ends)
    for i, row in enumerate(row for several in rows for row in several):
        assert told["response_ids"][i].tolist() == row.ids
        assert told["response"][i] == TOKENIZER.decode(row.ids)
        assert told["finish"][i] == row.finish
        np.testing.assert_array_equal(told["response_logps"][i], np.float32(row.logps))
    column = np.empty(3, object)
    column[:] = [np.array(prompt) for prompt in prompts]
    by_ids = generate(
        Table({"prompt": column}), SPEAKER, params, TOKENIZER, key=KEY, tokens=12, samples=2
    )
    assert by_ids["response"].tolist() == told["response"].tolist()


@pytest.mark.parametrize("every", [1, 5, 32])
def test_a_stop_string_cuts_exactly_wherever_the_host_looks(speech, every) -> None:
    params, table, told = speech
    text = next(text for text in told["response"] if len(text) > 12)
    stop = (text[5:8], text[9:12])
    cut = generate(
        table, SPEAKER, params, TOKENIZER, key=KEY, tokens=12, samples=2, stop=stop, every=every
    )
    for i, free in enumerate(told["response"]):
        ends = [(free.find(end) + len(end), free.find(end)) for end in stop if end in free]
        want = free[: min(ends)[1]] if ends else free
        assert cut["response"][i] == want
        assert cut["finish"][i] == ("stop" if ends else told["finish"][i])
        size = len(cut["response_ids"][i])
        assert cut["response_ids"][i].tolist() == told["response_ids"][i][:size].tolist()
        assert len(cut["response_logps"][i]) == size
        spelt = [TOKENIZER.decode(told["response_ids"][i][:n].tolist()) for n in (size - 1, size)]
        if ends and size:
            assert spelt[1].startswith(want) and not spelt[0].startswith(want)
    assert "stop" in cut["finish"].tolist()


def test_logits_that_are_no_numbers_name_their_row(params) -> None:
    broken = {**params, "embed": params["embed"].at[47].set(jnp.nan)}
    head = {**broken, "unembed": params["embed"].T}
    model = transformer(dataclasses.replace(CONFIG, tie=False))
    rows = sample(model, head, [[1], [2]], KEY, tokens=2, temperature=0.0)
    assert len(rows) == 2
    with pytest.raises(UserError, match="prompt 1 .*not finite after 0 tokens"):
        sample(model, head, [[1], [2, 47, 3]], KEY, tokens=2, temperature=0.0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"min_p": -0.1}, "min_p in"),
        ({"tokens": 200}, "exceed the model's 96"),
        ({"model": MODEL}, "the tokenizer has"),
    ],
)
def test_bad_input_is_one_line(speech, how, message) -> None:
    params, table, _ = speech
    how = {"model": SPEAKER, "tokens": 3, **how}
    with pytest.raises(UserError, match=message) as error:
        generate(table, params=params, tokenizer=TOKENIZER, key=KEY, **how)
    assert "\n" not in str(error.value)
