"""The vector code of the CPU attention, each function against NumPy."""

from __future__ import annotations

import threading

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.compiling import FAST
from rabatch.errors import ConfigError
from rabatch.index import machine
from rabatch.index.compiled import run_tasks
from rabatch.index.topk import best, lanes
from rabatch.index.topk.best import ranked

TINY = np.float32(2.0**-126)  # what exp_minus gives from -87.34 down


def kernel(function):
    """As `rabatch.index.compiled.compiled`, without the cache: it would not notice a change in another file."""
    return numba.njit(fastmath=FAST)(function)


@kernel
def add_tile(a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth, keep):
    lanes.add_tile(a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth, keep)


@kernel
def exp_minus(array, at, panels, offset):
    return lanes.exp_minus(array, at, panels, offset)


@kernel
def greatest(array, at, panels):
    return lanes.greatest(array, at, panels)


@kernel
def above(array, at, bar):
    return lanes.above(array, at, bar)


@kernel
def lowest_bit(bits):
    return lanes.lowest_bit(bits)


@kernel
def spread(out, at, step, codes, head, key, half):
    machine.spread(out, at, step, codes, head, key, half)


def normal(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


# add_tile


@pytest.mark.parametrize("keep", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("depth", [0, 1, 2, 24, 257])
def test_add_tile(depth, keep):
    a, b, c = normal(3000), normal(9000, 1), normal(1000, 2)
    a_at, a_step, b_at, b_step, c_at, c_step = 5, depth + 3, 7, 33, 11, 40
    before = c.copy()
    add_tile(a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth, keep)
    left = np.stack([a[a_at + r * a_step :][:depth] for r in range(6)]).astype(np.float64)
    right = np.stack([b[b_at + i * b_step :][:16] for i in range(depth)] or [np.empty(16)])[:depth]
    expected, inside = before.astype(np.float64), np.zeros(len(c), bool)
    for r, product in enumerate(left @ right):
        where = slice(c_at + r * c_step, c_at + r * c_step + 16)
        expected[where] = product + before[where] * keep
        inside[where] = True
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(c[~inside], before[~inside])


def test_add_tile_sets_what_was_nan():
    c = np.full(96, np.nan, np.float32)
    add_tile(normal(12), 0, 2, normal(32), 0, 16, c, 0, 16, 2, False)
    assert np.isfinite(c).all()


def test_add_tile_sums_in_the_same_order_at_any_depth():
    """Products with 0 behind a row's keys change no bit, which is why a chunk changes nothing."""
    a, b = normal(6 * 64), normal(64 * 16, 1)
    a.reshape(6, 64)[:, 41:] = 0
    short, long = np.zeros(96, np.float32), np.zeros(96, np.float32)
    add_tile(a, 0, 64, b, 0, 16, short, 0, 16, 41, True)
    add_tile(a, 0, 64, b, 0, 16, long, 0, 16, 64, True)
    np.testing.assert_array_equal(short, long)


# exp_minus


def exponentials(differences, offset=0.0):
    """exp_minus of `differences + offset`, which must be a multiple of 16 numbers."""
    array = (np.asarray(differences, np.float32) + np.float32(offset)).astype(np.float32)
    total = exp_minus(array, 0, len(array) // 16, np.float32(offset))
    return array, total


def test_exp_minus_is_exp():
    """To a rounding of the greatest weight, 1; a weight e^x to one of itself and |x| of x / log 2."""
    x = np.linspace(-87, 0, 320_000).astype(np.float32)
    found, _ = exponentials(x)
    expected = np.exp(x.astype(np.float64))
    relative = np.abs(found / expected - 1)
    assert np.abs(found - expected).max() < 1e-7
    assert relative[x >= -9].max() < 5e-7
    assert (relative < 2e-7 + 1e-7 * np.abs(x)).all()


def test_exp_minus_of_zero_is_1():
    found, total = exponentials(np.zeros(32))
    assert (found == 1).all()
    assert total == 32


def test_exp_minus_has_a_floor():
    x = np.r_[np.linspace(-1e4, -88, 29), -1e38, -np.inf, -87.5].astype(np.float32)
    found, total = exponentials(x)
    np.testing.assert_array_equal(found, TINY)
    assert total == 32 * TINY


@pytest.mark.parametrize("offset", [-1e4, -3.0, 0.0, 77.0, 1e4])
def test_exp_minus_subtracts_the_offset(offset):
    x = -np.abs(np.round(8 * normal(64))) / 4  # exact beside the offset
    found, total = exponentials(x, offset)
    np.testing.assert_allclose(found, np.exp(x), rtol=2e-6)
    np.testing.assert_allclose(total, np.exp(x.astype(np.float64)).sum(), rtol=2e-6)


def test_exp_minus_touches_its_panels_only():
    array = np.full(80, -1, np.float32)
    total = exp_minus(array, 17, 2, np.float32(0))
    assert (array[:17] == -1).all()
    assert (array[49:] == -1).all()
    np.testing.assert_allclose(array[17:49], np.exp(-1), rtol=1e-6)
    np.testing.assert_allclose(total, 32 * np.exp(-1), rtol=1e-6)


def test_exp_minus_of_no_panels_is_0():
    array = normal(16)
    before = array.copy()
    assert exp_minus(array, 0, 0, np.float32(9)) == 0
    np.testing.assert_array_equal(array, before)


def test_exp_minus_keeps_nan():
    x = np.full(32, -1, np.float32)
    x[5] = np.nan
    found, total = exponentials(x)
    assert np.isnan(total)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))


# greatest


@pytest.mark.parametrize("panels", [1, 2, 16])
@pytest.mark.parametrize("at", [0, 3])
def test_greatest(panels, at):
    array = normal(300)
    array[:at], array[at + 16 * panels :] = 1e9, 1e9
    for place in range(16 * panels):
        lifted = array.copy()
        lifted[at + place] = 100 + place
        assert greatest(lifted, at, panels) == 100 + place
    assert greatest(array - 50, at, panels) == (array - 50)[at : at + 16 * panels].max()


def test_greatest_leaves_nan_out():
    array = np.full(64, np.nan, np.float32)
    array[[3, 40]] = -7, -2
    assert greatest(array, 0, 4) == -2
    assert greatest(array, 0, 1) == -7


@pytest.mark.parametrize("filler", [np.nan, -np.inf])
def test_greatest_of_nothing(filler):
    array = np.full(32, filler, np.float32)
    assert greatest(array, 0, 2) == -np.inf
    assert greatest(array, 0, 0) == -np.inf


def test_greatest_is_infinity():
    array = normal(32)
    array[20] = np.inf
    assert greatest(array, 0, 2) == np.inf


# above


def test_above_has_a_bit_for_each_place():
    for place in range(16):
        array = np.zeros(20, np.float32)
        array[2 + place] = 1
        array[1] = array[18] = 9  # beside them
        assert above(array, 2, np.float32(0.5)) == 1 << place


def test_above_is_strict_and_leaves_nan_out():
    array = np.full(16, np.nan, np.float32)
    array[:6] = 1, 2, 3, -np.inf, np.inf, np.nextafter(np.float32(2), np.float32(3))
    assert above(array, 0, np.float32(2)) == 0b110100
    assert above(array, 0, np.float32(-np.inf)) == 0b110111
    assert above(array, 0, np.float32(np.inf)) == 0
    assert above(array, 0, np.float32(np.nan)) == 0


def test_above_is_not_negative():
    assert above(np.ones(16, np.float32), 0, np.float32(0)) == 0xFFFF


# spread


@pytest.mark.parametrize("half", [True, False], ids=["fp16", "bf16"])
def test_spread_reads_every_code(half):
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(2, 128, 256)
    out = np.zeros(1 << 16, np.float32)
    for key in range(256):
        spread(out, key * 256, 1, codes, key // 128, key % 128, half)
    dtype = torch.float16 if half else torch.bfloat16
    expected = torch.from_numpy(codes.view(np.int16)).view(dtype).float().numpy().reshape(-1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize(("at", "step", "key"), [(0, 1, 0), (3, 16, 2), (5, 1, 1)])
def test_spread_steps(dtype, at, step, key):
    numbers = normal(2 * 3 * 24).reshape(2, 3, 24)
    codes = numbers if dtype == np.float32 else numbers.astype(np.float16).view(np.uint16)
    found, expected = np.full(500, 7, np.float32), np.full(500, 7, np.float32)
    spread(found, at, step, codes, 1, key, True)
    machine.spread(expected, at, step, codes, 1, key, True)
    np.testing.assert_array_equal(found, expected)
    rounded = numbers if dtype == np.float32 else numbers.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(expected[at : at + 24 * step : step], rounded[1, key])
    assert (expected == 7).sum() == 500 - 24


def test_lowest_bit():
    for place in range(63):
        for higher in (0, 1 << 62, 0b101 << place):
            bits = (1 << place | higher) & (2**63 - 1)
            assert lowest_bit(np.int64(bits)) == place


# collect, cut, settle and ranked


@kernel
def packed(score, key):
    return best.packed(score, key)


@kernel
def unpacked(pair):
    return best.score_of(pair), best.key_of(pair)


@kernel
def cut(pairs, n, k):
    return best.cut(pairs, n, k)


@kernel
def collected(line, block, k, scores, ids):
    """The best of a line of scores, entered `block` of them at a time."""
    pairs = np.empty(best.room_for(k, len(line)), np.uint64)
    kept, bar = 0, np.float32(-np.inf)
    for begin in range(0, len(line), block):
        stop = min(begin + block, len(line))
        row = begin // 16 * 16
        kept, bar = best.collect(line, row, row, (begin - row, stop - row), pairs, kept, k, bar)
    best.settle(pairs, kept, k, scores, ids)


def best_of(stream, k, block=48):
    """The k best (id, score) of a stream of ascending ids; those between have no score."""
    n = stream[-1][0] + 1 if stream else 0
    line = np.full(n + -n % 16, -np.inf, np.float32)
    for key, score in stream:
        line[key] = score
    scores, ids = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
    collected(line, block, k, scores, ids)
    ids_, scores_ = ranked(torch.from_numpy(ids), torch.from_numpy(scores))
    assert (ids.tolist(), scores.tolist()) == (ids_.tolist(), scores_.tolist())
    return list(zip(ids.tolist(), scores.tolist(), strict=True))


def sorted_best(stream, k):
    """The same by sorting: ties to the lower id, padded with (-1, -inf)."""
    in_order = sorted(stream, key=lambda entry: (-entry[1], entry[0]))[:k]
    return in_order + [(-1, -np.inf)] * (k - len(in_order))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_list_keeps_the_best(data):
    """Of ids that ascend, with gaps, and scores full of ties: the k best, ties to the lower id."""
    scores = data.draw(st.lists(st.one_of(st.integers(-3, 3), st.floats(-1e6, 1e6, width=32)), max_size=80))
    ids = np.cumsum(data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))).tolist()
    k = data.draw(st.integers(1, 40))
    stream = [(int(key), float(score)) for key, score in zip(ids, scores, strict=True)]
    block = data.draw(st.sampled_from([7, 16, 48, 1000]))
    assert best_of(stream, k, block) == sorted_best(stream, k)


@pytest.mark.parametrize("k", [1, 2, 3, 32])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "zigzag"])
def test_the_list_in_order(order, k):
    scores = {
        "rising": np.arange(100.0),
        "falling": -np.arange(100.0),
        "equal": np.zeros(100),
        "zigzag": np.arange(100) * (-1.0) ** np.arange(100),
    }[order]
    stream = list(enumerate(scores.tolist()))
    assert best_of(stream, k) == sorted_best(stream, k)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cut_brings_the_greatest_to_the_front(data):
    numbers = data.draw(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 80), min_size=2, max_size=60, unique=True))
    k = data.draw(st.integers(1, len(numbers) - 1))
    pairs = np.array([*numbers, 2**64 - 1], np.uint64)  # what lies behind the n is not looked at
    least = cut(pairs, len(numbers), k)
    expected = sorted(numbers, reverse=True)[:k]
    assert sorted(pairs[:k].tolist(), reverse=True) == expected
    assert int(least) == expected[-1]
    assert sorted(pairs[:-1].tolist()) == sorted(numbers)


@settings(max_examples=200, deadline=None)
@given(scores=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2), key=st.integers(0, 2**31 - 1))
def test_pairs_are_ordered_as_scores_then_as_ids(scores, key):
    a, b = (np.float32(score) for score in scores)
    assert unpacked(np.uint64(packed(a, key))) == (a, key)
    assert (packed(a, key) > packed(b, key)) == (a > b)
    assert packed(a, key) > packed(a, key + 1)


def test_both_zeros_are_one_score():
    assert packed(np.float32(-0.0), 3) > packed(np.float32(0.0), 4)


def test_ranked_puts_what_is_missing_last():
    ids = torch.tensor([[[4, -1, 2, -1], [9, 3, 7, 1]]], dtype=torch.int32)
    scores = torch.tensor([[[1.0, -torch.inf, 1.0, -torch.inf], [0.0, 2.0, 0.0, -5.0]]])
    ids, scores = ranked(ids, scores)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[[2, 4, -1, -1], [3, 7, 9, 1]]]
    assert scores.tolist() == [[[1.0, 1.0, -torch.inf, -torch.inf], [2.0, 0.0, 0.0, -5.0]]]


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 1, 1), (1, 1, 1)], ids=str)
def test_ranked_keeps_the_shape(shape):
    ids, scores = ranked(torch.full(shape, -1, dtype=torch.int32), torch.full(shape, -torch.inf))
    assert ids.shape == scores.shape == shape
    assert (ids == -1).all()


# run_tasks


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_run_tasks_does_every_task_once(threads, n):
    done = []
    run_tasks(lambda a, b: done.append((a, b)), [(i, -i) for i in range(n)], threads=threads)
    assert sorted(done) == [(i, -i) for i in range(n)]


def test_run_tasks_on_one_thread_keeps_the_order():
    done, on = [], set()
    tasks = [(3,), (1,), (2,)]
    run_tasks(lambda i: (done.append(i), on.add(threading.get_ident())), tasks, threads=1)
    assert done == [3, 1, 2]
    assert on == {threading.get_ident()}


def test_run_tasks_uses_its_threads():
    """Two tasks that wait for each other: one thread would never end them."""
    meet = threading.Barrier(2, timeout=30)
    run_tasks(lambda i: meet.wait(), [(0,), (1,)], threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_run_tasks_raises_what_a_task_raises(threads):
    def work(i):
        if i == 3:
            raise ZeroDivisionError(i)

    with pytest.raises(ZeroDivisionError, match="3"):
        run_tasks(work, [(i,) for i in range(5)], threads=threads)


@pytest.mark.parametrize("threads", [0, -1])
def test_run_tasks_needs_a_thread(threads):
    with pytest.raises(ConfigError) as error:
        run_tasks(print, [], threads=threads)
    assert error.value.field == "threads"
