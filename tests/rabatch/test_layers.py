"""An index that does not fit: which layers stay, which are read when, and what is in memory meanwhile. No model."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rabatch.errors import IntegrityError
from rabatch.layers import Layers
from rabatch.memory import LayerPool, StoredLayer

LIMIT_S = 60
SIZE, STORED = 1000, 600


class Loaded:
    """Stands for a layer in memory."""

    def __init__(self, number: int, nbytes: int = SIZE) -> None:
        self.number = number
        self.array = np.zeros(nbytes, np.uint8)


class Source:
    """Loads layers and notes it. `held[number]`, if set, is waited for before that layer is there."""

    def __init__(self, n: int, owner: str = "a") -> None:
        self.stored = [StoredLayer(owner, number, STORED) for number in range(n)]
        self.loads: Counter[int] = Counter()
        self.threads: dict[int, str] = {}
        self.begun = [threading.Event() for _ in range(n)]
        self.held: dict[int, threading.Event] = {}
        self.broken: set[int] = set()
        self.alive: weakref.WeakSet[Loaded] = weakref.WeakSet()
        self.peak_bytes = 0

    def load(self, number: int) -> Any:
        self.loads[number] += 1
        self.threads[number] = threading.current_thread().name
        self.begun[number].set()
        if number in self.held:
            assert self.held[number].wait(LIMIT_S)
        if number in self.broken:
            raise IntegrityError(f"part {number}", None, "is missing")
        layer = Loaded(number)
        self.alive.add(layer)
        self.peak_bytes = max(self.peak_bytes, STORED + sum(other.array.nbytes for other in list(self.alive)))
        return layer


def opened(source: Source, pool: LayerPool) -> Layers:
    layers = Layers(pool, source.stored, source.load)
    layers.load()
    return layers


def walk(layers: Layers, passes: int) -> Iterator[Any]:
    for _ in range(passes):
        for number in range(len(layers)):
            held: Any = layers
            assert held[number].number == number  # not kept: what is referred to is not freed
            yield number


@pytest.mark.parametrize("room", [None, 10 * SIZE + STORED])
def test_what_fits_is_loaded_once_and_at_once(room: int | None) -> None:
    source = Source(10)
    layers = opened(source, LayerPool() if room is None else LayerPool(room))
    assert source.loads == Counter(range(10))
    list(walk(layers, 3))
    assert source.loads == Counter(range(10))
    assert layers.streamed_share == 0
    assert set(source.threads.values()) == {"MainThread"}


@pytest.mark.parametrize("kept", [0, 1, 4, 7])
def test_what_does_not_fit_is_read_once_a_pass_and_the_rest_once(kept: int) -> None:
    source = Source(10)
    budget = (kept + 2) * SIZE + STORED
    pool: LayerPool = LayerPool(budget)
    layers = opened(source, pool)
    first = source.loads.copy()
    assert len(first) == max(kept, 1)  # what stays is loaded at once
    for _ in walk(layers, 4):
        assert pool.held_bytes <= budget
    layers.close()
    assert sorted(source.loads.values(), reverse=True)[: 10 - kept] != [1] * (10 - kept)
    assert Counter(source.loads.values())[1] == kept
    streamed = [count for count in source.loads.values() if count > 1]
    assert all(4 <= count <= 5 for count in streamed)  # once a pass, and the first of them ahead of a fifth
    assert sum(streamed) <= 4 * (10 - kept) + 1
    assert layers.streamed_share == pytest.approx(1 - kept / 10)
    assert pool.peak_bytes <= budget
    assert source.peak_bytes <= budget


def test_with_less_than_two_layers_one_is_held_at_a_time() -> None:
    for budget in (1, SIZE, SIZE + STORED, 2 * SIZE):
        source = Source(5)
        layers = opened(source, LayerPool(budget))
        list(walk(layers, 3))
        layers.close()
        assert source.peak_bytes <= SIZE + STORED
        assert source.loads == Counter(dict.fromkeys(range(5), 3))  # the first one was kept from the opening


def test_the_next_layer_is_read_while_one_is_in_use() -> None:
    """Not before, for there is no room; not when it is asked for, for then the pass would wait."""
    source = Source(6)
    layers = opened(source, LayerPool(2 * SIZE + STORED))
    for number in range(6):
        source.held[number] = threading.Event()
    assert layers[0] is not None
    assert source.begun[1].wait(LIMIT_S)  # layer 0 is in use
    assert not source.begun[2].is_set()
    source.held[1].set()
    assert layers[1] is not None
    assert source.begun[2].wait(LIMIT_S)
    assert source.threads[1].startswith("rabatch-layers")
    assert not source.begun[3].is_set()
    for event in source.held.values():
        event.set()
    layers.close()


def test_the_first_layer_of_the_next_pass_is_read_ahead() -> None:
    source = Source(4)
    layers = opened(source, LayerPool(2 * SIZE + STORED))
    source.begun[0].clear()
    list(walk(layers, 1))
    assert source.begun[0].wait(LIMIT_S)
    layers.close()
    assert source.loads[0] == 2


def test_a_walk_that_is_broken_off_begins_anew() -> None:
    """A pass that fails in the middle is followed by one that begins at the first layer."""
    source = Source(8)
    layers = opened(source, LayerPool(2 * SIZE + STORED))
    for stop in (3, 5, 0, 7):
        for number, _ in zip(walk(layers, 1), range(stop + 1), strict=False):
            assert number <= 7
    list(walk(layers, 2))
    layers.close()
    assert source.peak_bytes <= 2 * SIZE + STORED


@pytest.mark.parametrize("how", ["another layer is asked for", "the index is closed"])
def test_what_is_being_read_is_waited_for(how: str) -> None:
    """Else it would come on top of what is read next, or of what others take then."""
    source = Source(6)
    layers = opened(source, LayerPool(2 * SIZE + STORED))
    source.held[2] = threading.Event()
    list(zip(range(2), walk(layers, 1), strict=False))
    assert source.begun[2].wait(LIMIT_S)
    source.begun[5].clear()
    done = threading.Event()

    def go_on() -> None:
        if how == "the index is closed":
            layers.close()
        else:
            assert layers[5] is not None
        done.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert not done.wait(0.3)
    assert not source.begun[5].is_set()
    source.held[2].set()
    assert done.wait(LIMIT_S)
    thread.join()
    layers.close()
    assert source.peak_bytes <= 2 * SIZE + STORED


def test_an_error_is_raised_where_the_layer_is_asked_for() -> None:
    source = Source(6)
    layers = opened(source, LayerPool(2 * SIZE + STORED))
    list(walk(layers, 1))
    source.broken.add(3)
    seen = []
    with pytest.raises(IntegrityError, match="part 3"):
        seen += [number for number in walk(layers, 1) if seen.append(number) is None]
    assert seen == [0, 1, 2]
    source.broken.clear()
    list(walk(layers, 1))  # mended, it goes on
    layers.close()


def test_what_stays_may_fail_too() -> None:
    source = Source(3)
    source.broken.add(2)
    pool: LayerPool = LayerPool()
    layers = Layers(pool, source.stored, source.load)
    with pytest.raises(IntegrityError, match="part 2"):
        layers.load()
    layers.close()
    layers.close()
    fill = StoredLayer("b", 0, STORED)
    assert pool.fetch(fill, lambda: Loaded(0)) is not None


def test_closing_gives_the_memory_to_others() -> None:
    pool: LayerPool = LayerPool(2 * SIZE + STORED)
    first, second = Source(6, "a"), Source(6, "b")
    layers = opened(first, pool)
    list(walk(layers, 1))
    layers.close()
    assert pool.held_bytes <= SIZE
    after = opened(second, pool)
    list(walk(after, 2))
    after.close()
    assert pool.peak_bytes <= 2 * SIZE + STORED
    assert not first.alive


def test_two_in_use_share_the_budget() -> None:
    pool: LayerPool = LayerPool(9 * SIZE + STORED)
    first, second = Source(6, "a"), Source(6, "b")
    one = opened(first, pool)
    other = opened(second, pool)
    assert one.streamed_share == 0
    assert other.streamed_share > 0.5
    for _ in zip(walk(one, 2), walk(other, 2), strict=True):
        assert pool.held_bytes <= 9 * SIZE + STORED
    assert set(first.loads.values()) == {1}
    other.close()
    one.close()


def test_ahead_of_its_turn_only_what_is_free_is_taken() -> None:
    """The next index is fetched beside the one in use, as far as it fits; the rest when its turn has come."""
    pool: LayerPool = LayerPool(10 * SIZE + STORED)
    first, second, third = Source(6, "a"), Source(6, "b"), Source(6, "c")
    idle = opened(third, pool)
    idle.close()
    using = opened(first, pool)
    coming = Layers(pool, second.stored, second.load)
    coming.fetch()
    assert second.loads == Counter(range(4))
    assert not third.alive  # what nobody uses goes first
    list(walk(using, 2))
    assert first.loads == Counter(range(6))
    using.close()
    coming.load()
    assert second.loads == Counter(range(6))
    assert coming.streamed_share == 0
    assert len(first.alive) == 4  # the rest stays until somebody needs it
    coming.close()
    assert pool.peak_bytes <= 10 * SIZE + STORED


def test_of_an_index_larger_than_the_budget_only_what_will_stay_is_fetched() -> None:
    pool: LayerPool = LayerPool(6 * SIZE + STORED)
    source = Source(10)
    pool.learn(source.stored[0], SIZE)
    coming = Layers(pool, source.stored, source.load)
    coming.fetch()
    fetched = source.loads.copy()
    assert len(fetched) == 4
    coming.load()
    assert source.loads == fetched
    coming.close()


def test_beside_an_index_larger_than_the_budget_nothing_is_fetched() -> None:
    pool: LayerPool = LayerPool(4 * SIZE + STORED)
    first, second = Source(6, "a"), Source(6, "b")
    using = opened(first, pool)
    coming = Layers(pool, second.stored, second.load)
    coming.fetch()
    assert not second.loads
    list(walk(using, 2))
    using.close()
    coming.load()
    list(walk(coming, 1))
    coming.close()
    assert pool.peak_bytes <= 4 * SIZE + STORED
    assert first.peak_bytes <= 4 * SIZE + STORED


def test_layers_are_a_sequence() -> None:
    layers: Any = opened(Source(5), LayerPool(3 * SIZE + STORED))
    assert len(layers) == 5
    assert [layer.number for layer in layers] == [0, 1, 2, 3, 4]
    assert [layer.number for layer in layers[1:3]] == [1, 2]
    assert layers[-1].number == 4
    with pytest.raises(IndexError):
        layers[5]
    layers.close()
