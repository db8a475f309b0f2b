"""Keys that are listed beforehand, and not searched for query by query: what methods that evict the others attend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.index.base import SearchResult, empty_result
from rabatch.index.codes import KeyCodes
from rabatch.index.rerank import rerank
from rabatch.selectors.opening import OverKeys


class ListedKeys(OverKeys):
    """The keys of one layer, with one list for all queries or with none.

    Args:
        keys: Of all KV heads.
        ids: [n_kv_heads, n_listed], int32, first the one to keep longest. None: every search has to name its keys.
        threads: Of a search.
    """

    def __init__(self, keys: KeyCodes, ids: NDArray[np.int32] | None = None, *, threads: int = 1) -> None:
        super().__init__(keys, threads=threads)
        self.ids = ids

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """The first `k` of the list, whatever the query, by their scores; see `KeyIndex.search`."""
        if self.ids is None:
            raise ValueError("there is no list: keys are chosen by a question, see rabatch.attention.selection")
        ids = self.ids[:, None, :k]
        return self.score(queries, np.broadcast_to(ids, (*queries.shape[:2], ids.shape[2])))

    def score(self, queries: NDArray[np.float32], ids: NDArray[np.int32]) -> SearchResult:
        """Keys [n_kv_heads, n_queries, n], each once, -1 for none, with their exact scores, best first."""
        found = empty_result(*ids.shape)
        found.ids[:] = ids
        return rerank(found, self.keys, queries, k=ids.shape[2], threads=self.threads)
