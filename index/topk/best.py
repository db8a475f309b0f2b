"""The k best of a stream of scores: a heap, and its order once the stream has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from rabatch.index.compiled import compiled


@compiled
def push(scores, ids, found, score, key):  # type: ignore[no-untyped-def]
    """Enter (score, key) into a heap whose root is the worst: the lowest score and, among equals, the highest id.

    Args:
        scores, ids: [k], of which the first `found` are filled.

    Returns:
        How many are filled then. With k filled, the worst goes; the caller has seen to it that it is worse.
    """
    k = scores.shape[0]
    if found < k:
        at = found
        while at > 0:
            above = (at - 1) // 2
            if scores[above] < score or (scores[above] == score and ids[above] > key):
                break
            scores[at], ids[at] = scores[above], ids[above]
            at = above
        scores[at], ids[at] = score, key
        return found + 1
    at = 0
    while 2 * at + 1 < k:
        below = 2 * at + 1
        if below + 1 < k and (
            scores[below + 1] < scores[below] or (scores[below + 1] == scores[below] and ids[below + 1] > ids[below])
        ):
            below += 1
        if score < scores[below] or (score == scores[below] and key > ids[below]):
            break
        scores[at], ids[at] = scores[below], ids[below]
        at = below
    scores[at], ids[at] = score, key
    return found


def ranked(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, scores) [..., k] with the best first and, among equals, the lower id; unfilled places last."""
    by_id = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(dim=-1)
    ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), scores.gather(-1, order)
