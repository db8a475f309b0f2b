"""The queries of one context that graphs are made from: their positions, what they may rank, what they rank highest."""

from __future__ import annotations

import torch
from torch import Tensor


class ContextSample:
    """Sampled query positions of one context, and what the prefill finds of them, chunk by chunk and layer by layer.

    A query of a question will attend the static set besides the index, so a sampled context query at position p
    ranks only keys that would be in the index for it: those from `sink_tokens` up to p - `window_tokens`.

    Args:
        context_tokens: Length of the context.
        index_range: Rows that the key index will hold, [start, stop); empty: nothing is sampled.
        window_tokens: Recent tokens a sampled query ignores.
        query_share: Share of the queries that are sampled, evenly spaced.
        top_k: Keys kept per sampled query.
        sample_vectors: Sampled queries per KV head, at most, whose vectors are kept too.

    Attributes:
        positions: int64 [n_sampled], ascending.
        low, high: int64 [n_sampled]: the keys low <= j < high that each may rank.
    """

    def __init__(
        self,
        *,
        context_tokens: int,
        index_range: tuple[int, int],
        window_tokens: int,
        query_share: float,
        top_k: int,
        sample_vectors: int,
    ) -> None:
        start, stop = self.index_range = index_range
        self.context_tokens = context_tokens
        self.top_k = top_k
        self.index_start = start
        self.sample_vectors = sample_vectors
        first = min(start + window_tokens, context_tokens)
        count = round((context_tokens - first) * query_share) if stop > start else 0
        self.positions = (
            torch.linspace(first, context_tokens - 1, count).round().long().unique()
            if count
            else torch.empty(0, dtype=torch.long)
        )
        self.low = torch.full_like(self.positions, start)
        self.high = (self.positions - window_tokens + 1).clamp(max=stop)
        # By layer, of every chunk: [n_kv, query heads of the group, sampled positions, top_k or head_dim].
        self._lists: dict[int, list[Tensor]] = {}
        self._vectors: dict[int, list[Tensor]] = {}
        self._mass: dict[int, Tensor] = {}

    def between(self, start: int, stop: int) -> Tensor:
        """Which of the sampled positions lie in start .. stop - 1: bool [n_sampled]."""
        return (self.positions >= start) & (self.positions < stop)

    def has_vector(self, group: int) -> Tensor:
        """Which sampled positions keep the vectors of their `group` query heads: bool [n_sampled], evenly spread."""
        n_sampled = len(self.positions)
        count = min(self.sample_vectors // group, n_sampled)
        known = torch.zeros(n_sampled, dtype=torch.bool)
        if count:
            known[(2 * torch.arange(count) + 1) * n_sampled // (2 * count)] = True  # the middles of equal stretches
        return known

    def add(self, layer: int, lists: Tensor, vectors: Tensor) -> None:
        """Enter what one chunk found, on the host: lists [n_kv, group, n, top_k] and vectors [n_kv, group, m, head_dim]
        of the chunk's sampled positions and of those of them that `has_vector`."""
        self._lists.setdefault(layer, []).append(lists)
        self._vectors.setdefault(layer, []).append(vectors)

    def add_mass(self, layer: int, mass: Tensor) -> None:
        """Enter how much one chunk's sampled queries attended the keys of the index, float32 [n_kv, keys]."""
        self._mass[layer] = self._mass[layer] + mass if layer in self._mass else mass

    def mass_of_heads(self, layer: int, head_start: int, head_stop: int) -> Tensor:
        """What all sampled queries together did, float32 [heads, keys of the index]; [heads, 0] if none was entered."""
        mass = self._mass.get(layer)
        return torch.empty((head_stop - head_start, 0)) if mass is None else mass[head_start:head_stop]

    def of_heads(self, layer: int, head_start: int, head_stop: int) -> tuple[Tensor, Tensor]:
        """Lists of the sampled queries of all query heads of each KV head, and the vectors behind the first of them.

        Queries whose vectors are kept come first, then the others, both ordered by (query head, position), whatever the
        chunks were. Complete once the whole context was attended.

        Returns:
            lists: int32 [heads, n_lists, top_k], best first, ids from the start of the index, -1 pads.
            queries: [heads, n_vectors, head_dim], in the model's compute dtype, rotated, unscaled: what was scored.
        """
        chunks = self._lists.get(layer)
        if not chunks:
            heads = head_stop - head_start
            return torch.empty((heads, 0, self.top_k), dtype=torch.int32), torch.empty((heads, 0, 0))
        lists = torch.cat([chunk[head_start:head_stop] for chunk in chunks], dim=2)
        queries = torch.cat([chunk[head_start:head_stop] for chunk in self._vectors[layer]], dim=2)
        known = self.has_vector(lists.shape[1])
        parts = [lists[:, :, rows].flatten(1, 2) for rows in (known, ~known)]
        local = torch.cat(parts, dim=1)
        return torch.where(local < 0, local, local - self.index_start), queries.flatten(1, 2)
