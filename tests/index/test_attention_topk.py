"""Attention with top-k: every implementation against the reference; ties may fall either way."""

from __future__ import annotations

import importlib
import logging
import math

import numpy as np
import pytest
import torch
from attention_cases import IMPLS, NO_TRITON, SCALING, assert_equal, attend, check, rows_by_head, sampled, states
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import ConfigError
from rabatch.index.topk import ATTENTION, Attended, Sample, Span, attention_topk, blocked

pytestmark = [  # NumPy's, under Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
topk_module = importlib.import_module("rabatch.index.topk")
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf
# Several blocks of keys for `blocked`; for the slow interpreter of Triton as few as are two tiles of rows and of keys.
N_HEADS, N_KV = {"blocked": 4, "triton": 2}, {"blocked": 2, "triton": 1}
N_ROWS, N_KEYS = {"blocked": 150, "triton": 40}, {"blocked": 600, "triton": 100}
STEP = {"blocked": 3, "triton": 11}  # from sampled row to sampled row
# Where logits are large, `triton` rounds each of them before it subtracts the maximum.
ROUNDING = {"blocked": 0.0, "triton": 1.2e-7}


def vectors_of(impl, **options):
    """Queries, keys and values for `impl`, the rows the last ones of the keys."""
    return states(N_HEADS[impl], N_KV[impl], N_ROWS[impl], N_KEYS[impl], **options)


def sample_of(impl):
    return every(N_ROWS[impl], N_KEYS[impl], STEP[impl])


def every(n_rows, n_keys, step=3, k=8):
    """Every `step`-th row, all keys."""
    return sampled(range(0, n_rows, step), 0, n_keys, k)


# Shapes


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "n_rows", "n_keys", "head_dim", "value_dim"),
    [
        pytest.param(1, 1, 1, 1, 16, 16, id="one-key"),
        pytest.param(2, 2, 300, 300, 64, 64, id="whole-document"),
        pytest.param(4, 2, 257, 1031, 80, 48, id="group-2-odd-chunk"),
        pytest.param(4, 1, 131, 777, 96, 32, id="group-4"),
        pytest.param(8, 1, 61, 513, 128, 80, id="group-8"),
        pytest.param(8, 2, 1, 3000, 32, 16, id="one-row"),
        pytest.param(2, 1, 40, 520, 256, 128, id="head-dim-256"),
        pytest.param(3, 1, 33, 300, 24, 40, id="dims-of-no-16"),
        pytest.param(6, 2, 400, 1500, 16, 64, id="several-tasks"),
        pytest.param(2, 1, 0, 10, 16, 16, id="no-rows"),
        pytest.param(2, 1, 0, 0, 16, 16, id="nothing"),
    ],
)
def test_blocked_agrees(dtype, n_heads, n_kv, n_rows, n_keys, head_dim, value_dim):
    vectors = states(n_heads, n_kv, n_rows, n_keys, head_dim, value_dim, dtype)
    check("blocked", *vectors, sample=every(n_rows, n_keys, 5))


@NO_TRITON
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "n_rows", "n_keys", "head_dim", "value_dim", "dtype"),
    [
        pytest.param(1, 1, 1, 1, 16, 16, FLOAT, id="one-key"),
        pytest.param(2, 2, 37, 37, 64, 64, HALF, id="whole-document-fp16"),
        pytest.param(4, 2, 19, 131, 80, 48, FLOAT, id="group-2-odd-chunk"),
        pytest.param(4, 1, 9, 77, 96, 32, BRAIN, id="group-4-bf16"),
        pytest.param(8, 1, 11, 67, 128, 80, FLOAT, id="group-8"),
        pytest.param(8, 2, 1, 200, 32, 16, BRAIN, id="one-row-bf16"),
        pytest.param(2, 1, 10, 70, 256, 128, HALF, id="head-dim-256-fp16"),
        pytest.param(2, 1, 0, 10, 16, 16, FLOAT, id="no-rows"),
    ],
)
def test_triton_agrees(n_heads, n_kv, n_rows, n_keys, head_dim, value_dim, dtype):
    vectors = states(n_heads, n_kv, n_rows, n_keys, head_dim, value_dim, dtype)
    check("triton", *vectors, sample=every(n_rows, n_keys, 7))


def test_blocked_takes_queries_of_another_dtype():
    """Float32 queries of 16-bit keys: the queries are not rounded to the keys' dtype, the output is theirs."""
    queries, *rest = states(4, 2, 30, 300, dtype=FLOAT)
    found = check("blocked", queries, *(t.to(BRAIN) for t in rest), sample=every(30, 300))
    assert found.out.dtype == FLOAT


# Samples

SAMPLES = {  # of `n_heads` query heads
    "empty": lambda n_heads, n_rows, n_keys: sampled([], 0, n_keys),
    "all-rows": lambda n_heads, n_rows, n_keys: sampled(range(n_rows), 0, n_keys),
    "last-row": lambda n_heads, n_rows, n_keys: sampled([n_rows - 1], 0, n_keys),
    "no-order": lambda n_heads, n_rows, n_keys: sampled(rows_by_head(1, n_rows, 9)[0], 0, n_keys),
    "by-head": lambda n_heads, n_rows, n_keys: sampled(rows_by_head(n_heads, n_rows, 9), 0, n_keys),
    "with-none": lambda n_heads, n_rows, n_keys: sampled([-1, 3, -1, 0, n_rows - 1, -1], 0, n_keys),
    "none-by-head": lambda n_heads, n_rows, n_keys: sampled([[-1, 3], [2, -1], [-1, -1], [0, 1]][-n_heads:], 0, n_keys),
    "only-none": lambda n_heads, n_rows, n_keys: sampled([-1, -1], 0, n_keys),
    "k-1": lambda n_heads, n_rows, n_keys: sampled(range(0, n_rows, 11), 0, n_keys, k=1),
    "k-beyond-the-keys": lambda n_heads, n_rows, n_keys: sampled(range(0, n_rows, 13), n_keys - 30, n_keys, k=50),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_samples(impl, kind):
    sample = SAMPLES[kind](N_HEADS[impl], N_ROWS[impl], N_KEYS[impl])
    found = check(impl, *vectors_of(impl), sample=sample)
    assert found.ids.shape == (N_HEADS[impl], sample.rows.shape[-1], sample.k)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sample(impl):
    found = check(impl, *vectors_of(impl))
    assert found.ids.shape == found.scores.shape == (N_HEADS[impl], 0, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sample_does_not_change_attention(impl):
    vectors = vectors_of(impl)
    sample = sample_of(impl)
    alone, beside = attend(impl, *vectors), attend(impl, *vectors, sample=sample)
    assert torch.equal(alone.out, beside.out)
    assert torch.equal(alone.lse, beside.lse)


RANGES = {  # of the keys that the row at `positions` may keep
    "static-set": lambda positions, n_keys: (16, positions - 20),
    "empty": lambda positions, n_keys: (40, 40),
    "reversed": lambda positions, n_keys: (60, 30),
    "beyond-the-keys": lambda positions, n_keys: (-5, n_keys + 1000),
    "after-the-row": lambda positions, n_keys: (positions + 1, n_keys),
    "only-itself": lambda positions, n_keys: (positions, positions + 1),
    "inside-a-panel": lambda positions, n_keys: (21, 27),
    "by-row": lambda positions, n_keys: (positions % 50, positions % 50 + positions % 30),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", RANGES)
def test_ranges(impl, kind):
    """Which keys a row may keep; the attention itself takes all of them."""
    n_rows, n_keys = N_ROWS[impl], N_KEYS[impl]
    rows = torch.arange(0, n_rows, STEP[impl])
    sample = sampled(rows, *RANGES[kind](rows + n_keys - n_rows, n_keys))
    found = check(impl, *vectors_of(impl), sample=sample)
    if kind in ("empty", "reversed", "after-the-row"):
        assert (found.ids == -1).all()
    if kind == "only-itself":
        assert torch.equal(found.ids[..., 0], (rows + n_keys - n_rows).int().expand(N_HEADS[impl], -1))


@pytest.mark.parametrize("impl", IMPLS)
def test_ranges_by_head(impl):
    rows = rows_by_head(N_HEADS[impl], N_ROWS[impl], 8)
    low = torch.arange(rows.numel()).reshape(rows.shape)
    check(impl, *vectors_of(impl), sample=sampled(rows, low, low + rows))


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_keys_than_k(impl):
    found = check(impl, *states(2, 1, 20, 20), sample=sampled(range(0, 20, 3), 0, 20, k=30))
    assert torch.equal((found.ids >= 0).sum(-1), torch.arange(1, 21, 3).expand(2, -1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("same", [False, True], ids=["whole-numbers", "equal-keys"])
def test_ties(impl, same):
    queries, keys, values = vectors_of(impl, whole=True)
    if same:
        keys = keys[:, :1].expand_as(keys)
    sample = sampled(range(0, N_ROWS[impl], STEP[impl]), 3, N_KEYS[impl] - 50, k=20)
    found = check(impl, queries, keys, values, sample=sample)
    if impl == "blocked":  # it gives ties to the lower id
        assert torch.equal(found.ids, attend("naive", queries, keys, values, sample=sample).ids)


@pytest.mark.parametrize(
    ("impl", "n_heads", "n_rows"),
    [
        pytest.param("blocked", 4, 256, id="blocked"),
        pytest.param("triton", 1, 8, id="triton", marks=NO_TRITON),
    ],
)
def test_recall_is_1(impl, n_heads, n_rows):
    vectors = states(n_heads, 1, n_rows, 4096, 64)
    sample = sampled(range(0, n_rows, 4), 0, 4096, k=32)
    found, expected = (attend(i, *vectors, sample=sample).ids.sort(dim=-1).values for i in (impl, "naive"))
    assert torch.equal(found, expected)


# Spans

SPANS = {  # over 70 rows and 150 keys, of which some belong to nobody
    "packed": [Span(0, 30, 0, 0), Span(30, 31, 30, 30), Span(31, 70, 31, 111)],
    "chunks": [Span(0, 20, 0, 25), Span(20, 70, 50, 100)],
    "left-padding": [Span(13, 70, 13, 60)],
    "right-padding": [Span(0, 41, 0, 7)],
    "gaps": [Span(3, 20, 5, 9), Span(25, 26, 40, 60), Span(40, 60, 70, 80)],
    "one-row-each": [Span(i, i + 1, 2 * i, 2 * i + 1) for i in range(0, 70, 5)],
    "keys-in-another-order": [Span(0, 30, 100, 110), Span(30, 70, 0, 40)],
    "a-shared-beginning": [Span(0, 30, 0, 50), Span(30, 70, 0, 90)],
    "with-an-empty-one": [Span(0, 30, 0, 0), Span(30, 30, 30, 30), Span(30, 70, 30, 30)],
    "nobody": [],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", SPANS)
def test_spans(impl, kind):
    rows = torch.arange(0, 70, 1 if impl == "blocked" else 6)
    found = check(impl, *states(2, 1, 70, 150), spans=SPANS[kind], sample=sampled(rows, 0, 150))
    alone = torch.ones(70, dtype=torch.bool)
    for span in SPANS[kind]:
        alone[span.row_start : span.row_stop] = False
    assert (found.out[:, alone] == 0).all()
    assert found.lse[:, alone].isneginf().all()
    assert (found.ids[:, alone[rows]] == -1).all()
    assert found.lse[:, ~alone].isfinite().all()


def test_blocked_spans_of_several_blocks():
    spans = [Span(5, 300, 3, 250), Span(300, 301, 700, 1200), Span(310, 600, 1210, 1210)]
    for options in ({}, {"sliding_window": 270}):
        check("blocked", *states(6, 2, 603, 1600), spans=spans, sample=every(603, 1600, 9), **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_span_is_a_document_alone(impl):
    """Packed behind another document, a chunk gives what it gives alone, its ids moved."""
    queries, keys, values = states(2, 1, 70, 150)
    packed = attend(impl, queries, keys, values, spans=SPANS["chunks"], sample=sampled(range(20, 70, 9), 0, 150))
    alone = attend(impl, queries[:, 20:], keys[:, 50:], values[:, 50:], sample=sampled(range(0, 50, 9), 0, 100))
    torch.testing.assert_close(packed.out[:, 20:], alone.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.scores, alone.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.ids, alone.ids + 50)


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


# Windows and soft caps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [1, 50, 300, 10_000])
def test_sliding_windows(impl, window):
    sample = sampled(range(0, N_ROWS[impl], STEP[impl]), 5, N_KEYS[impl])
    found = check(impl, *vectors_of(impl), sliding_window=window, sample=sample)
    assert ((found.ids >= 0).sum(-1) <= window).all()
    full = attend(impl, *vectors_of(impl), sample=sample)
    assert torch.equal(found.lse, full.lse) == (window >= N_KEYS[impl])


def test_blocked_window_leaves_blocks_out():
    """Rows thousands of keys behind the start of their span begin in a later block, aligned to the span."""
    spans = [Span(0, 200, 7, 2000)]
    check("blocked", *states(4, 2, 200, 2300), spans=spans, sliding_window=300, sample=every(200, 2300, 5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(impl, softcap):
    """Bounds the logits, not the scores of the lists."""
    queries, keys, values = vectors_of(impl)
    found = check(impl, 4 * queries, keys, values, softcap=softcap, sample=sample_of(impl))
    assert found.scores.max() > softcap or softcap > 5
    seen = torch.arange(N_ROWS[impl]) + N_KEYS[impl] - N_ROWS[impl] + 1
    assert (found.lse <= softcap + seen.log() + 1e-4).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_with_a_window(impl):
    check(impl, *vectors_of(impl), softcap=2.0, sliding_window=33, sample=sample_of(impl))


# Layouts in memory


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_slices_of_a_longer_cache(impl, dtype):
    """Heads of keys and values lie apart, queries and output have the layout of a projection."""
    n_keys = N_KEYS[impl]
    queries, keys, values = states(4, 2, N_ROWS[impl], n_keys, dtype=dtype)
    options = {"sample": sample_of(impl)}
    expected = attend(impl, queries, keys, values, **options)
    caches = [torch.full((2, n_keys + 100, 16), NAN, dtype=dtype) for _ in range(2)]
    for cache, tensor in zip(caches, (keys, values), strict=True):
        cache[:, 30 : 30 + n_keys] = tensor
    sliced = [cache[:, 30 : 30 + n_keys] for cache in caches]
    strided = queries.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(t.is_contiguous() for t in (*sliced, strided))
    assert_equal(attend(impl, strided, *sliced, **options), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_before_heads(impl):
    """Keys and values as a projection gives them, [tokens, heads, dim], transposed."""
    vectors = vectors_of(impl)
    options = {"sample": sample_of(impl)}
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in vectors]
    assert_equal(attend(impl, *views, **options), attend(impl, *vectors, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_arguments_stay_as_they_were(impl):
    vectors = vectors_of(impl)
    copies = [t.clone() for t in vectors]
    attend(impl, *vectors, softcap=3.0, sample=sample_of(impl))
    assert all(torch.equal(a, b) for a, b in zip(vectors, copies, strict=True))


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
