"""What the baselines that are one graph per head share: their search, by our own kernel, and their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import IntegrityError
from rabatch.index.base import SearchResult
from rabatch.index.baselines.common import Baseline
from rabatch.index.codes import KeyCodes
from rabatch.index.search import search_graph


class LinkedBaseline(Baseline):
    """Graphs [n_kv_heads, n_keys, degree] of links; `effort` is the length of the candidate list, by default 2 k."""

    starts: ClassVar[int]
    """Keys a search starts from beside the graph's own one, but no more than its list is long."""
    _links: NDArray[np.int32]
    _entries: NDArray[np.int32]

    def _search(self, queries: NDArray[np.float32], k: int, effort: int) -> SearchResult:
        limit = max(effort or 2 * k, k)
        return search_graph(
            KeyCodes("float32", self._keys),
            self._links,
            self._entries[:, :limit],
            queries,
            k=k,
            search_list=limit,
            threads=self._threads,
        )

    def _set_entries(self, first: NDArray[np.int64]) -> None:
        """Start at `first`, one key per head, and at `starts` more by chance, the same for every query."""
        others = np.random.default_rng(self._seed).permutation(self.n_keys)[: self.starts]
        # A key that comes twice is scored once.
        self._entries = np.array([[key, *others] for key in first], np.int32)

    def _bytes(self) -> int:
        return self._links.nbytes + self._entries.nbytes if hasattr(self, "_links") else 0

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {"links": self._links}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"entries": self._entries}

    def _restore(self, columns: Mapping[str, NDArray[Any]], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._links, self._entries = columns["links"], arrays["entries"]
        for name, ids in (("links", self._links), ("entries", self._entries)):
            # The kernel does not look where it reads.
            if ids.dtype != np.int32 or (ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < self.n_keys):
                raise IntegrityError(name, str(ids.dtype), f"must be int32 ids, -1 .. {self.n_keys - 1}")
