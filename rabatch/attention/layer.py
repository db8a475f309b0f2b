"""One layer of a stored context in memory: what is attended always, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.coded import CodedRows
from rabatch.attention.sets import Found, StaticSet, Zones, stored_bits
from rabatch.attention.shared import SharedKeys
from rabatch.config import Recipe
from rabatch.index.base import Searchable, SearchResult
from rabatch.index.zones import zone_sums


@dataclass(frozen=True, eq=False)
class ContextLayer:
    """What one layer keeps of a context, keys and values on the model's device: of all its heads, or of those that keep
    every token, with the streaming heads beside them.

    Attributes:
        keys, values: [n_kv_heads, n_rows, head_dim] in the stored dtype; where those of the index are encoded, of the
            static set alone.
        first_position: Position of row 0; greater than 0 only where a native window dropped older tokens.
        index_start, index_stop: Rows the key index holds; the others are the static set.
        budget: int64 [n_kv_heads]: keys retrieved per query head.
        indexes: By method, a key index of the KV heads whose `budget` is not 0; none where nothing is retrieved
            (recipes dense and streaming, sliding and dense layers), several under recipe auto.
        dense: Every query attends every key that is kept, whatever the recipe.
        zones: int32 [n_kv_heads, index_stop - index_start], the zone of each key of the index; None: what is not
            retrieved is not estimated.
        left_out: Tokens between row `index_start` - 1 and the next that streaming heads do not keep.
        heads: Numbers of the layer's KV heads that `keys` is of. None: all of them.
        streaming: The others, where some of a layer's heads stream and some do not.
        key_codes, value_codes: Keys and values of the index, if they are encoded.
    """

    keys: Tensor
    values: Tensor
    first_position: int
    index_start: int
    index_stop: int
    budget: NDArray[np.int64]
    indexes: Mapping[str, Searchable] = field(default_factory=dict)
    zones: NDArray[np.int32] | None = None
    left_out: int = 0
    heads: Tensor | None = None
    streaming: ContextLayer | None = None
    key_codes: CodedRows | None = None
    value_codes: CodedRows | None = None
    dense: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """n_kv_heads, n_rows, head_dim."""
        n_kv, rows, dim = self.keys.shape
        return n_kv, rows + (0 if self.key_codes is None else self.key_codes.shape[1]), dim

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, [n_kv_heads, n_rows, head_dim]: decoded, in float32, where they are encoded."""
        both = ((self.keys, self.key_codes), (self.values, self.value_codes))
        keys, values = (plain if coded is None else self._joined(plain, coded) for plain, coded in both)
        return keys, values

    def indexed_keys(self, head: int) -> Tensor:
        """The keys of the index of one KV head, [n_index_keys, head_dim], float32."""
        if self.key_codes is not None:
            return self.key_codes.numbers(head, slice(None))
        return self.keys[head, self.index_start : self.index_stop].float()

    def _joined(self, plain: Tensor, coded: CodedRows) -> Tensor:
        start = self.index_start
        return torch.cat([plain[:, :start].float(), coded.decoded(), plain[:, start:].float()], dim=1)

    @property
    def groups(self) -> tuple[ContextLayer, ...]:
        """The heads by kind, each of which is attended in one pass."""
        return (self,) if self.streaming is None else (self, self.streaming)

    @property
    def n_kv_heads(self) -> int:
        """Of the layer."""
        return sum(len(group.keys) for group in self.groups)

    @property
    def context_tokens(self) -> int:
        """Of the context, as far as the layer tells."""
        return self.first_position + self.shape[1] + self.left_out

    @cached_property
    def positions(self) -> Tensor:
        """Position of each row in the context, int64 [n_rows]."""
        rows = torch.arange(self.shape[1], device=self.keys.device)
        return self.first_position + rows + self.left_out * (rows >= self.index_start)

    @cached_property
    def static(self) -> StaticSet:
        """The static set in one piece and in float32, and the zones: every step of every question reads them."""
        device, n_rows = self.keys.device, self.shape[1]
        rows = torch.cat([torch.arange(0, self.index_start), torch.arange(self.index_stop, n_rows)]).to(device)
        both = ((self.keys, self.key_codes), (self.values, self.value_codes))
        keys, values = (t[:, rows].float() if coded is None else t.float() for t, coded in both)
        positions = self.positions[rows]
        if self.zones is None or not self.zones.size:
            return StaticSet(keys, values, positions)
        first_keys, first_values = (self.index_start if coded is None else 0 for _, coded in both)
        of_keys, of_values = (stored_bits(t.cpu()) if c is None else c.on_cpu().kernel for t, c in both)
        made = zone_sums(
            of_keys,
            of_values,
            self.zones,
            half=self.keys.dtype == torch.float16,
            first_row=(first_keys, first_values),
            threads=torch.get_num_threads(),
        )
        counts, *sums = (torch.from_numpy(a).float().to(device) for a in made)
        # A zone without keys stands for nothing: its weight is exp(-inf).
        means = [s / counts.clamp_min(1)[..., None] for s in sums]
        for i, (_, coded) in enumerate(both):
            if coded is not None:
                means[i] = means[i] * coded.affine.scale[:, None] + coded.affine.center[:, None]
        zones = Zones(torch.from_numpy(self.zones).to(device), counts, self.index_start)
        return StaticSet(torch.cat([keys, means[0]], 1), torch.cat([values, means[1]], 1), positions, zones)

    @cached_property
    def shared(self) -> list[SharedKeys]:
        """What exact attention on the CPU reads: made when it is first asked for, and it copies the keys. Static set
        and index apart, if either keys or values are encoded."""
        key_codes, value_codes = self.key_codes, self.value_codes
        if key_codes is None and value_codes is None:
            return [SharedKeys.of(self.keys, self.values)]
        start, stop = self.index_start, self.index_stop
        both = ((self.keys, key_codes), (self.values, value_codes))
        outer = [torch.cat([t[:, :start], t[:, stop:]], 1) if coded is None else t for t, coded in both]
        inner = [t[:, start:stop] if coded is None else coded for t, coded in both]
        rows = torch.cat([torch.arange(0, start), torch.arange(stop, self.shape[1])])
        return [SharedKeys.of(*outer, rows=rows), SharedKeys.of(*inner, rows=torch.arange(start, stop))]

    def prepare(self, recipe: Recipe) -> None:
        """Make what passes under a recipe will read."""
        on_cpu = self.keys.device.type == "cpu"
        for group in self.groups:
            if recipe.method != "dense":
                _ = group.static.panels if on_cpu else group.static
            if (recipe.attends_all or self.dense) and group.shape[1]:
                _ = group.positions
                if on_cpu:
                    _ = group.shared

    def find(self, rows: NDArray[np.float32], method: str) -> Found:
        """The keys that an index finds, on the CPU, as rows of the layer.

        Args:
            method: Which of `indexes`; nothing is found where there is none of it.
            rows: [n_kv_heads, n_rows, head_dim].
        """
        index, heads = self.indexes.get(method), np.flatnonzero(self.budget)
        if index is None or not rows.shape[1] or not len(heads):
            return self.found(None, rows.shape[1])
        k = min(int(self.budget.max()), index.n_keys)
        return self.found(index.search(np.ascontiguousarray(rows[heads]), k=k), rows.shape[1])

    def found(self, result: SearchResult | None, n_rows: int) -> Found:
        """What was found for `n_rows` of the KV heads whose `budget` is not 0, as rows of the layer; of a head no more
        than its budget. None: nothing."""
        n_kv, heads, k = len(self.keys), np.flatnonzero(self.budget), 0 if result is None else result.ids.shape[2]
        scores = torch.full((n_kv, n_rows, k), -torch.inf)
        ids = torch.full((n_kv, n_rows, k), -1, dtype=torch.int64)
        if result is not None:
            past = (np.arange(k) >= self.budget[heads, None, None]) | (result.ids < 0)
            ids[heads] = torch.from_numpy(np.where(past, -1, result.ids.astype(np.int64) + self.index_start))
            scores[heads] = torch.from_numpy(np.where(past, np.float32(-np.inf), result.scores))
        return Found(scores, ids)
