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

from collections.abc import Collection, Sequence
from random import Random

import numpy as np

from w2s_jax.data import arithmetic_draw as draws
from w2s_jax.data.arithmetic_mistakes import Solution, corrupt
from w2s_jax.data.arithmetic_text import (
    DRILL,
    PROMPT,
    RESPONSE,
    Problem,
    Step,
    Verdict,
    score,
    solve,
    subproblems,
    tokenizer,
    verify,
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
    source = draws.Source(seed, draws.PROBLEMS, draws.World(**dials), set(avoid))
    counts, chances = draws.cumulative(steps, weights)
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
    avoid: Collection[str] = (),
    **dials,
) -> list[tuple[str, str]]:
    """Pretraining text: ``n`` pairs (prompt, response), a share ``drill`` of them bare facts.

    Questions may repeat, but none is in ``avoid`` (the questions of a test).
    """
    world, (counts, chances) = draws.World(**dials), draws.cumulative(steps, weights)
    rng, pairs, avoid = Random(), [], set(avoid)
    for index in range(n):
        rand = draws.stream(rng, seed, draws.DOCUMENTS, index)
        if rand() < drill:
            pairs.append((DRILL, f" {' '.join(draws.fact(rand) for _ in range(5))}"))
            continue
        while True:
            problem = draws.make(rand, draws.pick(rand, counts, chances), "", world)
            question = problem.question
            if question not in avoid:
                break
        pairs.append((PROMPT.format(question), RESPONSE.format(problem.answer)))
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
    draws.cumulative(steps, None)
    source, rng = draws.Source(seed, draws.JUDGED, draws.World(**dials), set(avoid)), Random()
    drawn, solutions, truth = [], [], []
    for pair in range(n // 2):
        block, place = divmod(pair, len(steps))
        count = draws.shuffled(draws.stream(rng, seed, draws.BLOCKS, block), list(steps))[place]
        first = int(draws.stream(rng, seed, draws.MISTAKES, pair)() < 0.5)
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


def _texts(values) -> np.ndarray:
    return np.array(list(values), dtype=object)
