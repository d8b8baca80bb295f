"""Bad input through the real command line: one clear line, exit code 2, earlier results intact.

A case names what is wrong with one thing (a flag, the data file, the model folder) of a command
that works, and words that its line must contain.
"""

import gzip
import json
from collections.abc import Callable

import numpy as np
import pytest
from bad_world import Case, Spoil, World, flags, refused, rows, stopped, weights


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    return World(tmp_path)


def _same_size(world: World) -> None:
    world.flags["--strong"] = str(world.model)


def _no_such_task(world: World) -> None:
    world.flags["--task"] = "bool_q"
    del world.flags["--data"]


FLAGS: dict[str, Case] = {
    "unknown flag": (flags(taks="boolq"), ("--taks", "--task")),
    "unknown preset": (flags(preset="huge"), ("'huge'", "tiny")),
    "unknown task": (_no_such_task, ("'bool_q'", "boolq")),
    "unknown weak model": (flags(weak="nano-77"), ("nano-77",)),
    "unknown strong model": (flags(strong="nano-77"), ("nano-77",)),
    "unknown loss": (flags(losses="naive hinge"), ("hinge", "confidence")),
    "unknown block": (flags(blocks="transfer everything"), ("everything", "features")),
    "unknown feature": (flags(feature="first"), ("first", "likelihood")),
    "unknown tracker": (flags(track="paper"), ("--track",)),
    "unknown mesh axis": (flags(mesh="rows=2"), ("rows=2", "fsdp")),
    "unknown optimizer": (flags(weak_tune__optimizer="adamant"), ("adamant", "adamw")),
    "unknown schedule": (flags(weak_tune__schedule="cosinus"), ("cosinus", "cosine")),
    "unknown link of the chain": (flags(chain="nano-77"), ("nano-77",)),
    "plan for nothing": (flags(plan="v99:8"), ("v99:8", "v5e:8x8")),
    "mesh too large": (flags(mesh="data=999"), ("999",)),
    "a value is missing": (flags(seeds=""), ("--seeds",)),
    "no seeds": (flags(seeds="0"), ("--seeds",)),
    "a fraction of a seed": (flags(seeds="1.5"), ("--seeds", "1.5")),
    "no device": (flags(devices="0"), ("--devices",)),
    "negative learning rate": (flags(strong_tune__lr="-0.1"), ("lr", "-0.1")),
    "learning rate is NaN": (flags(strong_tune__lr="nan"), ("lr", "nan")),
    "empty batch": (flags(weak_tune__batch="0"), ("batch", "0")),
    "negative epochs": (flags(weak_tune__epochs="-1"), ("epochs", "-1")),
    "one training row": (flags(train="1"), ("train", "1")),
    "no test rows": (flags(test="0"), ("--test",)),
    "negative dev rows": (flags(dev="-5"), ("--dev",)),
    "length below two tokens": (flags(length="1"), ("--length",)),
    "length beyond the model": (flags(length="4000"), ("128", "--length")),
    "no points": (flags(points="0"), ("points",)),
    "no student is larger": (_same_size, ("larger",)),
    "a share above one": (flags(shares="2.0", blocks="labels"), ("--shares",)),
    "a filter drops everything": (flags(drop="1.0", blocks="probes"), ("--drop",)),
    "negative repeats": (flags(repeats="-1", blocks="methods"), ("--repeats",)),
}


def lines(*wrong: object, keep: int = 120) -> Spoil:
    """The rows of one's own task with these after them (or instead of them)."""
    return lambda world: world.own_task([*rows(keep), *wrong])


def row(**changes: object) -> Spoil:
    """Every third row has these changes: a reader that stops early meets one as well."""
    return lambda world: world.own_task(
        [{**r, **changes} if i % 3 == 0 else r for i, r in enumerate(rows())]
    )


def raw(data: bytes, name: str = "own.jsonl") -> Spoil:
    """A data file of these bytes."""

    def spoil(world: World) -> None:
        (world.data / "own.jsonl").unlink()
        (world.data / name).write_bytes(data)

    return spoil


def _zipped() -> bytes:
    return gzip.compress("\n".join(map(json.dumps, rows(2000))).encode())


def _parquet(world: World) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows()), world.data / "own.parquet")
    path = world.data / "own.parquet"
    path.write_bytes(path.read_bytes()[:200])
    (world.data / "own.jsonl").unlink()


def _same_everywhere(world: World) -> None:
    twice = [{**r, "split": split} for split in ("test", "train") for r in rows(40)]
    world.own_task([r for r in twice if r["split"] == "test" or r["label"]])


def _unlabelled(world: World) -> None:
    world.own_task([{"prompt": r["prompt"], "response": r["response"]} for r in rows()])


def _long(world: World) -> None:
    world.own_task([{**r, "prompt": r["prompt"] * 400} for r in rows()])


DATA: dict[str, Case] = {
    "no such file": (flags(data="nowhere/own.jsonl"), ("nowhere/own.jsonl", "no such")),
    "folder without the task": (raw(b"{}", "other.jsonl"), ("own", "other.jsonl")),
    "unknown kind of file": (raw(b"x", "own.xls"), ("own.xls",)),
    "empty file": (raw(b""), ("no rows",)),
    "not JSON": (lines('{"prompt": '), ("own.jsonl:121", "not JSON")),
    "a row that is a list": (lines("[1, 2]"), ("own.jsonl:121", "object")),
    "not text": (raw(b"\xff\xfe\x00" * 40), ("not UTF-8",)),
    "truncated gzip": (raw(_zipped()[:-40], "own.jsonl.gz"), ("truncated",)),
    "not gzip at all": (raw(b"plain text", "own.jsonl.gz"), ("gzip",)),
    "truncated parquet": (_parquet, ("own.parquet",)),
    "a column is missing": (_unlabelled, ("label", "row", "'prompt'")),
    "a column has another name": (lines({"question": "x", "label": 1}, keep=0), ("question",)),
    "text is a number": (row(prompt=7), ("'prompt'", "text", "int")),
    "text is null": (row(response=None), ("'response'", "text")),
    "label is a word": (row(label="yes"), ("'label'", "whole number")),
    "label is a fraction": (row(label=0.7), ("'label'", "0.7")),
    "label out of range": (row(label=2), ("'label'", "range 0..1")),
    "label is NaN": (lines('{"prompt": "a", "response": "b", "label": NaN}'), ("NaN",)),
    "label is null": (row(label=None), ("'label'",)),
    "a single class": (lambda world: world.own_task(rows()[::2]), ("too few", "class")),
    "all rows are one row": (lambda world: world.own_task(rows(1) * 90), ("too few",)),
    "train stands in test": (_same_everywhere, ("too few",)),
    "too few rows": (lambda world: world.own_task(rows(6)), ("too few",)),
    "no text fits": (_long, ("64 tokens", "--length")),
}


def edit(name: str, change: Callable[[dict], object]) -> Spoil:
    """Change a JSON file of the model folder."""

    def spoil(world: World) -> None:
        value = json.loads((world.model / name).read_text())
        change(value)
        (world.model / name).write_text(json.dumps(value))

    return spoil


def replace(name: str, data: bytes | None) -> Spoil:
    """Put other bytes in the place of a file of the model folder; None removes it."""

    def spoil(world: World) -> None:
        (world.model / name).unlink()
        if data is not None:
            (world.model / name).write_bytes(data)

    return spoil


def reweigh(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    """Change the weights of the model folder."""

    def spoil(world: World) -> None:
        from safetensors.numpy import save_file

        values = weights()
        change(values)
        save_file(values, world.model / "model.safetensors")

    return spoil


def _truncated(world: World) -> None:
    path = world.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_vocabulary(world: World) -> None:
    from safetensors.numpy import save_file

    config(vocab_size=200)(world)
    values = weights()
    values["model.embed_tokens.weight"] = values["model.embed_tokens.weight"][:200].copy()
    save_file(values, world.model / "model.safetensors")


def _digits_only(world: World) -> None:
    path = world.model / "tokenizer.json"
    value = json.loads(path.read_text())
    kept = ["<|endoftext|>", "<unk>", *"0123456789"]
    value["model"] |= {"vocab": {t: i for i, t in enumerate(kept)}, "unk_token": "<unk>"}
    value["added_tokens"][0]["id"] = 0
    path.write_text(json.dumps(value))


def config(**changes: object) -> Spoil:
    """Change entries of config.json."""
    return edit("config.json", lambda c: c.update(changes))


QUERY = "model.layers.0.self_attn.q_proj.weight"
OTHER = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
SQUARE = {QUERY: np.zeros((3, 3), np.float32)}

MODELS: dict[str, Case] = {
    "no config": (replace("config.json", None), ("config.json",)),
    "config is not JSON": (replace("config.json", b"{"), ("config.json",)),
    "unknown architecture": (config(**OTHER), ("mamba", "llama")),
    "config lacks a size": (edit("config.json", lambda c: c.pop("hidden_size")), ("hidden_size",)),
    "config wider than the weights": (config(hidden_size=16), ("(257, 8)", "(257, 16)")),
    "config deeper than the weights": (config(num_hidden_layers=2), ("layers.1", "lack")),
    "heads do not divide": (config(num_attention_heads=3), ("3 heads",)),
    "no weights": (replace("model.safetensors", None), ("safetensors",)),
    "empty weights": (replace("model.safetensors", b""), ("model.safetensors", "truncated")),
    "truncated weights": (_truncated, ("model.safetensors", "truncated")),
    "a weight is missing": (reweigh(lambda w: w.pop(QUERY)), ("q_proj", "lack")),
    "a weight has another shape": (reweigh(lambda w: w.update(SQUARE)), ("q_proj", "(3, 3)")),
    "weights are NaN": (reweigh(lambda w: w[QUERY].fill(np.nan)), ("NaN",)),
    "no tokenizer": (replace("tokenizer.json", None), ("tokenizer",)),
    "tokenizer is damaged": (replace("tokenizer.json", b'{"model": {'), ("tokenizer.json",)),
    "more tokens than embeddings": (_other_vocabulary, ("257 tokens", "200")),
    "a tokenizer that cannot read the task": (_digits_only, ("unknown", "token")),
}


def vision(**values: str) -> Spoil:
    """The vision experiment with these flags."""

    def spoil(world: World) -> None:
        world.experiment = "weak_to_strong_vision"
        world.flags = {"--preset": "tiny", "--workdir": str(world.workdir)}
        flags(**values)(world)

    return spoil


def pictures(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    """The vision experiment on pictures of one's own with something wrong."""

    def spoil(world: World) -> None:
        rng = np.random.default_rng(0)
        sides = {"train": 100, "test": 60}
        arrays = {f"x_{k}": rng.integers(0, 255, (n, 8, 8), np.uint8) for k, n in sides.items()}
        arrays |= {f"y_{k}": np.arange(n) % 10 for k, n in sides.items()}
        change(arrays)
        np.savez(world.data / "own.npz", **arrays)
        path = str(world.data / "own.npz")
        vision(data=path, train="60", dev="20", test="40")(world)

    return spoil


def nano(**values: str) -> Spoil:
    """The pretraining experiment with these flags."""

    def spoil(world: World) -> None:
        world.experiment = "pretrain_nano"
        world.flags = {"--preset": "tiny", "--workdir": str(world.workdir), "--rungs": "mine"}
        flags(**{"width": "16", "heads": "2", "layers": "1", "tokens": "1e4", **values})(world)

    return spoil


def _text_npz(world: World) -> None:
    (world.data / "own.npz").write_text("plain text")
    vision(data=str(world.data / "own.npz"))(world)


OTHERS: dict[str, Case] = {
    "vision: no such file": (vision(data="nowhere.npz"), ("nowhere.npz",)),
    "vision: not an npz file": (_text_npz, ("own.npz",)),
    "vision: an array is missing": (pictures(lambda a: a.pop("y_test")), ("y_test",)),
    "vision: labels of another length": (
        pictures(lambda a: a.update(y_train=a["y_train"][:-1])),
        ("own.npz", "y_train", "100", "99"),
    ),
    "vision: pictures without a side": (
        pictures(lambda a: a.update(x_train=a["x_train"].reshape(100, 64))),
        ("own.npz", "x_train"),
    ),
    "vision: more rows than there are": (vision(train="9000"), ("1797", "fewer")),
    "vision: unknown loss": (vision(losses="hinge"), ("hinge", "naive")),
    "vision: no rate to choose": (vision(lrs=""), ("--lrs",)),
    "vision: supervisor's picture has no side": (vision(sides="0"), ("--sides 0",)),
    "vision: negative learning rate": (vision(lrs="-1.0"), ("lr", "-1")),
    "nano: heads do not divide": (nano(width="15"), ("head_dim", "7")),
    "nano: no layers": (nano(layers="0"), ("layers",)),
    "nano: vocabulary below the bytes": (nano(task="own", vocab="7"), ("--vocab", "7")),
    "nano: unknown task": (nano(task="bool_q"), ("bool_q",)),
    "nano: a mark beyond the end": (nano(marks="1.5"), ("--marks",)),
    "nano: no test problems": (nano(test="0"), ("--test",)),
    "nano: no tokenizer there": (nano(task="own", tokenizer="nowhere"), ("nowhere",)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, world, monkeypatch, capsys) -> None:
    spoil, words = FLAGS[name]
    spoil(world)
    refused(world, monkeypatch, capsys, words)


@pytest.mark.parametrize("name", DATA)
def test_data(name, world, monkeypatch, capsys) -> None:
    spoil, words = DATA[name]
    spoil(world)
    refused(world, monkeypatch, capsys, words)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, world, monkeypatch, capsys) -> None:
    spoil, words = MODELS[name]
    spoil(world)
    refused(world, monkeypatch, capsys, words)


@pytest.mark.parametrize("name", OTHERS)
def test_other_experiments(name, world, monkeypatch, capsys) -> None:
    spoil, words = OTHERS[name]
    spoil(world)
    if world.flags.get("--task") == "own":
        world.flags["--data"] = str(world.data)
    refused(world, monkeypatch, capsys, words)


def test_a_learning_rate_that_explodes(world, monkeypatch, capsys) -> None:
    flags(strong_tune__lr="1e38")(world)
    said = stopped(world, monkeypatch, capsys)  # the supervisor's stage is done, and kept
    assert "NaN" in said and "learning rate" in said
