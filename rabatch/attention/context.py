"""The attention of questions over one stored context: static set, retrieved keys and tail, merged exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.gather import attend_found
from rabatch.attention.merge import Partial, dense_partial, logits, merge
from rabatch.attention.seam import AttentionCall
from rabatch.config import Recipe
from rabatch.index.base import KeyIndex


@dataclass(frozen=True)
class ContextLayer:
    """What one layer keeps of a context, on the model's device.

    Attributes:
        keys, values: [n_kv_heads, n_rows, head_dim] in the stored dtype.
        first_position: Position of row 0; greater than 0 only where a native window dropped older tokens.
        index_start, index_stop: Rows the key index holds; the others are the static set.
        index: The key index of all KV heads, or None (recipes dense and streaming, sliding layers).
    """

    keys: Tensor
    values: Tensor
    first_position: int
    index_start: int
    index_stop: int
    index: KeyIndex | None

    @cached_property
    def static_rows(self) -> Tensor:
        n_rows = self.keys.shape[1]
        device = self.keys.device
        return torch.cat(
            [torch.arange(0, self.index_start, device=device), torch.arange(self.index_stop, n_rows, device=device)]
        )

    @cached_property
    def static_set(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the static set in one piece and in float32: every step of every question reads them."""
        return self.keys[:, self.static_rows].float(), self.values[:, self.static_rows].float()


class QuestionAttention:
    """Attention of a batch of questions, left-padded, over one context; counts and observes what it attends.

    Args:
        layers: One per layer of the model.
        context_tokens: Length of the context.
        pads: Padding tokens before each question, int [batch].
        recipe: What generated and question tokens attend.
    """

    def __init__(
        self, layers: Sequence[ContextLayer], *, context_tokens: int, pads: Sequence[int], recipe: Recipe
    ) -> None:
        self.layers = layers
        self.context_tokens = context_tokens
        self.recipe = recipe
        self.pads = torch.tensor(list(pads), device=layers[0].keys.device)
        n = len(self.pads)
        self.alive = np.ones(n, dtype=bool)
        """Questions still being answered; the generation loop updates it, observation obeys it."""
        self.attended = np.zeros(n)
        self.queries = np.zeros(n)
        self.mass = np.zeros((n, context_tokens), dtype=np.float32)
        self._is_question: list[bool] = [True] * len(layers)

    @property
    def attended_share(self) -> np.ndarray:
        """Context keys attended / context keys, [batch]: mean over queries, query heads and full-attention layers."""
        return self.attended / np.maximum(self.queries, 1) / max(self.context_tokens, 1)

    needs_mask = True

    def attend(self, call: AttentionCall) -> Tensor:
        batch, heads, q_tokens, dim = call.query.shape
        n_kv = call.key.shape[1]
        grouped = call.query.reshape(batch, n_kv, heads // n_kv, q_tokens, dim)
        tail = self._tail(call, grouped)
        rows = grouped.transpose(0, 1).reshape(n_kv, -1, dim)  # [n_kv, batch * group * q_tokens, dim]
        is_question, self._is_question[call.layer] = self._is_question[call.layer], False
        layer = self.layers[call.layer]
        if call.sliding_window:
            parts = [self._sliding(call, layer, rows, q_tokens)]
        else:
            parts = self._context(call, layer, rows, q_tokens, tail, is_question)
        out = merge([tail, *parts]).out
        out = out.reshape(n_kv, batch, -1, q_tokens, dim).transpose(0, 1).reshape(batch, heads, q_tokens, dim)
        return out.transpose(1, 2).to(call.query.dtype)

    def _tail(self, call: AttentionCall, grouped: Tensor) -> Partial:
        """Question and generated tokens among themselves: [n_kv, batch * group * q_tokens, ...]."""
        batch, n_kv, group, q_tokens, dim = grouped.shape
        mask = call.mask
        if mask is None and q_tokens > 1:
            kv_tokens = call.key.shape[2]
            causal = torch.ones(q_tokens, kv_tokens, dtype=torch.bool, device=call.key.device)
            mask = causal.tril(kv_tokens - q_tokens)[None, None]
        partial = dense_partial(
            grouped.reshape(batch, n_kv, group * q_tokens, dim),
            call.key,
            call.value,
            scaling=call.scaling,
            softcap=call.softcap,
            mask=None if mask is None else mask.repeat(1, 1, group, 1),
        )
        return Partial(
            partial.out.transpose(0, 1).reshape(n_kv, -1, partial.out.shape[-1]),
            partial.lse.transpose(0, 1).reshape(n_kv, -1),
        )

    def _sliding(self, call: AttentionCall, layer: ContextLayer, rows: Tensor, q_tokens: int) -> Partial:
        """A natively sliding layer: the context keys within the window of each query, by true positions."""
        query_positions = self._positions(call, q_tokens)  # [batch * group * q_tokens]
        n_rows = layer.keys.shape[1]
        key_positions = layer.first_position + torch.arange(n_rows, device=layer.keys.device)
        mask = key_positions[None, None, :] > query_positions[None, :, None] - call.sliding_window
        return dense_partial(rows, layer.keys, layer.values, scaling=call.scaling, softcap=call.softcap, mask=mask)

    def _positions(self, call: AttentionCall, q_tokens: int) -> Tensor:
        tail_tokens = call.key.shape[2]
        slots = torch.arange(tail_tokens - q_tokens, tail_tokens, device=self.pads.device)
        positions = self.context_tokens + slots[None, :] - self.pads[:, None]  # [batch, q_tokens]
        group = call.query.shape[1] // call.key.shape[1]
        return positions[:, None, :].expand(-1, group, -1).reshape(-1)

    def _context(
        self, call: AttentionCall, layer: ContextLayer, rows: Tensor, q_tokens: int, tail: Partial, is_question: bool
    ) -> list[Partial]:
        method = self.recipe.method
        exact = method == "dense" or (
            method != "streaming" and is_question and self.recipe.question_attention == "exact"
        )
        kept = None if exact else layer.static_rows
        keys, values = (layer.keys, layer.values) if kept is None else layer.static_set
        parts = [dense_partial(rows, keys, values, scaling=call.scaling, softcap=call.softcap)]
        ids: Tensor | None = None
        scores: Tensor | None = None
        if not exact and layer.index is not None and layer.index.n_keys:
            found = layer.index.search(
                np.ascontiguousarray(rows.float().cpu().numpy()), k=min(self.recipe.top_k, layer.index.n_keys)
            )
            ids = torch.from_numpy(found.ids).to(rows.device, torch.int64)
            ids = torch.where(ids >= 0, ids + layer.index_start, ids)
            scores = torch.from_numpy(found.scores).to(rows.device)
            parts.append(attend_found(scores, ids, layer.values, scaling=call.scaling, softcap=call.softcap))
        self._count(rows.shape[1], q_tokens, keys.shape[1], ids)
        self._observe(call, rows, q_tokens, keys, kept, ids, scores, merge([tail, *parts]).lse)
        return parts

    def _count(self, n_rows: int, q_tokens: int, n_static: int, ids: Tensor | None) -> None:
        """Adds the attended keys of every query that is not padding, averaged over the query heads."""
        batch = len(self.pads)
        attended = torch.full((1, n_rows), float(n_static))
        if ids is not None:
            attended = n_static + (ids >= 0).sum(-1).float().cpu()
        per_query = attended.reshape(attended.shape[0], batch, -1, q_tokens).mean(dim=(0, 2)).numpy()
        first_real = self.pads.cpu().numpy() if q_tokens > 1 else np.zeros(batch, dtype=np.int64)
        real = np.arange(q_tokens)[None, :] >= first_real[:, None]
        real &= self.alive[:, None]
        self.attended += (per_query * real).sum(1)
        self.queries += real.sum(1)

    def _observe(
        self,
        call: AttentionCall,
        rows: Tensor,
        q_tokens: int,
        keys: Tensor,
        kept: Tensor | None,
        ids: Tensor | None,
        scores: Tensor | None,
        lse: Tensor,
    ) -> None:
        """Adds where the attention of each question's last token went: it is the one that answers."""
        batch, n_kv = len(self.pads), rows.shape[0]

        def last(x: Tensor) -> Tensor:
            return x.reshape(n_kv, batch, -1, q_tokens, *x.shape[2:])[:, :, :, -1]

        own = last(rows).float()  # [n_kv, batch, group, dim]
        own_lse = last(lse).unsqueeze(-1)
        weights = torch.einsum("hbgd,hnd->hbgn", own, keys.float())
        weights = torch.exp(logits(weights, call.scaling, call.softcap) - own_lse).sum(dim=(0, 2))  # [batch, n]
        mass = torch.zeros((batch, self.context_tokens), device=rows.device)
        if kept is None:
            mass += weights
        else:
            mass[:, kept] += weights
        if ids is not None and scores is not None:
            picked, raw = last(ids), last(scores)
            found = torch.exp(logits(raw, call.scaling, call.softcap) - own_lse).masked_fill(picked < 0, 0.0)
            flat_ids = picked.clamp_min(0).permute(1, 0, 2, 3).reshape(batch, -1)
            mass.scatter_add_(1, flat_ids, found.permute(1, 0, 2, 3).reshape(batch, -1))
        self.mass += mass.cpu().numpy() * self.alive[:, None]
