"""How the softmax mass of late queries of a context is spread over its keys: how many keys are worth retrieving."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import KeysError

GRID: tuple[int, ...] = (8, 16, 32, 64, 100, 128, 256, 512, 1024, 2048)
"""Numbers of best keys whose mass a profile tells. Part of the stored format (docs/format.md)."""
DIGITS = 6
_BLOCK_SCORES = 1 << 22  # scores in memory at once


def mass_profile(
    keys: NDArray[np.float32],
    queries: NDArray[np.float32],
    positions: NDArray[np.int64],
    *,
    index_range: tuple[int, int],
    window_tokens: int,
    scaling: float,
    softcap: float | None = None,
) -> NDArray[np.float32]:
    """The mean share of the softmax mass, over queries of one KV head, that the static set and the best keys hold.

    A query at position p sees the keys up to p. Its static set is what is not indexed, and the `window_tokens` keys up
    to and including p; the others are ranked by score.

    Args:
        keys: [n_keys, head_dim], float32: of the whole context.
        queries: [n_queries, head_dim], float32, unscaled, of any query head of the group.
        positions: [n_queries], int64: the position of each query.
        index_range: The keys of the index, [start, stop).
        scaling: Factor on q . k.
        softcap: Bound of the logits, or None.

    Returns:
        [1 + len(GRID)], float32, ascending, rounded to `DIGITS` digits: of the static set, and of it and the `GRID[i]`
        best others. 1 where nothing is left over.

    Raises:
        KeysError: There is no query, or one stands behind the last key.
    """
    if not len(queries):
        raise KeysError("queries", 0, "a profile needs at least one query")
    if not 0 <= positions.min() <= positions.max() < len(keys):
        raise KeysError("positions", (int(positions.min()), int(positions.max())), f"must be in [0, {len(keys)})")
    start, stop = index_range
    shares = np.zeros(1 + len(GRID), np.float64)
    rows = max(_BLOCK_SCORES // len(keys), 1)
    for first in range(0, len(queries), rows):
        block = slice(first, first + rows)
        scores = (queries[block] * np.float32(scaling)) @ keys.T
        if softcap is not None:
            scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
        for row, position in zip(scores, positions[block].tolist(), strict=True):
            others = slice(start, max(start, min(stop, position - window_tokens + 1)))
            shares += _shares(row[: position + 1], others)
    means: NDArray[np.float32] = (shares / len(queries)).round(DIGITS).astype(np.float32)
    return means


def _shares(scores: NDArray[np.float32], others: slice) -> NDArray[np.float64]:
    """The shares of one query: `scores` of the keys it sees (overwritten), `others` those outside its static set."""
    scores -= scores.max()
    weights = np.exp(scores, out=scores)
    ranked = weights[others]
    static = weights[: others.start].sum(dtype=np.float64) + weights[others.stop :].sum(dtype=np.float64)
    rest = ranked.sum(dtype=np.float64)
    count = min(GRID[-1], len(ranked))
    best = ranked if count == len(ranked) else np.partition(ranked, len(ranked) - count)[len(ranked) - count :]
    held = np.concatenate([[0.0], np.cumsum(np.sort(best)[::-1], dtype=np.float64)])
    return np.minimum((static + held[np.minimum((0, *GRID), count)]) / (static + rest), 1.0)
