"""Every kind of source gives the same table; every fault is one line that names its place."""

import gzip
import json
import sys

import numpy as np
import pytest

from w2s_jax.data.sources import local_splits, read, records
from w2s_jax.errors import UserError

ROWS = [
    {
        "id": f"r{i}",
        "split": "train" if i < 6 else "test",
        "text": f"text é {i}",
        "label": i % 2,
        "score": i / 4,
        "tokens": [i, i + 1, i + 2],
        "names": ["a"] * (i % 3 + 1),
    }
    for i in range(9)
]


def _lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _jsonl(path, rows=ROWS):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf8") as file:
        file.write(_lines(rows))
    return path


def _arrow(path, rows=ROWS):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".arrow":
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(path=str(path), features=data.features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    else:
        data.save_to_disk(path)
    return path


def _make(kind, folder):
    path = folder / f"rows{kind}"
    return _jsonl(path) if "json" in kind else _arrow(path)


KINDS = [".jsonl", ".jsonl.gz", ".parquet", ".arrow", "_saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_table_from_every_kind(tmp_path, kind):
    want = read(_jsonl(tmp_path / "want.jsonl"))
    table = read(_make(kind, tmp_path))
    assert table.digest() == want.digest()
    assert len(table) == 9
    assert set(table.columns) == {"id", "split", "text", "raw_label", "score", "tokens", "names"}
    assert table["text"][np.array([2, 0])].tolist() == ["text é 2", "text é 0"]
    assert table["tokens"][np.array([8])].tolist() == [[8, 9, 10]]
    assert table["tokens"][np.array([0])].dtype == np.int32
    assert table["score"][np.array([1])].dtype == np.float32
    assert table["raw_label"][np.arange(9)].tolist() == [i % 2 for i in range(9)]
    assert table["names"][np.arange(3)].tolist() == [["a"], ["a"] * 2, ["a"] * 3]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_columns_and_take(tmp_path, kind):
    path = _make(kind, tmp_path)
    if kind == "_saved":
        with pytest.raises(UserError, match="no split 'test'"):
            read(path, split="test")
        return
    table = read(path, split="test", columns=["id", "label"])
    assert table["id"][np.arange(3)].tolist() == ["r6", "r7", "r8"]
    assert set(table.columns) == {"id", "raw_label"}
    batch = read(path).take([3, 1]).batch([1, 0])
    assert batch["tokens"].tolist() == [[1, 2, 3], [3, 4, 5]]
    assert set(batch) == {"tokens", "score"}  # a raw label never reaches a device


def test_stored_columns_index_like_arrays(tmp_path):
    memory = read(_jsonl(tmp_path / "a.jsonl"))
    stored = read(_arrow(tmp_path / "a.parquet"))
    for index in (np.array([5, 5, 0]), slice(2, 4), np.array([], np.int64)):
        for name in ("id", "raw_label"):
            got, want = stored[name][index], memory[name][index]
            assert got.tolist() == want.tolist()
    assert stored["text"][4] == "text é 4"
    assert len(stored["text"]) == 9


def test_csv(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text('text,label\n"one, two",1\nthree,0\n')
    table = read(tmp_path / "a.csv")
    assert table["text"][np.arange(2)].tolist() == ["one, two", "three"]
    assert table["raw_label"][np.arange(2)].tolist() == [1, 0]


def test_folder_of_split_files(tmp_path):
    _jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:2])
    _jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[2:5])
    _jsonl(tmp_path / "test.jsonl.gz", ROWS[5:])
    assert {name: len(rows) for name, rows in local_splits(tmp_path).items()} == {
        "train": 5,
        "test": 4,
    }
    assert read(tmp_path, split="train")["id"].tolist() == ["r0", "r1", "r2", "r3", "r4"]
    with pytest.raises(UserError, match=r"no split None; it has \['test', 'train'\]"):
        read(tmp_path)


def test_folder_of_parquet_shards(tmp_path):
    _arrow(tmp_path / "train-00000-of-00002.parquet", ROWS[:4])
    _arrow(tmp_path / "train-00001-of-00002.parquet", ROWS[4:])
    assert read(tmp_path, split="train").digest() == read(_jsonl(tmp_path / "x.jsonl")).digest()


def test_saved_dict_of_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS[:4]), "dev": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both", split="dev")) == 9


def _array_record(folder, rows):
    """A small ArrayRecord data set written without tensorflow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    from tensorflow_datasets.core import sequential_writer

    place = folder / "toy" / "1.0.0"
    place.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "text": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int64),
            "tokens": tfds.features.Tensor(shape=(3,), dtype=np.int32),
        }
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="toy", version=tfds.core.Version("1.0.0"), data_dir=str(place), module_name="toy"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="toy rows")
    writer = sequential_writer.SequentialWriter(
        info, max_examples_per_shard=4, file_format="array_record"
    )
    writer.initialize_splits(["train"])
    writer.add_examples({"train": rows})
    writer.close_all()
    return place


def test_array_record_without_tensorflow(tmp_path):
    rows = [{k: row[k] for k in ("id", "text", "label", "tokens")} for row in ROWS]
    place = _array_record(tmp_path, rows)
    table = read(place, split="train")
    assert table.digest() == read(_jsonl(tmp_path / "same.jsonl", rows)).digest()
    assert table.take([7, 2])["text"].tolist() == ["text é 7", "text é 2"]
    assert list(records(place)[3].values()) and records(place)[3]["label"] == 1
    assert "tensorflow" not in sys.modules
    next(place.glob("*array_record-00001*")).unlink()
    with pytest.raises(UserError, match="cannot be read as ArrayRecord .no shard toy-train"):
        read(place, split="train")


def test_real_file(shared_data):
    table = read(shared_data / "text_cls" / "sciq.jsonl.gz", columns=["id", "question"])
    assert len(table) == 1000
    assert table["id"][0] == "sciq-validation-0"


# Bad input


def _bad(tmp_path, kind):
    path = tmp_path / "bad.jsonl"
    good = _lines(ROWS[:2])
    if kind == "gzip":
        whole = gzip.compress(_lines(ROWS * 200).encode())
        path = tmp_path / "bad.jsonl.gz"
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "notgzip":
        path = tmp_path / "bad.jsonl.gz"
        path.write_text(good)
    elif kind == "latin1":
        path.write_bytes(good.encode() + b'{"id": "\xe9"}\n')
    elif kind == "suffix":
        path = tmp_path / "bad.xlsx"
        path.write_text("x")
    elif kind == "parquet":
        path = tmp_path / "bad.parquet"
        path.write_bytes(b"PAR1 this is none")
    elif kind == "arrow":
        path = tmp_path / "bad.arrow"
        path.write_bytes(b"not arrow at all")
    elif kind == "gone":
        path = tmp_path / "gone.jsonl"
    elif kind == "folder":
        path = tmp_path / "bad"
        path.mkdir()
        (path / "notes.txt").write_text("x")
    elif kind == "saved":
        path = tmp_path / "bad"
        path.mkdir()
        (path / "state.json").write_text("{")
    else:
        path.write_text(good + kind)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ('{"id": "r2", \n', r"bad\.jsonl:3: not JSON"),
        ("[1, 2]\n", r"bad\.jsonl:3: a row must be a JSON object, got list"),
        ('{"id": "r2", "score": NaN}\n', r"bad\.jsonl:3: NaN is not a value"),
        ('{"id": "r2", "score": -Infinity}\n', r"bad\.jsonl:3: -Infinity is not a value"),
        (_lines([{"id": "r9", "split": "train"}]), "row r9 has no field 'text'"),
        (_lines([ROWS[2] | {"label": "one"}]), "column 'label' mixes types: int .* str in row 2"),
        (_lines([ROWS[2] | {"score": None}]), "column 'score' mixes types: float .* NoneType"),
        ("gzip", r"bad\.jsonl\.gz: damaged or truncated gzip after line \d+"),
        ("notgzip", r"bad\.jsonl\.gz: damaged or truncated gzip after line 0"),
        ("latin1", r"bad\.jsonl: not UTF-8 text"),
        ("suffix", r"bad\.xlsx: unknown kind of file"),
        ("parquet", r"bad\.parquet: cannot be read as parquet"),
        ("arrow", r"bad\.arrow: cannot be read as arrow"),
        ("gone", r"gone\.jsonl: no such file or folder"),
        ("folder", r"no data files .*found notes\.txt"),
        ("saved", "damaged saved dataset"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        read(_bad(tmp_path, kind))
    assert "\n" not in str(caught.value)


def test_bad_requests(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        read(path, split="dev")
    with pytest.raises(UserError, match=r"no column 'txt'; it has \['id'"):
        read(path, columns=["txt"])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        read(tmp_path / "empty.jsonl")


def test_nan_in_a_stored_column(tmp_path):
    rows = [{"score": 0.5}, {"score": float("nan")}]
    with pytest.raises(UserError, match="column 'score' is NaN in row 1"):
        read(_arrow(tmp_path / "a.parquet", rows))


def test_hub_offline_says_how_to_go_on():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"cannot load 'no-such-owner/no-such-set'.*--data") as e:
        read("no-such-owner/no-such-set", split="train")
    assert "\n" not in str(e.value)
