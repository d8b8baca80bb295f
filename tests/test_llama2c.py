"""llama2.c files: layout, rotary reordering, tokenizers equal to SentencePiece, real stories."""

import gzip
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.models import hf, llama2c
from w2s_jax.models.transformer import decode, transformer

SIZES = {"width": 16, "ffn": 12, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 9, "length": 8}


def _file(path, sizes=SIZES, tied=True, seed=0):
    """A random version 0 file, and its arrays."""
    d, f, n, v, t = (sizes[k] for k in ("width", "ffn", "layers", "vocab", "length"))
    h = d // sizes["heads"]
    kv = sizes["kv_heads"] * h
    shapes = {
        "embedding": (v, d),
        "attention_norm": (n, d),
        "wq": (n, d, d),
        "wk": (n, kv, d),
        "wv": (n, kv, d),
        "wo": (n, d, d),
        "ffn_norm": (n, d),
        "w1": (n, f, d),
        "w2": (n, d, f),
        "w3": (n, f, d),
        "norm": (d,),
        "tables": (2, t, h // 2),
        **({} if tied else {"output": (v, d)}),
    }
    rng = np.random.default_rng(seed)
    arrays = {k: rng.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}
    head = list(sizes.values())
    head[5] = v if tied else -v
    blob = struct.pack("<7i", *head) + b"".join(a.tobytes() for a in arrays.values())
    path.write_bytes(blob)
    return arrays


def _run(arrays, tokens, sizes=SIZES):
    """llama2.c's forward pass for one row in numpy, with its interleaved rotary pairs."""
    heads, kv_heads, d = sizes["heads"], sizes["kv_heads"], sizes["width"]
    h, length = d // heads, len(tokens)
    rate = 10_000.0 ** (-np.arange(0, h, 2) / h)
    turn = np.exp(1j * np.arange(length)[:, None] * rate)

    def norm(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w

    def rotate(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = arrays["embedding"][tokens].astype(np.float64)
    for i in range(sizes["layers"]):
        y = norm(x, arrays["attention_norm"][i])
        q = rotate((y @ arrays["wq"][i].T).reshape(length, heads, h))
        k = rotate((y @ arrays["wk"][i].T).reshape(length, kv_heads, h))
        v = (y @ arrays["wv"][i].T).reshape(length, kv_heads, h)
        k, v = (np.repeat(z, heads // kv_heads, axis=1) for z in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(h)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, v).reshape(length, d) @ arrays["wo"][i].T
        y = norm(x, arrays["ffn_norm"][i])
        gate = y @ arrays["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ arrays["w3"][i].T)) @ arrays["w2"][i].T
    return norm(x, arrays["norm"]) @ arrays.get("output", arrays["embedding"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_reference_forward_pass(tmp_path, tied):
    arrays = _file(tmp_path / "m.bin", tied=tied)
    config, params = llama2c.read(tmp_path / "m.bin")
    tokens = np.array([3, 1, 4, 1, 5, 8, 2, 6])
    out = decode(transformer(config).apply(params, jnp.asarray(tokens[None])))
    np.testing.assert_allclose(out[0], _run(arrays, tokens), rtol=1e-4, atol=1e-4)


def _spoil(data: bytes, kind: str) -> bytes:
    return {
        "short": data[:20],
        "truncated": data[:-8],
        "longer": data + b"\0" * 8,
        "other format": b"GGUF" + data[4:],
        "negative": struct.pack("<i", -3) + data[4:],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "too short"),
        ("truncated", "is truncated: it ends within sin"),
        ("longer", "2 numbers more"),
        ("other format", "not a version 0"),
        ("negative", "not a version 0"),
    ],
)
def test_broken_checkpoints_are_refused(tmp_path, kind, message):
    path = tmp_path / "m.bin"
    _file(path)
    path.write_bytes(_spoil(path.read_bytes(), kind))
    with pytest.raises(UserError, match=message):
        llama2c.read(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", b"{"),
        ("t.json", b'{"vocab": ["a", "b"], "scores": [0.0]}'),
        ("t.json", b'{"vocab": ["a", "a"]}'),
        ("t.bin", struct.pack("<ifi", 3, 0.0, 9) + b"abc"),
        ("t.model", b"\x0a\xff"),
        ("t.model", b"not a protocol buffer"),
        ("t.txt", b"a b c"),
    ],
)
def test_broken_tokenizers_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        llama2c.tokenizer(tmp_path / name)


def test_main_prints_one_line_and_exits_2(tmp_path, capsys):
    assert llama2c.main(["absent.bin", "t.model", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() == "absent.bin does not exist"
    assert llama2c.main(["only-one"]) == 2


def test_a_merge_is_ranked_by_what_it_makes(tmp_path):
    vocab = ["<unk>", "<s>", "</s>", llama2c.SPACE, "a", "b", "c", "ab", "bc", "abc"]
    scores = [0, 0, 0, -9, -9, -9, -9, -2, -1, -3]
    (tmp_path / "t.json").write_text(json.dumps({"vocab": vocab, "scores": scores}))
    backend = llama2c.tokenizer(tmp_path / "t.json")
    assert backend.encode("abc  ab ").tokens == [llama2c.SPACE, "abc", llama2c.SPACE, "ab"]
    assert backend.encode("abcb").tokens == [llama2c.SPACE, "abc", "b"]
    assert backend.decode(backend.encode("abc ab").ids) == "abc ab"


def _texts(shared_data):
    folder = shared_data / "text"
    with gzip.open(folder / "c4_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(150), strict=False)]
    with gzip.open(folder / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        plays = file.read().split("\n\n")[:200]
    odd = [" two  spaces ", "\n a\n", "a\tb \n  c", "é ü 漢字 ﬁ", "", " ", "\n", " \n "]
    return texts + plays + odd


@pytest.mark.parametrize("name", ["tok512.model", "tok512.bin", "tok512.json", "tok105.model"])
def test_tokenizers_equal_sentencepiece_on_real_text(shared_data, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared_data / "models" / name
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path.with_suffix(".model")))
    backend = llama2c.tokenizer(path)
    for text in _texts(shared_data):
        want = reference.encode(text)
        assert backend.encode(text, add_special_tokens=False).ids == want
        if reference.unk_id() not in want:
            assert backend.decode(want) == reference.decode(want)


@pytest.mark.parametrize(
    ("model", "words", "start"),
    [
        (
            "stories260K",
            "tok512",
            "Once upon a time, there was a little girl named Lily. She loved",
        ),
        ("babyllama_char105", "tok105", "Once upon a time, there was a little girl named"),
    ],
)
def test_real_weights_write_stories(shared_data, tmp_path, model, words, start):
    models = shared_data / "models"
    arguments = [models / f"{model}.bin", models / f"{words}.model", tmp_path / "m"]
    assert llama2c.main([str(a) for a in arguments]) == 0
    loaded, params, tokenizer = hf.load(tmp_path / "m")
    assert hf.fingerprint(params) == hf.fingerprint(llama2c.read(models / f"{model}.npz")[1])
    [story] = complete(loaded, params, tokenizer, [""], jax.random.key(0), tokens=len(start) + 1)
    assert story.startswith(start)
