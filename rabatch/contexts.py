"""A stored context in memory, ready to be asked: what is read of the index, and whose it must be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.context import ContextLayer
from rabatch.config import Recipe
from rabatch.errors import FingerprintError
from rabatch.loading import LoadedModel
from rabatch.selectors import open_index
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.store import IndexStore


@dataclass(frozen=True)
class OpenContext:
    """A stored context in memory, ready to be asked.

    Attributes:
        layers: One per layer; answering never changes them.
        token_ids: int64 [context_tokens], on the CPU.
    """

    manifest: Manifest
    loaded: LoadedModel
    layers: tuple[ContextLayer, ...]
    token_ids: Tensor
    tokens: TokensBlock


def open_context(
    store: IndexStore, manifest: Manifest, loaded: LoadedModel, recipe: Recipe, *, threads: int = 1
) -> OpenContext:
    """Read an index and make it ready for `recipe`.

    Raises:
        FingerprintError: The index belongs to another model, dtype or template, or holds no graph and the recipe
            needs one.
        IntegrityError: Stored bytes are not what the manifest says.
    """
    check_identity(manifest, loaded)
    if recipe.method == "graph" and manifest.geometry.index != "graph":
        raise FingerprintError(
            "recipe",
            recipe.method,
            f"the index of {manifest.document_id!r} holds no graph; use flat, or build with --index graph",
        )
    layers = []
    for number in range(manifest.geometry.n_layers):
        block = store.read_layer(manifest, number)
        layers.append(_context_layer(block, manifest, recipe, loaded, threads))
    tokens = store.read_tokens(manifest)
    return OpenContext(manifest, loaded, tuple(layers), torch.from_numpy(tokens.token_ids.astype(np.int64)), tokens)


def check_identity(manifest: Manifest, loaded: LoadedModel) -> None:
    """Raises FingerprintError, naming what differs, unless the index was made by this very model."""
    stored = manifest.fingerprint_fields.get("model")
    if stored == loaded.identity:
        return
    stored = stored if isinstance(stored, dict) else {}
    differing = sorted(k for k in {*stored, *loaded.identity} if stored.get(k) != loaded.identity.get(k))
    raise FingerprintError(
        "model",
        loaded.config.name,
        f"the index of {manifest.document_id!r} was built with another {', '.join(differing)}; build it for this model",
    )


def _context_layer(
    block: LayerBlock, manifest: Manifest, recipe: Recipe, loaded: LoadedModel, threads: int
) -> ContextLayer:
    sliding = manifest.geometry.sliding_windows[block.layer]
    rows = block.keys.shape[1]
    start, stop = (rows, rows) if sliding else (manifest.index_start, manifest.index_stop)
    device = loaded.config.device
    return ContextLayer(
        keys=block.keys.to(device),
        values=block.values.to(device),
        first_position=manifest.context_tokens - rows,
        index_start=start,
        index_stop=stop,
        index=None if sliding else open_index(recipe, block, start, stop, threads=threads),
    )
