"""How a problem of the arithmetic world is drawn: dials, relations, random streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from w2s_jax.data.arithmetic_text import ITEMS, LIMIT, NAMES, SKILLS, Problem, Step, compute
from w2s_jax.errors import UserError

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


@dataclass
class Source:
    """Problems of one stream of a seed, each with a question not given before."""

    seed: int
    stream: int
    world: World
    seen: set[str]
    rng: Random = field(default_factory=Random)

    def new(self, index: int, counts: Sequence[int], chances: Sequence[float]) -> Problem:
        """Problem ``index`` with a number of steps from ``counts``; UserError if none is new."""
        for attempt in range(ATTEMPTS):
            rand = stream(self.rng, self.seed, self.stream, index, attempt)
            steps = pick(rand, counts, chances)
            problem = make(rand, steps, f"{self.seed}-{index}", self.world)
            question = problem.question
            if question not in self.seen:
                self.seen.add(question)
                return problem
        raise UserError(f"no new question for problem {index}: ask for fewer or widen the dials")


def make(rand: Callable[[], float], steps: int, name: str, world: World) -> Problem:
    """One problem called ``name``; UserError if no graph of so many steps fits the dials."""
    people = shuffled(rand, list(NAMES), 1 + steps + world.distractors)
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
        if rand() < world.distractor and (extra := _fitting(rand, values, people, item, world)):
            step, sentence, _ = extra
            earliest = 1 + max(facts.index(parent) for parent in step.parents)
            facts.insert(earliest + int(rand() * (len(facts) - earliest + 1)), step.name)
            texts[step.name] = sentence
            values.append(step.value)
    if world.shuffled and rand() < world.shuffled:
        facts = shuffled(rand, facts)
    ordered = {person: texts[person] for person in facts}
    return Problem(name, item, (people[0], values[0]), ordered, tuple(done))


def _graph(
    rand: Callable[[], float], steps: int, people: list[str], start: int, item: str, world: World
) -> tuple[list[int], list[Step], list[str]] | None:
    """Numbers, steps and sentences of a graph all of whose people lead to the last one, or None."""
    values, done, sentences = [start], [], [f"{people[0]} has {start} {item} ."]
    loose = [0]
    for i in range(1, steps + 1):
        made = _fitting(rand, values, people, item, world, loose)
        if made is None:
            return None
        step, sentence, parents = made
        loose = [node for node in loose if node not in parents] + [i]
        if len(loose) - 1 > steps - i:  # one operation ties at most one loose end
            return None
        values.append(step.value)
        done.append(step)
        sentences.append(sentence)
    return values, done, sentences


def _fitting(rand: Callable[[], float], *place) -> tuple[Step, str, tuple[int, ...]] | None:
    """The first of twenty draws of `_relation` whose result is in range, else None."""
    return next((made for _ in range(20) if (made := _relation(rand, *place))), None)


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


def fact(rand: Callable[[], float]) -> str:
    """One line of a drill: any two numbers of the world that have an exact result in it."""
    op = "+-*/"[int(rand() * 4)]
    if op in "+-":
        right = 2 + int(rand() * 8) if rand() < 0.5 else int(rand() * 50)
        left = int(rand() * (LIMIT + 1 - right)) + (right if op == "-" else 0)
    else:
        right = (2, 3, 4, 5, 12)[int(rand() * (5 if op == "*" else 3))]
        left = int(rand() * (LIMIT // right + 1)) * (right if op == "/" else 1)
    return f"{left} {op} {right} = {compute(left, op, right)} ."


def stream(
    rng: Random, seed: int, stream: int, index: int, attempt: int = 0
) -> Callable[[], float]:
    """Reseed ``rng`` for one item and give its uniform draw (stable across Python versions)."""
    rng.seed((((int(seed) % 2**64) * 8 + stream) * ATTEMPTS + attempt) << 40 | index)
    return rng.random


def shuffled(rand: Callable[[], float], things: list, first: int | None = None) -> list:
    """The list shuffled in place, its first ``first`` places only if given."""
    for i in range(len(things) - 1 if first is None else first):
        j = i + int(rand() * (len(things) - i))
        things[i], things[j] = things[j], things[i]
    return things


def pick(rand: Callable[[], float], things: Sequence[int], chances: Sequence[float]) -> int:
    """One of the things, by the running sum of their chances."""
    at = rand()
    return next((t for t, c in zip(things, chances, strict=True) if at < c), things[-1])


def cumulative(
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
