"""llama2.c checkpoints and tokenizers as Hugging Face folders.

    python -m w2s_jax.models.llama2c stories260K.bin tok512.model stories260K

Format facts: github.com/karpathy/llama2.c (model.py, export.py, tokenizer.py), MIT. Its rotary
pairs are (x0,x1), (x2,x3), ...; ours, as Hugging Face's, are (x_i, x_{i+h/2}), so the rows of the
query and key matrices are reordered.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.models.config import Config
from w2s_jax.models.families import from_hf_config
from w2s_jax.types import Params

# llama2.c's name -> our leaf; matrices are stored [out,in].
_LEAVES = {
    "attention_norm": "attention_norm",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "o",
    "ffn_norm": "ffn_norm",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
}
SPACE = "\u2581"


def read(path: str | Path) -> tuple[Config, Params]:
    """A ``.bin`` (version 0) or ``.npz`` (with ``.config.json`` beside it) checkpoint.

    Raises:
      UserError: a file that is missing, truncated or of another format, or arrays whose shapes
        the sizes in its header or config do not explain.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".npz":
        config, arrays = _read_npz(path)
    else:
        config, arrays = _read_bin(path)
    return config, _params(config, arrays, path)


def _read_bin(path: Path) -> tuple[Config, dict[str, np.ndarray]]:
    data = path.read_bytes()
    if len(data) < 28:
        raise UserError(f"{path} is too short for a llama2.c checkpoint")
    width, ffn, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    sizes = (width, ffn, layers, heads, kv_heads, abs(vocab), length)
    if min(sizes) < 1 or width % heads or max(sizes) > 10**7:
        raise UserError(f"{path} is not a version 0 llama2.c checkpoint (sizes {sizes})")
    config = Config(
        vocab=abs(vocab),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        max_length=length,
        tie=vocab > 0,
    )
    numbers = np.frombuffer(data, "<f4", offset=28, count=(len(data) - 28) // 4)
    shapes = _shapes(config)
    tables = {"cos": (length, config.head_dim // 2), "sin": (length, config.head_dim // 2)}
    output = {} if config.tie else {"output": (config.vocab, width)}
    arrays, at = {}, 0
    for name, shape in {**shapes, **tables, **output}.items():
        size = int(np.prod(shape))
        if at + size > len(numbers):
            raise UserError(f"{path} is truncated: it ends within {name}")
        arrays[name], at = numbers[at : at + size].reshape(shape), at + size
    if at != len(numbers):
        raise UserError(f"{path} has {len(numbers) - at} numbers more than its header says")
    return config, arrays


def _read_npz(path: Path) -> tuple[Config, dict[str, np.ndarray]]:
    beside = path.with_suffix(".config.json")
    try:
        config = from_hf_config(json.loads(beside.read_text(encoding="utf-8")))
        with np.load(path) as stored:
            return config, {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise UserError(f"{beside} is missing: it says what {path.name} holds") from None
    except UserError as error:
        raise UserError(f"{beside}: {error}") from None
    except Exception as error:  # a corrupt archive raises one of many kinds
        raise UserError(f"{path} or {beside.name} cannot be read: {error}") from None


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Stored shapes, in the order of the file."""
    n, d, f = config.layers, config.width, config.ffn
    kv = config.kv_heads * config.head_dim
    return {
        "tok_embeddings": (config.vocab, d),
        "attention_norm": (n, d),
        "wq": (n, d, d),
        "wk": (n, kv, d),
        "wv": (n, kv, d),
        "wo": (n, d, d),
        "ffn_norm": (n, d),
        "w1": (n, f, d),
        "w2": (n, d, f),
        "w3": (n, f, d),
        "norm": (d,),
    }


def _params(config: Config, arrays: dict[str, np.ndarray], path: Path) -> Params:
    wanted = (
        _shapes(config)
        if config.tie
        else {**_shapes(config), "output": (config.vocab, config.width)}
    )
    for name, shape in wanted.items():
        if name not in arrays:
            raise UserError(f"{path}: array {name} is missing")
        if arrays[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {arrays[name].shape}, the config says {shape}"
            )
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    layers = {leaf: arrays[name] for name, leaf in _LEAVES.items()}
    layers["q"] = _half_split(layers["q"], config.heads)
    layers["k"] = _half_split(layers["k"], config.kv_heads)
    layers = {
        k: np.ascontiguousarray(v.swapaxes(1, 2)) if v.ndim == 3 else v for k, v in layers.items()
    }
    params = {
        "embed": arrays["tok_embeddings"],
        "layers": layers,
        "final_norm": arrays["norm"],
    }
    return params if config.tie else {**params, "unembed": arrays["output"].T}


def _half_split(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (0,1),(2,3),... to halves (0,2,...),(1,3,...): [L,out,in]."""
    layers, out, width = matrix.shape
    pairs = matrix.reshape(layers, heads, out // heads // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(layers, out, width)


def tokenizer(path: str | Path) -> Any:
    """A SentencePiece BPE or character vocabulary as a `tokenizers` backend, ids kept.

    Takes ``.model`` (SentencePiece), ``.bin`` (llama2.c) or ``.json`` (``vocab``, ``scores``). A
    merge's rank is the score of what it makes; white space is handled as SentencePiece does with
    its defaults: a leading space is added, runs are collapsed, ends are stripped.

    Raises:
      UserError: missing, corrupt, or a unigram or word vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    pieces, scores, byte_fallback = _vocabulary(Path(path))
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = [p for p in ("<unk>", "<s>", "</s>") if p in ids]
    backend = Tokenizer(
        models.BPE(
            ids,
            _merges(ids, scores),
            unk_token="<unk>" if "<unk>" in ids else None,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), SPACE),
            normalizers.Prepend(SPACE),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    return backend


def _merges(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to join two pieces into a third, best score first."""
    found = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _vocabulary(path: Path) -> tuple[list[str], list[float], bool]:
    """Pieces in SentencePiece spelling, their scores, whether bytes stand for unknown text."""
    readers = {".model": _read_model, ".bin": _read_tokens, ".json": _read_json}
    if not path.is_file() or path.suffix not in readers:
        raise UserError(f"{path} is not a tokenizer file; give a .model, .bin or .json")
    try:
        pieces, scores = readers[path.suffix](path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise UserError(
            f"{path} is not a tokenizer of this kind or is corrupt: {error!r}"
        ) from None
    if path.suffix != ".model":  # llama2.c writes a plain space and decorates BOS and EOS
        pieces = [p.strip("\n") if p.strip("\n") in ("<s>", "</s>") else p for p in pieces]
        pieces = [p.replace(" ", SPACE) for p in pieces]
    if len(set(pieces)) != len(pieces) or not pieces:
        raise UserError(f"{path}: the vocabulary is empty or has a piece twice")
    return pieces, scores, "<0x00>" in pieces


def _read_json(data: bytes) -> tuple[list[str], list[float]]:
    values = json.loads(data)
    pieces = [str(piece) for piece in values["vocab"]]
    scores = [float(score) for score in values.get("scores", [0.0] * len(pieces))]
    if len(scores) != len(pieces):
        raise UserError(f"{len(pieces)} pieces but {len(scores)} scores")
    return pieces, scores


def _read_tokens(data: bytes) -> tuple[list[str], list[float]]:
    pieces, scores, at = [], [], 4  # the first number is the longest piece's length
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        piece = data[at + 8 : at + 8 + size]
        if len(piece) != size:
            raise ValueError("it ends within a piece")
        pieces.append(piece.decode("utf-8"))
        scores.append(score)
        at += 8 + size
    return pieces, scores


def _read_model(data: bytes) -> tuple[list[str], list[float]]:
    """The pieces of a SentencePiece ModelProto (sentencepiece_model.proto), read off the wire."""
    pieces, scores = [], []
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
        elif number == 2:
            kind = dict(_fields(value)).get(3, 1)  # model_type
            if kind not in (2, 4):
                raise UserError("only BPE and character vocabularies are supported")
        elif number == 3 and dict(_fields(value)).get(2):  # precompiled_charsmap
            raise UserError("only vocabularies without text normalisation are supported")
    return pieces, scores


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: ints, or bytes for the rest."""
    found, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ((8, at) if kind == 1 else (4, at))
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(data):
            raise ValueError("it ends within a field")
        found.append((key >> 3, value))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def convert(checkpoint: str | Path, vocabulary: str | Path, folder: str | Path) -> Path:
    """Write the Hugging Face folder of a llama2.c checkpoint and its tokenizer.

    Raises:
      UserError: see ``read``, ``tokenizer`` and ``hf.export``; or sizes that differ.
    """
    from w2s_jax.models import hf
    from w2s_jax.models.transformer import transformer
    from w2s_jax.tokenizer import Tokenizer

    config, params = read(checkpoint)
    backend = tokenizer(vocabulary)
    if backend.get_vocab_size() != config.vocab:
        raise UserError(
            f"{vocabulary} has {backend.get_vocab_size()} tokens, {checkpoint} {config.vocab}"
        )
    role = backend.token_to_id
    words = Tokenizer(backend, bos=role("<s>"), eos=role("</s>"), unk=role("<unk>"))
    return hf.export(transformer(config), params, folder, words)


def main(arguments: Sequence[str]) -> int:
    """The command line: MODEL TOKENIZER OUT_FOLDER; returns the exit code."""
    if len(arguments) != 3:
        print("usage: python -m w2s_jax.models.llama2c MODEL TOKENIZER OUT_FOLDER", file=sys.stderr)
        return 2
    try:
        print(convert(*arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
