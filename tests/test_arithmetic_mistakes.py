"""Checking written solutions, and mistakes at rates that are set independently."""

import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from w2s_jax.data import arithmetic
from w2s_jax.data.arithmetic_text import Problem, Step
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


@pytest.fixture(scope="module")
def many():
    """300 problems of each number of steps, facts shuffled in half of them."""
    return [
        problem
        for steps in range(1, 7)
        for problem in arithmetic.draw(7, 300, steps=(steps,), shuffled=0.5, distractor=0.5)
    ]


def test_verifier_on_hand_written_texts():
    full = arithmetic.verify(CARD, " a : " + CARD.answer)
    assert full == (True, 1.0, 10.0, (True, True), (True, True))
    assert arithmetic.verify(CARD, CARD.answer + " q : max has 3 pens . #### 4").correct
    swapped = arithmetic.verify(CARD, "liz : 2 * 10 = 20 . kai : 20 / 2 = 10 . #### 10")
    assert swapped.credit == 1.0 and swapped.valid == (True, True)
    carried = arithmetic.verify(CARD, "liz : 10 * 2 = 22 . kai : 22 / 2 = 11 . #### 11")
    assert carried == (False, 0.0, 11.0, (False, True), (False, False))
    half = arithmetic.verify(CARD, "liz : 10 * 2 = 20 . kai : 20 / 4 = 5 . #### 5")
    assert half == (False, 0.5, 5.0, (True, False), (True, False))
    lucky = arithmetic.verify(CARD, "#### 10")
    assert lucky == (True, 0.0, 10.0, (), (False, False))
    stray = arithmetic.verify(CARD, "ida : 20 + 8 = 28 . liz : 10 * 2 = 20 . #### 28")
    assert stray.valid == (False, True) and stray.credit == 0.5
    assert not arithmetic.verify(CARD, "liz : 10 * 2 = 20 . kai : 20 / 2 = 10 .").correct
    tight = arithmetic.verify(CARD, "liz:10*2=20. kai:20/2=10. ####10")
    assert tight.correct and tight.credit == 1.0


def test_verifier_against_a_reference_text():
    same = arithmetic.verify(CARD.answer, CARD.answer)
    assert same == (True, 1.0, 10.0, (True, True), (True, True))
    wrong = arithmetic.verify(CARD.answer, "liz : 10 * 2 = 20 . kai : 20 - 2 = 18 . #### 18")
    assert wrong == (False, 0.5, 18.0, (True, False), (True, False))
    gsm8k = "She sold 48/2 = <<48/2=24>>24 clips.\nAltogether 1,000.\n#### 1,000"
    assert arithmetic.verify(gsm8k, "so #### 1000").correct
    assert arithmetic.verify(gsm8k, "48 / 2 = 24 so #### 1,001").credit == 1.0
    with pytest.raises(UserError, match="####"):
        arithmetic.verify("no number here", "#### 3")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "####",
        "#### ####",
        "#### -",
        "####" + "9" * 5000,
        "liz : " + "1" * 5000 + " * 2 = 20 .",
        "liz : 10 * 2 = " + "2" * 5000,
        "liz : 10 / 0 = 20 . #### x",
        "liz : 10 * 2 =",
        "\x00\ud800 ١ : ٢ + ٣ = ٥ #### ٥",
        "a" * 20000,
        " " * 20000 + ":" * 20000,
        "1 + " * 5000 + "= 3",
        ". : . = = #### 10.0.0",
    ],
)
def test_verifier_survives_any_text(text):
    verdict = arithmetic.verify(CARD, text)
    assert 0.0 <= verdict.credit <= 1.0 and not any(verdict.present)
    assert not verdict.correct or "10.0" in text


def test_score_by_difficulty():
    one = arithmetic.subproblems(CARD)[0]
    texts = [CARD.answer, "liz : 10 * 2 = 20 . #### 3", one.answer]
    assert arithmetic.score([CARD, CARD, one], texts) == {
        "accuracy": pytest.approx(2 / 3),
        "credit": pytest.approx(2.5 / 3),
        "count": 3,
        "steps": {
            1: {"accuracy": 1.0, "credit": 1.0, "count": 1},
            2: {"accuracy": 0.5, "credit": 0.75, "count": 2},
        },
    }
    by_text = arithmetic.score([CARD.answer, CARD.answer, one.answer], texts)
    assert by_text == arithmetic.score([CARD, CARD, one], texts)
    with pytest.raises(UserError, match="one text each"):
        arithmetic.score([CARD], [])


def test_outcome_and_step_errors_are_independent(many):
    """The four cells come at the products of the rates: chi-square (3 degrees) below 16.3."""
    rng = Random(0)
    table = np.zeros((2, 2))
    for problem in many * 2:
        solution = arithmetic.corrupt(problem, rng, outcome_error=0.3, step_error=0.6)
        table[int(solution.correct), int(all(solution.right))] += 1
    expected = np.outer([0.3, 0.7], [0.6, 0.4]) * table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("step", [0, 1])
def test_mistakes_are_what_they_say(many, outcome, step):
    rng = Random(1)
    kinds = Counter()
    for problem in many:
        solution = arithmetic.corrupt(problem, rng, outcome_error=outcome, step_error=step)
        verdict = arithmetic.verify(problem, solution.text)
        assert verdict.correct == solution.correct == (not outcome)
        assert len(verdict.present) == len(solution.right) and all(solution.right) == (not step)
        assert all(verdict.present) == all(solution.right)
        assert all(0 <= int(number) <= 99 for number in re.findall("[0-9]+", solution.text))
        if step and outcome:  # one wrong step, the others follow from it, the last is the answer
            assert sum(not ok for ok in verdict.valid) == 1
            assert solution.text.split()[-1] == solution.text.split()[-4]
        kinds[solution.kind] += 1
    expected = {"slip", "operand", "operator"} if step else {"final" if outcome else "none"}
    assert set(kinds) == expected and min(kinds.values()) > 0.1 * len(many)


def test_errors_that_do_not_reach_the_answer_come_in_both_ways(many):
    """Ignored by what follows (the rest is the reference's), or made up for by a second error."""
    rng, ways = Random(2), Counter()
    for problem in many:
        if len(problem.steps) < 3:
            continue
        solution = arithmetic.corrupt(problem, rng, outcome_error=0, step_error=1)
        ways[sum(not ok for ok in solution.right)] += 1
    assert ways[1] > 200 and sum(count for wrong, count in ways.items() if wrong > 1) > 200


def test_slips_are_of_1_2_or_10():
    rng, sizes = Random(0), set()
    one = arithmetic.subproblems(CARD)[0]
    for _ in range(300):
        solution = arithmetic.corrupt(one, rng, outcome_error=1, step_error=1)
        if solution.kind == "slip":
            sizes.add(int(solution.text.split()[-1]) - 20)
    assert sizes == {-10, -2, -1, 1, 2, 10}
