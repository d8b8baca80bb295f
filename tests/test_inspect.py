"""The start-up inspection shows what is trained on and refuses what it can see is wrong."""

import numpy as np
import pytest

from w2s_jax.data.inspect import inspect, render
from w2s_jax.data.packing import pack
from w2s_jax.data.tasks import Splits, load
from w2s_jax.data.text import tokenise
from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table

WORDS = ["<unk>", "<s>", "q", ":", "yes", "no", *(f"n{i}" for i in range(60))]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return Tokenizer(backend, bos=1, unk=0)


def _table(numbers, labels=None):
    numbers = list(numbers)
    truth = np.array([n % 2 for n in numbers], np.int32)
    return Table(
        {
            "id": np.array([f"r{n}" for n in numbers], object),
            "prompt": np.array([f"q : n{n}" for n in numbers], object),
            "response": np.array([" yes" if y else " no" for y in truth], object),
            "label": np.eye(2, dtype=np.float32)[truth] if labels is None else labels,
            "truth": truth,
        }
    )


def _splits(**changed):
    parts = {
        "train": _table(range(0, 20)),
        "transfer": _table(range(20, 40)),
        "dev": _table(range(40, 46)),
        "test": _table(range(46, 60)),
    }
    return Splits(**{**parts, **changed})


def test_report(tokenizer):
    report = inspect(_splits(), tokenizer, length=6)
    assert report.example == "<s> q : n0[[no]]"
    assert {name: part.rows for name, part in report.parts.items()} == {
        "train": 20,
        "transfer": 20,
        "dev": 6,
        "test": 14,
    }
    assert all(part.balance == (0.5, 0.5) for part in report.parts.values())
    assert report.parts["test"].cut.mean == report.parts["test"].cut.longest == 5
    text = str(report)
    for want in ("[[no]]", "train: classes 50.0% 50.0%; 20 rows, 5.0 tokens", "0.00% unknown"):
        assert want in text


def test_counts_of_cut_rows(tokenizer):
    long = _table(range(4)).with_columns(
        prompt=np.array(["q : n1 n1 n1", "q : n2", "q : n3", "q : n4"], object)
    )
    assert inspect(long, tokenizer, length=5).parts["table"].cut.dropped == 1
    cut = inspect(long, tokenizer, length=5, on_long="truncate").parts["table"].cut
    assert (cut.dropped, cut.truncated, cut.longest, cut.mean) == (0, 1, 7, (7 + 5 * 3) / 4)


def test_tokens_already_there(tokenizer):
    packed = pack([([2, 3, 6, 4], [0, 0, 0, 1]), ([2, 3, 7], None)], 8)
    report = inspect({"train": packed}, tokenizer)
    assert report.example == "q : n0[[yes]]q[[: n1]]"
    assert report.parts["train"].balance == ()
    assert report.parts["train"].cut.longest == 7


def test_render_marks_exactly_the_mask(tokenizer):
    out = tokenise(_table([7]), tokenizer, length=8)
    assert render(out, 0, tokenizer) == "<s> q : n7[[yes]]"
    out = tokenise(_table([7]).without("response"), tokenizer, length=8)
    assert render(out, 0, tokenizer) == "<s>[[q : n7]]"


def test_long_prompts_are_shortened_in_the_middle(tokenizer):
    long = _table([1, 2]).with_columns(prompt=np.array(["q : " + "n3 " * 900] * 2, object))
    long = long.with_columns(response=np.array(["yes", "no"], object))
    report = inspect(long, tokenizer)
    assert len(report.example) < 700
    assert report.example.startswith("<s> q :") and report.example.endswith("[[yes]]")


def _labels(row):
    label = np.eye(2, dtype=np.float32)[np.arange(20) % 2]
    label[3] = row
    return _table(range(20), label)


def _changed(name, tokenizer):
    """Splits with one fault."""
    good = _table(range(20))
    tokens = tokenise(good, tokenizer, length=8)
    mask, ids = tokens["mask"].copy(), tokens["tokens"].copy()
    mask[5], ids[4, 1] = 0, 1
    negative, high = tokens["mask"].copy(), tokens["tokens"].copy()
    negative[2, 1], high[0, 2] = -1, 500
    empty = good.take(np.array([], np.int64))
    return {
        "empty": {"test": empty.with_columns(label=np.zeros((0, 2), np.float32))},
        "duplicate": {"test": _table([*range(46, 59), 7])},
        "nan": {"train": _labels([np.nan, 1])},
        "range": {"train": _labels([1.5, -0.5])},
        "sum": {"train": _labels([0.5, 0.2])},
        "single": {"train": _table(range(0, 20, 2))},
        "bos": {"train": tokens.with_columns(tokens=ids)},
        "text bos": {"train": good.with_columns(prompt=np.array(["<s> q"] * 20, object))},
        "mask": {"train": tokens.with_columns(mask=mask)},
        "negative": {"train": tokens.with_columns(mask=negative)},
        "vocabulary": {"train": tokens.with_columns(tokens=high)},
        "unknown": {"train": good.with_columns(prompt=np.array(["what is"] * 20, object))},
        "no segment": {"train": tokens.without("segment")},
        "no text": {"train": Table({"id": good["id"]})},
    }[name]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty", "split 'test' is empty"),
        ("duplicate", "1 rows stand in both 'train' and 'test', the first is row 13 of 'test'"),
        ("nan", "split 'train': the label of row r3 is NaN"),
        ("range", "split 'train': the label of row r3 is out of range"),
        ("sum", "split 'train': the label of row r3 is no distribution"),
        ("single", "split 'train': every row has class 0"),
        ("bos", "split 'train': double BOS in row r4"),
        ("text bos", "split 'train': row 0: double BOS"),
        ("mask", "split 'train': row r5 has an all-zero mask"),
        ("negative", "the mask of row r2 is negative"),
        ("vocabulary", "go from 0 to 500, the tokenizer has 66"),
        ("unknown", "split 'train': the tokenizer cannot encode the task"),
        ("no segment", "needs the column 'segment'"),
        ("no text", "nothing to inspect"),
    ],
)
def test_faults_are_refused(tokenizer, fault, message):
    with pytest.raises(UserError, match=message) as caught:
        inspect(_splits(**_changed(fault, tokenizer)), tokenizer, length=8)
    assert "\n" not in str(caught.value)


def test_nothing_at_all(tokenizer):
    with pytest.raises(UserError, match="no split"):
        inspect({}, tokenizer)


def test_real_task_with_a_real_vocabulary(shared_data):
    pytest.importorskip("sentencepiece")
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "gpt2")
    splits = load("sciq", seed=0, data=shared_data / "text_cls", train=100)
    report = inspect(splits, tokenizer, length=64)
    assert report.example.startswith("<|endoftext|>Q: ")
    assert report.example.endswith(f"[[{splits.train['response'][0]}]]")
    stories = shared_data / "tokenizers" / "stories512" / "tok512.model"
    assert "[[" in str(inspect(splits, Tokenizer.from_file(stories), length=256))
