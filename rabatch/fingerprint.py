"""The fingerprint: everything that changes the stored numbers of a document's index.

An index is served only to the model, dtype, template and build settings whose fingerprint it carries. Files
are identified by content, never by name, so a copied model is the same model and a changed one is not.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, cast

from rabatch.config import BuildConfig, ModelConfig, Recipe
from rabatch.head_pattern import Pattern, check_shape
from rabatch.models import ModelGeometry, checkpoint_dtype, geometry_of, load_tokenizer, local_path, read_config
from rabatch.prompts import PromptTemplate

FORMAT_VERSION = 1
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json")


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """The part of the fingerprint that a reader must match: weights, config, tokenizer, dtype, context template.

    Args:
        config: With device and dtype explicit (`rabatch.models.resolve`).
    """
    path = local_path(config)
    tokenizer = load_tokenizer(config)
    template = PromptTemplate.of(tokenizer, config.context_template)
    text_config = read_config(config)
    rope = getattr(text_config, "rope_parameters", None) or {}
    return {
        "weights": _digest(path, _WEIGHTS),
        "code": _digest(path, ("*.py",)) if config.trust_remote_code else "",
        "config": _digest(path, ("config.json",)),
        "rope": {str(k): v if isinstance(v, str | int | float | bool) else str(v) for k, v in sorted(rope.items())},
        "tokenizer": _digest(path, _TOKENIZER),
        "dtype": config.dtype,
        "context_template": {"before_document": template.before_document, "bos_ids": list(template.bos_ids)},
    }


def index_fields(config: ModelConfig, build: BuildConfig) -> dict[str, Any]:
    """All fields of the fingerprint. Reads files, loads no weights.

    Args:
        config: With device and dtype explicit (`rabatch.models.resolve`).

    Raises:
        ConfigError: The head pattern is one for a model of another shape.
    """
    check_heads(build, geometry_of(read_config(config)))
    return {
        "format_version": FORMAT_VERSION,
        "model": model_fields(config),
        "build": {**build.stored_fields(), "kv_dtype": stored_dtype(config, build)},
    }


def config_digest(config: ModelConfig) -> str:
    """Of the model's config alone, as `model_fields` has it: what a plan knows a model by, for it reads no weights."""
    return _digest(local_path(config, weights=False), ("config.json",))


def check_heads(settings: BuildConfig | Recipe, geometry: ModelGeometry) -> None:
    """Raise ConfigError unless the head pattern, if there is one, is of the model's shape."""
    if settings.head_pattern is not None:
        pattern = cast(Pattern, settings.head_pattern)
        check_shape(pattern, n_layers=geometry.n_layers, n_kv_heads=geometry.n_kv_heads)


def stored_dtype(config: ModelConfig, build: BuildConfig) -> str:
    """The dtype keys and values are stored in."""
    return checkpoint_dtype(config) if build.kv_dtype == "auto" else build.kv_dtype


def _digest(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name}\0{_file_digest(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and time are the cache's key, not part of the digest."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
