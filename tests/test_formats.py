"""Formats word for word on hand-made rows, with both outcomes of the coin."""

import random

import numpy as np
import pytest

from w2s_jax.data import tasks

CHOICES = {"text": ["up", "down", "left", "right"], "label": ["A", "B", "C", "D"]}
PAIR = {"text": ["more", "less"], "label": ["A", "B"]}
ENDINGS = ["e0", "e1", "e2", "e3"]
SCIQ = {"question": "q", "correct_answer": "yes", "support": "s"} | {
    f"distractor{i}": f"no{i}" for i in (1, 2, 3)
}
SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "d"}
COSMOS = {"context": "c", "question": "q"} | {f"answer{i}": f"a{i}" for i in range(4)}

# task: (row, text with {} for the shown answer, right answer, wrong answers)
ASKED = {
    "cosmos_qa": (
        COSMOS | {"label": 2},
        "Context: c\nQuestion: q\nAnswer: {}",
        "a2",
        {"a0", "a1", "a3"},
    ),
    "dream": (
        {"dialogue": ["M: hi", "W: ho"], "question": "q", "choice": ["x", "y"], "answer": "y"},
        "M: hi\nW: ho\n\nQ: q A: {}",
        "y",
        {"x"},
    ),
    "hellaswag": (
        {"ctx": "c", "endings": ENDINGS, "label": "1"},
        'Context:\nc\n\nContinuations:\n\ne0\ne1\ne2\ne3\n\nQ: Is "{}" the best continuation?',
        "e1",
        {"e0", "e2", "e3"},
    ),
    "openbookqa": (
        {"question_stem": "q", "choices": CHOICES, "answerKey": "C"},
        "Q: q\n\nChoices:\nA) up\nB) down\nC) left\nD) right\n\nAnswer: {}",
        "C",
        {"A", "B", "D"},
    ),
    "piqa": ({"goal": "g", "sol1": "s", "sol2": "t", "label": 1}, "Q: g A: {}", "t", {"s"}),
    "quail": (
        {"context": "c", "question": "q", "answers": ENDINGS, "correct_answer_id": 3},
        'Passage:\n\nc\n\nQ: "q" Is the answer "{}"?',
        "e3",
        {"e0", "e1", "e2"},
    ),
    "quartz": (
        {"para": "p", "question": "q", "choices": PAIR, "answerKey": "B"},
        'Passage:\np\n\nQ: "q" Is the answer "{}"?',
        "less",
        {"more"},
    ),
    "sciq": (SCIQ, "Q: q A: {}", "yes", {"no1", "no2", "no3"}),
    "sciq_with_support": (
        SCIQ,
        'Name: Bob\n\nPassage 1:\ns\n\nQ1: "q" Is the answer "{}"?',
        "yes",
        {"no1", "no2", "no3"},
    ),
    "social_i_qa": (
        SIQA | {"label": "3"},
        'Context:\nc\n\nQuestion: "q"\n\nChoices:\na\nb\nd\n\nIs the answer "{}"?',
        "d",
        {"a", "b"},
    ),
    "anthropic_hh": (
        {"chosen": "H\n\nAssistant: good", "rejected": "H\n\nAssistant: bad"},
        "H\n\nAssistant: {}",
        "good",
        {"bad"},
    ),
    "winogrande": (
        {"sentence": "I saw _ run.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        "I saw {} run.",
        "Bob",
        {"Ann"},
    ),
    "commonsense_qa": (
        {"question": "q", "choices": CHOICES, "answerKey": "B"},
        "Q: q A: {}",
        "down",
        {"up", "left", "right"},
    ),
    "arc_easy": ({"question": "q", "choices": ["x", "y"], "label": 0}, "Q: q A: {}", "x", {"y"}),
}
ASKED["arc_challenge"] = ASKED["arc_easy"]

JUSTICE, VIRTUE = "exemplify justice?\n\nz\n\nA:", "adjective that follows?\n\nz [SEP] kind\n\nA:"
# task: (row without its label, label field, text, {label value: truth})
JUDGED = {
    "boolq": (
        {"passage": "p", "question": "q"},
        "answer",
        "Passage: p\nQuestion: q",
        {True: 1, False: 0},
    ),
    "ethics_justice": (
        {"scenario": "z"},
        "label",
        f"Q: Does this statement {JUSTICE}",
        {1: 1, 0: 0},
    ),
    "ethics_deontology": (
        {"scenario": "z", "excuse": "x"},
        "label",
        "Q: Is the following a morally valid excuse?\n\nz\n\nx\n\nA:",
        {1: 1, 0: 0},
    ),
    "ethics_virtue": (
        {"scenario": "z [SEP] kind"},
        "label",
        f"Q: Does this behavior match the {VIRTUE}",
        {1: 1, 0: 0},
    ),
    "anli_r2": (
        {"premise": "p", "hypothesis": "h"},
        "label",
        "Premise: p\nHypothesis: h\n\nDoes the premise entail the hypothesis?",
        {0: 1, 1: 0, 2: 0},
    ),
    "cola": ({"sentence": "s"}, "label", "s", {1: 1, 0: 0}),
    "sst2": ({"sentence": "s"}, "label", "s", {1: 1, 0: 0}),
    "mc_taco": (
        {"sentence": "s", "question": "q?", "answer": "a"},
        "label",
        "s\n\nGiven the above, q? Is the answer a?",
        {1: 1, 0: 0},
    ),
    "paws": (
        {"sentence1": "s", "sentence2": "t"},
        "label",
        "Sent 1: s\nSent 2: t\n\nQ: Are these sentences semantically equivalent?",
        {1: 1, 0: 0},
    ),
    "multirc": (
        {"paragraph": "p", "question": "q", "answer": "a"},
        "label",
        'Passage:\n\np\n\nQ: "q" Is the answer "a"?',
        {1: 1, 0: 0},
    ),
    "wic": (
        {"word": "w", "sentence1": "s", "sentence2": "t"},
        "label",
        'Sentence 1:\ns\n\nSentence 2:\nt\n\nQ: Does "w" have the same meaning in the above '
        "sentences?",
        {1: 1, 0: 0},
    ),
    "twitter_sentiment": ({"text": "t"}, "label", "t", {1: 1, 0: 0}),
    "amazon_polarity": ({"title": "t", "content": "c"}, "label", "t c", {1: 1, 0: 0}),
    "strategy_qa": ({"question": "q"}, "answer", "Q: q\n\nA:", {True: 1, False: 0}),
    "ethics_commonsense": (
        {"input": "i"},
        "label",
        "Q: Is this behavior clearly wrong?\n\ni\n\nA:",
        {1: 1, 0: 0},
    ),
    "sms_spam": ({"sms": "t"}, "label", "t", {1: 1, 0: 0}),
    "sentiment_sentences": ({"sentence": "s"}, "label", "s", {1: 1, 0: 0}),
    "twenty_newsgroups_6": (
        {"subject": "s", "text": "t"},
        "newsgroup",
        "s\n\nt",
        {"sci.space": 1, "sci.med": 0},
    ),
    "clinc150": (
        {"text": "t"},
        "domain",
        "t",
        {"banking": 1, "credit_cards": 1, "travel": 0, "oos": 0},
    ),
    "banking77": ({"text": "t"}, "category", "t", {"card_arrival": 1, "country_support": 0}),
}


def _draws(name, row, seeds=200):
    found = [tasks.TASKS[name].format(row, random.Random(seed)) for seed in range(seeds)]
    return [(example.prompt + example.response, example.label) for example in found]


@pytest.mark.parametrize("name", ASKED)
def test_shown_answer_formats(name):
    row, form, right, wrong = ASKED[name]
    draws = _draws(name, row)
    want = {(form.format(right), 1)} | {(form.format(answer), 0) for answer in wrong}
    assert set(draws) == want
    assert 70 < sum(label for _, label in draws) < 130  # a fair coin: 100 +- 4 deviations
    prompts = {tasks.TASKS[name].format(row, random.Random(seed)).prompt for seed in range(20)}
    assert len(prompts) == 1  # only the response depends on the coin


@pytest.mark.parametrize("name", JUDGED)
def test_statement_formats(name):
    row, field, want, labels = JUDGED[name]
    for value, truth in labels.items():
        assert set(_draws(name, row | {field: value}, 5)) == {(want, truth)}


def test_utilitarianism_shuffles_after_the_coin():
    draws = set(_draws("ethics_utilitarianism", {"baseline": "b", "less_pleasant": "l"}))
    first, second = "Which is more pleasant?\n1) b\n2) l A: ", "Which is more pleasant?\n1) l\n2) b"
    assert draws == {
        (first + "1", 1),
        (first + "2", 0),
        (second + " A: 2", 1),
        (second + " A: 1", 0),
    }


def test_every_task_has_a_fixture():
    assert set(tasks.TASKS) == set(ASKED) | set(JUDGED) | {"ethics_utilitarianism"}
    assert tasks.names() == ["arithmetic", *sorted(tasks.TASKS)]


def test_coin_then_choice():
    """The reference's draws: a coin; only a wrong answer draws once more."""
    for seed in range(50):
        rng, copy = random.Random(seed), random.Random(seed)
        example = tasks.TASKS["sciq"].format(SCIQ, rng)
        label = int(copy.random() < 0.5)
        assert example.label == label
        if not label:
            assert example.response == " " + copy.choice(["no1", "no2", "no3"])
        assert rng.random() == copy.random()


def test_cosmos_nothing_offered_is_right():
    row = COSMOS | {"label": 1, "answer1": "None of the above choices ."}
    assert {label for _, label in _draws("cosmos_qa", row)} == {0}
    assert all("None of the above" not in text for text, _ in _draws("cosmos_qa", row))


def test_local_variants_of_fields():
    local = {"question": "q", "choices": ["u", "d"], "label": 1, "answerKey": "B"}
    assert ("Q: q A: d", 1) in _draws("commonsense_qa", local)
    assert {t for t, y in _draws("social_i_qa", SIQA | {"label": 2}) if y} == {
        t for t, y in _draws("social_i_qa", SIQA | {"label": "3"}) if y
    }
    assert _draws("boolq", {"passage": "p", "question": "q", "label": 1}, 1)[0][1] == 1
    quail = {"context": "c", "question": "q", "answers": ENDINGS, "label": 3}
    assert set(_draws("quail", quail)) == set(_draws("quail", ASKED["quail"][0]))
    wino = ASKED["winogrande"][0] | {"label": 1}
    assert set(_draws("winogrande", wino)) == set(_draws("winogrande", ASKED["winogrande"][0]))


def test_wrong_options_equal_to_the_right_one_are_never_shown():
    row = {"question": "q", "choices": ["x", "x", "y"], "label": 0}
    assert set(_draws("arc_easy", row)) == {("Q: q A: x", 1), ("Q: q A: y", 0)}
    same = {"goal": "g", "sol1": "s", "sol2": "s", "label": 0}
    found = {tasks.TASKS["piqa"].format(same, random.Random(seed)) for seed in range(20)}
    assert None in found and len({one.label for one in found if one}) == 1


def _bag_of_words(examples):
    """Held-out accuracy of naive Bayes on the words of the response."""
    half = len(examples) // 2
    counts = ({}, {})
    for _, response, label in examples[:half]:
        for word in response.split():
            counts[label][word] = counts[label].get(word, 0) + 1
    right = 0
    for _, response, label in examples[half:]:
        score = sum(
            np.log(counts[1].get(w, 0) + 0.5) - np.log(counts[0].get(w, 0) + 0.5)
            for w in response.split()
        )
        right += (score > 0) == bool(label)
    return right / (len(examples) - half)


def test_openbookqa_answer_form_does_not_leak():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(200)]
    rows = []
    for i in range(4000):
        choices = {"text": rng.sample(words, 4), "label": list("ABCD")}
        key = rng.choice("ABCD")
        rows.append({"question_stem": f"q{i}", "choices": choices, "answerKey": key})
    fixed = [tasks.TASKS["openbookqa"].format(row, rng) for row in rows]
    leaky = []  # the released form: the letter when right, the distractor's words when wrong
    for row, example in zip(rows, fixed, strict=True):
        option = row["choices"]["text"]["ABCD".index(example.response.strip())]
        shown = example.response if example.label else " " + option
        leaky.append(example._replace(response=shown))
    assert _bag_of_words(leaky) > 0.99
    assert abs(_bag_of_words(fixed) - 0.5) < 4 * 0.5 / np.sqrt(2000)
