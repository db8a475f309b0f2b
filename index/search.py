"""Best-first search of the key graphs of one layer: all KV heads and all queries in one call, without the GIL."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import ConfigError
from rabatch.index.base import SearchResult, empty_result
from rabatch.index.compiled import compiled, read_only, run_ranges
from rabatch.index.flat import FlatLayerIndex


@compiled
def _search_range(  # type: ignore[no-untyped-def]
    keys, neighbors, entries, queries, k, limit, start, stop, ids, scores, visited
):
    """Search pairs (head, query) number `start` to `stop`; the rule is that of `search_naive.search_graph`.

    The list is a sorted array. The new keys of one expansion are sorted and merged into it from its end, so an
    expansion moves each entry once (copying runs found by bisection was no faster at lists of 100-1,024). A bit per
    key says whether it was seen: for 128K keys 16 KiB, cleared in under 1 us per query.
    """
    n_keys, dim = keys.shape[1], keys.shape[2]
    degree = neighbors.shape[2]
    n_queries = queries.shape[1]
    room = max(degree, entries.shape[1])
    seen = np.zeros((n_keys + 63) // 64, np.uint64)
    list_scores = np.empty(limit, np.float32)
    list_ids = np.empty(limit, np.int32)  # ~id once the links of a key were followed
    new_scores = np.empty(room, np.float32)
    new_ids = np.empty(room, np.int32)
    one = np.uint64(1)
    for item in range(start, stop):
        head, row = item // n_queries, item % n_queries
        query = queries[head, row]
        seen[:] = 0
        size, scored, first_open = 0, 0, 0
        current = -1
        while True:
            links = entries[head] if current < 0 else neighbors[head, current]
            n_new = 0
            worst = list_scores[size - 1] if size == limit else np.float32(-np.inf)
            for j in range(links.shape[0]):
                key = links[j]
                if key < 0:
                    continue
                word, bit = key >> 6, one << np.uint64(key & 63)
                if seen[word] & bit:
                    continue
                seen[word] |= bit
                scored += 1
                score = np.float32(0.0)
                for t in range(dim):
                    score += keys[head, key, t] * query[t]
                if size == limit and score < worst:
                    continue
                position = n_new  # insertion sort of at most `degree` keys
                while position > 0 and (
                    new_scores[position - 1] < score
                    or (new_scores[position - 1] == score and new_ids[position - 1] > key)
                ):
                    new_scores[position], new_ids[position] = new_scores[position - 1], new_ids[position - 1]
                    position -= 1
                new_scores[position], new_ids[position] = score, key
                n_new += 1
            # Merge the two sorted arrays from their ends; what falls past `limit` is dropped.
            left, right, place = size - 1, n_new - 1, size + n_new - 1
            while right >= 0:
                take_old = False
                if left >= 0:
                    old_id = list_ids[left] if list_ids[left] >= 0 else ~list_ids[left]
                    take_old = list_scores[left] < new_scores[right] or (
                        list_scores[left] == new_scores[right] and old_id > new_ids[right]
                    )
                if take_old:
                    if place < limit:
                        list_scores[place], list_ids[place] = list_scores[left], list_ids[left]
                    left -= 1
                else:
                    if place < limit:
                        list_scores[place], list_ids[place] = new_scores[right], new_ids[right]
                    right -= 1
                place -= 1
            if n_new > 0:
                size = min(size + n_new, limit)
                first_open = min(first_open, place + 1)
            while first_open < size and list_ids[first_open] < 0:
                first_open += 1
            if first_open >= size:
                break
            current = list_ids[first_open]
            list_ids[first_open] = ~current
        visited[head, row] = scored
        for j in range(min(k, size)):
            ids[head, row, j] = list_ids[j] if list_ids[j] >= 0 else ~list_ids[j]
            scores[head, row, j] = list_scores[j]


def search_graph(
    keys: NDArray[np.float32],
    neighbors: NDArray[np.int32],
    entries: NDArray[np.int32],
    queries: NDArray[np.float32],
    *,
    k: int,
    search_list: int,
    threads: int = 1,
) -> SearchResult:
    """Search the graphs of all KV heads for all queries.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32.
        neighbors: [n_kv_heads, n_keys, degree], int32; -1 is no link.
        entries: [n_kv_heads, n_entries], int32; -1 is no entry.
        queries: [n_kv_heads, n_queries, head_dim], float32.
        k: Keys per query.
        search_list: Candidates kept (ef), at least `k`. With `search_list >= n_keys` every reachable key is returned.
        threads: Python threads that share the (head, query) pairs; the result does not depend on it.
    """
    n_kv, n_queries, _ = queries.shape
    result = empty_result(n_kv, n_queries, k)
    arrays = [read_only(a) for a in (keys, neighbors, entries, queries)]
    limit = min(max(search_list, k, 1), max(keys.shape[1], 1))

    def search(start: int, stop: int) -> None:
        _search_range(*arrays, k, limit, start, stop, result.ids, result.scores, result.visited)

    run_ranges(search, n_kv * n_queries, threads=threads)
    return result


class GraphLayerIndex:
    """The key graphs of one layer.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32.
        neighbors: [n_kv_heads, n_keys, degree], int32, from `build_graph`; -1 is no link.
        entries: [n_kv_heads, n_entries], int32; -1 is no entry.
        search_list: Candidates kept during a search; higher finds more and costs more. With a list as long as the
            index (the full budget) every key is scored, which gives the same result as the search, sooner.
        threads: Threads of one search.
    """

    def __init__(
        self,
        keys: NDArray[np.float32],
        neighbors: NDArray[np.int32],
        entries: NDArray[np.int32],
        *,
        search_list: int,
        threads: int = 1,
    ) -> None:
        if keys.ndim != 3 or keys.dtype != np.float32:
            raise ConfigError("keys", (keys.shape, str(keys.dtype)), "must be float32 [n_kv_heads, n_keys, head_dim]")
        if neighbors.ndim != 3 or neighbors.shape[:2] != keys.shape[:2] or neighbors.dtype != np.int32:
            raise ConfigError("neighbors", (neighbors.shape, str(neighbors.dtype)), "must be int32, one row per key")
        if entries.ndim != 2 or len(entries) != len(keys) or entries.dtype != np.int32:
            raise ConfigError("entries", (entries.shape, str(entries.dtype)), "must be int32 [n_kv_heads, n_entries]")
        for name, links in (("neighbors", neighbors), ("entries", entries)):
            if links.size and not -1 <= int(links.min()) <= int(links.max()) < keys.shape[1]:
                raise ConfigError(name, (int(links.min()), int(links.max())), f"ids: -1 .. {keys.shape[1] - 1}")
        if search_list < 1:
            raise ConfigError("search_list", search_list, "must be >= 1")
        self._keys = np.ascontiguousarray(keys)
        self._neighbors, self._entries = read_only(neighbors), read_only(entries)
        self._search_list, self._threads = search_list, threads
        self._flat: FlatLayerIndex | None = None  # made when a search first has the full budget

    @property
    def n_keys(self) -> int:
        return int(self._keys.shape[1])

    def search(self, queries: NDArray[np.float32], *, k: int) -> SearchResult:
        """See `LayerIndex.search`."""
        if max(self._search_list, k) >= self.n_keys:
            self._flat = self._flat or FlatLayerIndex(self._keys)
            return self._flat.search(queries, k=k)
        return search_graph(
            self._keys,
            self._neighbors,
            self._entries,
            queries,
            k=k,
            search_list=self._search_list,
            threads=self._threads,
        )
