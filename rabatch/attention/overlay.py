"""Long answers: generated keys past a limit leave the tail that is attended whole, for a private index.

The stored index stays as it is. The overlay of a question is a key index of its own over its older tail, one per
layer, whose finds compete with those of the context for the same budget. It is exact (`FlatIndex`): up to some 16K
generated tokens a product with every one of them costs less than a graph search, and nothing is lost (docs/decode.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.sets import Found
from rabatch.attention.tails import Tails
from rabatch.index.base import KeyIndex
from rabatch.index.flat import FlatIndex

BLOCK_TOKENS = 256
"""Tokens that enter an overlay at once."""


class Overlays:
    """The private indexes of all questions under way.

    Args:
        limit: Tokens of a tail that are attended whole; past `limit + BLOCK_TOKENS` the oldest ones enter the overlay.

    Attributes:
        begins: int64 [slots]: where the part of each tail begins that is attended whole.
        groups: By layer, the KV heads of each group of heads that is searched by itself; None for all heads, as where
            a layer is not named.
    """

    def __init__(self, tails: Tails, n_layers: int, slots: int, limit: int) -> None:
        self._tails = tails
        self._limit = limit
        self.groups: dict[int, tuple[Tensor | None, ...]] = {}
        self._indexes: list[dict[tuple[int, int], KeyIndex]] = [{} for _ in range(slots)]  # by layer and group
        self._n_layers = n_layers
        self.begins = torch.zeros(slots, dtype=torch.int64, device=tails.lengths.device)

    def settle(self) -> None:
        """Take in what lies past the limit. To be called between passes."""
        for slot in torch.nonzero(self._tails.lengths - self.begins > self._limit + BLOCK_TOKENS)[:, 0].tolist():
            begin = int(self.begins[slot])
            entering = slice(begin, int(self._tails.lengths[slot]) - self._limit)
            for layer in range(self._n_layers):
                keys = self._tails.keys(layer, slot, entering)
                if keys is None:
                    continue
                for group, heads in enumerate(self.groups.get(layer, (None,))):
                    mine = keys if heads is None else keys[heads]
                    new = np.ascontiguousarray(mine.float().cpu().numpy())
                    if (layer, group) in self._indexes[slot]:
                        self._indexes[slot][layer, group].insert(new)
                    else:
                        self._indexes[slot][layer, group] = FlatIndex(new)
            self.begins[slot] = entering.stop

    def clear(self, slot: int) -> None:
        """Forget what a slot held."""
        self._indexes[slot], self.begins[slot] = {}, 0

    def move(self, source: int, target: int) -> None:
        """Give the overlay of one slot to another."""
        self._indexes[target], self.begins[target] = self._indexes[source], self.begins[source]
        self._indexes[source] = {}

    def join(
        self, layer: int, slots: slice, rows: Tensor, found: Found, *, k: int, n_keys: int, group: int = 0
    ) -> Found:
        """The best `k` of what a context's index found and of what the overlays of these slots hold.

        Args:
            group: Which of the layer's `groups` the rows are of.
            rows: [n_kv, batch * rows of a question, head_dim], on the CPU, float32.
            found: Of the same rows.
            n_keys: Rows of the layer; keys of a tail are numbered from there on.
        """
        indexes = [self._indexes[slot].get((layer, group)) for slot in range(slots.start, slots.stop)]
        longest = max((index.n_keys for index in indexes if index is not None), default=0)
        if not longest:
            return found
        n_kv, n_rows, _ = rows.shape
        width = min(k, longest)
        per_question = n_rows // len(indexes)
        scores = torch.full((n_kv, n_rows, width), -torch.inf)
        ids = torch.full((n_kv, n_rows, width), -1, dtype=torch.int64)
        for number, index in enumerate(indexes):
            if index is not None:
                mine = slice(number * per_question, (number + 1) * per_question)
                own = index.search(np.ascontiguousarray(rows[:, mine].numpy()), k=width)
                scores[:, mine] = torch.from_numpy(own.scores)
                own_ids = torch.from_numpy(own.ids.astype(np.int64))
                ids[:, mine] = torch.where(own_ids < 0, -1, own_ids + n_keys)
        best = torch.cat([found.scores, scores], -1)
        both = torch.cat([found.ids, ids], -1)
        top = best.topk(min(max(k, found.ids.shape[2]), best.shape[2]), dim=-1)
        return Found(top.values, both.gather(-1, top.indices).masked_fill(top.values == -torch.inf, -1))
