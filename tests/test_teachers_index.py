"""The index of a stored teacher, edited or damaged: one line, whatever was changed."""

import json
from pathlib import Path

import pytest
from test_teachers_hostile import K, V, store, whole

from w2s_jax.data.shards import INDEX
from w2s_jax.errors import UserError


def edit(folder: Path, change) -> None:
    path = next(folder.glob(f"*/{INDEX}"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def drop(*names):
    def change(index):
        for name in names[:-1]:
            index = index[name]
        del index[names[-1]]

    return change


def put(value, *names):
    def change(index):
        for name in names[:-1]:
            index = index[name]
        index[names[-1]] = value

    return change


EDITS = {
    "no size": drop("size"),
    "size 0": put(0, "size"),
    "size of text": put("2", "size"),
    "rows of text": put("7", "rows"),
    "fewer rows": put(5, "rows"),
    "no about": drop("about"),
    "about a list": put([], "about"),
    "a fact more": put(1, "about", "colour"),
    "a fact less": drop("about", "vocab"),
    "another k": put(2, "about", "k"),
    "k of text": put("3", "about", "k"),
    "another type": put("float32", "about", "dtype"),
    "no type": put("float12", "about", "dtype"),
    "a larger vocabulary": put(70_000, "about", "vocab"),
    "another table": put("0123456789abcdef", "about", "table"),
    "no fields": put([], "fields"),
    "a field less": lambda index: index["fields"].pop(),
    "another field": put(["ids", "uint8", [K]], "fields", 0),
    "no such type": put(["ids", "uint17", [K]], "fields", 0),
    "a negative shape": put(["ids", "uint16", [-3]], "fields", 0),
    "shards a list": put([], "shards"),
    "a shard less": drop("shards", "1"),
    "no such shard": put({"records": 1, "bytes": 1, "sha256": ""}, "shards", "9"),
    "a shard without bytes": drop("shards", "1", "bytes"),
    "a shard without records": drop("shards", "1", "records"),
    "a shard of other bytes": put(100, "shards", "1", "bytes"),
    "a shard of other records": put(1, "shards", "1", "records"),
    "records of text": put("4", "shards", "1", "records"),
    "no largest token": drop("shards", "1", "largest"),
    "an entry of text": put("x", "shards", "1"),
    "another storage": put("zip", "storage"),
    "ArrayRecord": put("array_record", "storage"),
    "another format": put(2, "format"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_index_is_one_line(tmp_path, name) -> None:
    store(tmp_path)
    edit(tmp_path, EDITS[name])
    with pytest.raises(UserError) as told:
        whole(tmp_path, vocab=V - 1 if name == "no largest token" else None)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"format": 1}', b"null"])
def test_an_index_that_is_none_is_one_line(tmp_path, content) -> None:
    store(tmp_path)
    next(tmp_path.glob(f"*/{INDEX}")).write_bytes(content)
    for use in (whole, store):
        with pytest.raises(UserError, match="index.json is damaged .* write it again"):
            use(tmp_path)
