"""From a prefilled unit to stored parts: graphs, zones and profiles, which need no model, and the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rabatch.config import BuildConfig, Codec
from rabatch.errors import KeysError
from rabatch.index.base import QuerySample
from rabatch.index.compiled import run_tasks
from rabatch.index.entries import most_entries
from rabatch.index.graph import build_layer, thinned
from rabatch.index.profile import GRID, mass_profile
from rabatch.index.scan import ScanIndex
from rabatch.index.zones import partition
from rabatch.storage.codecs import Of, encode
from rabatch.storage.manifest import Manifest, Part, utc_now
from rabatch.storage.packed_ids import ascending
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.scan_codes import ScanCodes
from rabatch.storage.store import IndexStore
from rabatch.units import Unit, context_sample, index_range, read_geometry, static_rows, unit_array, unit_tensor

PROFILE_POSITIONS = 32
"""Query positions that a profile is the mean of, for each query head: the last ones whose vectors are kept."""


def layer_block(unit: Unit, build: BuildConfig, *, threads: int = 1) -> LayerBlock:
    """Keys, values and, for a full-attention layer, per KV head what the index is made of, zones and a profile.

    Streaming heads have nothing but keys and values. There are no zones if `zone_tokens` is 0, and no profile if the
    unit holds no query vectors.

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
    neighbors = entries = scan = zones = profile = mass = queries = None
    start, stop = index_range(n_tokens, build)
    streaming = geometry.streaming_among(unit["layer"], range(unit["head_start"], unit["head_stop"])) > 0
    bare = streaming or geometry.sliding_windows[unit["layer"]] > 0
    if build.index != "none" and not bare:
        indexed = np.ascontiguousarray(keys[:, start:stop].float().numpy())
        samples = _samples(unit, build, heads, geometry.head_dim)
        if build.builds("graph"):
            graphs = build_layer(indexed, samples, config=build.graph, threads=threads)
            neighbors = ascending(np.stack([graph.neighbors for graph in graphs]))  # no search sees their order
            if stop > start:
                # As many for every part of a layer: a repeated entry point changes no search.
                width = most_entries(stop - start, build.graph.entry_points)
                entries = np.stack([np.resize(graph.entries, width) for graph in graphs])
        if build.builds("scan"):
            made = ScanIndex.build(indexed, samples, threads=threads)
            scan = ScanCodes(made.codes, made.books, made.exceptions, made.to_query)
        if build.zone_tokens:
            zones = partition(indexed, zone_tokens=build.zone_tokens, threads=threads)
        if build.key_mass:
            mass = unit_array(unit["mass"], np.float32).reshape(heads, -1)
            mass = mass if mass.size else np.zeros((heads, stop - start), np.float32)  # no query was sampled
        if build.query_vectors:
            queries = torch.stack([torch.from_numpy(thinned(s, rows).queries) for s in samples]).to(keys.dtype)
        profile = _profile(unit, build, keys, (start, stop), threads=threads)
    positions = static_rows(n_tokens, build) if streaming else np.arange(n_tokens - rows, n_tokens)
    block = LayerBlock(
        layer=unit["layer"],
        head_start=unit["head_start"],
        positions=positions.astype(np.int32),
        keys=keys,
        values=values,
        neighbors=neighbors,
        entries=entries,
        scan=scan,
        zones=zones,
        profile=profile,
        key_mass=mass,
        queries=queries,
        index_start=0 if bare else start,
    )
    return block if bare else coded_block(block, (start, stop), build.key_codec, build.value_codec)


def coded_block(block: LayerBlock, indexed: tuple[int, int], key_codec: Codec, value_codec: Codec) -> LayerBlock:
    """The block with keys and values of the rows `indexed` encoded; graph, codes and zones stay those of the numbers.

    Raises:
        KeysError: Numbers that a codec cannot hold.
    """
    start, stop = indexed
    changed: dict[str, Any] = {}
    of_states: tuple[tuple[Of, torch.Tensor, Codec], ...] = (
        ("key", block.keys, key_codec),
        ("value", block.values, value_codec),
    )
    for of, states, codec in of_states:
        if codec != "none" and stop > start:
            changed[f"{of}_codes"] = encode(states[:, start:stop].float().numpy(), codec, of)
            changed[f"{of}s"] = torch.cat([states[:, :start], states[:, stop:]], dim=1)
    return dataclasses.replace(block, **changed)


def _samples(unit: Unit, build: BuildConfig, heads: int, head_dim: int) -> list[QuerySample]:
    """The sampled queries of each KV head, without those that saw no key of the index."""
    lists = unit_array(unit["lists"], np.int32).reshape(heads, -1, build.query_top_k)
    queries = unit_array(unit["queries"], np.float32).reshape(heads, -1, head_dim)
    samples = []
    for ranked, vectors in zip(lists, queries, strict=True):
        kept = ranked[:, 0] >= 0
        samples.append(QuerySample(ranked[kept], vectors[kept[: len(vectors)]]))
    return samples


def _profile(
    unit: Unit, build: BuildConfig, keys: torch.Tensor, indexed: tuple[int, int], *, threads: int
) -> NDArray[np.float32] | None:
    """The profile of each KV head, [heads, 1 + len(GRID)], from the latest queries whose vectors travel; or None."""
    geometry = read_geometry(unit["geometry"])
    group = geometry.n_query_heads // geometry.n_kv_heads
    sample = context_sample(unit["context_tokens"], build)
    positions = sample.positions[sample.has_vector(group)].numpy()
    if not len(positions):
        return None
    queries = unit_array(unit["queries"], np.float32).reshape(len(keys), group, len(positions), geometry.head_dim)
    latest = queries[:, :, -PROFILE_POSITIONS:].reshape(len(keys), -1, geometry.head_dim)
    profile = np.empty((len(keys), 1 + len(GRID)), np.float32)

    def measure(head: int) -> None:
        profile[head] = mass_profile(
            keys[head].float().numpy(),
            latest[head],
            np.tile(positions[-PROFILE_POSITIONS:], group),
            index_range=indexed,
            window_tokens=build.window_tokens,
            scaling=unit["scaling"],
            softcap=unit["softcap"] or None,
        )

    run_tasks(measure, [(head,) for head in range(len(keys))], threads=threads)
    return profile


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
    """Write one unit as a part; returns the part and the seconds that graphs, zones and profiles took."""
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
