"""The arithmetic world's words: what a problem is, how it reads, how a written solution is checked.

    q : amy has 10 pens . liz has 2 times as many as amy . how many pens does liz have ?
     a : liz : 10 * 2 = 20 . #### 20

Texts are made of 75 known tokens: words, signs and single digits separated by spaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer, begin_with


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("amy ann ben dan eve ida joe kai leo liz max mia ray sam tom zoe")
ITEMS = _words("caps cups eggs figs keys maps nuts pens")
SPECIAL = _words("<pad> <bos> <eos> <unk>")
SIGNS = _words("+ - * / = : . ? ! ####")
WORDS = _words(
    "q a drill has how many does have more less than times as half third quarter percent pairs "
    "dozen of and the sum difference verdict correct wrong"
)
SKILLS = _words("add sub mul div percent unit sum difference")

LIMIT = 99  # every number of the world is 0..LIMIT
PROMPT = "q : {}"
RESPONSE = " a : {}"
DRILL = "drill"


class Step(NamedTuple):
    """One line of a solution: ``name : left op right = value``.

    ``parents`` are the people whose numbers it uses: the left one, or (sum, difference) both.
    """

    name: str
    left: int
    op: str
    right: int
    value: int
    skill: str
    parents: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} : {self.left} {self.op} {self.right} = {self.value} ."


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem. ``facts`` maps each person to their sentence, in the order of the question;
    ``start`` is the person whose number is given, ``steps`` the solution; the last step's person
    is asked for. People in ``facts`` but neither ``start`` nor in ``steps`` are distractors.
    """

    id: str
    item: str
    start: tuple[str, int]
    facts: Mapping[str, str] = field(hash=False)
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """The facts in their order, then what is asked."""
        facts = " ".join(self.facts.values())
        return f"{facts} how many {self.item} does {self.steps[-1].name} have ?"

    @property
    def answer(self) -> str:
        """The worked solution, ending in ``#### n`` as GSM8K's does."""
        return write(self.steps, self.final)

    @property
    def final(self) -> int:
        """The number asked for."""
        return self.steps[-1].value


def write(steps: Sequence[Step], final: int) -> str:
    """The text of a solution: its steps, then the final number."""
    return f"{' '.join(map(str, steps))} #### {final}"


def solve(problem: Problem) -> str:
    """The reference solution, worked out anew from the given number and the relations.

    Raises:
      UserError: a step has no whole result from 0 to 99 (in a problem made by hand).
    """
    values = dict([problem.start])
    steps = []
    for step in problem.steps:
        done = follow(step, values)
        if done is None:
            raise UserError(f"problem {problem.id}: {step.name}'s number is not whole or not 0..99")
        steps.append(done)
        values[step.name] = done.value
    return write(steps, steps[-1].value)


def follow(step: Step, values: Mapping[str, int]) -> Step | None:
    """The step done with the numbers that people own in ``values``, None if it has no result."""
    left, right = operands(step, values)
    value = compute(left, step.op, right)
    if value is None or not 0 <= value <= LIMIT:
        return None
    return step._replace(left=left, right=right, value=value)


def operands(step: Step, values: Mapping[str, int]) -> tuple[int, int]:
    """The operands of a step when people own ``values``; in a difference the larger first."""
    if len(step.parents) == 1:
        return values[step.parents[0]], step.right
    left, right = (values[name] for name in step.parents)
    return (max(left, right), min(left, right)) if step.op == "-" else (left, right)


def compute(left: int, op: str, right: int) -> int | None:
    """``left op right``, None where it is not a whole number."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def subproblems(problem: Problem) -> tuple[Problem, ...]:
    """For every step the problem that asks for its person, with only the facts it needs.

    The last one is the problem itself without distractors.
    """
    by_name = {step.name: step for step in problem.steps}
    parts = []
    for number, asked in enumerate(problem.steps, 1):
        needed, open_ = set(), [asked.name]
        while open_:
            name = open_.pop()
            needed.add(name)
            open_ += by_name[name].parents if name in by_name else ()
        facts = {name: fact for name, fact in problem.facts.items() if name in needed}
        steps = tuple(step for step in problem.steps if step.name in needed)
        parts.append(Problem(f"{problem.id}.{number}", problem.item, problem.start, facts, steps))
    return tuple(parts)


# --- checking a written solution ------------------------------------------------------------

# At most nine digits: no text, however odd, can make a number that Python refuses to read.
_STEP = re.compile(
    r"(?:(?<![a-z])([a-z]+)\s?:\s?)?(?<![0-9])([0-9]{1,9})\s?([-+*/])\s?([0-9]{1,9})"
    r"\s?=\s?([0-9]{1,9})(?![0-9])"
)
_FINAL = re.compile(r"####\s{0,3}(-?[0-9][0-9,]{0,12}(?:\.[0-9]{1,6})?)(?![0-9])")

Equation = tuple[str | None, int, str, int, int]


class Verdict(NamedTuple):
    """What the verifier found: ``correct`` the final number; ``credit`` [0, 1] the share of
    reference steps that are written; ``valid`` per written step whether the equation is true and
    its operands are right given what was written before (an error carried forward is valid);
    ``present`` per reference step; ``final`` the number given, None if there is none.
    """

    correct: bool
    credit: float
    final: float | None
    valid: tuple[bool, ...]
    present: tuple[bool, ...]


def verify(reference: Problem | str, text: str) -> Verdict:
    """Check a written solution exactly, against a problem or a reference answer with ``#### n``.

    Against a reference text (ours or GSM8K's) a step is valid if it is true and uses the operands
    of a reference step. Any text is accepted; without ``#### n`` it is not correct. What follows
    the first final number is ignored.

    Raises:
      UserError: the reference text has no final number.
    """
    if isinstance(reference, Problem):
        want, target = [(s.name, *s[1:5]) for s in reference.steps], float(reference.final)
    else:
        want, target = _equations(reference), _final(reference)
        if target is None:
            raise UserError(f"reference answer {reference[:60]!r} has no '#### number' at its end")
    end = _FINAL.search(text)
    written = _equations(text[: end.start()] if end else text)
    final = _final(text)
    have = {_canonical(equation) for equation in written}
    present = tuple(_canonical(equation) in have for equation in want)
    if isinstance(reference, Problem):
        valid = _valid(reference, written)
    else:
        known = {_canonical(equation)[:4] for equation in want}
        valid = tuple(_true(e) and _canonical(e)[:4] in known for e in written)
    credit = sum(present) / len(present) if present else float(final == target)
    return Verdict(final == target, credit, final, valid, present)


def score(references: Sequence[Problem | str], texts: Sequence[str]) -> dict[str, Any]:
    """Mean ``accuracy`` and ``credit`` of solutions, and both per number of reference steps.

    Raises:
      UserError: there are none, or not one text per reference.
    """
    if not references or len(references) != len(texts):
        raise UserError(f"{len(references)} references and {len(texts)} texts: need one text each")
    groups: dict[int, list[Verdict]] = {}
    for reference, text in zip(references, texts, strict=True):
        verdict = verify(reference, text)
        groups.setdefault(len(verdict.present), []).append(verdict)
    every = [verdict for group in groups.values() for verdict in group]
    return {**_means(every), "steps": {n: _means(groups[n]) for n in sorted(groups)}}


def _means(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    n = len(verdicts)
    accuracy, credit = sum(v.correct for v in verdicts) / n, sum(v.credit for v in verdicts) / n
    return {"accuracy": accuracy, "credit": credit, "count": n}


def _equations(text: str) -> list[Equation]:
    found = _STEP.findall(text)
    return [(name or None, int(a), op, int(b), int(c)) for name, a, op, b, c in found]


def _final(text: str) -> float | None:
    found = _FINAL.search(text)
    return float(found[1].replace(",", "")) if found else None


def _canonical(equation: Equation) -> Equation:
    """Sums and products in one order, so that ``2 * 10`` is ``10 * 2``."""
    name, left, op, right, value = equation
    if op in "+*" and left < right:
        left, right = right, left
    return name, left, op, right, value


def _true(equation: Equation) -> bool:
    return compute(equation[1], equation[2], equation[3]) == equation[4]


def _valid(problem: Problem, written: Sequence[Equation]) -> tuple[bool, ...]:
    """Per written step: true, a person's own relation, and the numbers written so far."""
    steps = {step.name: step for step in problem.steps}
    values = {problem.start[0]: problem.start[1], **{s.name: s.value for s in problem.steps}}
    verdicts = []
    for equation in written:
        name, value = equation[0], equation[4]
        step = steps.get(name or "")
        if step is None or name is None:
            verdicts.append(False)
            continue
        left, right = operands(step, values)
        should = _canonical((name, left, step.op, right, value))
        verdicts.append(_true(equation) and _canonical(equation) == should)
        values[name] = value
    return tuple(verdicts)


# --- the tokenizer ----------------------------------------------------------------------------


def tokenizer() -> Tokenizer:
    """The word-level tokenizer of this world: 75 tokens, numbers digit by digit.

    Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4..13 the digits. A model may round its vocabulary up (the
    nano family: 80 rows); rows from ``size`` on are never a target and must not be sampled.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    vocabulary = (*SPECIAL, *"0123456789", *SIGNS, *NAMES, *ITEMS, *WORDS)
    ids = {word: index for index, word in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    # The word-piece decoder puts a space between tokens (no token starts with its prefix); then
    # digits that stand side by side are one number.
    digits = decoders.Replace(Regex("(?<=[0-9]) (?=[0-9])"), "")
    words = decoders.WordPiece(prefix="\u0000", cleanup=False)
    backend.decoder = decoders.Sequence([words, decoders.Fuse(), digits])
    begin_with(backend, "<bos>")
    pad, bos, eos, unk = (ids[word] for word in SPECIAL)
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad, unk=unk)
