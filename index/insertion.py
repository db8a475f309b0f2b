"""Inserting keys into a graph by the queries that want them (RoarGraph, section 4.5 of arXiv 2408.08933).

A new key is linked to the keys that the sampled queries which want it most already know. Here several queries vote, not
the nearest one alone, and a new key enters the lists of the queries that rank it high, so the keys inserted after it
find it there. Whatever is replaced, the links to the keys before and after stay: every key remains reachable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.index.alignment import align
from rabatch.index.base import QuerySample

VOTERS = 4  # sampled queries that propose links for a new key; 8 find no more and cost twice as much
_ROWS = 1024  # new keys whose scores are held at once


class Growing:
    """What insertion needs of one KV head besides links: its keys, the sampled queries, and what they want.

    All of it in aligned coordinates: the same scores, and distances that mean something.

    Args:
        sample: With query vectors.
        keys: [n_keys, head_dim], float32, those indexed so far.
    """

    def __init__(self, sample: QuerySample, keys: NDArray[np.float32]) -> None:
        assert sample.queries is not None
        self._alignment = align(keys, sample.queries)
        self._queries = self._alignment.queries(sample.queries)
        self._keys = self._alignment.keys(keys)
        self._topk = sample.topk.copy() if sample.topk.shape[1] else np.full((len(sample.topk), 1), -1, np.int32)
        picked = self._keys[np.maximum(self._topk, 0)] if len(keys) else np.zeros((*self._topk.shape, keys.shape[1]))
        scores = np.einsum("qd,qkd->qk", self._queries, picked)
        self._scores = np.where(self._topk >= 0, scores, -np.inf).astype(np.float32)

    def insert(self, new_keys: NDArray[np.float32], neighbors: NDArray[np.int32]) -> None:
        """Link new keys, in place.

        Args:
            new_keys: [n_new, head_dim], float32.
            neighbors: [n_keys + n_new, degree], int32; the last rows are written, some of the others changed.
        """
        first = len(self._keys)
        self._keys = keys = np.concatenate([self._keys, self._alignment.keys(new_keys)])
        seen = np.full(len(keys), -1, np.int32)
        for start in range(first, len(keys), _ROWS):
            stop = min(start + _ROWS, len(keys))
            wanted = keys[start:stop] @ self._queries.T
            _insert(keys, neighbors, wanted, self._topk, self._scores, seen, start, stop, VOTERS)


@compiled
def _insert(keys, neighbors, wanted, topk, scores, seen, start, stop, voters):  # type: ignore[no-untyped-def]
    """Insert keys `start` to `stop`, one after another; `wanted[i, q]` is the score of key `start + i` for query q."""
    n_queries, length = topk.shape
    degree, dim = neighbors.shape[1], keys.shape[1]
    room = voters * length + degree
    best = np.empty(voters, np.int64)
    margin = np.empty(voters, np.float32)
    candidates = np.empty(room, np.int32)
    near = np.empty(room, np.float32)
    used = np.empty(room, np.bool_)
    for key in range(start, stop):
        links = neighbors[key]
        links[:] = -1
        n = 0
        if key > 0:
            links[0] = key - 1
            n = 1
            _keep(neighbors, key - 1, key, 1)
        # Queries by how far above the last of their list the key would stand.
        n_best = 0
        for q in range(n_queries):
            above = wanted[key - start, q] - scores[q, length - 1]
            if topk[q, length - 1] < 0:
                above = wanted[key - start, q]
            if n_best == voters and above <= margin[n_best - 1]:
                continue
            place = min(n_best, voters - 1)
            while place > 0 and margin[place - 1] < above:
                margin[place], best[place] = margin[place - 1], best[place - 1]
                place -= 1
            margin[place], best[place] = above, q
            n_best = min(n_best + 1, voters)
        # What they know, nearest to the key first; each once.
        n_candidates = 0
        seen[max(key - 1, 0) : key + 1] = key  # the key before is linked already
        for b in range(n_best + 1):
            if b < n_best:
                known = topk[best[b]]
            elif key > 0:
                known = neighbors[key - 1]
            else:
                continue
            for other in known:
                if other >= 0 and seen[other] != key:
                    seen[other] = key
                    candidates[n_candidates] = other
                    n_candidates += 1
        for c in range(n_candidates):
            near[c] = np.float32(0.0)
            for t in range(dim):
                near[c] -= (keys[candidates[c], t] - keys[key, t]) ** 2
            used[c] = False
        order = np.argsort(-near[:n_candidates])
        # Occlusion: a candidate that is nearer to a link than to the key is reached through that link.
        for strict in (True, False):
            for c in order:
                if n >= degree - 1:
                    break
                if used[c]:
                    continue
                kept = True
                if strict:
                    for j in range(min(n, 1), n):
                        between = np.float32(0.0)
                        for t in range(dim):
                            between -= (keys[candidates[c], t] - keys[links[j], t]) ** 2
                        if between > near[c]:
                            kept = False
                            break
                if kept:
                    used[c] = True
                    links[n] = candidates[c]
                    n += 1
        for j in range(1, n):
            _link_back(keys, neighbors, links[j], key)
        # The lists of the queries that rank the key high learn of it.
        for q in range(n_queries):
            score = wanted[key - start, q]
            if topk[q, length - 1] >= 0 and score <= scores[q, length - 1]:
                continue
            place = length - 1
            while place > 0 and (topk[q, place - 1] < 0 or scores[q, place - 1] < score):
                scores[q, place], topk[q, place] = scores[q, place - 1], topk[q, place - 1]
                place -= 1
            scores[q, place], topk[q, place] = score, key


@compiled
def _keep(neighbors, key, link, slot):  # type: ignore[no-untyped-def]
    """Put `link` into `slot` of a row, what stood there into a free one if there is any."""
    row = neighbors[key]
    for j in range(len(row)):
        if row[j] == link:
            row[j] = row[slot]
            row[slot] = link
            return
    moved = row[slot]
    row[slot] = link
    if moved >= 0:
        for j in range(len(row)):
            if row[j] < 0:
                row[j] = moved
                return


@compiled
def _link_back(keys, neighbors, key, link):  # type: ignore[no-untyped-def]
    """Link `key` to a new key: in a free slot, else in place of its farthest link but the two of the chain."""
    row = neighbors[key]
    dim = keys.shape[1]
    worst, farthest = -1, np.float32(-1.0)
    for j in range(len(row)):
        if row[j] == link:
            return
        if row[j] < 0:
            row[j] = link
            return
    for j in range(2, len(row)):
        distance = np.float32(0.0)
        for t in range(dim):
            distance += (keys[row[j], t] - keys[key, t]) ** 2
        if distance > farthest:
            farthest, worst = distance, j
    if worst >= 0:
        row[worst] = link
