"""From parts to a layer: does a part fit its manifest, and one block of several head ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rabatch.errors import IntegrityError
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.codecs import Of, decode
from rabatch.storage.codecs import joined as joined_codes
from rabatch.storage.failures import REBUILD
from rabatch.storage.manifest import Manifest, Part
from rabatch.storage.scan_codes import joined


def check_against(manifest: Manifest, part: Part, block: LayerBlock) -> None:
    """Refuse a part that is sound in itself and not what the manifest describes."""

    def rule(holds: bool, where: str, value: object, wanted: object) -> None:
        if not holds:
            raise IntegrityError(f"{part.path}: {where}", value, f"must be {wanted}; {REBUILD}")

    geometry = manifest.geometry
    streaming = geometry.streaming_among(part.layer, range(part.head_start, part.head_stop)) > 0
    rows = manifest.stored_rows(part.layer, streaming=streaming)
    kv = (str(block.keys.dtype).removeprefix("torch."), int(block.keys.shape[2]))
    rule(kv == (geometry.kv_dtype, geometry.head_dim), "dtype", kv, (geometry.kv_dtype, geometry.head_dim))
    if streaming:
        start, stop = manifest.index_start, manifest.index_stop
        static = np.concatenate([np.arange(start), np.arange(stop, manifest.context_tokens)])
        rule(np.array_equal(block.positions, static), "position", block.rows, f"all but tokens {start} to {stop - 1}")
    else:
        last = np.arange(manifest.context_tokens - rows, manifest.context_tokens)
        rule(np.array_equal(block.positions, last), "position", block.rows, f"the last {rows} tokens")
    bare = streaming or geometry.sliding_windows[part.layer] > 0
    codecs = (part.key_codec, part.value_codec)
    rule(block.codecs == codecs, "codecs", block.codecs, codecs)
    rule(not bare or codecs == ("none", "none"), "codecs", codecs, "none of heads without an index")
    indexed = not bare and (geometry.index != "none" or codecs != ("none", "none"))
    index_rows = manifest.index_stop - manifest.index_start if indexed else 0
    rule(block.index_rows == index_rows, "index_rows", block.index_rows, index_rows)
    place = (block.index_start, manifest.index_start)
    rule(index_rows == 0 or place[0] == place[1], "index_start", *place)
    for kind, there in (("graph", block.neighbors is not None), ("scan", block.scan is not None)):
        wanted = geometry.holds(kind) and not bare
        rule(there == wanted, kind, there, wanted)
    if block.neighbors is not None:
        rule(block.neighbors.shape[2] == geometry.degree, "degree", block.neighbors.shape[2], geometry.degree)
        rule(index_rows == 0 or block.entries is not None, "entries", None, "there where there is a graph")


def join(manifest: Manifest, blocks: list[LayerBlock]) -> LayerBlock:
    """One block of several, their heads one after the other. Raises IntegrityError if they differ in their index.

    Where other heads lie between them, as streaming ones may, `head_start` counts for the first block alone.
    """
    first = blocks[0]
    graphs = [(b.neighbors, b.entries, b.index_start) for b in blocks]
    has_graph = [neighbors is not None for neighbors, _, _ in graphs]
    shapes = {None if entries is None else entries.shape[1] for _, entries, _ in graphs}
    if len(set(has_graph)) != 1 or len(shapes) != 1 or len({start for *_, start in graphs}) != 1:
        raise IntegrityError(f"{manifest.path}: layer {first.layer}", graphs, "its parts differ in their graph")
    zones, profiles = [b.zones for b in blocks], [b.profile for b in blocks]
    scans = [b.scan for b in blocks]
    masses, queries = [b.key_mass for b in blocks], [b.queries for b in blocks]
    optional: dict[str, Sequence[object]] = {"zones": zones, "profile": profiles, "scan": scans, "mass": masses}
    for name, arrays in (optional | {"queries": queries}).items():
        if len({array is None for array in arrays}) != 1:
            there = [array is not None for array in arrays]
            raise IntegrityError(f"{manifest.path}: layer {first.layer}: {name}", there, "not in all of its parts")
    if len({b.codecs for b in blocks}) != 1:
        blocks = [decoded(b) for b in blocks]
    coded = [[c for c in (getattr(b, f"{of}_codes") for b in blocks) if c is not None] for of in ("key", "value")]
    return LayerBlock(
        layer=first.layer,
        head_start=first.head_start,
        positions=first.positions,
        keys=torch.cat([b.keys for b in blocks]),
        values=torch.cat([b.values for b in blocks]),
        neighbors=np.concatenate([n for n, _, _ in graphs if n is not None]) if has_graph[0] else None,
        entries=None if None in shapes else np.concatenate([e for _, e, _ in graphs if e is not None]),
        scan=None if scans[0] is None else joined([scan for scan in scans if scan is not None]),
        zones=None if zones[0] is None else np.concatenate([z for z in zones if z is not None]),
        profile=None if profiles[0] is None else np.concatenate([p for p in profiles if p is not None]),
        key_mass=None if masses[0] is None else np.concatenate([m for m in masses if m is not None]),
        queries=None if queries[0] is None else torch.cat([q for q in queries if q is not None]),
        index_start=first.index_start,
        key_codes=joined_codes(coded[0]) if coded[0] else None,
        value_codes=joined_codes(coded[1]) if coded[1] else None,
    )


def decoded(block: LayerBlock, which: Sequence[Of] = ("key", "value")) -> LayerBlock:
    """The block with keys, values or both decoded and rounded to the dtype; what is not encoded stays as it is."""
    changed: dict[str, Any] = {}
    for of in which:
        plain, coded = getattr(block, f"{of}s"), getattr(block, f"{of}_codes")
        if coded is not None:
            start, stop = block.index_start, block.index_start + block.index_rows
            whole = torch.empty((block.n_heads, block.rows, block.head_dim), dtype=plain.dtype)
            whole[:, :start], whole[:, stop:] = plain[:, :start], plain[:, start:]
            for head in range(block.n_heads):
                one = decode(coded.select(slice(head, head + 1)))
                whole[head, start:stop] = torch.from_numpy(one[0]).to(plain.dtype)
            changed |= {f"{of}s": whole, f"{of}_codes": None}
    return dataclasses.replace(block, **changed)
