"""Pretraining of the nano family: what it reads, what it claims, what its cards say."""

import dataclasses
import json
import shlex

import numpy as np
import pytest

from experiments import pretrain_nano as nano
from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.metrics.statistics import wilson
from w2s_jax.models.transformer import Config as Architecture
from w2s_jax.models.transformer import params_count
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table

CFG = nano.Config(test=2)
RUNG = nano.Rung(width=8, layers=1, heads=1, tokens=6000.0)


@pytest.fixture(scope="module")
def read():
    return nano.corpus(CFG, RUNG, seed=0)


def documents(table: Table, tokenizer: Tokenizer) -> list[tuple[str, list[float]]]:
    """Text (special tokens shown) and loss weights of every packed document."""
    found = []
    for tokens, segment, mask in zip(table["tokens"], table["segment"], table["mask"], strict=True):
        for number in range(1, segment.max() + 1):
            here = segment == number
            text = tokenizer.decode(tokens[here].tolist(), skip_special=False)
            found.append((text, mask[here].tolist()))
    return found


# --- what is read


def test_the_corpus_is_enough_whole_documents(read) -> None:
    table, tokenizer = read
    assert tokenizer.digest() == arithmetic.tokenizer().digest()
    assert table["tokens"].shape[1] == nano.LENGTH and table["tokens"].max() < tokenizer.size
    real = (table["segment"] > 0).sum()
    assert RUNG.tokens <= real <= 2 * RUNG.tokens, "one epoch lasts, little is drawn for nothing"
    for text, _ in documents(table, tokenizer):
        assert text.startswith("<bos>") and text.endswith("<eos>") and text.count("<bos>") == 1


def test_questions_weigh_a_tenth_and_solutions_one(read) -> None:
    table, tokenizer = read
    worded = 0
    for text, mask in documents(table, tokenizer):
        if " a :" not in text:
            continue
        worded += 1
        prompt, response = text.split(" a :")
        asked = len(tokenizer.encode(prompt.removeprefix("<bos>").strip())) + 1
        told = len(tokenizer.encode(f"a :{response.removesuffix('<eos>')}".strip())) + 1
        weights = [0.0] + [np.float32(nano.QUESTION_WEIGHT)] * (asked - 1) + [1.0] * told
        np.testing.assert_allclose(mask, weights, rtol=1e-6)
    assert worded > 50


def test_a_seed_has_its_own_documents(read) -> None:
    table, _ = read
    assert nano.corpus(CFG, RUNG, 0)[0].digest() == table.digest()
    other = nano.corpus(CFG, RUNG, 1)[0]
    assert {x for x, _ in documents(*read)} != {x for x, _ in documents(other, read[1])}


def test_held_out_questions_are_never_read(monkeypatch) -> None:
    drill = "drill"
    questions = [prompt for prompt, _ in arithmetic.documents(0, 40) if drill not in prompt]
    table = Table({"question": np.array([q[len("q : ") :] for q in questions[:5]], object)})
    plain = {text for text, _ in documents(*nano.corpus(CFG, RUNG, 0))}
    assert all(any(q in text for text in plain) for q in table["question"]), "there to be avoided"
    monkeypatch.setattr(nano, "_test", lambda cfg: table)
    avoided = {text for text, _ in documents(*nano.corpus(CFG, RUNG, 0))}
    assert not any(q in text for text in avoided for q in table["question"])


def test_the_test_is_the_same_for_all_and_has_all_difficulties() -> None:
    test = nano._test(nano.Config(test=20))
    assert len(test) == 100 and set(test["steps"]) == set(nano.DIFFICULTIES)
    other = nano._test(nano.Config(test=20, first=7, rungs=("nano-4",), lr=0.5))
    assert test.digest() == other.digest()


@pytest.fixture
def task(tmp_path) -> nano.Config:
    """A task in a file; one text is longer than a row, test texts say so."""
    rows = []
    for i in range(40):
        kind, split = ("good", "bad")[i % 2], "test" if i % 5 == 4 else "train"
        text = f"number {i} is a {kind} café" + (" indeed" * 40 if i == 0 else "")
        rows.append({"text": f"{text} ({split})", "label": 1 - i % 2, "split": split})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return nano.Config(task="mine", data=str(path), vocab=300)


def test_other_text_is_read_without_its_test_rows(task) -> None:
    table, tokenizer = nano.corpus(task, RUNG, seed=0)
    assert tokenizer.size == 300
    found = documents(table, tokenizer)
    texts = [text for text, _ in found]
    assert any("(train)" in text for text in texts) and not any("(test)" in text for text in texts)
    assert all(set(mask) <= {0.0, 1.0} and mask[0] == 0 for _, mask in found)
    assert sum(text.startswith("<bos>") for text in texts) >= 20
    assert any("café" in text for text in texts)


def test_other_text_with_a_given_tokenizer(task, tmp_path) -> None:
    given = nano.train_bpe(["good bad number café"], 270)
    given.save(tmp_path / "tokenizer")
    cfg = dataclasses.replace(task, tokenizer=str(tmp_path / "tokenizer"))
    assert nano.corpus(cfg, RUNG, seed=0)[1].digest() == given.digest()


# --- the tokenizer


def test_bytes_can_say_anything() -> None:
    tokenizer = nano.train_bpe(["the cat sat on the mat", "the cat"], 262)
    assert tokenizer.size == 262
    for text in ("the cat", "  two  spaces ", "äöü – 日本語 🙂", "tab\tline\n", "<eos> as text"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.unknown_share(["日本語"]) == 0


def test_merges_shorten_what_was_trained_on() -> None:
    texts = ["the cat sat on the mat", "the cat"] * 3
    plain, merged = (nano.train_bpe(texts, vocab) for vocab in (259, 270))
    assert len(plain.encode(texts[0])) == len(texts[0])
    assert len(merged.encode(texts[0])) < len(texts[0]) / 1.5
    assert nano.train_bpe(texts, 270).digest() == merged.digest()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="at least 259"):
        nano.train_bpe(["a"], 258)


# --- accuracies


def test_accuracies_by_number_of_steps(monkeypatch) -> None:
    cfg = nano.Config(test=10)
    test = nano._test(cfg)
    asked = {}

    def complete(model, params, tokenizer, texts, key, *, tokens):
        asked["texts"], asked["tokens"] = texts, tokens
        told = list(test["answer"])
        return [
            a if steps <= 2 else "no idea" for a, steps in zip(told, test["steps"], strict=True)
        ]

    monkeypatch.setattr(nano, "complete", complete)
    found = nano.accuracies(cfg, None, None, None)
    assert [found[n]["accuracy"] for n in nano.DIFFICULTIES] == [1, 1, 0, 0, 0]
    counts = np.bincount(test["steps"], minlength=6)[1:]
    for n, values in found.items():
        bounds = wilson(round(values["accuracy"] * counts[n - 1]), counts[n - 1])
        assert (values["count"], values["low"], values["high"]) == (
            counts[n - 1],
            bounds.low,
            bounds.high,
        )
    assert all(text.endswith(" a :") for text in asked["texts"])
    sizes = map(len, arithmetic.tokenizer().encode_ids(list(test["response"])))
    assert asked["tokens"] >= max(sizes) - 2, "the longest right answer has room"
    assert nano.accuracies(dataclasses.replace(cfg, task="boolq"), None, None, None) == {}


# --- claims and figures


def rows(rung: str, seed: int, *accuracies: float, share: float = 1.0) -> list[dict]:
    about = dict(rung=rung, seed=seed, share=share, params=10, tokens=1000)
    return [
        about | dict(steps=n, accuracy=a, low=0.0, high=1.0, credit=a, count=10 * n)
        for n, a in enumerate(accuracies, 1)
    ]


def test_final_rows_are_means_over_problems() -> None:
    found = nano.final(rows("a", 0, 0.9, 0.3, share=0.5) + rows("a", 0, 1.0, 0.5))
    (mean,) = found
    assert mean["accuracy"] == pytest.approx((10 * 1.0 + 20 * 0.5) / 30)
    bounds = wilson(20, 30)
    assert (mean["low"], mean["high"]) == (bounds.low, bounds.high)
    assert (mean["1 steps"], mean["2 steps"]) == (1.0, 0.5)


def ladder(top: float) -> list[dict]:
    found = []
    for seed in range(3):
        for rung, accuracy in (("a", 0.2), ("b", 0.5), ("c", top)):
            found += rows(rung, seed, accuracy + 0.01 * seed**2 * (rung == "c"), share=1.0)
            found += rows(rung, seed, 0.0, share=0.5)
    return found


def test_the_ladder_rises_or_it_is_not_claimed() -> None:
    found = {claim["name"]: claim for claim in nano.claims(ladder(0.9))}
    assert list(found)[:2] == ["b above a", "c above b"]
    assert found["b above a"]["holds"] and found["c above b"]["holds"]
    assert found["b above a"]["value"] == pytest.approx(0.3)
    assert found["c above b"]["seeds"] == 3
    flat = {claim["name"]: claim["holds"] for claim in nano.claims(ladder(0.5))}
    assert flat["b above a"] and not flat["c above b"]


# --- the card


ARCHITECTURE = Architecture(vocab=80, width=64, layers=3, heads=2, max_length=512)


def carded(folder, cfg: nano.Config, rung: str, measured: dict) -> tuple[dict, str]:
    folder.mkdir()
    about = dict(
        rung=rung,
        seed=3,
        share=1.0,
        tokens=4_000_000,
        params=params_count(ARCHITECTURE),
        fingerprint="0123456789abcdef",
    )
    nano.card(folder, cfg, ARCHITECTURE, about, measured)
    return json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()


def flags(command: str) -> dict[str, str]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "experiments.pretrain_nano"]
    names = {f"--{field.name}" for field in dataclasses.fields(nano.Config)} | {"--preset"}
    assert set(words[3::2]) <= names, "flags that the command line knows"
    return dict(zip(words[3::2], words[4::2], strict=True))


def test_the_card_of_a_shipped_rung(tmp_path) -> None:
    measured = {1: dict(accuracy=0.5, low=0.4, high=0.6, credit=0.5, count=40)}
    facts, text = carded(tmp_path / "nano-3-seed3", nano.Config(), "nano-3", measured)
    told = flags(facts["command"])
    assert told["--rungs"] == "nano-3" and told["--first"] == "3"
    assert not {"--width", "--task", "--scale"} & set(told)
    assert facts["seed"] == 3 and facts["tokens"] == 4_000_000
    assert facts["accuracy"] == {"1": measured[1]}
    assert facts["command"] in text and "# nano-3-seed3" in text
    assert "| 1 | 0.500 | 0.400 - 0.600 | 40 |" in text
    assert f"{facts['parameters']:,} parameters" in text


def test_the_card_of_a_model_of_ones_own(tmp_path) -> None:
    cfg = nano.Config(task="my task", data="a folder", scale=0.5, width=24, layers=2, heads=3)
    facts, text = carded(tmp_path / "mine", cfg, "mine", {})
    told = flags(facts["command"])
    assert (told["--task"], told["--data"], told["--scale"]) == ("my task", "a folder", "0.5")
    assert (told["--width"], told["--layers"], told["--heads"]) == ("24", "2", "3")
    assert "--tokens" not in told, "a default needs no flag"
    assert "accuracy" not in text, "nothing was measured"
