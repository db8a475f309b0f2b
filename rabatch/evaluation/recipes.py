"""Recipes as an evaluation names them: a method, its fields where they are not the default, `duo+` before it.

``graph``, ``graph:top_k=50:budget=fixed``, ``duo+graph``. The text is the name under which tables show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import yaml

from rabatch.config import BuildConfig, Recipe
from rabatch.definition import check_known, typed
from rabatch.errors import ConfigError

DUO = "duo+"
"""Before a method: the heads of a pattern stream, the others are attended as the method does."""

Recipes: TypeAlias = str | Sequence[str | Recipe] | Mapping[str, str | Recipe | Mapping[str, Any]]

_HEADS = ("head_pattern", "head_sparsity", "head_threshold")


def named_recipes(recipes: Recipes, heads: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """Recipes by name, in their order.

    Args:
        recipes: Names with commas between; a list of names or `Recipe`s; or by name a text, a `Recipe`, or a mapping of
            its fields.
        heads: Fields of `Recipe` that ``duo+`` stands for: `head_pattern`, and `head_sparsity` or `head_threshold`.

    Raises:
        ConfigError: An unknown method or field, a wrong value, a name that stands twice, ``duo+`` without a pattern.
    """
    if isinstance(recipes, str):
        recipes = [name.strip() for name in recipes.split(",") if name.strip()]
    if not isinstance(recipes, Mapping):
        pairs: list[tuple[str, Any]] = [(r.method if isinstance(r, Recipe) else r, r) for r in recipes]
    else:
        pairs = list(recipes.items())
    if not pairs:
        raise ConfigError("recipes", recipes, "name at least one, such as dense,graph")
    found: dict[str, Recipe] = {}
    for name, given in pairs:
        if name in found:
            raise ConfigError("recipes", name, "stands twice; leave one out, or tell them apart by a field")
        found[name] = _recipe(name, given, heads or {})
    return found


def _recipe(name: str, given: Any, heads: Mapping[str, Any]) -> Recipe:
    if isinstance(given, Recipe):
        return given
    where = f"recipes.{name}"
    if isinstance(given, Mapping):
        fields = dict(given)
    elif isinstance(given, str):
        method, *settings = given.split(":")
        fields = {"method": method}
        for setting in settings:
            field, equals, value = setting.partition("=")
            if not equals or not field or field in fields:
                fix = f"{setting!r} is no new field=value; write METHOD:field=value:field=value"
                raise ConfigError("recipes", name, fix)
            fields[field] = _scalar(value, name)
    else:
        raise ConfigError(where, given, "must be METHOD:field=value, or a mapping of the recipe's fields")
    method = fields.get("method", Recipe().method)
    if not (isinstance(method, str) and method.startswith(DUO)):
        return typed(Recipe, fields, where)
    own = {field: fields.pop(field) for field in _HEADS if field in fields}
    if {"head_sparsity", "head_threshold"} & own.keys():  # one's own takes the place of the common one
        heads = {"head_pattern": heads.get("head_pattern")}
    pattern = {field: value for field, value in {**heads, **own}.items() if value is not None}
    if "head_pattern" not in pattern:
        raise ConfigError("recipes", name, "needs to know which heads stream; give --head-pattern DIR")
    recipe = typed(Recipe, fields | {"method": method.removeprefix(DUO)}, where)
    check_known(pattern, [field.name for field in dataclasses.fields(Recipe)], where)
    return dataclasses.replace(recipe, **pattern)


def _scalar(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("recipes", name, f"{text!r} is no value of a field") from error


def build_for(recipes: Mapping[str, Recipe], config: BuildConfig | None = None) -> BuildConfig:
    """The build whose one index serves all of the recipes: `config`, and what they need beyond it."""
    needed: dict[str, Any] = {}
    for recipe in recipes.values():
        needed |= recipe.traits.build
    return dataclasses.replace(config or BuildConfig(), **needed)
