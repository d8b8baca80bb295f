"""Spans that two tokenizers share: bytes, boundaries, refusals, the loss by hand and its limits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_prefer_distill import shapes

from w2s_jax.annotate import predict
from w2s_jax.data import spans
from w2s_jax.errors import UserError
from w2s_jax.losses import sequence
from w2s_jax.losses.spans import binary_kl, matching, squared
from w2s_jax.models.transformer import decode
from w2s_jax.objectives.spans import distill_spans, span_logps
from w2s_jax.tokenizer import Tokenizer, train_bpe
from w2s_jax.types import Model, Output, State, forward

TEXTS = [
    "the cat sat on the mat, and the naïve 東京 cat sat",
    "an apple on a mat is a 🙂 apple; the end of it all",
    "seven plus eight is fifteen\n\n  def f(x):\n\treturn x",
]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    return train_bpe(TEXTS, 300), train_bpe([t.upper() + t[::2] for t in TEXTS], 280)


def model(tokenizer: Tokenizer, seed: int = 0, padding: int = 0) -> tuple[Model, dict]:
    """A language model that sees the mean of the tokens so far; cheap to compile."""
    real = tokenizer.size
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": jax.random.normal(keys[0], (real, 12)),
        "unembed": jax.random.normal(keys[1], (12, real)),
    }

    def apply(params, tokens, segment=None, position=None, rows=None):
        seen = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)
        hidden = jnp.cumsum(params["embed"][tokens], axis=1) / seen[None, :, None]
        unembed = jnp.pad(params["unembed"], ((0, 0), (0, padding)), constant_values=3.0)
        return Output(hidden=hidden, unembed=unembed, vocab=real if padding else None)

    return Model(
        lambda key: params, apply, {"embed": (None, None), "unembed": (None, None)}, ()
    ), params


spoken = jax.jit(span_logps, static_argnums=0)


def bytes_of(*pieces: str) -> list[bytes]:
    return [piece.encode() for piece in pieces]


def test_boundaries_by_hand():
    first, second = bytes_of("Hel", "lo", " wor", "ld", "!"), bytes_of("Hello", " ", "world!")
    aligned = spans.align(first, second)
    np.testing.assert_array_equal(aligned.first, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(aligned.second, [0, 1, 1])
    assert aligned.count == 2
    later = spans.align(bytes_of("ab", "c", "d", "e"), bytes_of("abc", "d", "e"), start=1)
    np.testing.assert_array_equal(later.first, [-1, -1, 0, 1])  # a span that begins in the prompt
    np.testing.assert_array_equal(later.second, [-1, 0, 1])


def test_a_character_of_several_bytes_may_be_cut_alike():
    whole = "é".encode()
    first, second = [b"a", whole[:1], whole[1:] + b"b", b"c"], [b"a" + whole[:1], whole[1:], b"bc"]
    aligned = spans.align(first, second)
    np.testing.assert_array_equal(aligned.first, [0, 0, 1, 1])
    np.testing.assert_array_equal(aligned.second, [0, 1, 1])


@pytest.mark.parametrize(
    ("first", "second", "start", "words"),
    [
        (("ab", "c"), ("a", "bc"), 0, "no common boundary"),
        (("ab", "cd"), ("ab", "ce"), 0, "same text"),
        (("ab", "cd"), ("ab", "cd"), 4, "no text"),
        ((), (), 0, "no text"),
        (("a", "bc", "de"), ("a", "bcd", "e"), 1, "no common boundary"),
    ],
)
def test_what_cannot_be_aligned_is_refused(first, second, start, words):
    with pytest.raises(UserError, match=words):
        spans.align(bytes_of(*first), bytes_of(*second), start)


def test_one_token_on_both_sides_is_a_span():
    assert spans.align([b"a", b"four"], [b"a", b"four"], start=1).count == 1


def test_bytes_of_tokens_join_to_the_text(tokenizers):
    for text in TEXTS:
        for tokenizer in tokenizers:
            pieces = spans.spelled(tokenizer, tokenizer.encode(text))
            assert b"".join(pieces) == text.encode()
    with pytest.raises(UserError, match="special"):
        spans.spelled(tokenizers[0], [1])


@pytest.mark.parametrize(
    "names", [("gpt2", "qwen2.5"), ("gpt_neox_olmo", "c4_32k"), ("gpt2", "dolma2")]
)
def test_real_tokenizers_agree_on_words(shared_data, names):
    pair = [real(shared_data / "tokenizers" / name) for name in names]
    text = (
        "Hello  world, naïve 東京 🙂!\n\n  def f(x):\n\treturn x + 12345 and internationalization"
    )
    text = text if "c4_32k" not in names else "Hello world, the internationalization of cafés."
    pieces = [spans._exact(one, one.encode(text), text) for one in pair]
    aligned = spans.align(pieces[0], pieces[1])
    assert aligned.count > 6
    for of, side in zip((aligned.first, aligned.second), pieces, strict=True):
        spelled = [
            b"".join(p for p, n in zip(side, of, strict=True) if n == s)
            for s in range(aligned.count)
        ]
        if of is aligned.first:
            want = spelled
        assert spelled == want and (np.diff(of) >= 0).all() and (np.diff(of) <= 1).all()


def real(folder) -> Tokenizer:
    models = sorted(folder.glob("*.model")) if folder.is_dir() else []
    if not folder.is_dir():
        pytest.skip("no such tokenizer")
    if models:
        pytest.importorskip("sentencepiece")
    return Tokenizer.from_file(models[0]) if models else Tokenizer.load(folder)


def test_pairs_of_texts_and_their_refusals(tokenizers):
    prompts, responses = ["the cat", "an apple", "x"], [" sat on", "", " on <eos> a mat"]
    with pytest.raises(UserError, match=r"text 1 .*empty"):
        spans.pair(prompts, responses, *tokenizers)
    paired = spans.pair(prompts, responses, *tokenizers, on_fault="drop")
    np.testing.assert_array_equal(paired.kept, [0])
    assert sorted(reason.split(":")[0] for reason in paired.refused) == [
        "the response is empty",
        "token '<eos>' is special",
    ]
    of = paired.student["spans"]["of"][0]
    assert of[0] == -1 and of.max() + 1 == paired.student["spans"]["weight"][0].sum()
    answer = [i for i, n in zip(paired.student["tokens"][0], of, strict=True) if n >= 0]
    assert tokenizers[0].decode(answer) == " sat on"
    np.testing.assert_array_equal(paired.student["mask"], (paired.student["spans"]["of"] >= 0))
    with pytest.raises(UserError, match="more than 4 tokens"):
        spans.pair(prompts[:1], responses[:1], *tokenizers, length=4)
    with pytest.raises(UserError, match="on_fault"):
        spans.pair(prompts, responses, *tokenizers, on_fault="skip")
    with pytest.raises(UserError, match="no text can be aligned"):
        spans.pair([""], [""], *tokenizers, on_fault="drop")


def test_words_stand_for_the_space_before_them():
    """The nano family reads words and digits, and puts the spaces back when it writes."""
    from w2s_jax.models import hf

    words = hf.load("nano-1")[2]
    text = "ann has 12 more than leo . 3 + 9 = 12"
    pieces = spans.spelled(words, words.encode(text))
    assert pieces[:5] == [b"ann", b" has", b" 1", b"2", b" more"] and pieces[-2:] == [b" 1", b"2"]
    assert b"".join(pieces) == text.encode()
    paired = spans.pair([""], [text], train_bpe([text], 259), words)
    assert paired.bytes.tolist() == [len(text)] and paired.teacher["spans"]["weight"].sum() == 14
    with pytest.raises(UserError, match="give the text back"):
        spans.pair([""], ["ann  has 3"], train_bpe([text], 259), words)


def test_a_tokenizer_that_changes_the_text_is_refused():
    from tokenizers import normalizers

    lower, plain = train_bpe(TEXTS, 300), train_bpe(TEXTS, 300)
    lower.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="give the text back"):
        spans.pair(["The "], ["Cat"], plain, lower)


def distilled(paired, said, student, params, divergence):
    table = spans.with_teacher(paired.student, said)
    state = State(jnp.int32(0), jnp.int32(10), params, ())
    batch = jax.tree.map(jnp.asarray, table.batch(np.arange(len(table))))
    objective = distill_spans(student, divergence)
    return objective, state, batch


def test_equal_tokenizers_give_the_loss_of_single_tokens(tokenizers):
    one = tokenizers[0]
    paired = spans.pair(["", "an apple"], [TEXTS[0], TEXTS[1][8:]], one, one)
    student, params = model(one)
    teacher, other = model(one, 1)
    said = predict(partial(span_logps, teacher), other, paired.teacher, batch=2)
    objective, state, batch = distilled(paired, said, student, params, binary_kl)
    total, weight, aux = jax.jit(objective)(params, state, batch, KEY)
    mask = np.asarray(batch["mask"][:, 1:]) > 0
    ids = batch["tokens"][:, 1:, None]
    logps = [
        jnp.take_along_axis(jax.nn.log_softmax(decode(forward(m, p, batch))[:, :-1]), ids, -1)
        for m, p in ((student, params), (teacher, other))
    ]
    q, p = (np.exp(np.asarray(x[..., 0], np.float64))[mask] for x in logps)
    want = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert weight == mask.sum() and aux.metrics["tokens"][0] == mask.sum()
    np.testing.assert_allclose(total, want.sum(), rtol=1e-4)


def test_a_span_is_the_sum_of_its_tokens_and_targets_change_nothing(tokenizers):
    paired = spans.pair(["the", "an"], [TEXTS[0][3:], TEXTS[1][2:]], *tokenizers)
    student, params = model(tokenizers[0])
    batch = jax.tree.map(jnp.asarray, paired.student.batch(np.arange(2)))
    got = spoken(student, params, batch)
    logps = jax.nn.log_softmax(decode(forward(student, params, batch))[:, :-1])
    picked = np.asarray(jnp.take_along_axis(logps, batch["tokens"][:, 1:, None], -1)[..., 0])
    of = np.asarray(batch["spans"]["of"][:, 1:])
    want = np.zeros(got.shape)
    for row, place in zip(*np.nonzero(of >= 0), strict=True):
        want[row, of[row, place]] += picked[row, place]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    batch = jax.tree.map(jnp.asarray, spans.aimed(paired.student).batch(np.arange(2)))
    np.testing.assert_allclose(spoken(student, params, batch), want, rtol=1e-4, atol=1e-5)


def attending(tokenizer: Tokenizer) -> tuple[Model, dict]:
    """``model``, but of the tokens of its own text alone."""
    plain, params = model(tokenizer)

    def apply(params, tokens, segment=None, position=None, rows=None):
        total = jnp.cumsum(params["embed"][tokens], axis=1)
        begin = jnp.arange(tokens.shape[1])[None] - position - 1  # the place before the text
        before = jnp.take_along_axis(total, jnp.maximum(begin, 0)[..., None], axis=1)
        hidden = total - jnp.where(begin[..., None] >= 0, before, 0.0)
        return Output(hidden=hidden / (position[..., None] + 1.0), unembed=params["unembed"])

    return replace(plain, apply=apply), params


def test_packed_rows_say_what_texts_alone_say(tokenizers):
    prompts, responses = ["the", "an", "seven", ""], [t[5:] for t in (*TEXTS, TEXTS[0][:30])]
    paired = spans.pair(prompts, responses, *tokenizers)
    student, params = attending(tokenizers[0])
    batch = jax.tree.map(jnp.asarray, paired.student.batch(np.arange(4)))
    want = np.asarray(spoken(student, params, batch))
    teacher = (-1 - np.arange(want.size).reshape(want.shape) % 7).astype(np.float32)
    table = spans.with_teacher(paired.student, teacher * paired.student["spans"]["weight"])
    length = table["tokens"].shape[1] + 16
    packed, places = spans.pack(table, length)
    assert len(packed) < len(table) and packed["tokens"].shape[1] == length
    for made in (packed, spans.aimed(packed)):
        got = spoken(student, params, jax.tree.map(jnp.asarray, made.batch(np.arange(len(made)))))
        np.testing.assert_allclose(places.gather(np.asarray(got)), want, rtol=1e-4, atol=1e-4)
    for name in ("weight", "teacher"):
        np.testing.assert_array_equal(places.gather(packed["spans"][name]), table["spans"][name])
    assert packed["spans"]["weight"].sum() == table["spans"]["weight"].sum()

    with pytest.raises(UserError, match="more than the row length"):
        spans.pack(table, 8)


def test_a_long_text_is_cut_where_both_have_a_boundary(tokenizers):
    whole = spans.pair(["the"], [TEXTS[0][3:]], *tokenizers)
    sizes = [int((side["segment"] > 0).sum()) for side in (whole.student, whole.teacher)]
    lengths = (sizes[0] - 6, sizes[1] - 2)
    cut = spans.pair(["the"], [TEXTS[0][3:]], *tokenizers, length=lengths, on_long="cut")
    assert (whole.cut, cut.cut) == (0, 1) and cut.bytes < whole.bytes == len(TEXTS[0].encode()) - 3
    shown = []
    for tokenizer, side, most in zip(tokenizers, (cut.student, cut.teacher), lengths, strict=True):
        of, ids = side["spans"]["of"][0], side["tokens"][0]
        assert side["tokens"].shape == (1, most) and (side["segment"] > 0).sum() <= most
        shown.append(b"".join(spans.spelled(tokenizer, ids[of >= 0].tolist())))
    assert shown[0] == shown[1] == TEXTS[0].encode()[3 : 3 + cut.bytes[0]]
    following = whole.student["spans"]["of"][0][(cut.student["segment"] > 0).sum()]
    assert following == cut.student["spans"]["weight"].sum(), "a span more would have fitted"
    with pytest.raises(UserError, match="no span ends within 3 tokens"):
        spans.pair(["the cat sat"], [TEXTS[0][11:]], *tokenizers, length=3, on_long="cut")


def test_the_end_of_a_text_is_a_span_of_no_bytes(tokenizers):
    plain = spans.pair(["the"], [" cat sat"], *tokenizers)
    ended = spans.pair(["the"], [" cat sat"], *tokenizers, end=True)
    np.testing.assert_array_equal(ended.bytes, plain.bytes)
    for tokenizer, before, after in zip(
        tokenizers, (plain.student, plain.teacher), (ended.student, ended.teacher), strict=True
    ):
        size = int((before["segment"] > 0).sum())
        assert after["tokens"][0, size] == tokenizer.eos
        assert after["spans"]["of"][0, size] == before["spans"]["weight"].sum()
    endless = replace(tokenizers[1], eos=None)
    with pytest.raises(UserError, match="end-of-text token in both"):
        spans.pair(["the"], [" cat sat"], tokenizers[0], endless, end=True)


def test_padded_vocabulary_rows_have_no_probability(tokenizers):
    paired = spans.pair(["the"], [TEXTS[0][3:]], *tokenizers)
    batch = jax.tree.map(jnp.asarray, paired.student.batch([0]))
    plain, padded = (spoken(*model(tokenizers[0], padding=n), batch) for n in (0, 20))
    np.testing.assert_allclose(padded, plain, rtol=1e-5)


def test_training_brings_the_students_spans_to_the_teachers(tokenizers):
    paired = spans.pair(["the", "an", "seven"], [t[5:] for t in TEXTS], *tokenizers)
    student, params = model(tokenizers[0])
    teacher, other = model(tokenizers[1], 1)
    said = predict(partial(span_logps, teacher), other, paired.teacher, batch=3)
    loss = partial(binary_kl, temperature=20.0)
    objective, state, batch = distilled(paired, said, student, params, loss)

    @jax.jit
    def value(params):
        total, weight, _ = objective(params, state, batch, KEY)
        return total / weight

    tx = optax.adam(0.1)
    memory, slope, first = tx.init(params), jax.jit(jax.grad(value)), value(params)
    for _ in range(25):
        updates, memory = tx.update(slope(params), memory)
        params = optax.apply_updates(params, updates)
    assert value(params) < 0.5 * first


def test_no_gradient_holds_tokens_times_vocabulary(tokenizers, monkeypatch):
    vocab = tokenizers[0].size
    monkeypatch.setitem(sequence.LIMIT, "cpu", 4 * vocab * 8)
    paired = spans.pair(["the"], [TEXTS[0][3:]], *tokenizers)
    student, params = model(tokenizers[0])
    said = -np.ones_like(paired.student["spans"]["weight"])
    objective, state, batch = distilled(paired, said, student, params, squared)

    def loss(params):
        return objective(params, state, batch, KEY)[0]

    found = [s for s in shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) if vocab in s]
    tokens = [np.prod(s) // vocab for s in found if len(s) == 3]
    assert tokens and max(tokens) <= 8 < batch["tokens"].size


def test_divergences_by_hand_and_in_their_limits():
    p, q = 0.3, 0.6
    want = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    got = binary_kl(jnp.log(q), jnp.log(p), jnp.array(1.0))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    a, b = -30.0, -50.0  # long stretches: a temperature keeps the signal
    limit = (a - b) + a * np.log(b / a)
    hot = 1e4 * binary_kl(jnp.array(b), jnp.array(a), jnp.array(9.0), temperature=1e4)
    np.testing.assert_allclose(hot, limit, rtol=2e-2)
    assert float(binary_kl(jnp.array(b), jnp.array(a), jnp.array(9.0))) < 1e-9
    np.testing.assert_allclose(squared(jnp.array(b), jnp.array(a), jnp.array(10.0)), 4.0)
    for ends in ((0.0, 0.0), (-1e-9, -80.0), (-200.0, 0.0)):
        value, slope = jax.value_and_grad(binary_kl)(*map(jnp.float32, ends), jnp.array(1.0))
        assert np.isfinite(value) and np.isfinite(slope) and value >= -1e-6
    teacher = jax.grad(binary_kl, argnums=1)(jnp.log(q), jnp.log(p), jnp.array(1.0))
    assert teacher == 0


def test_matching_keeps_its_gradient_at_any_temperature():
    q, p, one = jnp.log(0.02), jnp.log(0.05), jnp.array(3.0)
    slopes = [float(jax.grad(partial(matching, temperature=t))(q, p, one)) for t in (50.0, 500.0)]
    limit = np.log(0.05) / np.log(0.02) - 1  # of (a - b) + a log(b / a), by b
    np.testing.assert_allclose(slopes, limit, rtol=4e-2)
    both = matching(q, p, one, nll=0.5)
    np.testing.assert_allclose(both, binary_kl(q, p, one) - 0.5 * np.log(0.02), rtol=1e-5)
    assert float(jax.grad(partial(matching, nll=1.0))(p, p, one)) == pytest.approx(-1.0, abs=1e-5)


def test_gradient_of_the_binary_divergence():
    q, p = 0.6, 0.3
    got = jax.grad(binary_kl)(jnp.log(q), jnp.log(p), jnp.array(1.0))
    np.testing.assert_allclose(got, (q - p) / (1 - q), rtol=1e-5)  # d/d log q


def test_a_column_that_does_not_fit_is_refused(tokenizers):
    paired = spans.pair(["the"], [" cat sat"], *tokenizers)
    weight = paired.student["spans"]["weight"]
    for said, words in ((weight[:, :-1], "log-probabilities"), (weight + 1.0, "above 0")):
        with pytest.raises(UserError, match=words):
            spans.with_teacher(paired.student, said)
    student, params = model(tokenizers[0])
    batch = paired.student.batch([0])
    state = State(jnp.int32(0), jnp.int32(1), params, ())
    with pytest.raises(UserError, match="with_teacher"):
        distill_spans(student)(params, state, batch, KEY)
    batch.pop("spans")
    with pytest.raises(UserError, match="spans"):
        span_logps(student, params, batch)
