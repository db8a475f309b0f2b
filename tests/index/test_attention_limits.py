"""Attention with top-k: what must not leak, large scores, and that no result depends on how the work is divided."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_cases import (
    IMPLS,
    N_KEYS,
    N_ROWS,
    ROUNDING,
    SPANS,
    STEP,
    assert_equal,
    attend,
    check,
    every,
    rows_by_head,
    sample_of,
    sampled,
    states,
    vectors_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.index.topk import Attended, Span, blocked

pytestmark = [  # NumPy's, under Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf


# What must not leak


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_other_documents_do_not_leak(impl, poison):
    """Keys and values that no row of a span sees, of other documents and beyond its last row, change no bit."""
    spans = SPANS["gaps"] if impl == "blocked" else SPANS["gaps"][::2]
    queries, keys, values = states(2, 1, 70, 150)
    rows = torch.arange(0, 70, STEP[impl])
    options = {"spans": spans, "sample": sampled(rows, 0, 150)}
    clean = attend(impl, queries, keys, values, **options)
    for span in spans:
        ours = slice(span.first_key, span.at + span.row_stop - span.row_start)
        poisoned = [torch.full_like(t, poison) for t in (keys, values)]
        for new, old in zip(poisoned, (keys, values), strict=True):
            new[:, ours] = old[:, ours]
        found = attend(impl, queries, *poisoned, **options)
        assert_equal(part(found, span, rows), part(clean, span, rows))
        assert part(clean, span, rows).lse.isfinite().all()


def part(result, span, rows):
    """What belongs to a span, of a result whose sampled rows are `rows`."""
    ours, kept = slice(span.row_start, span.row_stop), (rows >= span.row_start) & (rows < span.row_stop)
    return Attended(result.out[:, ours], result.lse[:, ours], result.ids[:, kept], result.scores[:, kept])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_the_cache_beyond_the_last_row_does_not_leak(impl, dtype):
    n_rows, n_keys = N_ROWS[impl], N_KEYS[impl]
    queries, keys, values = vectors_of(impl, dtype=dtype)
    at = n_keys - n_rows - 21
    options = {"spans": [Span(0, n_rows, 0, at)], "sample": sample_of(impl)}
    clean = attend(impl, queries, keys, values, **options)
    assert_equal(clean, attend(impl, queries, keys[:, : n_keys - 21], values[:, : n_keys - 21], **options))
    keys[:, n_keys - 21 :], values[:, n_keys - 21 :] = NAN, INF
    assert_equal(attend(impl, queries, keys, values, **options), clean)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_rows_do_not_leak(impl):
    """Queries of no span, as left padding may leave them."""
    queries, keys, values = states(2, 1, 70, 150)
    options = {"spans": SPANS["left-padding"], "sample": every(70, 150, STEP[impl])}
    clean = attend(impl, queries, keys, values, **options)
    queries[:, :13] = NAN
    assert_equal(attend(impl, queries, keys, values, **options), clean)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_key_reaches_the_rows_that_see_it_and_no_others(impl):
    n = N_KEYS[impl]
    bad = n // 3
    queries, keys, values = states(2, 1, n, n)
    sample = every(n, n, STEP[impl])
    clean = attend(impl, queries, keys, values, sample=sample)
    keys[:, bad, 5] = NAN
    found = attend(impl, queries, keys, values, sample=sample)
    assert found.out[:, bad:].isnan().all()
    assert found.lse[:, bad:].isnan().all()
    assert torch.equal(found.out[:, :bad], clean.out[:, :bad])
    assert torch.equal(found.lse[:, :bad], clean.lse[:, :bad])
    before = sample.rows < bad
    assert torch.equal(found.ids[:, before], clean.ids[:, before])


@pytest.mark.parametrize("bad", [3, 300])
def test_blocked_lists_leave_a_nan_key_out(bad):
    """The other keys are ranked as if it were not there, also where the list takes nearly all keys."""
    queries, keys, values = states(2, 1, 1, 310)
    order = attend("naive", queries, keys, values, sample=sampled([0], 0, 310, k=310)).ids
    keys[:, bad, 5] = NAN
    for k in (8, 40, 305):
        found = attend("blocked", queries, keys, values, sample=sampled([0], 0, 310, k=k))
        assert not found.scores.isnan().any()
        for head in range(2):
            assert found.ids[head, 0].tolist() == [key for key in order[head, 0].tolist() if key != bad][:k]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("what", ["queries", "keys", "values"])
def test_all_nan_does_not_crash(impl, what):
    vectors = dict(zip(("queries", "keys", "values"), vectors_of(impl), strict=True))
    vectors[what] = torch.full_like(vectors[what], NAN)
    found = attend(impl, **vectors, sample=sample_of(impl))
    assert found.out.isnan().all()
    assert found.lse.isnan().all() == (what != "values")
    assert ((found.ids >= -1) & (found.ids < N_KEYS[impl])).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_value_reaches_the_rows_that_see_it(impl):
    n = N_KEYS[impl]
    bad = n // 3
    queries, keys, values = states(2, 1, n, n)
    clean = attend(impl, queries, keys, values)
    values[:, bad, 5] = NAN
    found = attend(impl, queries, keys, values)
    assert found.out[:, bad:, 5].isnan().all()
    assert torch.equal(found.lse, clean.lse)
    others = [t for t in range(16) if t != 5]
    assert torch.equal(found.out[..., others], clean.out[..., others])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_memory_is_left_as_it_was_found(impl, monkeypatch):
    """Whatever the memory of results and scratch held before, NaN say, nothing of it is given out."""
    vectors = states(2, 1, 70, 150, head_dim=24 if impl == "blocked" else 32, value_dim=40 if impl == "blocked" else 32)
    sample = sampled([0, -1, 20, 45, 69], [0, 0, 30, 150, 0], [150, 150, 33, 150, 150])
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **o: dirty(empty(*a, **o)))
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN, or the greatest integer
    try:
        attend(impl, *(torch.full_like(t, NAN) for t in vectors), spans=SPANS["gaps"], sample=sample)
        found = check(impl, *vectors, spans=SPANS["gaps"], sample=sample)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found.out.isnan().any()
    assert not found.lse.isnan().any()


def dirty(array):
    array.fill(np.nan if array.dtype.kind == "f" else 77)
    return array


# Ranges of scores


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_ten_thousand(impl):
    queries, keys, values = vectors_of(impl)
    queries, keys = (20 * queries).round(), (20 * keys).round()  # whole, so exact in every order of summation
    found = check(impl, queries, keys, values, scaling=2.0, sample=sample_of(impl), slack=1e4 * ROUNDING[impl])
    assert found.scores.max() > 5_000
    assert found.lse.max() > 5_000
    assert found.out.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_far_below_zero(impl):
    """Every key is far below the maximum of none: no sum of weights is 0."""
    queries, keys, values = vectors_of(impl, whole=True)
    queries[..., 0], keys[..., 0] = 200, -200
    slack = 4e4 * ROUNDING[impl]
    found = check(impl, queries, keys, values, scaling=1.0, sample=sample_of(impl), slack=slack)
    assert (found.lse < -30_000).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("constant", [-4096.0, 4096.0])
def test_a_constant_on_every_score(impl, constant):
    """Moves the log-sum-exp, and nothing else."""
    queries, keys, values = vectors_of(impl, whole=True)
    queries[..., 0], keys[..., 0] = 1, 0
    options = {"scaling": 1.0, "sample": sample_of(impl)}
    plain = attend(impl, queries, keys, values, **options)
    keys[..., 0] = constant
    moved = attend(impl, queries, keys, values, **options)
    torch.testing.assert_close(moved.out, plain.out, rtol=1e-5, atol=1e-5 + 4096 * ROUNDING[impl])
    torch.testing.assert_close(moved.lse - constant, plain.lse, rtol=1e-5, atol=2e-3)
    assert torch.equal(moved.ids, plain.ids) or impl == "triton", "scores are full of ties"
    assert torch.equal(moved.scores - constant, plain.scores)


@pytest.mark.parametrize("impl", IMPLS)
def test_rising_and_falling_maxima(impl):
    """The maximum of a row comes with its last key, or with its first."""
    n = N_KEYS[impl]
    queries, keys, values = states(2, 1, n, n, whole=True)
    queries[..., 0] = torch.tensor([1.0, -1.0])[:, None]
    keys[..., 0] = torch.arange(n)
    check(impl, queries, keys, values, scaling=1.0, sample=every(n, n, STEP[impl]))


# No result depends on how the work is divided


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_blocked_threads_do_not_matter(dtype):
    vectors = states(6, 2, 700, 1100, dtype=dtype)
    one, two = (attend("blocked", *vectors, sample=every(700, 1100), softcap=20.0, threads=n) for n in (1, 2))
    assert_equal(two, one)


def test_blocked_task_rows_do_not_matter(monkeypatch):
    vectors = states(6, 2, 200, 500)
    whole = attend("blocked", *vectors, sample=every(200, 500))
    for rows in (3, 10, 49):
        monkeypatch.setattr(blocked, "_TASK_ROWS", rows)
        assert_equal(attend("blocked", *vectors, sample=every(200, 500)), whole)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full"),
        pytest.param({"sliding_window": 1}, id="window-1"),
        pytest.param({"sliding_window": 200}, id="window-200"),
        pytest.param({"softcap": 3.0}, id="softcap"),
    ],
)
@pytest.mark.parametrize("chunks", [[1, 7, 256, 300], [7], [256], [300]], ids=str)
def test_blocked_chunks_do_not_matter(options, chunks):
    """Fed in chunks whose keys grow, a document gives the bits it gives as a whole."""
    n = 830
    queries, keys, values = states(6, 2, n, n)
    rows = rows_by_head(6, n, 200)
    high = (rows - 20).clamp(min=0)
    whole = attend("blocked", queries, keys, values, sample=sampled(rows, 16, high), **options)
    start, turn = 0, 0
    while start < n:
        stop = min(start + chunks[turn % len(chunks)], n)
        ours = torch.where((rows >= start) & (rows < stop), rows - start, -1)
        chunk = attend(
            "blocked", queries[:, start:stop], keys[:, :stop], values[:, :stop],
            sample=sampled(ours, 16, high), **options,
        )  # fmt: skip
        assert torch.equal(chunk.out, whole.out[:, start:stop])
        assert torch.equal(chunk.lse, whole.lse[:, start:stop])
        assert torch.equal(chunk.ids[ours >= 0], whole.ids[ours >= 0])
        assert torch.equal(chunk.scores[ours >= 0], whole.scores[ours >= 0])
        start, turn = stop, turn + 1


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_agree(impl):
    n, cut = N_KEYS[impl], N_KEYS[impl] // 3
    queries, keys, values = states(2, 1, n, n)
    rows = torch.arange(0, n, STEP[impl])
    early = rows < cut
    whole = attend(impl, queries, keys, values, sample=sampled(rows, 0, n))
    first = attend(impl, queries[:, :cut], keys[:, :cut], values[:, :cut], sample=sampled(rows[early], 0, n))
    second = attend(impl, queries[:, cut:], keys, values, sample=sampled(rows[~early] - cut, 0, n))
    for name in ("out", "lse", "scores"):
        joined = torch.cat([getattr(first, name), getattr(second, name)], dim=1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=2e-5)
    assert torch.equal(torch.cat([first.ids, second.ids], dim=1), whole.ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocked_property(data):
    n_kv, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3, 4]))
    spans, row, key = [], 0, 0
    for _ in range(data.draw(st.integers(1, 3))):
        row, first = row + data.draw(st.integers(0, 5)), key + data.draw(st.integers(0, 5))
        at, rows = first + data.draw(st.integers(0, 300)), data.draw(st.integers(0, 30))
        spans.append(Span(row, row + rows, first, at))
        row, key = row + rows, at + rows
    n_rows, n_keys = row + data.draw(st.integers(0, 5)), key + data.draw(st.integers(0, 5))
    whole = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([FLOAT, HALF, BRAIN]))
    dims = [data.draw(st.sampled_from([8, 16, 24])) for _ in range(2)]
    vectors = states(n_kv * group, n_kv, n_rows, n_keys, *dims, dtype, data.draw(st.integers(0, 9)), whole)
    kept = data.draw(st.integers(0, n_rows))
    by_head = data.draw(st.booleans())
    rows = rows_by_head(n_kv * group if by_head else 1, n_rows, kept)
    rows[:, : data.draw(st.integers(0, kept))] = -1
    low = data.draw(st.integers(-3, n_keys))
    high = low + data.draw(st.integers(0, n_keys))
    options = {
        "spans": spans,
        "sample": sampled(rows if by_head else rows[0], low, high, k=data.draw(st.integers(1, 40))),
        "sliding_window": data.draw(st.sampled_from([0, 1, 5, 100, 300])),
        "softcap": data.draw(st.sampled_from([None, 1.0, 30.0])),
    }
    check("blocked", *vectors, threads=data.draw(st.integers(1, 2)), **options)
