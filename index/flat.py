"""Exact search: every key of a layer is scored. The yardstick of the other indexes, and right for short documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rabatch.index.arrow import from_table, to_table
from rabatch.index.base import (
    QuerySample,
    SearchResult,
    apply_beta,
    check_keys,
    check_queries,
    check_saved_keys,
    empty_result,
)
from rabatch.index.topk.knn import merge_topk

_MAX_BLOCK_SCORES = 1 << 22  # float32 scores held at once: 16 MiB


class FlatIndex:
    """Exact top-k over the keys of one layer.

    torch, not faiss: on one core at 8K keys, head_dim 64, top-100, a search takes 0.22 / 0.35 / 1.1 / 3.6 ms for
    1 / 4 / 16 / 64 queries, `faiss.knn` 0.07 / 0.46 / 1.5 / 6.2; a decode step has many rows.
    torch releases the GIL; its thread count is the process's `torch.set_num_threads`, whatever `threads` says.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32.
    """

    kind = "flat"

    def __init__(self, keys: NDArray[np.float32]) -> None:
        check_keys(keys)
        keys = keys if keys.flags.writeable else keys.copy()  # torch has no read-only tensors and warns
        self._keys = torch.from_numpy(np.ascontiguousarray(keys))

    @property
    def n_heads(self) -> int:
        return int(self._keys.shape[0])

    @property
    def n_keys(self) -> int:
        return int(self._keys.shape[1])

    @property
    def bytes_per_key(self) -> float:
        return float(self._keys.shape[2] * self._keys.element_size())

    @classmethod
    def build(
        cls,
        keys: NDArray[np.float32],
        samples: Sequence[QuerySample] = (),
        *,
        seed: int = 0,
        threads: int = 1,
        **options: Any,
    ) -> Self:
        """See `KeyIndex.build`; there is nothing to build."""
        return cls(keys, **options)

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`; `visited` is always `n_keys`, and `effort` means nothing."""
        check_queries(queries, self.n_heads, int(self._keys.shape[2]), k=k, effort=effort, beta=beta)
        n_kv, n_queries, _ = queries.shape
        result = empty_result(n_kv, n_queries, k)
        result.visited[:] = result.distances[:] = self.n_keys
        found = min(k, self.n_keys)
        if found == 0:
            return result
        step = max(_MAX_BLOCK_SCORES // (n_kv * self.n_keys), 1)
        with torch.no_grad():
            for start in range(0, n_queries, step):
                rows = slice(start, min(start + step, n_queries))
                scores = torch.from_numpy(np.array(queries[:, rows])) @ self._keys.transpose(1, 2)
                top_scores, ids = merge_topk(scores.flatten(0, 1), found, 0, None)
                shape = (n_kv, rows.stop - rows.start, found)
                result.scores[:, rows, :found] = top_scores.view(shape).numpy()
                result.ids[:, rows, :found] = ids.view(shape).numpy()
        return apply_beta(result, beta)

    def insert(self, keys: NDArray[np.float32]) -> None:
        """See `KeyIndex.insert`."""
        check_keys(keys, n_heads=self.n_heads, head_dim=int(self._keys.shape[2]))
        self._keys = torch.cat([self._keys, torch.from_numpy(np.array(keys))], dim=1)

    def to_arrow(self) -> pa.Table:
        """See `KeyIndex.to_arrow`: the keys are all there is."""
        return to_table({"kind": self.kind, "n_heads": self.n_heads, "n_keys": self.n_keys}, {}, {})

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """See `KeyIndex.from_arrow`."""
        settings, _, _ = from_table(table, cls.kind)
        check_saved_keys(keys, settings["n_heads"], settings["n_keys"])
        return cls(keys)
