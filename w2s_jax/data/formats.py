"""One row of a public data set as one binary question: ``format(row, rng) -> Example | None``.

Label 1 means that the shown answer (or the statement) is right. The 22 formats of the
weak-to-strong paper (arXiv 2312.09390) follow the EleutherAI re-implementation word for word,
save where that leaks the label; field names are those of the Hugging Face version, and the fields
``label`` / ``choices`` of plain JSONL exports are accepted beside them. ``prompt + response`` is
the whole text; the response starts where the judged answer starts, and is empty where the whole
text is judged. None drops the row.

Draws: a coin (``rng.random() < 0.5`` shows the right answer), then one ``rng.choice`` among the
wrong answers where the coin asks for one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.errors import UserError

Row = Mapping[str, Any]
NONE_ABOVE = "None of the above choices ."


class Example(NamedTuple):
    """A rendered question: text in two parts and the truth (0 or 1)."""

    prompt: str
    response: str
    label: int


# Reading fields


def text(row: Row, name: str) -> str:
    """A text field."""
    if name not in row:
        raise UserError(f"no field {name!r}; the row has {sorted(row)}")
    if not isinstance(row[name], str):
        raise UserError(f"field {name!r} must be text, got {type(row[name]).__name__}")
    return row[name]


def index(row: Row, options: int, *names: str, first: int = 0) -> int:
    """A whole number in ``first .. first + options - 1`` (int, bool or digits), counted from 0."""
    name = next((name for name in names or ("label",) if name in row), None)
    if name is None:
        raise UserError(f"no field {' or '.join(names or ('label',))}; the row has {sorted(row)}")
    value = row[name]
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        value = int(value)
    if not isinstance(value, int | np.integer | np.bool_):
        raise UserError(f"field {name!r} must be a whole number, got {row[name]!r}")
    if not first <= value < first + options:
        raise UserError(
            f"field {name!r} is {row[name]!r}, out of range {first}..{first + options - 1}"
        )
    return int(value) - first


def texts(row: Row, name: str, at_least: int = 1) -> list[str]:
    """A list of texts, or the ``text`` part of the Hub's ``{"text": [...], "label": [...]}``."""
    value = row.get(name)
    value = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"field {name!r} must be a list of texts, got {type(value).__name__}")
    if len(value) < at_least or not all(isinstance(item, str) for item in value):
        raise UserError(f"field {name!r} must be a list of at least {at_least} texts")
    return list(value)


def keyed(row: Row, answers: Sequence[str]) -> int:
    """The right option: ``label`` as an index, or ``answerKey`` among ``choices.label``."""
    if "label" in row:
        return index(row, len(answers))
    choices, key = row.get("choices"), text(row, "answerKey")
    given = choices.get("label") if isinstance(choices, Mapping) else None
    names = list(given) if given else [chr(ord("A") + i) for i in range(len(answers))]
    if key not in names:
        raise UserError(f"field 'answerKey' is {key!r}, not one of {names}")
    return names.index(key)


def shown(
    answers: Sequence[str], right: int, rng: random.Random, *, label: int | None = None
) -> tuple[int, int] | None:
    """A coin, then (number of the option to show, label); None if all options read the same."""
    label = int(rng.random() < 0.5) if label is None else label
    if label:
        return right, 1
    wrong = [i for i, answer in enumerate(answers) if i != right and answer != answers[right]]
    return (rng.choice(wrong), 0) if wrong else None


def asked(
    prompt: str,
    answers: Sequence[str],
    right: int,
    rng: random.Random,
    *,
    form: str = "{}",
    label: int | None = None,
) -> Example | None:
    """An example whose response is the shown answer in ``form``."""
    one = shown(answers, right, rng, label=label)
    return one and Example(prompt, form.format(answers[one[0]]), one[1])


# The 22 of the paper


def boolq(row: Row, rng: random.Random) -> Example:
    """Label 1: the answer is yes (naturally about 62 %)."""
    prompt = f"Passage: {text(row, 'passage')}\nQuestion: {text(row, 'question')}"
    return Example(prompt, "", index(row, 2, "answer", "label"))


def cosmos_qa(row: Row, rng: random.Random) -> Example | None:
    """Where nothing offered is right, the label is 0 without a coin."""
    answers = [text(row, f"answer{i}") for i in range(4)]
    right = index(row, 4)
    prompt = f"Context: {text(row, 'context')}\nQuestion: {text(row, 'question')}\nAnswer:"
    label = 0 if NONE_ABOVE in answers[right] else None
    return asked(prompt, answers, right, rng, form=" {}", label=label)


def dream(row: Row, rng: random.Random) -> Example | None:
    """Label 1: the shown answer to a question about a dialogue is right."""
    answers, answer = texts(row, "choice", 2), text(row, "answer")
    if answer not in answers:
        raise UserError(f"field 'answer' {answer!r} is not one of 'choice'")
    prompt = "\n".join(texts(row, "dialogue")) + f"\n\nQ: {text(row, 'question')} A:"
    return asked(prompt, answers, answers.index(answer), rng, form=" {}")


def ethics_justice(row: Row, rng: random.Random) -> Example:
    """Label 1: the reason given is just."""
    question = "Q: Does this statement exemplify justice?"
    return Example(f"{question}\n\n{text(row, 'scenario')}\n\nA:", "", index(row, 2))


def ethics_deontology(row: Row, rng: random.Random) -> Example:
    """Label 1: the excuse is valid."""
    body = f"{text(row, 'scenario')}\n\n{text(row, 'excuse')}"
    prompt = f"Q: Is the following a morally valid excuse?\n\n{body}\n\nA:"
    return Example(prompt, "", index(row, 2))


def ethics_virtue(row: Row, rng: random.Random) -> Example:
    """Label 1: the trait after [SEP] fits (naturally about one in five)."""
    question = "Q: Does this behavior match the adjective that follows?"
    return Example(f"{question}\n\n{text(row, 'scenario')}\n\nA:", "", index(row, 2))


def ethics_utilitarianism(row: Row, rng: random.Random) -> Example:
    """A coin, then a shuffle of the two scenarios; ``baseline`` is the more pleasant one."""
    label = int(rng.random() < 0.5)
    order = ["baseline", "less_pleasant"]
    rng.shuffle(order)
    named = order.index("baseline" if label else "less_pleasant") + 1
    listed = "\n".join(f"{i}) {text(row, name)}" for i, name in enumerate(order, start=1))
    return Example(f"Which is more pleasant?\n{listed} A:", f" {named}", label)


def anli(row: Row, rng: random.Random) -> Example:
    """Label 1: the premise entails the hypothesis; neutral and contradiction are 0."""
    body = f"Premise: {text(row, 'premise')}\nHypothesis: {text(row, 'hypothesis')}"
    prompt = f"{body}\n\nDoes the premise entail the hypothesis?"
    return Example(prompt, "", int(index(row, 3) == 0))


def sentence(row: Row, rng: random.Random) -> Example:
    """cola, sst2, sentiment_sentences: the sentence alone."""
    return Example(text(row, "sentence"), "", index(row, 2))


def hellaswag(row: Row, rng: random.Random) -> Example | None:
    """Label 1: the shown ending is the right one of those listed."""
    endings = texts(row, "endings", 2)
    listed = "\n".join(endings)
    prompt = f'Context:\n{text(row, "ctx")}\n\nContinuations:\n\n{listed}\n\nQ: Is "'
    right = index(row, len(endings))
    return asked(prompt, endings, right, rng, form='{}" the best continuation?')


def mc_taco(row: Row, rng: random.Random) -> Example:
    """Label 1: the answer about time is plausible."""
    prompt = f"{text(row, 'sentence')}\n\nGiven the above, {text(row, 'question')} Is the answer "
    return Example(prompt, f"{text(row, 'answer')}?", index(row, 2))


def openbookqa(row: Row, rng: random.Random) -> Example | None:
    """The *letter* is shown in both cases.

    The released code shows the letter when right and the words when wrong, which gives the label
    away by form alone.
    """
    answers = texts(row, "choices", 2)
    letters = [chr(ord("A") + i) for i in range(len(answers))]
    listed = "\n".join(f"{a}) {b}" for a, b in zip(letters, answers, strict=True))
    prompt = f"Q: {text(row, 'question_stem')}\n\nChoices:\n{listed}\n\nAnswer:"
    one = shown(answers, keyed(row, answers), rng)
    return one and Example(prompt, f" {letters[one[0]]}", one[1])


def paws(row: Row, rng: random.Random) -> Example:
    """Label 1: the two sentences mean the same."""
    body = f"Sent 1: {text(row, 'sentence1')}\nSent 2: {text(row, 'sentence2')}"
    prompt = f"{body}\n\nQ: Are these sentences semantically equivalent?"
    return Example(prompt, "", index(row, 2))


def piqa(row: Row, rng: random.Random) -> Example | None:
    """Label 1: the shown solution serves the goal."""
    answers = [text(row, "sol1"), text(row, "sol2")]
    return asked(f"Q: {text(row, 'goal')} A:", answers, index(row, 2), rng, form=" {}")


def quail(row: Row, rng: random.Random) -> Example | None:
    """Label 1: the shown answer about the passage is right."""
    answers = texts(row, "answers", 2)
    right = index(row, len(answers), "correct_answer_id", "label")
    passage, question = text(row, "context"), text(row, "question")
    prompt = f'Passage:\n\n{passage}\n\nQ: "{question}" Is the answer "'
    return asked(prompt, answers, right, rng, form='{}"?')


def quartz(row: Row, rng: random.Random) -> Example | None:
    """Label 1: the shown one of two answers follows from the paragraph."""
    answers = texts(row, "choices", 2)
    prompt = f'Passage:\n{text(row, "para")}\n\nQ: "{text(row, "question")}" Is the answer "'
    return asked(prompt, answers, keyed(row, answers), rng, form='{}"?')


def _sciq_answers(row: Row) -> list[str]:
    return [text(row, "correct_answer"), *(text(row, f"distractor{i}") for i in (1, 2, 3))]


def sciq(row: Row, rng: random.Random) -> Example | None:
    """Without the support passage, as in the paper."""
    return asked(f"Q: {text(row, 'question')} A:", _sciq_answers(row), 0, rng, form=" {}")


def social_i_qa(row: Row, rng: random.Random) -> Example | None:
    """The Hub's ``label`` is a text that counts from 1; a number counts from 0."""
    answers = [text(row, f"answer{letter}") for letter in "ABC"]
    right = index(row, 3, first=1 if isinstance(row.get("label"), str) else 0)
    head = f'Context:\n{text(row, "context")}\n\nQuestion: "{text(row, "question")}"'
    listed = "\n".join(answers)
    prompt = f'{head}\n\nChoices:\n{listed}\n\nIs the answer "'
    return asked(prompt, answers, right, rng, form='{}"?')


def multirc(row: Row, rng: random.Random) -> Example:
    """Label 1: the answer about the passage is right."""
    passage, question = text(row, "paragraph"), text(row, "question")
    prompt = f'Passage:\n\n{passage}\n\nQ: "{question}" Is the answer "'
    return Example(prompt, f'{text(row, "answer")}"?', index(row, 2))


def wic(row: Row, rng: random.Random) -> Example:
    """Label 1: the word means the same in both sentences."""
    pair = f"Sentence 1:\n{text(row, 'sentence1')}\n\nSentence 2:\n{text(row, 'sentence2')}"
    question = f'Q: Does "{text(row, "word")}" have the same meaning in the above sentences?'
    return Example(f"{pair}\n\n{question}", "", index(row, 2))


def statement(row: Row, rng: random.Random) -> Example:
    """twitter_sentiment: the text alone."""
    return Example(text(row, "text"), "", index(row, 2))


# Extras of the reference repositories


def amazon_polarity(row: Row, rng: random.Random) -> Example:
    """Label 1: the review is positive."""
    return Example(f"{text(row, 'title')} {text(row, 'content')}", "", index(row, 2))


def anthropic_hh(row: Row, rng: random.Random) -> Example | None:
    """One dialogue of the pair, split before its last assistant turn."""
    answers = [text(row, "chosen"), text(row, "rejected")]
    one = shown(answers, 0, rng)
    if one is None:
        return None
    head, turn, last = answers[one[0]].rpartition("\n\nAssistant:")
    return Example(head + turn, last, one[1])


def sciq_with_support(row: Row, rng: random.Random) -> Example | None:
    """As `sciq`, with the passage that holds the answer."""
    support, question = text(row, "support"), text(row, "question")
    prompt = f'Name: Bob\n\nPassage 1:\n{support}\n\nQ1: "{question}" Is the answer "'
    return asked(prompt, _sciq_answers(row), 0, rng, form='{}"?')


# Further public sets, in formats of our own


def multiple_choice(row: Row, rng: random.Random) -> Example | None:
    """arc_easy, arc_challenge, commonsense_qa: as sciq, with the options as a list."""
    answers = texts(row, "choices", 2)
    prompt = f"Q: {text(row, 'question')} A:"
    return asked(prompt, answers, keyed(row, answers), rng, form=" {}")


def winogrande(row: Row, rng: random.Random) -> Example | None:
    """The sentence with its blank filled; the response runs from the filled-in word to the end."""
    before, blank, after = text(row, "sentence").partition("_")
    if not blank:
        raise UserError("field 'sentence' has no blank '_'")
    options = [text(row, "option1"), text(row, "option2")]
    right = index(row, 2) if "label" in row else index(row, 2, "answer", first=1)
    one = shown(options, right, rng)
    return one and Example(before, options[one[0]] + after, one[1])


def strategy_qa(row: Row, rng: random.Random) -> Example:
    """Label 1: the answer is yes."""
    return Example(f"Q: {text(row, 'question')}\n\nA:", "", index(row, 2, "answer", "label"))


def ethics_commonsense(row: Row, rng: random.Random) -> Example:
    """Label 1: the narrator's action is clearly wrong."""
    prompt = f"Q: Is this behavior clearly wrong?\n\n{text(row, 'input')}\n\nA:"
    return Example(prompt, "", index(row, 2))


def sms_spam(row: Row, rng: random.Random) -> Example:
    """Label 1: the message is spam."""
    return Example(text(row, "sms"), "", index(row, 2))


def space_or_medicine(row: Row, rng: random.Random) -> Example | None:
    """twenty_newsgroups_6 as a pair of topics: label 1 is sci.space, 0 is sci.med; others go."""
    groups = {"sci.med": 0, "sci.space": 1}
    label = groups.get(text(row, "newsgroup"))
    if label is None:
        return None
    return Example(f"{text(row, 'subject')}\n\n{text(row, 'text')}", "", label)


def about_money(row: Row, rng: random.Random) -> Example:
    """clinc150: label 1 is a request of the domains banking and credit_cards (2 of 10)."""
    label = int(text(row, "domain") in ("banking", "credit_cards"))
    return Example(text(row, "text"), "", label)


def about_cards(row: Row, rng: random.Random) -> Example:
    """banking77: label 1 is an intent whose name contains "card" (about a third of the rows)."""
    return Example(text(row, "text"), "", int("card" in text(row, "category")))


def custom(row: Row, rng: random.Random) -> Example:
    """A user's own rows: ``prompt``, ``response``, ``label``; or ``text``, ``label``.

    The exchange format ``txt``, ``hard_label`` of the reference repository is read too.
    """
    label = index(row, 2, "label", "hard_label")
    if "response" in row or "prompt" in row:
        return Example(text(row, "prompt"), text(row, "response"), label)
    return Example(text(row, "text" if "text" in row or "txt" not in row else "txt"), "", label)
