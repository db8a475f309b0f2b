"""The cache a prefill fills, and what of it is brought to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rabatch.attention.outbox import Outbox


class _ContextLayer(CacheLayerMixin):
    """Keys and values of a prefill whose length is known: written in place, so chunks cost no copies.

    Where the device is not the host they are also sent there, in the stored dtype, while the device computes on.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity_tokens: int, outbox: Outbox, stored_dtype: torch.dtype) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.n_tokens = 0
        self.host: tuple[Tensor, Tensor] | None = None
        self._outbox = outbox
        self._stored_dtype = stored_dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rooms = []
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, dim = states.shape
            setattr(self, name, states.new_empty(batch, heads, self.capacity_tokens, dim))
            if self._outbox.copies:
                rooms.append(self._outbox.room((heads, self.capacity_tokens, dim), self._stored_dtype))
        self.host = (rooms[0], rooms[1]) if rooms else None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.n_tokens + key_states.shape[-2]
        self.keys[:, :, self.n_tokens : stop] = key_states
        self.values[:, :, self.n_tokens : stop] = value_states
        for room, states in zip(self.host or (), (key_states, value_states), strict=False):
            for head, rows in enumerate(states[0].to(self._stored_dtype)):
                self._outbox.send(rows, room[head, self.n_tokens : stop])  # contiguous, so it does not wait
        self.n_tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_max_length(self) -> int:
        return self.capacity_tokens


class ContextCache(Cache):
    """Cache of a prefill: every layer keeps all tokens, also natively sliding ones (attention restricts them)."""

    def __init__(self, n_layers: int, capacity_tokens: int, outbox: Outbox, stored_dtype: torch.dtype) -> None:
        self._contexts = [_ContextLayer(capacity_tokens, outbox, stored_dtype) for _ in range(n_layers)]
        self._outbox = outbox
        self._stored_dtype = stored_dtype
        super().__init__(layers=list(self._contexts))

    def states(
        self, layer: int, start: int = 0, stop: int | None = None, *, heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's heads on the host, in the stored dtype, each [heads, stop - start, head_dim]."""
        held = self._contexts[layer]
        self._outbox.wait()
        keys, values = held.host or (held.keys[0], held.values[0])
        return keys[heads, start:stop].to(self._stored_dtype), values[heads, start:stop].to(self._stored_dtype)

    def leave_device(self) -> None:
        """Wait for what was sent, then give the device's memory back, where the host has a copy."""
        self._outbox.wait()
        for held in self._contexts:
            if held.host is not None:
                held.keys = held.values = torch.empty(0)
