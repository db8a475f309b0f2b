"""Where searches of a key graph start: the keys that most sampled queries want, then keys far from all before them.

A best-first search sees what is near to where it began. In text that repeats itself, thousands of keys are about
equally near to a query, fill its list, and lead to each other only: the few keys that differ are never seen. So most
entry points are the farthest-first traversal of the keys (Gonzalez 1985, Clustering to minimize the maximum
intercluster distance): no key is farther from its nearest entry point than twice the least radius that as many points,
the wanted ones not counted, could have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.index.compiled import read_only, run_ranges

_KEYS_PER_ENTRY = 32
"""A search scores all entry points: a small graph has no more than one in so many keys."""
_WANTED = 16
_FAR = 8
_MAX_COVER_QUERIES = 16384


def most_entries(n_keys: int, entry_points: int) -> int:
    """Entry points of a graph of so many keys, if `entry_points` are asked for; equal keys may make them fewer."""
    return min(entry_points, max(1, n_keys // _KEYS_PER_ENTRY), n_keys)


def choose_entries(
    keys: NDArray[np.float32], query_topk: NDArray[np.int32], entry_points: int, *, threads: int = 1
) -> NDArray[np.int32]:
    """Entry points of one graph, no key twice; fewer than asked for where the keys are few or equal to each other.

    Args:
        keys: [n_keys, head_dim], float32, at least one; distances between them are to mean something.
        query_topk: [n_queries, list_length], int32, as of `rabatch.index.links.build_graph`.

    Returns:
        [<= most_entries], int32.
    """
    n_entries = most_entries(len(keys), entry_points)
    entries = np.zeros(n_entries, np.int32)
    wanted = _wanted(query_topk, len(keys), min(_WANTED, n_entries))
    if not wanted:
        wanted = [int(np.einsum("nd,nd->n", keys, keys).argmin())]
    entries[: len(wanted)] = wanted
    return entries[: _spread(read_only(keys), entries, len(wanted), threads)]


def _wanted(query_topk: NDArray[np.int32], n_keys: int, n: int) -> list[int]:
    """Keys that together stand in as many lists as possible (greedy cover), of those that some query ranks first."""
    lists = query_topk[:: max(len(query_topk) // _MAX_COVER_QUERIES, 1)] if query_topk.size else query_topk[:0]
    lists = lists[lists[:, 0] >= 0] if lists.size else lists
    firsts = np.bincount(lists[:, 0], minlength=n_keys) > 0 if lists.size else np.zeros(n_keys, np.bool_)
    found: list[int] = []
    while len(found) < n and lists.size:
        gain = np.bincount(lists[lists >= 0], minlength=n_keys) * firsts
        found.append(int(gain.argmax()))
        lists = lists[~(lists == found[-1]).any(axis=1)]
    return found


def _spread(keys: NDArray[np.float32], entries: NDArray[np.int32], n_given: int, threads: int) -> int:
    """Fill `entries` behind its first `n_given`; how many there are. The rule is that of `spread_naive`.

    Distances to the nearest entry point only fall. So those of the keys that were nearer than the farthest eighth wait
    until one of them could be the farthest of all: half of the time (synthetic keys, 16K and 128K, one core).
    """
    n_keys = len(keys)
    nearest = np.full(n_keys, np.inf, np.float32)  # squared distance to the nearest of the first `counted` entry points
    counted = np.zeros(n_keys, np.int32)
    every = np.arange(n_keys)
    far, least = every[:1], np.float32(np.inf)  # no key beside `far` is farther than `least`; nothing is known yet
    place = n_keys - max(n_keys // _FAR, 1)
    for number in range(n_given, len(entries)):
        farthest = _farthest(keys, entries, number, far, nearest, counted)
        if nearest[farthest] < least:

            def count(start: int, stop: int, number: int = number) -> None:
                _farthest(keys, entries, number, every[start:stop], nearest, counted)

            run_ranges(count, n_keys, threads=threads)
            farthest, least = int(nearest.argmax()), np.partition(nearest, place)[place]
            far = np.flatnonzero(nearest >= least)
        if nearest[farthest] <= 0:
            return number
        entries[number] = farthest
    return len(entries)


@compiled
def _farthest(keys, entries, n_entries, among, nearest, counted):  # type: ignore[no-untyped-def]
    """The key of `among`, ascending, that is farthest from the first `n_entries`; of several the first."""
    farthest = among[0]
    for key in among:
        for e in range(counted[key], n_entries):
            total = np.float32(0.0)
            for t in range(keys.shape[1]):
                step = keys[entries[e], t] - keys[key, t]
                total += step * step
            nearest[key] = min(nearest[key], total)
        counted[key] = n_entries
        if nearest[key] > nearest[farthest]:
            farthest = key
    return farthest


def spread_naive(keys: NDArray[np.float32], entries: list[int], n: int) -> list[int]:
    """Reference: up to `n` entry points, after the given ones always the key farthest from all before it."""
    entries = list(entries)
    while len(entries) < n:
        nearest = np.min([((keys - keys[entry]) ** 2).sum(axis=1) for entry in entries], axis=0)
        if nearest.max() <= 0:
            break
        entries.append(int(nearest.argmax()))
    return entries
