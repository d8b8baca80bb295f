"""Hugging Face families: config.json to ``Config`` and back, and where each weight lies.

Facts from the published implementations (transformers): GPT-2 stores [in,out] matrices and fuses
q, k, v; the others store [out,in]. OLMo-2 normalises what a sub-layer adds, and its queries and
keys over the whole projection; Qwen3 normalises them per head; Qwen2.5 has q, k, v biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from w2s_jax.errors import UserError
from w2s_jax.models.config import Config, RopeScaling


@dataclass(frozen=True)
class Tensor:
    """Where a leaf lies: the tensor's name ("{}" is the layer), whether it is stored [out,in], and
    for fused tensors (block, of how many) along the output axis."""

    name: str
    transposed: bool = False
    block: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` fixes: its traits (fields of ``Config``), defaults of its config.json
    keys, the options that must have one value, the prefix that base-only checkpoints lack."""

    architecture: str
    traits: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prefix: str = "model."


def _rows(name: str) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}.weight", transposed=True)


_LLAMA = {
    "embed": Tensor("model.embed_tokens.weight"),
    "unembed": Tensor("lm_head.weight", transposed=True),
    "final_norm": Tensor("model.norm.weight"),
    "layers/attention_norm": Tensor("model.layers.{}.input_layernorm.weight"),
    "layers/ffn_norm": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    **{f"layers/{x}": _rows(f"self_attn.{x}_proj") for x in "qkvo"},
    **{f"layers/{x}": _rows(f"mlp.{x}_proj") for x in ("gate", "up", "down")},
}
_QK_NORM = {
    f"layers/{x}_norm": Tensor(f"model.layers.{{}}.self_attn.{x}_norm.weight") for x in "qk"
}
_QKV_BIAS = {
    f"layers/{x}_bias": Tensor(f"model.layers.{{}}.self_attn.{x}_proj.bias") for x in "qkv"
}


def _biased(leaf: str, name: str, block: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    weight, bias = (Tensor(f"transformer.{name}.{x}", block=block) for x in ("weight", "bias"))
    return {leaf: weight, f"{leaf}_bias": bias}


_GPT2 = {
    "embed": Tensor("transformer.wte.weight"),
    "positions": Tensor("transformer.wpe.weight"),
    "unembed": Tensor("lm_head.weight", transposed=True),
    **_biased("final_norm", "ln_f"),
    **_biased("layers/attention_norm", "h.{}.ln_1"),
    **_biased("layers/ffn_norm", "h.{}.ln_2"),
    **_biased("layers/q", "h.{}.attn.c_attn", (0, 3)),
    **_biased("layers/k", "h.{}.attn.c_attn", (1, 3)),
    **_biased("layers/v", "h.{}.attn.c_attn", (2, 3)),
    **_biased("layers/o", "h.{}.attn.c_proj"),
    **_biased("layers/up", "h.{}.mlp.c_fc"),
    **_biased("layers/down", "h.{}.mlp.c_proj"),
}

_PLAIN = {
    "activation": "swiglu",
    "norm": "rms",
    "placement": "pre",
    "qk_norm": "none",
    "bias": "none",
    "learned": False,
}
_SILU = {"hidden_act": ("silu", "swish")}
_NO_BIAS = {**_SILU, "attention_bias": (False, None), "mlp_bias": (False, None)}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _PLAIN, _LLAMA, {"rms_norm_eps": 1e-6}, _NO_BIAS),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_PLAIN, "bias": "qkv"},
        {**_LLAMA, **_QKV_BIAS},
        {"rms_norm_eps": 1e-6},
        _SILU,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_PLAIN, "qk_norm": "head"},
        {**_LLAMA, **_QK_NORM},
        {"rms_norm_eps": 1e-6, "head_dim": 128},
        _NO_BIAS,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**_PLAIN, "qk_norm": "all", "placement": "post"},
        {
            **_LLAMA,
            **_QK_NORM,
            "layers/attention_norm": Tensor("model.layers.{}.post_attention_layernorm.weight"),
            "layers/ffn_norm": Tensor("model.layers.{}.post_feedforward_layernorm.weight"),
        },
        {"rms_norm_eps": 1e-5},
        _NO_BIAS,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {**_PLAIN, "activation": "gelu", "norm": "layer", "bias": "all", "learned": True},
        _GPT2,
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "add_cross_attention": (False, None),
        },
        prefix="transformer.",
    ),
}


def weights(config: Config) -> dict[str, Tensor]:
    """Leaf path ("embed", "layers/q") -> where it lies, for the leaves this config has."""
    family = _family(config.family)
    return {
        leaf: tensor
        for leaf, tensor in family.weights.items()
        if leaf != "unembed" or not config.tie
    }


def from_hf_config(values: Mapping[str, Any]) -> Config:
    """The ``Config`` of a parsed config.json (compute and storage float32).

    Raises:
      UserError: unknown ``model_type``, a missing key or one of the wrong type, or an option that
        is not implemented (sliding window, other rope scaling, biases, activations).
    """
    if "model_type" not in values:
        raise UserError("config.json: no key 'model_type'; is this a transformers model folder?")
    name = values["model_type"]
    family = _family(name)
    for key, allowed in family.fixed.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"config.json: {name} with {key}={values[key]!r} is not supported "
                f"({allowed[0]!r} is)"
            )
    _refuse_windows(name, values)
    values = {**family.defaults, **{k: v for k, v in values.items() if v is not None}}
    read = _gpt2_sizes if name == "gpt2" else _llama_sizes
    traits = {k: v for k, v in family.traits.items() if k != "learned"}
    tie = _get(values, "tie_word_embeddings", bool, False)
    return Config(**read(values), **traits, tie=tie, family=name)


def _gpt2_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    width = _get(values, "n_embd", int)
    return {
        "vocab": _get(values, "vocab_size", int),
        "width": width,
        "layers": _get(values, "n_layer", int),
        "heads": _get(values, "n_head", int),
        "ffn": _get(values, "n_inner", int, 4 * width),
        "max_length": _get(values, "n_positions", int),
        "eps": _get(values, "layer_norm_epsilon", float),
        "rope": 0.0,
    }


def _llama_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    heads = _get(values, "num_attention_heads", int)
    base, scaling = _rope(values)
    return {
        "vocab": _get(values, "vocab_size", int),
        "width": _get(values, "hidden_size", int),
        "layers": _get(values, "num_hidden_layers", int),
        "heads": heads,
        "kv_heads": _get(values, "num_key_value_heads", int, heads),
        "head_dim": _get(values, "head_dim", int, 0),
        "ffn": _get(values, "intermediate_size", int),
        "max_length": _get(values, "max_position_embeddings", int),
        "eps": _get(values, "rms_norm_eps", float),
        "rope": base,
        "rope_scaling": scaling,
    }


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or the two older keys."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    base = _get({**values, **rope}, "rope_theta", float, 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"config.json: rope scaling {kind!r} is not supported ('llama3' is)")
    return base, RopeScaling(
        factor=_get(rope, "factor", float),
        low=_get(rope, "low_freq_factor", float),
        high=_get(rope, "high_freq_factor", float),
        original=_get(rope, "original_max_position_embeddings", int),
    )


def _refuse_windows(name: str, values: Mapping[str, Any]) -> None:
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    if values.get("use_sliding_window") or kinds:
        raise UserError(
            f"config.json: {name} with sliding-window attention is not supported; "
            "only layers with full attention are"
        )


def to_hf_config(config: Config) -> dict[str, Any]:
    """The config.json of an architecture, without token ids and storage dtype.

    Raises:
      UserError: a trait that the family does not have (it could not be loaded elsewhere).
    """
    family = _family(config.family)
    have = {k: getattr(config, k) for k in family.traits if k != "learned"}
    have["learned"] = not config.rope
    wrong = {k: v for k, v in have.items() if v != family.traits[k]}
    if wrong:
        raise UserError(
            f"a model with {wrong} is not of family {config.family!r}, which has "
            f"{ {k: family.traits[k] for k in wrong} }; set Config.family to the one that fits"
        )
    common = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "tie_word_embeddings": config.tie,
    }
    return {**common, **(_gpt2_keys(config) if config.family == "gpt2" else _llama_keys(config))}


def _gpt2_keys(config: Config) -> dict[str, Any]:
    if config.kv_heads != config.heads or config.head_dim * config.heads != config.width:
        raise UserError("gpt2 has as many key/value heads as heads, and width = heads x head_dim")
    return {
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.ffn,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.eps,
        "activation_function": "gelu_new",
    }


def _llama_keys(config: Config) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        },
    }


def _family(name: Any) -> Family:
    if name not in FAMILIES:
        raise UserError(f"model_type {name!r} is not supported; {', '.join(FAMILIES)} are")
    return FAMILIES[name]


def _get(values: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """``values[key]`` as ``kind`` (an int will do for a float); missing without default raises."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise UserError(f"config.json: key {key!r} is missing")
        return default
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"config.json: {key} must be {kind.__name__}, got {value!r}")
    return kind(value)
