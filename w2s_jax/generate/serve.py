"""Responses from any server that speaks the OpenAI protocol: vLLM, SGLang, llama.cpp and others.

Every answer is appended to a file as it comes, so a run that is killed, or whose server dies, goes
on where it stopped: the same call asks only for what is missing. ``python -m
w2s_jax.generate.serve --help`` is the same for a file of prompts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax import workdir
from w2s_jax.errors import UserError
from w2s_jax.generate.answers import Kept, Meter
from w2s_jax.generate.server import Server, address
from w2s_jax.types import Table


def generate(
    table: Table,
    server: str,
    *,
    cache: str | Path,
    tokens: int,
    model: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    samples: int = 1,
    stop: Sequence[str] = (),
    key: int = 0,
    chat: bool | None = None,
    logps: bool = False,
    extra: Mapping[str, Any] | None = None,
    in_flight: int = 64,
    retries: int = 8,
    timeout: float = 600.0,
    key_variable: str = "OPENAI_API_KEY",
    progress: bool = True,
) -> Table:
    """Every row ``samples`` times, with what the server's model responds (see ``generate``).

    Each request carries its own seed, a function of ``key``, the prompt and the sample's number;
    where the server honours seeds, an answer does not depend on the other rows. Equal prompts in
    several rows are drawn separately. ``finish`` may also be a word of the server's own, such as
    "content_filter".

    Args:
      table: has ``prompt`` (text or lists of token ids) or ``messages`` (lists of
        ``{"role", "content"}``, any number of turns).
      server: its address, "http://localhost:8000" or with a path such as ".../v1".
      cache: folder in which answers are kept under a hash of model, prompt and settings.
      tokens: the most that a response may have.
      model: its name at the server; may be left out where the server has only one.
      top_k, min_p: sent only where set; vLLM, SGLang and llama.cpp know them.
      chat: ask through the server's chat template; default where the table has ``messages``.
      logps: also return ``response_logps``, float32 nats of each returned token. ``response_ids``
        is there where the server tells them (vLLM: ``extra={"return_token_ids": True}``).
      extra: more fields of the request, as the server names them.
      in_flight: requests that wait for an answer at once.
      retries: how often a request is repeated after 429, 5xx, a timeout or a lost connection,
        after a pause that grows to 8 s, or the one that the server asks for.
      timeout: seconds that one request may take.
      key_variable: the environment variable with the server's key; may be unset.

    Raises:
      UserError: a bad prompt or setting, a server that cannot be reached, refuses the key or
        lacks the model, a request it rejects, answers it does not give. What was answered stays.
    """
    stop = [stop] if isinstance(stop, str) else list(stop)
    if "" in stop:
        raise UserError("serve: a stop string is empty; leave it out or say where to stop")
    _check(tokens, samples, in_flight, retries, timeout, temperature, top_p)
    chat, prompts = _prompts(table, chat)
    place = Server(address(server), key_variable, retries, timeout)
    body = {
        "model": _run(place.only_model()) if model is None else model,
        "max_tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        **({"stop": stop} if stop else {}),
        **({"logprobs": True if chat else 1} if logps else {}),
        **({"top_k": top_k} if top_k else {}),
        **({"min_p": min_p} if min_p else {}),
        **(extra or {}),
    }
    kept = Kept(Path(cache), dict(chat=chat, body=body, key=key))
    asks = list(_asks(prompts, samples, kept.folder.name))
    if missing := [ask for ask in asks if ask.key not in kept.answers]:
        meter = Meter(len(missing), progress)
        try:
            failure = _run(_ask_all(place, body, chat, missing, kept, meter, in_flight))
        finally:
            kept.close()
        if failure is not None:
            have = sum(ask.key in kept.answers for ask in asks)
            raise UserError(
                f"{failure}; {have} of {len(asks)} answers are kept in {kept.folder}, "
                "the same call resumes"
            )
    return _table(table, [kept.answers[ask.key] for ask in asks], samples)


def _check(
    tokens: int,
    samples: int,
    in_flight: int,
    retries: int,
    timeout: float,
    temperature: float,
    top_p: float,
) -> None:
    least = dict(tokens=(tokens, 1), samples=(samples, 1), in_flight=(in_flight, 1))
    least |= dict(retries=(retries, 0), temperature=(temperature, 0))
    for name, (value, bound) in least.items():
        if not value >= bound:
            raise UserError(f"serve: {name} must be at least {bound}, got {value}")
    if not (timeout > 0 and 0 < top_p <= 1):
        raise UserError(f"serve: timeout > 0 and 0 < top_p <= 1, got {timeout} and {top_p}")


def _prompts(table: Table, chat: bool | None) -> tuple[bool, list[Any]]:
    """Whether to chat, and what each row asks: text, token ids or messages."""
    if chat is None:
        chat = "messages" in table
    turns = chat and "messages" in table
    column = table["messages" if turns else "prompt"]
    prompts = [_plain(value) for value in column[np.arange(len(table))]]
    for row, prompt in enumerate(prompts):
        if turns:
            good, want = _is_turns(prompt), 'a list of {"role", "content"}'
        else:
            ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
            good, want = isinstance(prompt, str) or (ids and not chat), "text"
        if not good:
            raise UserError(f"row {row}: the prompt must be {want}, got {prompt!r:.80}")
        last: Any = prompt[-1] if turns and prompt else prompt
        last = last["content"] if isinstance(last, dict) else last
        if not last or not str(last).strip():
            raise UserError(f"row {row}: the prompt is empty; drop the row or give it a text")
    if chat and not turns:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return chat, prompts


def _is_turns(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in prompt
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Ask:
    """One request: the name under which its answer is kept, its seed, its row and its prompt."""

    key: str
    seed: int
    row: int
    prompt: Any


def _asks(prompts: list[Any], samples: int, settings: str) -> Iterator[_Ask]:
    """Row 0 sample 0, row 0 sample 1, ...; a prompt's later occurrences are further draws."""
    seen: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        text = json.dumps(prompt, sort_keys=True)
        turn = seen[text] = seen.get(text, -1) + 1
        for sample in range(samples):
            name = json.dumps([text, turn, sample, settings])
            key = hashlib.sha256(name.encode()).hexdigest()[:24]
            yield _Ask(key, int(key[:8], 16) >> 1, row, prompt)


async def _ask_all(
    server: Server,
    body: dict[str, Any],
    chat: bool,
    asks: list[_Ask],
    kept: Kept,
    meter: Meter,
    in_flight: int,
) -> str | None:
    """Ask all; after a failure ask no more, but wait for what is in flight. The failure."""
    failures: list[str] = []
    queue = iter(asks)

    async def work(client: Any) -> None:
        for one in queue:
            try:
                answer = await server.ask(
                    client, body, chat=chat, prompt=one.prompt, seed=one.seed, row=one.row
                )
                kept.append(one.key, answer)
                meter.note(answer)
            except UserError as error:
                failures.append(str(error))
            if failures:
                return

    async with server.client() as client:
        await server.check_model(client, body["model"])
        await asyncio.gather(*(work(client) for _ in range(min(in_flight, len(asks)))))
    meter.close()
    return failures[0] if failures else None


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of ``work``; in a thread of its own where a loop runs already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    inner: list[Any] = []

    async def whole() -> Any:
        inner[:] = asyncio.get_running_loop(), asyncio.current_task()
        return await work

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(asyncio.run, whole())
        try:
            return job.result()
        except BaseException:
            if inner and not job.done():  # a notebook's interrupt must not wait for the rest
                inner[0].call_soon_threadsafe(inner[1].cancel)
            raise


def _table(table: Table, answers: list[dict[str, Any]], samples: int) -> Table:
    rows = table.take(np.repeat(np.arange(len(table)), samples))
    columns: dict[str, Any] = {
        "response": _objects([answer["response"] for answer in answers]),
        "finish": _objects([answer["finish"] for answer in answers]),
        "sample": np.arange(len(answers)) % samples,
    }
    for name, kept, dtype in (("ids", "ids", np.int32), ("logps", "logps", np.float32)):
        if answers and all(kept in answer for answer in answers):
            columns[f"response_{name}"] = _objects([np.array(a[kept], dtype) for a in answers])
    return rows.with_columns(**columns)


def _objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        column[i] = value
    return column


@dataclass(frozen=True)
class Flags:
    """The flags of the command line."""

    prompts: str
    """JSONL(.gz), parquet, Arrow or CSV file, or a dataset of the Hub, with prompt or messages."""
    responses: str
    """JSONL file to write: every row with response, finish and sample added."""
    server: str
    """Its address, for instance http://localhost:8000."""
    tokens: int
    """The most tokens that a response may have."""
    model: str | None = None
    """The model's name at the server; may be left out where it has only one."""
    samples: int = 1
    """Responses per prompt; row 0 sample 0, row 0 sample 1, ..."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens that has this probability."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one."""
    stop: tuple[str, ...] = ()
    """Texts that end a response."""
    key: int = 0
    """Seed of the draws; another one draws other responses."""
    chat: bool | None = None
    """Use the server's chat template; default where rows have messages."""
    logps: bool = False
    """Also write the log-probability of every returned token (nats)."""
    extra: str = "{}"
    """More fields of each request: '{"chat_template_kwargs": {"enable_thinking": false}}'."""
    in_flight: int = 64
    """Requests that wait for an answer at once; servers like a few hundred."""
    retries: int = 8
    """How often a request is repeated after 429, 5xx, a timeout or a lost connection."""
    timeout: float = 600.0
    """Seconds that one request may take."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; may be unset."""
    cache: str | None = None
    """Folder where answers are kept as they come; default <responses>.cache."""
    split: str | None = None
    """Read only this split."""
    quiet: bool = False
    """Show no progress."""


COMMAND = "python -m w2s_jax.generate.serve"
HELP = f"""Responses to prompts from a server that speaks the OpenAI protocol.

Start one:
  vllm serve MODEL --port 8000
  python -m sglang.launch_server --model-path MODEL --port 8000
  llama-server -m MODEL.gguf --port 8000

Then:
  {COMMAND} --prompts prompts.jsonl --responses weak.jsonl \\
    --server http://localhost:8000 --tokens 512 --samples 4

After any stop, the same command asks only for what is missing."""


def main(argv: list[str] | None = None) -> None:
    """The command line: a file of prompts to a file of responses.

    Raises:
      SystemExit: 2 for a fault that the user can mend (one line on stderr), 130 when interrupted.
    """
    import tyro

    flags = tyro.cli(Flags, args=argv, prog=COMMAND, description=HELP)
    try:
        _answer(flags)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped; answers are kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None


def _answer(flags: Flags) -> None:
    from w2s_jax.data import sources

    rows = sources.records(flags.prompts, split=flags.split)
    names = [name for name in ("prompt", "messages") if len(rows) and name in rows[0]]
    if not names:
        raise UserError(f"{flags.prompts}: rows need a field prompt or messages")
    columns = {name: _objects([row.get(name) for row in rows]) for name in names}
    try:
        extra = json.loads(flags.extra)
    except ValueError as error:
        raise UserError(f"--extra is not JSON ({error}): {flags.extra!r:.80}") from None
    asked = asdict(flags) | dict(extra=extra, progress=not flags.quiet)
    asked["cache"] = flags.cache or f"{flags.responses}.cache"
    for name in ("prompts", "responses", "split", "quiet"):
        asked.pop(name)
    told = generate(Table(columns), **asked)
    new = [name for name in told.columns if name not in columns]
    lines = []
    for i in range(len(told)):
        row = {**rows[i // flags.samples], **{name: _plain(told[name][i]) for name in new}}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        workdir.write(Path(flags.responses), "".join(lines))
    except OSError as error:
        raise UserError(f"cannot write {flags.responses}: {error.strerror}") from None


if __name__ == "__main__":
    main()
