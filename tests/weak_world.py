"""A world small enough to train in: sums as texts, and two tiny models in Hugging Face folders."""

from pathlib import Path

import jax
import numpy as np

from w2s_jax.data import arithmetic
from w2s_jax.data.tasks import Splits
from w2s_jax.models import hf
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.pipelines import weak_to_strong as w2s
from w2s_jax.pipelines.weak_to_strong import Side
from w2s_jax.types import Table

LENGTH = 12


def questions(seed: int, rows: int, *, long: int = 0) -> Table:
    """Is the sum right? Classes alternate; every ``long``-th row has a prompt of 30 tokens."""
    rng = np.random.default_rng(seed)
    truth = (np.arange(rows) % 2).astype(np.int32)
    prompts, responses = [], []
    for i, right in enumerate(truth):
        a, b = (int(x) for x in rng.integers(1, 9, 2))
        told = a + b if right else a + b + int(rng.integers(1, 5))
        extra = "1 + " * 14 if long and i % long == 0 else ""
        prompts.append(f"{extra}{a} + {b} =")
        responses.append(f" {told}")
    return Table(
        {
            "id": np.array([f"{seed}-{i}" for i in range(rows)], object),
            "prompt": np.array(prompts, object),
            "response": np.array(responses, object),
            "label": np.eye(2, dtype=np.float32)[truth],
            "truth": truth,
        }
    )


def splits(seed: int, rows: int = 24, test: int = 20, *, long: int = 0) -> Splits:
    """All seeds share the test rows; other rows are the seed's own."""
    names = {"train": 100, "transfer": 200, "dev": 300}
    parts = {name: questions(first + seed, rows, long=long) for name, first in names.items()}
    return Splits(**parts, test=questions(999, test, long=4 * bool(long)))


def folders(place: Path) -> dict[str, str]:
    """Random decoders ``small`` (width 8) and ``large`` (width 12), one layer each, exported."""
    found = {}
    for name, width in (("small", 8), ("large", 12)):
        model = transformer(Config(vocab=80, width=width, layers=1, heads=1, max_length=64))
        params = jax.tree.map(lambda leaf: 2.0 * leaf, model.init(jax.random.key(width)))
        found[name] = str(hf.export(model, params, place / name, arithmetic.tokenizer()))
    return found


def sides(place: Path, feature: str = "last") -> dict[str, Side]:
    """The two models with a head each."""
    return {name: w2s.side(folder, feature=feature) for name, folder in folders(place).items()}
