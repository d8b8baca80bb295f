"""The TAID experiment: its pieces by hand, its claims, its refusals."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import taid as experiment
from w2s_jax.errors import UserError
from w2s_jax.models import hf
from w2s_jax.models.transformer import params_count
from w2s_jax.objectives import language
from w2s_jax.pipelines import taid as study
from w2s_jax.pipelines import taid_worlds as worlds
from w2s_jax.pipelines.taid import METHODS, Setting
from w2s_jax.pipelines.taid_recipe import conversations, run_recipe
from w2s_jax.record import Context
from w2s_jax.train.fit import start
from w2s_jax.train.optim import Tune, optimizer

TUNE = Tune(batch=8, epochs=2, schedule="cosine", clip=1.0)


# The study


def found(kl, *, t=None):
    said = {"kl": np.array([kl, 10 * kl]), "right": np.array([0.1, 0.2])}
    return said | ({} if t is None else {"t": np.array(t)})


def test_settings_are_chosen_by_the_mean_divergence_on_dev():
    settings = study.grid({"big": ["KL", "TAID"]}, (1e-3, 1e-2), (7, 8))
    assert len(settings) == 4 + 4 * len(METHODS["TAID"].alphas)
    kl = {("KL", 1e-3): 1.0, ("KL", 1e-2): 2.0}
    best, rows = study.chosen(
        settings,
        [found(kl.get((s.method, s.lr), 3 - s.alpha) + 0.1 * (s.seed == 7)) for s in settings],
        (0, 1, 2),
    )
    largest = max(METHODS["TAID"].alphas)
    assert [(s.method, s.lr, s.alpha) for s in best[::3]] == [
        ("KL", 1e-3, 0.0),
        ("TAID", 1e-3, largest),
    ]
    assert [s.seed for s in best] == [0, 1, 2] * 2
    assert [row["kl"] for row in rows if row["picked"]] == pytest.approx([1.05, 3.05 - largest])


def test_a_run_that_diverged_is_not_chosen():
    settings = study.grid({"big": ["KL"]}, (1e-3, 1e-2), (0,))
    best, _ = study.chosen(settings, [found(np.nan), found(9.0)], (0,))
    assert best[0].lr == 1e-2
    with pytest.raises(UserError, match="KL diverged at every rate"):
        study.chosen(settings, [found(np.nan)] * 2, (0,))


def test_a_row_says_how_t_went():
    line = study.line(0.2, 5)
    np.testing.assert_allclose(line, [0.2, 0.2, 0.36, 0.52, 0.68])
    (row,) = study.score_rows(
        [Setting("TAID", "big", 0, 1e-2, 0.1)], [found(1.0, t=line + 0.1)], "score", 0.2
    )
    assert row["kl"] == 10 and row["right"] == 0.2  # of test
    assert (row["rise"], row["over"]) == pytest.approx((0.0, 0.1))
    assert (row["last"], row["ahead"]) == pytest.approx((0.78, 0.1))


# The arithmetic world


@pytest.fixture(scope="module")
def world():
    return worlds.arithmetic_world(
        student=("nano-1:0.25",),
        scratch=False,
        teachers=("nano-1", "nano-1:0.5"),
        steps=(1,),
        length=48,
        sizes=(24, 6, 10),
        rows=16,
        tune=TUNE,
        start=0.2,
    )


@pytest.mark.slow
def test_the_truth_is_a_teacher(world):
    """Its forward divergence is the cross-entropy on data: SFT."""
    table = world.tables[study.TRUTH].take(np.arange(8))
    batch = jax.tree.map(jnp.asarray, table.batch(np.arange(8)))
    params = jax.tree.map(lambda leaf: leaf[0], world.begin([0]))
    kinds = list(dict.fromkeys(method.divergence for method in METHODS.values()))
    kind = kinds.index(METHODS["SFT"].divergence)
    objective = world.learner({"kind": kind, "alpha": 0.0})
    state = start(params, optimizer(TUNE, 2, None), 2, memory=study.taid_memory())
    said = [
        jax.jit(lambda p, o=o: o(p, state, batch, jax.random.key(0))[0])(params)
        for o in (objective, language(world.model))
    ]
    np.testing.assert_allclose(*said, rtol=1e-5)


@pytest.mark.slow
def test_the_judge_reads_a_teacher_as_itself(world):
    """Of the teacher's own weights: no divergence, its own numbers, both splits apart."""
    model, params, _ = hf.load("nano-1")
    said = jax.device_get(jax.jit(world.judge)(params, world.data))
    (row, _) = worlds.teacher_rows(world)
    assert said["kl"].shape == (2, 2)
    np.testing.assert_allclose(said["kl"][:, 0], 0.0, atol=1e-5)
    assert (said["kl"][:, 1] > 1e-3).all() and (said["agree"][:, 0] == 1).all()
    for name in ("nll", "right", "exact"):
        assert said[name][1] == pytest.approx(row[name], rel=1e-4)
    for name in ("head", "tail"):
        assert said[name][1, 0] == pytest.approx(row[name], rel=1e-3)
    # by hand, from the complete distributions of the ten test rows
    logps, every = np.asarray(world.data["teacher"][0, 6:]), world.data["mask"][6:, 1:] > 0
    ranked = np.sort(np.exp(logps[..., :75]), axis=-1)  # the tokenizer has 75 tokens
    assert row["head"] == pytest.approx(ranked[..., -10:].sum(-1)[every].mean(), rel=1e-4)
    assert row["tail"] == pytest.approx(ranked[..., :15].sum(-1)[every].mean(), rel=1e-3)


def test_problems_of_different_purposes_never_meet():
    tables = worlds._texts(hf.load("nano-1")[2], (1,), 48, (24, 6, 10))
    asked = [set(table["question"]) for table in tables]
    assert [len(part) for part in asked] == [24, 6, 10] and len(set.union(*asked)) == 40
    for table in tables:
        mask, solution = np.asarray(table["mask"]), np.asarray(table["solution"])
        assert mask[:, 0].max() == 0 and mask[:, 1].min() == 1 and (mask >= solution).all()
        assert (solution.sum(1) > 5).all() and (mask.sum(1) > 20 + solution.sum(1) - 5).all()


# Digits


@pytest.mark.slow
def test_a_small_network_learns_from_a_larger_ones_classes():
    world = worlds.digits_world(
        data="",
        sizes=(200, 40, 60),
        hidden=(16, 8),
        tune=replace(TUNE, lr=1e-2, epochs=16),
        start=0.2,
    )
    settings = study.grid({"mlp": ["SFT", "KL", "TAID linear"]}, (1e-2,), (0,))
    before = jax.device_get(world.judge(jax.tree.map(lambda x: x[0], world.begin([0])), world.data))
    for said in study.judged(world, settings):
        assert said["kl"][1] < 0.8 * before["kl"][1, 0]
        assert said["accuracy"][1] > before["accuracy"][1] + 0.2


# Claims and figures


def made_up(methods=("SFT", "KL", "RKL", "skew KL", "TAID linear", "TAID"), seeds=6):
    """Rows in which everything that the paper says is so."""
    kl = dict(zip(methods, (0.3, 0.25, 0.4, 0.3, 0.22, 0.2), strict=True))
    tail = dict.fromkeys(methods, 1e-3) | {"RKL": 2e-4}
    rows = [
        {"block": "teacher", "teacher": name, "right": 1.0, "head": 0.97, "tail": 1e-3}
        for name in ("small", "big")
    ]
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        noise = 1 + 0.01 * rng.normal(size=100)
        for i, (method, teacher) in enumerate((m, t) for m in methods for t in ("small", "big")):
            grown = {"TAID": 0.02, "KL": 0.01}.get(method, 0.0) * (teacher == "big")
            row = {"block": "score", "method": method, "teacher": teacher, "seed": seed}
            row |= {"kl": kl[method] * noise[i], "nll": 0.5, "right": 0.9 + grown + 0.01 * noise[0]}
            row |= {"exact": 0.1, "tail": tail[method] * noise[i]}
            row |= {"head": 0.97 if method == "RKL" else 0.95 * noise[i]}
            t = {"rise": 0.0, "over": 0.0, "last": 0.999, "ahead": 0.1 * noise[i]}
            rows.append(row | (t if method.startswith("TAID") else {}))
        for method, right in (("KL", 0.8), ("TAID", 0.85)):
            row = {"block": "digits", "method": method, "teacher": "mlp", "seed": seed}
            rows.append(row | {"accuracy": right * noise[99]})
    rows += worlds.theory_rows(seeds, points=20, ratio=6.0, rounds=12)
    return rows


def test_the_claims_hold_where_they_should():
    said = experiment.claims(made_up())
    assert len(said) == 19 and all(one["holds"] for one in said), [
        one["name"] for one in said if not one["holds"]
    ]


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("TAID below KL", {"TAID": {"kl": 0.26}}),
        ("TAID's student does not get worse as the teacher grows", {"TAID big": {"right": 0.5}}),
        ("TAID gains more from the larger teacher than skew KL", {"skew KL big": {"right": 0.99}}),
        ("RKL has less mass in the tail than KL", {"RKL": {"tail": 1.1e-3}}),
        ("TAID's tail is near KL's", {"TAID": {"tail": 2e-3}}),
        ("RKL has more mass in the head than KL", {"RKL": {"head": 0.9}}),
        ("t never falls", {"TAID": {"rise": -0.01}}),
        ("t never is below its line", {"TAID": {"over": -0.01}}),
        ("t ends near 1", {"TAID": {"last": 0.9}}),
        ("adaptive steps run ahead", {"TAID": {"ahead": 0.0}}),
        ("digits: TAID more accurate than KL", {"TAID": {"accuracy": 0.7}}),
        ("kernels: TAID does not", {"TAID": {"norm": 0.5}}),
        ("kernels: self-distillation collapses", {"self-distillation": {"norm": 2.0}}),
    ],
)
def test_a_claim_fails_where_it_should(claim, change):
    ((where, numbers),) = change.items()
    rows = [
        row | {k: v for k, v in numbers.items() if k in row}
        if where in (row.get("method"), f"{row.get('method')} {row.get('teacher')}")
        else row
        for row in made_up()
    ]
    (found,) = [one for one in experiment.claims(rows) if one["name"] == claim]
    assert not found["holds"]


# One large student


def written(folder, rows):
    path = folder / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_conversations_are_trained_on_whole(tmp_path):
    tokenizer = hf.load("nano-1")[2]
    path = written(tmp_path, [{"prompt": "q : 2 + 3", "response": " = 5"}] * 3)
    how = dict(split="", count=2, chat="none", length=32)
    table = conversations(path, tokenizer, **how)
    assert len(table) == 2
    ids = np.asarray(table["tokens"][0])[np.asarray(table["segment"][0]) > 0]
    assert ids[-1] == tokenizer.eos and ids[0] == tokenizer.bos
    assert np.asarray(table["mask"][0]).sum() == len(ids) - 1
    turns = [{"role": "user", "content": "q : 2 + 3"}, {"role": "assistant", "content": "= 5"}]
    path = written(tmp_path, [{"messages": turns}])
    with pytest.raises(UserError, match="unknown"):  # a transcript's words are not this model's
        conversations(path, tokenizer, **how)
    path = written(tmp_path, [{"text": "q : 2 + 3"}])
    with pytest.raises(UserError, match="'messages', or 'prompt' and 'response'"):
        conversations(path, tokenizer, **how)


@pytest.mark.slow
def test_the_recipe_brings_a_student_nearer_to_its_teacher(tmp_path):
    drawn = worlds.arithmetic.problems(0, 40, steps=(1,))
    rows = [
        {"prompt": p, "response": r}
        for p, r in zip(drawn["prompt"], drawn["response"], strict=True)
    ]
    said = list(
        run_recipe(
            written(tmp_path, rows),
            student="nano-1:0.25",
            teacher="nano-1",
            methods=("SFT", "KL", "TAID 5e-4"),
            ctx=Context(tmp_path, quiet=True),
            tune=replace(TUNE, lr=5e-3),
            length=48,
            begin=0.2,
            alpha=0.01,
            held=0.2,
        )
    )
    assert [row["method"] for row in said] == ["student", "SFT", "KL", "TAID 5e-4"]
    assert all(row["kl"] < said[0]["kl"] for row in said[2:])
    assert experiment.summary(said)[1]["nll"] == said[1]["nll"]


# Refusals


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"methods": ("KL", "kld", "TAID")}, "kld unknown"),
        ({"methods": ("SFT", "TAID")}, "lacks KL"),
        ({"lrs": ()}, "one entry at least"),
        ({"lrs": (-1.0,)}, "lrs"),
        ({"alphas": (0.1, 0.1)}, "none twice"),
        ({"pictured": (10, 0, 5)}, "--pictured"),
        ({"rows": 3000}, "more than the 2000"),
        ({"tuned": 0}, "above 0"),
        ({"start": 1.0}, "--start"),
    ],
)
def test_bad_numbers_are_refused_before_any_work(numbers, words, tmp_path):
    cfg = replace(experiment.Config(), **numbers)
    with pytest.raises(UserError, match=words):
        next(experiment.run(cfg, Context(tmp_path, quiet=True)))


@pytest.mark.parametrize("held", [0.0, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused_before_weights_are_read(held, tmp_path):
    cfg = replace(experiment.Config(), data="absent.jsonl", held=held)
    with pytest.raises(UserError, match="--held"):
        list(experiment.run(cfg, Context(tmp_path, quiet=True)))


def test_problems_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="fit in --length 56"):
        worlds._texts(hf.load("nano-1")[2], (2,), 56, (50, 5, 5))


def test_the_plan_knows_the_papers_models():
    assert experiment._shape("microsoft/Phi-3-mini-4k-instruct").width == 3072
    assert experiment._shape("nano-1").width == 16
    for name, billions in {"tinyllama_v1.1": 1.10, "llama-2-7b-chat-hf": 6.74}.items():
        assert params_count(experiment.SHAPES[name]) / 1e9 == pytest.approx(billions, rel=0.01)
