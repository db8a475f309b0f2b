"""Attention with top-k: the choice of an implementation, and who is refused."""

from __future__ import annotations

import importlib
import logging
import math

import pytest
import torch
from attention_cases import (
    SCALING,
    assert_equal,
    attend,
    sampled,
    states,
)

from rabatch.errors import ConfigError
from rabatch.index.topk import ATTENTION, Sample, Span, attention_topk, blocked

pytestmark = [  # NumPy's, under Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
topk_module = importlib.import_module("rabatch.index.topk")
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf


# The choice of an implementation, and errors


def test_auto_on_the_cpu_is_blocked_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(topk_module, "_logged_choices", set())
    calls = []
    monkeypatch.setitem(ATTENTION, "blocked", lambda request: calls.append(request) or blocked.attend(request))
    vectors = states(2, 1, 5, 9)
    with caplog.at_level(logging.INFO, logger="rabatch.index.topk"):
        found = [attention_topk(*vectors, scaling=SCALING) for _ in range(3)]
    assert len(calls) == 3
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu: blocked"]
    assert_equal(found[0], attend("blocked", *vectors))


def test_gradients_are_not_kept():
    queries, keys, values = states(2, 1, 5, 9)
    found = attend("blocked", queries.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    assert not found.out.requires_grad


GOOD = sampled([0, 2], 0, 9)
ERRORS = {
    "queries-float64": ({"queries": torch.zeros(2, 4, 16, dtype=torch.float64)}, "queries"),
    "keys-int8": ({"keys": torch.zeros(1, 9, 16, dtype=torch.int8)}, "keys"),
    "values-float64": ({"values": torch.zeros(1, 9, 16, dtype=torch.float64)}, "values"),
    "queries-of-two-dimensions": ({"queries": torch.zeros(4, 16)}, "queries"),
    "keys-of-four-dimensions": ({"keys": torch.zeros(1, 1, 9, 16)}, "keys"),
    "heads-not-a-multiple": ({"queries": torch.zeros(3, 4, 16), "keys": 2, "values": 2}, "queries"),
    "head-dims-differ": ({"queries": torch.zeros(2, 4, 8)}, "queries"),
    "no-kv-heads": ({"keys": 0, "values": 0}, "queries"),
    "more-rows-than-keys": ({"queries": torch.zeros(2, 10, 16)}, "queries"),
    "fewer-values": ({"values": torch.zeros(1, 8, 16)}, "values"),
    "values-of-other-heads": ({"values": torch.zeros(2, 9, 16)}, "values"),
    "values-of-another-dtype": ({"values": torch.zeros(1, 9, 16, dtype=HALF)}, "values"),
    "scaling-0": ({"scaling": 0.0}, "scaling"),
    "scaling-negative": ({"scaling": -1.0}, "scaling"),
    "scaling-nan": ({"scaling": NAN}, "scaling"),
    "softcap-0": ({"softcap": 0.0}, "softcap"),
    "softcap-negative": ({"softcap": -2.0}, "softcap"),
    "softcap-nan": ({"softcap": NAN}, "softcap"),
    "window-negative": ({"sliding_window": -1}, "sliding_window"),
    "threads-negative": ({"threads": -1}, "threads"),
    "spans-out-of-order": ({"spans": [Span(2, 4, 0, 0), Span(0, 2, 4, 4)]}, "spans"),
    "spans-overlap": ({"spans": [Span(0, 3, 0, 0), Span(2, 4, 4, 4)]}, "spans"),
    "span-backwards": ({"spans": [Span(3, 2, 0, 0)]}, "spans"),
    "span-before-the-rows": ({"spans": [Span(-1, 2, 0, 0)]}, "spans"),
    "span-beyond-the-rows": ({"spans": [Span(0, 5, 0, 0)]}, "spans"),
    "span-beyond-the-keys": ({"spans": [Span(0, 4, 0, 6)]}, "spans"),
    "span-before-its-keys": ({"spans": [Span(0, 4, 3, 2)]}, "spans"),
    "span-of-negative-keys": ({"spans": [Span(0, 4, -1, 2)]}, "spans"),
    "k-0": ({"sample": sampled([0], 0, 9, k=0)}, "k"),
    "row-too-high": ({"sample": sampled([0, 4], 0, 9)}, "sample.rows"),
    "row-below-none": ({"sample": sampled([0, -2], 0, 9)}, "sample.rows"),
    "row-twice": ({"sample": sampled([1, 3, 1], 0, 9)}, "sample.rows"),
    "row-twice-in-a-head": ({"sample": sampled([[0, 1], [2, 2]], 0, 9)}, "sample.rows"),
    "rows-of-other-heads": ({"sample": sampled([[0], [1], [2]], 0, 9)}, "sample.rows"),
    "rows-of-three-dimensions": ({"sample": sampled([[[0]]], 0, 9)}, "sample.rows"),
    "rows-of-no-dimension": ({"sample": sampled(0, 0, 9)}, "sample.rows"),
    "low-of-another-shape": ({"sample": Sample(GOOD.rows, GOOD.low[:1], GOOD.high, 3)}, "sample.low"),
    "high-of-another-shape": ({"sample": Sample(GOOD.rows, GOOD.low, GOOD.high[None], 3)}, "sample.high"),
    "impl-unknown": ({"impl": "magic"}, "impl"),
}


def request_of(change):
    """Arguments that fit, but for `change`; a number of heads stands for zeros of so many."""
    shapes = {"queries": (2, 4, 16), "keys": (1, 9, 16), "values": (1, 9, 16)}
    vectors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    zeros = {name: torch.zeros(n, 9, 16) for name, n in change.items() if name in shapes and isinstance(n, int)}
    return {**vectors, "scaling": 1.0, "sample": GOOD, "impl": "blocked", **change, **zeros}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_name_the_field(kind):
    change, field = ERRORS[kind]
    attention_topk(**request_of({}))
    with pytest.raises(ConfigError) as error:
        attention_topk(**request_of(change))
    assert error.value.field == field
    assert kind != "impl-unknown" or "auto, naive, blocked, triton" in str(error.value)
