"""Which key index serves a recipe: a plain table, one line per method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rabatch.config import Recipe
from rabatch.errors import FingerprintError
from rabatch.index.base import KeyIndex
from rabatch.index.codes import encode
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.storage.parts import LayerBlock


def _flat(recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], keys: np.ndarray, threads: int) -> KeyIndex:
    return FlatIndex(keys)


def _graph(recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], keys: np.ndarray, threads: int) -> KeyIndex:
    if block.neighbors is None or block.entries is None:
        raise FingerprintError("recipe", recipe.method, f"layer {block.layer} holds no graph; build with --index graph")
    links = (array if len(heads) == len(array) else array[heads] for array in (block.neighbors, block.entries))
    return GraphIndex(encode(keys), *links, search_list=recipe.effective_search_list, threads=threads)


RETRIEVING: dict[str, Callable[[Recipe, LayerBlock, NDArray[np.int64], np.ndarray, int], KeyIndex]] = {
    "flat": _flat,
    "graph": _graph,
    "auto": _graph,
}
"""The methods that retrieve keys from an index."""


def open_index(
    recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], start: int, stop: int, *, threads: int = 1
) -> KeyIndex | None:
    """The key index of some KV heads over rows [start, stop) of a layer, or None if there is nothing to retrieve.

    Args:
        heads: Numbers of the KV heads within the block, ascending.
    """
    if stop <= start or not len(heads) or recipe.method not in RETRIEVING:
        return None
    keys = block.keys[:, start:stop] if len(heads) == block.n_heads else block.keys[heads, start:stop]
    return RETRIEVING[recipe.method](recipe, block, heads, np.ascontiguousarray(keys.float().numpy()), threads)
