"""The pool of layers: bytes, order, threads. No model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rabatch import cli_arguments
from rabatch.available import automatic_budget, available_bytes
from rabatch.config import Resources
from rabatch.errors import ConfigError
from rabatch.layers import plan
from rabatch.memory import LayerPool, StoredLayer, bytes_of

LIMIT_S = 60
STORED = 10  # a layer of the tests: 10 bytes stored, 20 in memory


def layer(owner: str, number: int) -> StoredLayer:
    return StoredLayer(owner, number, STORED)


def fill(pool: LayerPool, owner: str, numbers: range, *, size: int = 20) -> None:
    for number in numbers:
        assert pool.fetch(layer(owner, number), lambda: np.zeros(size, np.uint8)) is not None


def held(pool: LayerPool) -> list[tuple[str, int]]:
    return [(owner, n) for owner in "abc" for n in range(10) if pool.holds(layer(owner, n))]


def test_the_least_recently_used_goes_first() -> None:
    pool: LayerPool = LayerPool(80 + STORED)
    fill(pool, "a", range(2))
    fill(pool, "b", range(2))
    fill(pool, "a", range(1))  # now a 1 is the oldest, then b 0
    fill(pool, "c", range(1))
    assert held(pool) == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    fill(pool, "c", range(1, 2))
    assert held(pool) == [("a", 0), ("b", 1), ("c", 0), ("c", 1)]


def test_layers_in_use_stay_and_nothing_goes_in_vain() -> None:
    pool: LayerPool = LayerPool(80 + STORED)
    fill(pool, "a", range(3))
    fill(pool, "b", range(1))
    pool.enter("a")
    larger = StoredLayer("c", 0, 3 * STORED)
    assert pool.fetch(larger, lambda: np.zeros(60, np.uint8)) is None  # b alone makes too little room
    assert held(pool) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    fill(pool, "c", range(1))
    assert held(pool) == [("a", 0), ("a", 1), ("a", 2), ("c", 0)]
    pool.leave("a")
    fill(pool, "c", range(1, 4))
    assert held(pool) == [("c", 0), ("c", 1), ("c", 2), ("c", 3)]


def test_an_owner_in_use_twice_is_in_use_until_both_leave() -> None:
    pool: LayerPool = LayerPool(20 + STORED)
    pool.learn(layer("a", 0), 20)
    fill(pool, "a", range(1))
    pool.enter("a")
    pool.enter("a")
    pool.leave("a")
    assert pool.fetch(layer("b", 0), lambda: np.zeros(20, np.uint8)) is None
    pool.leave("a")
    fill(pool, "b", range(1))
    assert held(pool) == [("b", 0)]


def test_nobody_lets_go_of_his_own() -> None:
    """Walking over more layers than fit would otherwise find none of them."""
    pool: LayerPool = LayerPool(40 + STORED)
    fill(pool, "a", range(2))
    assert pool.fetch(layer("a", 2), lambda: np.zeros(20, np.uint8)) is None
    assert held(pool) == [("a", 0), ("a", 1)]


def test_what_must_be_loaded_is_though_nothing_can_go() -> None:
    pool: LayerPool = LayerPool(40 + STORED)
    fill(pool, "a", range(2))
    pool.enter("a")
    assert pool.fetch(layer("a", 2), lambda: np.zeros(20, np.uint8), must=True) is not None
    assert pool.held_bytes == 60


def test_claims_count_and_make_room() -> None:
    pool: LayerPool = LayerPool(90)
    fill(pool, "a", range(3))
    pool.claim(50)
    assert held(pool) == [("a", 1), ("a", 2)]
    assert (pool.held_bytes, pool.available_bytes("b")) == (90, 40)
    pool.claim(-50)
    assert (pool.held_bytes, pool.available_bytes("b"), pool.peak_bytes) == (40, 90, 90)


def test_the_size_of_a_kind_is_learnt() -> None:
    """The first layer of a kind is judged by a guess, the next by the largest one seen."""
    pool: LayerPool = LayerPool(1000)
    before = pool.expected_bytes(layer("a", 0))
    assert before > 20
    fill(pool, "a", range(1))
    assert [pool.expected_bytes(layer("a", n)) for n in (0, 1)] == [20, 20]
    fill(pool, "b", range(1), size=30)
    assert [pool.expected_bytes(layer("a", n)) for n in (0, 1)] == [20, 30]
    assert pool.expected_bytes(StoredLayer("a", 1, STORED, "another kind")) == before


def test_a_layer_larger_than_expected_costs_what_is_idle() -> None:
    pool: LayerPool = LayerPool(100)
    fill(pool, "a", range(2))
    fill(pool, "b", range(1), size=90)
    assert held(pool) == [("b", 0)]


def test_two_threads_that_want_the_same_layer_load_it_once() -> None:
    pool: LayerPool = LayerPool(1000)
    began, go_on = threading.Event(), threading.Event()
    loads: list[int] = []

    def load() -> np.ndarray:
        loads.append(1)
        began.set()
        assert go_on.wait(LIMIT_S)
        return np.zeros(20, np.uint8)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.fetch, layer("a", 0), load)
        assert began.wait(LIMIT_S)
        second = threads.submit(pool.fetch, layer("a", 0), load)
        fill(pool, "b", range(1))  # another one is not held up
        go_on.set()
        assert first.result(LIMIT_S) is second.result(LIMIT_S)
    assert loads == [1]


def test_a_failed_load_is_raised_and_leaves_nothing() -> None:
    pool: LayerPool = LayerPool(100)

    def fail() -> np.ndarray:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        pool.fetch(layer("a", 0), fail)
    assert pool.held_bytes == 0
    fill(pool, "a", range(1))


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1GB"])
def test_a_budget_is_a_number_of_bytes(budget: object) -> None:
    with pytest.raises(ConfigError, match="memory_bytes"):
        LayerPool(budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 0.5, True, "8GB"])
def test_the_setting_is_a_number_of_bytes(value: object) -> None:
    with pytest.raises(ConfigError, match="memory_bytes"):
        Resources(memory_bytes=value)  # type: ignore[arg-type]


def test_the_command_line_sets_it() -> None:
    for arguments, expected in (([], 0), (["--memory-bytes", "8000000000"], 8_000_000_000)):
        parser = cli_arguments.Parser()
        cli_arguments.add_answer(parser)
        settings = cli_arguments.answer_settings(parser.parse_args(["q.jsonl", "--store", "s", *arguments]))
        assert settings["resources"].memory_bytes == expected


@given(
    budget=st.integers(20, 200),
    steps=st.lists(
        st.tuples(st.sampled_from(["fetch", "enter", "leave", "drop"]), st.sampled_from("abc"), st.integers(0, 4)),
        max_size=60,
    ),
)
def test_the_budget_holds(budget: int, steps: list[tuple[str, str, int]]) -> None:
    """Whatever is asked, in whatever order; sizes are known beforehand here."""
    pool: LayerPool = LayerPool(budget)
    pool.learn(layer("a", 0), 20)
    users = dict.fromkeys("abc", 0)
    for step, owner, number in steps:
        in_use = [key for key in held(pool) if users[key[0]]]
        if step == "fetch":
            pool.fetch(layer(owner, number), lambda: np.zeros(20, np.uint8))
        elif step == "enter":
            pool.enter(owner)
            users[owner] += 1
        elif step == "leave" and users[owner]:
            pool.leave(owner)
            users[owner] -= 1
        elif step == "drop":
            pool.drop(layer(owner, number))
            in_use = [key for key in in_use if key != (owner, number)]
        assert set(in_use) <= set(held(pool))
        assert pool.held_bytes == 20 * len(held(pool))
    assert pool.peak_bytes <= budget


class Pair(NamedTuple):
    left: object
    right: object


@dataclass
class Holder:
    kept: object
    others: dict


def test_bytes_of_counts_all_memory_once() -> None:
    keys = torch.zeros(4, 10)  # 160 bytes
    codes = np.zeros((3, 5), np.int32)  # 60
    assert bytes_of(keys) == bytes_of(keys[:2]) == bytes_of([keys, keys.view(-1), keys.numpy()]) == 160
    assert bytes_of(codes[1:2]) == 60  # a view keeps the whole
    held = Holder(Pair(keys, codes.view(np.uint8)), {"again": codes, "text": "no memory of ours", "module": np})
    assert bytes_of(held) == 220
    held.others["itself"] = held
    assert bytes_of(held) == 220


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(sizes=sizes, reading=st.integers(0, 30), available=st.integers(0, 2500))
def test_a_plan_stays_within_the_budget(sizes: list[int], reading: int, available: int) -> None:
    made = plan(sizes, [reading] * len(sizes), available)
    kept = sum(sizes[number] for number in made.kept)
    if len(made.kept) == len(sizes):
        assert kept + reading <= available
        return
    assert sum(sizes) + reading > available
    assert made.room_bytes == (2 if made.ahead else 1) * max(sizes) + reading
    assert made.ahead == (2 * max(sizes) + reading <= available)
    assert not made.kept or kept + made.room_bytes <= available
    if made.room_bytes <= available:  # nothing of the budget lies idle that a layer of any size would fit into
        assert kept + made.room_bytes > available - 2 * max(sizes)


@given(n=st.integers(4, 64), data=st.data())
def test_the_layers_of_a_plan_are_spread_evenly(n: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, n - 3))
    made = plan([10] * n, [5] * n, 25 + 10 * wanted)
    assert len(made.kept) == wanted
    streamed = [number for number in range(n) if number not in made.kept]
    gaps = [(b - a) % n or n for a, b in zip(streamed, [*streamed[1:], streamed[0]], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    meminfo = "MemTotal:       24000000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n"
    root = files(tmp_path, proc__meminfo=meminfo)
    assert available_bytes(root) == 1_024_000
    group = {"memory_DOT_current": "600000\n", "memory_DOT_stat": "anon 1\ninactive_file 100000\n"}
    files(root / "sys/fs/cgroup", memory_DOT_max="max\n", **group)
    assert available_bytes(root) == 1_024_000
    files(root / "sys/fs/cgroup", memory_DOT_max="1000000\n")
    assert available_bytes(root) == 500_000
    older = {"memory_DOT_limit_in_bytes": "400000\n", "memory_DOT_usage_in_bytes": "399000\n"}
    files(root / "sys/fs/cgroup/memory", **older)
    assert available_bytes(root) == 1000


def test_the_automatic_budget_is_half_of_what_is_free_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabatch.available.available_bytes", lambda: 64_000_000_000)
    assert automatic_budget("cpu") == 32_000_000_000
    assert automatic_budget("cpu", sharing=4, sharing_card=9) == 8_000_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24_000_000_000, 80_000_000_000))
    assert automatic_budget("cuda:0") == 12_000_000_000
    assert automatic_budget("cuda:0", sharing=2, sharing_card=2) == 6_000_000_000
    assert automatic_budget("cuda:0", sharing=8) == 4_000_000_000
    monkeypatch.setattr("rabatch.available.available_bytes", lambda: 1000)
    assert automatic_budget("cpu") == 1 << 26


def test_available_memory_where_there_is_no_linux(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > 1 << 26
    assert available_bytes() > 1 << 20
