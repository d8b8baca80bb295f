"""Formats word for word on hand-made rows, with both coins; splits balanced, disjoint, stable."""

import gzip
import json
import random

import numpy as np
import pytest

from w2s_jax.data import tasks
from w2s_jax.errors import UserError

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


# Splits


def _write(path, rows):
    with gzip.open(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _boolq(count, split, positive=0.7, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "id": f"{split}-{i}",
            "split": split,
            "passage": f"passage {split} {i}",
            "question": f"is it {i}",
            "label": int(rng.random() < positive),
        }
        for i in range(count)
    ]


def _sciq(count, split):
    words = ("correct_answer", "distractor1", "distractor2", "distractor3")
    return [
        {"id": f"{split}-{i}", "split": split, "question": f"question {i}"}
        | {word: f"{word[:2]} {i} {j}" for j, word in enumerate(words)}
        for i in range(count)
    ]


def _tables(splits):
    return {name: getattr(splits, name) for name in ("train", "transfer", "dev", "test")}


def test_balanced_disjoint_and_typed(tmp_path):
    _write(tmp_path / "boolq.jsonl.gz", _boolq(400, "train") + _boolq(100, "validation"))
    splits = tasks.load("boolq", seed=0, data=tmp_path)
    every = []
    for table in _tables(splits).values():
        assert table["truth"].sum() * 2 == len(table) > 0
        assert table["label"].dtype == np.float32 and table["truth"].dtype == np.int32
        assert np.array_equal(table["label"].argmax(1), table["truth"])
        assert np.array_equal(table["label"].sum(1), np.ones(len(table)))
        every += table["id"].tolist()
    assert len(every) == len(set(every))
    assert len(splits.train) == len(splits.transfer)
    assert all("passage validation" in prompt for prompt in splits.test["prompt"])
    zeros = sum(1 - row["label"] for row in _boolq(400, "train"))
    assert 2 * zeros - 2 <= len(splits.train) * 2 + len(splits.dev) <= 2 * zeros


def test_sizes_are_per_half_and_smaller_sets_are_prefixes_of_the_coin(tmp_path):
    _write(tmp_path / "sciq.jsonl.gz", _sciq(500, "train") + _sciq(80, "test"))
    splits = tasks.load("sciq", seed=0, data=tmp_path, train=60, dev=20, test=30)
    assert [len(table) for table in _tables(splits).values()] == [60, 60, 20, 30]
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())


def test_test_set_does_not_depend_on_the_seed(tmp_path):
    _write(tmp_path / "sciq.jsonl.gz", _sciq(300, "train") + _sciq(100, "test"))
    one, other = (tasks.load("sciq", seed=seed, data=tmp_path, test=40) for seed in (1, 2))
    assert one.test.digest() == other.test.digest()
    assert one.train.digest() != other.train.digest()
    again = tasks.load("sciq", seed=1, data=tmp_path, test=40)
    assert all(_tables(again)[k].digest() == _tables(one)[k].digest() for k in _tables(one))


def test_questions_met_in_test_leave_training(tmp_path):
    """Half of the training rows repeat test questions; the coins would hide that from an id."""
    test = _sciq(60, "test")
    copies = [row | {"split": "train", "id": f"copy-{row['id']}"} for row in test]
    fresh = [row | {"question": f"fresh {i}"} for i, row in enumerate(_sciq(60, "train"))]
    path = _write(tmp_path / "x.jsonl.gz", test + copies + fresh)
    splits = tasks.load("sciq", seed=3, data=path)
    tested = set(splits.test["prompt"])
    for name in ("train", "transfer", "dev"):
        assert not tested & set(_tables(splits)[name]["prompt"])


def test_duplicates_count_once(tmp_path):
    rows = _sciq(100, "train")
    path = _write(tmp_path / "x.jsonl.gz", rows * 3 + _sciq(30, "test"))
    splits = tasks.load("sciq", seed=0, data=path)
    prompts = [p for table in _tables(splits).values() for p in table["prompt"]]
    assert len(prompts) == len(set(prompts)) <= 100


def test_one_split_only_is_divided_by_unit(tmp_path):
    rows = [
        {"context": f"c{i // 5}", "question": f"q{i}", "answers": ENDINGS, "label": i % 4}
        for i in range(1000)
    ]
    splits = tasks.load("quail", seed=0, data=_write(tmp_path / "quail.jsonl.gz", rows))
    passage = {
        name: {prompt.split("\n")[2] for prompt in table["prompt"]}
        for name, table in _tables(splits).items()
    }
    assert not passage["test"] & (passage["train"] | passage["transfer"] | passage["dev"])
    assert 100 < len(splits.test) < 300  # one in five of 1000


@pytest.mark.parametrize("columns", [("text", "label"), ("txt", "hard_label")])
def test_own_file(tmp_path, columns):
    rows = [dict(zip(columns, (f"text {i}", i % 2), strict=True)) for i in range(200)]
    splits = tasks.load("mydata", seed=0, data=_write(tmp_path / "own.jsonl.gz", rows))
    assert splits.train["prompt"][0].startswith("text ")
    number = [int(prompt.split()[1]) for prompt in splits.train["prompt"]]
    assert np.array_equal(np.array(number) % 2, splits.train["truth"])


def test_own_pairs_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": f"p {i}", "response": f" r {i}", "label": i % 2, "split": s}
        for i, s in enumerate(["train"] * 80 + ["test"] * 20)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    splits = tasks.load("mine", seed=0, data=tmp_path)
    assert len(splits.test) == 20
    assert sorted(splits.test["prompt"].tolist()) == sorted(f"p {i}" for i in range(80, 100))


def test_hyphens_are_underscores(tmp_path):
    rows = _boolq(100, "train") + _boolq(40, "test")
    rows = [{"label": row["label"], "scenario": row["passage"]} | row for row in rows]
    _write(tmp_path / "ethics_justice.jsonl.gz", rows)
    assert len(tasks.load("ethics-justice", seed=0, data=tmp_path).test) > 0


def test_arithmetic_is_built_in_and_disjoint():
    pytest.importorskip("w2s_jax.data.arithmetic")
    splits = tasks.load("arithmetic", seed=1, train=32, test=24, dev=16)
    other = tasks.load("arithmetic", seed=2, train=32, test=24, dev=16)
    assert [len(table) for table in _tables(splits).values()] == [32, 32, 16, 24]
    assert splits.test.digest() == other.test.digest()
    prompts = [p for table in _tables(splits).values() for p in table["prompt"]]
    assert len(prompts) == len(set(prompts))
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())


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


LOCAL = sorted(
    {"boolq", "cosmos_qa", "ethics_justice", "ethics_virtue", "ethics_utilitarianism", "anli_r2"}
    | {"hellaswag", "piqa", "quail", "sciq", "sciq_with_support", "social_i_qa", "winogrande"}
    | {"commonsense_qa", "arc_easy", "arc_challenge", "strategy_qa", "ethics_commonsense"}
    | {"sms_spam", "sentiment_sentences", "twenty_newsgroups_6", "clinc150", "banking77"}
)


def test_every_local_file_has_a_task(shared_data):
    stems = {path.name.split(".")[0] for path in (shared_data / "text_cls").glob("*.jsonl.gz")}
    assert stems == {tasks.TASKS[name].file or name for name in LOCAL}


@pytest.mark.parametrize("name", LOCAL)
def test_local_files_load(shared_data, name):
    splits = tasks.load(name, seed=0, data=shared_data / "text_cls", train=40, dev=10, test=40)
    assert [len(table) for table in _tables(splits).values()] == [40, 40, 10, 40]
    assert all(table["truth"].mean() == 0.5 for table in _tables(splits).values())
    every = [one for table in _tables(splits).values() for one in table["id"]]
    assert len(every) == len(set(every)) == 130


# Bad input: one line that names the place


GOOD = {"id": "r1", "passage": "p", "question": "q", "label": 1}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("boolq", GOOD | {"label": 2}, "row r1: field 'label' is 2, out of range 0..1"),
        ("boolq", GOOD | {"label": "yes"}, "row r1: field 'label' must be a whole number"),
        ("boolq", GOOD | {"label": 0.5}, "row r1: field 'label' must be a whole number"),
        ("boolq", GOOD | {"label": None}, "row r1: field 'label' must be a whole number"),
        ("boolq", {"id": "r1", "passage": "p", "question": "q"}, "no field answer or label"),
        ("boolq", {"id": "r1", "label": 1, "question": "q"}, "row r1: no field 'passage'"),
        ("boolq", GOOD | {"passage": 3}, "row r1: field 'passage' must be text, got int"),
        ("hellaswag", {"id": "r1", "ctx": "c", "endings": "e", "label": 0}, "list of texts"),
        ("hellaswag", {"id": "r1", "ctx": "c", "endings": ["e"], "label": 0}, "at least 2"),
        ("cola", {"id": "r1", "sentence": "s", "label": -1}, "is -1, out of range"),
        ("social_i_qa", SIQA | {"id": "r1", "label": "0"}, "out of range 1..3"),
        ("openbookqa", ASKED["openbookqa"][0] | {"id": "r1", "answerKey": "E"}, "not one of"),
        ("dream", ASKED["dream"][0] | {"id": "r1", "answer": "z"}, "not one of 'choice'"),
        ("winogrande", ASKED["winogrande"][0] | {"id": "r1", "sentence": "s"}, "no blank"),
        ("mine", {"id": "r1", "text": "t"}, "row r1: no field label or hard_label"),
        ("mine", {"id": "r1", "prompt": "t", "label": 1}, "row r1: no field 'response'"),
    ],
)
def test_bad_rows_name_file_and_row(tmp_path, name, row, message):
    path = _write(tmp_path / "bad.jsonl.gz", [row])
    with pytest.raises(UserError, match=message) as caught:
        tasks.load(name, seed=0, data=path)
    assert str(path) in str(caught.value) and "row r1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_requests(tmp_path):
    _write(tmp_path / "boolq.jsonl.gz", _boolq(50, "train", positive=1.1) + _boolq(9, "validation"))
    with pytest.raises(UserError, match=r"unknown task 'nope'.*boolq.*--data"):
        tasks.load("nope", seed=0)
    with pytest.raises(UserError, match=r"no piqa\.jsonl.*it has boolq\.jsonl\.gz"):
        tasks.load("piqa", seed=0, data=tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        tasks.load("piqa", seed=0, data=tmp_path / "gone")
    with pytest.raises(UserError, match="too few rows.*class may be missing"):
        tasks.load("boolq", seed=0, data=tmp_path)
    with pytest.raises(UserError, match="train=1 rows; at least 2"):
        tasks.load("boolq", seed=0, data=tmp_path, train=1)
    with pytest.raises(UserError, match="no Hub copy"):
        tasks.load("banking77", seed=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        tasks.load("piqa", seed=0, data=tmp_path / "empty.jsonl")
