"""A pipeline as one typed object: what is built, what is asked, with which model, where it is kept.

The same fields in Python, as a dict and as YAML. Making one reads no document and starts nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import yaml

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.definition import HIDDEN, check_known, check_type, expand, hide, parse_yaml, read_text, typed
from rabatch.errors import ConfigError

_PARTS: dict[str, type] = {
    "model": ModelConfig,
    "build": BuildConfig,
    "recipe": Recipe,
    "generation": GenerationSettings,
    "resources": Resources,
}
_SHORT = {"model": "name", "recipe": "method"}  # `model: demo` is `model: {name: demo}`
_URLS = ("documents", "questions", "store", "answers")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Documents, questions about them, and everything that decides the answers.

    Args:
        documents: What is built: a path or URL; in Python also a `ray.data.Dataset`, a `pyarrow.Table` or a list of
            dicts.
        questions: What is asked: likewise.
        store: Path or URL of the index store.
        answers: Path or URL of the answers store.
        model: Which model, or its name or path.
        build: What is stored of a document.
        recipe: How a question attends a stored context, or the name of a method.
        generation: Overrides of the model's own generation settings.
        resources: What the jobs take of the cluster.
        storage_options: Of fsspec, for all four places. Credentials belong in environment variables.
        max_failed_rows: How many documents, and how many questions, may fail before the run stops. None: all of them.

    Raises:
        ConfigError: A field is missing, of the wrong type or out of range; named by its dotted path.
    """

    documents: Any
    questions: Any
    store: str
    answers: str
    model: ModelConfig = field(default_factory=ModelConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    recipe: Recipe = field(default_factory=Recipe)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    resources: Resources = field(default_factory=Resources)
    storage_options: dict[str, Any] | None = field(default=None, repr=False)
    max_failed_rows: int | None = None
    _written: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Strings that held ``${NAME}``, as they were written, by dotted path."""

    def __post_init__(self) -> None:
        for name in _URLS:
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, name, value)
            if value is None or value == "" or (name in ("store", "answers") and not isinstance(value, str)):
                raise ConfigError(name, value, "give a path or URL")
        for name, cls in _PARTS.items():
            value = getattr(self, name)
            if isinstance(value, str) and name in _SHORT:
                value = {_SHORT[name]: value}
            if isinstance(value, dict):
                value = typed(cls, value, name)
                object.__setattr__(self, name, value)
            if not isinstance(value, cls):
                raise ConfigError(name, value, f"must be a {cls.__name__}, or a mapping of its fields")
        if not isinstance(self.storage_options, dict | None):  # the value may be a credential
            raise ConfigError("storage_options", type(self.storage_options).__name__, "must be a mapping, or null")
        check_type(self.max_failed_rows, int | None, "max_failed_rows")
        if self.max_failed_rows is not None and self.max_failed_rows < 0:
            raise ConfigError("max_failed_rows", self.max_failed_rows, "must be 0 or more, or null for no limit")

    @classmethod
    def from_yaml(cls, path_or_text: str | os.PathLike[str], *, env: Mapping[str, str] | None = None) -> Self:
        """A pipeline from a file (path or URL ending in .yaml or .yml) or from YAML itself.

        Args:
            path_or_text: A file's path, or text: what holds a line break or begins with ``{``.
            env: The variables that ``${NAME}`` may name. None: those of the process.

        Raises:
            ConfigError: The file cannot be read, is no YAML (with line and column), or as of the class.
        """
        given = os.fspath(path_or_text)
        is_text = isinstance(path_or_text, str) and ("\n" in given or given.lstrip().startswith("{"))
        text, name = (given, "YAML") if is_text else (read_text(given, "pipeline"), given)
        return cls.from_dict(parse_yaml(text, name), env=env)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, env: Mapping[str, str] | None = None) -> Self:
        """A pipeline from a mapping of its fields, as `to_dict` gives them; `env` and errors as of `from_yaml`."""
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        check_known(dict(values), [*known])
        for name in _URLS:
            if values.get(name) in (None, ""):
                raise ConfigError(name, values.get(name), "is missing; give a path or URL")
        ready, written = expand(dict(values), os.environ if env is None else env)
        if HIDDEN in json.dumps(ready.get("storage_options"), default=str):
            fix = f"holds {HIDDEN}, which hides a credential in what is printed; write ${{NAME}} and set that variable"
            raise ConfigError("storage_options", HIDDEN, fix)
        pipeline = cls(**ready)
        pipeline._written.update(written)
        return pipeline

    def to_dict(self, *, secrets: bool = False) -> dict[str, Any]:
        """All fields, defaults too, as JSON and YAML have them. ``${NAME}`` stands as it was written.

        Args:
            secrets: Also the strings of `storage_options` that may be credentials. By default they are ``***``.

        Raises:
            ConfigError: `documents` or `questions` is no path or URL.
        """
        values: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(self) if f.init):
            value = getattr(self, name)
            if name in ("documents", "questions") and not isinstance(value, str):
                fix = "only a path or URL can be written down; save it to a file"
                raise ConfigError(name, type(value).__name__, fix)
            values[name] = value.to_dict() if name in _PARTS else value
        options = values.pop("storage_options")
        values = _as_written(values, self._written)
        values["storage_options"] = (
            _as_written(options, self._written, "storage_options")
            if secrets
            else hide(options, self._written, "storage_options")
        )
        return values

    def to_yaml(self, *, secrets: bool = False) -> str:
        """`to_dict` as YAML, which `from_yaml` reads."""
        return typing.cast(str, yaml.safe_dump(self.to_dict(secrets=secrets), sort_keys=False, allow_unicode=True))

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the definition: the same for the same fields, however they were written.

        Hidden credentials are not in it; a variable counts by its name.
        """
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _as_written(value: Any, written: Mapping[str, str], path: str = "") -> Any:
    """`value` with lists for tuples and ``${NAME}`` where it was written."""
    if path in written:
        return written[path]
    if isinstance(value, dict):
        return {key: _as_written(item, written, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(item, written, f"{path}.{at}") for at, item in enumerate(value)]
    return value.replace("${", "$${") if isinstance(value, str) else value
