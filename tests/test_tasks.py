"""Splits: exactly balanced, disjoint, stable under the seed; bad rows are named."""

import gzip
import json

import numpy as np
import pytest

from w2s_jax.data import tasks
from w2s_jax.errors import UserError

ENDINGS = ["e0", "e1", "e2", "e3"]


def _write(path, rows):
    with gzip.open(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _boolq(count, split, positive=0.7, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "id": f"{split}-{i}",
            "split": split,
            "passage": f"passage {split} {i}",
            "question": f"is it {i}",
            "label": int(rng.random() < positive),
        }
        for i in range(count)
    ]


def _sciq(count, split):
    words = ("correct_answer", "distractor1", "distractor2", "distractor3")
    return [
        {"id": f"{split}-{i}", "split": split, "question": f"question {i}"}
        | {word: f"{word[:2]} {i} {j}" for j, word in enumerate(words)}
        for i in range(count)
    ]


def _tables(splits):
    return {name: getattr(splits, name) for name in ("train", "transfer", "dev", "test")}


def test_balanced_disjoint_and_typed(tmp_path):
    _write(tmp_path / "boolq.jsonl.gz", _boolq(400, "train") + _boolq(100, "validation"))
    splits = tasks.load("boolq", seed=0, data=tmp_path)
    every = []
    for table in _tables(splits).values():
        assert table["truth"].sum() * 2 == len(table) > 0
        assert table["label"].dtype == np.float32 and table["truth"].dtype == np.int32
        assert np.array_equal(table["label"].argmax(1), table["truth"])
        assert np.array_equal(table["label"].sum(1), np.ones(len(table)))
        every += table["id"].tolist()
    assert len(every) == len(set(every))
    assert len(splits.train) == len(splits.transfer)
    assert all("passage validation" in prompt for prompt in splits.test["prompt"])
    zeros = sum(1 - row["label"] for row in _boolq(400, "train"))
    assert 2 * zeros - 2 <= len(splits.train) * 2 + len(splits.dev) <= 2 * zeros


def test_sizes_are_per_half_and_smaller_sets_are_prefixes_of_the_coin(tmp_path):
    _write(tmp_path / "sciq.jsonl.gz", _sciq(500, "train") + _sciq(80, "test"))
    splits = tasks.load("sciq", seed=0, data=tmp_path, train=60, dev=20, test=30)
    assert [len(table) for table in _tables(splits).values()] == [60, 60, 20, 30]
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())


def test_test_set_does_not_depend_on_the_seed(tmp_path):
    _write(tmp_path / "sciq.jsonl.gz", _sciq(300, "train") + _sciq(100, "test"))
    one, other = (tasks.load("sciq", seed=seed, data=tmp_path, test=40) for seed in (1, 2))
    assert one.test.digest() == other.test.digest()
    assert one.train.digest() != other.train.digest()
    again = tasks.load("sciq", seed=1, data=tmp_path, test=40)
    assert all(_tables(again)[k].digest() == _tables(one)[k].digest() for k in _tables(one))


def test_questions_met_in_test_leave_training(tmp_path):
    """Half of the training rows repeat test questions; the coins would hide that from an id."""
    test = _sciq(60, "test")
    copies = [row | {"split": "train", "id": f"copy-{row['id']}"} for row in test]
    fresh = [row | {"question": f"fresh {i}"} for i, row in enumerate(_sciq(60, "train"))]
    path = _write(tmp_path / "x.jsonl.gz", test + copies + fresh)
    splits = tasks.load("sciq", seed=3, data=path)
    tested = set(splits.test["prompt"])
    for name in ("train", "transfer", "dev"):
        assert not tested & set(_tables(splits)[name]["prompt"])


def test_duplicates_count_once(tmp_path):
    rows = _sciq(100, "train")
    path = _write(tmp_path / "x.jsonl.gz", rows * 3 + _sciq(30, "test"))
    splits = tasks.load("sciq", seed=0, data=path)
    prompts = [p for table in _tables(splits).values() for p in table["prompt"]]
    assert len(prompts) == len(set(prompts)) <= 100


def test_one_split_only_is_divided_by_unit(tmp_path):
    rows = [
        {"context": f"c{i // 5}", "question": f"q{i}", "answers": ENDINGS, "label": i % 4}
        for i in range(1000)
    ]
    splits = tasks.load("quail", seed=0, data=_write(tmp_path / "quail.jsonl.gz", rows))
    passage = {
        name: {prompt.split("\n")[2] for prompt in table["prompt"]}
        for name, table in _tables(splits).items()
    }
    assert not passage["test"] & (passage["train"] | passage["transfer"] | passage["dev"])
    assert 100 < len(splits.test) < 300  # one in five of 1000


@pytest.mark.parametrize("columns", [("text", "label"), ("txt", "hard_label")])
def test_own_file(tmp_path, columns):
    rows = [dict(zip(columns, (f"text {i}", i % 2), strict=True)) for i in range(200)]
    splits = tasks.load("mydata", seed=0, data=_write(tmp_path / "own.jsonl.gz", rows))
    assert splits.train["prompt"][0].startswith("text ")
    number = [int(prompt.split()[1]) for prompt in splits.train["prompt"]]
    assert np.array_equal(np.array(number) % 2, splits.train["truth"])


def test_own_pairs_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": f"p {i}", "response": f" r {i}", "label": i % 2, "split": s}
        for i, s in enumerate(["train"] * 80 + ["test"] * 20)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    splits = tasks.load("mine", seed=0, data=tmp_path)
    assert len(splits.test) == 20
    assert sorted(splits.test["prompt"].tolist()) == sorted(f"p {i}" for i in range(80, 100))


def test_hyphens_are_underscores(tmp_path):
    rows = _boolq(100, "train") + _boolq(40, "test")
    rows = [{"label": row["label"], "scenario": row["passage"]} | row for row in rows]
    _write(tmp_path / "ethics_justice.jsonl.gz", rows)
    assert len(tasks.load("ethics-justice", seed=0, data=tmp_path).test) > 0


def test_arithmetic_is_built_in_and_disjoint():
    pytest.importorskip("w2s_jax.data.arithmetic")
    splits = tasks.load("arithmetic", seed=1, train=32, test=24, dev=16)
    other = tasks.load("arithmetic", seed=2, train=32, test=24, dev=16)
    assert [len(table) for table in _tables(splits).values()] == [32, 32, 16, 24]
    assert splits.test.digest() == other.test.digest()
    prompts = [p for table in _tables(splits).values() for p in table["prompt"]]
    assert len(prompts) == len(set(prompts))
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())


LOCAL = sorted(
    {"boolq", "cosmos_qa", "ethics_justice", "ethics_virtue", "ethics_utilitarianism", "anli_r2"}
    | {"hellaswag", "piqa", "quail", "sciq", "sciq_with_support", "social_i_qa", "winogrande"}
    | {"commonsense_qa", "arc_easy", "arc_challenge", "strategy_qa", "ethics_commonsense"}
    | {"sms_spam", "sentiment_sentences", "twenty_newsgroups_6", "clinc150", "banking77"}
)


def test_every_local_file_has_a_task(shared_data):
    stems = {path.name.split(".")[0] for path in (shared_data / "text_cls").glob("*.jsonl.gz")}
    assert stems == {tasks.TASKS[name].file or name for name in LOCAL}


@pytest.mark.parametrize("name", LOCAL)
def test_local_files_load(shared_data, name):
    splits = tasks.load(name, seed=0, data=shared_data / "text_cls", train=40, dev=10, test=40)
    assert [len(table) for table in _tables(splits).values()] == [40, 40, 10, 40]
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())
    every = [one for table in _tables(splits).values() for one in table["id"]]
    assert len(every) == len(set(every)) == 130


# Bad input: one line that names the place


GOOD = {"id": "r1", "passage": "p", "question": "q", "label": 1}
SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "d"}
SIQA |= {"id": "r1", "label": "0"}
CHOICES = {"text": ["up", "down"], "label": ["A", "B"]}
OPENBOOK = {"id": "r1", "question_stem": "q", "choices": CHOICES, "answerKey": "E"}
DREAM = {"id": "r1", "dialogue": ["M: hi"], "question": "q", "choice": ["x", "y"], "answer": "z"}
WINOGRANDE = {"id": "r1", "sentence": "s", "option1": "a", "option2": "b", "answer": "2"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("boolq", GOOD | {"label": 2}, "row r1: field 'label' is 2, out of range 0..1"),
        ("boolq", GOOD | {"label": "yes"}, "row r1: field 'label' must be a whole number"),
        ("boolq", GOOD | {"label": 0.5}, "row r1: field 'label' must be a whole number"),
        ("boolq", GOOD | {"label": None}, "row r1: field 'label' must be a whole number"),
        ("boolq", {"id": "r1", "passage": "p", "question": "q"}, "no field answer or label"),
        ("boolq", {"id": "r1", "label": 1, "question": "q"}, "row r1: no field 'passage'"),
        ("boolq", GOOD | {"passage": 3}, "row r1: field 'passage' must be text, got int"),
        ("hellaswag", {"id": "r1", "ctx": "c", "endings": "e", "label": 0}, "list of texts"),
        ("hellaswag", {"id": "r1", "ctx": "c", "endings": ["e"], "label": 0}, "at least 2"),
        ("cola", {"id": "r1", "sentence": "s", "label": -1}, "is -1, out of range"),
        ("social_i_qa", SIQA, "out of range 1..3"),
        ("openbookqa", OPENBOOK, "not one of"),
        ("dream", DREAM, "not one of 'choice'"),
        ("winogrande", WINOGRANDE, "no blank"),
        ("mine", {"id": "r1", "text": "t"}, "row r1: no field label or hard_label"),
        ("mine", {"id": "r1", "prompt": "t", "label": 1}, "row r1: no field 'response'"),
    ],
)
def test_bad_rows_name_file_and_row(tmp_path, name, row, message):
    path = _write(tmp_path / "bad.jsonl.gz", [row])
    with pytest.raises(UserError, match=message) as caught:
        tasks.load(name, seed=0, data=path)
    assert str(path) in str(caught.value) and "row r1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_requests(tmp_path):
    _write(tmp_path / "boolq.jsonl.gz", _boolq(50, "train", positive=1.1) + _boolq(9, "validation"))
    with pytest.raises(UserError, match=r"unknown task 'nope'.*boolq.*--data"):
        tasks.load("nope", seed=0)
    with pytest.raises(UserError, match=r"no piqa\.jsonl.*it has boolq\.jsonl\.gz"):
        tasks.load("piqa", seed=0, data=tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        tasks.load("piqa", seed=0, data=tmp_path / "gone")
    with pytest.raises(UserError, match="too few rows.*class may be missing"):
        tasks.load("boolq", seed=0, data=tmp_path)
    with pytest.raises(UserError, match="train=1 rows; at least 2"):
        tasks.load("boolq", seed=0, data=tmp_path, train=1)
    with pytest.raises(UserError, match="no Hub copy"):
        tasks.load("banking77", seed=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        tasks.load("piqa", seed=0, data=tmp_path / "empty.jsonl")
