"""Named tasks: balanced binary questions in disjoint train, transfer, dev and test splits.

What the reference loaders get wrong is not reproduced: every split is balanced to exactly 50/50 by
leaving out rows of the larger class, the coins of the test set do not depend on the seed, a
question met in one split is left out of all later ones, and no format gives its label away.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.data import formats as f
from w2s_jax.data import sources
from w2s_jax.data.formats import Example
from w2s_jax.errors import UserError
from w2s_jax.types import Table

TEST_SEED = 0
TEST_SHARE = 5  # one in five questions is test where a source has no split of its own for it
DEV_SHARE, DEV_MOST = 10, 1000  # default dev: a tenth of the training rows, at most 1000

Format = Callable[[Mapping[str, Any], random.Random], Example | None]


@dataclass(frozen=True)
class Task:
    """Where the rows of a task are and how one becomes a question.

    ``hub`` / ``config`` name the Hugging Face dataset (None: local files only). ``train`` and
    ``test`` are split names in order; a local file may have only some of them. ``file`` is the stem
    of local files where it is not the task's name. ``unit`` is a field (a passage) whose rows stay
    on one side when a source has to be divided here.
    """

    format: Format
    hub: str | None = None
    config: str | None = None
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)
    file: str | None = None
    unit: str | None = None


VALID = ("validation",)
ETHICS = "hendrycks/ethics"

TASKS: dict[str, Task] = {
    # the 22 of the paper
    "boolq": Task(f.boolq, "google/boolq", test=VALID),
    "cosmos_qa": Task(f.cosmos_qa, "allenai/cosmos_qa", unit="context", test=VALID),
    "dream": Task(f.dream, "dataset-org/dream"),
    "ethics_justice": Task(f.ethics_justice, ETHICS, "justice"),
    "ethics_deontology": Task(f.ethics_deontology, ETHICS, "deontology"),
    "ethics_virtue": Task(f.ethics_virtue, ETHICS, "virtue"),
    "ethics_utilitarianism": Task(f.ethics_utilitarianism, ETHICS, "utilitarianism"),
    "anli_r2": Task(
        f.anli, "facebook/anli", train=("train_r2",), test=("test_r2", "dev_r2"), file="anli"
    ),
    "cola": Task(f.sentence, "nyu-mll/glue", "cola", test=VALID),
    "sst2": Task(f.sentence, "stanfordnlp/sst2", test=VALID),
    "hellaswag": Task(f.hellaswag, "Rowan/hellaswag", test=VALID),
    "mc_taco": Task(f.mc_taco, "CogComp/mc_taco", train=("test",), test=("validation",)),
    "openbookqa": Task(f.openbookqa, "allenai/openbookqa", "main"),
    "paws": Task(f.paws, "google-research-datasets/paws", "labeled_final"),
    "piqa": Task(f.piqa, "ybisk/piqa", test=VALID),
    "quail": Task(f.quail, "textmachinelab/quail", unit="context", test=VALID),
    "quartz": Task(f.quartz, "allenai/quartz"),
    "sciq": Task(f.sciq, "allenai/sciq"),
    "social_i_qa": Task(f.social_i_qa, "allenai/social_i_qa", unit="context", test=VALID),
    "multirc": Task(f.multirc, "aps/super_glue", "multirc", unit="paragraph", test=VALID),
    "wic": Task(f.wic, "aps/super_glue", "wic", test=VALID),
    "twitter_sentiment": Task(f.statement, "EleutherAI/twitter-sentiment"),
    # extras of the reference repositories
    "amazon_polarity": Task(f.amazon_polarity, "fancyzhx/amazon_polarity"),
    "anthropic_hh": Task(f.anthropic_hh, "Anthropic/hh-rlhf"),
    "sciq_with_support": Task(f.sciq_with_support, "allenai/sciq", file="sciq"),
    # further public sets
    "winogrande": Task(f.winogrande, "allenai/winogrande", "winogrande_xl", test=VALID),
    "commonsense_qa": Task(f.multiple_choice, "tau/commonsense_qa", test=VALID),
    "arc_easy": Task(f.multiple_choice, "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Task(f.multiple_choice, "allenai/ai2_arc", "ARC-Challenge"),
    "strategy_qa": Task(f.strategy_qa, "ChilleD/StrategyQA", test=("test", "dev")),
    "ethics_commonsense": Task(f.ethics_commonsense, ETHICS, "commonsense"),
    "sms_spam": Task(f.sms_spam, "ucirvine/sms_spam"),
    "sentiment_sentences": Task(f.sentence),
    "twenty_newsgroups_6": Task(f.space_or_medicine),
    "clinc150": Task(f.about_money),
    "banking77": Task(f.about_cards),
}


@dataclass(frozen=True)
class Splits:
    """Four disjoint tables; the weak model learns from ``train``, the student from ``transfer``.

    Columns: ``id`` (8 hex of the text's SHA-1), ``prompt``, ``response`` (host text), ``label``
    [N,2] float32 one-hot, ``truth`` [N] int32. Each split holds as many 0 as 1.
    """

    train: Table
    transfer: Table
    dev: Table
    test: Table


class _Found(NamedTuple):
    key: str
    unit: str
    example: Example


def names() -> list[str]:
    """Every task that ``load`` knows by name, the built-in arithmetic first."""
    return ["arithmetic", *sorted(TASKS)]


def load(
    name: str,
    *,
    seed: int,
    data: str | Path | None = None,
    train: int | None = None,
    test: int | None = None,
    dev: int | None = None,
) -> Splits:
    """The splits of a task, each exactly balanced, no question in two of them.

    Args:
      name: one of ``names()``, or any name together with a ``data`` file of your own rows with
        ``text``/``label`` or ``prompt``/``response``/``label`` (and ``split``, if you like).
      seed: draws training rows and their coins; the test set is the same for every seed.
      data: a local file, or a folder with ``<task>.jsonl(.gz)``, ``.parquet``, ...
      train: rows of ``train`` and of ``transfer`` *each*, at most (None: all there are).
      test: rows of ``test``, at most.
      dev: rows of ``dev``, at most (None: a tenth of the training rows, at most 1000).

    Raises:
      UserError: unknown task, no data, a wrong row (with file and row id), or too few rows.
    """
    for what, count in (("train", train), ("test", test), ("dev", dev)):
        if count is not None and count < 2:
            raise UserError(f"task {name!r}: {what}={count} rows; at least 2 make a balanced split")
    if name == "arithmetic" and data is None:
        return _arithmetic(seed, train or 2048, test or 1024, dev or 512)
    task, place = _task(name, data)
    learn, held_out = _sides(task, place)
    seen: set[str] = set()
    tests = _balanced(_drawn(task, held_out, TEST_SEED, place), test, seen)
    if train is not None and dev is None:
        dev = max(2, min(DEV_MOST, 2 * train // DEV_SHARE))
    need = None if train is None else 2 * _even(train) + _even(dev or 0)
    pool = _balanced(_drawn(task, learn, seed, place), need, seen)
    return _divide(name, pool, tests, train, dev)


def _task(name: str, data: str | Path | None) -> tuple[Task, str]:
    """The task and the file, folder or Hub name that holds its rows."""
    key = name.replace("-", "_")
    task = TASKS.get(key)
    if task is None and data is None:
        raise UserError(
            f"unknown task {name!r}; known are {', '.join(names())}; "
            "for your own rows give --data FILE as well"
        )
    task = task or Task(f.custom, file=name)
    if data is not None:
        return task, str(_find(Path(data), [key, name, task.file or key]))
    if task.hub is None:
        raise UserError(f"task {name!r} has no Hub copy: give a local one with --data FOLDER")
    return task, task.hub


def _find(data: Path, stems: Sequence[str]) -> Path:
    """The file (or folder) of a task: ``data`` itself if it is a file."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise UserError(f"--data {data}: no such file or folder")
    for stem in dict.fromkeys(stems):
        for suffix in (*sources.SUFFIXES, ""):
            if (data / f"{stem}{suffix}").exists():
                return data / f"{stem}{suffix}"
    found = sorted(entry.name for entry in data.iterdir())
    shown = ", ".join(found[:30]) + (", ..." if len(found) > 30 else "")
    raise UserError(
        f"--data {data}: no {stems[0]}.jsonl(.gz), .parquet, .arrow or .csv; it has "
        f"{shown or 'nothing'}"
    )


Side = tuple[list[sources.Rows], int | None]  # rows, and which share of the units (None: all)


def _sides(task: Task, place: str) -> tuple[Side, Side]:
    """(training rows, test rows); a source that lacks one side is divided by a hash."""
    path = Path(place)
    if not path.exists():
        both = [
            [sources.records(place, split=split, config=task.config) for split in wanted[:1]]
            for wanted in (task.train, task.test)
        ]
        return (both[0], None), (both[1], None)
    splits = sources.local_splits(path)
    learn = [splits[name] for name in task.train if name in splits]
    held_out = [splits[name] for name in task.test if name in splits]
    if learn and held_out:
        return (learn, None), (held_out, None)
    pool = learn or held_out or list(splits.values())
    return (pool, 0), (pool, 1)


def _drawn(task: Task, side: Side, seed: int, place: str) -> Iterator[_Found]:
    """Rendered rows of one side in a shuffled order, duplicates included."""
    parts, share = side
    ends = np.cumsum([len(part) for part in parts])
    if not ends[-1]:
        raise UserError(f"{place}: no rows")
    for number in np.random.default_rng(seed).permutation(int(ends[-1])).tolist():
        part = int(np.searchsorted(ends, number, side="right"))
        at = number - (int(ends[part - 1]) if part else 0)
        row = parts[part][at]
        found = _render(task, row, seed, f"{place}, row {row.get('id', at)}")
        if found is None:
            continue
        in_test = int(found.unit[:8], 16) % TEST_SHARE == 0
        if share is None or in_test == bool(share):
            yield found


class _RightAnswer(random.Random):
    """Coins that always show the right answer: the rendering that identifies a question."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def shuffle(self, x: Any) -> None:
        pass


def _render(task: Task, row: Mapping[str, Any], seed: int, place: str) -> _Found | None:
    try:
        plain = task.format(row, _RightAnswer(0))
        if plain is None:
            return None
        key = _sha(plain.prompt + plain.response)
        example = task.format(row, random.Random(f"{seed}:{key}"))
        unit = _sha(f.text(row, task.unit)) if task.unit else key
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if example is None or not (example.prompt + example.response).strip():
        return None
    return _Found(key, unit, example)


def _sha(text: str) -> str:
    return hashlib.sha1(text.encode("utf8", "surrogatepass")).hexdigest()


def _even(count: int) -> int:
    return count - count % 2


def _balanced(found: Iterable[_Found], most: int | None, seen: set[str]) -> list[list[Example]]:
    """[examples of label 0, as many of label 1], new questions only; ``seen`` grows.

    Stops reading once there are ``most`` rows. Questions left out for balance are not seen.
    """
    half = None if most is None else most // 2
    sides: list[list[tuple[str, str, Example]]] = [[], []]
    taken: set[str] = set()
    for key, _, example in found:
        text_id = _sha(example.prompt + example.response)[:8]
        if {key, text_id} & seen or {key, text_id} & taken:
            continue
        if half is not None and len(sides[example.label]) >= half:
            if len(sides[1 - example.label]) >= half:
                break
            continue
        taken |= {key, text_id}
        sides[example.label].append((key, text_id, example))
    count = min(len(side) for side in sides)
    for side in sides:
        seen.update(name for key, text_id, _ in side[:count] for name in (key, text_id))
    return [[example for *_, example in side[:count]] for side in sides]


def _divide(
    name: str,
    pool: list[list[Example]],
    tests: list[list[Example]],
    train: int | None,
    dev: int | None,
) -> Splits:
    """Dev, then two halves of equal size, each with as many 0 as 1."""
    pairs = len(pool[0])
    few = min(DEV_MOST, 2 * pairs // DEV_SHARE) if dev is None else dev
    few = max(1, min(few // 2, pairs - 2))
    half = (pairs - few) // 2
    half = half if train is None else min(half, train // 2)
    if half < 1 or not tests[0]:
        raise UserError(
            f"task {name!r}: too few rows, {2 * pairs} balanced for training and "
            f"{2 * len(tests[0])} for testing; a class may be missing"
        )
    cuts = {"dev": (0, few), "train": (few, few + half), "transfer": (few + half, few + 2 * half)}
    parts = {key: _table([side[a:b] for side in pool]) for key, (a, b) in cuts.items()}
    return Splits(parts["train"], parts["transfer"], parts["dev"], _table(tests))


def _table(sides: list[list[Example]]) -> Table:
    """Labels alternate, so that every even prefix is balanced as well."""
    rows = [row for pair in zip(*sides, strict=True) for row in pair]
    ids = [_sha(row.prompt + row.response)[:8] for row in rows]
    truth = np.array([row.label for row in rows], np.int32)
    return Table(
        {
            "id": np.array(ids, object),
            "prompt": np.array([row.prompt for row in rows], object),
            "response": np.array([row.response for row in rows], object),
            "label": np.eye(2, dtype=np.float32)[truth],
            "truth": truth,
        }
    )


def _arithmetic(seed: int, train: int, test: int, dev: int) -> Splits:
    """The built-in task; the test set is that of seed 0 for every seed."""
    from w2s_jax.data import arithmetic

    asked: set[str] = set()

    def part(stream: int, rows: int) -> Table:
        table = arithmetic.judged(stream, _even(rows), avoid=asked)
        asked.update(table["question"].tolist())
        texts = zip(table["prompt"], table["response"], strict=True)
        ids = [_sha(prompt + response)[:8] for prompt, response in texts]
        return table.with_columns(id=np.array(ids, object))

    tests = part(TEST_SEED, test)
    first = 3 * seed + 1
    return Splits(part(first, train), part(first + 1, train), part(first + 2, dev), tests)
