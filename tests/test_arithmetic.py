"""The arithmetic world against an independent reader of its questions, and by hand."""

import re
from collections import Counter
from hashlib import sha256
from random import Random

import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.data.arithmetic_text import NAMES, PROMPT, RESPONSE, SKILLS, Problem, Step, write
from w2s_jax.errors import UserError

LIZ = Step("liz", 10, "*", 2, 20, "mul", ("amy",))
KAI = Step("kai", 20, "/", 2, 10, "div", ("liz",))
CARD = Problem(
    "card",
    "pens",
    ("amy", 10),
    {
        "amy": "amy has 10 pens .",
        "liz": "liz has 2 times as many as amy .",
        "ida": "ida has 8 more than liz .",
        "kai": "kai has half as many as liz .",
    },
    (LIZ, KAI),
)
SHARES = {"half": 2, "third": 3, "quarter": 4}


def read(question):
    """Everyone's number, worked out from the question's words alone; and who is asked for."""
    *facts, asked = question.removesuffix(" ?").split(" . ")
    facts = dict(fact.split(" has ", 1) for fact in facts)

    def number(name):
        words = facts[name].split()
        if len(words) == 2:
            return int(words[0])
        if words[0] == "the":  # the sum of p and r, the difference of p and r
            a, b = number(words[3]), number(words[5])
            return a + b if words[1] == "sum" else abs(a - b)
        if "than" in words:
            sign = 1 if words[1] == "more" else -1
            return number(words[3]) + sign * int(words[0])
        if "percent" in words:
            return exact(number(words[3]) * int(words[0]), 100)
        if "times" in words:
            return number(words[-1]) * int(words[0])
        if words[2] in ("pairs", "dozen"):
            return number(words[4]) * {"pairs": 2, "dozen": 12}[words[2]]
        return exact(number(words[-1]), SHARES[words[0] if words[0] != "a" else words[1]])

    return {name: number(name) for name in facts}, asked.split()[4]


def exact(a, b):
    assert a % b == 0
    return a // b


@pytest.fixture(scope="module")
def many():
    """300 problems of each number of steps, facts shuffled in half of them."""
    return [
        problem
        for steps in range(1, 7)
        for problem in arithmetic.draw(7, 300, steps=(steps,), shuffled=0.5, distractor=0.5)
    ]


def test_a_problem_by_hand():
    assert CARD.question == (
        "amy has 10 pens . liz has 2 times as many as amy . ida has 8 more than liz . "
        "kai has half as many as liz . how many pens does kai have ?"
    )
    assert CARD.answer == "liz : 10 * 2 = 20 . kai : 20 / 2 = 10 . #### 10"
    assert arithmetic.solve(CARD) == CARD.answer and CARD.final == 10
    assert read(CARD.question) == ({"amy": 10, "liz": 20, "ida": 28, "kai": 10}, "kai")


def test_every_answer_is_what_the_question_says(many):
    for problem in many:
        numbers, asked = read(problem.question)
        assert numbers[asked] == problem.final
        assert all(numbers[step.name] == step.value for step in problem.steps)
        assert all(0 <= number <= 99 for number in numbers.values())
        assert arithmetic.solve(problem) == problem.answer


def test_every_person_of_the_solution_leads_to_the_answer(many):
    for problem in many:
        used = {parent for step in problem.steps for parent in step.parents}
        core = {problem.start[0], *(step.name for step in problem.steps)}
        assert used == core - {problem.steps[-1].name}
        extra = set(problem.facts) - core
        assert not any(name in problem.answer for name in extra)
    assert 0.35 < np.mean([len(p.facts) > len(p.steps) + 1 for p in many]) < 0.65


def test_all_skills_and_both_orders_of_a_comparison(many):
    counts = Counter(step.skill for problem in many for step in problem.steps)
    assert set(counts) == set(SKILLS) and min(counts.values()) > 0.04 * counts.total()
    differences = [s for p in many for s in p.steps if s.skill == "difference"]
    swapped = 0
    for p in many:
        for s in p.steps:
            fact = re.search(r"the difference of (\w+) and", p.facts[s.name])
            swapped += bool(fact and read(p.question)[0][fact[1]] < s.left)
    assert 0.2 < swapped / len(differences) < 0.8


def test_same_seed_same_problems_however_many():
    few, more = arithmetic.draw(3, 20, distractor=0.5), arithmetic.draw(3, 200, distractor=0.5)
    assert few == more[:20]
    assert arithmetic.draw(4, 20, distractor=0.5) != few
    assert arithmetic.problems(3, 9).digest() == arithmetic.problems(3, 9).digest()
    assert arithmetic.documents(3, 20) == arithmetic.documents(3, 50)[:20]
    short, long = arithmetic.judged(3, 40), arithmetic.judged(3, 80)
    assert short.digest() == long.take(np.arange(40)).digest()


def test_golden_first_problem_is_stable():
    """Data of a seed is part of every recorded result: it must not change unnoticed."""
    first = arithmetic.draw(0, 1, steps=(3,))[0]
    assert f"{first.question} {first.answer}" == (
        "ray has 5 nuts . kai has 5 times as many as ray . ida has the difference of kai and ray . "
        "liz has as many pairs as ida has nuts . leo has 25 percent of liz . how many nuts does "
        "liz have ? kai : 5 * 5 = 25 . ida : 25 - 5 = 20 . liz : 20 * 2 = 40 . #### 40"
    )
    text = "\n".join(a + b for a, b in arithmetic.documents(0, 100))
    assert sha256(text.encode()).hexdigest()[:16] == "ca2bd8b158935648"
    assert arithmetic.problems(0, 100).digest() == "7dcaf77a46a55616"
    assert arithmetic.judged(0, 100).digest() == "d869f1499585aa2c"


def test_steps_weights_and_dials():
    drawn = arithmetic.draw(0, 600, steps=(1, 4), weights=(1, 3))
    assert {len(p.steps) for p in drawn} == {1, 4}
    assert 0.7 < np.mean([len(p.steps) == 4 for p in drawn]) < 0.8
    small = arithmetic.draw(0, 50, start=5, largest=12, steps=(3,))
    assert all(max(read(p.question)[0].values()) <= 12 for p in small)
    assert all(p.start[1] <= 5 for p in small)
    one = arithmetic.draw(0, 50, skills=("add", "mul"), steps=(2,))
    assert {s.skill for p in one for s in p.steps} == {"add", "mul"}
    crowd = arithmetic.draw(0, 30, distractor=1.0, distractors=3, steps=(2,))
    assert np.mean([len(p.facts) for p in crowd]) == 6.0
    none = arithmetic.draw(0, 30, distractor=0.0)
    assert all(len(p.facts) == len(p.steps) + 1 for p in none)


def test_facts_in_order_speak_of_people_already_named():
    for problem in arithmetic.draw(5, 200, distractor=1.0, distractors=2):
        named = set()
        for name, fact in problem.facts.items():
            assert set(fact.split()) & (set(NAMES) - {name}) <= named
            named.add(name)


def test_shuffled_facts_change_the_question_only():
    plain = arithmetic.draw(5, 100, steps=(4,), distractor=0.0)
    mixed = arithmetic.draw(5, 100, steps=(4,), distractor=0.0, shuffled=1.0)
    assert [p.answer for p in plain] == [p.answer for p in mixed]
    assert [dict(p.facts) for p in plain] == [dict(p.facts) for p in mixed]
    assert np.mean([p.question != q.question for p, q in zip(plain, mixed, strict=True)]) > 0.95


def test_no_question_twice_and_none_of_another_table():
    narrow = {"steps": (1,), "skills": ("add",), "start": 4, "distractor": 0.0}
    train = arithmetic.draw(0, 3000, **narrow)
    asked = {p.question for p in train}
    assert len(asked) == 3000
    test = arithmetic.draw(1, 500, avoid=asked, **narrow)
    assert not asked & {p.question for p in test}
    free = {p.question for p in arithmetic.draw(1, 500, **narrow)}
    assert asked & free  # without `avoid` some would have come again
    some = {p.question for p in arithmetic.draw(2, 5000, steps=(1,))}
    prompts = {prompt for prompt, _ in arithmetic.documents(0, 5000, avoid=some)}
    assert not {PROMPT.format(question) for question in some} & prompts


def test_distinct_removes_what_came_before():
    a, b = arithmetic.problems(0, 10), arithmetic.problems(1, 10)
    first, second = arithmetic.distinct(a.take([0, 1, 1, 2]), b.take([3, 4]))
    assert first["id"].tolist() == ["0-0", "0-1", "0-2"] and len(second) == 2
    _, rest = arithmetic.distinct(a, a.take([5, 6]))
    assert len(rest) == 0


def test_rows_look_like_gsm8k():
    table = arithmetic.problems(0, 50)
    for row in table.rows():
        assert re.fullmatch(r".* #### [0-9]{1,2}", row["answer"])
        assert row["answer"].split("#### ")[1] == str(row["final"])
        assert row["answer"].count("=") == row["steps"] == len(row["skills"].split())
        assert row["prompt"] == f"q : {row['question']}"
        assert row["response"] == f" a : {row['answer']}"
    assert table.batch([0]) == {}  # texts and bookkeeping never reach a device


def test_subproblems_ask_for_every_step(many):
    parts = arithmetic.subproblems(CARD)
    assert [p.question for p in parts] == [
        "amy has 10 pens . liz has 2 times as many as amy . how many pens does liz have ?",
        "amy has 10 pens . liz has 2 times as many as amy . kai has half as many as liz . "
        "how many pens does kai have ?",
    ]
    assert [p.answer for p in parts] == ["liz : 10 * 2 = 20 . #### 20", CARD.answer]
    for problem in many[::7]:
        parts = arithmetic.subproblems(problem)
        assert [p.final for p in parts] == [step.value for step in problem.steps]
        for part in parts:
            numbers, asked = read(part.question)
            assert numbers[asked] == part.final and len(part.facts) == len(part.steps) + 1


def test_judged_is_balanced_and_says_the_truth():
    table = arithmetic.judged(0, 400)
    truth, group = table["truth"], table["group"]
    assert truth.dtype == np.int32 and table["label"].dtype == np.float32
    np.testing.assert_array_equal(table["label"], np.eye(2)[truth])
    cells = Counter(zip(group.tolist(), truth.tolist(), strict=True))
    assert cells == {(steps, right): 50 for steps in (1, 2, 3, 4) for right in (0, 1)}
    assert len(set(table["question"].tolist())) == 400
    for row in table.rows():
        numbers, asked = read(row["question"])
        final = int(row["response"].split("#### ")[1])
        assert (final == numbers[asked]) == bool(row["truth"])
        assert (row["kind"] == "none") == bool(row["truth"])
        assert row["prompt"] == PROMPT.format(row["question"])
    assert "truth" not in table.batch([0, 1])
    # neither order nor number of steps gives the answer away
    assert 0.3 < truth[::2].mean() < 0.7
    again = arithmetic.judged(1, 400, avoid=set(table["question"].tolist()))
    assert len(arithmetic.distinct(table, again)[1]) == 400


def test_documents_and_drills():
    pairs = arithmetic.documents(0, 3000)
    drills = [response for prompt, response in pairs if prompt == "drill"]
    assert 0.07 < len(drills) / 3000 < 0.13
    for drill in drills:
        facts = re.findall(r"([0-9]+) (.) ([0-9]+) = ([0-9]+) \.", drill)
        assert len(facts) == 5
        for a, op, b, c in facts:
            a, b, c = int(a), int(b), int(c)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / max(b, 1)}[op] == c
            assert all(0 <= number <= 99 for number in (a, b, c))
    steps = Counter(response.count("=") for prompt, response in pairs if prompt != "drill")
    shares = np.array([steps[n] for n in range(1, 6)]) / (3000 - len(drills))
    np.testing.assert_allclose(shares, np.array([3, 3, 2, 2, 1]) / 11, atol=0.04)
    prompt, response = next(pair for pair in pairs if pair[0] != "drill")
    numbers, asked = read(prompt.removeprefix("q : "))
    assert response.startswith(" a : ") and response.endswith(f"#### {numbers[asked]}")
    assert all(prompt == "drill" for prompt, _ in arithmetic.documents(0, 20, drill=1.0))


def test_tokenizer_round_trip_and_coverage(many):
    t = arithmetic.tokenizer()
    assert (t.size, t.pad, t.bos, t.eos, t.unk) == (75, 0, 1, 2, 3)
    assert [t.token(i) for i in range(4, 14)] == list("0123456789")
    text = PROMPT.format(CARD.question) + RESPONSE.format(CARD.answer)
    assert t.decode(t.encode(text)) == text and len(t.encode("12")) == 2
    assert t.decode([t.bos, *t.encode("#### 12"), t.eos]) == "#### 12"
    assert arithmetic.verify(CARD, t.decode(t.encode(RESPONSE.format(CARD.answer)))).correct
    rng = Random(0)
    texts = [p.question for p in many] + [
        arithmetic.corrupt(p, rng, outcome_error=0.5, step_error=0.5).text for p in many
    ]
    texts += [prompt + response for prompt, response in arithmetic.documents(1, 500)]
    assert t.unknown_share(texts) == 0.0
    assert all(t.decode(ids) == text for ids, text in zip(t.encode_ids(texts), texts, strict=True))
    assert not t.covers("amy has 3 dragons .")


def test_tokenizer_is_saved_whole(tmp_path):
    t = arithmetic.tokenizer()
    t.save(tmp_path)
    copy = type(t).load(tmp_path)
    assert copy.digest() == t.digest() == arithmetic.tokenizer().digest()
    assert copy.decode(copy.encode(CARD.answer)) == CARD.answer


def test_lengths_are_near_the_measured_ones():
    """Mean tokens of prompt (BOS and "a :" in) and solution (EOS in) of a first version."""
    t = arithmetic.tokenizer()
    questions, solutions = (25, 34, 42, 50, 57, 66), (12, 21, 31, 40, 49, 59)
    for steps in range(1, 7):
        drawn = arithmetic.draw(0, 300, steps=(steps,))
        prompt = [len(ids) + 3 for ids in t.encode_ids([PROMPT.format(p.question) for p in drawn])]
        answer = [len(ids) + 1 for ids in t.encode_ids([p.answer for p in drawn])]
        assert abs(np.mean(prompt) / questions[steps - 1] - 1) < 0.1
        assert abs(np.mean(answer) / solutions[steps - 1] - 1) < 0.1
        assert steps > 5 or max(a + b for a, b in zip(prompt, answer, strict=True)) <= 136


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (0,)}, "steps must be"),
        ({"steps": (7,)}, "steps must be"),
        ({"steps": ()}, "steps must be"),
        ({"weights": (1, 2)}, "one weight"),
        ({"weights": (0,) * 5}, "one weight"),
        ({"skills": ("algebra",)}, "unknown skills"),
        ({"skills": ("sum",)}, "single person"),
        ({"start": 200}, "start"),
        ({"largest": 100}, "largest"),
        ({"distractor": 1.5}, "between 0 and 1"),
        ({"distractors": 12}, "distractors must be"),
        ({"skills": ("mul",), "steps": (6,), "start": 2, "largest": 20}, "no problem of 6 steps"),
        (
            {"skills": ("percent",), "steps": (1,), "start": 2, "largest": 2, "distractor": 0.0},
            "no new question",
        ),
    ],
)
def test_bad_dials_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        arithmetic.draw(0, 20_000, **options)
    assert "\n" not in str(error.value)


def test_other_faults():
    with pytest.raises(UserError, match="even"):
        arithmetic.judged(0, 3)
    with pytest.raises(UserError, match="rates"):
        arithmetic.corrupt(CARD, Random(0), outcome_error=2, step_error=0)
    odd = Problem("x", "pens", ("amy", 9), CARD.facts, (LIZ, KAI._replace(right=4)))
    with pytest.raises(UserError, match="not whole"):
        arithmetic.solve(odd)
    assert write((), 3).endswith("#### 3")
