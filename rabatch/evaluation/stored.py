"""What one recipe needs of an index that is built for several: bytes of the columns that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, get_args

import numpy as np

from rabatch.config import BuildConfig, Recipe
from rabatch.models import ModelGeometry
from rabatch.sizes import StoredBytes, index_size
from rabatch.storage.manifest import Geometry
from rabatch.traits import Column


def needed_bytes(recipe: Recipe, contexts: Iterable[int], geometry: Geometry, build: BuildConfig) -> int:
    """Of contexts of so many tokens, by the arithmetic of `rabatch.sizes`: keys, values and tokens, and the links,
    codes or zones that the recipe's method uses; of heads that stream in it, the static set only.

    Args:
        geometry: Of any of the indexes.
        build: With which they were made.
    """
    return sum(_needed(recipe, n_tokens, geometry, build) for n_tokens in contexts)


def built_bytes(contexts: Iterable[int], geometry: Geometry, build: BuildConfig) -> int:
    """Of everything that the build stores of them, by the same arithmetic."""
    return sum(_bytes(n_tokens, geometry, build).total for n_tokens in contexts)


def _needed(recipe: Recipe, n_tokens: int, geometry: Geometry, build: BuildConfig) -> int:
    method: str = recipe.method
    patterns: list[Any] = [p for p in (build.head_pattern, getattr(recipe, "head_pattern", None)) if p]
    if method == "streaming":
        patterns.append([[False] * geometry.n_kv_heads] * geometry.n_layers)
    if patterns:
        kept = np.logical_and.reduce([np.array(pattern, bool) for pattern in patterns])
        build = dataclasses.replace(build, head_pattern=kept.astype(float).tolist())
    stored = _bytes(n_tokens, geometry, build)
    reads = recipe.traits.reads - ({"zones"} if recipe.estimate is False else set())
    left_out = {column for column in get_args(Column) if column not in reads}
    return sum(value for name, value in vars(stored).items() if name not in left_out)


def _bytes(n_tokens: int, geometry: Geometry, build: BuildConfig) -> StoredBytes:
    shape = ModelGeometry(geometry.n_layers, geometry.n_kv_heads, geometry.n_query_heads, geometry.head_dim)
    return index_size(n_tokens, shape, geometry.sliding_windows, build, kv_dtype=geometry.kv_dtype).bytes
