"""Published architectures by name: their sizes, and where else a name may point."""

import json

import pytest

from w2s_jax.errors import UserError
from w2s_jax.models.families import to_hf_config
from w2s_jax.models.shapes import SHAPES, shape
from w2s_jax.models.transformer import params_count

PUBLISHED = {  # parameters according to the models' cards and papers
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b-hf": 6_738_415_616,
    "llama-2-13b-hf": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-tulu-3-8b-sft": 8_030_326_784,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def test_every_shape_has_its_published_size() -> None:
    assert {name: params_count(config) for name, config in SHAPES.items()} == PUBLISHED


def test_a_shape_by_name_or_from_a_file(tmp_path) -> None:
    assert shape("meta-llama/Llama-3.1-8B") is SHAPES["llama-3.1-8b"]
    assert shape("nano-1").width == 16
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf_config(SHAPES["qwen2.5-7b"]) | {"model_type": "qwen2"}))
    assert shape(str(path)) == SHAPES["qwen2.5-7b"]
    with pytest.raises(UserError, match=r"'llama-3-8b'.*perhaps llama-3.1-8b"):
        shape("llama-3-8b")
    with pytest.raises(UserError, match="cannot read"):
        shape(str(tmp_path / "none.json"))
