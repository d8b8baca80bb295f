"""Prompt and response texts to token columns.

The whole text is encoded once and the response is found by character offsets, so a token that
spans the boundary is what the model would see anyway; it counts as response. ``mask[t]`` weights
predicting ``tokens[t]`` from the tokens before it (see ``packing``); the first token has mask 0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.types import Table

MOST_UNKNOWN = 0.01
SAMPLE = 512  # texts on which the unknown share is measured
CHUNK = 2048  # texts encoded at once: offsets of a large table would not fit in memory
MULTIPLE = 8  # rows are padded to a multiple of this where no length is asked for

log = logging.getLogger("w2s_jax")


@dataclass(frozen=True)
class Cut:
    """What tokenising did to the rows, lengths in tokens before any cut."""

    rows: int
    dropped: int
    truncated: int
    mean: float
    longest: int
    unknown: float  # share of unknown tokens in a sample

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.mean:.1f} tokens on average, longest {self.longest}; "
            f"{self.dropped} dropped, {self.truncated} truncated; {self.unknown:.2%} unknown"
        )


def tokenise(
    table: Table,
    tokenizer: Any,
    *,
    length: int | None = None,
    bos: bool | str = "auto",
    eos: bool = False,
    on_long: str = "drop",
) -> Table:
    """Add ``tokens``, ``segment``, ``position`` (int32) and ``mask`` (float32), [N, length].

    Args:
      table: host columns ``prompt`` and, if you like, ``response`` (texts).
      length: columns; rows are padded on the right. None: the longest row, rounded up to 8.
      bos: begin with the tokenizer's BOS; "auto": if it has one.
      eos: end with the tokenizer's EOS, as the last target.
      on_long: rows of more than ``length`` tokens: "drop", "truncate" (the start of the prompt
        goes: what is judged stands at the end), or "error".

    Returns:
      The rows that are left, all their columns kept. ``mask`` is 1 on the response, or on all
      tokens but the first where a row has no response. The number of dropped and truncated rows
      is logged; ``encode`` returns it.

    Raises:
      UserError: a column is missing or not text, more than 1 % unknown tokens, two BOS in a row,
        nothing to train on in a row, or no row fits.
    """
    result, cut = encode(table, tokenizer, length=length, bos=bos, eos=eos, on_long=on_long)
    if cut.dropped or cut.truncated:
        log.warning("tokenise (length %s): %s", length, cut)
    return result


def encode(
    table: Table,
    tokenizer: Any,
    *,
    length: int | None = None,
    bos: bool | str = "auto",
    eos: bool = False,
    on_long: str = "drop",
) -> tuple[Table, Cut]:
    """``tokenise``, together with what it did to the rows."""
    if on_long not in ("drop", "truncate", "error"):
        raise UserError(f"tokenise: on_long must be drop, truncate or error, got {on_long!r}")
    if length is not None and length < 2:
        raise UserError(f"tokenise: length must be at least 2, got {length}")
    prompts, responses = _texts(table)
    unknown = _unknown(tokenizer, prompts, responses)
    start = _special(tokenizer, "bos", bos)
    end = _special(tokenizer, "eos", eos)
    rows = _encode(tokenizer, prompts, responses, start, end)
    sizes = np.array([len(ids) for ids, _ in rows])
    long = np.zeros(len(rows), bool) if length is None else sizes > length
    if long.any() and on_long == "error":
        worst = int(sizes.argmax())
        raise UserError(
            f"{_name(table, worst)} has {sizes[worst]} tokens, more than length {length}: raise "
            "the length or pass on_long='drop'"
        )
    keep = np.flatnonzero(~long) if on_long == "drop" else np.arange(len(rows))
    if not len(keep):
        raise UserError(f"no row fits in length {length}: the shortest has {sizes.min()} tokens")
    width = length or -(-int(sizes.max()) // MULTIPLE) * MULTIPLE
    columns = _columns([rows[i] for i in keep], width, start is not None)
    _check_masks(table, keep, columns["mask"])
    dropped = len(rows) - len(keep)
    cut = Cut(
        len(rows), dropped, int(long.sum()) - dropped, sizes.mean(), int(sizes.max()), unknown
    )
    return table.take(keep).with_columns(**columns), cut


def _texts(table: Table) -> tuple[list[str], list[str]]:
    if not len(table):
        raise UserError("tokenise: the table has no rows")
    prompts = list(table["prompt"][np.arange(len(table))])
    responses = [""] * len(prompts)
    if "response" in table:
        responses = list(table["response"][np.arange(len(table))])
    for name, column in (("prompt", prompts), ("response", responses)):
        for i, value in enumerate(column):
            if not isinstance(value, str):
                raise UserError(
                    f"{_name(table, i)}: column {name!r} must be text, got {type(value).__name__}"
                )
    return prompts, responses


def _name(table: Table, row: int) -> str:
    return f"row {table['id'][row]}" if "id" in table else f"row {row}"


def _unknown(tokenizer: Any, prompts: list[str], responses: list[str]) -> float:
    """Share of unknown tokens in an even sample; too many are refused."""
    step = -(-len(prompts) // SAMPLE)
    sample = [a + b for a, b in zip(prompts[::step], responses[::step], strict=True)]
    share = tokenizer.unknown_share(sample)
    if share > MOST_UNKNOWN:
        worst = max(sample, key=lambda text: tokenizer.unknown_share([text]))
        raise UserError(
            f"the tokenizer cannot encode the task: {share:.0%} of the tokens are unknown, e.g. in "
            f"{worst[:60]!r}; use a model whose tokenizer covers it"
        )
    return share


def _special(tokenizer: Any, name: str, wanted: bool | str) -> int | None:
    token = getattr(tokenizer, name)
    if wanted not in (True, False, "auto"):
        raise UserError(f"tokenise: {name} must be True, False or 'auto', got {wanted!r}")
    if wanted is True and token is None:
        raise UserError(f"tokenise: {name}=True, but the tokenizer has no {name.upper()} token")
    return token if wanted else None


def _encode(
    tokenizer: Any, prompts: list[str], responses: list[str], bos: int | None, eos: int | None
) -> list[tuple[list[int], int]]:
    """Per row its ids and the index of its first response token (0 where it has no response)."""
    rows = []
    head, tail = ([] if bos is None else [bos]), ([] if eos is None else [eos])
    for begin in range(0, len(prompts), CHUNK):
        part = slice(begin, begin + CHUNK)
        texts = [a + b for a, b in zip(prompts[part], responses[part], strict=True)]
        encoded = tokenizer.encode_batch(texts)
        for i, (text, (ids, offsets)) in enumerate(zip(texts, encoded, strict=True), start=begin):
            if head and ids[:1] == head:
                raise UserError(
                    f"row {i}: double BOS, its text {text[:20]!r} begins with the BOS token that "
                    "is added anyway; strip it from the text or pass bos=False"
                )
            first = len(head) + _boundary(text, offsets, len(prompts[i])) if responses[i] else 0
            rows.append(([*head, *ids, *tail], first))
    return rows


def _boundary(text: str, offsets: list[tuple[int, int]], at: int) -> int:
    """Index of the first token with a character of ``text[at:]``.

    The first bytes of a character that is spelled byte by byte may come with empty offsets; a
    space at the end of the prompt may as well, and is told apart by the text.
    """
    first = next((i for i, (_, end) in enumerate(offsets) if end > at), len(offsets))
    if at and text[at - 1].isspace():
        return first
    while first and offsets[first - 1] == (at, at):
        first -= 1
    return first


def _columns(rows: list[tuple[list[int], int]], width: int, has_bos: bool) -> dict[str, np.ndarray]:
    shape = (len(rows), width)
    tokens, segment, position = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, np.float32)
    for i, (ids, first) in enumerate(rows):
        over = len(ids) - width
        if over > 0:  # keep BOS and the end
            ids = [ids[0], *ids[over + 1 :]] if has_bos else ids[over:]
            first = max(first - over, int(has_bos))
        tokens[i, : len(ids)] = ids
        segment[i, : len(ids)] = 1
        position[i, : len(ids)] = np.arange(len(ids))
        mask[i, max(first, 1) : len(ids)] = 1
    return {"tokens": tokens, "segment": segment, "position": position, "mask": mask}


def _check_masks(table: Table, keep: np.ndarray, mask: np.ndarray) -> None:
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise UserError(
            f"{_name(table, int(keep[empty[0]]))} and {len(empty) - 1} more have nothing to train "
            "on: the text (or its response) gives no token; remove such rows"
        )
