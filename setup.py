"""Packaging; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TORCH = ["torch==2.13.0", "transformers>=5.0", "accelerate>=1.10", "sentencepiece>=0.2"]
EVAL = ["lm-eval[math,ifeval]>=0.4.13"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "tensorboardX", "openai"]

setup(
    name="w2s_jax",
    version="0.1.0",
    description="How far can a strong model learn from weaker teachers? 42 papers in JAX.",
    long_description=Path("README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["w2s_jax*", "experiments*"]),
    package_data={"w2s_jax": ["py.typed", "nano/**/*"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "datasets>=4.0",
        "tensorflow-datasets>=4.9.9",
        "array_record>=0.8; sys_platform == 'linux'",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "scikit-learn>=1.5",
        "scipy>=1.15",
        "matplotlib>=3.9",
        "tyro>=1.0",
        "jinja2>=3.1.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "track": ["wandb", "tensorboardX"],
        "serve": ["openai"],
        "eval": EVAL,
        "torch": TORCH,
        "parity": [*TORCH, "trl>=1.16"],
        "test": TEST,
        "dev": [*TEST, *EVAL, "ruff==0.17.6", "pyright[nodejs]==1.1.414"],
    },
)
