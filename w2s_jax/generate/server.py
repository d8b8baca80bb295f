"""One server that speaks the OpenAI protocol: its models, one request, its faults in one line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from w2s_jax.errors import UserError

MALFORMED = 3  # times a row is asked while its answers cannot be read
STANDARD = {"model", "max_tokens", "temperature", "top_p", "stop", "logprobs"}  # OpenAI's own


def address(server: str) -> str:
    """The base of its addresses: "http://host:8000" means "http://host:8000/v1".

    Raises:
      UserError: not an http address.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"server {server!r} is no address; write http://host:port")
    return server.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


@dataclass(frozen=True)
class Server:
    """How to reach it; the key is read from the environment whenever it is needed.

    ``retries`` and ``timeout`` (seconds) are those of one request: what is repeated, and the
    growing pauses between (at most 8 s, or what the server asks for), are the client package's.
    """

    address: str
    key_variable: str
    retries: int
    timeout: float

    def client(self) -> Any:
        """A new asynchronous client, to be used in the event loop that made it.

        Raises:
          UserError: the package is not installed.
        """
        try:
            import openai  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError("a server needs the client: pip install 'w2s_jax[serve]'") from error
        return openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key() or "none",
            max_retries=self.retries,
            timeout=self.timeout,
        )

    async def only_model(self) -> str:
        """Its model where it has just one.

        Raises:
          UserError: it has several, does not tell, or is not there.
        """
        async with self.client() as client:
            names = await self._models(client)
        if names is None or len(names) != 1:
            has = ", ".join(names) if names else "does not say which it has"
            raise UserError(f"name the model: the server at {self.address} has {has}")
        return names[0]

    async def check_model(self, client: Any, model: str) -> None:
        """Nothing where it has the model, or does not tell what it has.

        Raises:
          UserError: it lacks the model (the line lists what it has), or is not there.
        """
        names = await self._models(client)
        if names is not None and model not in names:
            raise UserError(f"no model {model!r} at {self.address}; it has {', '.join(names)}")

    async def ask(
        self, client: Any, body: dict[str, Any], *, chat: bool, prompt: Any, seed: int, row: int
    ) -> dict[str, Any]:
        """One answer: response, finish, prompt_tokens, completion_tokens and, if told, logps, ids.

        Raises:
          UserError: the request failed for good; the line names the row where it is to blame.
        """
        import openai  # pyright: ignore[reportMissingImports]

        place = client.chat.completions if chat else client.completions
        asked = {"messages" if chat else "prompt": prompt, "seed": seed}
        known = {name: value for name, value in body.items() if name in STANDARD}
        more = {name: value for name, value in body.items() if name not in STANDARD}
        fault: Exception = ValueError("no answer")
        for _ in range(MALFORMED):
            try:
                return _parse(
                    await place.create(**asked, **known, extra_body=more), chat, "logprobs" in body
                )
            except (openai.APIResponseValidationError, ValueError) as error:
                fault = error  # no JSON, or without what an answer must have
            except openai.APIError as error:
                raise UserError(self._explain(error, row)) from error
        raise UserError(self._explain(fault, row))

    async def _models(self, client: Any) -> list[str] | None:
        """The names of its models; None where it does not tell."""
        import openai  # pyright: ignore[reportMissingImports]

        try:
            quick = client.with_options(max_retries=min(2, self.retries), timeout=30.0)
            found = await quick.models.list()
        except (openai.NotFoundError, openai.InternalServerError):
            return None
        except openai.APIConnectionError as error:
            raise UserError(
                f"no server answers at {self.address} ({_cause(error)}); start it or mend the "
                "address"
            ) from error
        except (openai.APIError, ValueError) as error:
            raise UserError(self._explain(error, None)) from error
        data = getattr(found, "data", None)
        if not isinstance(data, list):
            raise UserError(f"{self.address} is not an OpenAI-compatible server; mend the address")
        return [str(getattr(one, "id", one)) for one in data] or None

    def _explain(self, error: Exception, row: int | None) -> str:
        """One line about a request that failed for good."""
        import openai  # pyright: ignore[reportMissingImports]

        where = "" if row is None else f"row {row}: "
        again = f"after {self.retries} retries"
        if isinstance(error, openai.APITimeoutError):
            return (
                f"{where}no answer from {self.address} within {self.timeout:g} s {again}; raise "
                "timeout or lower in_flight"
            )
        if isinstance(error, openai.APIConnectionError):
            return f"the server at {self.address} stopped answering ({_cause(error)}) {again}"
        if not isinstance(error, openai.APIStatusError):
            said = self._hide(_short(str(error)))
            return f"{where}the answer of {self.address} cannot be read: {said}"
        said = self._hide(_sentence(error))
        if error.status_code in (401, 403):
            which = "the key in" if self._key() else "a request without a key; set"
            return f"the server at {self.address} refuses {which} ${self.key_variable}: {said}"
        if error.status_code == 429 or error.status_code >= 500:
            return f"{where}the server still says {error.status_code} {again}: {said}"
        return f"{where}the server rejects the request ({error.status_code}): {said}"

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _hide(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text


def _parse(answer: Any, chat: bool, logps: bool) -> dict[str, Any]:
    """What is kept of an answer.

    Raises:
      ValueError: it lacks what it must have.
    """
    choice = (getattr(answer, "choices", None) or [None])[0]
    if choice is None:
        raise ValueError("it has no choices")
    finish = getattr(choice, "finish_reason", None)
    finish = {"eos": "stop", "eos_token": "stop"}.get(finish or "", finish)
    if finish in (None, "abort"):
        raise ValueError(f"its finish_reason is {finish}")
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None) if chat else getattr(choice, "text", None)
    if not isinstance(text, str) and not (chat and message is not None):
        raise ValueError("it has no text")
    usage = getattr(answer, "usage", None)
    kept = {"response": text or "", "finish": finish}  # null: all tokens went into reasoning
    kept |= {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    if logps:
        kept["logps"] = _logps(getattr(choice, "logprobs", None), chat)
    ids = getattr(choice, "token_ids", None)
    return kept if ids is None else {**kept, "ids": ids}


def _logps(told: Any, chat: bool) -> list[float]:
    tokens = getattr(told, "content" if chat else "token_logprobs", None)
    if tokens is None:
        raise ValueError("it has no log-probabilities; ask without logps")
    return [token.logprob for token in tokens] if chat else tokens


def _sentence(error: Any) -> str:
    """What the server says in the body of an error, in one line."""
    body = error.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return _short(str(said or error.message))


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return _short(str(cause) or type(cause).__name__)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
