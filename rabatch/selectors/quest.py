"""Quest (arXiv 2406.10774): pages of 16 keys by the most that any key within their bounds could score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.index.base import SearchResult, empty_result
from rabatch.index.codes import KeyCodes
from rabatch.index.flat import FlatIndex
from rabatch.index.rerank import rerank
from rabatch.selectors.opening import Opening, OverKeys
from rabatch.traits import TRAITS

PAGE_KEYS = TRAITS["quest"].page_keys
"""Of consecutive tokens."""


class QuestIndex(OverKeys):
    """Per page and dimension the least and the greatest number of its keys.

    A page's score is sum_d max(q_d * min_d, q_d * max_d): the positive part of the query times the maxima and the
    negative part times the minima, so that one product scores all pages.

    Args:
        keys: Of all KV heads of a layer.
        threads: Of a search.
    """

    def __init__(self, keys: KeyCodes, *, threads: int = 1) -> None:
        super().__init__(keys, threads=threads)
        whole = np.pad(keys.decode(), ((0, 0), (0, -self.n_keys % PAGE_KEYS), (0, 0)), mode="edge")
        pages = whole.reshape(len(whole), -1, PAGE_KEYS, whole.shape[2])
        self._bounds = FlatIndex(np.concatenate([pages.max(axis=2), pages.min(axis=2)], axis=2))

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """The keys of the best k / 16 pages, at least one, with their exact scores; see `KeyIndex.search`.

        `effort` and `beta` mean nothing: pages are taken whole.
        """
        n_pages = max(k // PAGE_KEYS, 1) if k < self.n_keys else self._bounds.n_keys
        signs = np.concatenate([np.maximum(queries, 0), np.minimum(queries, 0)], axis=2)
        pages = self._bounds.search(signs, k=n_pages).ids
        ids = (pages[..., None] * PAGE_KEYS + np.arange(PAGE_KEYS, dtype=np.int32)).reshape(*pages.shape[:2], -1)
        found = empty_result(*ids.shape)
        found.ids[:] = np.where(ids < self.n_keys, ids, -1)
        found.visited[:] = found.distances[:] = self._bounds.n_keys
        return rerank(found, self.keys, queries, k=k, threads=self.threads)


def open_quest(opening: Opening) -> QuestIndex:
    return QuestIndex(opening.keys, threads=opening.threads)
