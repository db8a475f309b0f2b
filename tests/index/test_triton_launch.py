"""The host side of the Triton kernels: who is refused in which words, how work is cut, how the best are found."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from attention_cases import NO_TRITON, assert_same, attend, sampled, states
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import ConfigError
from rabatch.index import topk
from rabatch.index.topk import attention_topk, launch
from rabatch.index.topk.base import Span, check_request
from rabatch.index.topk.tiling import highest, launches, tiles


def refused(*vectors: torch.Tensor) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        attention_topk(*vectors, scaling=1.0, impl="triton")
    return error.value


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rabatch.index.topk.kernel", raising=False)
    monkeypatch.delattr(topk, "kernel", raising=False)
    error = refused(*states(1, 1, 3, 3))
    assert (error.field, error.value) == ("impl", "triton")
    assert all(word in str(error) for word in ("pip install rabatch[gpu]", "blocked", "naive"))


@NO_TRITON
def test_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from rabatch.index.topk import kernel

    monkeypatch.setattr(kernel, "INTERPRETED", False)
    error = refused(*states(1, 1, 3, 3))
    assert error.field == "impl"
    assert all(word in str(error) for word in ("cpu", "blocked", "naive", "TRITON_INTERPRET=1"))


@NO_TRITON
@pytest.mark.parametrize(("head_dim", "value_dim", "field"), [(257, 16, "keys"), (16, 300, "values")])
def test_heads_too_wide(head_dim: int, value_dim: int, field: str) -> None:
    error = refused(*states(1, 1, 3, 3, head_dim, value_dim))
    assert error.field == field
    assert all(word in str(error) for word in ("256", "blocked"))


@NO_TRITON
@pytest.mark.parametrize("room", [1, 20_000, 1 << 30])
def test_memory_can_be_bounded(room: int) -> None:
    """In as many launches as it takes, with the same result."""
    queries, keys, values = states(2, 1, 70, 150)
    sample = sampled(range(0, 70, 2), 3, 120, k=5)
    request = check_request(
        queries, keys, values, spans=None, sample=sample, scaling=0.25, softcap=None, sliding_window=0, threads=1
    )
    found = launch.attend_in(request, launch._INTERPRETED, room)
    assert_same(found, attend("naive", queries, keys, values, sample=sample), queries, keys, sample)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_highest_is_topk(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 900)), data.draw(st.integers(1, 6))
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randn((2, 3, n), generator=make)
    if data.draw(st.booleans()):
        values = values.round()
    k = min(k, n)
    places = highest(values, k)
    assert places.shape == (2, 3, k)
    found = values.gather(2, places).sort(descending=True).values
    torch.testing.assert_close(found, values.topk(k).values, rtol=0, atol=0)
    assert all(len(row.unique()) == k for row in places.flatten(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    room=st.integers(1, 800),
)
def test_launches_cover_every_tile_once_and_stay_in_room(slots: list[list[int]], sizes: list[int], room: int) -> None:
    before = np.concatenate([np.zeros((len(slots), 1), int), np.cumsum(slots, axis=1)], axis=1)
    made = list(launches(before, np.array(sizes), room))
    assert [tile for start, stop, _ in made for tile in range(start, stop)] == [0, 1, 2, 3]
    for start, stop, most in made:
        assert most == (before[:, stop] - before[:, start]).max()
        assert most * max(sizes[start:stop]) <= room or stop - start == 1


def test_tiles_never_cross_spans() -> None:
    spans = [Span(0, 70, 5, 20), Span(80, 81, 100, 100), Span(81, 113, 101, 101)]
    made = tiles(spans, 32)
    rows = [row for start, stop, *_ in made.tolist() for row in range(start, stop)]
    assert rows == [*range(70), *range(80, 113)]
    for start, stop, first, at in made.tolist():
        (span,) = (s for s in spans if s.row_start <= start < s.row_stop)
        assert stop <= span.row_stop
        assert (first, at) == (span.first_key, span.at + start - span.row_start)
