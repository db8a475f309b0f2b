"""How many of the best keys a search finds, measured on some of the searches while questions are answered."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.layer import ContextLayer


class RecallSampler:
    """Compares searches with the exact top-k: each with the same chance, one query of one KV head of it.

    A sample reads the layer's keys of that head once, as exact attention of one query to one head does. It changes
    nothing of the answer.

    Args:
        share: Chance of a search (of all queries of a pass in one layer) to be looked at.

    Attributes:
        shares: Of the exact top-k, the share found, one per sample; whoever reads them empties the list.
    """

    def __init__(self, share: float, *, seed: int = 0) -> None:
        self.share = share
        self.shares: list[float] = []
        self._random = np.random.default_rng(seed)

    def look(self, layer: ContextLayer, queries: NDArray[np.float32], ids: Tensor) -> None:
        """Perhaps sample a search.

        Args:
            queries: [n_kv_heads, n_rows, head_dim].
            ids: [n_kv_heads, n_rows, k], rows of the layer; -1: nothing.
        """
        heads = np.flatnonzero(layer.budget)
        n_rows = queries.shape[1]
        if self._random.random() >= self.share or not len(heads) or not n_rows:
            return
        head, row = int(self._random.choice(heads)), int(self._random.integers(n_rows))
        keys = layer.indexed_keys(head)
        query = torch.from_numpy(np.ascontiguousarray(queries[head, row])).to(keys.device)
        best = (keys @ query).topk(min(int(layer.budget[head]), len(keys))).indices.cpu() + layer.index_start
        self.shares.append(float(torch.isin(best, ids[head, row].cpu()).float().mean()))

    def take(self) -> list[float]:
        """The samples so far; they are forgotten."""
        taken, self.shares = self.shares, []
        return taken
