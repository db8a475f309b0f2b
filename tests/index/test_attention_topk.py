"""Attention with top-k: every implementation against the reference; ties may fall either way."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    IMPLS,
    N_HEADS,
    N_KEYS,
    N_ROWS,
    NO_TRITON,
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

from rabatch.index.topk import Span

pytestmark = [  # NumPy's, under Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf


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
