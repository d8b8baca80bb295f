"""The arithmetic world: grade-school word problems from a seed, with exactly known errors.

A problem is a directed acyclic graph of 1 to 6 operations on people's numbers (0 to 99). Problem
``i`` of a seed depends on the seed, ``i`` and the dials only, never on how many are asked for.
The words, the verifier and the tokenizer are in `arithmetic_text` and are named here as well.

Dials, the same in every function that draws problems:
  steps, weights: numbers of operations (1 to 6) and how often each comes.
  distractor, distractors: chance of each of so many facts that the answer does not need.
  shuffled: chance that a question's facts come in random order.
  start, largest: the number given is 2..start; every number of the problem is 0..largest.
  skills: skills to draw from, uniformly; name one twice to see it twice as often.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np

from w2s_jax.data.arithmetic_text import (
    ITEMS,
    NAMES,
    PROMPT,
    RESPONSE,
    SKILLS,
    Problem,
    Step,
    Verdict,
    compute,
    operands,
    score,
    solve,
    subproblems,
    tokenizer,
    verify,
    write,
)
from w2s_jax.errors import UserError
from w2s_jax.types import Table

__all__ = [
    "Problem",
    "Solution",
    "Step",
    "Verdict",
    "corrupt",
    "distinct",
    "documents",
    "draw",
    "judged",
    "problems",
    "score",
    "solve",
    "subproblems",
    "tabulate",
    "tokenizer",
    "verify",
]

LIMIT = 99
MOST_STEPS = 6
CHAIN = 0.65  # chance that an operation continues from the person before it
# Independent random streams of one seed.
PROBLEMS, DOCUMENTS, JUDGED, BLOCKS, MISTAKES = range(5)
ATTEMPTS = 200  # draws for a question not given before


class Move(NamedTuple):
    """A relation to one person: ``op right`` applied to their number, and the words for it."""

    op: str
    right: int
    words: str


# Words are followed by the person, and by "has <item>" in the unit skill.
MOVES: dict[str, tuple[Move, ...]] = {
    "add": tuple(Move("+", k, f"{k} more than") for k in range(2, 10)),
    "sub": tuple(Move("-", k, f"{k} less than") for k in range(2, 10)),
    "mul": tuple(Move("*", k, f"{k} times as many as") for k in range(2, 6)),
    "div": (
        Move("/", 2, "half as many as"),
        Move("/", 3, "a third as many as"),
        Move("/", 4, "a quarter as many as"),
    ),
    "percent": (Move("/", 2, "50 percent of"), Move("/", 4, "25 percent of")),
    "unit": (Move("*", 2, "as many pairs as"), Move("*", 12, "as many dozen as")),
}


@dataclass(frozen=True)
class World:
    """The dials, checked once (see the module's text)."""

    distractor: float = 0.2
    distractors: int = 1
    shuffled: float = 0.0
    start: int = 12
    largest: int = LIMIT
    skills: tuple[str, ...] = SKILLS

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.skills) - set(SKILLS)):
            raise UserError(f"unknown skills {unknown}: choose among {', '.join(SKILLS)}")
        if not set(self.skills) & set(MOVES):
            raise UserError(f"skills need at least one about a single person: {', '.join(MOVES)}")
        if not 2 <= self.start <= self.largest <= LIMIT:
            raise UserError(
                f"need 2 <= start <= largest <= {LIMIT}, got start {self.start}, "
                f"largest {self.largest}"
            )
        if not (0 <= self.distractor <= 1 and 0 <= self.shuffled <= 1):
            raise UserError("distractor and shuffled are chances between 0 and 1")
        if not 0 <= self.distractors <= len(NAMES) - MOST_STEPS - 1:
            raise UserError(f"distractors must be 0 to {len(NAMES) - MOST_STEPS - 1}")


# --- drawing problems -----------------------------------------------------------------------


def draw(
    seed: int,
    n: int,
    *,
    steps: Sequence[int] = (1, 2, 3, 4, 5),
    weights: Sequence[float] | None = None,
    avoid: Collection[str] = (),
    **dials,
) -> list[Problem]:
    """``n`` problems with questions unlike one another and unlike those in ``avoid``.

    Raises:
      UserError: a dial out of range, or so few possible questions that no new one is found.
    """
    source = _Source(seed, PROBLEMS, World(**dials), set(avoid))
    counts, chances = _cumulative(steps, weights)
    return [source.new(i, counts, chances) for i in range(n)]


def problems(seed: int, n: int, **options) -> Table:
    """A table of ``n`` drawn problems (see `draw` for the options, `tabulate` for the columns)."""
    return tabulate(draw(seed, n, **options))


def tabulate(drawn: Sequence[Problem]) -> Table:
    """Problems as rows like GSM8K's: ``question`` and ``answer`` (ends in ``#### n``).

    Host columns beside them: ``prompt`` and ``response`` (the same as the nano family reads
    them), ``id``, ``final``, ``steps`` (int64: difficulty), ``skills`` (one word per step).
    """
    questions, answers = [p.question for p in drawn], [p.answer for p in drawn]
    return Table(
        {
            "id": _texts(p.id for p in drawn),
            "question": _texts(questions),
            "answer": _texts(answers),
            "prompt": _texts(map(PROMPT.format, questions)),
            "response": _texts(map(RESPONSE.format, answers)),
            "final": np.array([p.final for p in drawn], np.int64),
            "steps": np.array([len(p.steps) for p in drawn], np.int64),
            "skills": _texts(" ".join(step.skill for step in p.steps) for p in drawn),
        }
    )


def documents(
    seed: int,
    n: int,
    *,
    drill: float = 0.10,
    steps: Sequence[int] = (1, 2, 3, 4, 5),
    weights: Sequence[float] | None = (3, 3, 2, 2, 1),
    **dials,
) -> list[tuple[str, str]]:
    """Pretraining text: ``n`` pairs (prompt, response), a share ``drill`` of them bare facts.

    Questions may repeat (a lookup per document would cost more than it helps); take those of a
    test out with `distinct` or by the prompt.
    """
    world, (counts, chances) = World(**dials), _cumulative(steps, weights)
    rng, pairs = Random(), []
    for index in range(n):
        rand = _stream(rng, seed, DOCUMENTS, index)
        if rand() < drill:
            pairs.append(("drill", f" {' '.join(_fact(rand) for _ in range(5))}"))
            continue
        problem = _problem(rand, _pick(rand, counts, chances), "", world)
        pairs.append((f"q : {problem.question}", f" a : {problem.answer}"))
    return pairs


def distinct(*tables: Table, by: str = "question") -> tuple[Table, ...]:
    """The tables without rows whose ``by`` text came earlier, in the same table or one before."""
    seen: set[str] = set()
    kept = []
    for table in tables:
        index = []
        for row, text in enumerate(np.asarray(table[by]).tolist()):
            if text not in seen:
                index.append(row)
                seen.add(text)
        kept.append(table.take(np.array(index, np.int64)))
    return tuple(kept)


def judged(
    seed: int,
    n: int,
    *,
    steps: Sequence[int] = (1, 2, 3, 4),
    avoid: Collection[str] = (),
    **dials,
) -> Table:
    """Is this worked solution right? ``n`` rows, half of them with one wrong step carried forward.

    Columns: ``prompt``, ``response`` (texts of the nano family), ``question``, ``id``, ``kind``
    (of the mistake, "none") on the host; ``truth`` [N] int32 (1 is right), ``label`` [N,2]
    float32 one-hot of it, ``group`` [N] int32 the number of steps. Every two rows hold one right
    and one wrong solution of as many steps; step counts come equally often.

    Raises:
      UserError: an odd ``n``, and what `draw` raises.
    """
    if n % 2:
        raise UserError(f"judged needs an even number of rows to be balanced, got {n}")
    _cumulative(steps, None)
    source, rng = _Source(seed, JUDGED, World(**dials), set(avoid)), Random()
    drawn, solutions, truth = [], [], []
    for pair in range(n // 2):
        block, place = divmod(pair, len(steps))
        count = _shuffled(_stream(rng, seed, BLOCKS, block), list(steps))[place]
        first = int(_stream(rng, seed, MISTAKES, pair)() < 0.5)
        for index, right in ((2 * pair, first), (2 * pair + 1, 1 - first)):
            problem = source.new(index, (count,), (1.0,))
            error = 1.0 - right
            drawn.append(problem)
            solutions.append(corrupt(problem, rng, outcome_error=error, step_error=error))
            truth.append(right)
    return Table(
        {
            "id": _texts(p.id for p in drawn),
            "question": _texts(p.question for p in drawn),
            "prompt": _texts(PROMPT.format(p.question) for p in drawn),
            "response": _texts(RESPONSE.format(s.text) for s in solutions),
            "kind": _texts(s.kind for s in solutions),
            "truth": np.array(truth, np.int32),
            "label": np.eye(2, dtype=np.float32)[np.array(truth, np.int32)],
            "group": np.array([len(p.steps) for p in drawn], np.int32),
        }
    )


# --- mistakes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """A written solution: ``correct`` the final number, ``right`` per step whether it is the
    reference's, ``kind`` the mistake made: none, final, slip, operand or operator.
    """

    text: str
    correct: bool
    right: tuple[bool, ...]
    kind: str


def corrupt(problem: Problem, rng: Random, *, outcome_error: float, step_error: float) -> Solution:
    """A solution whose final number is wrong with chance ``outcome_error`` and which has a wrong
    step with chance ``step_error``, independently.

    Wrong step and wrong outcome: one step goes wrong (a slip of 1, 2 or 10; a wrong operand; a
    wrong operator) and later steps follow from it. Wrong step, right outcome: later steps do not
    follow, or follow until a second error makes up for the first. Right steps, wrong outcome: the
    final number is not that of the last step.

    Raises:
      UserError: a rate outside [0, 1].
    """
    if not (0 <= outcome_error <= 1 and 0 <= step_error <= 1):
        raise UserError(f"error rates must be in [0, 1]: {outcome_error}, {step_error}")
    rand = rng.random
    wrong_outcome, wrong_step = rand() < outcome_error, rand() < step_error
    steps, kind, final = problem.steps, "none", problem.final
    if wrong_step:
        steps, kind = _mistaken(problem, rand, wrong_outcome)
    if wrong_outcome:
        final = steps[-1].value if wrong_step else _slip(final, rand)
        kind = kind if wrong_step else "final"
    right = tuple(a == b for a, b in zip(steps, problem.steps, strict=True))
    return Solution(write(steps, final), not wrong_outcome, right, kind)


def _mistaken(
    problem: Problem, rand: Callable[[], float], wrong_outcome: bool
) -> tuple[tuple[Step, ...], str]:
    """The steps with one gone wrong, so that the last number is wrong if ``wrong_outcome``."""
    last = len(problem.steps) - 1
    for _ in range(30):
        at = int(rand() * (last + 1))
        kind = ("slip", "operand", "operator")[int(rand() * 3)]
        bad = _spoil(problem, at, kind, rand)
        if bad is None:
            continue
        if wrong_outcome:
            steps = _carry(problem, at, bad, last + 1)
            if steps is not None and steps[-1].value != problem.final:
                return steps, kind
            continue
        mend = at + 1 + int(rand() * (last - at)) if at < last and rand() < 0.5 else at + 1
        steps = _carry(problem, at, bad, mend)
        if steps is None:
            continue
        return (*steps[:mend], *_mended(problem, steps, mend)), kind
    slip = problem.steps[-1]._replace(value=_slip(problem.final, rand))
    return (*problem.steps[:-1], slip), "slip"


def _carry(problem: Problem, at: int, bad: Step, end: int) -> tuple[Step, ...] | None:
    """The steps with ``bad`` at ``at``, recomputed up to ``end``; None if one cannot be done."""
    steps = list(problem.steps)
    steps[at] = bad
    values = _values(steps, problem)
    for i in range(at + 1, end):
        left, right = operands(steps[i], values)
        value = compute(left, steps[i].op, right)
        if value is None or not 0 <= value <= LIMIT:
            return None
        steps[i] = steps[i]._replace(left=left, right=right, value=value)
        values[steps[i].name] = value
    return tuple(steps)


def _mended(problem: Problem, steps: tuple[Step, ...], at: int) -> tuple[Step, ...]:
    """From ``at`` on: a step with the numbers written so far but the right result, then the rest.

    If the first error is the step just before, that step may not be used at all: the rest stays.
    """
    rest = problem.steps[at:]
    if not rest:
        return ()
    left, right = operands(rest[0], _values(steps[:at], problem))
    return (rest[0]._replace(left=left, right=right), *rest[1:])


def _spoil(problem: Problem, at: int, kind: str, rand: Callable[[], float]) -> Step | None:
    """Step ``at`` with a mistake of that kind and another value, None if this draw gives none."""
    step = problem.steps[at]
    left, op, right = step.left, step.op, step.right
    if kind == "slip":
        return step._replace(value=_slip(step.value, rand))
    if kind == "operator":
        op = "+-*/"[int(rand() * 4)]
    else:
        numbers = [problem.start[1], *(s.value for s in problem.steps[:at]), right - 1, right + 1]
        number = numbers[int(rand() * len(numbers))]
        left, right = (number, right) if rand() < 0.5 else (left, number)
    value = compute(left, op, right)
    if value is None or not 0 <= value <= LIMIT or value == step.value:
        return None
    return step._replace(left=left, op=op, right=right, value=value)


def _slip(value: int, rand: Callable[[], float]) -> int:
    """Another number in 0..99, off by 1, 2 or 10."""
    options = [value + d for d in (-10, -2, -1, 1, 2, 10) if 0 <= value + d <= LIMIT]
    return options[int(rand() * len(options))]


def _values(steps: Sequence[Step], problem: Problem) -> dict[str, int]:
    return {problem.start[0]: problem.start[1], **{step.name: step.value for step in steps}}


# --- drawing one ----------------------------------------------------------------------------


@dataclass
class _Source:
    """Problems of one stream of a seed, each with a question not given before."""

    seed: int
    stream: int
    world: World
    seen: set[str]
    rng: Random = field(default_factory=Random)

    def new(self, index: int, counts: Sequence[int], chances: Sequence[float]) -> Problem:
        for attempt in range(ATTEMPTS):
            rand = _stream(self.rng, self.seed, self.stream, index, attempt)
            steps = _pick(rand, counts, chances)
            problem = _problem(rand, steps, f"{self.seed}-{index}", self.world)
            question = problem.question
            if question not in self.seen:
                self.seen.add(question)
                return problem
        raise UserError(f"no new question for problem {index}: ask for fewer or widen the dials")


def _problem(rand: Callable[[], float], steps: int, name: str, world: World) -> Problem:
    people = _shuffled(rand, list(NAMES), 1 + steps + world.distractors)
    item = ITEMS[int(rand() * len(ITEMS))]
    for _ in range(10_000):
        start = 2 + int(rand() * (world.start - 1))
        if made := _graph(rand, steps, people, start, item, world):
            break
    else:
        raise UserError(
            f"no problem of {steps} steps fits start {world.start}, largest {world.largest}, "
            f"skills {world.skills}: widen the dials"
        )
    values, done, sentences = made
    facts = [people[0], *(step.name for step in done)]
    texts = dict(zip(facts, sentences, strict=True))
    for _ in range(world.distractors):
        if rand() < world.distractor and (extra := _relation(rand, values, people, item, world)):
            step, sentence, _ = extra
            earliest = 1 + max(facts.index(parent) for parent in step.parents)
            facts.insert(earliest + int(rand() * (len(facts) - earliest + 1)), step.name)
            texts[step.name] = sentence
            values.append(step.value)
    if world.shuffled and rand() < world.shuffled:
        facts = _shuffled(rand, facts)
    ordered = {person: texts[person] for person in facts}
    return Problem(name, item, (people[0], values[0]), ordered, tuple(done))


def _graph(
    rand: Callable[[], float], steps: int, people: list[str], start: int, item: str, world: World
) -> tuple[list[int], list[Step], list[str]] | None:
    """Numbers, steps and sentences of a graph all of whose people lead to the last one, or None."""
    values, done, sentences = [start], [], [f"{people[0]} has {start} {item} ."]
    loose = [0]
    for i in range(1, steps + 1):
        for _ in range(20):
            if made := _relation(rand, values, people, item, world, loose):
                break
        else:
            return None
        step, sentence, parents = made
        loose = [node for node in loose if node not in parents] + [i]
        if len(loose) - 1 > steps - i:  # one operation ties at most one loose end
            return None
        values.append(step.value)
        done.append(step)
        sentences.append(sentence)
    return values, done, sentences


def _relation(
    rand: Callable[[], float],
    values: list[int],
    people: list[str],
    item: str,
    world: World,
    loose: Sequence[int] = (),
) -> tuple[Step, str, tuple[int, ...]] | None:
    """The next person's relation to earlier ones: step, sentence, parents; None if out of range.

    The second person of a sum or difference is one that nothing depends on yet, if there is one.
    """
    i = len(values)
    parent = i - 1 if rand() < CHAIN else int(rand() * i)
    skill = world.skills[int(rand() * len(world.skills))]
    name, first, left = people[i], people[parent], values[parent]
    if skill in MOVES:
        op, right, words = MOVES[skill][int(rand() * len(MOVES[skill]))]
        if left == 0 and op in "*/":
            return None
        parents, owners = (parent,), (first,)
        sentence = f"{name} has {words} {first}{f' has {item}' if skill == 'unit' else ''} ."
    else:
        others = [j for j in loose if j != parent] or [j for j in range(i) if j != parent]
        if not others:
            return None
        other = others[int(rand() * len(others))]
        parents, owners, right = (parent, other), (first, people[other]), values[other]
        if skill == "sum":
            op, sentence = "+", f"{name} has the sum of {first} and {people[other]} ."
        else:
            op, sentence = "-", f"{name} has the difference of {first} and {people[other]} ."
            left, right = max(left, right), min(left, right)
    value = compute(left, op, right)
    if value is None or not 0 <= value <= world.largest:
        return None
    return Step(name, left, op, right, value, skill, owners), sentence, parents


def _fact(rand: Callable[[], float]) -> str:
    """One line of a drill: any two numbers of the world that have an exact result in it."""
    op = "+-*/"[int(rand() * 4)]
    if op in "+-":
        right = 2 + int(rand() * 8) if rand() < 0.5 else int(rand() * 50)
        left = int(rand() * (LIMIT + 1 - right)) + (right if op == "-" else 0)
    else:
        right = (2, 3, 4, 5, 12)[int(rand() * (5 if op == "*" else 3))]
        left = int(rand() * (LIMIT // right + 1)) * (right if op == "/" else 1)
    return f"{left} {op} {right} = {compute(left, op, right)} ."


def _stream(
    rng: Random, seed: int, stream: int, index: int, attempt: int = 0
) -> Callable[[], float]:
    """Reseed ``rng`` for one item and give its uniform draw (stable across Python versions)."""
    rng.seed((((int(seed) % 2**64) * 8 + stream) * ATTEMPTS + attempt) << 40 | index)
    return rng.random


def _shuffled(rand: Callable[[], float], things: list, first: int | None = None) -> list:
    """The list shuffled in place, its first ``first`` places only if given."""
    for i in range(len(things) - 1 if first is None else first):
        j = i + int(rand() * (len(things) - i))
        things[i], things[j] = things[j], things[i]
    return things


def _pick(rand: Callable[[], float], things: Sequence[int], chances: Sequence[float]) -> int:
    at = rand()
    return next((t for t, c in zip(things, chances, strict=True) if at < c), things[-1])


def _cumulative(
    steps: Sequence[int], weights: Sequence[float] | None
) -> tuple[Sequence[int], Sequence[float]]:
    """Numbers of steps with the running sum of their chances."""
    if not steps or not all(1 <= count <= MOST_STEPS for count in steps):
        raise UserError(f"steps must be numbers from 1 to {MOST_STEPS}, got {list(steps)}")
    if weights is None:
        weights = [1.0] * len(steps)
    if len(weights) != len(steps) or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"need one weight >= 0 per number of steps {list(steps)}, got {weights}")
    total = sum(weights)
    return steps, [sum(weights[: i + 1]) / total for i in range(len(weights))]


def _texts(values) -> np.ndarray:
    return np.array(list(values), dtype=object)
