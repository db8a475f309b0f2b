"""What follows a context: keys and values of questions under way, each in a slot, and the cache transformers sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_LEAST = 64  # tokens of room that a slot has at first


class Tails:
    """Keys and values of question and generated tokens; slot `i` holds `lengths[i]` of them, from place 0 on.

    A pass appends to a range of slots, of each slot as many tokens as it has, padded on the right to the longest; what
    padding leaves behind a slot's tokens is overwritten by the next pass and never seen.
    """

    def __init__(self, n_layers: int, slots: int, device: torch.device) -> None:
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._states: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self._range = range(0)
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._places = torch.zeros((0, 0), dtype=torch.int64)
        self._longest = 0

    def begin(self, first: int, counts: list[int]) -> Tensor:
        """Begin a pass over the slots first .. first + len(counts) - 1 with so many new tokens each.

        Returns:
            int64 [rows, most]: where the new tokens stand in the tail; past a row's count, padding.
        """
        device = self.lengths.device
        self._range = range(first, first + len(counts))
        self._counts = torch.tensor(counts, device=device)
        steps = torch.arange(max(counts), device=device)
        self._places = self.lengths[first : first + len(counts), None] + steps
        self._longest = int(self._places.max()) + 1
        return self._places

    @property
    def places(self) -> Tensor:
        """What `begin` returned."""
        return self._places

    @property
    def counts(self) -> Tensor:
        """New tokens of each row of the pass, int64 [rows]."""
        return self._counts

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Enter the new tokens' [rows, n_kv, tokens, dim]; the tails of the pass so far, [rows, n_kv, longest, dim]."""
        held = self._states[layer]
        if not held:
            held += [self._room(new, _LEAST) for new in (keys, values)]
        if held[0].shape[2] < self._longest:
            for number, old in enumerate(held):
                held[number] = self._room((keys, values)[number], max(self._longest, 2 * old.shape[2]))
                held[number][:, :, : old.shape[2]] = old
        slots = torch.arange(self._range.start, self._range.stop, device=keys.device)[:, None]
        for states, new in zip(held, (keys, values), strict=True):
            states[slots, :, self._places] = new.transpose(1, 2)
        return self.of(layer)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in the slots of the pass, what was appended last included."""
        keys, values = self._states[layer]
        mine = slice(self._range.start, self._range.stop)
        return keys[mine, :, : self._longest], values[mine, :, : self._longest]

    def keys(self, layer: int, slot: int, places: slice) -> Tensor | None:
        """Keys of a slot at some places of its tail, [n_kv, n, dim]; None: the layer keeps none."""
        held = self._states[layer]
        return held[0][slot, :, places] if held else None

    def _room(self, like: Tensor, tokens: int) -> Tensor:
        return like.new_zeros((len(self.lengths), like.shape[1], tokens, like.shape[3]))

    def finish(self) -> None:
        """End the pass: its tokens count."""
        self.lengths[self._range.start : self._range.stop] += self._counts

    def clear(self, slot: int) -> None:
        """Make a slot ready for another question."""
        self.lengths[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Put what slot `source` holds into slot `target`."""
        n = int(self.lengths[source])
        for held in self._states:
            for states in held:
                states[target, :, :n] = states[source, :, :n]
        self.lengths[target] = n


class _Passing(CacheLayerMixin):
    """Hands new keys and values through: whoever attends keeps them."""

    is_sliding = False

    def __init__(self, context_tokens: int) -> None:
        super().__init__()
        self.context_tokens = context_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.context_tokens

    def get_seq_length(self) -> int:
        return self.context_tokens

    def get_max_length(self) -> int:
        return -1


class PassingCache(Cache):
    """The cache of passes whose positions are given and whose attention keeps its own keys and values (`Tails`)."""

    def __init__(self, n_layers: int, context_tokens: int) -> None:
        super().__init__(layers=[_Passing(context_tokens) for _ in range(n_layers)])
