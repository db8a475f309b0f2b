"""The two caches rabatch hands to transformers: one filled by prefill, one that holds only a question's tail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


class _ContextLayer(CacheLayerMixin):
    """Keys and values of a context whose length is known: written in place, so chunks cost no copies."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.n_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, dim = states.shape
            setattr(self, name, states.new_empty(batch, heads, self.capacity_tokens, dim))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.n_tokens + key_states.shape[-2]
        self.keys[:, :, self.n_tokens : stop] = key_states
        self.values[:, :, self.n_tokens : stop] = value_states
        self.n_tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_max_length(self) -> int:
        return self.capacity_tokens


class ContextCache(Cache):
    """Cache of a prefill: every layer keeps all tokens, also natively sliding ones (their mask restricts them)."""

    def __init__(self, n_layers: int, capacity_tokens: int) -> None:
        self._contexts = [_ContextLayer(capacity_tokens) for _ in range(n_layers)]
        super().__init__(layers=list(self._contexts))

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [n_kv_heads, capacity_tokens, head_dim]."""
        return self._contexts[layer].keys[0], self._contexts[layer].values[0]


class _TailLayer(DynamicLayer):
    """Keys and values of the tail; claims the length of context + tail, so that positions come out right."""

    def __init__(self, context_tokens: int) -> None:
        super().__init__()
        self.context_tokens = context_tokens

    @property
    def tail_tokens(self) -> int:
        return self.keys.shape[-2] if isinstance(self.keys, torch.Tensor) and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        return self.context_tokens + self.tail_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tail_tokens + query_length, self.context_tokens


class TailCache(Cache):
    """Cache of questions over one stored context: holds only what comes after the context."""

    def __init__(self, n_layers: int, context_tokens: int) -> None:
        super().__init__(layers=[_TailLayer(context_tokens) for _ in range(n_layers)])
