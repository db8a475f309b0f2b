"""An evaluation written down: the arguments of `rabatch.evaluate` as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Resources
from rabatch.definition import check_known, check_type, expand, parse_yaml, read_text, typed

_PARTS: dict[str, tuple[str, type]] = {
    "model": ("model", ModelConfig),
    "build": ("config", BuildConfig),
    "generation": ("generation", GenerationSettings),
    "resources": ("resources", Resources),
}
_TYPES: dict[str, Any] = {
    "out": str,
    "store": str,
    "data": str,
    "tasks": tuple[str, ...],
    "lengths": tuple[int, ...],
    "recipes": str | list | dict,
    "heads": dict,
    "samples": int,
    "questions_per_context": int,
    "seed": int,
    "storage_options": dict,
    "max_failed_rows": int | None,
}
_HEADS = ("head_pattern", "head_sparsity", "head_threshold")


def read(path: str | os.PathLike[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Keyword arguments of `rabatch.evaluate` from a YAML file.

    Args:
        path: A path or URL.
        env: Variables that ``${NAME}`` may name. None: those of the process.

    Raises:
        ConfigError: It cannot be read, or a field is unknown, of the wrong type or out of range; named by its path.
    """
    url = os.fspath(path)
    values, _ = expand(parse_yaml(read_text(url, "config"), url, "config"), os.environ if env is None else env)
    check_known(values, [*_PARTS, *_TYPES])
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in _PARTS:
            argument, cls = _PARTS[name]
            given = {"name": value} if name == "model" and isinstance(value, str) else value
            found[argument] = typed(cls, given, name)
        else:
            check_type(value, _TYPES[name], name)
            found[name] = value
    check_known(found.get("heads", {}), [*_HEADS], "heads")
    return found
