"""The attention-aware graph as a key index: build, search, insert, save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError, IntegrityError
from rabatch.index.alignment import align
from rabatch.index.arrow import from_table, to_table
from rabatch.index.base import (
    QuerySample,
    SearchResult,
    apply_beta,
    check_keys,
    check_queries,
    check_samples,
    check_saved_keys,
)
from rabatch.index.codes import Dtype, KeyCodes, encode
from rabatch.index.compiled import read_only, run_ranges
from rabatch.index.flat import FlatIndex
from rabatch.index.insertion import Growing
from rabatch.index.links import Graph, build_graph
from rabatch.index.rerank import rerank
from rabatch.index.search import search_graph

_SPARE = 16  # candidates scored again beyond a quarter more than k: an int8 score is off by less than their ranks
_FLOOR = 64  # candidates followed at least when `beta` ends a search


class GraphIndex:
    """The key graphs of one layer.

    Args:
        keys: What searches score. int8 is the fastest and smallest; a result's scores are then those of the codes.
        neighbors: [n_kv_heads, n_keys, degree], int32; -1 is no link.
        entries: [n_kv_heads, n_entries], int32; -1 is no entry.
        search_list: Default of `effort`, one or one per KV head: candidates kept during a search; higher finds more
            and costs more. 0: 2 x k.
        exact: The keys whose scores count, where `keys` are int8: the candidates of a search are scored again.
        samples: One per KV head, the sampled queries with their lists: what `insert` goes by. Empty: no insertion.
        threads: Threads of one search.
    """

    kind = "graph"

    def __init__(
        self,
        keys: KeyCodes,
        neighbors: NDArray[np.int32],
        entries: NDArray[np.int32],
        *,
        search_list: int | Sequence[int] = 0,
        exact: KeyCodes | None = None,
        samples: Sequence[QuerySample] = (),
        threads: int = 1,
    ) -> None:
        n_heads, n_keys, _ = keys.shape
        if neighbors.ndim != 3 or neighbors.shape[:2] != (n_heads, n_keys) or neighbors.dtype != np.int32:
            raise ConfigError("neighbors", (neighbors.shape, str(neighbors.dtype)), "must be int32, one row per key")
        if entries.ndim != 2 or len(entries) != n_heads or entries.dtype != np.int32:
            raise ConfigError("entries", (entries.shape, str(entries.dtype)), "must be int32 [n_kv_heads, n_entries]")
        for name, links in (("neighbors", neighbors), ("entries", entries)):
            if links.size and not -1 <= int(links.min()) <= int(links.max()) < n_keys:
                raise ConfigError(name, (int(links.min()), int(links.max())), f"ids: -1 .. {n_keys - 1}")
        if exact is not None and exact.shape != keys.shape:
            raise ConfigError("exact", exact.shape, f"must be of the same keys: {keys.shape}")
        lists = [search_list] * n_heads if isinstance(search_list, int) else list(search_list)
        if len(lists) != n_heads or min(lists, default=0) < 0:
            raise ConfigError("search_list", search_list, f"must be >= 0, one or {n_heads}")
        self.keys, self.exact = keys, exact
        self.neighbors, self.entries = read_only(neighbors), read_only(entries)
        self.threads = threads
        self._search_lists = lists
        if samples:
            check_samples(samples, n_heads, n_keys, keys.shape[2])
        self._samples = tuple(samples)
        self._growing: list[Growing] = []
        self._flat: FlatIndex | None = None  # made when a search first has the full budget

    @property
    def n_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def n_keys(self) -> int:
        return self.keys.shape[1]

    @property
    def bytes_per_key(self) -> float:
        extra = 0.0 if self.exact is None else self.exact.bytes_per_key
        return self.keys.bytes_per_key + extra + self.neighbors.shape[2] * self.neighbors.itemsize

    @classmethod
    def build(
        cls,
        keys: NDArray[np.float32],
        samples: Sequence[QuerySample],
        *,
        seed: int = 0,
        threads: int = 1,
        config: GraphConfig | None = None,
        dtype: Dtype = "float32",
        exact: Dtype | None = None,
        insertable: int = 2048,
        **options: Any,
    ) -> Self:
        """See `KeyIndex.build`.

        Args:
            config: Of the graphs.
            dtype: What searches score.
            exact: What candidates are scored by again, if `dtype` is int8; None: nothing.
            insertable: Sampled queries kept per KV head for `insert`; 0: the index is never inserted into.
            options: Of the constructor.
        """
        graphs = build_layer(keys, samples, config=config or GraphConfig(), seed=seed, threads=threads)
        width = max((len(graph.entries) for graph in graphs), default=0)
        neighbors = np.stack([graph.neighbors for graph in graphs])
        entries = np.stack([_padded(graph.entries, width) for graph in graphs])
        kept = [thinned(sample, insertable) for sample in samples] if insertable else []
        known = all(sample.queries is not None for sample in kept)
        codes = encode(keys, dtype)
        again = None if exact is None else encode(keys, exact)
        return cls(codes, neighbors, entries, exact=again, samples=kept if known else (), threads=threads, **options)

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`. `effort` is the number of candidates kept; with `beta`, that are followed at least."""
        check_queries(queries, self.n_heads, self.keys.shape[2], k=k, effort=effort, beta=beta)
        default = 2 * k if beta is None else _FLOOR
        efforts = np.array([effort or own or default for own in self._search_lists], np.int64)
        if max(efforts.max(initial=0), k if beta is None else 0) >= self.n_keys:
            # Every key is scored either way, and a matrix product does it sooner.
            self._flat = self._flat or FlatIndex((self.exact or self.keys).decode())
            return self._flat.search(queries, k=k, beta=beta)
        found = search_graph(
            self.keys,
            self.neighbors,
            self.entries,
            queries,
            k=k if self.exact is None else k + max(k // 4, _SPARE),
            search_list=efforts,
            beta=beta,
            threads=self.threads,
        )
        if self.exact is not None:
            found = rerank(found, self.exact, queries, k=k, threads=self.threads)
        return apply_beta(found, beta)

    def select(self, heads: list[int], efforts: Sequence[int]) -> Self:
        """The index of some of its KV heads, with default efforts of their own."""
        return type(self)(
            self.keys.select(heads),
            self.neighbors[heads],
            self.entries[heads],
            search_list=efforts,
            exact=None if self.exact is None else self.exact.select(heads),
            samples=[self._samples[head] for head in heads] if self._samples else (),
            threads=self.threads,
        )

    def insert(self, keys: NDArray[np.float32]) -> None:
        """See `KeyIndex.insert`. A call copies the index once: insert in batches of some dozens of keys.

        Raises:
            ConfigError: The index was built without query vectors.
        """
        check_keys(keys, n_heads=self.n_heads, head_dim=self.keys.shape[2])
        if not self._samples:
            raise ConfigError("samples", None, "an index grows by its sampled queries; build it with query vectors")
        # First: they may refuse, and then nothing has changed.
        appended, exact = self.keys.append(keys), None if self.exact is None else self.exact.append(keys)
        if not self._growing:
            vectors = (self.exact or self.keys).decode()
            self._growing = [Growing(sample, vectors[head]) for head, sample in enumerate(self._samples)]
        first, n_new = self.n_keys, keys.shape[1]
        room = np.full((self.n_heads, n_new, self.neighbors.shape[2]), -1, np.int32)
        neighbors = np.concatenate([self.neighbors, room], axis=1)

        def grow(start: int, stop: int) -> None:
            for head in range(start, stop):
                self._growing[head].insert(keys[head], neighbors[head])

        run_ranges(grow, self.n_heads, threads=self.threads)
        if first == 0 and n_new:
            self.entries = read_only(np.zeros((self.n_heads, 1), np.int32))
        self.keys, self.exact = appended, exact
        self.neighbors, self._flat = read_only(neighbors), None

    def to_arrow(self) -> pa.Table:
        """The links as a column; entry points, and the scale of int8, beside them."""
        columns = {"neighbors": np.asarray(self.neighbors)}
        arrays = {"entries": np.asarray(self.entries)}
        if self.keys.dtype == "int8":
            assert self.keys.scale is not None
            assert self.keys.center is not None
            columns["code"] = self.keys.codes
            arrays |= {"scale": self.keys.scale, "center": self.keys.center}
        for head, sample in enumerate(self._samples):
            arrays |= {f"queries.{head}": np.asarray(sample.queries), f"topk.{head}": sample.topk}
        settings = {
            "kind": self.kind,
            "n_heads": self.n_heads,
            "n_keys": self.n_keys,
            "dtype": self.keys.dtype,
            "exact": None if self.exact is None else self.exact.dtype,
            "search_lists": self._search_lists,
        }
        return to_table(settings, columns, arrays)

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """See `KeyIndex.from_arrow`."""
        settings, columns, arrays = from_table(table, cls.kind)
        check_saved_keys(keys, settings["n_heads"], settings["n_keys"])
        try:
            if settings["dtype"] == "int8":
                codes = KeyCodes("int8", columns["code"], arrays["scale"], arrays["center"])
            else:
                codes = encode(keys, settings["dtype"])
            exact = None if settings["exact"] is None else encode(keys, settings["exact"])
            return cls(
                codes,
                columns["neighbors"],
                arrays["entries"],
                search_list=settings["search_lists"],
                exact=exact,
                samples=[
                    QuerySample(arrays[f"topk.{head}"], arrays[f"queries.{head}"])
                    for head in range(settings["n_heads"] if "topk.0" in arrays else 0)
                ],
                threads=threads,
            )
        except KeyError as error:
            raise IntegrityError("index table", str(error), "is missing; build the index again") from error


def build_layer(
    keys: NDArray[np.float32], samples: Sequence[QuerySample], *, config: GraphConfig, seed: int = 0, threads: int = 1
) -> list[Graph]:
    """One graph per KV head, in aligned coordinates; heads share the threads.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32.
        samples: One per KV head; without query vectors the coordinates are only centred.

    Raises:
        KeysError: Keys that are not finite, of another shape, or lists with ids out of range.
    """
    check_keys(keys)
    check_samples(samples, *keys.shape)
    graphs: list[Graph | None] = [None] * len(keys)
    across = threads if len(keys) >= threads else 1

    def build(start: int, stop: int) -> None:
        for head in range(start, stop):
            aligned = align(keys[head], samples[head].queries).keys(keys[head])
            graphs[head] = build_graph(aligned, samples[head].topk, config=config, seed=seed, threads=threads // across)

    run_ranges(build, len(keys), threads=across)
    return [graph for graph in graphs if graph is not None]


def thinned(sample: QuerySample, n: int) -> QuerySample:
    """At most `n` of the queries whose vectors are known, evenly spaced, with their lists."""
    if sample.queries is None:
        return sample
    rows = np.unique(np.linspace(0, len(sample.queries) - 1, min(n, len(sample.queries))).astype(int))
    return QuerySample(np.ascontiguousarray(sample.topk[rows]), np.ascontiguousarray(sample.queries[rows]))


def _padded(entries: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    padded = np.full(width, -1, np.int32)
    padded[: len(entries)] = entries
    return padded
