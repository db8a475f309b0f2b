"""The nearest keys of every key in L2: exact in small indexes, within overlapping cells in large ones."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from rabatch.index.compiled import run_ranges
from rabatch.index.native import one_faiss_thread

# The graph wants near keys, not the nearest. On 128K keys of 128 dimensions, one core: 2 cells of 256 keys find 0.59 of
# the true 14 in 2.9 s, 8 cells of 1,024 find 0.97 in 11.6 s, and the graphs made of them are searched alike (the same
# recall at the same share of keys visited, to 0.001). On real keys at 8K, exact neighbours gain 0.01 of recall.
MAX_EXACT_KEYS = 4096
KEYS_PER_CELL = 256
CELLS_SEARCHED = 2
_ROWS_PER_BLOCK = 4096  # fixed: the result must not depend on the thread count; faiss is half as fast with 1,024
_ITERATIONS = 5


def nearest_keys(keys: NDArray[np.float32], *, k: int, seed: int = 0, threads: int = 1) -> NDArray[np.int32]:
    """About the `k` nearest other keys of every key, nearest first.

    Args:
        keys: [n_keys, head_dim], float32.

    Returns:
        [n_keys, min(k, n_keys - 1)], int32; -1 past the last one that was found.
    """
    n_keys = len(keys)
    k = max(min(k, n_keys - 1), 0)
    nearest = np.full((n_keys, k), -1, np.int32)
    if k == 0:
        return nearest
    if n_keys <= MAX_EXACT_KEYS:
        blocks = [np.arange(start, min(start + _ROWS_PER_BLOCK, n_keys)) for start in range(0, n_keys, _ROWS_PER_BLOCK)]
        neighborhoods: Sequence[NDArray[np.int64] | None] = [None] * len(blocks)
    else:
        blocks, neighborhoods = _cells(keys, seed)

    @one_faiss_thread()
    def search(start: int, stop: int) -> None:
        for rows, others in zip(blocks[start:stop], neighborhoods[start:stop], strict=True):
            if len(rows):
                found = faiss.knn(keys[rows], keys if others is None else keys[others], k + 1)[1]
                if others is not None:
                    found = np.where(found < 0, -1, others[found])
                nearest[rows] = _without_self(found, rows)

    run_ranges(search, len(blocks), threads=threads)
    return nearest


def _cells(keys: NDArray[np.float32], seed: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Disjoint k-means cells, and for each the keys of the cells nearest to it (itself included).

    faiss trains on a sample of 64 keys a cell.
    """
    n_cells = len(keys) // KEYS_PER_CELL
    with one_faiss_thread():
        kmeans = faiss.Kmeans(keys.shape[1], n_cells, niter=_ITERATIONS, seed=seed + 1, max_points_per_centroid=64)
        kmeans.train(keys)
        assigned = kmeans.index.search(keys, 1)[1][:, 0]
        centroids = np.asarray(kmeans.centroids, np.float32)
        near = kmeans.index.search(centroids, min(CELLS_SEARCHED, n_cells))[1]
    order = np.argsort(assigned, kind="stable")
    cells = np.split(order, np.cumsum(np.bincount(assigned, minlength=n_cells))[:-1])
    lost = np.flatnonzero((near != np.arange(n_cells)[:, None]).all(axis=1))
    near[lost, -1] = lost  # of centroids in one place only one may be found; a cell always searches itself
    return cells, [np.concatenate([cells[c] for c in row]) for row in near]


def _without_self(found: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Drop each key's own id from its [n, k + 1] list, or the last entry where duplicates crowded it out."""
    is_self = found == rows[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return found[~is_self].reshape(len(found), -1).astype(np.int32)
