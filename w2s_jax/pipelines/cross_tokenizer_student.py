"""An untrained student with a published tokenizer, whole or cut to its first merges.

  python -m w2s_jax.pipelines.cross_tokenizer_student --tokenizer FOLDER --out OUT --vocab 1024

For ``experiments.cross_tokenizer --vocab 0 --scratch``, where a model of a laptop's size cannot
carry 50 thousand tokens. A byte-level BPE is cut by dropping its last merges: what is left cuts
every text as the whole one did before it learned them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from w2s_jax.errors import UserError
from w2s_jax.models import hf
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.tokenizer import Tokenizer


def shortened(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """A byte-level BPE with ``vocab`` tokens: bytes, as many of its first merges, special tokens.

    Raises:
      UserError: another kind of tokenizer, or a size below its bytes and special tokens or above
        its own.
    """
    told = json.loads(tokenizer.backend.to_str()) if hasattr(tokenizer.backend, "to_str") else {}
    model, added = told.get("model", {}), told.get("added_tokens", [])
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(told.get("decoder")):
        raise UserError("only a byte-level BPE tokenizer can be cut to its first merges")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special = [token["content"] for token in added]
    made = {first + second for first, second in pairs}
    order = sorted(model["vocab"], key=model["vocab"].get)
    base = [token for token in order if token not in made and token not in special]
    if not len(base) + len(special) <= vocab <= tokenizer.size:
        raise UserError(
            f"a vocabulary of {vocab}: this tokenizer has {len(base)} bytes and {len(special)} "
            f"special tokens at least, {tokenizer.size} at most"
        )
    kept = pairs[: vocab - len(base) - len(special)]
    words = [*base, *(first + second for first, second in kept), *special]
    ids = {token: index for index, token in enumerate(words)}
    told["model"] |= {"vocab": ids, "merges": kept}
    told["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in added]
    return _read(told, tokenizer, ids)


def _read(told: dict[str, Any], old: Tokenizer, ids: dict[str, int]) -> Tokenizer:
    import tokenizers

    roles: dict[str, int | None] = {}
    for role in ("bos", "eos", "pad", "unk"):
        index = getattr(old, role)
        roles[role] = None if index is None else ids.get(old.token(index) or "")
    told["post_processor"] = None  # it names ids of the old vocabulary
    return replace(old, backend=tokenizers.Tokenizer.from_str(json.dumps(told)), **roles)


def main(argv: list[str] | None = None) -> None:
    """The command line: writes the folder and prints its path.

    Raises:
      SystemExit: 2 for a fault that the user can mend (one line on stderr).
    """
    import tyro

    def student(
        tokenizer: str,
        out: str,
        vocab: int = 0,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        length: int = 256,
    ) -> Path:
        """An untrained student with a published tokenizer, whole or cut to its first merges.

        Args:
            tokenizer: Folder or file of the tokenizer.
            out: Folder to write.
            vocab: Tokens to keep; 0 for all.
            width: Of the hidden states.
            layers: Blocks.
            heads: Of attention.
            length: The longest row it reads.
        """
        place = Path(tokenizer)
        words = Tokenizer.load(place) if place.is_dir() else Tokenizer.from_file(place)
        words = shortened(words, vocab) if vocab else words
        shape = Config(vocab=words.size, width=width, layers=layers, heads=heads, max_length=length)
        model = transformer(shape)
        return hf.export(model, jax.jit(model.init)(jax.random.key(0)), out, words)

    try:
        name = "python -m w2s_jax.pipelines.cross_tokenizer_student"
        print(tyro.cli(student, args=argv, prog=name))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
