"""Our adapter beside the harness's own Hugging Face backend: the same requests, both answers.

    python -m w2s_jax.evaluation.parity --model nano-2

The model is exported, read back by ``transformers`` in float32 on the CPU, and asked the same
things: likelihoods of continuations (four to a context, of one token and of many, after an empty
context, after one that ends in a space, after one that is too long), rolling likelihoods of texts
in one window and in several, greedy answers with stop strings, and three whole tasks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.evaluation.harness import adapter
from w2s_jax.models import hf
from w2s_jax.types import Row

COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 1.0}}
"""
TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "answer": """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: final
generation_kwargs: {until: ["\\n\\n", "q :"], max_gen_toks: 96, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
filter_list:
  - name: last
    filter:
      - {function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}
      - {function: take_first}
""",
    "text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}{{response}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class Answers:
    """What one backend said: per kind of request its answers and the seconds that they took (the
    last time they were asked, compiled programs at hand), and the tasks' metrics."""

    said: dict[str, list[Any]]
    seconds: dict[str, float]
    metrics: dict[str, float]


def compare(
    name: str, *, items: int = 24, batch: int = 16, times: int = 2
) -> tuple[list[Row], Answers, Answers]:
    """Rows ``what``, ``ours``, ``theirs``, ``difference`` (and ``seconds``, ours over theirs), with
    all answers of either side.

    Args:
      name: model, as ``models.hf.load`` takes it.
      items: problems that are asked about.
      batch: rows that the Hugging Face backend reads at once.
      times: how often everything is asked; the last time is measured.

    Raises:
      UserError: the harness, torch or transformers is missing; no such model.
    """
    try:
        from lm_eval.models import huggingface
    except ImportError as error:
        raise UserError(f"parity needs pip install w2s_jax[eval,torch] ({error})") from None
    model, params, tokenizer = hf.load(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tasks = _write_tasks(path, items)
        hf.export(model, params, path / "model", tokenizer)
        asked = requests(items, model.config.max_length)
        kind: Any = huggingface.HFLM  # its decorator hides the arguments
        lm = kind(str(path / "model"), device="cpu", dtype="float32", batch_size=batch)
        theirs = _ask(lm, asked, tasks, times)
        ours = _ask(adapter(model, params, tokenizer), asked, tasks, times)
    return _rows(ours, theirs), ours, theirs


def requests(items: int, most: int) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the requests of each kind, with the edge cases; ``most`` tokens are a window."""
    problems = list(arithmetic.problems(7, items).rows())
    whole = [problem["prompt"] + problem["response"] for problem in problems]
    likely: list[tuple[Any, ...]] = []
    # A text is asked about in one way only: where one is cut into context and continuation at two
    # places, the other backend keeps logits for both and takes those of the wrong places
    # (lm_eval 0.4.13, `logits_cache`).
    for i, (problem, text) in enumerate(zip(problems, whole, strict=True)):
        context, final = text.rsplit(" ", 1)
        likely += (
            [(context, f" {digit}") for digit in (1, 2, 3, 4)],
            [(context + " ", number) for number in (final, "12", "120")],
            [(problem["prompt"], problem["response"]), (problem["prompt"], " a :")],
            [("", text)],
        )[i % 4]
    long = " ".join(whole)
    while len(long) < 6 * most:
        long += " " + long
    likely += [(long, " 12"), (long, " 13"), (long, problems[0]["response"])]
    rolled = [(text,) for text in [*whole, long, ""]]
    kinds = ({"until": ["####", "."], "max_gen_toks": 40}, {"until": "q", "max_gen_toks": 96})
    texts = [*(problem["prompt"] for problem in problems), long]
    answers = [(text, {**kind, "do_sample": False}) for text in texts for kind in kinds]
    return dict(zip(KINDS, (likely, rolled, answers), strict=True))


def _write_tasks(folder: Path, items: int) -> list[str]:
    """Three YAML tasks on one local JSONL file."""
    lines = []
    for row in arithmetic.problems(8, items).rows():
        context, final = (row["prompt"] + row["response"]).rsplit(" ", 1)
        choices = [str(int(final) + other) for other in (0, 1, 10, 3)]
        line = {name: row[name] for name in ("prompt", "response")}
        lines.append(json.dumps({**line, "context": context, "final": final, "choices": choices}))
    data = folder / "problems.jsonl"
    data.write_text("\n".join(lines), encoding="utf8")
    paths = []
    for name, text in TASKS.items():
        path = folder / f"{name}.yaml"
        common = COMMON.format(name=f"parity_{name}", data=data, cache=folder / "cache")
        path.write_text(common + text, encoding="utf8")
        paths.append(str(path))
    return paths


def _ask(
    lm: Any, asked: dict[str, list[tuple[Any, ...]]], tasks: Sequence[str], times: int
) -> Answers:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    said, seconds = {}, {}
    for kind, arguments in asked.items():
        listed = [Instance(kind, {}, given, 0) for given in arguments]  # type: ignore[arg-type]
        for _ in range(times):
            start = time.perf_counter()
            said[kind] = getattr(lm, kind)(listed)
            seconds[kind] = time.perf_counter() - start
    manager = TaskManager(include_defaults=False)
    evaluate: Callable[..., Any] = simple_evaluate
    found = evaluate(model=lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    metrics = {
        f"{task.removeprefix('parity_')} {metric.partition(',')[0]}": value
        for task, values in found["results"].items()
        for metric, value in values.items()
        if "," in metric and "_stderr" not in metric
    }
    return Answers(said, seconds, metrics)


def _rows(ours: Answers, theirs: Answers) -> list[Row]:
    likely, rolled, answers = (
        list(zip(ours.said[kind], theirs.said[kind], strict=True)) for kind in KINDS
    )
    nats = [(float(a[0]), float(b[0])) for a, b in likely]
    rows = [_means("log-likelihood, nats", nats)]
    same = [(float(a[1]), float(b[1])) for a, b in likely]
    rows.append(_means("is greedy", same))
    rows.append(_means("rolling log-likelihood, nats", [(float(a), float(b)) for a, b in rolled]))
    equal = float(np.mean([a == b for a, b in answers]))
    rows.append({"what": "greedy answers, share equal", "ours": 1.0, "theirs": equal})
    rows[-1]["difference"] = 1.0 - equal
    for row, kind in zip((rows[0], rows[2], rows[3]), KINDS, strict=True):
        row["seconds"] = ours.seconds[kind] / theirs.seconds[kind]
    for name, value in ours.metrics.items():
        rows.append(_means(f"task {name}", [(value, theirs.metrics[name])]))
        rows[-1]["difference"] /= max(1.0, abs(theirs.metrics[name]))  # perplexities may be large
    return rows


def _means(what: str, pairs: Sequence[tuple[float, float]]) -> Row:
    """Both means, and the largest difference of a single answer."""
    ours, theirs = np.array(pairs, np.float64).T
    gap = float(np.abs(ours - theirs).max())
    return {"what": what, "ours": ours.mean(), "theirs": theirs.mean(), "difference": gap}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    names = (
        "what",
        "ours",
        "Hugging Face",
        "largest difference (of large metrics relative)",
        "time, ours / theirs",
    )
    lines = [f"| {' | '.join(names)} |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = f"{row['seconds']:.2f}" if "seconds" in row else ""
        numbers = f"{row['ours']:.6g} | {row['theirs']:.6g} | {row['difference']:.1e}"
        lines.append(f"| {row['what']} | {numbers} | {ratio} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line: prints the table; exit code 1 where the backends disagree."""
    import tyro

    def parity(model: str = "nano-2", items: int = 24, batch: int = 16) -> list[Row]:
        """Our adapter beside the harness's own Hugging Face backend, on the CPU in float32.

        Args:
            model: Folder, shipped name or hub id.
            items: Problems that are asked about.
            batch: Rows that the Hugging Face backend reads at once.
        """
        return compare(model, items=items, batch=batch)[0]

    try:
        rows = tyro.cli(parity, args=argv, prog="python -m w2s_jax.evaluation.parity")
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(rows))
    if max(row["difference"] for row in rows) > 1e-3:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
