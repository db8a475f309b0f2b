"""A stored context in memory, ready to be asked: what is read of the index, and whose it must be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.coded import CodedRows
from rabatch.attention.layer import ContextLayer
from rabatch.attention.recall import RecallSampler
from rabatch.budgets import head_budget
from rabatch.config import Recipe
from rabatch.errors import FingerprintError, IntegrityError, KeysError, StoreError
from rabatch.fingerprint import check_heads
from rabatch.layers import Layers
from rabatch.loading import LoadedModel
from rabatch.memory import LayerPool, StoredLayer
from rabatch.retention import narrowed, read_layer
from rabatch.selectors import methods_of, open_indexes, selection_of
from rabatch.storage.failures import REBUILD
from rabatch.storage.joining import decoded
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.store import IndexStore

STREAMED_SLOTS = 4
"""How many times as many questions are decoded together where every pass reads the whole context anew."""


@dataclass(frozen=True)
class OpenContext:
    """A stored context, ready to be asked. To be closed if it was opened with a pool; it is its own context manager.

    Attributes:
        layers: One per layer, in memory or loaded when asked for; answering never changes them.
        token_ids: int64 [context_tokens], on the CPU.
        recall: Looks at some of the searches.
    """

    manifest: Manifest
    loaded: LoadedModel
    layers: Layers
    token_ids: Tensor
    tokens: TokensBlock
    recall: RecallSampler | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(self) -> None:
        """Make a context that was opened ahead of its turn ready for questions. Errors as of `open_context`."""
        self.layers.load()

    def close(self) -> None:
        """Let other contexts have its memory. What is in memory stays until they need it."""
        self.layers.close()

    def slots(self, questions: int) -> int:
        """Questions to decode together where so many are wanted.

        A pass that reads layers anew takes as long as the reading, however few questions are in it: up to
        `STREAMED_SLOTS` times as many share it, by the share of the context that is read.
        """
        return math.ceil(questions * (1 + (STREAMED_SLOTS - 1) * self.layers.streamed_share))

    def least_free_slots(self, slots: int) -> int:
        """Slots that must have become free before waiting questions take them: the pass that lets them in reads as
        much as any other. Of answers of 32 tokens, waiting for a quarter of the slots costs least."""
        return max(1, slots // 4) if self.layers.streamed_share else 1


def open_context(
    store: IndexStore,
    manifest: Manifest,
    loaded: LoadedModel,
    recipe: Recipe,
    *,
    threads: int = 1,
    pool: LayerPool[ContextLayer] | None = None,
    ahead: bool = False,
) -> OpenContext:
    """Read an index and make it ready for `recipe`.

    Args:
        threads: Of a search.
        pool: Holds the layers, as many as its budget allows; the others are read when a pass comes to them. None: all
            are in memory as long as the context is.
        ahead: The context is not asked yet: only what fits beside the contexts in use is read. Call
            `OpenContext.load` when its turn has come.

    Raises:
        FingerprintError: The index belongs to another model, dtype or template, or does not hold the graph or scan
            that the recipe needs.
        ConfigError: The recipe's head pattern is one for a model of another shape.
        ModelError: The recipe does not work with the model.
        IntegrityError: Stored bytes are not what the manifest says. Layers that are read later raise it then.
        StoreError: The store cannot be read.
    """
    check_identity(manifest, loaded)
    check_heads(recipe, loaded.geometry)
    selection_of(recipe, loaded)  # raises what every question would fail by
    if recipe.method == "auto" and manifest.geometry.index == "none":
        recipe = dataclasses.replace(recipe, method="dense")
    if recipe.method in ("graph", "scan") and not manifest.geometry.holds(recipe.method):
        raise FingerprintError(
            "recipe",
            recipe.method,
            f"the index of {manifest.document_id!r} holds no {recipe.method}; "
            f"use flat, or build with --index graph+scan",
        )

    def read(number: int) -> ContextLayer:
        with _naming(manifest):
            keeping, streaming = read_layer(store, manifest, recipe, number)
            layer = _whole_layer(keeping, streaming, narrowed(manifest, recipe), recipe, loaded, threads)
        if not manifest.geometry.sliding_windows[number]:
            layer.prepare(recipe)  # what is made now counts among the layer's bytes, and no pass waits for it
        return layer

    with _naming(manifest):
        tokens = store.read_tokens(manifest, check="once")
    layers = Layers(pool or LayerPool(), _stored_layers(manifest, recipe, loaded, threads), read)
    try:
        layers.fetch() if ahead else layers.load()
    except BaseException:
        layers.close()
        raise
    return OpenContext(manifest, loaded, layers, torch.from_numpy(tokens.token_ids.astype(np.int64)), tokens)


def _stored_layers(manifest: Manifest, recipe: Recipe, loaded: LoadedModel, threads: int) -> list[StoredLayer]:
    """The layers by what they are: the digests of their bytes, and how these are opened."""
    parts = sorted((part.layer, part.head_start, part.sha256, part.bytes) for part in manifest.parts)
    opened = [parts, manifest.path, recipe.to_dict(), loaded.config.device, threads]
    owner = hashlib.sha256(json.dumps(opened).encode()).hexdigest()
    stored = [0] * manifest.geometry.n_layers
    for layer, _, _, nbytes in parts:
        if layer >= 0:
            stored[layer] += nbytes
    geometry = narrowed(manifest, recipe).geometry
    streaming = [len(geometry.heads(number, streaming=True)) for number in range(geometry.n_layers)]
    kinds = [(recipe, bool(window), some) for window, some in zip(geometry.sliding_windows, streaming, strict=True)]
    return [StoredLayer(owner, number, nbytes, kinds[number]) for number, nbytes in enumerate(stored)]


@contextmanager
def _naming(manifest: Manifest) -> Iterator[None]:
    """Errors of reading an index say whose it is."""
    try:
        yield
    except StoreError as error:
        raise type(error)(f"document {manifest.document_id!r}: {error.field}", error.value, error.fix) from error
    except KeysError as error:
        field = f"document {manifest.document_id!r}: {error.field}"
        raise IntegrityError(field, error.value, f"{error.fix}; {REBUILD}") from error


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


def _whole_layer(
    keeping: LayerBlock | None,
    streaming: LayerBlock | None,
    manifest: Manifest,
    recipe: Recipe,
    loaded: LoadedModel,
    threads: int,
) -> ContextLayer:
    """One layer of the heads that keep every token and of those that stream, of which there may be none."""
    device = loaded.config.device
    others = None
    if streaming is not None:
        start, gap = manifest.index_start, manifest.index_stop - manifest.index_start
        keys, values = streaming.keys.to(device), streaming.values.to(device)
        none = np.zeros(streaming.n_heads, np.int64)
        others = ContextLayer(keys, values, 0, start, start, none, left_out=gap)
    if keeping is None:
        assert others is not None  # a layer has heads
        return others
    layer = _context_layer(keeping, manifest, recipe, loaded, threads)
    if others is None:
        return layer
    places = (manifest.geometry.heads(keeping.layer, streaming=some) for some in (False, True))
    mine, theirs = (torch.tensor(heads, device=device) for heads in places)
    return dataclasses.replace(layer, heads=mine, streaming=dataclasses.replace(others, heads=theirs))


def _context_layer(
    block: LayerBlock, manifest: Manifest, recipe: Recipe, loaded: LoadedModel, threads: int
) -> ContextLayer:
    sliding = manifest.geometry.sliding_windows[block.layer]
    rows = block.rows
    start, stop = (rows, rows) if sliding else (manifest.index_start, manifest.index_stop)
    device = loaded.config.device
    if block.key_codes is not None and block.key_codes.codec != "int8":
        block = decoded(block, ("key",))  # a search would need the steps of 32 keys for every one that it scores
    coded = (None if c is None else CodedRows.of(c, start, device) for c in (block.key_codes, block.value_codes))
    key_codes, value_codes = coded
    geometry, n_kv = manifest.geometry, block.n_heads
    keeping = (bool(geometry.heads(number, streaming=False)) for number in range(geometry.n_layers))
    full = [i for i, (w, some) in enumerate(zip(geometry.sliding_windows, keeping, strict=True)) if some and not w]
    dense = not sliding and block.layer < recipe.leading_dense_layers
    methods = methods_of(recipe, geometry) if stop > start and not dense else []
    budget, estimated = np.zeros(n_kv, np.int64), False
    if methods:
        budget = head_budget(
            recipe, block.profile, n_kv_heads=n_kv, n_keys=stop - start, layer=block.layer, full_layers=full
        )
        whole = recipe.budget_in_use != "mass" and bool((budget >= stop - start).all())  # nothing is left to estimate
        estimated = "zones" in recipe.traits.reads and recipe.estimate is not False and not whole
        if estimated and recipe.estimate and block.zones is None:
            fix = "the index holds no zones; build it with --zone-tokens, or choose --no-estimate"
            raise FingerprintError("estimate", recipe.estimate, fix)
    return ContextLayer(
        keys=block.keys.to(device),
        values=block.values.to(device),
        first_position=manifest.context_tokens - rows,
        index_start=start,
        index_stop=stop,
        budget=budget,
        indexes=open_indexes(methods, recipe, block, np.flatnonzero(budget), start, stop, threads=threads),
        zones=block.zones if estimated else None,
        key_codes=key_codes,
        value_codes=value_codes,
        dense=dense,
    )
