"""Stretches of text that two tokenizers cut alike: what models with different ones can share.

Tokens are compared by the bytes they stand for, not by the character offsets of the library: those
leave out white space in some tokenizers and count a character once for each of its bytes in all of
them. A boundary is common where both tokenizations have spelled the same bytes; what lies between
two common boundaries is a span. With equal tokenizers every token is one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table

MULTIPLE = 8  # rows are padded to a multiple of this where no length is asked for
SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Aligned:
    """The span number of each token of two tokenizations, -1 where it is in none; their count."""

    first: np.ndarray
    second: np.ndarray
    count: int


@dataclass(frozen=True)
class Paired:
    """The same texts for a student and a teacher, row by row.

    ``student`` and ``teacher`` are tables with ``tokens``, ``segment``, ``position``, ``mask`` and
    ``spans`` (``of`` and ``weight``); ``kept`` are the numbers of the texts that could be aligned,
    ``refused`` counts the reasons of the others.
    """

    student: Table
    teacher: Table
    kept: np.ndarray
    refused: dict[str, int]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token stands for.

    Raises:
      UserError: a special or unknown token, which stands for no text.
    """
    bytewise, added, special = _traits(tokenizer)
    found = []
    for i in ids:
        piece = tokenizer.token(i) or ""
        if i in special:
            raise UserError(f"token {piece!r} is special: it stands for no text")
        if i in added:
            found.append(piece.encode())
        elif bytewise:
            found.append(bytes(_alphabet()[c] for c in piece))
        elif match := _BYTE.fullmatch(piece):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(piece.replace(SPACE, " ").encode())
    return found


def align(first: Sequence[bytes], second: Sequence[bytes], start: int = 0) -> Aligned:
    """Spans of two tokenizations of one text, given as the bytes of their tokens.

    Args:
      start: bytes before the part that counts (the prompt); tokens of a span that begins earlier
        are in none.

    Raises:
      UserError: the tokens spell different texts; nothing after ``start``; no common boundary
        after ``start`` but the end of the text, where a side has several tokens.
    """
    ends = [np.cumsum([len(piece) for piece in side], dtype=np.int64) for side in (first, second)]
    if b"".join(first) != b"".join(second):
        raise UserError("the two tokenizers do not spell the same text")
    cuts = np.union1d(np.intersect1d(ends[0], ends[1]), [0])
    cuts = cuts[cuts >= start]
    if len(cuts) < 2 or not len(first):
        raise UserError("no text is left to align: the response is empty, or one with the prompt")
    numbers = []
    for side, end in zip((first, second), ends, strict=True):
        begin = end - [len(piece) for piece in side]
        of = np.searchsorted(cuts, begin, side="right") - 1
        numbers.append(np.where(begin >= cuts[0], np.minimum(of, len(cuts) - 2), -1))
    if len(cuts) == 2 and max((of >= 0).sum() for of in numbers) > 1:
        raise UserError("the two tokenizers have no common boundary but the ends of the text")
    return Aligned(numbers[0], numbers[1], len(cuts) - 1)


def pair(
    prompts: Sequence[str],
    responses: Sequence[str],
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    length: int | None = None,
    on_fault: str = "raise",
) -> Paired:
    """Tables of one set of texts under two tokenizers, with the spans of the responses.

    Prompt and response are encoded as one text, after BOS where the tokenizer has one; a span that
    begins in the prompt does not count. Every span has weight 1.

    Args:
      length: tokens of a row on either side; None: the longest, rounded up to 8.
      on_fault: what becomes of a text that cannot be aligned: "raise", or "drop" and count.

    Raises:
      UserError: numbers of texts that differ, an unknown ``on_fault``; a text that cannot be
        aligned, with the reason, or none that can.
    """
    if on_fault not in ("raise", "drop") or len(prompts) != len(responses):
        raise UserError(
            f"spans: on_fault must be raise or drop, got {on_fault!r}; {len(prompts)} prompts for "
            f"{len(responses)} responses"
        )
    rows, refused = [], Counter()
    texts = [a + b for a, b in zip(prompts, responses, strict=True)]
    sides = [student.encode_ids(texts), teacher.encode_ids(texts)]
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        try:
            rows.append(
                (i, *_row(text, prompt, (student, teacher), (sides[0][i], sides[1][i]), length))
            )
        except UserError as error:
            if on_fault == "raise":
                raise UserError(f"text {i} ({text[:40]!r}): {error}") from None
            refused[str(error)] += 1
    if not rows:
        raise UserError(f"no text can be aligned: {dict(refused) or 'there is none'}")
    count = max(aligned for *_, aligned in rows)
    mine, theirs = (_table([row[side] for row in rows], count, length) for side in (1, 2))
    return Paired(mine, theirs, np.array([row[0] for row in rows]), dict(refused))


def with_teacher(student: Table, said: np.ndarray) -> Table:
    """The student's table with the teacher's log-probabilities [N,S] of the spans, in nats.

    They are ``annotate.predict(partial(span_logps, model), params, paired.teacher)``.

    Raises:
      UserError: another shape, or a number that is not finite or above 0.
    """
    weight = student["spans"]["weight"]
    said = np.asarray(said, np.float32)
    if said.shape != weight.shape:
        raise UserError(f"spans: {list(said.shape)} log-probabilities for {list(weight.shape)}")
    if not np.isfinite(said).all() or (said > 1e-3).any():
        raise UserError("spans: a log-probability of the teacher is not finite or above 0")
    return student.with_columns(spans={**student["spans"], "teacher": np.minimum(said, 0.0)})


Side = tuple[list[int], np.ndarray]


def _row(
    text: str,
    prompt: str,
    tokenizers: tuple[Tokenizer, Tokenizer],
    ids: tuple[list[int], list[int]],
    length: int | None,
) -> tuple[Side, Side, int]:
    """(tokens, span numbers) of both sides of one text, and the number of spans."""
    if len(text) == len(prompt):
        raise UserError("the response is empty")
    pieces = [_exact(t, i, text) for t, i in zip(tokenizers, ids, strict=True)]
    start = len(prompt.encode())
    for tokenizer, side in zip(tokenizers, pieces, strict=True):
        if tokenizer.bos is None:  # nothing predicts the first token
            start = max(start, len(side[0]))
    aligned = align(pieces[0], pieces[1], start)
    sides = []
    for tokenizer, own, of in zip(tokenizers, ids, (aligned.first, aligned.second), strict=True):
        head = [] if tokenizer.bos is None else [tokenizer.bos]
        sides.append(([*head, *own], np.concatenate([np.full(len(head), -1), of])))
    if length is not None and max(len(own) for own, _ in sides) > length:
        raise UserError(f"the text has more than {length} tokens")
    return sides[0], sides[1], aligned.count


def _exact(tokenizer: Tokenizer, ids: list[int], text: str) -> list[bytes]:
    """The bytes of the tokens, which must be those of the text (a space put before it is not)."""
    pieces = spelled(tokenizer, ids)
    whole, want = b"".join(pieces), text.encode()
    if whole == b" " + want:
        first = next(i for i, piece in enumerate(pieces) if piece)
        pieces[first] = pieces[first][1:]
    elif whole != want:
        raise UserError("a tokenizer does not give the text back (it changes or drops characters)")
    return pieces


def _table(rows: list[Side], count: int, length: int | None) -> Table:
    width = length or -(-max(len(ids) for ids, _ in rows) // MULTIPLE) * MULTIPLE
    shape = (len(rows), width)
    tokens, segment, position = (np.zeros(shape, np.int32) for _ in range(3))
    of, weight = np.full(shape, -1, np.int32), np.zeros((len(rows), count), np.float32)
    for i, (ids, spans) in enumerate(rows):
        tokens[i, : len(ids)], segment[i, : len(ids)] = ids, 1
        position[i, : len(ids)], of[i, : len(ids)] = np.arange(len(ids)), spans
        weight[i, : spans.max() + 1] = 1.0
    columns = {"tokens": tokens, "segment": segment, "position": position}
    mask = (of >= 0).astype(np.float32)
    return Table({**columns, "mask": mask, "spans": {"of": of, "weight": weight}})


@lru_cache(maxsize=8)
def _known(backend: object) -> tuple[bool, frozenset[int], frozenset[int]]:
    if not hasattr(backend, "get_added_tokens_decoder"):  # SentencePiece
        return False, frozenset(), frozenset()
    decoder = backend.decoder  # type: ignore[attr-defined]
    told = json.dumps(json.loads(decoder.__getstate__())) if decoder is not None else ""
    added = backend.get_added_tokens_decoder()  # type: ignore[attr-defined]
    special = frozenset(i for i, token in added.items() if token.special)
    return "ByteLevel" in told, frozenset(added), special


def _traits(tokenizer: Tokenizer) -> tuple[bool, frozenset[int], frozenset[int]]:
    """Whether its tokens are written in the byte alphabet; added tokens; special ones."""
    bytewise, added, special = _known(tokenizer.backend)
    roles = {
        i for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) if i is not None
    }
    return bytewise, added, special | roles


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019): printable bytes are themselves,
    the others, in order, the characters from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}
