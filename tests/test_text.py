"""Tokenising by offsets: the response is found exactly, whatever the tokenizer does at the seam."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from w2s_jax.data.packing import pack
from w2s_jax.data.text import encode, tokenise
from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table


def words(known=("a", "b", "c", "q", ":", "yes", "no", "<s>", "</s>"), bos="<s>", eos="</s>"):
    """A word-level tokenizer: one token per blank-separated word, the rest unknown."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocab = {word: i for i, word in enumerate(["<unk>", *known])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos": vocab.get(bos), "eos": vocab.get(eos), "unk": 0}
    return Tokenizer(backend, **special)


def bytes_():
    """A byte-level tokenizer without merges: a character of n bytes is n tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def table(*pairs, **columns):
    prompts, responses = zip(*pairs, strict=True)
    return Table(
        {"prompt": np.array(prompts, object), "response": np.array(responses, object), **columns}
    )


def test_golden_row():
    out = tokenise(table(("q : a", " yes no")), words(), length=8, eos=True)
    ids = {w: i for i, w in enumerate(["<unk>", "a", "b", "c", "q", ":", "yes", "no", "<s>"])}
    want = [ids[w] for w in ("<s>", "q", ":", "a", "yes", "no")] + [9, 0]
    assert out["tokens"].tolist() == [want]
    assert out["segment"].tolist() == [[1] * 7 + [0]]
    assert out["position"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]
    assert out["mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
    assert {out[name].dtype for name in ("tokens", "segment", "position")} == {np.dtype(np.int32)}
    assert out["mask"].dtype == np.float32


def test_without_response_all_but_the_first():
    out = tokenise(table(("a b c", ""), ("a b", " c")), words(), length=4, bos=False)
    assert out["mask"].tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    out = tokenise(table(("a b c", "")), words(), length=4)
    assert out["mask"].tolist() == [[0, 1, 1, 1]]
    alone = tokenise(table(("", "a b")), words(), length=4, bos=False)
    assert alone["mask"].tolist() == [[0, 1, 0, 0]]  # nothing precedes the very first token


def test_same_columns_as_packing_alone():
    """One convention: tokenise and pack agree on a row that holds one document."""
    out = tokenise(table(("a b", " c")), words(), length=6, bos=False)
    ids = out["tokens"][0][:3].tolist()
    packed = pack([(ids, [0, 0, 1])], 6)
    for name in ("tokens", "segment", "position", "mask"):
        assert np.array_equal(out[name], packed[name])


CASES = [
    ("Q: why? A:", " because"),
    ("an unfinish", "ed business"),  # one token spans the seam
    ("Is it ", "true"),  # the space joins the response
    ("Is it", " true"),
    ("a\n\n", "b"),
    ("double  ", " space"),
    ("caf", "é au lait"),
    ("日本", "語です"),
    ("x ", "🙂 y"),
    ("ends with", "\n"),
    ("", "only response"),
]


def _check_seam(tokenizer, prompt, response):
    """Every character of the response is trained on; at most one token reaches back before it."""
    out = tokenise(table((prompt, response)), tokenizer, bos=False)
    real = out["segment"][0] > 0
    ids, mask = out["tokens"][0][real], out["mask"][0][real] > 0
    assert ids.tolist() == tokenizer.encode(prompt + response)  # the whole text, encoded once
    first = int(mask.argmax()) if mask.any() else len(ids)
    assert mask[first:].all() and not mask[:first].any()
    if prompt:
        assert response in tokenizer.decode(ids[first:].tolist())
        rest = tokenizer.decode(ids[first + 1 :].tolist()).replace("\ufffd", "")
        assert len(rest) < len(response)
        assert prompt.startswith(tokenizer.decode(ids[:first].tolist()).rstrip("\ufffd"))
    else:
        assert first == 1


@pytest.mark.parametrize(("prompt", "response"), CASES)
def test_seam_bytes(prompt, response):
    tokenizer = bytes_()
    _check_seam(tokenizer, prompt, response)
    out = tokenise(table((prompt, response)), tokenizer, bos=False)
    lead = 1 if not prompt else 0
    assert out["mask"].sum() == len(response.encode()) - lead


@pytest.mark.parametrize("folder", ["gpt2", "qwen2.5", "gpt_neox_olmo", "dolma2"])
def test_seam_real_vocabularies(shared_data, folder):
    place = shared_data / "tokenizers" / folder
    packed = place / "tokenizer.json.gz"
    tokenizer = Tokenizer.from_file(packed) if packed.exists() else Tokenizer.load(place)
    for prompt, response in CASES:
        _check_seam(tokenizer, prompt, response)


def test_seam_byte_fallback(shared_data):
    """SentencePiece spells unknown characters in bytes; all bytes of the response count."""
    pytest.importorskip("sentencepiece")
    tokenizer = Tokenizer.from_file(shared_data / "tokenizers" / "stories512" / "tok512.model")
    out = tokenise(table(("say", "日本")), tokenizer, bos=False)
    assert out["mask"].sum() == len("日本".encode())


def test_padding_and_length():
    pairs = [("a b", " c"), ("a", " b")]
    assert tokenise(table(*pairs), words())["tokens"].shape == (2, 8)
    assert tokenise(table(*pairs), words(), length=5)["tokens"].shape == (2, 5)
    prompts = Table({"prompt": np.array(["a b c"], object)})
    assert tokenise(prompts, words(), length=4)["mask"].sum() == 3


def test_drop_keeps_the_other_columns_in_step(caplog):
    pairs = [("a", " b"), ("a b c a b c", " a"), ("c", " b")]
    label = np.eye(2, dtype=np.float32)[[0, 1, 1]]
    given = table(*pairs, label=label, truth=np.array([0, 1, 1]), id=np.array(list("xyz"), object))
    with caplog.at_level(logging.WARNING, "w2s_jax"):
        out = tokenise(given, words(), length=4)
    assert "1 dropped" in caplog.text
    assert out["id"].tolist() == ["x", "z"]
    assert out["truth"].tolist() == [0, 1]
    assert np.array_equal(out["label"], label[[0, 2]])
    _, cut = encode(given, words(), length=4)
    assert (cut.rows, cut.dropped, cut.truncated, cut.longest) == (3, 1, 0, 8)
    assert cut.mean == (3 + 8 + 3) / 3


def test_truncate_keeps_bos_and_the_end():
    given = table(("a b c a b", " yes no"))
    out, cut = encode(given, words(), length=5, on_long="truncate")
    text = [words().token(i) for i in out["tokens"][0]]
    assert text == ["<s>", "a", "b", "yes", "no"]
    assert out["mask"].tolist() == [[0, 0, 0, 1, 1]]
    assert (cut.dropped, cut.truncated) == (0, 1)
    bare = tokenise(given, words(), length=3, on_long="truncate", bos=False)
    assert [words().token(i) for i in bare["tokens"][0]] == ["b", "yes", "no"]
    short = tokenise(given, words(), length=2, on_long="truncate", bos=False)
    assert short["mask"].tolist() == [[0, 1]]  # the first token is never a target


def test_same_rows_same_digest():
    given = table(("a b", " c"), ("b", " a"))
    assert tokenise(given, words()).digest() == tokenise(given, words()).digest()


@pytest.mark.parametrize(
    ("pairs", "tokenizer", "options", "message"),
    [
        ([("zz yy", " xx")], words(), {}, "tokenizer cannot encode the task: 100%.*'zz yy xx'"),
        ([("<s> a", " b")], words(), {}, "double BOS.*'<s> a b'"),
        ([("a b", " c")], words(), {"length": 3, "on_long": "error"}, "row 0 has 4 tokens"),
        ([("a b", " c")], words(), {"length": 3}, "no row fits in length 3: .* 4 tokens"),
        ([("a b", " c")], words(), {"on_long": "chop"}, "on_long must be"),
        ([("a b", " c")], words(), {"length": 1}, "length must be at least 2"),
        ([("a b", " c")], words(), {"bos": "maybe"}, "bos must be True, False or 'auto'"),
        ([("a b", " c")], words(eos="?"), {"eos": True}, "no EOS token"),
        ([("a b", " c"), ("a", " ")], words(), {}, "row 1 and 0 more have nothing to train"),
        ([("a", "")], words(), {"bos": False}, "nothing to train on"),
        ([("a", 3)], words(), {}, "column 'response' must be text, got int"),
        ([(None, "a")], words(), {}, "column 'prompt' must be text, got NoneType"),
    ],
)
def test_bad_input_is_one_line(pairs, tokenizer, options, message):
    with pytest.raises(UserError, match=message) as caught:
        tokenise(table(*pairs), tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_bad_tables():
    with pytest.raises(UserError, match="no column 'prompt'"):
        tokenise(Table({"text": np.array(["a"], object)}), words())
    with pytest.raises(UserError, match="no rows"):
        tokenise(Table({"prompt": np.array([], object)}), words())
    named = table(("a", " "), id=np.array(["k7"], object))
    with pytest.raises(UserError, match="row k7"):
        tokenise(named, words())


def test_unknown_share_just_below_the_bound_is_accepted():
    """1 % is the bound: 1 unknown of 100 passes, 2 do not."""
    line = " ".join(["a"] * 99 + ["zz"])
    tokenise(table((line, "")), words(), bos=False)
    with pytest.raises(UserError, match="cannot encode"):
        tokenise(table((line.replace("a ", "zz ", 1), "")), words(), bos=False)


def test_tokenizer_is_only_asked_for_what_it_promises():
    """Any object with these five attributes will do."""
    fake = SimpleNamespace(
        bos=None,
        eos=7,
        unknown_share=lambda texts: 0.0,
        encode_batch=lambda texts: [([1, 2], [(0, 1), (1, 2)]) for _ in texts],
    )
    out = tokenise(table(("x", "y")), fake, length=4, eos=True)
    assert out["tokens"].tolist() == [[1, 2, 7, 0]]
    assert out["mask"].tolist() == [[0, 1, 1, 0]]


def test_a_trimmed_space_of_the_prompt_stays_prompt():
    """Some byte-level tokenizers trim a space out of its token's offsets: (2, 2) is "x "'s own."""
    fake = SimpleNamespace(
        bos=None,
        eos=None,
        unknown_share=lambda texts: 0.0,
        encode_batch=lambda texts: [([1, 2, 3], [(0, 1), (2, 2), (2, 3)]) for _ in texts],
    )
    assert tokenise(table(("x ", "y")), fake, length=4)["mask"].tolist() == [[0, 0, 1, 0]]
