"""Which key index serves a recipe: a plain table, one line per method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rabatch.config import Recipe
from rabatch.errors import FingerprintError
from rabatch.index.base import KeyIndex
from rabatch.index.codes import encode
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.storage.parts import LayerBlock


def _nothing(recipe: Recipe, block: LayerBlock, keys: np.ndarray, threads: int) -> None:
    return None


def _flat(recipe: Recipe, block: LayerBlock, keys: np.ndarray, threads: int) -> KeyIndex:
    return FlatIndex(keys)


def _graph(recipe: Recipe, block: LayerBlock, keys: np.ndarray, threads: int) -> KeyIndex:
    if block.neighbors is None or block.entries is None:
        raise FingerprintError("recipe", recipe.method, f"layer {block.layer} holds no graph; build with --index graph")
    return GraphIndex(
        encode(keys), block.neighbors, block.entries, search_list=recipe.effective_search_list, threads=threads
    )


_OPEN: dict[str, Callable[[Recipe, LayerBlock, np.ndarray, int], KeyIndex | None]] = {
    "dense": _nothing,
    "streaming": _nothing,
    "flat": _flat,
    "graph": _graph,
}


def open_index(recipe: Recipe, block: LayerBlock, start: int, stop: int, *, threads: int = 1) -> KeyIndex | None:
    """The key index over rows [start, stop) of a layer, or None if there is nothing to retrieve."""
    if stop <= start or _OPEN[recipe.method] is _nothing:
        return None
    keys = np.ascontiguousarray(block.keys[:, start:stop].float().numpy())
    return _OPEN[recipe.method](recipe, block, keys, threads)
