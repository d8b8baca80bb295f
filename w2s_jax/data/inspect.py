"""A look at the data before a run: what is trained on; faults that one can see are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from w2s_jax.data.tasks import Splits
from w2s_jax.data.text import Cut, encode
from w2s_jax.errors import UserError
from w2s_jax.types import Table

SHOWN = 600  # characters of the rendered example


@dataclass(frozen=True)
class Part:
    """One split: how many rows, the share of each class, and what tokenising does to it."""

    rows: int
    balance: tuple[float, ...]
    cut: Cut


@dataclass(frozen=True)
class Report:
    """What ``inspect`` saw; ``str`` of it is the text to print.

    ``example`` is one row with the trained-on tokens in double brackets.
    """

    parts: dict[str, Part]
    example: str

    def __str__(self) -> str:
        lines = ["one example, trained on [[these tokens]]:", f"  {self.example}"]
        for name, part in self.parts.items():
            shares = " ".join(f"{share:.1%}" for share in part.balance)
            balance = f"classes {shares}; " if shares else ""
            lines.append(f"{name}: {balance}{part.cut}")
        return "\n".join(lines)


def inspect(
    data: Splits | Table | Mapping[str, Table],
    tokenizer: Any,
    *,
    length: int | None = None,
    on_long: str = "drop",
) -> Report:
    """Look at splits (or one table) as ``tokenise`` will make them; raise on what is wrong.

    Args:
      data: tables with ``prompt``/``response`` or with token columns already there.
      length, on_long: as for ``tokenise``; used where there are no token columns yet.

    Raises:
      UserError: an empty split; two BOS in a row; a row with nothing to train on; labels that are
        NaN, out of range or do not sum to 1; a single class; rows that stand in two splits; more
        than 1 % unknown tokens.
    """
    tables = _tables(data)
    for name, table in tables.items():
        if not len(table):
            raise UserError(f"split {name!r} is empty")
    _no_overlap(tables)
    parts, example = {}, ""
    for name, table in tables.items():
        try:
            ready, cut = _ready(table, tokenizer, length, on_long)
            _check_tokens(ready, tokenizer)
            parts[name] = Part(len(table), _balance(ready), cut)
        except UserError as error:
            raise UserError(f"split {name!r}: {error}") from None
        example = example or render(ready, 0, tokenizer)
    return Report(parts, example)


def render(table: Table, row: int, tokenizer: Any) -> str:
    """One tokenised row as text, newlines escaped, trained-on tokens in double brackets."""
    real = np.asarray(table["segment"][row]) > 0
    tokens, trained = table["tokens"][row][real], table["mask"][row][real] > 0
    turns = np.flatnonzero(np.diff(trained)) + 1
    pieces = []
    for run, on in zip(np.split(tokens, turns), np.split(trained, turns), strict=True):
        piece = tokenizer.decode(run.tolist(), skip_special=False).replace("\n", "\\n")
        pieces.append((piece, bool(on[0])))
    spare = max(SHOWN - sum(len(piece) for piece, on in pieces if on), 80)
    return "".join(f"[[{_middle(p, SHOWN)}]]" if on else _middle(p, spare) for p, on in pieces)


def _middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _tables(data: Any) -> dict[str, Table]:
    if isinstance(data, Table):
        return {"table": data}
    tables = dict(data) if isinstance(data, Mapping) else dict(vars(data))
    if not tables:
        raise UserError("there is no split to inspect")
    return tables


def _no_overlap(tables: dict[str, Table]) -> None:
    """No text (or, without texts, no token row) in two splits."""
    seen = {name: _identities(table) for name, table in tables.items()}
    for one, other in combinations(tables, 2):
        if both := seen[one].keys() & seen[other].keys():
            first = min(seen[other][key] for key in both)
            raise UserError(
                f"{len(both)} rows stand in both {one!r} and {other!r}, the first is row {first} "
                f"of {other!r}: remove the duplicates"
            )


def _identities(table: Table) -> dict[Any, int]:
    every = np.arange(len(table))
    if "prompt" in table:
        prompts = table["prompt"][every]
        responses = table["response"][every] if "response" in table else [""] * len(table)
        return {p + r: i for i, (p, r) in enumerate(zip(prompts, responses, strict=True))}
    if "tokens" not in table:
        raise UserError(f"nothing to inspect: no prompt, no tokens, only {sorted(table.columns)}")
    rows = np.ascontiguousarray(table["tokens"][every])
    return {row.tobytes(): i for i, row in enumerate(rows)}


def _ready(table: Table, tokenizer: Any, length: int | None, on_long: str) -> tuple[Table, Cut]:
    if "tokens" not in table:
        return encode(table, tokenizer, length=length, on_long=on_long)
    for name in ("segment", "mask"):
        if name not in table:
            raise UserError(f"a table with tokens needs the column {name!r} as well")
    sizes = (np.asarray(table["segment"][np.arange(len(table))]) > 0).sum(axis=1)
    tokens = np.asarray(table["tokens"][np.arange(len(table))])
    if tokens.max() >= tokenizer.size or tokens.min() < 0:
        raise UserError(
            f"token ids go from {tokens.min()} to {tokens.max()}, the tokenizer has "
            f"{tokenizer.size}: the table was made with another tokenizer"
        )
    unknown = float((tokens == tokenizer.unk).sum() / sizes.sum()) if tokenizer.unk else 0.0
    return table, Cut(len(table), 0, 0, float(sizes.mean()), int(sizes.max()), unknown)


def _check_tokens(table: Table, tokenizer: Any) -> None:
    tokens, segment, mask = (
        np.asarray(table[name][np.arange(len(table))]) for name in ("tokens", "segment", "mask")
    )
    if tokenizer.bos is not None:
        pair = (tokens[:, 1:] == tokenizer.bos) & (tokens[:, :-1] == tokenizer.bos)
        double = (pair & (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)).any(axis=1)
        if double.any():
            raise UserError(f"double BOS in {_name(table, double)}: it was added to a text with it")
    wild = ~np.isfinite(mask).all(axis=1) | (mask < 0).any(axis=1)
    if wild.any():
        raise UserError(f"the mask of {_name(table, wild)} is negative or not finite")
    empty = ~((mask > 0) & (segment > 0)).any(axis=1)
    if empty.any():
        raise UserError(f"{_name(table, empty)} has an all-zero mask: nothing is trained on")


def _balance(table: Table) -> tuple[float, ...]:
    """Share of each class; refuses labels that are no distribution, or all of one class."""
    if "label" not in table:
        return ()
    label = np.asarray(table["label"][np.arange(len(table))], np.float64)
    wrong = ~np.isfinite(label).all(axis=1)
    if wrong.any():
        raise UserError(f"the label of {_name(table, wrong)} is NaN or infinite")
    wrong = ((label < 0) | (label > 1)).any(axis=1)
    if wrong.any():
        raise UserError(f"the label of {_name(table, wrong)} is out of range 0..1")
    wrong = np.abs(label.sum(axis=1) - 1) > 1e-3
    if wrong.any():
        raise UserError(f"the label of {_name(table, wrong)} is no distribution: sum is not 1")
    shares = np.bincount(label.argmax(axis=1), minlength=label.shape[1]) / len(label)
    if shares.max() == 1:
        raise UserError(f"every row has class {int(shares.argmax())}: nothing can be learned")
    return tuple(shares.tolist())


def _name(table: Table, where: Any) -> str:
    """The first row of ``where`` by id, and how many there are."""
    first = int(np.flatnonzero(where)[0])
    name = f"row {table['id'][first]}" if "id" in table else f"row {first}"
    return name if where.sum() == 1 else f"{name} (and {where.sum() - 1} more)"
