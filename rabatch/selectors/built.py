"""Key indexes that are not stored: built of the keys when a context is opened, to compare with (`index/baselines`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabatch.index.base import KeyIndex, QuerySample, SearchResult
from rabatch.selectors.opening import Opening


@dataclass(frozen=True, eq=False)
class BuiltIndex:
    """A key index with an effort of its own; see `Searchable`."""

    index: KeyIndex
    effort: int

    @property
    def n_keys(self) -> int:
        return self.index.n_keys

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`; `effort` 0 is that of the index."""
        return self.index.search(queries, k=k, effort=effort or self.effort, beta=beta)


def built(kind: Any, opening: Opening, *, effort: int, samples: Sequence[QuerySample] | None = None) -> BuiltIndex:
    """An index of a class of `index/baselines` over the keys.

    Args:
        samples: Queries that it is built for, one sample per head. None: it is built without.
    """
    none = [QuerySample(np.empty((0, 0), np.int32))] * len(opening.heads)
    return BuiltIndex(kind.build(opening.keys.decode(), samples or none, threads=opening.threads), effort)
