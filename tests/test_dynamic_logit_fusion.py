"""Dynamic logits fusion: the sub-tasks by hand, claims that can fail, models given by name."""

import json

import jax
import numpy as np
import pytest

from experiments import dynamic_logit_fusion as experiment
from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.pipelines import dynamic_logit_fusion as blocks
from w2s_jax.pipelines.dynamic_logit_fusion import DYNAMIC, TASKS, Exam, Heard
from w2s_jax.record import CLAIM, Context
from w2s_jax.types import Table


def test_tasks_by_hand() -> None:
    (problem,) = arithmetic.draw(3, 1, steps=(1,), distractor=0.0, skills=("mul",))
    step, (first, number) = problem.steps[0], problem.start
    facts = problem.question.split(" how many ")[0]
    name, value, item = step.name, step.value, problem.item
    equation = f"{number} * {step.right} = {value}"
    assert blocks.pose("total", problem) == (
        f"{facts} how many {item} have {first} and {name} ?",
        f"{name} : {equation} . sum : {number} + {value} = {number + value} . #### "
        f"{number + value}",
    )
    assert blocks.pose("words", problem) == (
        f"{facts} how many {item} does {name} have !",
        f"{name} : {number} times {step.right} = {value} . #### {value}",
    )
    assert blocks.pose("named", problem) == (
        f"{facts} {name} has how many {item} ?",
        f"{name} : {equation} . {name} has {value} .",
    )
    with pytest.raises(UserError, match="no task"):
        blocks.pose("sums", problem)


def test_totals_stay_in_the_world_and_every_word_is_known() -> None:
    drawn = arithmetic.draw(0, 300, start=90, steps=(1,))
    posed = [blocks.pose("total", problem) for problem in drawn]
    assert None in posed
    tokenizer = arithmetic.tokenizer()
    for task in TASKS:
        table = blocks.examples(task, 5, 20, tokenizer, length=80, steps=(1, 2))
        texts = [a + b for a, b in zip(table["prompt"], table["response"], strict=True)]
        assert len(table) == 20 and tokenizer.unknown_share(texts) == 0
        assert all("how many" in text for text in table["source"])


def test_training_problems_are_none_of_the_exams(tmp_path) -> None:
    cfg = experiment.Config(**experiment.PRESETS["tiny"])
    names = [n for n in blocks.World.__dataclass_fields__ if n != "ctx"]
    ctx = Context(tmp_path, quiet=True)
    world = blocks.World(ctx=ctx, **{name: getattr(cfg, name) for name in names})
    asked = {text for exam in world.exams.values() for text in exam.table["source"]}
    assert not asked & set(world._mixture(0)["source"])
    for school in world._schools(1):
        assert len(school) == cfg.solutions and not asked & set(school["source"])


def test_what_is_heard() -> None:
    heard = Heard(
        right=np.array([True, False, True, True]),
        nats=np.array([9.0, 1.0, 2.0, 3.0]),
        counts=np.array([9.0, 2.0, 2.0, 2.0]),
        alpha=[np.array([9.0]), np.array([0.0, 2.0]), np.array([1.0]), np.array([1.0])],
        expert=[np.array([1]), np.array([-1, 0]), np.array([0]), np.array([1])],
    )
    row = heard.row(1)
    assert row == dict(
        accuracy=pytest.approx(2 / 3),
        nll=1.0,
        dev=1.0,
        alpha=1.0,
        alpha_std=pytest.approx(0.5**0.5),
    )
    np.testing.assert_allclose(heard.picks(1, 2), [0.5, 0.25])


SCORES = {"large": 0.3, "base": 0.1, "expert": 0.4, "proxy 1": 0.5, DYNAMIC: 0.6, "ceiling": 0.7}


def made(**changes) -> list[dict]:
    """Rows of three seeds in which the paper's story holds; ``changes`` spoil a part of it."""
    scores, rows = {**SCORES, **changes.get("scores", {})}, []
    for seed in range(3):
        noise = 0.001 * seed
        for task, better in zip(TASKS, ("proxy 0.5", "proxy 1.5", "proxy 1"), strict=True):
            where = dict(task=task, seed=seed)
            arms = {**scores, "proxy 0.5": 0.45, "proxy 1.5": 0.45}
            arms[better] = changes.get("better", 0.58)
            for arm, score in arms.items():
                row = dict(block="tasks", arm=arm, accuracy=score + noise, dev=score, **where)
                row |= dict(nll=1 - score - noise * score)
                steered = arm.startswith("proxy") or arm == DYNAMIC
                rows.append(row | (dict(alpha=1.0, alpha_std=0.4) if steered else {}))
            for arm in ("expert", "ceiling", DYNAMIC):
                row = dict(block="several", arm=arm, accuracy=scores[arm] + noise, nll=0.5)
                rows.append(row | where)
            for expert in TASKS:
                share = 0.6 + noise if expert == changes.get("picked", task) else 0.2
                rows.append(dict(block="picks", expert=expert, share=share, **where))
            rows.append(dict(block="identity", ones=changes.get("ones", 1.0), tokens=5, **where))
            rows += blocks.histogram(np.array([0.0, 1.0, 1.1]), where)
    return rows


def verdicts(rows) -> dict[str, bool]:
    found = experiment.claims(rows)
    assert all(claim.keys() == set(CLAIM) for claim in found)
    assert len({claim["name"] for claim in found}) == len(found)
    return {claim["name"]: claim["holds"] for claim in found}


def test_claims_hold_when_the_story_does() -> None:
    told = verdicts(made())
    assert all(told.values()), [name for name, holds in told.items() if not holds]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"scores": {DYNAMIC: 0.45}}, ["dynamic fusion above proxy", "never far below"]),
        ({"scores": {"expert": 0.6}}, ["proxy tuning above the small expert"]),
        ({"scores": {"large": 0.65}}, ["above the large model", "over half of the gap"]),
        ({"scores": {"ceiling": 0.95}}, ["over .7 of the ceiling"]),
        ({"better": 0.45}, ["no single fixed weight"]),
        ({"picked": "total"}, ["own expert is picked"]),
        ({"ones": 0.9}, ["the weight is 1"]),
    ],
)
def test_claims_fail_when_the_story_does(changes, names) -> None:
    told = verdicts(made(**changes))
    for part in names:
        assert any(part in name and not holds for name, holds in told.items()), part


@pytest.mark.parametrize("ceiling", [0.0, 0.3, 0.2])
def test_nothing_is_said_of_a_gap_that_is_not_there(ceiling) -> None:
    claims = experiment.claims(made(scores={"ceiling": ceiling, "large": 0.3}))
    told = [claim for claim in claims if "of the gap recovered" in claim["name"]]
    told += [c for c in claims if "of the ceiling's score" in c["name"]] if not ceiling else []
    assert len(told) == (2 if ceiling else 4)
    for claim in told:
        assert claim["value"] is None and not claim["holds"]


def test_figures_and_summary(tmp_path) -> None:
    rows = made()
    names = [path.stem for path in experiment.figures(rows, tmp_path)]
    assert names == ["accuracy", "nll", "weights", "picks"]
    table = {(row["experts"], row["arm"]): row for row in experiment.summary(rows)}
    assert table["one", DYNAMIC]["average"] == pytest.approx(0.601)
    assert table["several", DYNAMIC]["total"] == pytest.approx(0.601)


def test_shares_of_weights_sum_to_one() -> None:
    rows = list(blocks.histogram(np.array([0.0, 0.3, 2.0, 1.0], np.float32), {"task": "t"}))
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert {row["weight"] for row in rows if row["share"]} == {0.0, 0.3, 1.0, 2.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alphas": (0.5,)}, "must hold 1"),
        ({"most": 0.0}, "--most"),
        ({"answer": 90}, "less than --length"),
        ({"experts": ("nano-1",)}, "need --data"),
        ({"dev": 0}, "at least 1"),
        ({"alphas": (1.0, float("nan"))}, "finite"),
        ({"rank": -1}, "not be negative"),
        ({"data": ("a", "b"), "experts": ("nano-1",)}, "one each"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl"),
    ],
)
def test_bad_numbers_are_said(changes, words, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        list(experiment.run(experiment.Config(**changes), Context(tmp_path, quiet=True)))


def test_a_text_that_the_base_cannot_read_is_refused(tmp_path) -> None:
    file = tmp_path / "german.jsonl"
    file.write_text(json.dumps(dict(question="Wie viele?", answer="Zehn", split="test")))
    cfg = experiment.Config(data=(str(file),))
    with pytest.raises(UserError, match="unknown to the base"):
        list(experiment.run(cfg, Context(tmp_path, quiet=True)))


def test_an_exam_may_have_no_dev_rows() -> None:
    exam = Exam(Table({"prompt": np.array(["a"], object)}), 0, 3, blocks.same_text)
    assert exam.right(" b ", "b") and not exam.right("b", "c")
    assert "dev" not in Heard(np.ones(1, bool), np.ones(1), np.ones(1)).row(0)


@pytest.mark.slow
def test_models_by_name_and_experts_made_on_the_way(tmp_path) -> None:
    files = []
    for number in range(2):
        file = tmp_path / f"questions{number}.jsonl"
        problems = arithmetic.draw(number, 24, steps=(1,))
        rows = [
            {"question": f"q : {p.question}", "answer": f" a : {p.answer}", "split": split}
            for p, split in zip(problems, ["train"] * 16 + ["test"] * 8, strict=True)
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
        files.append(str(file))
    changes = dict(data=tuple(files), rank=2, length=64, answer=16, separator="", alphas=(1.0,))
    cfg = experiment.Config(**changes)
    rows = list(experiment.run(cfg, Context(tmp_path / "run", quiet=True)))
    arms = {row["arm"] for row in rows if row["block"] == "tasks"}
    assert arms == {"large", "base", "expert", "proxy 1", DYNAMIC}
    assert sum(r["share"] for r in rows if r["block"] == "picks") == pytest.approx(2, abs=0.2)
    plain = {r["arm"]: r["accuracy"] for r in rows if r["block"] == "tasks"}
    assert plain["large"] > 0.5, "nano-3 answers one-step problems"
    assert "ceiling" not in verdicts(rows)
    again = list(experiment.run(cfg, Context(tmp_path / "run", quiet=True)))
    assert again == rows


def test_the_plan_is_the_experts_step() -> None:
    paper = experiment.Config(**experiment.PRESETS["paper"])
    draft = experiment.plan(paper)
    assert "sft of rank 64" in draft.title and "Llama-2-7b" in draft.title
    recipe = draft.build(draft.options)
    sizes = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.size, recipe.params))
    # of 32 layers: q k v o have 4 x (4096 + 4096) rows, gate up down 3 x (4096 + 11008)
    assert sum(sizes) == 32 * 64 * (4 * 8192 + 3 * 15104)
    assert recipe.tune.batch == 128
