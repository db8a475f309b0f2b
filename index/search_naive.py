"""Reference of the graph search: one query, one head, Python lists and sets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def search_graph(
    keys: NDArray[np.float32],
    neighbors: NDArray[np.int32],
    entries: NDArray[np.int32],
    query: NDArray[np.float32],
    *,
    k: int,
    search_list: int,
    beta: float | None = None,
) -> tuple[list[int], list[float], int]:
    """Best-first beam search.

    The rule, which the kernel shares: of two keys the better has the higher score, or the lower id at equal scores.
    The list holds the best `max(search_list, k)` keys scored so far. While it holds a key whose links were not
    followed, follow those of the best such key and score the keys not seen before. With `beta`, stop once that key
    stands behind the best `search_list` and scores less than the best key minus `beta`.

    Args:
        keys: [n_keys, head_dim].
        neighbors: [n_keys, degree]; -1 ends a list.
        entries: [n_entries]; -1 is skipped.
        query: [head_dim].
        beta: In units of a score; None: no such limit.

    Returns:
        ids and scores, best first, at most `k`; and the number of keys scored.
    """
    limit = max(search_list, k)
    seen: set[int] = set()
    followed: set[int] = set()
    best: list[tuple[float, int]] = []

    def score_new(candidates: NDArray[np.int32]) -> None:
        new = {int(c) for c in candidates if c >= 0} - seen
        seen.update(new)
        best.extend((-float(keys[c] @ query), c) for c in new)
        best.sort()
        del best[limit:]

    score_new(entries)
    while open_ranks := [rank for rank, (_, key) in enumerate(best) if key not in followed]:
        rank = open_ranks[0]
        score, key = -best[rank][0], best[rank][1]
        if beta is not None and rank >= search_list and score < -best[0][0] - beta:
            break
        followed.add(key)
        score_new(neighbors[key])
    return [key for _, key in best[:k]], [-negated for negated, _ in best[:k]], len(seen)
