"""What every key index offers: the protocol, the sample it is built from, what a search returns, checks of input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.errors import ConfigError, IntegrityError, KeysError

_MAX_KEY = 1e18  # beyond, scores overflow float32


@dataclass(frozen=True)
class QuerySample:
    """Queries of prefill, of all query heads of one KV head in one list: what an index is built for.

    Args:
        topk: [n_queries, list_length], int32, ids of a query's highest-scoring keys, best first, padded with -1.
        queries: [n_queries, head_dim], float32, the vectors behind the lists, or a part of them in the same order
            (then shorter than `topk`). None: only the lists are known; then nothing can be aligned, inserted or chosen.
    """

    topk: NDArray[np.int32]
    queries: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SearchResult:
    """The keys found for every query of every KV head.

    Args:
        ids: [n_kv_heads, n_queries, k], int32, local to the index (0 .. n_keys - 1), best first; -1: nothing found.
        scores: Same shape, float32, raw q . k (unscaled); -inf where the id is -1.
        visited: [n_kv_heads, n_queries], int64, distinct keys that were scored, by a code of them or exactly.
        distances: Same shape, int64, scores computed: of keys, again in re-ranking, of centroids.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    visited: NDArray[np.int64]
    distances: NDArray[np.int64]


class Searchable(Protocol):
    """What decoding needs of a key index: `KeyIndex` says what is meant."""

    @property
    def n_keys(self) -> int: ...

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult: ...


@runtime_checkable
class KeyIndex(Protocol):
    """All KV heads of one layer of one document.

    Searching never changes an index and may be done by several threads at once; inserting may not run beside anything.
    The same arguments give the same index and the same results, whatever the number of threads.
    """

    kind: str

    @property
    def n_heads(self) -> int:
        """KV heads."""
        ...

    @property
    def n_keys(self) -> int:
        """Keys per KV head."""
        ...

    @property
    def bytes_per_key(self) -> float:
        """Bytes held in memory per key and KV head, vectors included."""
        ...

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
        """Build the index.

        Args:
            keys: [n_kv_heads, n_keys, head_dim], float32.
            samples: One per KV head.
            seed: Of everything random in the build.
            threads: Threads to use, here and in searches.

        Raises:
            KeysError: Keys that are not finite, of another shape, or lists with ids out of range.
        """
        ...

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """Find the `k` highest-scoring keys of each query.

        Args:
            queries: [n_kv_heads, n_queries, head_dim], float32: the query heads of a group, of all questions, in a row.
            k: Keys per query, at most; with more than `n_keys` the rest is padding.
            effort: The budget, in the unit of the index (candidates kept, keys re-ranked, cells probed). Higher
                finds more and costs more; 0: the index's default. With `n_keys` every index is exact.
            beta: [n_kv_heads], float32, in units of a raw score: keys that score less than the best minus `beta` are
                left out, and what is searched adapts to it (DIPR of AlayaDB). None: no such limit.
        """
        ...

    def insert(self, keys: NDArray[np.float32]) -> None:
        """Append keys [n_kv_heads, n_new, head_dim], float32, in memory; they get the ids from `n_keys` on."""
        ...

    def to_arrow(self) -> pa.Table:
        """Everything but the keys: see `rabatch.index.arrow`."""
        ...

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """The index that `to_arrow` was called on; `keys` are those it was built from and was inserted into."""
        ...


def empty_result(n_kv_heads: int, n_queries: int, k: int) -> SearchResult:
    """A result with nothing found, to be filled in."""
    return SearchResult(
        ids=np.full((n_kv_heads, n_queries, k), -1, np.int32),
        scores=np.full((n_kv_heads, n_queries, k), -np.inf, np.float32),
        visited=np.zeros((n_kv_heads, n_queries), np.int64),
        distances=np.zeros((n_kv_heads, n_queries), np.int64),
    )


def check_keys(keys: NDArray[np.float32], *, n_heads: int = 0, head_dim: int = 0) -> None:
    """Raise KeysError unless `keys` is finite float32 [n_kv_heads, n_keys, head_dim] (of the sizes given)."""
    if keys.ndim != 3 or keys.dtype != np.float32 or keys.shape[2] == 0:
        raise KeysError("keys", (keys.shape, str(keys.dtype)), "must be float32 [n_kv_heads, n_keys, head_dim]")
    if (n_heads and keys.shape[0] != n_heads) or (head_dim and keys.shape[2] != head_dim):
        raise KeysError("keys", keys.shape, f"must have {n_heads} KV heads of head_dim {head_dim}")
    for head, vectors in enumerate(keys):
        if vectors.size and not max(float(vectors.max()), -float(vectors.min())) < _MAX_KEY:  # NaN is not less
            row, column = np.argwhere(~(np.abs(vectors) < _MAX_KEY))[0]
            value = float(vectors[row, column])
            raise KeysError(f"keys: KV head {head}, key {row}", value, "must be finite; the prefill overflowed")


def check_saved_keys(keys: NDArray[np.float32], n_heads: int, n_keys: int) -> None:
    """Raise IntegrityError unless `keys` can be those that a saved index was made of."""
    check_keys(keys)
    if keys.shape[:2] != (n_heads, n_keys):
        raise IntegrityError("keys", keys.shape, f"the saved index has {n_heads} heads of {n_keys} keys: not its keys")


def check_samples(samples: Sequence[QuerySample], n_heads: int, n_keys: int, head_dim: int) -> None:
    """Raise KeysError unless there is a sample per head with ids of keys and finite vectors of the keys' dimension."""
    if len(samples) != n_heads:
        raise KeysError("samples", len(samples), f"must be one per KV head: {n_heads}")
    for head, sample in enumerate(samples):
        topk, queries = sample.topk, sample.queries
        if topk.ndim != 2 or topk.dtype != np.int32:
            raise KeysError(f"topk: KV head {head}", (topk.shape, str(topk.dtype)), "must be int32 [n_queries, k]")
        if topk.size and not -1 <= int(topk.min()) <= int(topk.max()) < n_keys:
            wrong = topk[(topk < -1) | (topk >= n_keys)][0]
            raise KeysError(f"topk: KV head {head}", int(wrong), f"ids: 0 .. {n_keys - 1}, or -1 for none")
        if queries is None:
            continue
        if queries.ndim != 2 or queries.shape[1] != head_dim or queries.dtype != np.float32 or len(queries) > len(topk):
            raise KeysError(
                f"queries: KV head {head}",
                (queries.shape, str(queries.dtype)),
                f"must be float32 [at most {len(topk)}, {head_dim}]",
            )
        if not np.isfinite(queries.sum(dtype=np.float64)):
            raise KeysError(f"queries: KV head {head}", "not finite", "must be finite; the prefill overflowed")


def check_queries(
    queries: NDArray[np.float32],
    n_heads: int,
    head_dim: int,
    *,
    k: int,
    effort: int = 0,
    beta: NDArray[np.float32] | None = None,
) -> None:
    """Raise KeysError or ConfigError unless these are arguments for a search of `n_heads` of `head_dim`."""
    if queries.ndim != 3 or queries.dtype != np.float32 or queries.shape[::2] != (n_heads, head_dim):
        raise KeysError(
            "queries", (queries.shape, str(queries.dtype)), f"must be float32 [{n_heads}, n_queries, {head_dim}]"
        )
    if k < 1:
        raise ConfigError("k", k, "must be >= 1")
    if effort < 0:
        raise ConfigError("effort", effort, "must be >= 0; 0 is the index's default")
    if beta is not None and (beta.shape != (n_heads,) or not (beta >= 0).all()):
        raise ConfigError("beta", beta, f"must be {n_heads} numbers >= 0, one per KV head")


def apply_beta(result: SearchResult, beta: NDArray[np.float32] | None) -> SearchResult:
    """Drop, in place, what scores less than the best of its query minus `beta` (float32 [n_kv_heads])."""
    if beta is not None and result.scores.shape[2]:
        far = result.scores < result.scores[:, :, :1] - beta[:, None, None]
        result.ids[far] = -1
        result.scores[far] = -np.inf
    return result
