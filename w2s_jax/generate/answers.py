"""Answers of a server, kept as they come so that a killed run loses none; and how fast it is."""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from w2s_jax import workdir
from w2s_jax.errors import UserError


class Kept:
    """Answers on disk by key, in the folder that their settings name.

    Each process appends to a file of its own and reads everybody's, so that two at once cannot
    spoil each other's lines.

    Raises:
      UserError: the folder cannot be read or written.
    """

    def __init__(self, cache: Path, settings: dict[str, Any]):
        self.folder = cache / f"serve-{workdir.digest(settings)}"
        self.file: Any = None
        self.answers: dict[str, dict[str, Any]] = {}
        try:
            if not self.folder.exists():
                workdir.write(self.folder / "settings.json", json.dumps(settings, indent=1))
            for path in sorted(self.folder.glob("*.jsonl")):
                with path.open("rb") as lines:
                    for line in lines:
                        self._read(line)
        except OSError as error:
            raise UserError(f"cache {self.folder}: {error.strerror}; choose another") from error

    def _read(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            if {"response", "finish"} <= answer.keys():
                self.answers.setdefault(answer.pop("key"), answer)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # torn by a kill: that row is asked again

    def append(self, key: str, answer: dict[str, Any]) -> None:
        """Keep one answer, at once.

        Raises:
          UserError: the disk is full or gone; earlier answers stay.
        """
        try:
            if self.file is None:
                name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
                self.file = (self.folder / name).open("x", encoding="utf8")
            self.file.write(json.dumps({"key": key, **answer}) + "\n")
            self.file.flush()  # a kill then loses nothing that was answered
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}") from error
        self.answers[key] = answer

    def close(self) -> None:
        """Close this process's file."""
        if self.file is not None:
            self.file.close()


class Meter:
    """A bar on a terminal, elsewhere a line every half minute; tokens per second at the end."""

    def __init__(self, total: int, show: bool):
        self.total, self.show, self.bar = total, show, None
        self.done = self.tokens = 0
        self.begun = self.said = time.perf_counter()
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="answer", dynamic_ncols=True)

    def note(self, answer: dict[str, Any]) -> None:
        """One more answer, with its ``completion_tokens``."""
        self.done += 1
        self.tokens += answer["completion_tokens"] or 0
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self._rate():,.0f} tokens/s", refresh=False)
            self.bar.update()
        elif time.perf_counter() - self.said > 30:
            self._say()

    def close(self) -> None:
        """Say how many there were and how fast."""
        if self.bar is not None:
            self.bar.close()
        self._say()

    def _rate(self) -> float:
        return self.tokens / (time.perf_counter() - self.begun)

    def _say(self) -> None:
        self.said = time.perf_counter()
        if self.show:
            print(
                f"{self.done:,}/{self.total:,} answers, {self.tokens:,} tokens, "
                f"{self.said - self.begun:,.1f} s, {self._rate():,.0f} tokens/s",
                file=sys.stderr,
            )
