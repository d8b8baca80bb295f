"""The architecture of a decoder: one frozen config for every family."""

from __future__ import annotations

from dataclasses import dataclass

from w2s_jax.errors import UserError

REMAT = ("dots", "attention", "outputs", "full", "offload")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by ``factor``, short kept."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Config:
    """The architecture; zero in ``kv_heads``, ``head_dim`` or ``ffn`` means the usual value.

    ``family`` is the Hugging Face ``model_type`` that ``models.hf.export`` writes. ``placement``
    "post" is OLMo-2's (the norm on what a sub-layer adds). ``rope`` is the base of the rotary
    frequencies, 0 for learned positions. ``qk_norm`` is "none", "head" (Qwen3) or "all" (OLMo-2,
    one norm over the whole projection); ``bias`` is "none", "qkv" (Qwen2.5) or "all" (GPT-2).
    ``dtype`` is for compute, ``param_dtype`` for what ``init`` makes. ``remat`` says what the
    backward pass makes again instead of keeping: "none", or see the table in ``models.remat``.
    ``scan`` None scans deep stacks and those with ``remat`` (unrolled is faster; scanned compiles
    in a time independent of depth, and keeps no more than it is told). ``pad_vocab`` rounds the
    rows of the embedding and the unembedding up to a multiple (128 for matrix units, or the size
    of the tensor axis); the added rows are zero, get no gradient, have no probability and are
    never exported. ``attention`` is the kernel of causal rows: "xla", "cudnn", "splash", or "auto"
    for the fastest that is exact on these devices and this batch (see ``models.backends``).
    ``taps`` are the layers (0 the first) whose outputs ``Output.taps`` has, [B,T,D] each, and
    ``maps`` those whose attention probabilities follow them there, [B,H,T,T] float32 each: for
    these scores of a whole row exist at once, and the layers are not scanned (with a cache there
    are none).

    Raises:
      UserError: sizes that do not fit together or an unknown option.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    activation: str = "swiglu"
    norm: str = "rms"
    placement: str = "pre"
    eps: float = 1e-5
    rope: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: str = "none"
    bias: str = "none"
    tie: bool = True
    max_length: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    pad_vocab: int = 1
    scan: bool | None = None
    attention: str = "auto"
    taps: tuple[int, ...] = ()
    maps: tuple[int, ...] = ()
    family: str = "llama"

    def __post_init__(self) -> None:
        usual = {
            "kv_heads": self.heads,
            "head_dim": self.width // max(self.heads, 1),
            "ffn": 4 * self.width if self.activation == "gelu" else -(-self.width // 3) * 8,
        }
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        _check(self)

    @property
    def scanned(self) -> bool:
        """Whether the layers run as a scan."""
        deep = self.layers > 8 or self.remat != "none"
        return deep and not self.maps if self.scan is None else self.scan

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary matrices, padding included."""
        return -(-self.vocab // self.pad_vocab) * self.pad_vocab


def _check(config: Config) -> None:
    options = {
        "activation": ("swiglu", "gelu"),
        "norm": ("rms", "layer"),
        "placement": ("pre", "post"),
        "qk_norm": ("none", "head", "all"),
        "bias": ("none", "qkv", "all"),
        "remat": ("none", *REMAT),
        "attention": ("auto", "xla", "cudnn", "splash"),
        "dtype": ("float32", "bfloat16", "float16", "float64"),
        "param_dtype": ("float32", "bfloat16", "float16", "float64"),
    }
    for name, allowed in options.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"model: {name}={getattr(config, name)!r} is not one of {allowed}")
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_length")
    for name in (*sizes, "pad_vocab"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise UserError(
                f"model: {name} must be a positive integer, got {getattr(config, name)}"
            )
    for name in ("taps", "maps"):
        asked = getattr(config, name)
        if list(asked) != sorted(set(asked)) or any(not 0 <= i < config.layers for i in asked):
            raise UserError(
                f"model: {name} must be layers 0 to {config.layers - 1}, each once and in order, "
                f"got {asked}"
            )
    if config.maps and config.scan:
        raise UserError("model: layers with attention maps are not scanned; leave scan at None")
    if config.heads % config.kv_heads:
        raise UserError(
            f"model: {config.heads} heads do not divide into {config.kv_heads} key/value heads"
        )
    if config.rope and config.head_dim % 2:
        raise UserError(f"model: rotary positions need an even head_dim, got {config.head_dim}")


def flops_per_token(config: Config, length: int) -> float:
    """Floating-point operations of a training step per token of a causal row of ``length``.

    6 N + 6 L T H h: forward and backward of N weights that multiply (everything but an embedding
    that is only looked up, position tables and vectors), and of scores and mixing over the T/2
    tokens visible on average. Recomputation (remat) is not counted.
    """
    heads = config.heads * config.head_dim
    attention = config.width * (2 * heads + 2 * config.kv_heads * config.head_dim)
    ffn = (3 if config.activation == "swiglu" else 2) * config.width * config.ffn
    weights = config.layers * (attention + ffn) + config.vocab * config.width
    return 6.0 * weights + 6.0 * config.layers * length * heads
