"""Which heads of a stored context keep all of it when it is asked: those that the index and the recipe keep both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from rabatch.config import Recipe
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore


def narrowed(manifest: Manifest, recipe: Recipe) -> Manifest:
    """The manifest as it would be of an index that streams what the recipe streams too. Natively sliding layers keep
    their window, whatever the recipe says of them."""
    shape = manifest.geometry
    streaming = tuple(
        () if window else tuple(sorted({*recipe.streaming_heads(layer), *shape.heads(layer, streaming=True)}))
        for layer, window in enumerate(shape.sliding_windows)
    )
    if not any(streaming) or streaming == shape.streaming_heads:
        return manifest
    return dataclasses.replace(manifest, geometry=dataclasses.replace(shape, streaming_heads=streaming))


def read_layer(
    store: IndexStore, manifest: Manifest, recipe: Recipe, layer: int
) -> tuple[LayerBlock | None, LayerBlock | None]:
    """The heads of a layer that keep all of it, and those that stream: of each kind, None if there are none.

    Heads are numbered by their place among those of their kind. Errors as of `IndexStore.read_heads`.
    """
    # Once: a digest takes longer than all the rest of reading a part from the page cache.
    keeping = store.read_heads(manifest, layer, streaming=False, check="once")
    streaming = store.read_heads(manifest, layer, streaming=True, check="once")
    kept = manifest.geometry.heads(layer, streaming=False)
    wanted = set(narrowed(manifest, recipe).geometry.heads(layer, streaming=False))
    if keeping is None or wanted == set(kept):
        return keeping, streaming
    cut = _static(keeping.among([place for place, head in enumerate(kept) if head not in wanted]), manifest)
    if streaming is not None:
        numbers = [head for head in kept if head not in wanted] + manifest.geometry.heads(layer, streaming=True)
        cut = _together(cut, streaming, np.argsort(numbers).tolist())
    return (keeping.among([place for place, head in enumerate(kept) if head in wanted]) if wanted else None), cut


def _static(block: LayerBlock, manifest: Manifest) -> LayerBlock:
    """The static set of heads that keep more, as a build stores it of heads that stream."""
    start, stop = manifest.index_start, manifest.index_stop
    rows = np.r_[0:start, stop : block.rows]
    keys, values = (
        states if coded is not None else states[:, rows]  # beside codes it is all there is
        for states, coded in ((block.keys, block.key_codes), (block.values, block.value_codes))
    )
    return LayerBlock(
        layer=block.layer, head_start=block.head_start, positions=block.positions[rows], keys=keys, values=values
    )


def _together(first: LayerBlock, second: LayerBlock, order: Sequence[int]) -> LayerBlock:
    """Streaming heads of two blocks, in this order."""
    both = ((first.keys, second.keys), (first.values, second.values))
    keys, values = (torch.cat(states)[list(order)] for states in both)
    return dataclasses.replace(first, keys=keys, values=values)
