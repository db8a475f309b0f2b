"""Calls of one actor that run beside each other: one works, the next prepares itself meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A queue of calls in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[Turn] = []

    @contextmanager
    def queue(self) -> Iterator[Turn]:
        """A place at the end, left again with the block."""
        turn = Turn(self._changed, self._queue)
        with self._changed:
            self._queue.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._queue.remove(turn)
                self._changed.notify_all()


class Turn:
    """One call's place in the queue."""

    def __init__(self, changed: threading.Condition, queue: list[Turn]) -> None:
        self._changed, self._queue = changed, queue
        self._settled = False

    def wait_to_prepare(self) -> None:
        """Until all calls before this one have what they need, or are over."""
        with self._changed:
            self._changed.wait_for(lambda: all(turn._settled for turn in self._queue[: self._queue.index(self)]))

    def wait(self) -> None:
        """Until all calls before this one are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue[0] is self)

    def settle(self) -> None:
        """This call has what it needs: the next one may prepare itself."""
        with self._changed:
            self._settled = True
            self._changed.notify_all()
