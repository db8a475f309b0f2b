"""NSG of faiss over lifted keys: a pruned graph of nearest keys, all of them reachable from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import ConfigError
from rabatch.index.base import QuerySample
from rabatch.index.baselines.lift import Reduction, told_apart
from rabatch.index.baselines.linked import LinkedBaseline
from rabatch.index.native import native

_ROWS_PER_BLOCK = 4096


class NsgIndex(LinkedBaseline):
    """Navigating spreading-out graph (Fu et al., 2019), built by `faiss.IndexNSGFlat`, one per KV head.

    `effort` is the length of the candidate list (search_L), by default 2 k. Options: `degree`, and `knn`, the nearest
    keys it is pruned from. faiss also builds it over inner products; then, at a list of 200 and
    16K stressed keys, it finds 0.57 of the top 100 where over lifted keys it finds 0.92.

    The links are searched by our kernel: `IndexNSGFlat` takes the length of its list from the index, so two searches
    at once would disturb each other, and counts nothing. As there, a search starts from as many random keys as its
    list is long: queries far from all keys are not led well from one start. Lists of 200 / 800 find 0.68 / 0.98 from
    one start, 0.83 / 0.99 from 128, 0.88 / 1.0 from 512 (other seeds: 0.87-0.96); past 512, sorting them takes longer
    than following links. faiss cannot add keys to the graph.
    """

    kind = "nsg"
    defaults: ClassVar[Mapping[str, Any]] = {"degree": 32, "knn": 64}
    starts = 512

    def _fit(self, samples: Sequence[QuerySample]) -> None:
        degree = self._options["degree"]
        self._links = np.full((self.n_heads, self.n_keys, degree), -1, np.int32)
        first = np.zeros(self.n_heads, np.int64)

        def build(head: int) -> None:
            lifted = told_apart(Reduction.of(self._keys[head]).lift(self._keys[head]), self._seed)
            nearest = _nearest(lifted, min(self._options["knn"], self.n_keys - 1))
            graph = native.IndexNSGFlat(lifted.shape[1], degree, native.METRIC_L2)
            graph.nsg.rng = native.RandomGenerator(self._seed + 1)
            graph.build(lifted, nearest)
            built = graph.nsg.get_final_graph()
            links = native.rev_swig_ptr(built.data, built.N * built.K).reshape(built.N, built.K)
            self._links[head] = links
            first[head] = graph.nsg.enterpoint

        self._for_heads(build)
        self._set_entries(first)

    def insert(self, keys: NDArray[np.float32]) -> None:
        """Raises ConfigError: faiss builds an NSG once."""
        raise ConfigError("insert", self.kind, "an NSG cannot grow; build it anew over all keys, or use vamana")


def _nearest(vectors: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The `k` nearest others of every vector, exact, in time that grows with the square: 1.3 s for 16K, one core."""
    nearest = np.empty((len(vectors), k), np.int64)
    for start in range(0, len(vectors), _ROWS_PER_BLOCK):
        found = native.knn(vectors[start : start + _ROWS_PER_BLOCK], vectors, k + 1)[1]
        own = found == np.arange(start, start + len(found))[:, None]
        own[~own.any(axis=1), -1] = True
        nearest[start : start + len(found)] = found[~own].reshape(-1, k)
    return nearest
