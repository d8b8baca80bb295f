"""Preference pairs as token ids: prompt, chosen, rejected, for ``pack_pairs`` and ``pad_pairs``.

The ids of a prompt are those of the prompt alone, which is what a model is given when it
generates. A response is what follows them in the ids of the whole text; where the tokenizer merges
across the seam, so that the prompt is no prefix of the whole, the response is encoded by itself
(counted as ``Cut.merged``). Every token of a response is trained on, its end token included.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from w2s_jax.data import inspect
from w2s_jax.data.chat import Prompt, Template, template
from w2s_jax.data.text import MOST_UNKNOWN, SAMPLE
from w2s_jax.errors import UserError
from w2s_jax.types import Table

Ids = list[list[int]]
OneText = Sequence[int] | np.ndarray
Arrays = list[np.ndarray]  # of int32: a list of Python's numbers takes nine times the memory
ANY = 1 << 40  # tokens: no limit
CHUNK = 4096  # pairs rendered and encoded at once
TEXTS = ("prompt", "raw_chosen", "raw_rejected")  # "chosen" is what ``pad_pairs`` makes of a side
RULES = ("drop", "truncate", "error", "delta")

log = logging.getLogger("w2s_jax")


@dataclass(frozen=True)
class Cut:
    """What tokenising did to the pairs; lengths in tokens of prompt + longer response, before cuts.

    ``kept`` [n] holds the numbers of the pairs that are left, in order.
    """

    pairs: int
    kept: np.ndarray = field(repr=False)
    dropped: dict[str, int]  # reason -> pairs
    truncated: int  # responses
    merged: int  # responses encoded by themselves
    mean: float
    longest: int
    unknown: float  # share of unknown tokens in a sample

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return (
            f"{self.pairs} pairs, {self.mean:.1f} tokens on average, longest {self.longest}; "
            f"dropped: {lost or 'none'}; {self.truncated} responses truncated, {self.merged} "
            f"encoded apart from their prompt; {self.unknown:.2%} unknown"
        )


@dataclass(frozen=True)
class _Way:
    """How texts become ids: the template, and the ids that are put before and after."""

    tokenizer: Any
    template: Template
    start: int | None
    end: int | None
    delta: bool

    def prompts(self, prompts: Sequence[Prompt]) -> tuple[list[str], Ids]:
        texts = [self.template.prompt(prompt) for prompt in prompts]
        return texts, [self._begun(ids) for ids in encode(self.tokenizer, texts)]

    def responses(
        self, prompts: Sequence[Prompt], texts: list[str], heads: Ids, said: Sequence[str]
    ) -> tuple[Ids, int]:
        """Ids of the responses and how many had to be encoded apart from their prompt."""
        tails = [self._tail(*parts) for parts in zip(prompts, texts, said, strict=True)]
        joined = [text + tail for text, tail in zip(texts, tails, strict=True)]
        whole = [self._begun(ids) for ids in encode(self.tokenizer, joined)]
        apart = [i for i, head in enumerate(heads) if whole[i][: len(head)] != head]
        rest = [ids[len(head) :] for ids, head in zip(whole, heads, strict=True)]
        for i, ids in zip(apart, encode(self.tokenizer, [tails[i] for i in apart]), strict=True):
            rest[i] = ids
        end = [] if self.end is None else [self.end]
        return [ids if ids[-1:] == end else ids + end for ids in rest], len(apart)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if self.start is None or ids[:1] == [self.start] else [self.start, *ids]

    def _tail(self, prompt: Prompt, text: str, said: str) -> str:
        """What stands after the prompt: the response and the template's end of it."""
        whole = self.template.whole(prompt, said)
        if not whole.startswith(text):
            raise UserError(
                f"the chat template {self.template.name!r} writes a prompt that is no prefix of "
                f"prompt and answer (after {text[-40:]!r}): name another template"
            )
        tail = whole[len(text) :]
        if self.template.source is not None or self.delta:
            tail = tail.rstrip("\n")
        word = self.tokenizer.token(self.end) if self.delta else ""
        return tail if tail.endswith(word) else f"{tail} {word}"


def tokenise_pairs(
    table: Table,
    tokenizer: Any,
    *,
    length: int | None = None,
    template: str = "auto",
    bos: bool | str = "auto",
    eos: bool = True,
    on_long: str = "drop",
    separator: str = "",
) -> tuple[Arrays, Arrays, Arrays, Cut]:
    """Token ids of prompts, chosen and rejected responses of the pairs that are left, and the cut.

    The ids of each text are an int32 array, as ``pack_pairs`` and ``pad_pairs`` take them.

    Args:
      table: host columns ``prompt`` (text, or a list of messages {role, content}), ``raw_chosen``
        and ``raw_rejected`` (texts), as ``preferences.read`` gives them.
      length: most tokens of prompt and response together; None: any.
      template: see ``chat.template``.
      bos: begin with BOS; "auto": as the tokenizer's own template does it, else if it has a BOS.
        A prompt never begins with two.
      eos: end responses with EOS, unless the template ends them in its own way.
      on_long: pairs of more than ``length`` tokens: "drop"; "truncate" (a long response loses its
        end, hence its EOS; pairs whose prompt leaves no room are dropped); "error"; or "delta",
        the rule of Geng et al. 2025: trailing newlines go, " " and EOS are appended where EOS is
        missing, a long response is cut and its last token becomes EOS, and pairs whose prompt has
        ``length - 2`` tokens or more are dropped.
      separator: put between prompt and response where no template does.

    Raises:
      UserError: a column is missing or not text, an unknown option, no EOS or BOS where one is
        asked for, more than 1 % unknown tokens, a template that refuses, or no pair is left.
    """
    if on_long not in RULES:
        raise UserError(f"tokenise_pairs: on_long must be one of {RULES}, got {on_long!r}")
    if length is not None and length < 4:
        raise UserError(f"tokenise_pairs: length must be at least 4, got {length}")
    if on_long == "delta" and length is None:
        raise UserError("tokenise_pairs: on_long='delta' cuts at a length: pass length=")
    prompts, chosen, rejected = _columns(table)
    way = _way(tokenizer, template, bos, eos, separator, on_long == "delta")
    unknown = _unknown(way, prompts, chosen, rejected)
    heads: Arrays = []
    sides: tuple[Arrays, Arrays] = ([], [])
    merged = 0
    for begin in range(0, len(prompts), CHUNK):
        part = slice(begin, begin + CHUNK)
        texts, ids = way.prompts(prompts[part])
        heads += _arrays(ids)
        for side, said in zip(sides, (chosen, rejected), strict=True):
            more, apart = way.responses(prompts[part], texts, ids, said[part])
            side += _arrays(more)
            merged += apart
    sizes = [len(head) + max(map(len, pair)) for head, *pair in zip(heads, *sides, strict=True)]
    keep, dropped, truncated = _cut(table, heads, sides, length, on_long, way.end)
    cut = Cut(
        len(sizes), np.array(keep, np.int64), dropped, truncated, merged, float(np.mean(sizes)),
        max(sizes), unknown,
    )  # fmt: skip
    if not keep:
        raise UserError(f"no pair is left at length {length}: {cut}")
    heads, one, other = ([ids[i] for i in keep] for ids in (heads, *sides))
    return heads, one, other, cut


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    template: str = "auto",
    bos: bool | str = "auto",
    separator: str = "",
) -> Ids:
    """Ids of prompts for generation: those that ``tokenise_pairs`` trains with."""
    return _way(tokenizer, template, bos, False, separator, False).prompts(prompts)[1]


def encode_answers(
    prompts: Sequence[Prompt],
    said: Sequence[str],
    tokenizer: Any,
    *,
    template: str = "auto",
    bos: bool | str = "auto",
    eos: bool = True,
    separator: str = "",
) -> tuple[Ids, Ids]:
    """Ids of prompts (as ``encode_prompts``) and of one response to each, for fine-tuning."""
    way = _way(tokenizer, template, bos, eos, separator, False)
    texts, heads = way.prompts(prompts)
    return heads, way.responses(prompts, texts, heads, said)[0]


def render(prompt: OneText, chosen: OneText, rejected: OneText, tokenizer: Any) -> str:
    """One pair as two lines of text, newlines escaped, trained-on tokens in double brackets."""
    lines = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        ids = np.array([[*prompt, *response]], np.int32)
        mask = (np.arange(ids.shape[1]) >= len(prompt)).astype(np.float32)[None]
        row = Table({"tokens": ids, "segment": np.ones_like(ids), "mask": mask})
        lines.append(f"{name}: {inspect.render(row, 0, tokenizer)}")
    return "\n".join(lines)


def encode(tokenizer: Any, texts: list[str]) -> Ids:
    """Ids of texts in which BOS and EOS may stand in words.

    SentencePiece (and a vocabulary that does not list them as added tokens) would spell such words
    out; there the text is cut at them.
    """
    words = {tokenizer.token(i): i for i in (tokenizer.bos, tokenizer.eos) if i is not None}
    spelled = {word: i for word, i in words.items() if word and tokenizer.encode(word) != [i]}
    if not spelled:
        return tokenizer.encode_ids(texts)
    pattern = re.compile("(" + "|".join(map(re.escape, spelled)) + ")")

    def ids(text: str) -> list[int]:
        pieces = filter(None, pattern.split(text))
        parts = ([spelled[p]] if p in spelled else tokenizer.encode(p) for p in pieces)
        return [i for part in parts for i in part]

    return [ids(text) for text in texts]


def _way(
    tokenizer: Any, name: str, bos: bool | str, eos: bool, separator: str, delta: bool
) -> _Way:
    if bos not in (True, False, "auto"):
        raise UserError(f"tokenise_pairs: bos must be True, False or 'auto', got {bos!r}")
    form = replace(template(tokenizer, name), separator=separator)
    if bos is True and tokenizer.bos is None:
        raise UserError("tokenise_pairs: bos=True, but the tokenizer has no BOS token")
    start = tokenizer.bos if bos is True or (bos == "auto" and not form.own) else None
    before, after = _around(form)
    if before.strip():
        log.warning("the chat template %r writes %r before every answer", form.name, before)
    closed = bool(after.strip()) and not delta
    if tokenizer.eos is None and (delta or (eos and not closed)):
        raise UserError("the tokenizer has no EOS token to end responses with: pass eos=False")
    end = tokenizer.eos if delta or (eos and not closed) else None
    return _Way(tokenizer, form, start, end, delta)


def _around(form: Template) -> tuple[str, str]:
    """What a template writes between a prompt and its answer, and after the answer."""
    answer = "ANSWER"
    prompt, (before, _, after) = form.prompt("q"), form.whole("q", answer).rpartition(answer)
    return before[len(prompt) :] if before.startswith(prompt) else "", after


def _columns(table: Table) -> tuple[list[Prompt], list[str], list[str]]:
    if not len(table):
        raise UserError("tokenise_pairs: there are no pairs")
    every = np.arange(len(table))
    prompts, chosen, rejected = (list(table[n][every]) for n in TEXTS)
    for name, column in zip(TEXTS, (prompts, chosen, rejected), strict=True):
        kinds = (str, list) if name == "prompt" else (str,)
        for i, value in enumerate(column):
            if not isinstance(value, kinds):
                raise UserError(
                    f"{_name(table, i)}: column {name!r} must be text, got {type(value).__name__}"
                )
    return prompts, chosen, rejected


def _name(table: Table, row: int) -> str:
    return f"pair {table['id'][row]}" if "id" in table else f"pair {row}"


def _unknown(way: _Way, prompts: list[Prompt], *responses: list[str]) -> float:
    """Share of unknown tokens in an even sample, the template's words included; too many are
    refused."""
    tokenizer, step = way.tokenizer, -(-len(prompts) // SAMPLE)
    asked = [way.template.prompt(prompt) for prompt in prompts[::step]]
    sample = asked + [text for side in responses for text in side[::step]]
    share = tokenizer.unknown_share(sample)
    if share > MOST_UNKNOWN:
        worst = max(sample, key=lambda text: tokenizer.unknown_share([text]))
        raise UserError(
            f"the tokenizer cannot encode the pairs: {share:.0%} of the tokens are unknown, e.g. "
            f"in {worst[:60]!r}; use a model whose tokenizer covers them"
        )
    return share


def _arrays(ids: Ids) -> Arrays:
    return [np.asarray(one, np.int32) for one in ids]


def _lost(
    table: Table, head: np.ndarray, sizes: Sequence[np.ndarray], length: int | None, on_long: str
) -> dict[str, np.ndarray]:
    """Why pairs are dropped: reason -> [N] bool; a pair counts for the first that holds."""
    longest = head + np.maximum(*sizes)
    lost = {"empty": (head == 0) | (np.minimum(*sizes) == 0)}
    if length is None:
        return lost
    if on_long == "delta":
        return lost | {"with a long prompt": head >= length - 2}
    if on_long == "truncate":
        return lost | {"with a long prompt": head >= length}
    if on_long == "error" and longest.max() > length:
        worst = int(longest.argmax())
        raise UserError(
            f"{_name(table, worst)} has {longest[worst]} tokens, more than length {length}: raise "
            "the length or pass on_long='drop'"
        )
    return lost | {"too long": longest > length}


def _cut(
    table: Table,
    heads: Arrays,
    sides: tuple[Arrays, Arrays],
    length: int | None,
    on_long: str,
    end: int | None,
) -> tuple[list[int], dict[str, int], int]:
    """Truncate ``sides`` in place by the rule; the pairs that are left, the others by reason, and
    how many responses were truncated. A response cut by the rule "delta" ends with ``end``."""
    head = np.array([len(ids) for ids in heads])
    sizes = [np.array([len(ids) for ids in side]) for side in sides]
    gone, counts = np.zeros(len(heads), bool), {}
    for reason, where in _lost(table, head, sizes, length, on_long).items():
        counts[reason] = int((where & ~gone).sum())
        gone |= where
    room = (length or ANY) - head
    last = np.array([end] if on_long == "delta" else [], np.int32)
    truncated = 0
    for side, size in zip(sides, sizes, strict=True):
        over = np.flatnonzero(~gone & (size > room))
        for i in over:
            side[i] = np.concatenate([side[i][: room[i] - len(last)], last])
        truncated += len(over)
    left = np.flatnonzero(~gone).tolist()
    keep = [i for i in left if not np.array_equal(sides[0][i], sides[1][i])]
    counts["the same in both responses"] = len(left) - len(keep)
    return keep, counts, truncated
