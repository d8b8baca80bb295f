"""Steering large models by small experts: a world of three sub-tasks, and models given by name.

Each sub-task of the arithmetic world changes one thing of the problems that the nano family has
read, says so in how its question ends, and its whole answer is right or wrong:

  total   what is asked: the numbers of the first and the last person together, one more step
  words   how steps are written: more, less, times, of instead of + - * /
  named   how an answer ends: "liz has 20 ." instead of "#### 20"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import numpy as np

from w2s_jax.annotate import predict, surprise
from w2s_jax.data import arithmetic
from w2s_jax.data.arithmetic import PROMPT, RESPONSE, Problem
from w2s_jax.data.text import encode
from w2s_jax.errors import UserError
from w2s_jax.generate.sample import complete
from w2s_jax.generate.steer import Rule, Search, fused, proxy
from w2s_jax.generate.steer_loop import Crew, Loaded, crew, generate, score
from w2s_jax.objectives import language
from w2s_jax.pipelines.delta_learning import Runs, loaded
from w2s_jax.record import Context
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import population
from w2s_jax.types import Model, Objective, Row, Table

TASKS = ("total", "words", "named")
SCHOOLS = (*TASKS, "all")  # what specialists learn
SPOKEN = {"+": "more", "-": "less", "*": "times", "/": "of"}
LARGEST = 99  # of any number of the world
DYNAMIC = "dynamic"
SCORED = 64  # rows of reference answers at once
# seeds of problems that never meet
DEV, TEST, GENERAL, FEW, SOLUTIONS = (80_000_000 + 1_000_000 * i for i in range(5))


def pose(task: str, problem: Problem) -> tuple[str, str] | None:
    """Question and answer of ``problem`` as ``task`` has it ("plain": as it is); None where the
    total is too large.

    Raises:
      UserError: no such task.
    """
    facts, last = " ".join(problem.facts.values()), problem.steps[-1]
    steps = " ".join(map(str, problem.steps))
    if task == "plain":
        return problem.question, problem.answer
    if task == "total":
        first, number = problem.start
        total = number + last.value
        asked = f"how many {problem.item} have {first} and {last.name} ?"
        told = f"{steps} sum : {number} + {last.value} = {total} . #### {total}"
        return None if total > LARGEST else (f"{facts} {asked}", told)
    if task == "words":
        spoken = " ".join(str(step._replace(op=SPOKEN[step.op])) for step in problem.steps)
        asked = f"how many {problem.item} does {last.name} have !"
        return f"{facts} {asked}", f"{spoken} #### {problem.final}"
    if task == "named":
        asked = f"{last.name} has how many {problem.item} ?"
        return f"{facts} {asked}", f"{steps} {last.name} has {problem.final} ."
    raise UserError(f"no task {task!r}; choose from {', '.join(TASKS)}")


def examples(
    task: str, seed: int, count: int, tokenizer: Tokenizer, *, length: int, **dials: Any
) -> Table:
    """``count`` rows ``prompt``, ``response``, their token columns [count,length], and ``source``,
    the plain question behind each; ``dials`` are those of ``arithmetic.draw``.

    Raises:
      UserError: too few fit in ``length`` tokens.
    """
    drawn = arithmetic.draw(seed, count + count // 4 + 8, **dials)
    posed = [(p.question, pair) for p in drawn if (pair := pose(task, p)) is not None]
    rows = {
        "source": [source for source, _ in posed],
        "prompt": [PROMPT.format(question) for _, (question, _) in posed],
        "response": [RESPONSE.format(answer) for _, (_, answer) in posed],
    }
    table = Table({name: np.array(texts, object) for name, texts in rows.items()})
    table, _ = encode(table, tokenizer, length=length, eos=True)
    if len(table) < count:
        raise UserError(f"too few {task} examples fit in {length} tokens: raise --length")
    return table.take(np.arange(count))


def joined(tables: Sequence[Table]) -> Table:
    """Rows of several tables one after the other."""
    names = tables[0].columns
    return Table({n: np.concatenate([np.asarray(t[n]) for t in tables]) for n in names})


# What is measured --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions with reference answers: ``table`` has ``prompt``, ``response`` and their token
    columns; the first ``dev`` rows choose settings, the others are reported. Answers have at most
    ``tokens`` tokens; ``right(said, wanted)`` judges one."""

    table: Table
    dev: int
    tokens: int
    right: Callable[[str, str], bool]


@dataclass(frozen=True, eq=False)
class Heard:
    """What a model, or several joined, made of an exam: ``right`` [N]; nats and tokens of the
    reference answers, [N] each; weights and experts of every token said (None: one model)."""

    right: np.ndarray
    nats: np.ndarray
    counts: np.ndarray
    alpha: Sequence[np.ndarray] | None = None
    expert: Sequence[np.ndarray] | None = None

    def row(self, dev: int) -> Row:
        """Accuracy and nats per token on the exam, accuracy on its ``dev`` rows, and how the
        weight varies over the tokens said."""
        made: Row = dict(
            accuracy=float(self.right[dev:].mean()),
            nll=float(self.nats[dev:].sum() / self.counts[dev:].sum()),
        )
        if dev:
            made["dev"] = float(self.right[:dev].mean())
        if self.alpha is not None and (weights := self.weights(dev)).size:
            made |= dict(alpha=float(weights.mean()), alpha_std=float(weights.std()))
        return made

    def weights(self, dev: int) -> np.ndarray:
        """The weight of every token said in the reported rows."""
        return np.concatenate([*(self.alpha or [])[dev:], np.zeros(0, np.float32)])

    def picks(self, dev: int, count: int) -> np.ndarray:
        """How often each of ``count`` experts acted, as shares of the tokens said in the reported
        rows (they sum to less than 1 where none acted)."""
        said = np.concatenate([*(self.expert or [])[dev:], np.zeros(0, np.int32)])
        return np.array([(said == e).mean() if said.size else 0.0 for e in range(count)])


def alone(loaded: Loaded, exam: Exam, *, batch: int = 128) -> Heard:
    """One model's greedy answers and its likelihood of the reference answers."""
    model, params, tokenizer = loaded
    asked = list(exam.table["prompt"])
    said = complete(
        model, params, tokenizer, asked, jax.random.key(0), tokens=exam.tokens, batch=batch
    )
    told = predict(surprise(model), params, exam.table, batch=batch)
    return Heard(_judged(exam, said), told["nll"], told["tokens"])


def together(crew: Crew, rule: Rule, exam: Exam, *, batch: int = 128) -> Heard:
    """Greedy answers of models joined by a rule, and what they say of the reference answers."""
    key = jax.random.key(0)
    said = generate(exam.table, crew, rule, key=key, tokens=exam.tokens, batch=batch)
    found = score(crew, rule, exam.table, batch=min(batch, SCORED))
    counts = (np.asarray(exam.table["mask"])[:, 1:] > 0).sum(1)
    right = _judged(exam, list(said["response"]))
    return Heard(right, -found.logps.sum(1), counts, list(said["alpha"]), list(said["expert"]))


def _judged(exam: Exam, said: Sequence[str]) -> np.ndarray:
    pairs = zip(said, exam.table["response"], strict=True)
    return np.array([exam.right(text, wanted) for text, wanted in pairs])


def same_text(said: str, wanted: str) -> bool:
    """Whether two texts are equal but for space around them."""
    return said.strip() == wanted.strip()


# The world ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """Numbers of the experiment, problems that never meet, and the place where work is kept.

    ``seeds`` runs each learn ``general`` plain problems with ``few`` of each task among them (the
    generalists) and then ``solutions`` of one task (the specialists). Each exam has ``dev`` and
    ``test`` problems. ``length`` and ``answer`` are the most tokens of a row and of an answer.
    """

    ctx: Context
    seeds: int
    general: int
    few: int
    solutions: int
    dev: int
    test: int
    steps: tuple[int, ...]
    length: int
    answer: int
    tune: Tune

    def stage(self, name: str, make: Callable[[], Any], **inputs: Any) -> Any:
        """``make()``, kept in the workdir under everything that it depends on."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ctx"}
        return self.ctx.stage(name, {**own, **inputs}, make)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the whole nano family."""
        return arithmetic.tokenizer()

    @cached_property
    def exams(self) -> dict[str, Exam]:
        """Held-out problems of every task, dev before test."""
        found = {}
        for number, task in enumerate(TASKS):
            test = self._examples(task, TEST + number, self.test)
            dev = self._examples(task, DEV + number, self.dev, avoid=set(test["source"]))
            found[task] = Exam(joined([dev, test]), self.dev, self.answer, same_text)
        return found

    def _examples(self, task: str, seed: int, count: int, **dials: Any) -> Table:
        how: Any = dict(length=self.length, steps=self.steps, **dials)
        return examples(task, seed, count, self.tokenizer, **how)

    def _lessons(self, task: str, seed: int, count: int) -> Table:
        avoid = {text for exam in self.exams.values() for text in exam.table["source"]}
        return self._examples(task, seed, count, avoid=avoid)

    def generalist(self, name: str) -> Runs:
        """A pretrained model, each run fine-tuned on plain problems and a few of every task."""

        def make() -> Any:
            return self._trained(given, [self._mixture(seed) for seed in range(self.seeds)]).params

        given = loaded(name, self.seeds)
        return replace(given, params=self.stage("generalist", make, model=name))

    def _mixture(self, seed: int) -> Table:
        plain = self._lessons("plain", GENERAL + seed, self.general)
        numbered = list(enumerate(TASKS))
        return joined(
            [plain, *(self._lessons(t, FEW + 10 * seed + i, self.few) for i, t in numbered)]
        )

    def specialists(self, given: Runs) -> dict[str, Runs]:
        """Run i of ``given`` after each task's own solutions, and ("all") after as many in all."""

        def make() -> Any:
            tables = [t for seed in range(self.seeds) for t in self._schools(seed)]
            spread = jax.tree.map(lambda leaf: np.repeat(leaf, len(SCHOOLS), axis=0), given.params)
            return self._trained(replace(given, params=spread), tables).params

        params = self.stage("specialists", make, model=given.name)
        return {
            school: replace(
                given, params=jax.tree.map(lambda leaf, i=i: leaf[i :: len(SCHOOLS)], params)
            )
            for i, school in enumerate(SCHOOLS)
        }

    def _schools(self, seed: int) -> list[Table]:
        own = [
            self._lessons(task, SOLUTIONS + 10 * seed + i, self.solutions)
            for i, task in enumerate(TASKS)
        ]
        share = -(-self.solutions // len(TASKS))
        mixed = joined([table.take(np.arange(share)) for table in own])
        return [*own, mixed.take(np.arange(self.solutions))]

    def _trained(self, given: Runs, tables: Sequence[Table]) -> Runs:
        """Run i of ``given`` after ``tables[i]``, all in one program."""
        shown = [t.without("source", "prompt", "response") for t in tables]
        done = population(
            _language(given.model),
            given.params,
            shown,
            self.tune,
            range(len(given)),
            stacked=True,
            axes=given.model.axes,
        )
        if done.failed:
            raise UserError(f"{given.name}: runs {done.failed} became NaN; lower --tune.lr")
        return replace(given, params=done.params)


@lru_cache(maxsize=8)
def _language(model: Model) -> Objective:
    return language(model)  # one object per model, so that its program is compiled once


def one(runs: Runs, seed: int) -> Loaded:
    """A run's model, weights and tokenizer."""
    return runs.model, runs.run(seed), runs.tokenizer


@dataclass(frozen=True, eq=False)
class Cast:
    """Everybody of the world: generalists, and specialists by task and "all"."""

    large: Runs
    base: Runs
    ceilings: dict[str, Runs]
    experts: dict[str, Runs]


def cast(world: World, large: str, base: str) -> Cast:
    """Train everybody (or read them back from the workdir)."""
    big, small = world.generalist(large), world.generalist(base)
    world.ctx.say("generalists are trained")
    found = Cast(big, small, world.specialists(big), world.specialists(small))
    world.ctx.say("specialists are trained")
    return found


def rules(alphas: Sequence[float], search: Search) -> dict[str, Rule]:
    """Name of every way to steer by one expert, and its rule; the last is the dynamic one."""
    fixed = {f"proxy {alpha:g}": partial(proxy, alpha=float(alpha)) for alpha in alphas}
    return {**fixed, DYNAMIC: partial(fused, search=search)}


def single_expert(world: World, who: Cast, seed: int, how: dict[str, Rule]) -> Iterator[Row]:
    """Every task with its own expert: each model by itself, then each rule."""
    large, base = one(who.large, seed), one(who.base, seed)
    for task, exam in world.exams.items():
        expert = one(who.experts[task], seed)
        models = dict(large=large, base=base, expert=expert, ceiling=one(who.ceilings[task], seed))
        labels: Row = dict(block="tasks", task=task, seed=seed)
        for arm, model in models.items():
            yield labels | dict(arm=arm) | alone(model, exam).row(exam.dev)
        people = crew(large, base, [expert])
        for arm, rule in how.items():
            heard = together(people, rule, exam)
            yield labels | dict(arm=arm) | heard.row(exam.dev)
            if arm == DYNAMIC:
                yield from histogram(heard.weights(exam.dev), labels)


def histogram(weights: np.ndarray, labels: Row) -> Iterator[Row]:
    """Share of the tokens said at each tenth of the weight."""
    tenths = np.round(weights * 10).astype(int)
    for tenth in range(0, 21):
        share = float((tenths == tenth).mean()) if tenths.size else 0.0
        yield {**labels, "block": "weights", "weight": tenth / 10, "share": share}


def several_experts(world: World, who: Cast, seed: int, rule: Rule) -> Iterator[Row]:
    """Every task with the experts of all tasks at hand, beside models trained on all tasks."""
    experts = [one(who.experts[task], seed) for task in TASKS]
    people = crew(one(who.large, seed), one(who.base, seed), experts)
    for task, exam in world.exams.items():
        labels: Row = dict(block="several", task=task, seed=seed)
        for arm, runs in (("expert", who.experts["all"]), ("ceiling", who.ceilings["all"])):
            yield labels | dict(arm=arm) | alone(one(runs, seed), exam).row(exam.dev)
        heard = together(people, rule, exam)
        yield labels | dict(arm=DYNAMIC) | heard.row(exam.dev)
        shares = heard.picks(exam.dev, len(TASKS))
        for expert, share in zip(TASKS, shares, strict=True):
            yield {**labels, "block": "picks", "expert": expert, "share": float(share)}


def identity(world: World, who: Cast, seed: int, rule: Rule) -> Iterator[Row]:
    """The base in the large model's place: how often is the weight exactly 1, along the
    reference answers and where it is not 0 (no float32 difference between expert and base)?"""
    base = one(who.base, seed)
    for task, exam in world.exams.items():
        people = crew(base, base, [one(who.experts[task], seed)])
        found = score(people, rule, exam.table, batch=SCORED).alpha[exam.dev :]
        moved = found > 0
        if moved.any():
            ones = float((found[moved] == 1).mean())
            yield dict(block="identity", task=task, seed=seed, ones=ones, tokens=int(moved.sum()))
