"""Bad input to anything of distillation: one line that says what is wrong, and exit code 2."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_world import write_model

from experiments.distillation_zoo import Config as Zoo
from experiments.distillation_zoo import main, run
from w2s_jax.data import arithmetic, images, teachers
from w2s_jax.errors import UserError
from w2s_jax.generate.inside import ask, respond
from w2s_jax.losses import distillation as dense
from w2s_jax.losses import features, sparse
from w2s_jax.losses.sequence import token_divergence
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.models.trunks import Cnn, Mlp, ResNet, Vit, trunk
from w2s_jax.objectives import classify, distill, distill_classes, on_policy
from w2s_jax.objectives.augmented import augmented
from w2s_jax.objectives.features import Term, match
from w2s_jax.objectives.taid import taid
from w2s_jax.pipelines import distillation_recipe as recipe
from w2s_jax.record import Context
from w2s_jax.train import drafts
from w2s_jax.train.optim import Tune
from w2s_jax.types import Batch, Model, State, Table

KEY = jax.random.key(0)
CONFIG = Config(vocab=12, width=8, layers=1, heads=1, ffn=8, max_length=16)
MODEL = transformer(CONFIG)
SMALL = trunk(Mlp((4, 4, 1), 3, (5,)))
LOGITS = jnp.zeros((2, 6))
TOKENS = {"tokens": jnp.ones((2, 6), jnp.int32), "mask": jnp.ones((2, 6))}
SHOWN = {"image": jnp.zeros((2, 4, 4, 1)), "label": jnp.eye(3)[:2]}


def step(objective, model: Model, batch: Batch, frozen=()) -> None:
    """The shapes of one evaluation of an objective; nothing is computed."""
    params = jax.eval_shape(model.init, KEY)
    state = State(jnp.int32(0), jnp.int32(9), (), (), frozen)
    jax.eval_shape(lambda params: objective(params, state, batch, KEY)[0], params)


def matched(**taps: int) -> None:
    term = Term(features.hint, **taps)
    main = partial(distill_classes, divergence=dense.forward_kl)
    objective = match(SMALL, SMALL, [term], lambda s, t: main(s, teacher=t))
    teacher = SMALL.init(KEY)
    model = Model(lambda key: {"student": SMALL.init(key), "projections": {}}, SMALL.apply, (), ())
    step(objective, model, SHOWN, {"teacher": teacher})


def side(width: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((2, 6, width)), jnp.zeros((width, vocab))


def stored(**columns: tuple[int, ...]) -> dict[str, jax.Array]:
    return {k: jnp.zeros(s, jnp.int32 if k == "ids" else None) for k, s in columns.items()}


def asked(count: int = 1, length: int = 3, most: int | None = None) -> Table:
    prompts = np.empty(count, object)
    prompts[:] = [np.arange(length) for _ in range(count)]
    tokenizer = arithmetic.tokenizer()
    return ask(Table({"prompt": prompts}), MODEL, tokenizer, tokens=4, length=most)


ASKED = {"tokens": jnp.ones((1, 3), jnp.int32), "segment": jnp.ones((1, 3), jnp.int32)}
STEPS = {
    "no teacher": (lambda: step(distill(MODEL, dense.forward_kl), MODEL, TOKENS), "add_teacher"),
    "another vocabulary": (
        lambda: token_divergence(side(4, 9), side(5, 8), jnp.ones((2, 6)), dense.forward_kl),
        "sequence-level",
    ),
    "no class teacher": (
        lambda: step(distill_classes(SMALL, dense.forward_kl), SMALL, SHOWN),
        "classes",
    ),
    "no label": (
        lambda: step(
            distill_classes(SMALL, dense.dkd, teacher=SMALL, targets=True),
            *(SMALL, {"image": SHOWN["image"]}, {"teacher": SMALL.init(KEY)}),
        ),
        "label",
    ),
    "no pictures": (
        lambda: step(augmented(classify(SMALL, dense.forward_kl), lambda k, x: x), SMALL, TOKENS),
        "image",
    ),
    "no prompts": (
        lambda: step(
            on_policy(MODEL, dense.forward_kl, teacher=MODEL, tokens=4),
            MODEL,
            TOKENS,
            {"teacher": MODEL.init(KEY)},
        ),
        "asked",
    ),  # fmt: skip
    "no memory": (
        lambda: step(taid(MODEL, teacher=MODEL), MODEL, TOKENS, {"teacher": MODEL.init(KEY)}),
        "taid_memory",
    ),
    "no such tap": (lambda: matched(student=3), "tap 3"),
    "other pictures": (
        lambda: trunk(Mlp((8, 8, 1), 3)).apply(trunk(Mlp((8, 8, 1), 3)).init(KEY), SHOWN["image"]),
        "8x8",
    ),
}
NUMBERS = {
    "beta of jsd": (lambda: dense.jsd(LOGITS, LOGITS, beta=1.5), "beta"),
    "alpha of skew": (lambda: dense.skew_kl(LOGITS, LOGITS, alpha=-0.1), "alpha"),
    "alpha of hinton": (
        lambda: dense.hinton(LOGITS, LOGITS, jnp.zeros(2, int), alpha=2.0, temperature=1.0),
        "alpha",
    ),
    "temperature": (lambda: dense.forward_kl(LOGITS, LOGITS, temperature=0.0), "temperature"),
    "sizes of logits": (lambda: dense.logit_mse(LOGITS, jnp.zeros((2, 7))), "7"),
    "start of taid": (lambda: taid(MODEL, teacher=MODEL, start=1.5), "start"),
    "lambda": (
        lambda: on_policy(MODEL, dense.forward_kl, teacher=MODEL, tokens=4, lam=2.0),
        "probability",
    ),
    "no tail": (lambda: sparse.top_k(LOGITS, stored(ids=(2, 3), logits=(2, 3))), "tail"),
    "other places": (
        lambda: sparse.top_k(LOGITS, stored(ids=(4, 3), logits=(4, 3), tail=(4,))),
        "do not fit",
    ),
    "no draws": (lambda: sparse.draw(KEY, LOGITS, 0), "count"),
    "too many kept": (lambda: teachers.About("t", vocab=5, k=6), "top-k of 6"),
    "type of a store": (lambda: teachers.About("t", 5, 2, dtype="int8"), "int8"),
    "long prompt": (lambda: asked(length=14), "16"),
    "prompt beyond the column": (lambda: asked(length=5, most=4), "larger"),
    "empty prompt": (lambda: asked(length=0), "empty"),
    "nobody asks": (lambda: asked(count=0), "no prompts"),
    "long answer": (lambda: respond(MODEL, {}, ASKED, KEY, tokens=40), "40"),
    "patches": (lambda: Vit((8, 8, 1), 3, patch=3), "tile"),
    "depth": (lambda: ResNet((32, 32, 3), 3, depth=19), "19"),
    "many stages": (lambda: Cnn((4, 4, 1), 3, (8,) * 5), "4x4"),
    "plan without a teacher": (
        lambda: drafts.draft(CONFIG, "gkd", Tune(), length=8, prompt=4),
        "teacher",
    ),
}


def check(call, word: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and word in line, line


@pytest.mark.parametrize("name", STEPS)
def test_an_objective_says_what_it_lacks(name: str) -> None:
    check(*STEPS[name])


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_named(name: str) -> None:
    check(*NUMBERS[name])


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    how = dict(seed=0, train=10, dev=2, test=3)
    check(lambda: images.load(tmp_path / "none.npz", **how), "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    check(lambda: images.load(tmp_path / "torn.npz", **how), "not a readable npz")
    np.savez(tmp_path / "half.npz", x_train=np.zeros((3, 4, 4)))
    check(lambda: images.load(tmp_path / "half.npz", **how), "lacks")
    check(lambda: images.load("", **{**how, "train": 5000}), "ask for fewer")


def command(folder: Path, capsys, *flags: str) -> str:
    """What the experiment says on stderr when it refuses."""
    with pytest.raises(SystemExit) as caught:
        main(["--preset", "tiny", "--workdir", str(folder), "--quiet", *flags])
    assert caught.value.code == 2
    return capsys.readouterr().err


FLAGS = {
    "block": (("--blocks", "words"), "words"),
    "mode": (("--modes", "offline"), "stored"),
    "divergence": (("--divergences", "kl"), "forward_kl"),
    "loss": (("--losses", "kd"), "kd T=4"),
    "part": (("--parts", "everything"), "generations"),
    "teacher": (("--teacher", "nano-9"), "nano-9"),
    "student": (("--students", "nano-9"), "nano-9"),
    "picture student": (("--blocks", "pictures", "--picture-students", "rnn-3"), "mlp-256"),
    "labels": (("--blocks", "pictures", "--labels", "900"), "900"),
    "own": (("--own", "99"), "--own"),
    "answer": (("--answer", "64"), "--length"),
    "short answers": (("--answer", "2", "--blocks", "tokens"), "--answer"),
    "held-out rows": (("--dev", "21"), "multiple"),
    "rate": (("--lrs", "-1"), "lr"),
    "lambda": (("--lam", "1.5"), "--lam"),
    "seeds": (("--seeds", "0"), "--seeds"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_flag_is_one_line(name: str, tmp_path: Path, capsys) -> None:
    flags, word = FLAGS[name]
    said = command(tmp_path, capsys, *flags).strip()
    assert said.startswith("error: ") and "\n" not in said and word in said, said


SETTINGS = {
    "a mode twice": (dict(modes=("live", "live")), "--modes names live twice"),
    "a student twice": (dict(students=("nano-1", "nano-1")), "--students names nano-1 twice"),
    "a rate twice": (dict(picture_lrs=(0.1, 0.1)), "--picture-lrs names 0.1 twice"),
    "no block": (dict(blocks=()), "--blocks needs one entry"),
    "no part": (dict(parts=()), "--parts needs one entry"),
    "no label": (dict(labels=(60, 0)), "--labels must be 1 or more"),
    "moved backwards": (dict(shift=-1), "--shift must be 0 or more"),
    "fewer than no rows": (dict(data="x", count=-3), "--count must be 0 or more"),
    "rank": (dict(data="x", rank=-1), "--rank must be 0 or more"),
    "all held out": (dict(data="x", held=1.0), "--held is a share"),
    "nothing to compare": (
        dict(modes=("live", "on-policy"), divergences=("renormalised",)),
        "renormalised a stored teacher",
    ),
    "sft of own answers": (
        dict(data="x", students=("s",), modes=("on-policy",), divergences=("sft",)),
        "--divergences sft learns from given responses",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_means_nothing(name: str, tmp_path: Path) -> None:
    changes, word = SETTINGS[name]
    check(lambda: list(run(replace(Zoo(), **changes), Context(tmp_path))), word)


@pytest.mark.parametrize(
    "odd, word",
    [
        ({"prompt": "a"}, "row 1 has the response None"),
        ({"response": "a"}, "row 1 has the prompt None"),
        ({"prompt": "", "response": "a"}, "row 1 has the prompt ''"),
        ({"prompt": "a", "response": ""}, "row 1 has the response ''"),
        ({"prompt": "a", "response": 7}, "row 1 has the response 7"),
    ],
)
def test_a_row_that_is_no_text(odd: dict, word: str, tmp_path: Path) -> None:
    lines = [{"prompt": "q", "response": "a"}, odd]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check(lambda: recipe.texts(str(tmp_path / "rows.jsonl")), word)
    assert len(recipe.texts(str(tmp_path / "rows.jsonl"), count=1)) == 1


def test_texts_that_a_tokenizer_does_not_know() -> None:
    said = Table({"prompt": np.array(["q : Zebra ?"] * 3, object)})
    model = transformer(replace(CONFIG, vocab=80, max_length=64))
    words = recipe.Words(length=32, answer=8, template="none")
    check(lambda: recipe.tokenised(said, arithmetic.tokenizer(), model, words), "unknown")


def test_a_place_for_the_model_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check(lambda: recipe._room_for(str(tmp_path / "file")), "not a model folder")
    check(lambda: recipe._room_for(str(tmp_path)), "not a model folder")
    check(lambda: recipe._room_for(str(tmp_path / "file" / "new")), "cannot be written")
    recipe._room_for(str(tmp_path / "deep" / "new"))
    assert not list((tmp_path / "deep").iterdir())


def rows(path: Path, *names: str, count: int = 40) -> str:
    lines = [json.dumps(dict.fromkeys(names, f"q : {i} + 1 ?")) for i in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


ONE = ("--divergences", "forward_kl", "--template", "none", "--held", "0.2")


@pytest.mark.parametrize(
    "names, flags, word",
    [
        (("question",), ("--modes", "on-policy", *ONE), "'prompt'"),
        (("prompt",), ("--modes", "live", *ONE), "'response'"),
        (("prompt",), (*ONE,), "--modes"),
        (("prompt",), ("--modes", "on-policy", *ONE, "--held", "0"), "held-out"),
        (("prompt",), ("--modes", "on-policy", *ONE, "--answer", "63"), "fits"),
    ],
)
def test_data_that_cannot_be_learned_from(names, flags, word, tmp_path, capsys) -> None:
    data = rows(tmp_path / "rows.jsonl", *names)
    said = command(tmp_path / "work", capsys, "--data", data, *flags)
    assert said.count("\n") == 1 and word in said, said


def test_two_vocabularies_are_refused(tmp_path: Path, capsys) -> None:
    write_model(tmp_path / "bytes")
    data = rows(tmp_path / "rows.jsonl", "prompt")
    flags = ("--data", data, "--modes", "on-policy", *ONE, "--teacher", str(tmp_path / "bytes"))
    said = command(tmp_path / "work", capsys, *flags)
    assert said.count("\n") == 1 and "vocabular" in said and "spans" in said, said
