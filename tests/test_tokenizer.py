"""The tokenizer wrapper: what folders may hold, special ids, coverage, mendable faults."""

import gzip
import json

import pytest

from w2s_jax.errors import UserError
from w2s_jax.models import hf
from w2s_jax.tokenizer import Tokenizer

TEXTS = ["hello low lower", "new  newest widest\n", "naïve 日本 hello"]


def words(vocabulary, unk=None):
    """A backend that splits at white space and knows these words."""
    import tokenizers

    ids = {word: i for i, word in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=unk or "absent"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.fixture
def folder(tmp_path):
    words(["<pad>", "<s>", "</s>", "[?]", "one", "two"], unk="[?]").save(
        str(tmp_path / "tokenizer.json")
    )
    return tmp_path


def put(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def bytes_bpe(folder):
    """GPT-2 style files of a small byte-level BPE, and the library's own reading of them."""
    from tokenizers.implementations import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 3, vocab_size=290, show_progress=False)
    trained.save_model(str(folder))
    return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_reads_a_folder_with_usual_names(folder):
    t = Tokenizer.load(folder)
    assert (t.size, t.bos, t.eos, t.pad, t.unk) == (6, 1, 2, 0, None)
    assert t.encode("two one") == [5, 4]
    assert t.encode_ids(["one", "two two"]) == [[4], [5, 5]]
    assert t.encode_batch(["one two"]) == [([4, 5], [(0, 3), (4, 7)])]
    assert t.token(4) == "one" and t.token(99) is None


def test_special_tokens_by_config_then_map_then_model_config(folder):
    put(folder, "special_tokens_map.json", {"unk_token": {"content": "[?]"}, "eos_token": "one"})
    put(folder, "tokenizer_config.json", {"eos_token": "two", "bos_token": None})
    put(folder, "config.json", {"pad_token_id": 3, "bos_token_id": None})
    t = Tokenizer.load(folder)
    # eos: tokenizer_config wins; bos: said to be absent, so no usual name is guessed
    assert (t.bos, t.eos, t.pad, t.unk) == (None, 5, 3, 3)
    put(folder, "config.json", {"bos_token_id": [4, 5]})
    assert Tokenizer.load(folder).bos == 4


def test_no_special_token_is_ever_added(folder):
    import tokenizers

    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.save(str(path))
    assert backend.encode("one").ids == [1, 4, 2]
    assert Tokenizer.load(folder).encode("one") == [4]


def test_gpt2_files_read_as_the_library_reads_them(tmp_path):
    reference = bytes_bpe(tmp_path)
    t = Tokenizer.load(tmp_path)
    assert t.encode_ids(TEXTS) == [reference.encode(text).ids for text in TEXTS]
    assert all(t.decode(t.encode(text)) == text for text in TEXTS)
    assert all(t.covers(text) for text in TEXTS)
    other = tmp_path / "other"
    other.mkdir()
    for old, new in (("vocab.json", "encoder.json.gz"), ("merges.txt", "vocab.bpe.gz")):
        (other / new).write_bytes(gzip.compress((tmp_path / old).read_bytes()))
    assert Tokenizer.load(other).digest() == t.digest()


def test_known_ids_of_real_vocabularies(shared_data):
    root = shared_data / "tokenizers"
    assert Tokenizer.load(root / "gpt2").encode("Hello world") == [15496, 995]
    qwen = Tokenizer.load(root / "qwen2.5")
    assert qwen.encode("Hello, world 12") == [9707, 11, 1879, 220, 16, 17]
    assert (qwen.bos, qwen.token(qwen.eos)) == (None, "<|im_end|>")
    for name in ("gpt2", "qwen2.5", "gpt_neox_olmo"):
        t = Tokenizer.load(root / name)
        assert all(t.decode(t.encode(text)) == text for text in TEXTS)


def test_sentencepiece(shared_data, tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    t = Tokenizer.from_file(shared_data / "tokenizers" / "stories512" / "tok512.model")
    assert (t.size, t.bos, t.eos, t.unk) == (512, 1, 2, 0)
    text = "Once upon a time, naïve 日 end"
    ((ids, offsets),) = t.encode_batch([text])
    assert ids == t.encode(text) and t.decode([1, *ids, 2]) == text
    assert t.decode([1, *ids, 2], skip_special=False) == f"<s>{text}</s>"
    assert "".join(text[a:b] for a, b in offsets) == text  # nothing lost, nothing twice
    t.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest() == t.digest()


def test_save_and_load_keep_everything(folder, tmp_path):
    put(folder, "tokenizer_config.json", {"unk_token": "[?]", "chat_template": "{{ x }}"})
    t = Tokenizer.load(folder)
    t.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.digest() == t.digest() and copy.config["chat_template"] == "{{ x }}"
    assert (copy.bos, copy.eos, copy.pad, copy.unk) == (1, 2, 0, 3)


def test_digest_sees_vocabulary_and_special_ids(folder):
    t = Tokenizer.load(folder)
    assert t.digest() == Tokenizer.from_file(folder / "tokenizer.json").digest()
    put(folder, "config.json", {"pad_token_id": 2})
    put(folder, "tokenizer_config.json", {"pad_token": "</s>"})
    assert Tokenizer.load(folder).digest() != t.digest()


def test_transformers_reads_what_save_writes(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    Tokenizer.load(folder).save(tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    assert theirs.encode("two one", add_special_tokens=False) == [5, 4]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


def test_unknown_share(folder):
    put(folder, "special_tokens_map.json", {"unk_token": "[?]"})
    t = Tokenizer.load(folder)
    assert t.unknown_share(["one three", "two two"]) == 0.25
    assert t.covers("one two") and not t.covers("one x")
    assert t.unknown_share([]) == 0.0 and t.unknown_share([""]) == 0.0


def test_characters_dropped_without_an_unknown_token_count(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    t = Tokenizer(backend)
    assert t.encode("abxa") == [2, 0]  # the library drops x without a word
    assert t.unknown_share(["abxa"]) == pytest.approx(1 / 3)
    assert not t.covers("abxa") and t.covers("ab a".replace(" ", ""))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{broken", "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("tokenizer.json.gz", gzip.compress(b"x" * 999, mtime=0)[:20], "cannot read"),
        ("tokenizer.model", b"no model", "(?i)SentencePiece"),
        ("notes.txt", b"", "has no tokenizer"),
    ],
)
def test_faulty_folders_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_other_faults(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="must end in"):
        put(folder, "vocab.bin", {})
        Tokenizer.from_file(folder / "vocab.bin")
    with pytest.raises(UserError, match="cannot encode"):
        Tokenizer(words(["one"])).encode("two")
    with pytest.raises(UserError, match="cannot write"):
        Tokenizer.load(folder).save(folder / "vocab.bin" / "sub")
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(folder)


def test_merges_that_do_not_fit_their_vocabulary(tmp_path):
    bytes_bpe(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzz qq\n")
    with pytest.raises(UserError, match="byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_other_programs_begin_a_text_as_training_does() -> None:
    transformers = pytest.importorskip("transformers")
    folder = hf.locate("nano-2")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    assert theirs("q : 12").input_ids == [ours.bos, *ours.encode("q : 12")]
