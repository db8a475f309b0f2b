"""The nearest keys of every key in L2: exact in small indexes, within overlapping cells in large ones."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from rabatch.index.compiled import run_ranges

# One core, head_dim 64, k 14: exact takes 0.2 s at 8K keys, 0.9 s at 16K, 3.7 s at 32K, growing with the square;
# 8 cells of 1,024 find 97 % of the nearest at 32K keys in 2.5 s (4 cells: 90 %; 4 of 2,048: 95 %), growing linearly.
MAX_EXACT_KEYS = 32768
_KEYS_PER_CELL = 1024
_CELLS_SEARCHED = 8
_ROWS_PER_BLOCK = 4096  # fixed: the result must not depend on the thread count; faiss is half as fast with 1,024


def nearest_keys(keys: NDArray[np.float32], *, k: int, seed: int = 0, threads: int = 1) -> NDArray[np.int32]:
    """The `k` nearest other keys of every key, nearest first.

    Args:
        keys: [n_keys, head_dim], float32.

    Returns:
        [n_keys, min(k, n_keys - 1)], int32.
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

    def search(start: int, stop: int) -> None:
        faiss.omp_set_num_threads(1)  # of this thread only: OpenMP counts are per thread
        for rows, others in zip(blocks[start:stop], neighborhoods[start:stop], strict=True):
            if len(rows):
                found = faiss.knn(keys[rows], keys if others is None else keys[others], k + 1)[1]
                nearest[rows] = _without_self(found if others is None else others[found], rows)

    before = faiss.omp_get_max_threads()
    try:
        run_ranges(search, len(blocks), threads=threads)
    finally:
        faiss.omp_set_num_threads(before)
    return nearest


def _cells(keys: NDArray[np.float32], seed: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Disjoint k-means cells, and for each the keys of the cells nearest to it (itself included).

    faiss trains on a sample of 64 keys a cell.
    """
    n_cells = len(keys) // _KEYS_PER_CELL
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(keys.shape[1], n_cells, niter=8, seed=seed + 1, max_points_per_centroid=64)
        kmeans.train(keys)
        assigned = kmeans.index.search(keys, 1)[1][:, 0]
        centroids = np.asarray(kmeans.centroids, np.float32)
        near = kmeans.index.search(centroids, min(_CELLS_SEARCHED, n_cells))[1]
    finally:
        faiss.omp_set_num_threads(before)
    order = np.argsort(assigned, kind="stable")
    cells = np.split(order, np.cumsum(np.bincount(assigned, minlength=n_cells))[:-1])
    return cells, [np.concatenate([cells[c] for c in row]) for row in near]


def _without_self(found: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Drop each key's own id from its [n, k + 1] list, or the last entry where duplicates crowded it out."""
    is_self = found == rows[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return found[~is_self].reshape(len(found), -1).astype(np.int32)
