"""Models in the Hugging Face folder layout: load, export; the shipped nano family by name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import UserError
from w2s_jax.models import weights
from w2s_jax.models.config import Config
from w2s_jax.models.families import from_hf_config, to_hf_config
from w2s_jax.models.transformer import shapes, transformer
from w2s_jax.tokenizer import Tokenizer
from w2s_jax.types import Model, Params

NANO = Path(__file__).resolve().parents[1] / "nano"
_SHIPPED = re.compile(r"(?P<rung>nano-\d+)(@(?P<seed>\d+))?(:(?P<share>0?\.\d+))?")
_FOLDER = re.compile(r"(?P<rung>nano-\d+)-seed(?P<seed>\d+)(-(?P<share>0\.\d+))?")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def load(
    name_or_path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute: Any = None,
    **options: Any,
) -> tuple[Model, Params, Tokenizer]:
    """A model, its parameters and its tokenizer, from a folder, a shipped name or a hub id.

    ``nano-3@1:0.5`` is the shipped rung 3, pretraining seed 1 (0 if not said), half way through its
    pretraining (its end if not said). The parameters get
    ``dtype`` (float32 if None, whatever the files hold), products are computed in ``compute``
    (``dtype`` if None); ``options`` replace other fields of ``Config`` (``remat``, ``scan``,
    ``pad_vocab``). With a ``mesh`` every weight goes straight to its shards.

    Raises:
      UserError: a name that is nothing of these, a hub that cannot be reached, an unsupported or
        incomplete config.json, weights that do not fit it, are corrupt or not finite, no
        tokenizer, or one with more tokens than the model.
    """
    folder = locate(name_or_path)
    config = read_config(folder)
    stored = _dtype_name(dtype or "float32")
    compute = _dtype_name(compute or stored)
    config = dataclasses.replace(config, dtype=compute, param_dtype=stored, **options)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.size > config.vocab:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the model only {config.vocab}; "
            "they do not belong together"
        )
    model = transformer(config)
    return model, weights.read(folder, model, mesh=mesh), tokenizer


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        raise UserError(f"{dtype!r} is not a dtype; try float32 or bfloat16") from None


def locate(name_or_path: str | Path) -> Path:
    """The local folder of a shipped name, a path or a hub id (downloaded if need be).

    Raises:
      UserError: none of these.
    """
    name = str(name_or_path)
    if match := _SHIPPED.fullmatch(name):
        share = f"-{float(match['share']):g}" if match["share"] else ""
        folder = NANO / f"{match['rung']}-seed{match['seed'] or 0}{share}"
        if folder.is_dir():
            return folder
        raise UserError(f"no shipped model {name}; there are: {', '.join(_ends()) or 'none'}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name} is not a model folder (nor a hub id, nor a shipped name)")
    return _download(name)


def shipped() -> list[str]:
    """Names of the models inside this package, as ``load`` takes them."""
    found = (_FOLDER.fullmatch(path.name) for path in NANO.glob("nano-*"))
    keys = sorted((m["rung"], int(m["seed"]), float(m["share"] or 1)) for m in found if m)
    return [
        rung + (f"@{seed}" if seed else "") + (f":{share:g}" if share < 1 else "")
        for rung, seed, share in keys
    ]


def _ends() -> list[str]:
    """The shipped models at the end of their pretraining, for messages."""
    return [name for name in shipped() if ":" not in name]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises many kinds: HTTP, offline, OS, validation
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name} is neither a folder here nor shipped ({', '.join(_ends()) or 'none is'}), "
            f"and the hub does not give it: {reason}"
        ) from None


def read_config(folder: str | Path) -> Config:
    """The architecture of a model folder.

    Raises:
      UserError: no config.json, one that is not JSON, or see ``families.from_hf_config``.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; is it a model folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    try:
        return from_hf_config(values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def export(
    model: Model,
    params: Params,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: Any = None,
    max_shard: int = 5 * 10**9,
) -> Path:
    """Write a folder that ``load`` and transformers read; returns its path.

    Written aside, read back, compared bit for bit, then moved into place: an interrupted export
    leaves what was there. ``dtype`` is the storage dtype (None: that of ``params``);
    ``max_shard`` bytes at most per weight file. With several processes the first one writes.

    Raises:
      UserError: not a decoder, parameters of another shape, a place that is not a model folder or
        cannot be written, or a file that does not read back as written.
    """
    path = Path(path)
    config, stored = _exportable(model, params), _stored_dtype(params, dtype)
    params = _gather(params)
    if jax.process_index() != 0:
        return path
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not free and not (path / "config.json").is_file():
        raise UserError(f"{path} exists and is not a model folder: give another place")
    from safetensors import SafetensorError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as folder:
            weights.write(folder, config, params, stored, max_shard)
            _write_config(folder, config, tokenizer, stored)
            if tokenizer is not None:
                tokenizer.save(folder)
            _verify(folder, model, params, stored)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {path}: {error}") from None
    return path


def fingerprint(params: Params) -> str:
    """Content hash (hex) of a parameter tree: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_leaves_with_path(_gather(params)):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{weights.leaf_name(key)}:{value.dtype}:{value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:16]


def _exportable(model: Model, params: Params) -> Config:
    if not isinstance(model.config, Config):
        raise UserError("only a decoder can be exported; of a classifier export its body")
    to_hf_config(model.config)
    want = jax.tree.map(lambda x: x.shape, shapes(model.config))
    have = jax.tree.map(lambda x: tuple(x.shape), params)
    if want != have:
        raise UserError("the parameters to export do not have the shapes of the model's config")
    return model.config


def _gather(params: Params) -> Params:
    """Host copies of the whole arrays, wherever their shards are."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, params)


def _stored_dtype(params: Params, dtype: Any) -> str:
    return _dtype_name(dtype or jax.tree.leaves(params)[0].dtype)


def _write_config(folder: Path, config: Config, tokenizer: Tokenizer | None, dtype: str) -> None:
    roles = ("bos", "eos", "pad")
    ids = {f"{role}_token_id": getattr(tokenizer, role, None) for role in roles}
    _dump(folder / "config.json", {**to_hf_config(config), **ids, "torch_dtype": dtype})
    _dump(folder / "generation_config.json", {"_from_model_config": True, **ids})


def _dump(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path):
    """A new folder beside ``path`` that takes its place when the block ends well."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o755)
        new = temporary / "new"
        new.mkdir()
        yield new
        old = temporary / "old"
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _verify(folder: Path, model: Model, params: Params, stored: str) -> None:
    config = dataclasses.replace(read_config(folder), param_dtype=stored)
    back = weights.real_leaves(config, weights.read(folder, transformer(config)))
    want = weights.real_leaves(model.config, params)
    want = {name: np.asarray(x).astype(jnp.dtype(stored)) for name, x in want.items()}
    if fingerprint(back) != fingerprint(want):
        raise UserError(f"what was written to {folder} does not read back as it was: disk fault?")
    same = dataclasses.replace(
        config,
        dtype=model.config.dtype,
        param_dtype=model.config.param_dtype,
        remat=model.config.remat,
        scan=model.config.scan,
        pad_vocab=model.config.pad_vocab,
    )
    if same != model.config:
        raise UserError(f"{folder}: config.json does not describe the model: {same}")
