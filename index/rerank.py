"""Exact scores for the candidates of a search over codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.index.base import SearchResult, empty_result
from rabatch.index.codes import KeyCodes
from rabatch.index.compiled import read_only, run_ranges
from rabatch.index.machine import dot, prefetch
from rabatch.index.topk.best import key_of, packed, settle

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
    """Rerank pairs (head, query) number `start` to `stop`."""
    n_queries, k = queries.shape[1], ids.shape[2]
    pairs = np.empty(candidates.shape[2], np.uint64)
    for item in range(start, stop):
        head, row = item // n_queries, item % n_queries
        n = 0
        for key in candidates[head, row]:
            if key >= 0:
                pairs[n] = packed(np.float32(0), np.int64(key))  # type: ignore[call-arg]
                n += 1
        score_pairs(codes, head, queries[head, row], half, pairs, n)
        settle(pairs, n, k, scores[head, row], ids[head, row])
        scores[head, row] += offset[head, row]


@compiled
def score_pairs(codes, head, query, half, pairs, n):  # type: ignore[no-untyped-def]
    """Give the keys of `topk.best.packed` pairs their exact scores, without the offset of `KeyCodes.prepare`.

    Args:
        codes: `KeyCodes.codes`; `half`: whether bits are float16.
        pairs: [n or more], uint64; changed.
    """
    n_keys, dim = codes.shape[1], codes.shape[2]
    per_line = max(64 // codes.itemsize, 1)
    for j in range(n):
        if j + _AHEAD < n:
            coming = key_of(pairs[j + _AHEAD])  # type: ignore[call-arg, var-annotated]
            for at in range(0, dim, per_line):
                prefetch(codes, (head * n_keys + coming) * dim + at)  # type: ignore[call-arg]
        key = key_of(pairs[j])  # type: ignore[call-arg, var-annotated]
        pairs[j] = packed(np.float32(dot(codes, head, key, query, half)), key)  # type: ignore[call-arg]
