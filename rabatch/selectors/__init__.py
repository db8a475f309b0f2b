"""What chooses the keys that a recipe attends beyond the static set: plain tables, one line per method.

docs/methods.md says what each does, and in what it differs from what was published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rabatch.attention.selection import Selection
from rabatch.attention.sets import stored_bits
from rabatch.config import Recipe
from rabatch.index.base import Searchable
from rabatch.index.codes import KeyCodes
from rabatch.loading import LoadedModel
from rabatch.selectors.flat import open_flat
from rabatch.selectors.graph import open_graph
from rabatch.selectors.h2o import open_h2o
from rabatch.selectors.hnsw import open_hnsw
from rabatch.selectors.infinigen import InfinigenSelection, open_infinigen
from rabatch.selectors.ivf import open_ivf
from rabatch.selectors.opening import Opener, Opening
from rabatch.selectors.pyramidkv import PyramidKvSelection, open_pyramidkv
from rabatch.selectors.quest import open_quest
from rabatch.selectors.scan import open_scan
from rabatch.selectors.snapkv import SnapKvSelection, open_snapkv
from rabatch.selectors.vamana import open_vamana
from rabatch.storage.blocks import DTYPE_NAMES, LayerBlock
from rabatch.storage.manifest import Geometry
from rabatch.traits import Method

RETRIEVING: dict[Method, Opener] = {
    "flat": open_flat,
    "graph": open_graph,
    "scan": open_scan,
    "ivf": open_ivf,
    "hnsw": open_hnsw,
    "vamana": open_vamana,
    "quest": open_quest,
    "snapkv": open_snapkv,
    "pyramidkv": open_pyramidkv,
    "h2o": open_h2o,
    "infinigen": open_infinigen,
}
"""The methods that attend keys of an index, and what opens one."""


def selection_of(recipe: Recipe, loaded: LoadedModel) -> Selection:
    """What chooses keys for the questions under way.

    Raises:
        ModelError: The method does not work with the model.
    """
    match recipe.method:
        case "snapkv":
            return SnapKvSelection(recipe.method)
        case "pyramidkv":
            return PyramidKvSelection(recipe.method)
        case "infinigen":
            return InfinigenSelection(recipe.method, loaded.model, loaded.geometry.n_layers)
    return Selection(recipe.method)


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
) -> dict[str, Searchable]:
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
        method: RETRIEVING[method](Opening(dataclasses.replace(recipe, method=method), block, heads, codes, threads))
        for method in methods
    }
