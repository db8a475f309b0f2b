"""Which key index serves a recipe: a plain table, one line per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rabatch.attention.sets import stored_bits
from rabatch.config import Method, Recipe
from rabatch.errors import FingerprintError
from rabatch.index.base import KeyIndex
from rabatch.index.codes import KeyCodes
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.scan import ScanIndex
from rabatch.storage.blocks import DTYPE_NAMES, LayerBlock
from rabatch.storage.manifest import Geometry


def _flat(recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], keys: KeyCodes, threads: int) -> KeyIndex:
    return FlatIndex(keys.decode())


def _graph(recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], keys: KeyCodes, threads: int) -> KeyIndex:
    if block.neighbors is None or block.entries is None:
        raise _missing(recipe, block)
    links = (array if len(heads) == len(array) else array[heads] for array in (block.neighbors, block.entries))
    return GraphIndex(keys, *links, search_list=recipe.candidates(keys.shape[1]), threads=threads)


def _scan(recipe: Recipe, block: LayerBlock, heads: NDArray[np.int64], keys: KeyCodes, threads: int) -> KeyIndex:
    if block.scan is None:
        raise _missing(recipe, block)
    arrays = (array if len(heads) == len(array) else array[heads] for array in vars(block.scan).values())
    efforts = [recipe.candidates(keys.shape[1])] * len(heads)
    return ScanIndex.stored(keys, *arrays, efforts=efforts, threads=threads)


def _missing(recipe: Recipe, block: LayerBlock) -> FingerprintError:
    fix = f"layer {block.layer} holds no {recipe.method}; build with --index graph+scan"
    return FingerprintError("recipe", recipe.method, fix)


RETRIEVING: dict[Method, Callable[[Recipe, LayerBlock, NDArray[np.int64], KeyCodes, int], KeyIndex]] = {
    "flat": _flat,
    "graph": _graph,
    "scan": _scan,
}
"""The methods that retrieve keys from an index."""


def methods_of(recipe: Recipe, geometry: Geometry) -> list[Method]:
    """The methods that a recipe may come to retrieve by; none of dense and streaming."""
    if recipe.method == "auto":
        return [method for method in RETRIEVING if geometry.holds(method)]
    return [recipe.method] if recipe.method in RETRIEVING else []


def open_indexes(
    methods: Sequence[Method],
    recipe: Recipe,
    block: LayerBlock,
    heads: NDArray[np.int64],
    start: int,
    stop: int,
    *,
    threads: int = 1,
) -> dict[str, KeyIndex]:
    """By method, the key index of some KV heads over rows [start, stop) of a layer; none if there is nothing to find.

    Args:
        heads: Numbers of the KV heads within the block, ascending.
    """
    if stop <= start or not len(heads):
        return {}
    every = len(heads) == block.n_heads
    if block.key_codes is not None:
        held = block.key_codes if every else block.key_codes.select(heads)
        codes = KeyCodes("int8", held.codes.view(np.int8), held.scale, held.center)
    else:
        keys = block.keys[:, start:stop] if every else block.keys[heads, start:stop]
        codes = KeyCodes(DTYPE_NAMES[keys.dtype], stored_bits(keys))  # type: ignore[arg-type]
    return {
        method: RETRIEVING[method](dataclasses.replace(recipe, method=method), block, heads, codes, threads)
        for method in methods
    }
