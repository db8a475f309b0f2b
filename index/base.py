"""What every key index of one layer offers, and what a search returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SearchResult:
    """The keys found for every query of every KV head.

    Args:
        ids: [n_kv_heads, n_queries, k], int32, local to the index (0 .. n_keys - 1), best first; -1: nothing found.
        scores: Same shape, float32, raw q . k (unscaled); -inf where the id is -1.
        visited: [n_kv_heads, n_queries], int64, keys whose score was computed.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    visited: NDArray[np.int64]


class LayerIndex(Protocol):
    """All KV heads of one layer of one document. Searching never changes it; several threads may search at once."""

    @property
    def n_keys(self) -> int:
        """Keys per KV head."""
        ...

    def search(self, queries: NDArray[np.float32], *, k: int) -> SearchResult:
        """Find the `k` highest-scoring keys of each query.

        Args:
            queries: [n_kv_heads, n_queries, head_dim], float32: the query heads of a group, of all questions, in a row.
            k: Keys per query; with more than `n_keys` the rest is padding.
        """
        ...


def empty_result(n_kv_heads: int, n_queries: int, k: int) -> SearchResult:
    """A result with nothing found, to be filled in."""
    return SearchResult(
        ids=np.full((n_kv_heads, n_queries, k), -1, np.int32),
        scores=np.full((n_kv_heads, n_queries, k), -np.inf, np.float32),
        visited=np.zeros((n_kv_heads, n_queries), np.int64),
    )
