"""What the baselines share: exact scores of candidates, the frame of an index, work by heads and by blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.errors import ConfigError, IntegrityError, KeysError
from rabatch.index.arrow import from_table, to_table
from rabatch.index.base import QuerySample, SearchResult, apply_beta, check_keys, check_queries, check_samples
from rabatch.index.codes import KeyCodes
from rabatch.index.compiled import run_ranges
from rabatch.index.flat import FlatIndex
from rabatch.index.native import one_faiss_thread
from rabatch.index.rerank import rerank

# Below, nothing is built and every search is exact: a scan is sooner done, and faiss trains and links on too little.
MIN_KEYS = 256
QUERIES_PER_BLOCK = 64


def score_candidates(
    keys: NDArray[np.float32],
    queries: NDArray[np.float32],
    candidates: NDArray[np.int64],
    result: SearchResult,
    *,
    threads: int,
) -> None:
    """Fill `result` with the best of `candidates` [n_kv_heads, n_queries, n], by their exact scores; -1 is skipped."""
    listed = replace(result, ids=candidates.astype(np.int32))
    found = rerank(listed, KeyCodes("float32", keys), queries, k=result.ids.shape[2], threads=threads)
    result.ids[:], result.scores[:] = found.ids, found.scores


class Baseline(ABC):
    """The frame of a `KeyIndex`: checks, the exact search at full effort, saving. Subclasses build and search.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32; kept, not copied, where it is in one piece.
        options: What `build` was given by name, with defaults filled in; JSON values.
    """

    kind: str = ""
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, keys: NDArray[np.float32], options: Mapping[str, Any], *, seed: int, threads: int) -> None:
        self._keys = np.ascontiguousarray(keys)
        self._options, self._seed, self._threads = dict(options), seed, threads
        self._flat: FlatIndex | None = None  # made when a search is first exact

    @property
    def n_heads(self) -> int:
        return int(self._keys.shape[0])

    @property
    def n_keys(self) -> int:
        return int(self._keys.shape[1])

    @property
    def bytes_per_key(self) -> float:
        """The keys and, where the library wants its own, its copy of them; see `KeyIndex.bytes_per_key`."""
        return self._keys.shape[2] * 4.0 + self._bytes() / max(self.n_heads * self.n_keys, 1)

    @classmethod
    def build(
        cls,
        keys: NDArray[np.float32],
        samples: Sequence[QuerySample],
        *,
        seed: int = 0,
        threads: int = 1,
        **options: Any,
    ) -> Self:
        """See `KeyIndex.build`; the options are the names in `defaults`."""
        check_keys(keys)
        check_samples(samples, keys.shape[0], keys.shape[1], keys.shape[2])
        for name in options:
            if name not in cls.defaults:
                raise ConfigError(name, options[name], f"{cls.kind} has the options {', '.join(cls.defaults)}")
        if threads < 1:
            raise ConfigError("threads", threads, "must be >= 1")
        index = cls(keys, {**cls.defaults, **options}, seed=seed, threads=threads)
        if index.n_keys >= MIN_KEYS:
            index._fit(samples)
        return index

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`; `beta` only cuts what was found."""
        check_queries(queries, self.n_heads, self._keys.shape[2], k=k, effort=effort, beta=beta)
        if self.n_keys < MIN_KEYS or max(effort, k) >= self.n_keys:
            self._flat = self._flat or FlatIndex(self._keys)
            result = self._flat.search(queries, k=k)
        else:
            result = self._search(queries, k, effort)
        return apply_beta(result, beta)

    def insert(self, keys: NDArray[np.float32]) -> None:
        """See `KeyIndex.insert`."""
        check_keys(keys, n_heads=self.n_heads, head_dim=self._keys.shape[2])
        n_old, self._flat = self.n_keys, None
        self._keys = np.concatenate([self._keys, keys], axis=1)
        if n_old >= MIN_KEYS:
            self._insert(n_old)
        elif self.n_keys >= MIN_KEYS:
            nothing = QuerySample(np.empty((0, 0), np.int32))
            self._fit([nothing] * self.n_heads)

    def to_arrow(self) -> pa.Table:
        """See `KeyIndex.to_arrow`."""
        settings = {
            "kind": self.kind,
            "n_heads": self.n_heads,
            "n_keys": self.n_keys,
            "seed": self._seed,
            "options": self._options,
        }
        built = self.n_keys >= MIN_KEYS
        return to_table(settings, self._columns() if built else {}, self._arrays() if built else {})

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """See `KeyIndex.from_arrow`."""
        settings, columns, arrays = from_table(table, cls.kind)
        check_keys(keys)
        if keys.shape[:2] != (settings["n_heads"], settings["n_keys"]):
            raise KeysError("keys", keys.shape, f"must be {settings['n_heads']} heads x {settings['n_keys']} keys")
        index = cls(keys, settings["options"], seed=settings["seed"], threads=threads)
        if index.n_keys >= MIN_KEYS:
            try:
                index._restore(columns, arrays)
            except (KeyError, RuntimeError) as error:  # what faiss raises on bytes it cannot read
                raise IntegrityError("index table", cls.kind, f"does not hold the index: {error}") from error
        return index

    @abstractmethod
    def _fit(self, samples: Sequence[QuerySample]) -> None:
        """Build over `self._keys`, of which there are at least `MIN_KEYS`."""

    @abstractmethod
    def _search(self, queries: NDArray[np.float32], k: int, effort: int) -> SearchResult:
        """Search for fewer than `n_keys` keys with an effort below `n_keys`, of at least `MIN_KEYS` keys."""

    def _insert(self, n_old: int) -> None:
        """Index the keys from `n_old` on; `self._keys` has them already."""
        raise ConfigError("insert", self.kind, "this index cannot grow; build it anew")

    @abstractmethod
    def _bytes(self) -> int:
        """Bytes held beside the keys."""

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {}

    @abstractmethod
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What is saved beside the columns."""

    @abstractmethod
    def _restore(self, columns: Mapping[str, NDArray[Any]], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `_columns` and `_arrays` gave."""

    def _for_heads(self, task: Any) -> None:
        """Call `task(head)` for every head, on the index's threads; one head is one thread's, so nothing races."""

        def work(start: int, stop: int) -> None:
            with one_faiss_thread():
                for head in range(start, stop):
                    task(head)

        run_ranges(work, self.n_heads, threads=self._threads)

    def _for_blocks(self, n_queries: int, task: Any) -> None:
        """Call `task(head, rows)` for blocks of queries of every head, on the index's threads.

        Blocks are of one size: faiss may take another path for few queries than for many.
        """
        per_head = -(-n_queries // QUERIES_PER_BLOCK)

        def work(start: int, stop: int) -> None:
            with one_faiss_thread():
                for block in range(start, stop):
                    first = block % per_head * QUERIES_PER_BLOCK
                    task(block // per_head, slice(first, min(first + QUERIES_PER_BLOCK, n_queries)))

        run_ranges(work, self.n_heads * per_head, threads=self._threads)
