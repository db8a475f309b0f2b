"""Exact scores for the candidates of a search over codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.index.base import SearchResult, empty_result
from rabatch.index.codes import KeyCodes
from rabatch.index.compiled import compiled, read_only, run_ranges
from rabatch.index.machine import dot, prefetch

_AHEAD = 8  # candidates whose memory is asked for before they are scored


def rerank(
    found: SearchResult, exact: KeyCodes, queries: NDArray[np.float32], *, k: int, threads: int = 1
) -> SearchResult:
    """The best `k` of the candidates `found`, by their scores under `exact`; of equal scores the lower id first.

    Args:
        found: ids [n_kv_heads, n_queries, m], int32, each once, -1 for none.
        exact: The keys whose scores count.
        queries: [n_kv_heads, n_queries, head_dim], float32.
    """
    n_heads, n_queries, _ = found.ids.shape
    result = empty_result(n_heads, n_queries, k)
    prepared, offset = exact.prepare(queries)
    inputs = [read_only(a) for a in (exact.codes, prepared, offset, found.ids)]
    half = exact.dtype == "float16"

    def score(start: int, stop: int) -> None:
        _rerank_range(*inputs, half, start, stop, result.ids, result.scores)

    run_ranges(score, n_heads * n_queries, threads=threads)
    result.visited[:] = found.visited
    result.distances[:] = found.distances + (found.ids >= 0).sum(axis=2)
    return result


@compiled
def _rerank_range(codes, queries, offset, candidates, half, start, stop, ids, scores):  # type: ignore[no-untyped-def]
    """Rerank pairs (head, query) number `start` to `stop`; best scores are kept in a heap, the worst on top."""
    n_keys, dim = codes.shape[1], codes.shape[2]
    n_queries, m, k = queries.shape[1], candidates.shape[2], ids.shape[2]
    per_line = max(64 // codes.itemsize, 1)
    heap_scores = np.empty(k, np.float32)
    heap_ids = np.empty(k, np.int32)
    for item in range(start, stop):
        head, row = item // n_queries, item % n_queries
        size = 0
        for j in range(m):
            coming = candidates[head, row, j + _AHEAD] if j + _AHEAD < m else -1
            if coming >= 0:
                for line in range(0, dim, per_line):
                    prefetch(codes, (head * n_keys + coming) * dim + line)  # type: ignore[call-arg]
            key = candidates[head, row, j]
            if key < 0:
                continue
            score = dot(codes, head, key, queries[head, row], half)
            if size == k:
                if _worse(score, key, heap_scores[0], heap_ids[0]):
                    continue
                place = 0  # the new one sinks from the top
                while True:
                    child = 2 * place + 1
                    if child >= k:
                        break
                    if child + 1 < k and _worse(
                        heap_scores[child + 1], heap_ids[child + 1], heap_scores[child], heap_ids[child]
                    ):
                        child += 1
                    if _worse(score, key, heap_scores[child], heap_ids[child]):
                        break
                    heap_scores[place], heap_ids[place] = heap_scores[child], heap_ids[child]
                    place = child
                heap_scores[place], heap_ids[place] = score, key
            else:
                place = size  # the new one rises from the bottom
                while place > 0 and _worse(score, key, heap_scores[(place - 1) // 2], heap_ids[(place - 1) // 2]):
                    heap_scores[place], heap_ids[place] = heap_scores[(place - 1) // 2], heap_ids[(place - 1) // 2]
                    place = (place - 1) // 2
                heap_scores[place], heap_ids[place] = score, key
                size += 1
        order = np.argsort(-heap_scores[:size])
        for j in range(size):
            score, key = heap_scores[order[j]], heap_ids[order[j]]
            place = j  # equal scores stand together: the lower id first
            while (
                place > 0
                and scores[head, row, place - 1] == score + offset[head, row]
                and ids[head, row, place - 1] > key
            ):
                ids[head, row, place] = ids[head, row, place - 1]
                place -= 1
            ids[head, row, place] = key
            scores[head, row, j] = score + offset[head, row]


@compiled
def _worse(score, key, other_score, other_key):  # type: ignore[no-untyped-def]
    return score < other_score or (score == other_score and key > other_key)
