"""Distillation between tokenizers from end to end: what is counted, compared, kept and refused."""

import gzip
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cross_tokenizer as door
from w2s_jax.data import spans
from w2s_jax.errors import UserError
from w2s_jax.models import hf
from w2s_jax.models.transformer import Config as Shape
from w2s_jax.models.transformer import transformer
from w2s_jax.objectives.spans import span_logps
from w2s_jax.pipelines import cross_tokenizer as recipe
from w2s_jax.pipelines.cross_tokenizer import Bench, Setting, Side, Texts
from w2s_jax.pipelines.cross_tokenizer_student import main as student
from w2s_jax.pipelines.cross_tokenizer_student import shortened
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer, train_bpe
from w2s_jax.train.optim import Tune
from w2s_jax.types import Model, Output

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("Lily", "Tom", "the cat", "a dog", "Mia", "the bird", "Ben")
DEEDS = ("ran home", "saw the sun", "ate a red apple", "sang to Mom", "fell asleep", "hid a ball")
STORIES = [
    f"{a} {b} and {c} {d}, {n} times." for n in (2, 35) for a in NAMES for b in DEEDS
    for c in NAMES[:2] for d in DEEDS[:2]
]  # fmt: skip
TUNE = Tune(batch=4, optimizer="adam", schedule="cosine")


def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    return train_bpe(STORIES, 330), train_bpe([s.upper() + s[::3] for s in STORIES], 290)


def cheap(size: int, seed: int, sharp: float) -> tuple[Model, dict]:
    """A model that reads the last token alone; it compiles at once."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": np.float32(sharp * rng.normal(size=(size, 12))),
        "unembed": np.float32(rng.normal(size=(12, size))),
    }

    def apply(params, tokens, segment=None, position=None, rows=None):
        return Output(hidden=params["embed"][tokens], unembed=params["unembed"])

    axes = {"embed": (None, None), "unembed": (None, None)}
    return Model(lambda key: params, apply, axes, ("cheap", seed)), params


def toys() -> tuple[Side, Side]:
    mine, theirs = tokenizers()
    student = Side("student", *cheap(mine.size, 0, 0.1), mine, 48, None)
    return student, Side("teacher", *cheap(theirs.size, 1, 0.3), theirs, 96, None)


def quiet(folder) -> Context:
    return Context(workdir=folder, quiet=True)


def scored(tmp_path, sides, texts, grids, **how):
    data = recipe.aligned(texts, *sides, quiet(tmp_path), held=0.15, end=False)
    bench = Bench(sides[0], data, quiet(tmp_path), TUNE)
    return data, list(recipe.run_recipe(bench, "teacher", grids, **how))


def counted(fn, params, table, *rest) -> np.ndarray:
    """Stands for a teacher: -1 nat for each of its tokens."""
    of, found = table["spans"]["of"], np.zeros(table["spans"]["weight"].shape, np.float32)
    row, place = np.nonzero(of >= 0)
    np.add.at(found, (row, of[row, place]), -1.0)
    return found


def written() -> Texts:
    responses = [*STORIES[:80], "", "a <eos> in the middle", STORIES[80] * 9]
    return Texts([""] * len(responses), responses)


def test_two_toy_tokenizers_from_texts_to_numbers(tmp_path, monkeypatch) -> None:
    """Everything but the models: what is aligned, refused, cut, held out, packed and compared."""
    monkeypatch.setattr(recipe, "kept", counted)
    sides, texts = toys(), written()
    data = recipe.aligned(texts, *sides, quiet(tmp_path), held=0.15, end=False)
    assert (data.told["texts"], data.told["refused"], data.told["cut"]) == (81, 2, 1)
    parts = np.concatenate([data.train, data.dev, data.test])
    np.testing.assert_array_equal(np.sort(parts), np.arange(81))
    responses = texts.responses[:80] + texts.responses[82:]
    ids = sides[1].tokenizer.encode_ids(responses)
    weight, nats = data.table["spans"]["weight"], -data.table["spans"]["teacher"].sum(1)
    assert nats[:80].tolist() == [len(own) for own in ids[:80]] and nats[80] < len(ids[80])
    assert data.bytes[:80].tolist() == [len(text.encode()) for text in responses[:80]]
    assert data.told["spans"] == weight.sum()

    bench = Bench(sides[0], data, quiet(tmp_path), TUNE)
    for seed in (0, 1):
        assert 0 < bench.table(seed, 20)["spans"]["weight"].sum() < weight[data.train].sum() / 2
    assert bench.table(0, 0)["spans"]["weight"].sum() == weight[data.train].sum()
    teacher, size = nats[data.test], data.bytes[data.test]
    told = {"teacher": teacher, "student": 3 * teacher, "spans": 2.0 * teacher + size, "sft": size}
    rows = {row["model"]: row for row in bench.compared(told)}
    assert rows["teacher"]["nats_per_byte"] == pytest.approx(teacher.sum() / size.sum())
    assert rows["teacher"]["above_teacher"] == 0
    assert rows["spans"]["above_teacher"] == pytest.approx(1 + teacher.sum() / size.sum())
    assert rows["spans"]["below_sft"] == pytest.approx(-2 * teacher.sum() / size.sum())
    low, high = (rows["spans"][f"below_student_{end}"] for end in ("low", "high"))
    assert low < rows["spans"]["below_student"] < high
    assert "below_sft" not in rows["sft"] and "below_student" in rows["sft"]


@pytest.mark.slow
def test_cheap_models_are_trained_compared_and_kept(tmp_path, monkeypatch) -> None:
    sides, texts, kept = toys(), written(), []
    grids = {"spans": [Setting("spans", 3e-2, 4.0, 20.0)]}
    grids["sft"] = [Setting("sft", lr, 1.0) for lr in (1e-6, 3e-2)]
    data, rows = scored(tmp_path, sides, texts, grids, saved=kept.append)
    _, *scores = rows
    assert [row["model"] for row in scores] == ["teacher", "student", "spans", "sft"]
    got = {row["model"]: row["nats_per_byte"] for row in scores}
    both = spans.pair(
        [""] * 81, texts.responses[:80] + texts.responses[82:], *(s.tokenizer for s in sides),
        length=(48, 96), on_long="cut",
    )  # fmt: skip
    for side, table in zip(sides, (both.student, both.teacher), strict=True):
        batch = jax.tree.map(jnp.asarray, table.batch(data.test))
        nats = -np.asarray(jax.jit(partial(span_logps, side.model))(side.params, batch)).sum()
        assert got[side.name] == pytest.approx(nats / both.bytes[data.test].sum(), rel=1e-4)
    assert scores[3]["lr"] == 3e-2 and got["sft"] < got["student"], "dev chooses what learns"
    apart = {name: abs(got[name] - got["teacher"]) for name in ("student", "spans")}
    assert apart["spans"] < apart["student"], "the student comes nearer to its teacher"
    exam = sides[0].packed(data.table.take(data.test))
    nats = sides[0].nats(kept[0], exam).sum() / data.bytes[data.test].sum()
    assert nats == pytest.approx(got["spans"], rel=1e-5), "the first arm is saved"
    monkeypatch.setattr(recipe, "kept", partial(_again, recipe.kept))
    assert scored(tmp_path, sides, texts, grids)[1] == rows, "a rerun reads its stages"


def _again(kept, fn, params, table, *rest):
    def never(params, batch):
        raise AssertionError("the teacher ran again")

    return kept(never, params, table, *rest)


def test_a_ratio_and_its_interval_by_hand() -> None:
    nats, size = np.array([3.0, 1.0, 4.0]), np.array([2.0, 1.0, 5.0])
    found = recipe.per_byte(nats, size)
    assert found.value == pytest.approx(1.0) and found.n == 3
    spread = np.std((nats - size) / size.mean(), ddof=1) / math.sqrt(3)
    assert found.high - found.value == pytest.approx(4.302653 * spread, rel=1e-5)


def test_an_arm_has_the_grid_that_it_reads() -> None:
    grid = partial(recipe.settings, lrs=(1e-4, 1e-3), epochs=(1.0, 3.0), temperatures=(1.0, 9.0))
    assert len(grid("sft", nll=0.5)) == 4 and {s.nll for s in grid("sft", nll=0.5)} == {0.0}
    assert len(grid("spans", nll=0.5)) == 8 and {s.nll for s in grid("spans", nll=0.5)} == {0.0}
    assert {(s.temperature, s.nll) for s in grid("spans+sft", nll=0.5)} == {(1.0, 0.5), (9.0, 0.5)}


def test_texts_of_files(tmp_path) -> None:
    lines = [{"prompt": "a", "response": " b", "text": "no"}, {"prompt": "", "response": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert recipe.read(str(tmp_path / "a.jsonl")) == Texts(["a", ""], [" b", "c"])
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert recipe.read(str(tmp_path / "b.jsonl")) == Texts(["", ""], ["one", "two"])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n \nthree\n\n\n"))
    assert recipe.read(str(tmp_path / "c.txt.gz")) == Texts(["", ""], ["one\ntwo", "three"])
    (tmp_path / "d.jsonl").write_text('{"words": "one"}')
    with pytest.raises(UserError, match="needs a column 'text', or 'prompt' and 'response'"):
        recipe.read(str(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n{"text": ["two"]}')
    with pytest.raises(UserError, match="row 1: column 'text' must be text, got list"):
        recipe.read(str(tmp_path / "e.jsonl"))
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("f.txt", "none.txt"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            recipe.read(str(tmp_path / name))


def test_what_leaves_nothing_to_align_or_to_hold_out(tmp_path) -> None:
    sides = toys()
    with pytest.raises(UserError, match="no text can be aligned: .*response is empty': 2"):
        scored(tmp_path, sides, Texts(["a", "b"], ["", ""]), {})
    with pytest.raises(UserError, match="of 1 texts none is in the part"):
        scored(tmp_path, sides, Texts([""], STORIES[:1]), {})


BAD = {
    "--teacher= --data x.jsonl": "--teacher: name a model folder",
    "--student= --data x.jsonl": "--student: name a model folder",
    "--problems 0": "--problems must be at least 1",
    "--data x.jsonl --write 4": "give one",
    "--write 4": "--write: a new tokenizer needs texts",
    "--held 0.5": "--held is a share above 0",
    "--held nan": "--held is a share above 0",
    "--seeds 0": "--seeds must be at least 1",
    "--count -1": "--count must be at least 0",
    "--lrs 0": "--lrs 0.0: needs one entry at least, above 0",
    "--epochs inf": "--epochs inf: needs",
    "--temperatures -1": "--temperatures -1.0: needs",
    "--lrs 1e-3 1e-3": "none twice",
    "--arms": "--arms needs one entry",
    "--nll nan": "--nll must be at least 0",
    "--vocab 0 --scratch --rank 4": "adapters on random weights",
    "--rank 4": "adapters on random weights",
    "--vocab 258": "needs at least 259 tokens",
    "--save .": "is not a model folder: give another",
    "--data none.txt": "cannot read none.txt",
    "--vocab 0": "have one vocabulary: distil the whole",
    "--teacher nano-9": "no shipped model nano-9",
    "--length 4": "rows of 4 tokens",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        door.main([*words.split(), "--quiet"])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1
    assert told.startswith("error: ") and BAD[words] in told
    assert not list(tmp_path.rglob("*.json")), "nothing is left of a run that made nothing"


def test_claims_are_of_seeds_or_of_texts() -> None:
    row = dict(block="score", model="spans", below_sft=0.02, below_sft_low=-0.01)
    row |= dict(below_sft_high=0.05, below_student=1.0, below_student_low=0.9)
    row |= dict(below_student_high=1.1)
    held = {c["name"]: c for c in door.claims([row | dict(seed=0)])}
    assert [c["holds"] for c in held.values()] == [True, False]
    assert held["spans is below fine-tuning on the same texts"]["interval"] == [-0.01, 0.05]
    several = [row | dict(seed=i, below_sft=0.02 + i / 1e3) for i in range(3)]
    told = door.claims(several)[1]
    assert told["holds"] and told["seeds"] == 3 and told["interval"][0] > 0.01


def test_a_tokenizer_cut_to_its_first_merges_is_the_smaller_one() -> None:
    large, small = train_bpe(STORIES, 330), train_bpe(STORIES, 290)
    cut = shortened(large, 290)
    assert cut.size == 290 and {cut.bos, cut.eos, cut.pad} == {287, 288, 289}
    for text in (*STORIES[:20], "naïve 東京 🙂\n"):
        pieces = [[one.token(i) for i in one.encode(text)] for one in (cut, small)]
        assert pieces[0] == pieces[1] and cut.decode(cut.encode(text)) == text
    for wrong in (258, 331):
        with pytest.raises(UserError, match=f"a vocabulary of {wrong}: .* 256 bytes and 3 special"):
            shortened(large, wrong)


def folders(root: Path) -> tuple[Path, Path]:
    for name, tokenizer, seed in zip(("mine", "theirs"), tokenizers(), (0, 1), strict=True):
        shape = Shape(vocab=tokenizer.size, width=16, layers=1, heads=2, max_length=64)
        model = transformer(shape)
        hf.export(model, model.init(jax.random.key(seed)), root / name, tokenizer)
    return root / "mine", root / "theirs"


@pytest.mark.slow
def test_the_command_line_from_folders_to_a_folder(tmp_path, capsys) -> None:
    mine, theirs = folders(tmp_path)
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in [*STORIES, ""]))
    words = f"--student {mine} --teacher {theirs} --data {data} --length 48 --epochs 1 --lrs 3e-3"
    words += " --vocab 0 --seeds 1 --count 0"
    words += f" --workdir {tmp_path / 'run'} --tune.batch 8 --end --arms spans sft"
    out = tmp_path / "out"
    summary = door.main([*words.split(), "--save", str(out)])
    assert len(summary["claims"]) == 3 and (tmp_path / "run" / summary["figures"][0]).is_file()
    shown = capsys.readouterr().out
    assert f"{len(STORIES)} texts aligned" in shown and "refused 1: the response is empty" in shown
    rows = [json.loads(r) for r in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    model, params, tokenizer = hf.load(out)
    side = Side("out", model, params, tokenizer, 48, None)
    theirs = Side("theirs", *hf.load(theirs), 64, None)
    texts = recipe.read(str(data))
    found = recipe.aligned(texts, side, theirs, quiet(tmp_path / "run"), held=0.1, end=True)
    nats = side.nats(params, side.packed(found.table.take(found.test)))
    (row,) = [row for row in rows if row.get("model") == "spans"]
    assert row["nats_per_byte"] == pytest.approx(nats.sum() / found.bytes[found.test].sum(), 1e-5)
    door.main([*words.split(), "--save", str(out)])
    assert "drawing again" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        door.main([*words.split(), "--save", str(out), "--nll", "2"])
    assert "holds a run with another config (nll 1.0 -> 2.0)" in capsys.readouterr().err


@pytest.mark.slow
def test_real_weights_and_real_tokenizers(shared_data, tmp_path) -> None:
    """stories260K (SentencePiece, 512 tokens) writes and teaches; GPT-2's own tokenizer learns."""
    pytest.importorskip("sentencepiece")
    from w2s_jax.models import llama2c

    files = shared_data / "models"
    teacher = llama2c.convert(
        files / "stories260K.bin", files / "tok512.model", tmp_path / "stories"
    )
    words = f"--tokenizer {shared_data / 'tokenizers' / 'gpt2'} --out {tmp_path / 'student'} "
    student(f"{words} --vocab 700 --width 16 --layers 1 --heads 2 --length 64".split())
    given = f"--teacher {teacher} --student {tmp_path / 'student'} --write 48 --tokens 48 "
    given += "--vocab 0 --count 0 --held 0.2 --length 64 --epochs 4 --lrs 3e-2 --arms spans "
    given += f"--scratch --seeds 2 --tune.batch 4 --quiet --workdir {tmp_path / 'run'}"
    claims = door.main(given.split())["claims"]
    assert [claim["holds"] for claim in claims] == [True]
    rows = [json.loads(r) for r in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    counts, nats = rows[0], {row["model"]: row["nats_per_byte"] for row in rows[1:]}
    assert counts["texts"] >= 40 and counts["spans"] > 10 * counts["texts"]
    assert nats["teacher"] < 0.8 < nats["spans"] < nats["student"] - 0.5
