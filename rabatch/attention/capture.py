"""The attention of a prefill: exact and causal, and for sampled queries also the keys they rank highest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rabatch.attention.merge import dense_partial
from rabatch.attention.seam import AttentionCall
from rabatch.index.topk import topk


class PrefillCapture:
    """Computes the attention of a chunked prefill and keeps sampled queries: their top-k lists, and some vectors.

    A query of a question will attend the static set besides the index, so a sampled context query at position
    p ranks only keys that would be in the index for it: those from `sink_tokens` up to p - `window_tokens`.

    Args:
        context_tokens: Length of the whole context.
        index_range: Rows that the key index will hold, [start, stop); empty: no lists are kept.
        window_tokens: Recent tokens a sampled query ignores.
        query_share: Share of the queries that are sampled, evenly spaced.
        top_k: Keys kept per sampled query.
        sample_vectors: Sampled queries per KV head, at most, whose vectors are kept too.
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
        self.index_range = index_range
        self.window_tokens = window_tokens
        self.top_k = top_k
        self.sample_vectors = sample_vectors
        self.windows: dict[int, int] = {}
        self.chunk_start = 0
        start, stop = index_range
        first = min(start + window_tokens, context_tokens)
        count = round((context_tokens - first) * query_share) if stop > start else 0
        self.sampled = (
            torch.linspace(first, context_tokens - 1, count).round().long().unique()
            if count
            else torch.empty(0, dtype=torch.long)
        )
        # By layer, of every chunk: [n_kv, query heads of the group, sampled positions, top_k or head_dim].
        self._lists: dict[int, list[Tensor]] = {}
        self._vectors: dict[int, list[Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        self.windows[call.layer] = call.sliding_window
        if not call.sliding_window and len(self.sampled):
            self._keep_sample(call)
        return _causal_attention(call)

    def lists(self, layer: int, head_start: int, head_stop: int) -> Tensor:
        """Ranked keys of the sampled queries of all query heads of each KV head: int32 [heads, n_lists, top_k].

        Ids count from the start of the index; -1 pads. Ordered by (chunk, query head, position), as they were found.
        """
        chunks = self._lists.get(layer)
        if not chunks:
            return torch.empty((head_stop - head_start, 0, self.top_k), dtype=torch.int32)
        return torch.cat([chunk[head_start:head_stop].flatten(1, 2) for chunk in chunks], dim=1)

    def sample(self, layer: int, head_start: int, head_stop: int) -> tuple[Tensor, Tensor]:
        """The same lists in an order that no chunk changes, and the vectors behind the first of them.

        Queries whose vectors are kept come first, then the others, both ordered by (query head, position). Complete
        once the whole context was attended.

        Returns:
            lists: int32 [heads, n_lists, top_k].
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
        return torch.cat(parts, dim=1), queries.flatten(1, 2)

    def has_vector(self, group: int) -> Tensor:
        """Which sampled positions keep the vectors of their `group` query heads: bool [n_sampled], evenly spread."""
        n_sampled = len(self.sampled)
        count = min(self.sample_vectors // group, n_sampled)
        known = torch.zeros(n_sampled, dtype=torch.bool)
        if count:
            known[(2 * torch.arange(count) + 1) * n_sampled // (2 * count)] = True  # the middles of equal stretches
        return known

    def _keep_sample(self, call: AttentionCall) -> None:
        q_tokens = call.query.shape[2]
        in_chunk = (self.sampled >= self.chunk_start) & (self.sampled < self.chunk_start + q_tokens)
        chosen = self.sampled[in_chunk]
        if not len(chosen):
            return
        n_kv, n_keys = call.key.shape[1], call.key.shape[2]
        start, stop = self.index_range
        device = call.query.device
        queries = call.query[0].index_select(1, (chosen - self.chunk_start).to(device))
        ids, _ = topk(
            queries,
            call.key[0],
            (chosen - self.window_tokens).to(device),
            k=self.top_k,
            scaling=call.scaling,
            key_range=(min(start, n_keys), min(stop, n_keys)),
        )
        local = torch.where(ids >= 0, ids - start, ids).to("cpu", torch.int32)
        self._lists.setdefault(call.layer, []).append(local.unflatten(0, (n_kv, -1)))
        grouped = queries.unflatten(0, (n_kv, -1))
        known = self.has_vector(grouped.shape[1])[in_chunk].nonzero()[:, 0]
        self._vectors.setdefault(call.layer, []).append(grouped.index_select(2, known.to(device)).cpu())


class _Module(nn.Module):
    """What `sdpa_attention_forward` reads of a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def _causal_attention(call: AttentionCall) -> Tensor:
    groups = call.query.shape[1] // call.key.shape[1]
    if call.softcap is None:
        out, _ = sdpa_attention_forward(
            _Module(groups), call.query, call.key, call.value, call.mask, scaling=call.scaling
        )
        return out
    batch, heads, q_tokens, dim = call.query.shape
    kv_tokens = call.key.shape[2]
    mask = call.mask
    if mask is None:
        mask = torch.ones(q_tokens, kv_tokens, dtype=torch.bool, device=call.query.device).tril(kv_tokens - q_tokens)
        mask = mask[None, None]
    grouped = call.query.reshape(batch, heads // groups, groups * q_tokens, dim)
    partial = dense_partial(
        grouped,
        call.key,
        call.value,
        scaling=call.scaling,
        softcap=call.softcap,
        mask=mask.repeat(1, 1, groups, 1) if mask.shape[-2] > 1 else mask,
    )
    out = partial.out.reshape(batch, heads, q_tokens, -1).transpose(1, 2)
    return out.to(call.query.dtype)
