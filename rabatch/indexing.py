"""From a prefilled unit to stored parts: graph construction, which needs no model, and the manifest."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import torch

from rabatch.config import BuildConfig
from rabatch.errors import KeysError
from rabatch.index.base import QuerySample
from rabatch.index.graph import build_layer
from rabatch.storage.manifest import Manifest, Part, utc_now
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.store import IndexStore
from rabatch.units import Unit, index_range, read_geometry, unit_array, unit_tensor


def layer_block(unit: Unit, build: BuildConfig, *, threads: int = 1) -> LayerBlock:
    """Keys, values and, for a full-attention layer of a graph index, one graph per KV head.

    Raises:
        KeysError: Keys, values or sampled queries are not finite: the prefill overflowed.
    """
    geometry = read_geometry(unit["geometry"])
    heads = unit["head_stop"] - unit["head_start"]
    keys = unit_tensor(unit["keys"], geometry.kv_dtype, heads, geometry.head_dim)
    values = unit_tensor(unit["values"], geometry.kv_dtype, heads, geometry.head_dim)
    for name, states in (("keys", keys), ("values", values)):
        if not torch.isfinite(states).all():
            fix = "must be finite; the prefill overflowed, choose another dtype for the model"
            raise KeysError(f"{name} of layer {unit['layer']}", "not finite", fix)
    n_tokens, rows = unit["context_tokens"], keys.shape[1]
    neighbors = entries = None
    start, stop = index_range(n_tokens, build)
    sliding = geometry.sliding_windows[unit["layer"]]
    if build.index == "graph" and not sliding:
        indexed = np.ascontiguousarray(keys[:, start:stop].float().numpy())
        samples = _samples(unit, build, heads, geometry.head_dim)
        graphs = build_layer(indexed, samples, config=build.graph, threads=threads)
        neighbors = np.stack([graph.neighbors for graph in graphs])
        if stop > start:
            # Graphs may have fewer entry points than asked for; a repeated one changes no search.
            entries = np.stack([np.resize(graph.entries, build.graph.entry_points) for graph in graphs])
    return LayerBlock(
        layer=unit["layer"],
        head_start=unit["head_start"],
        positions=np.arange(n_tokens - rows, n_tokens, dtype=np.int32),
        keys=keys,
        values=values,
        neighbors=neighbors,
        entries=entries,
        index_start=0 if sliding else start,
    )


def _samples(unit: Unit, build: BuildConfig, heads: int, head_dim: int) -> list[QuerySample]:
    """The sampled queries of each KV head, without those that saw no key of the index."""
    lists = unit_array(unit["lists"], np.int32).reshape(heads, -1, build.query_top_k)
    queries = unit_array(unit["queries"], np.float32).reshape(heads, -1, head_dim)
    samples = []
    for ranked, vectors in zip(lists, queries, strict=True):
        kept = ranked[:, 0] >= 0
        samples.append(QuerySample(ranked[kept], vectors[kept[: len(vectors)]]))
    return samples


def store_unit(
    store: IndexStore,
    unit: Unit,
    build: BuildConfig,
    *,
    document_id: str,
    fingerprint: str,
    attempt: str,
    threads: int = 1,
) -> tuple[Part, float]:
    """Write one unit as a part; returns the part and the seconds that graph construction took."""
    where = {"document_id": document_id, "fingerprint": fingerprint, "attempt": attempt}
    if unit["unit_kind"] == "tokens":
        token_ids = unit_array(unit["token_id"], np.int32)
        tokens = TokensBlock(
            positions=np.arange(len(token_ids), dtype=np.int32),
            token_ids=token_ids,
            char_start=unit_array(unit["char_start"], np.int64),
            char_end=unit_array(unit["char_end"], np.int64),
        )
        return store.put_tokens(tokens, **where), 0.0
    began = time.perf_counter()
    block = layer_block(unit, build, threads=threads)
    seconds = time.perf_counter() - began
    return store.put_layer(block, **where), seconds


def make_manifest(
    *,
    document_id: str,
    content_sha256: str,
    text_chars: int,
    metadata: dict[str, Any],
    fingerprint_fields: dict[str, Any],
    fingerprint: str,
    units_geometry: str,
    context_tokens: int,
    parts: list[Part],
    stats: dict[str, Any],
) -> Manifest:
    """The manifest that commits a document once all its parts are written."""
    return Manifest(
        document_id=document_id,
        content_sha256=content_sha256,
        fingerprint=fingerprint,
        fingerprint_fields=fingerprint_fields,
        context_tokens=context_tokens,
        text_chars=text_chars,
        created_at=utc_now(),
        geometry=read_geometry(units_geometry),
        parts=tuple(sorted(parts, key=lambda p: (p.layer, p.head_start))),
        metadata=metadata,
        stats=stats,
    )


def content_digest(text: str) -> str:
    """SHA-256 of a document's text as UTF-8, in hex; lone surrogates count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
