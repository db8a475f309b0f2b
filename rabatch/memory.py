"""The memory that opened indexes take: their layers under a budget in bytes, least recently used out."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Generic, TypeVar

import numpy as np
import torch

from rabatch.errors import ConfigError

UNLIMITED = 1 << 62
_GUESS = 4.0
"""Bytes in memory per stored byte before anything of a kind was loaded. Measured: 2 with a graph, 1 without an index,
up to 5 where a short document is all static set."""

T = TypeVar("T")


def bytes_of(value: object) -> int:
    """Bytes of all tensors and arrays that an object holds, however deep; memory that several share counts once."""
    return sum(dict(_pieces(value, set())).values())


def _pieces(value: object, seen: set[int]) -> Iterator[tuple[int, int]]:
    """Address and bytes of each piece of memory."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):  # a view keeps the whole of what it looks at
            value = value.base
        yield value.ctypes.data, value.nbytes
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _pieces(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _pieces(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType):
        yield from _pieces(vars(value), seen)


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an index, and what is known of its size before it is loaded.

    Args:
        owner: Identity of the index: of its bytes and of how they are opened. Never two indexes with one identity.
        stored_bytes: Of its parts. While they are read they lie in memory beside what becomes of them.
        kind: Layers of one kind take alike much memory per stored byte.
    """

    owner: str
    number: int
    stored_bytes: int
    kind: Hashable = None


class LayerPool(Generic[T]):
    """Layers of opened indexes up to a budget in bytes. Its methods may be called by several threads.

    Layers of an owner in use are never let go; of the others the least recently used go first. What is let go is freed
    once nobody refers to it.

    Args:
        budget_bytes: Of all layers held, of those being loaded with the bytes they are read from, and of claims.

    Attributes:
        peak_bytes: The most that was held, being loaded and claimed at any time.

    Raises:
        ConfigError: The budget is no whole number >= 1.
    """

    def __init__(self, budget_bytes: int = UNLIMITED) -> None:
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 1:
            raise ConfigError("memory_bytes", budget_bytes, "must be a whole number of bytes >= 1")
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0
        self._held: OrderedDict[tuple[str, int], tuple[T, int]] = OrderedDict()  # the least recently used first
        self._loading: dict[tuple[str, int], int] = {}
        self._claimed = 0
        self._users: Counter[str] = Counter()
        self._ratios: dict[Hashable, float] = {}
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """What counts against the budget now."""
        with self._changed:
            return self._taken()

    def holds(self, layer: StoredLayer) -> bool:
        """Whether the layer is in memory."""
        with self._changed:
            return (layer.owner, layer.number) in self._held

    def enter(self, owner: str) -> None:
        """An owner's layers are in use from now on, until `leave` is called as often."""
        with self._changed:
            self._users[owner] += 1

    def leave(self, owner: str) -> None:
        """They may be let go again, as far as this user is concerned."""
        with self._changed:
            self._users[owner] -= 1
            self._users += Counter()  # drops zeros

    def expected_bytes(self, layer: StoredLayer) -> int:
        """Bytes that the layer takes: known if it is held, else judged by the largest of its kind so far."""
        with self._changed:
            held = self._held.get((layer.owner, layer.number))
            if held is not None:
                return held[1]
            return round(layer.stored_bytes * self._ratios.get(layer.kind, _GUESS))

    def available_bytes(self, owner: str) -> int:
        """The budget less what others have in use: what an owner could come to hold."""
        with self._changed:
            in_use = sum(size for (other, _), (_, size) in self._held.items() if other != owner and self._users[other])
            in_use += sum(size for (other, _), size in self._loading.items() if other != owner)
            return max(0, self.budget_bytes - self._claimed - in_use)

    def fetch(self, layer: StoredLayer, load: Callable[[], T], *, must: bool = False) -> T | None:
        """The layer: held, loaded by another thread at this moment, or loaded now.

        Args:
            load: Reads it; what it raises is raised here, and the layer is not held.
            must: Load it though the budget is full of what is in use. Else None is returned, and nothing let go.
        """
        key = (layer.owner, layer.number)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._loading)
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            needed = self.expected_bytes(layer) + layer.stored_bytes
            if not self._make_room(needed, layer.owner) and not must:
                return None
            self._loading[key] = needed
        try:
            loaded = load()
            size = bytes_of(loaded)
        except BaseException:
            with self._changed:
                del self._loading[key]
                self._changed.notify_all()
            raise
        with self._changed:
            del self._loading[key]
            self._held[key] = (loaded, size)
            self._note_peak(layer.stored_bytes)
            self.learn(layer, size)
            self._make_room(0, layer.owner)  # it may have come out larger than expected
            self._changed.notify_all()
        return loaded

    def learn(self, layer: StoredLayer, size: int) -> None:
        """Note what a layer of a kind takes in memory."""
        with self._changed:
            if layer.stored_bytes:
                self._ratios[layer.kind] = max(self._ratios.get(layer.kind, 0.0), size / layer.stored_bytes)

    def drop(self, layer: StoredLayer) -> None:
        """Let a layer go, whoever uses it."""
        with self._changed:
            self._held.pop((layer.owner, layer.number), None)

    def claim(self, nbytes: int) -> None:
        """Set bytes aside for what is held elsewhere; a negative number gives them back."""
        with self._changed:
            self._claimed += nbytes
            self._make_room(0, None)
            self._note_peak()

    def _taken(self) -> int:
        return sum(size for _, size in self._held.values()) + sum(self._loading.values()) + self._claimed

    def _note_peak(self, just_read: int = 0) -> None:
        self.peak_bytes = max(self.peak_bytes, self._taken() + just_read)

    def _make_room(self, needed: int, owner: str | None) -> bool:
        """Let go, least recently used first, as much as is needed, if there is enough that nobody uses.

        Layers of `owner` itself stay: who walks over more layers than fit would always drop the one wanted next.
        """
        missing = self._taken() + needed - self.budget_bytes
        if missing <= 0:
            return True
        idle = [key for key in self._held if key[0] != owner and not self._users[key[0]]]
        enough = sum(self._held[key][1] for key in idle) >= missing
        if not enough and needed:
            return False
        for key in idle:
            if missing <= 0:
                break
            missing -= self._held.pop(key)[1]
        return enough
