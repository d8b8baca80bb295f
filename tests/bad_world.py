"""A command that works, with ways to spoil it: what the tests of bad input share."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FFN, VOCAB = 16, 257


def rows(count: int = 120) -> list[dict]:
    """A task of one's own: is the number of fruits even?"""
    fruits = ("figs", "plums", "pears")
    return [
        {"prompt": f"There are {i} {fruits[i % 3]}. Even?", "response": " yes", "label": 1 - i % 2}
        for i in range(count)
    ]


def write_rows(folder: Path, lines: list) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "own.jsonl").write_text(text, encoding="utf8")


def write_model(folder: Path, width: int = 8) -> None:
    """A Llama of one layer with random weights and a byte-level tokenizer, in the usual layout."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB},
        **{"hidden_size": width, "intermediate_size": FFN, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True},
        **{"hidden_act": "silu", "eos_token_id": 256, "torch_dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(width), folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def weights(width: int = 8) -> dict[str, np.ndarray]:
    shapes = {
        "model.embed_tokens.weight": (VOCAB, width),
        "model.norm.weight": (width,),
        **{f"model.layers.0.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")},
        **{f"model.layers.0.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"},
        **{f"model.layers.0.mlp.{n}_proj.weight": (FFN, width) for n in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (width, FFN),
    }
    rng = np.random.default_rng(0)
    return {name: 0.1 * rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


class World:
    """A command that works, in a folder with earlier results.

    ``weak`` and ``strong`` are model folders, ``data`` holds the rows of the task.
    """

    def __init__(self, folder: Path) -> None:
        self.workdir, self.data = folder / "run", folder / "data"
        self.model, self.strong = folder / "weak", folder / "strong"
        write_model(self.model)
        write_model(self.strong, 16)
        self.data.mkdir()
        self.own_task(rows())
        self.experiment = "weak_to_strong"
        self.flags = {
            **{"--preset": "tiny", "--workdir": str(self.workdir), "--blocks": "transfer"},
            **{"--task": "own", "--data": str(self.data), "--losses": "naive"},
            **{"--weak": str(self.model), "--strong": str(self.strong)},
            **{"--train": "20", "--test": "10", "--dev": "4", "--length": "64"},
        }
        kept = self.workdir / "ceiling-0123456789abcdef"
        kept.mkdir(parents=True)
        (kept / "artefact.json").write_text("an earlier result")
        (self.workdir / "notes.txt").write_text("notes of the user")

    def own_task(self, lines: list) -> None:
        """The rows of the task."""
        write_rows(self.data, lines)

    def go(self, monkeypatch) -> None:
        """The experiment's file as ``python -m`` would run it, in this process."""
        path = str(ROOT / "experiments" / f"{self.experiment}.py")
        argv = [word for flag, value in self.flags.items() for word in [flag, *value.split()]]
        monkeypatch.setattr(sys, "argv", [path, *argv])
        runpy.run_path(path, run_name="__main__")

    def contents(self) -> dict[str, bytes]:
        paths = [path for path in self.workdir.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.workdir)): path.read_bytes() for path in paths}


def refused(world: World, monkeypatch, capsys, words: tuple[str, ...]) -> None:
    """The command ends with one line that has ``words``, exit code 2, and changes nothing."""
    before = world.contents()
    with pytest.raises(SystemExit) as stop:
        world.go(monkeypatch)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert world.contents() == before


Spoil = Callable[[World], object]
Case = tuple[Spoil, tuple[str, ...]]


def flags(**values: str) -> Spoil:
    """Replace these flags; ``a_b`` stands for ``--a-b`` and ``a__b`` for ``--a.b``."""
    named = {f"--{k.replace('__', '.').replace('_', '-')}": v for k, v in values.items()}
    return lambda world: world.flags.update(named)


def kept(world: World, before: dict[str, bytes]) -> bool:
    return before.items() <= world.contents().items()


def stopped(world: World, monkeypatch, capsys) -> str:
    """The line with which the command ends; what was there before still is."""
    before = world.contents()
    with pytest.raises(SystemExit) as stop:
        world.go(monkeypatch)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert kept(world, before)
    return said
