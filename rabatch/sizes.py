"""What a document's index will take, before it is built: bytes of each part of the format, and requests.

The arithmetic of docs/format.md.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from rabatch.config import BuildConfig, IndexKind
from rabatch.index.entries import most_entries
from rabatch.index.scan import EXCEPTIONS
from rabatch.models import ModelGeometry
from rabatch.prefill import MAX_UNIT_BYTES
from rabatch.storage.codecs import GROUP, code_width, group_width
from rabatch.storage.columns import id_width
from rabatch.storage.filesystem import PIECE_BYTES
from rabatch.storage.layout import MASS_BYTES, STATES
from rabatch.storage.packed_ids import packed_width
from rabatch.traits import Method
from rabatch.units import index_range

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TOKEN_BYTES = 6.6  # of the tokens part, compressed: measured on English text
_COLUMN_BYTES = 180  # of Parquet's footer and page headers, per column and head: measured
_PART_BYTES = 1500  # of its other metadata: measured
_PUT_BYTES = 50 << 20  # s3fs: an object of twice as much, or more, goes in pieces of this
NEEDED: dict[Method, IndexKind] = {
    **{"dense": "none", "streaming": "none", "flat": "none"},
    **{"graph": "graph", "scan": "scan", "h2o": "scan"},
    **dict.fromkeys(("ivf", "hnsw", "vamana", "quest", "snapkv", "pyramidkv", "infinigen"), "none"),
}
"""The smallest index that serves a method."""


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of an index, by what they are for.

    Args:
        kv: Keys and values.
        graph: Links.
        codes: 4-bit codes, with what decodes them.
        zones: The zone of every key.
        mass: How much every key was attended.
        queries: Sampled query vectors.
        tokens: Token ids and where they stand in the text.
        parquet: Footers and headers.
    """

    kv: int = 0
    graph: int = 0
    codes: int = 0
    zones: int = 0
    mass: int = 0
    queries: int = 0
    tokens: int = 0
    parquet: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: Self) -> StoredBytes:
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return StoredBytes(*(mine + theirs for mine, theirs in both))


@dataclass(frozen=True)
class Requests:
    """Requests to an object store.

    Args:
        put: Of building: parts and the manifest.
        list: Of building: before the manifest.
        get: Of opening the index once for answering.
    """

    put: int = 0
    list: int = 0
    get: int = 0

    def __add__(self, other: Self) -> Requests:
        return Requests(self.put + other.put, self.list + other.list, self.get + other.get)


@dataclass(frozen=True)
class IndexSize:
    """What is stored of one document, or of several together."""

    bytes: StoredBytes = StoredBytes()
    requests: Requests = Requests()
    indexed: int = 0
    """Keys in key indexes, over all KV heads and layers."""

    def __add__(self, other: Self) -> IndexSize:
        return IndexSize(self.bytes + other.bytes, self.requests + other.requests, self.indexed + other.indexed)

    def times(self, n: int) -> IndexSize:
        """Of so many alike."""
        stored = StoredBytes(*(n * value for value in vars(self.bytes).values()))
        return IndexSize(stored, Requests(*(n * value for value in vars(self.requests).values())), n * self.indexed)


def index_size(
    n_tokens: int, shape: ModelGeometry, windows: Sequence[int], build: BuildConfig, *, kv_dtype: str
) -> IndexSize:
    """Of a document.

    Args:
        n_tokens: Of its context.
        windows: Per layer the native sliding window, 0 for full attention.
        kv_dtype: The stored dtype.
    """
    alike = collections.Counter(
        (window, () if window else build.streaming_heads(layer)) for layer, window in enumerate(windows)
    )
    total = _tokens_part(n_tokens)
    for (window, streaming), n_layers in alike.items():
        for heads, streams in _runs(shape.n_kv_heads, streaming):
            total += _heads(heads, n_tokens, window, streams, shape, build, ITEM_BYTES[kv_dtype]).times(n_layers)
    return total + IndexSize(requests=Requests(put=1, list=1, get=1))  # the manifest


def _runs(n_heads: int, streaming: Sequence[int]) -> list[tuple[int, bool]]:
    """Lengths of the runs of heads that all stream or all do not: parts hold one or the other."""
    kinds = itertools.groupby(range(n_heads), key=set(streaming).__contains__)
    return [(len(list(heads)), kind) for kind, heads in kinds]


def _tokens_part(n_tokens: int) -> IndexSize:
    stored = StoredBytes(tokens=round(n_tokens * _TOKEN_BYTES), parquet=_PART_BYTES)
    return IndexSize(stored, _requests([stored.total]))


def _heads(
    heads: int, n_tokens: int, window: int, streams: bool, shape: ModelGeometry, build: BuildConfig, item: int
) -> IndexSize:
    """Of consecutive heads of a layer. Those that stream, and sliding layers, have keys and values only."""
    dim = shape.head_dim
    start, stop = index_range(n_tokens, build)
    rows = min(window, n_tokens) if window else n_tokens - (stop - start) * streams
    covered = 0 if streams or window else stop - start
    bare = streams or window > 0 or build.index == "none"
    indexed = 0 if bare else covered
    graph = codes = zones = mass = queries = small = 0
    columns = 3
    if not bare and build.builds("graph"):
        degree = build.graph.degree
        graph = min(rows * degree * id_width(indexed), indexed * packed_width(indexed, degree))
        small += most_entries(indexed, build.graph.entry_points) * 7
        columns += 1
    if not bare and build.builds("scan"):
        n_codes = -(-dim // 2)
        floats = 4 * (n_codes * 16 * 2 + dim * dim)
        codes = rows * -(-dim // 4) + floats * 4 // 3 + min(EXCEPTIONS, indexed) * 7
        columns += 1
    if not bare and build.zone_tokens:
        zones = rows * id_width(-(-indexed // build.zone_tokens))
        columns += 1
    if not bare and build.key_mass:
        mass = indexed * MASS_BYTES
        columns += 1
    if not bare and build.query_vectors:
        queries = min(_sampled_vectors(n_tokens, indexed, shape, build), rows) * dim * item
        columns += 1
    kv = 2 * rows * dim * item
    for of, codec in zip(STATES, (build.key_codec, build.value_codec), strict=True):
        if codec != "none" and covered:
            groups = group_width(codec, of, dim)
            kv += covered * (code_width(codec, of, dim) - dim * item) + -(-covered // GROUP) * groups
            small += 2 * dim * 2 * 4 // 3  # scale and center
            columns += 1 + (groups > 0)
    parquet = columns * _COLUMN_BYTES + small
    per_head = StoredBytes(kv=kv, graph=graph, codes=codes, zones=zones, mass=mass, queries=queries, parquet=parquet)
    step = min(heads, max(1, MAX_UNIT_BYTES // max(1, _travelling_bytes(n_tokens, rows, indexed, shape, build, item))))
    n_parts = -(-heads // step)
    stored = StoredBytes(*(heads * value for value in vars(per_head).values()))
    stored += StoredBytes(parquet=n_parts * _PART_BYTES)
    parts = [per_head.total * min(step, heads - first) for first in range(0, heads, step)]
    return IndexSize(stored, _requests(parts), heads * indexed)


def _travelling_bytes(
    n_tokens: int, rows: int, indexed: int, shape: ModelGeometry, build: BuildConfig, item: int
) -> int:
    """Of a KV head on its way to graph construction, by which a layer is cut into parts (`rabatch.prefill`)."""
    group = shape.n_query_heads // shape.n_kv_heads
    sampled = _sampled_positions(n_tokens, indexed, build)
    vectors = _sampled_vectors(n_tokens, indexed, shape, build) * shape.head_dim * 4
    mass = indexed * MASS_BYTES if build.key_mass else 0
    return rows * shape.head_dim * 2 * item + group * sampled * build.query_top_k * 4 + vectors + mass


def _sampled_positions(n_tokens: int, indexed: int, build: BuildConfig) -> int:
    ranking = n_tokens - min(min(build.sink_tokens, n_tokens) + build.window_tokens, n_tokens)
    return round(ranking * build.query_share) if indexed else 0


def _sampled_vectors(n_tokens: int, indexed: int, shape: ModelGeometry, build: BuildConfig) -> int:
    """Of a KV head."""
    group = shape.n_query_heads // shape.n_kv_heads
    return group * min(build.sample_vectors // group, _sampled_positions(n_tokens, indexed, build))


def _requests(part_bytes: Sequence[int]) -> Requests:
    puts = [1 if size < 2 * _PUT_BYTES else -(-size // _PUT_BYTES) + 2 for size in part_bytes]
    return Requests(put=int(np.sum(puts)), get=sum(-(-size // PIECE_BYTES) for size in part_bytes))
