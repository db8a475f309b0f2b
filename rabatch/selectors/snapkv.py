"""SnapKV (arXiv 2404.14469): the keys that the end of a question attends most are kept for its answer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rabatch.attention.merge import logits
from rabatch.attention.selection import Asked, Observed, Selection
from rabatch.attention.sets import Found
from rabatch.selectors.listed import ListedKeys
from rabatch.selectors.opening import Opening

WINDOW_TOKENS = 32
"""Last tokens of the question whose attention counts."""
KERNEL_KEYS = 5
"""Keys that the attention to a key is averaged over: those around what is attended come along (section 4.2)."""


class SnapKvSelection(Selection):
    """Keys chosen once per question, layer and KV head, and attended by every later token."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self._kept: dict[int, dict[tuple[int, int], NDArray[np.int32]]] = {}  # by slot; by layer and group of heads

    def observe(self, observed: Observed) -> None:
        layer = observed.layer
        index = layer.indexes.get(self.method)
        if index is None:
            return
        k = min(int(layer.budget.max()), index.n_keys)
        kept = [np.empty((len(layer.keys), k), np.int32) for _ in observed.counts]
        for head in range(len(layer.keys)):
            keys = layer.indexed_keys(head)
            for number, count in enumerate(observed.counts):
                window = slice(max(count - WINDOW_TOKENS, 0), count)
                queries, lse = (x[head, number, :, window].float() for x in (observed.queries, observed.lse))
                raw = logits(queries @ keys.T, observed.call.scaling, observed.call.softcap)
                mass = torch.exp(raw - lse[..., None]).sum(dim=(0, 1))
                kept[number][head] = pooled(mass).topk(k).indices.int().cpu().numpy()
        for number, ids in enumerate(kept):
            self._kept.setdefault(observed.first_slot + number, {})[observed.call.layer, observed.group] = ids

    def find(self, asked: Asked) -> Found:
        index = asked.layer.indexes.get(self.method)
        n_rows = asked.rows.shape[1]
        if index is None or not n_rows:
            return asked.layer.found(None, n_rows)
        assert isinstance(index, ListedKeys)
        slots = range(asked.first_slot, asked.first_slot + len(asked.call.query))
        lists = np.stack([self._kept[slot][asked.call.layer, asked.group] for slot in slots], axis=1)
        return asked.layer.found(index.score(asked.rows, lists[:, asked.questions]), n_rows)

    def clear(self, slot: int) -> None:
        self._kept.pop(slot, None)

    def move(self, source: int, target: int) -> None:
        self._kept[target] = self._kept.pop(source)


def pooled(mass: torch.Tensor) -> torch.Tensor:
    """The mean of [n_keys] over `KERNEL_KEYS` neighbours, with zeros beyond the ends."""
    return torch.nn.functional.avg_pool1d(mass[None], KERNEL_KEYS, stride=1, padding=KERNEL_KEYS // 2)[0]


def open_snapkv(opening: Opening) -> ListedKeys:
    return ListedKeys(opening.keys, threads=opening.threads)
