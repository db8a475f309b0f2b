"""What the attention of each question saw: counts and evidence, by the slot that the question is in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """What the attention of one question saw.

    Attributes:
        mass: [context_tokens], float32: where the attention of its answering tokens went, summed over heads and tokens.
        attended_share: Context keys attended / context keys, mean over tokens, query heads and full-attention layers.
        mass_share: Softmax mass held by the keys attended, mean likewise; of the mass of the others the estimate by
            zones counts, and what streaming heads do not keep has none. None: nothing was estimated, so it is not
            known, or no layer has full attention.
    """

    mass: np.ndarray
    attended_share: float
    mass_share: float | None


class SeenBySlot:
    """`Seen` of the questions under way, as it grows.

    Attributes:
        mass: [slots, context_tokens], float32; to be added to.
        queries: [slots]: tokens times full-attention layers so far.
        known: [slots]: whether the mass of what is not attended was estimated wherever there is some.
    """

    def __init__(self, slots: int, context_tokens: int) -> None:
        self.context_tokens = context_tokens
        self.mass = np.zeros((slots, context_tokens), dtype=np.float32)
        self.queries = np.zeros(slots)
        self.known = np.ones(slots, bool)
        self._keys, self._share = np.zeros(slots), np.zeros(slots)

    def count(self, slots: slice, keys: np.ndarray, share: np.ndarray, weight: float) -> None:
        """Context keys attended and softmax mass held by each question of a pass, summed over its tokens.

        Args:
            weight: Share of the layer's heads that they are the means of.
        """
        self._keys[slots] += weight * keys
        self._share[slots] += weight * share

    def clear(self, slot: int) -> None:
        """Forget what a slot held."""
        for kept in (self.mass, self.queries, self._keys, self._share):
            kept[slot] = 0
        self.known[slot] = True

    def move(self, source: int, target: int) -> None:
        """Give what one slot holds to another."""
        for kept in (self.mass, self.queries, self.known, self._keys, self._share):
            kept[target] = kept[source]

    def of(self, slot: int) -> Seen:
        """What the question of a slot has seen so far."""
        queries = max(self.queries[slot], 1)
        return Seen(
            self.mass[slot].copy(),
            float(self._keys[slot] / queries / max(self.context_tokens, 1)),
            float(self._share[slot] / queries) if self.known[slot] and self.queries[slot] else None,
        )
