"""Building the attention-aware graph of one (layer, KV head): RoarGraph's projection, repaired, plus key links.

What differs from RoarGraph (VLDB 2024) as its code has it, and why:
- queries that share a nearest key add to its links; there the last one overwrites the others, and in attention
  many queries share one top key;
- pruned links are filled up to the budget by co-occurrence: strict pruning leaves 2-5 links and poor recall;
- nearest keys are linked too, so that keys no sampled query wanted are found;
- every key is linked to the keys before and after it, so every key can be reached, by construction;
- searches start at many keys far from each other (`rabatch.index.entries`); there at the key nearest the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.config import GraphConfig
from rabatch.errors import ConfigError
from rabatch.index.compiled import read_only, run_ranges
from rabatch.index.entries import choose_entries
from rabatch.index.nearest import nearest_keys

_MAX_CANDIDATES = 96  # per key, before pruning: a key that most queries want co-occurs with thousands
_RANK_BITS = 8
_MAX_LISTS = (1 << 24) - 1  # more count as so many


@dataclass(frozen=True)
class Graph:
    """Links and entry points of one key index.

    Args:
        neighbors: [n_keys, degree], int32, no key twice and never itself; -1 past the last link.
        entries: [<= entry_points], int32, where searches start.
    """

    neighbors: NDArray[np.int32]
    entries: NDArray[np.int32]


def build_graph(
    keys: NDArray[np.float32],
    query_topk: NDArray[np.int32],
    *,
    config: GraphConfig,
    seed: int = 0,
    threads: int = 1,
    nearest: NDArray[np.int32] | None = None,
) -> Graph:
    """Build the graph of one KV head from its keys and the top-k lists of sampled queries of its whole query group.

    The same arguments give the same graph, whatever the number of threads.

    Args:
        keys: [n_keys, head_dim], float32.
        query_topk: [n_queries, list_length], int32, ids of a query's highest-scoring keys, best first, padded with -1.
        config: Degree, share of key neighbours, entry points.
        seed: Of the clustering behind the nearest keys of large indexes.
        threads: Threads to use.
        nearest: [n_keys, >= key_neighbors], int32, links between keys, best first, -1 for none, found in another way.
            None: the nearest keys in L2, about.

    Raises:
        ConfigError: Arrays of the wrong shape or dtype, or ids out of range.
    """
    if keys.ndim != 2 or keys.dtype != np.float32:
        raise ConfigError("keys", (keys.shape, str(keys.dtype)), "must be float32 [n_keys, head_dim]")
    if query_topk.ndim != 2 or query_topk.dtype != np.int32:
        raise ConfigError("query_topk", (query_topk.shape, str(query_topk.dtype)), "must be int32 [n_queries, k]")
    n_keys = len(keys)
    if query_topk.size and not -1 <= int(query_topk.min()) <= int(query_topk.max()) < n_keys:
        raise ConfigError("query_topk", (int(query_topk.min()), int(query_topk.max())), f"ids: -1 .. {n_keys - 1}")
    if n_keys < 2:
        return Graph(np.full((n_keys, config.degree), -1, np.int32), np.arange(n_keys, dtype=np.int32))
    centered = keys - keys.mean(axis=0)  # changes no order of scores, makes inner products between keys meaningful
    offsets, candidates = _co_occurrence(query_topk, n_keys)
    if nearest is None:
        nearest = nearest_keys(centered, k=config.key_neighbors, seed=seed, threads=threads)
    nearest = nearest[:, : config.key_neighbors]
    neighbors = np.full((n_keys, config.degree), -1, np.int32)
    counts = np.zeros(n_keys, np.int32)
    inputs = [read_only(a) for a in (centered, offsets, candidates, nearest)]

    def link(start: int, stop: int) -> None:
        _link_range(*inputs, config.degree - 2 - config.key_neighbors, start, stop, neighbors, counts)

    run_ranges(link, n_keys, threads=threads)
    _add_reverse(neighbors, counts)
    return Graph(neighbors, choose_entries(centered, query_topk, config.entry_points, threads=threads))


def _co_occurrence(query_topk: NDArray[np.int32], n_keys: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Link candidates of every key, in CSR form, best first: keys that stand in the same lists.

    A list gives the pairs (its best key, another) and (a key, the next in rank), both ways. Pairs of more lists come
    first, then those that stand closer to the top.
    """
    pivots = np.broadcast_to(query_topk[:, :1], query_topk[:, 1:].shape)
    ranks = np.broadcast_to(np.arange(1, query_topk.shape[1], dtype=np.int64), pivots.shape)
    left = np.concatenate([pivots.ravel(), query_topk[:, 1:-1].ravel()]).astype(np.int64)
    right = np.concatenate([query_topk[:, 1:].ravel(), query_topk[:, 2:].ravel()]).astype(np.int64)
    rank = np.minimum(np.concatenate([ranks.ravel(), ranks[:, 1:].ravel()]), (1 << _RANK_BITS) - 1)
    valid = (left >= 0) & (right >= 0) & (left != right)
    left, right, rank = left[valid], right[valid], rank[valid]
    packed = np.concatenate([left * n_keys + right, right * n_keys + left]) << _RANK_BITS
    packed |= np.concatenate([rank, rank])
    packed.sort()
    pairs = packed >> _RANK_BITS
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    lists = np.diff(first, append=len(pairs))
    source, target = np.divmod(pairs[first], n_keys)
    best_rank = packed[first] & ((1 << _RANK_BITS) - 1)
    # By source, most lists first, best rank first, target: in one number, which sorts three times faster than three.
    rank_of_pair = (source << 32) | ((_MAX_LISTS - np.minimum(lists, _MAX_LISTS)) << _RANK_BITS) | best_rank
    order = np.argsort(rank_of_pair, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=n_keys))])
    return offsets.astype(np.int64), target[order].astype(np.int32)


@compiled
def _link_range(  # type: ignore[no-untyped-def]
    keys, offsets, candidates, nearest, projected_budget, start, stop, neighbors, counts
):
    """Links of keys `start` to `stop`: the chain, projected links (pruned, then filled), nearest keys."""
    n_keys, dim = keys.shape
    degree = neighbors.shape[1]
    state = np.zeros(_MAX_CANDIDATES, np.int8)  # 1: linked
    for key in range(start, stop):
        n = 0
        if key > 0:
            neighbors[key, n] = key - 1
            n += 1
        if key + 1 < n_keys:
            neighbors[key, n] = key + 1
            n += 1
        chain = n
        first = offsets[key]
        n_candidates = min(offsets[key + 1] - first, _MAX_CANDIDATES)
        budget = min(chain + projected_budget, degree)
        for c in range(n_candidates):
            state[c] = 0
        for c in range(n_candidates):
            if n == budget:
                break
            candidate = candidates[first + c]
            kept = True
            for j in range(chain):
                if neighbors[key, j] == candidate:
                    kept = False
                    state[c] = 1
            if not kept:
                continue
            to_key = np.float32(0.0)
            for t in range(dim):
                to_key += keys[candidate, t] * keys[key, t]
            for j in range(chain, n):
                to_link = np.float32(0.0)
                for t in range(dim):
                    to_link += keys[candidate, t] * keys[neighbors[key, j], t]
                if to_link > to_key:
                    kept = False
                    break
            if kept:
                neighbors[key, n] = candidate
                state[c] = 1
                n += 1
        for c in range(n_candidates):
            if n == budget:
                break
            if state[c] == 0:
                neighbors[key, n] = candidates[first + c]
                state[c] = 1
                n += 1
        for c in range(nearest.shape[1]):
            if nearest[key, c] >= 0:
                n = _append(neighbors, key, n, nearest[key, c])
        counts[key] = n


@compiled
def _append(neighbors, key, n, link):  # type: ignore[no-untyped-def]
    if n == neighbors.shape[1]:
        return n
    for j in range(n):
        if neighbors[key, j] == link:
            return n
    neighbors[key, n] = link
    return n + 1


@compiled
def _add_reverse(neighbors, counts):  # type: ignore[no-untyped-def]
    """Link back where there is room, links of the first columns (chain, projected) first; in order of keys."""
    forward = counts.copy()
    for column in range(neighbors.shape[1]):
        for key in range(neighbors.shape[0]):
            if column < forward[key]:
                target = neighbors[key, column]
                counts[target] = _append(neighbors, target, counts[target], key)


def unreachable(neighbors: NDArray[np.int32], entries: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids that no walk from an entry reaches; empty for every graph `build_graph` makes.

    Args:
        neighbors: [n_keys, degree], int32; -1 is no link.
        entries: [n_entries], int32; -1 is no entry.
    """
    seen = np.zeros(len(neighbors), np.bool_)
    _mark_reachable(read_only(neighbors), read_only(entries), seen)
    return np.flatnonzero(~seen).astype(np.int32)


@compiled
def _mark_reachable(neighbors, entries, seen):  # type: ignore[no-untyped-def]
    queue = np.empty(len(seen), np.int32)
    filled = 0
    for entry in entries:
        if entry >= 0 and not seen[entry]:
            seen[entry] = True
            queue[filled] = entry
            filled += 1
    done = 0
    while done < filled:
        for link in neighbors[queue[done]]:
            if link >= 0 and not seen[link]:
                seen[link] = True
                queue[filled] = link
                filled += 1
        done += 1
