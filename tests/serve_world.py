"""A small server that speaks the OpenAI protocol, in a process of its own, told how to fail.

``python tests/serve_world.py '{"log": "asked.jsonl", "drop": 1}'`` prints its port. Its answer is a
function of the prompt and the seed, or, with ``"nano"``, our own model's greedy continuation.
Every request and every answer is one line of the log, with the server's clock.
"""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LONG = "This model's maximum context length is 40 characters.\nHowever, you sent more."


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    options: dict[str, Any] = {}
    lock = threading.Lock()
    tries: dict[str, int] = {}
    busy = answered = 0
    nano: Any = None

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self._trusted():
            return
        models = self.options.get("models", ["echo"])
        if models is None:
            return self._send(404, {"error": {"message": "Not Found"}})
        self._send(200, {"object": "list", "data": [{"id": name} for name in models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._trusted():
            return
        chat = self.path.endswith("/chat/completions")
        asked = json.dumps([body["messages"] if chat else body["prompt"], body["seed"]])
        with self.lock:
            Handler.busy += 1
            Handler.tries[asked] = turn = Handler.tries.get(asked, 0) + 1
            self._log(asked=asked, body=body, path=self.path, busy=Handler.busy, turn=turn)
        try:
            time.sleep(self.options.get("slow", 0))
            self._answer(body, chat, asked, turn)
        finally:
            with self.lock:
                Handler.busy -= 1

    def _answer(self, body: dict[str, Any], chat: bool, asked: str, turn: int) -> None:
        options = self.options
        if len(asked) > options.get("limit", 10**9):
            error = {"message": LONG, "type": "BadRequestError", "code": 400}
            return self._send(400, {"error": error})
        if turn <= options.get("times", 10**9):
            if "status" in options:
                headers = {"Retry-After": str(options.get("retry_after", 0.01))}
                return self._send(options["status"], {"error": {"message": "busy"}}, headers)
            if "drop" in options:
                self.close_connection = True
                return self.connection.close()
            if "raw" in options:
                return self._send(200, options["raw"])
        choice = self.nano(body) if self.nano else self._choice(body, chat)
        usage = {"prompt_tokens": len(asked), "completion_tokens": 7}
        with self.lock:
            if Handler.answered >= options.get("die_after", 10**9):
                os._exit(1)
            Handler.answered += 1
            self._log(answered=asked)
        self._send(200, {"model": body["model"], "choices": [choice], "usage": usage})

    def _choice(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        prompt = body["messages"] if chat else body["prompt"]
        text = f"{json.dumps(prompt)}?{body['seed']}"
        finish = "length" if "cut" in str(prompt) else "stop"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs") and not self.options.get("silent"):
            pieces = [{"token": piece, "logprob": -0.5} for piece in text[:3]]
            plain = {"token_logprobs": [piece["logprob"] for piece in pieces]}
            choice["logprobs"] = {"content": pieces} if chat else plain
        if body.get("return_token_ids"):
            choice["token_ids"] = [ord(letter) for letter in text[:3]]
        return choice

    def _trusted(self) -> bool:
        want = self.options.get("key")
        sent = self.headers.get("Authorization", "")
        if want is None or sent == f"Bearer {want}":
            return True
        self._send(
            401, {"error": {"message": f"Incorrect API key: {sent.removeprefix('Bearer ')}"}}
        )
        return False

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _log(self, **row: Any) -> None:
        with open(self.options["log"], "a", encoding="utf8") as file:
            file.write(json.dumps({"time": time.time(), **row}) + "\n")


def nano(name: str):
    """Body of a request -> the choice of its answer, by our own generation with a shipped model."""
    import jax
    import numpy as np

    from w2s_jax.generate.sample import generate
    from w2s_jax.models import hf
    from w2s_jax.types import Table

    model, params, tokenizer = hf.load(name)
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with lock:
            told = generate(
                Table({"prompt": np.array([body["prompt"]], object)}),
                model,
                params,
                tokenizer,
                key=jax.random.key(body["seed"]),
                tokens=body["max_tokens"],
                temperature=body["temperature"],
                stop=body.get("stop") or (),
            )
        return {
            "index": 0,
            "text": told["response"][0],
            "finish_reason": str(told["finish"][0]),
            "token_ids": told["response_ids"][0].tolist(),
            "logprobs": {"token_logprobs": told["response_logps"][0].tolist()},
        }

    return answer


class Running:
    """A server process: its address and what it has logged."""

    def __init__(self, process: Any, port: str, log: Path):
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log

    def asked(self) -> list[dict[str, Any]]:
        return [row for row in self._rows() if "asked" in row]

    def answered(self) -> list[str]:
        return [row["answered"] for row in self._rows() if "answered" in row]

    def _rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def serving(log: Path, **options: Any):
    """A server of its own process for the block; ``log`` is kept over several."""
    log.touch()
    words = [sys.executable, __file__, json.dumps({"log": str(log), **options})]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield Running(process, process.stdout.readline().strip(), log)
        finally:
            process.kill()


def main() -> None:
    """Serve until killed."""
    Handler.options = json.loads(sys.argv[1])
    if "nano" in Handler.options:
        Handler.nano = staticmethod(nano(Handler.options["nano"]))
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
