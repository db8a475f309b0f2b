"""The layers of one opened index: in memory as far as a budget allows, the others read anew for every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import overload

from rabatch.attention.layer import ContextLayer
from rabatch.memory import LayerPool, StoredLayer, bytes_of

_ROUNDS = 3  # of planning: what is loaded tells the size of the rest


@dataclass(frozen=True)
class Plan:
    """Which layers stay.

    Attributes:
        kept: Their numbers.
        room_bytes: Set aside for the others: for the one in use, and the next one while it is read.
        ahead: Whether there is room to read the next one while one is in use.
    """

    kept: frozenset[int]
    room_bytes: int
    ahead: bool


def plan(sizes: Sequence[int], reading: Sequence[int], available_bytes: int) -> Plan:
    """Which layers of an index to keep, if it is walked over from first to last again and again.

    With the least recently used one out, each layer would be gone when its turn comes. So some stay for good, spread
    evenly: while they are computed with, the next of the others is being read.

    Args:
        sizes: Bytes of each layer in memory.
        reading: Bytes more while it is loaded; 0 if it is in memory.
        available_bytes: For all of it. With less than one layer takes nothing is kept, and that layer is held anyway.
    """
    total, most_read = sum(sizes), max(reading, default=0)
    if total + most_read <= available_bytes:
        return Plan(frozenset(range(len(sizes))), 0, False)
    largest = max(sizes)
    ahead = 2 * largest + most_read <= available_bytes
    room = (2 if ahead else 1) * largest + most_read
    share = max(0, available_bytes - room)
    kept: set[int] = set()
    kept_bytes = passed = 0
    for number, size in enumerate(sizes):
        if kept_bytes * total <= share * passed and kept_bytes + size <= share:
            kept.add(number)
            kept_bytes += size
        passed += size
    return Plan(frozenset(kept), room, ahead)


class Layers(Sequence[ContextLayer]):
    """The layers of an index, loaded as the pool has room for them. For one thread at a time.

    Its layers are in use, and stay in the pool, until `close`.

    Args:
        stored: One per layer.
        load: Reads a layer by its number. Its errors are raised where the layer is asked for.

    Attributes:
        streamed_share: Share of the bytes that every pass reads anew. Known after `load`.
    """

    def __init__(
        self, pool: LayerPool[ContextLayer], stored: Sequence[StoredLayer], load: Callable[[int], ContextLayer]
    ) -> None:
        self.streamed_share = 0.0
        self._pool, self._stored, self._load = pool, tuple(stored), load
        self._plan = Plan(frozenset(range(len(stored))), 0, False)
        self._current: tuple[int, ContextLayer] | None = None
        self._coming: tuple[int, Future[ContextLayer]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._claimed_bytes = 0
        self._closed = False
        pool.enter(self._owner)

    @property
    def _owner(self) -> str:
        return self._stored[0].owner

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, number: int) -> ContextLayer: ...
    @overload
    def __getitem__(self, number: slice) -> list[ContextLayer]: ...
    def __getitem__(self, number: int | slice) -> ContextLayer | list[ContextLayer]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if number in self._plan.kept:
            layer = self._pool.fetch(self._stored[number], lambda: self._load(number), must=True)
            assert layer is not None
            return layer
        if self._current is None or self._current[0] != number:
            self._current = (number, self._stream(number))
        self._look_ahead(number)
        return self._current[1]

    def fetch(self) -> None:
        """Load what fits beside the layers that others use, ahead of `load`."""
        for number in sorted(self._planned(self._pool.budget_bytes).kept):
            if self._fetch(number) is None:
                return

    def load(self) -> None:
        """Load what is to stay, and set room aside for the rest. To be called before the first pass."""
        self._claim(0)
        first = self._fetch(0, must=True)  # its size tells that of the others
        assert first is not None
        for _ in range(_ROUNDS):
            before, self._plan = self._plan, self._planned(self._pool.available_bytes(self._owner))
            for number, layer in enumerate(self._stored):
                if number not in self._plan.kept:
                    self._pool.drop(layer)
                elif not self._pool.holds(layer):
                    self._fetch(number)
            if self._plan.kept == before.kept:
                break
        self._claim(self._plan.room_bytes)
        self._current = None if 0 in self._plan.kept else (0, first)
        sizes = [self._pool.expected_bytes(layer) for layer in self._stored]
        streamed = sum(size for number, size in enumerate(sizes) if number not in self._plan.kept)
        self.streamed_share = streamed / max(1, sum(sizes))

    def close(self) -> None:
        """Wait for what is being read, and let others have the memory."""
        if self._closed:
            return
        self._closed = True
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._current = self._coming = None
        self._claim(0)
        self._pool.leave(self._owner)

    def _claim(self, nbytes: int) -> None:
        self._pool.claim(nbytes - self._claimed_bytes)
        self._claimed_bytes = nbytes

    def _planned(self, available_bytes: int) -> Plan:
        sizes = [self._pool.expected_bytes(layer) for layer in self._stored]
        reading = [0 if self._pool.holds(layer) else layer.stored_bytes for layer in self._stored]
        return plan(sizes, reading, available_bytes)

    def _fetch(self, number: int, *, must: bool = False) -> ContextLayer | None:
        return self._pool.fetch(self._stored[number], lambda: self._load(number), must=must)

    def _stream(self, number: int) -> ContextLayer:
        """A layer that does not stay: the one being read if it is that one, else read now."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == number:
            return coming[1].result()
        if coming is not None:  # of a walk that was broken off
            wait([coming[1]])
        del coming
        self._current = None
        return self._read(number)

    def _look_ahead(self, number: int) -> None:
        """Begin to read the layer that will be asked for next of those that do not stay."""
        if not self._plan.ahead or self._coming is not None:
            return
        others = [(number + step) % len(self) for step in range(1, len(self))]
        coming = next((other for other in others if other not in self._plan.kept), None)
        if coming is not None:
            self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="rabatch-layers")
            self._coming = (coming, self._reader.submit(self._read, coming))

    def _read(self, number: int) -> ContextLayer:
        layer = self._load(number)
        self._pool.learn(self._stored[number], bytes_of(layer))
        return layer
