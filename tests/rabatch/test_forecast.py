"""Which recipe is cheapest: the roofline by hand, and where one overtakes another."""

from __future__ import annotations

import dataclasses

import pytest

from rabatch.config import BuildConfig, Recipe
from rabatch.flops import ModelWork
from rabatch.forecast import Choice, Decoding, Rates, choices
from rabatch.models import ModelGeometry

SHAPE = ModelGeometry(n_layers=2, n_kv_heads=2, n_query_heads=4, head_dim=8)
WORK = ModelWork(SHAPE, windows=(0, 0), parameters=1000, token_weights=600, output_weights=300)
DECODING = Decoding(
    work=WORK,
    build=BuildConfig(sink_tokens=10, window_tokens=30, zone_tokens=50),
    recipe=Recipe(top_k=20),
    weight_bytes=4,
    kv_bytes=2,
    question_tokens=5,
    answer_tokens=10,
    questions_per_batch=4,
)
N, ROW = 1040, 2 * 8 * 2  # 1,000 keys in the index, 32 bytes of key and value


@pytest.mark.parametrize("together", [1, 4])
def test_traffic_by_hand(together):
    weights = 900 * 4 / together
    static = 40 * ROW / together
    found = 2 * 20 * ROW  # of two query heads a group
    zones = 1000 / 50 * 2 * 8 * 4 / together
    per_head = {
        "dense": 1000 * ROW / together,
        "flat": 1000 * ROW / 2 / together + found,
        "graph": 2 * 480 * ROW / 2 + found + zones,
        "scan": 2 * (1000 * 8 / 4 + 80 * ROW / 2) + found + zones,
    }
    for method, indexed in per_head.items():
        expected = weights + 2 * 2 * (static + indexed)
        assert DECODING.token_bytes(method, N, together) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key_codec", "value_codec", "key", "value"),
    [("int8", "none", 8, 16), ("none", "int8", 16, 8), ("kivi2", "kivi2", 16, 4)],  # 2 of codes, a step, a zero
)
def test_codes_are_less_traffic(key_codec, value_codec, key, value):
    """Keys in groups are decoded when they are opened."""
    build = dataclasses.replace(DECODING.build, key_codec=key_codec, value_codec=value_codec)
    coded = dataclasses.replace(DECODING, build=build)
    rest = 900 * 4 + 2 * 2 * 40 * ROW
    assert coded.token_bytes("dense", N, 1) == pytest.approx(rest + 2 * 2 * 1000 * (key + value))
    found, zones = 2 * 20 * (key + value), 1000 / 50 * 2 * 8 * 4
    assert coded.token_bytes("graph", N, 1) == pytest.approx(rest + 2 * 2 * (2 * 480 * key + found + zones))


def test_a_step_takes_the_traffic_or_the_arithmetic_whichever_is_more():
    flops = 2 * 900 + 4 * 8 * 4 * 2 * N
    assert DECODING.token_flops("dense", N) == flops
    for method, scored in (("flat", 1000), ("graph", 480), ("scan", 80)):
        assert DECODING.token_flops(method, N) == 2 * 900 + 4 * 8 * 4 * 2 * (60 + scored / 2)
    slow_memory, slow_cores = Rates(1e12, decode_bytes_per_s=1e3), Rates(1e3, decode_bytes_per_s=1e12)
    assert DECODING.token_seconds("dense", N, 1, slow_memory) == DECODING.token_bytes("dense", N, 1) / 1e3
    assert DECODING.token_seconds("dense", N, 1, slow_cores) == flops / 1e3
    assert DECODING.token_seconds("dense", N, 1, Rates()) is None
    elsewhere = dataclasses.replace(slow_cores, decode_flops_per_s=1e4)
    assert DECODING.token_seconds("dense", N, 1, elsewhere) == flops / 1e4


def test_a_question_is_read_and_answered():
    rates = Rates(1e9, decode_bytes_per_s=1e6, measured_over_modelled={"dense": 2.0})
    step = DECODING.token_bytes("dense", N, 4) / 1e6
    assert DECODING.question_seconds("dense", N, 9, rates) == pytest.approx(2 * 600 * 5 / 1e9 + 10 * 2 * step)


def test_what_overtakes_what_and_from_how_many_questions():
    costs = {"a": lambda n: 3 * n, "b": lambda n: 100 + n, "c": lambda n: 100_000 + n / 2}
    found = choices(lambda option, n: costs[option](n), ("a", "b", "c"))
    # 3n < 100 + n up to 50, where they are the same; 100 + n < 100,000 + n / 2 up to 199,800.
    assert found == [Choice("a", 1, 50), Choice("b", 51, 199_800), Choice("c", 199_801, None)]
    assert choices(lambda option, n: n, ("only",)) == [Choice("only", 1, None)]


def test_sliding_layers_cost_their_window():
    local = dataclasses.replace(DECODING, work=dataclasses.replace(WORK, windows=(100, 0)))
    full = DECODING.token_bytes("dense", N, 1)
    assert full - local.token_bytes("dense", N, 1) == 2 * (N - 100) * ROW


def test_streaming_heads_cost_the_static_set():
    heads = ((True, False), (True, False))
    half = dataclasses.replace(DECODING.build, head_pattern=heads)
    local = dataclasses.replace(DECODING, build=half)
    assert DECODING.token_bytes("dense", N, 1) - local.token_bytes("dense", N, 1) == 2 * 1000 * ROW
    assert DECODING.token_flops("dense", N) - local.token_flops("dense", N) == 2 * 1000 * 4 * 8 * 2
    by_recipe = dataclasses.replace(DECODING, recipe=dataclasses.replace(DECODING.recipe, head_pattern=heads))
    assert by_recipe.token_bytes("dense", N, 1) == local.token_bytes("dense", N, 1)
    both = dataclasses.replace(by_recipe, build=half)  # they overlap, they do not add up
    assert both.token_flops("graph", N) == local.token_flops("graph", N)
