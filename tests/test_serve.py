"""Generation by a server: a real one in its own process, told to be slow, to fail and to die."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from serve_world import serving

from w2s_jax.errors import UserError
from w2s_jax.generate import serve
from w2s_jax.types import Table

pytest.importorskip("openai")

TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
]


def texts(*values) -> Table:
    return Table({"prompt": objects(values)})


def objects(values) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        column[i] = value
    return column


@pytest.fixture
def ask(tmp_path: Path):
    """``serve.generate`` with a cache in the test's folder."""

    def call(table, server, **settings):
        settings = {"tokens": 8, "cache": tmp_path / "cache", "progress": False, **settings}
        return serve.generate(table, server, **settings)

    return call


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "asked.jsonl"


def test_rows_times_samples_in_order_and_a_rerun_asks_nothing(ask, log) -> None:
    table = texts("one", "two cut", "one").with_columns(group=np.arange(3, dtype=np.int32))
    with serving(log) as server:
        told = ask(table, server.url, samples=2, in_flight=3)
        bodies = [row["body"] for row in server.asked()]
        assert [json.loads(t.split("?")[0]) for t in told["response"]] == [
            *("one", "one", "two cut", "two cut", "one", "one")
        ]
        assert told["sample"].tolist() == [0, 1, 0, 1, 0, 1]
        assert told["group"].tolist() == [0, 0, 1, 1, 2, 2]
        assert told["finish"].tolist() == ["stop", "stop", "length", "length", "stop", "stop"]
        # every draw has its own seed, equal prompts in two rows too; all else is what was set
        assert len(set(told["response"])) == len({body["seed"] for body in bodies}) == 6
        assert {body["model"] for body in bodies} == {"echo"}
        assert all(body["max_tokens"] == 8 and "top_k" not in body for body in bodies)
        again = ask(table, server.url, samples=2)
        back = ask(table.take([2, 1]), server.url, samples=1)
        assert len(server.asked()) == 6
        ask(table, server.url, samples=3)  # only the third sample of each row is new
        assert len(server.asked()) == 9
        ask(table, server.url, samples=2, key=1)
        ask(table, server.url, samples=2, temperature=0.5)
        assert len(server.asked()) == 21
    assert again["response"].tolist() == told["response"].tolist()
    assert back["response"].tolist() == [told["response"][0], told["response"][2]]
    # everything is kept: no server is needed, nor is there one
    assert ask(table, server.url, samples=2, model="echo")["sample"].tolist() == [0, 1] * 3


def test_settings_reach_the_server_under_its_names(ask, log) -> None:
    with serving(log, models=["a", "b"]) as server:
        settings = dict(top_k=5, top_p=0.9, min_p=0.1, temperature=0.7, stop=("\n\n", "Q:"))
        ask(texts("p"), server.url + "/v1/", model="b", extra={"ignore_eos": True}, **settings)
        body = server.asked()[0]["body"]
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == dict(
        model="b",
        prompt="p",
        max_tokens=8,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        stop=["\n\n", "Q:"],
        ignore_eos=True,
    )


def test_turns_pass_through_and_a_prompt_becomes_one(ask, log) -> None:
    with serving(log) as server:
        told = ask(Table({"messages": objects([TURNS])}), server.url)
        ask(texts("hello"), server.url, chat=True)
        ids = ask(Table({"prompt": objects([[1, 5, 7]])}), server.url)
        rows = server.asked()
    assert [row["path"] for row in rows] == ["/v1/chat/completions"] * 2 + ["/v1/completions"]
    assert rows[0]["body"]["messages"] == TURNS
    assert rows[1]["body"]["messages"] == [{"role": "user", "content": "hello"}]
    assert json.loads(told["response"][0].rsplit("?", 1)[0]) == TURNS
    assert ids["response"][0].startswith("[1, 5, 7]")


@pytest.mark.parametrize("chat", [False, True])
def test_log_probabilities_and_ids_where_the_server_tells_them(ask, log, chat) -> None:
    with serving(log) as server:
        told = ask(
            texts("a", "b"), server.url, chat=chat, logps=True, extra={"return_token_ids": True}
        )
    for logps, ids in zip(told["response_logps"], told["response_ids"], strict=True):
        assert logps.dtype == np.float32 and logps.tolist() == [-0.5] * 3
        assert ids.dtype == np.int32 and len(ids) == 3
    assert "response_logps" not in ask_nothing(ask, log)


def ask_nothing(ask, log) -> Table:
    with serving(log) as server:
        return ask(texts("plain"), server.url)


def test_so_many_are_in_flight_and_no_more(ask, log) -> None:
    with serving(log, slow=0.2) as server:
        ask(texts(*(f"row {i}" for i in range(18))), server.url, in_flight=6)
        assert max(row["busy"] for row in server.asked()) == 6


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429},
        {"status": 503},
        {"drop": True},
        {"raw": '{"choices": [{"te'},
        {"raw": '{"choices": []}'},
        {"raw": '"fine"'},
        {"raw": '{"choices": [{"index": 0, "finish_reason": "abort", "text": "x"}]}'},
    ],
)
def test_a_fault_that_passes_leaves_no_trace(ask, log, fault) -> None:
    with serving(log, times=1, **fault) as server:
        told = ask(texts("a", "b"), server.url)
        assert Counter(row["turn"] for row in server.asked()) == {1: 2, 2: 2}
    assert [text[:3] for text in told["response"]] == ['"a"', '"b"']


def test_the_pause_is_the_one_the_server_asks_for(ask, log) -> None:
    with serving(log, status=429, times=1, retry_after=1.0) as server:
        ask(texts("a"), server.url)
        first, second = (row["time"] for row in server.asked())
    assert second - first >= 0.99  # without the header it would be half a second at most


@pytest.mark.parametrize(
    ("options", "settings", "line"),
    [
        (
            {"status": 500},
            {"retries": 1},
            r"row 0: the server still says 500 after 1 retries: busy",
        ),
        ({"drop": True}, {"retries": 1}, r"server at http.*/v1 stopped answering .* 1 retries"),
        ({"raw": "<html>"}, {}, r"row 0: the answer of http.* cannot be read: "),
        ({"raw": '{"choices": null}'}, {}, r"row 0: .* cannot be read: it has no choices"),
        ({"silent": True}, {"logps": True}, r"row 0: .* no log-probabilities; ask without logps"),
        ({"slow": 5}, {"timeout": 0.2, "retries": 0}, r"row 0: no answer .* within 0.2 s"),
        ({}, {"model": "gpt-9"}, r"no model 'gpt-9' at http.*/v1; it has echo$"),
        ({"models": ["a", "b"]}, {}, r"name the model: .* has a, b"),
        ({"models": None}, {}, r"name the model: .* does not say"),
        ({"key": "sesame"}, {}, r"refuses the key in \$OPENAI_API_KEY: Incorrect API key: \*\*\*"),
        ({"key": "sesame"}, {"key_variable": "NO_KEY"}, r"request without a key; set \$NO_KEY"),
    ],
)
def test_a_fault_that_stays_is_one_line(ask, log, monkeypatch, options, settings, line) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "guess-123")
    with serving(log, **options) as server, pytest.raises(UserError, match=line) as caught:
        ask(texts("a"), server.url, **settings)
    assert "\n" not in str(caught.value) and "guess-123" not in str(caught.value)


@pytest.mark.parametrize("models", [None, []])
def test_a_server_that_lists_no_models_is_believed(ask, log, models) -> None:
    with serving(log, models=models) as server:
        assert len(ask(texts("a"), server.url, model="any")) == 1


def test_the_key_is_sent_and_never_stored(ask, log, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame-42")
    with serving(log, key="sesame-42") as server:
        ask(texts("a"), server.url, key_variable="MY_KEY")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not any("sesame" in path.read_text() for path in files)


def test_a_row_too_long_is_named_and_the_others_are_kept(ask, log) -> None:
    table = texts("a", "b", "long " * 20, "d")
    with serving(log, limit=60) as server:
        line = r"row 2: the server rejects .*\(400\): This model's maximum context length is 40 "
        with pytest.raises(UserError, match=line + r"characters. However.*; 2 of 4 answers are"):
            ask(table, server.url, in_flight=1)
        ask(texts("a", "b", "short", "d"), server.url)
        assert Counter(server.answered()).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    ("table", "settings", "line"),
    [
        (texts("a", "  "), {}, r"row 1: the prompt is empty"),
        (texts("a", None), {}, r"row 1: the prompt must be text, got None"),
        (texts("a", []), {}, r"row 1: the prompt is empty"),
        (texts("a", [1, 2]), {"chat": True}, r"row 1: the prompt must be text"),
        (Table({"messages": objects([TURNS, []])}), {}, r"row 1: the prompt is empty"),
        (Table({"messages": objects(["hi"])}), {}, r"row 0: .* a list of"),
        (Table({"messages": objects([TURNS])}), {"chat": False}, r"no column 'prompt'"),
        (texts("a"), {"samples": 0}, r"samples must be at least 1, got 0"),
        (texts("a"), {"stop": ("\n", "")}, r"a stop string is empty"),
        (texts("a"), {"top_p": 0}, r"0 < top_p <= 1"),
        (texts("a"), {"server": "localhost:8000"}, r"'localhost:8000' is no address"),
        (
            texts("a"),
            {"server": "http://127.0.0.1:9"},
            r"no server answers at http://127.0.0.1:9/v1",
        ),
    ],
)
def test_what_is_wrong_before_asking_is_one_line(ask, table, settings, line) -> None:
    settings = {"server": "http://127.0.0.1:9", "model": "echo", "retries": 0, **settings}
    with pytest.raises(UserError, match=line):
        ask(table, settings.pop("server"), **settings)


def test_a_server_that_dies_loses_nothing(ask, log) -> None:
    table = texts(*(f"row {i}" for i in range(20)))
    with serving(log, die_after=7) as server:
        line = r"stopped answering \(.+\) after 1 retries; 7 of 20 answers are kept in .*resumes"
        with pytest.raises(UserError, match=line):
            ask(table, server.url, retries=1, in_flight=1)
    with serving(log) as server:
        told = ask(table, server.url)
        assert Counter(Counter(server.answered()).values()) == {1: 20}
    assert [json.loads(t.split("?")[0]) for t in told["response"]] == table["prompt"].tolist()


def test_a_torn_line_costs_one_row(ask, log, tmp_path) -> None:
    table = texts("a", "b", "c")
    with serving(log) as server:
        told = ask(table, server.url, in_flight=1)
        (path,) = (tmp_path / "cache").glob("*/*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        again = ask(table, server.url)
        assert Counter(Counter(server.answered()).values()) == {1: 2, 2: 1}
    assert again["response"].tolist() == told["response"].tolist()


def test_without_the_client_package_the_line_says_what_to_install(ask, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'w2s_jax\[serve\]'"):
        ask(texts("a"), "http://127.0.0.1:9", model="echo")


def test_inside_a_running_loop_as_in_a_notebook(ask, log) -> None:
    async def cell(url: str) -> Table:
        return ask(texts("a"), url)

    with serving(log) as server:
        assert len(asyncio.run(cell(server.url))) == 1


def test_an_interrupt_in_a_notebook_is_heard_at_once(ask, log) -> None:
    async def cell(url: str) -> Table:
        return ask(texts(*map(str, range(500))), url, in_flight=1)

    def interrupt(server) -> None:
        while len(server.answered()) < 5:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    loop = asyncio.new_event_loop()
    with serving(log, slow=0.05) as server:
        friend = threading.Thread(target=interrupt, args=(server,))
        friend.start()
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell(server.url))
        friend.join()
        done = len(server.answered())
        loop.close()
        assert 5 <= done < 400
        ask(texts(*map(str, range(done - 1))), server.url)
        assert max(Counter(server.answered()).values()) == 1


# From the command line, in a process that can be killed


def command(folder: Path, server: str, *flags: str) -> list[str]:
    words = [sys.executable, "-m", "w2s_jax.generate.serve", "--server", server, "--tokens", "8"]
    files = ["--prompts", str(folder / "prompts.jsonl")]
    return [*words, *files, "--responses", str(folder / "told.jsonl"), *flags]


def prompts(folder: Path, count: int) -> None:
    rows = [{"prompt": f"row {i}", "label": i, "id": f"q{i}"} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def told_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def test_command_line_keeps_fields_and_teaches_flags(tmp_path, log, capsys) -> None:
    prompts(tmp_path, 3)
    with serving(log) as server:
        serve.main(command(tmp_path, server.url, "--samples", "2", "--logps")[3:])
        assert re.search(r"6/6 answers, \d+ tokens, .* tokens/s", capsys.readouterr().err)
        with pytest.raises(SystemExit, match="2"):
            serve.main(command(tmp_path, server.url, "--extra", "{")[3:])
        assert capsys.readouterr().err.startswith("error: --extra is not JSON")
        with pytest.raises(SystemExit, match="2"):
            serve.main(command(tmp_path, server.url, "--model", "other")[3:])
        assert capsys.readouterr().err.count("\n") == 1
    rows = told_rows(tmp_path)
    assert [(row["id"], row["label"], row["sample"]) for row in rows] == [
        (f"q{i}", i, sample) for i in range(3) for sample in range(2)
    ]
    assert all(row["finish"] == "stop" and row["response_logps"] == [-0.5] * 3 for row in rows)
    with pytest.raises(SystemExit, match="0"):
        serve.main(["--help"])
    assert "vllm serve MODEL" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_client_goes_on_where_it_was(tmp_path, log, number) -> None:
    prompts(tmp_path, 40)
    with serving(log, slow=0.1) as server:
        words = command(tmp_path, server.url, "--in-flight", "4")
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as client:
            while len(server.answered()) < 12:
                time.sleep(0.05)
                assert client.poll() is None
            os.kill(client.pid, number)
            said = client.communicate()[1]
        if number == signal.SIGINT:
            assert client.returncode == 130 and "the same command resumes" in said
        assert not (tmp_path / "told.jsonl").exists()
        kept = kept_keys(tmp_path)
        assert 8 <= len(kept) < 40
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        times = Counter(row["asked"] for row in server.asked())
    # only what was in flight, and so not yet answered, is asked a second time
    assert len(times) == 40 and sum(times.values()) <= 40 + 4
    assert sum(count == 1 for count in times.values()) >= len(kept)
    assert [row["prompt"] for row in told_rows(tmp_path)] == [f"row {i}" for i in range(40)]
    assert len(kept_keys(tmp_path)) == len(set(kept_keys(tmp_path))) == 40


def kept_keys(folder: Path) -> list[str]:
    lines = [
        line
        for path in folder.glob("told.jsonl.cache/*/*.jsonl")
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [json.loads(line)["key"] for line in lines]


@pytest.mark.slow
def test_two_clients_at_once_do_not_spoil_each_other(tmp_path, log) -> None:
    prompts(tmp_path, 30)
    with serving(log, slow=0.05) as server:
        words = command(tmp_path, server.url, "--in-flight", "4", "--quiet")
        clients = [subprocess.Popen(words) for _ in range(2)]
        assert [client.wait() for client in clients] == [0, 0]
        asked = len(server.asked())
        subprocess.run([*words, "--model", "echo"], check=True)
        assert len(server.asked()) == asked
    assert len(set(kept_keys(tmp_path))) == 30
    assert [row["id"] for row in told_rows(tmp_path)] == [f"q{i}" for i in range(30)]


@pytest.mark.slow
def test_served_and_sampled_here_are_the_same(ask, log) -> None:
    import jax

    from w2s_jax.generate.sample import generate
    from w2s_jax.models import hf

    asked = texts("1+1=", "What is 12 + 30?", "The answer", "7*8=", "once upon", [1, 14, 5, 18])
    here = generate(
        asked, *hf.load("nano-1"), key=jax.random.key(0), tokens=24, temperature=0.0, stop=(" . ",)
    )
    with serving(log, nano="nano-1") as server:
        there = ask(
            asked, server.url, tokens=24, temperature=0.0, stop=" . ", logps=True, in_flight=4
        )
    assert set(here.columns) == set(there.columns)
    assert set(here["finish"]) == {"stop", "length"}
    for name in ("response", "finish", "sample"):
        assert here[name].tolist() == there[name].tolist(), name
    for name in ("response_ids", "response_logps"):
        for one, two in zip(here[name], there[name], strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_allclose(one, two, atol=1e-4)
