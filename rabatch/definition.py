"""A definition as text: YAML that is read strictly, environment variables, typed values, and what is never printed.

Nothing in a definition is run: `yaml.SafeLoader`, no tags, no templates. ``${NAME}`` inside a string is the environment
variable of that name; ``$${`` is ``${`` itself.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from rabatch.errors import ConfigError

T = TypeVar("T")

HIDDEN = "***"
# Strings of `storage_options` that are no credentials. Every other string there is hidden when it is printed.
_HARMLESS = ("endpoint_url", "region_name", "addressing_style", "signature_version", "profile", "project")
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"(?<=://)[^/@]*@")
_NAMES: dict[Any, str] = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "a mapping", type(None): "null"}


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error: the first value would be dropped unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} stands twice in one mapping"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_text(path: str, field: str) -> str:
    """The text of a file, a path or URL; `field` is what named it.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8.
    """
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return typing.cast(bytes, file.read()).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(field, path, f"is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except Exception as error:  # whatever the filesystem raises
        raise ConfigError(field, path, f"cannot be read ({error}); check the path") from error


def parse_yaml(text: str, name: str, field: str = "pipeline") -> dict[str, Any]:
    """The mapping in `text`. `name` is what messages call it, `field` what named it.

    Raises:
        ConfigError: It is no YAML, with line and column, or no mapping.
    """
    try:
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(field, name, f"{where}{error.problem or error.context}; mend the YAML there") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(field, name, f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(field, name, f"holds {found}; write fields: `documents: URL` and so on, one a line")
    return values


def expand(value: Any, env: Mapping[str, str], path: str = "") -> tuple[Any, dict[str, str]]:
    """`value` with every ``${NAME}`` replaced, and by dotted path the strings that had one, as they were written.

    Raises:
        ConfigError: A variable is not set, or is no name.
    """
    written: dict[str, str] = {}
    if isinstance(value, str):
        new = _VARIABLE.sub(lambda match: _lookup(match, env, path), value)
        return new, {path: value} if new != value else {}
    if isinstance(value, dict):
        items = {}
        for key, item in value.items():
            items[key], below = expand(item, env, f"{path}.{key}" if path else str(key))
            written |= below
        return items, written
    if isinstance(value, list):
        entries = []
        for at, item in enumerate(value):
            entry, below = expand(item, env, f"{path}.{at}")
            entries.append(entry)
            written |= below
        return entries, written
    return value, {}


def _lookup(match: re.Match[str], env: Mapping[str, str], path: str) -> str:
    name = match[1]
    if name is None:
        return "${"
    if not _NAME.fullmatch(name):
        raise ConfigError(path, match[0], "is no name of an environment variable; write ${NAME}, or $${ for ${ itself")
    if name not in env:
        raise ConfigError(path, match[0], f"the environment variable {name} is not set; set it, or write the value")
    return env[name]


def hide(value: Any, written: Mapping[str, str], path: str, name: str = "") -> Any:
    """`value` of ``storage_options`` fit to be printed: strings that may be credentials are ``***``, those that came
    from environment variables as they were written."""
    if path in written:
        return written[path]
    if isinstance(value, dict):
        return {key: hide(item, written, f"{path}.{key}", str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, written, f"{path}.{at}", name) for at, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _USER.sub(f"{HIDDEN}@", value) if isinstance(value, str) and name in _HARMLESS else HIDDEN


def typed(cls: type[T], values: Any, path: str) -> T:
    """The settings `cls` from a mapping; errors name the field by its dotted path.

    Raises:
        ConfigError: An unknown field, a value of the wrong type, or one out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(path, values, f"must be a mapping of fields: {', '.join(_fields(cls))}")
    check_known(values, _fields(cls), path)
    hints = typing.get_type_hints(cls)
    ready: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(hints[name]):
            ready[name] = typed(typing.cast(type, hints[name]), value, where)
        else:
            check_type(value, hints[name], where)
            ready[name] = value
    try:
        return cls(**ready)
    except ConfigError as error:
        where = f"{path}.{error.field}" if error.field in _fields(cls) else error.field
        raise ConfigError(where, error.value, error.fix) from None


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def check_known(values: dict[Any, Any], known: list[str], path: str = "") -> None:
    """Raise ConfigError for a field that is not `known`."""
    for name in values:
        if name not in known:
            where = f"{path}.{name}" if path else str(name)
            raise ConfigError(where, values[name], f"is an unknown field; known: {', '.join(sorted(known))}")


def check_type(value: Any, hint: Any, path: str) -> None:
    """Raise ConfigError unless `value`, as YAML or JSON has it, is of the type `hint`."""
    if not _fits(value, hint):
        raise ConfigError(path, value, f"must be {_name(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is tuple:
        inner = get_args(hint)
        if not isinstance(value, list | tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is (origin or hint)


def _name(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is Sequence:
        return f"a list, each {_name(inner[0])}"
    if origin is tuple:
        names = [_name(item) for item in inner if item is not Ellipsis]
        return f"a list, each {names[0]}" if inner[-1] is Ellipsis else f"[{', '.join(names)}]"
    return _NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))
