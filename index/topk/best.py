"""The k best of a stream of scores in a heap, and lists of them in order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rabatch.index.compiled import compiled
from rabatch.index.topk.lanes import LANES, above, lowest_bit


@compiled
def _worse(scores, ids, a, b):  # type: ignore[no-untyped-def]
    """Whether place `a` holds less than place `b`: a lower score or, with an equal one, a higher id."""
    return scores[a] < scores[b] or (scores[a] == scores[b] and ids[a] > ids[b])


@compiled
def _swap(scores, ids, a, b):  # type: ignore[no-untyped-def]
    scores[a], scores[b] = scores[b], scores[a]
    ids[a], ids[b] = ids[b], ids[a]


@compiled
def _sink(scores, ids, n):  # type: ignore[no-untyped-def]
    """Let the root of a heap of `n` go down to where it belongs."""
    at = 0
    while 2 * at + 1 < n:
        below = 2 * at + 1
        if below + 1 < n and _worse(scores, ids, below + 1, below):
            below += 1
        if not _worse(scores, ids, below, at):
            break
        _swap(scores, ids, at, below)
        at = below


@compiled
def push(scores, ids, found, score, key):  # type: ignore[no-untyped-def]
    """Enter (score, key) into a heap whose root is the worst: the lowest score and, among equals, the highest id.

    Args:
        scores, ids: [k], of which the first `found` are filled.

    Returns:
        How many are filled then. With k filled, the worst goes; the caller has seen to it that it is worse.
    """
    if found == scores.shape[0]:
        scores[0], ids[0] = score, key
        _sink(scores, ids, found)
        return found
    scores[found], ids[found] = score, key
    at = found
    while at > 0 and _worse(scores, ids, at, (at - 1) // 2):
        _swap(scores, ids, at, (at - 1) // 2)
        at = (at - 1) // 2
    return found + 1


@compiled
def keep_best(lines, row, begin, limits, heap, found):  # type: ignore[no-untyped-def]
    """Enter scores into a heap of the best; how many it then holds.

    Args:
        lines: Flat; the score of key `begin + j` is `lines[row + j]`, for j in range(*limits).
        heap: Scores and ids, [k], of which the first `found` are filled.
    """
    scores, ids = heap
    k = scores.shape[0]
    bar = scores[0] if found == k else np.float32(-np.inf)
    for panel in range(limits[0] // LANES * LANES, limits[1], LANES):
        bits = above(lines, row + panel, bar)  # type: ignore[call-arg, var-annotated]
        while bits:
            t = panel + lowest_bit(bits)  # type: ignore[call-arg]
            bits &= bits - 1
            if limits[0] <= t < limits[1] and lines[row + t] > bar:
                found = push(scores, ids, found, lines[row + t], begin + t)
                if found == k:
                    bar = scores[0]
    return found


@compiled
def rank(scores, ids, found):  # type: ignore[no-untyped-def]
    """Turn a heap of `found` into a list with the best first and, among equals, the lower id."""
    for n in range(found - 1, 0, -1):
        _swap(scores, ids, 0, n)
        _sink(scores, ids, n)


def ranked(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, scores) [..., k] in any order, brought in order as by `rank`; unfilled places last."""
    by_id = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(dim=-1)
    ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), scores.gather(-1, order)
