"""Exact scores for the candidates of a search over codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.index.base import SearchResult
from rabatch.index.codes import KeyCodes


def rerank(
    found: SearchResult, exact: KeyCodes, queries: NDArray[np.float32], *, k: int, threads: int = 1
) -> SearchResult:
    """The best `k` of the candidates `found`, by their scores under `exact`; of equal scores the lower id first.

    Args:
        found: ids [n_kv_heads, n_queries, m >= k].
        exact: The keys whose scores count.
        queries: [n_kv_heads, n_queries, head_dim], float32.
    """
    scores = exact.scores(queries, found.ids, threads=threads)
    m = scores.shape[2]
    if m > 4 * k:  # a sort of what may be among the best only
        kept = np.argpartition(-scores, k - 1, axis=2)[:, :, :k]
    else:
        kept = np.broadcast_to(np.arange(m), scores.shape)
    ids, scores = np.take_along_axis(found.ids, kept, 2), np.take_along_axis(scores, kept, 2)
    order = np.lexsort((ids, -scores), axis=2)[:, :, :k]
    return SearchResult(
        ids=np.take_along_axis(ids, order, 2),
        scores=np.take_along_axis(scores, order, 2),
        visited=found.visited,
        distances=found.distances + (found.ids >= 0).sum(axis=2),
    )
