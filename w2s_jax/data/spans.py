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

from w2s_jax.data import packing
from w2s_jax.errors import UserError
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Table

MULTIPLE = 8  # rows are padded to a multiple of this where no length is asked for
SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Aligned:
    """The span number of each token of two tokenizations, -1 where it is in none; their count, and
    the bytes of each."""

    first: np.ndarray
    second: np.ndarray
    count: int
    sizes: np.ndarray


@dataclass(frozen=True)
class Paired:
    """The same texts for a student and a teacher, row by row.

    ``student`` and ``teacher`` are tables with ``tokens``, ``segment``, ``position``, ``mask`` and
    ``spans`` (``of`` and ``weight``); ``kept`` are the numbers of the texts that could be aligned,
    ``refused`` counts the reasons of the others. ``bytes`` [N] is how much of each text is in
    spans, ``cut`` how many texts lost their end.
    """

    student: Table
    teacher: Table
    kept: np.ndarray
    refused: dict[str, int]
    bytes: np.ndarray
    cut: int = 0


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token stands for.

    Raises:
      UserError: a special or unknown token, which stands for no text.
    """
    decoder, added, special = _traits(tokenizer)
    found = []
    for i, before in zip(ids, [None, *ids], strict=False):
        piece = tokenizer.token(i) or ""
        if i in special:
            raise UserError(f"token {piece!r} is special: it stands for no text")
        if i in added:
            found.append(piece.encode())
        elif "ByteLevel" in decoder:
            found.append(bytes(_alphabet()[c] for c in piece))
        elif "WordPiece" in decoder:  # whether a space is before a word, its neighbour tells
            alone = [] if before is None else [before]
            found.append(tokenizer.decode([*alone, i])[len(tokenizer.decode(alone)) :].encode())
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
    return Aligned(numbers[0], numbers[1], len(cuts) - 1, np.diff(cuts))


def pair(
    prompts: Sequence[str],
    responses: Sequence[str],
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    length: int | tuple[int, int] | None = None,
    on_fault: str = "raise",
    on_long: str = "fault",
    end: bool = False,
) -> Paired:
    """Tables of one set of texts under two tokenizers, with the spans of the responses.

    Prompt and response are encoded as one text, after BOS where the tokenizer has one; a span that
    begins in the prompt does not count. Every span has weight 1.

    Args:
      length: tokens of a row, of both sides or (student's, teacher's); None: the longest, rounded
        up to 8.
      on_fault: what becomes of a text that cannot be aligned: "raise", or "drop" and count.
      on_long: what becomes of one that is too long on either side: "fault", or "cut" at the last
        boundary that fits on both.
      end: the end of a text that was not cut is a span too, of no bytes: EOS on both sides.

    Raises:
      UserError: numbers of texts that differ, an unknown option; ``end`` without EOS; a text that
        cannot be aligned, with the reason, or none that can.
    """
    if on_fault not in ("raise", "drop") or on_long not in ("fault", "cut"):
        raise UserError(
            "spans: on_fault must be raise or drop, on_long fault or cut; got "
            f"{on_fault!r}, {on_long!r}"
        )
    if len(prompts) != len(responses):
        raise UserError(f"spans: {len(prompts)} prompts for {len(responses)} responses")
    if end and (student.eos is None or teacher.eos is None):
        raise UserError("spans: end=True needs an end-of-text token in both tokenizers")
    most = length if isinstance(length, tuple) else (length, length)
    rows, refused = [], Counter()
    texts = [a + b for a, b in zip(prompts, responses, strict=True)]
    sides = [student.encode_ids(texts), teacher.encode_ids(texts)]
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        try:
            said = _row(text, prompt, (student, teacher), (sides[0][i], sides[1][i]), end)
            rows.append((i, *_shortened(said, most, on_long == "cut")))
        except UserError as error:
            if on_fault == "raise":
                raise UserError(f"text {i} ({text[:40]!r}): {error}") from None
            refused[str(error)] += 1
    if not rows:
        raise UserError(f"no text can be aligned: {dict(refused) or 'there is none'}")
    kept, mine, theirs, sizes, cut = zip(*rows, strict=True)
    count = max(map(len, sizes))
    tables = [_table(side, count, n) for side, n in zip((mine, theirs), most, strict=True)]
    covered = np.array([size.sum() for size in sizes])
    return Paired(tables[0], tables[1], np.array(kept), dict(refused), covered, sum(cut))


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


@dataclass(frozen=True)
class Places:
    """Where the spans of N texts stand in packed rows: those of a text are ``count`` columns from
    ``first`` of row ``row``; all [N]."""

    row: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Values [R,S] of packed rows as those of the texts, [N, most spans of a text]; else 0."""
        text, inner = self.each()
        found = np.zeros((len(self.row), int(self.count.max())), values.dtype)
        found[text, inner] = values[self.row[text], self.first[text] + inner]
        return found

    def each(self) -> tuple[np.ndarray, np.ndarray]:
        """The text, and the number within it, of every span."""
        text = np.repeat(np.arange(len(self.count)), self.count)
        return text, np.arange(len(text)) - (np.cumsum(self.count) - self.count)[text]


def pack(table: Table, length: int) -> tuple[Table, Places]:
    """Rows of ``length`` tokens that hold several texts each (``packing.pack``), and where the
    spans went; the spans of a row are numbered through.

    Args:
      table: of ``pair``, with or without the teacher's log-probabilities: a text a row.

    Raises:
      UserError: a text longer than ``length``.
    """
    tokens, segment, of = table["tokens"], table["segment"], table["spans"]["of"]
    sizes = (segment > 0).sum(1)
    # the loss weight of a document says which text it is
    documents = [
        (ids[:n], np.full(n, i + 1, np.float32))
        for i, (ids, n) in enumerate(zip(tokens, sizes.tolist(), strict=True))
    ]
    packed = packing.pack(documents, length)
    row, place = np.nonzero(packed["segment"])
    inner = packed["position"][row, place]
    heads = np.flatnonzero(inner == 0)
    texts = packed["mask"][row[heads], place[heads] + 1].astype(np.int64) - 1
    text = texts[np.cumsum(inner == 0) - 1]
    count = of.max(1) + 1
    before = np.cumsum(count[texts]) - count[texts]
    starts = np.searchsorted(row[heads], np.arange(len(packed)))
    first = np.zeros(len(count), np.int64)
    first[texts] = before - before[starts][row[heads]]
    where = np.zeros(len(count), np.int64)
    where[texts] = row[heads]
    places = Places(where, first, count)

    own = of[text, inner]
    numbers, mask = np.full_like(packed["tokens"], -1), np.zeros_like(packed["mask"])
    numbers[row, place] = np.where(own >= 0, own + first[text], -1)
    mask[row, place] = table["mask"][text, inner]
    which, one = places.each()
    spans: dict[str, np.ndarray] = {"of": numbers}
    for name in ("weight", "teacher"):
        if name in table["spans"]:
            spans[name] = np.zeros((len(packed), int(numbers.max()) + 1), np.float32)
            spans[name][where[which], first[which] + one] = table["spans"][name][which, one]
    return packed.with_columns(mask=mask, spans=spans), places


def aimed(table: Table) -> Table:
    """The table with ``targets`` (``packing.with_targets``) and ``spans.of`` of those [N,M], so
    that prompts never reach the vocabulary head."""
    made = packing.with_targets(table)
    targets, of = made["targets"], table["spans"]["of"]
    moved = np.take_along_axis(of, np.minimum(targets["at"] + 1, of.shape[1] - 1), axis=1)
    moved = np.where(targets["mask"] > 0, moved, -1).astype(np.int32)
    return made.with_columns(spans={**table["spans"], "of": moved})


Side = tuple[list[int], np.ndarray]
Said = tuple[Side, Side, np.ndarray]


def _row(
    text: str,
    prompt: str,
    tokenizers: tuple[Tokenizer, Tokenizer],
    ids: tuple[list[int], list[int]],
    end: bool,
) -> Said:
    """(tokens, span numbers) of both sides of one text, and the bytes of each span."""
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
        tail = [tokenizer.eos] if end else []
        numbers = (np.full(len(head), -1), of, np.full(len(tail), aligned.count))
        sides.append(([*head, *own, *tail], np.concatenate(numbers)))
    return sides[0], sides[1], np.append(aligned.sizes, 0) if end else aligned.sizes


def _shortened(
    said: Said, most: tuple[int | None, int | None], cut: bool
) -> tuple[Side, Side, np.ndarray, bool]:
    """A text whose sides have at most so many tokens, and whether it had more."""
    *sides, sizes = said
    left = len(sizes)
    for (ids, of), room in zip(sides, most, strict=True):
        if room is not None and len(ids) > room:
            if not cut:
                raise UserError(f"the text has more than {room} tokens")
            left = min(left, int(of[room]))  # spans before the one the first surplus token is in
    if left == len(sizes):
        return sides[0], sides[1], sizes, False
    if left < 1:
        raise UserError(f"no span ends within {min(n for n in most if n is not None)} tokens")
    short = [(ids[: int((of < left).sum())], of[of < left]) for ids, of in sides]
    return short[0], short[1], sizes[:left], True


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


def _table(rows: Sequence[Side], count: int, length: int | None) -> Table:
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
def _known(backend: object) -> tuple[str, frozenset[int], frozenset[int]]:
    if not hasattr(backend, "get_added_tokens_decoder"):  # SentencePiece
        return "", frozenset(), frozenset()
    decoder = backend.decoder  # type: ignore[attr-defined]
    told = json.dumps(json.loads(decoder.__getstate__())) if decoder is not None else ""
    added = backend.get_added_tokens_decoder()  # type: ignore[attr-defined]
    special = frozenset(i for i, token in added.items() if token.special)
    return told, frozenset(added), special


def _traits(tokenizer: Tokenizer) -> tuple[str, frozenset[int], frozenset[int]]:
    """How its tokens become text, as the library writes it down; added tokens; special ones."""
    decoder, added, special = _known(tokenizer.backend)
    roles = {
        i for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) if i is not None
    }
    return decoder, added, special | roles


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019): printable bytes are themselves,
    the others, in order, the characters from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}
