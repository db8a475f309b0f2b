"""Calls of `attention_topk` made from a seed, and what counts as the same answer."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from rabatch.index.topk import Attended, Sample, Span, attention_topk

NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
IMPLS = ["blocked", pytest.param("triton", marks=NO_TRITON)]
SCALING = 0.25  # a power of two: scores of whole numbers are exact, so ties are

# Of one result against the other, (rtol, atol): attention in the dtype of the queries, all else in float32.
OUT = {torch.float32: (1e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1e-2)}
LSE = (1e-5, 5e-5)
SCORES = (1e-5, 2e-5)


def states(n_heads, n_kv, n_rows, n_keys, head_dim=16, value_dim=16, dtype=torch.float32, seed=0, whole=False):
    """Queries, keys and values, normal; as `whole` numbers the scores are exact and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n_heads, n_rows, head_dim), (n_kv, n_keys, head_dim), (n_kv, n_keys, value_dim)
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    if whole:
        queries, keys = queries.round(), keys.round()
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def sampled(rows, low, high, k=8):
    """A sample whose rows (a list, a list for each head, or a tensor) may keep the keys low .. high - 1."""
    rows = torch.as_tensor(rows, dtype=torch.int64)
    return Sample(rows, *(torch.as_tensor(bound).expand(rows.shape).to(torch.int64) for bound in (low, high)), k)


def rows_by_head(n_heads, n_rows, n_sampled, seed=0):
    """Other rows for every head, in no order: int64 [n_heads, n_sampled]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n_rows, generator=generator)[:n_sampled] for _ in range(n_heads)])


def attend(impl, queries, keys, values, *, sample=None, **options):
    """`attention_topk` where `impl` runs, its result on the CPU."""
    options = {"scaling": SCALING, **options}
    if impl == "triton" and torch.cuda.is_available():
        queries, keys, values = (tensor.cuda() for tensor in (queries, keys, values))
    return Attended(*(t.cpu() for t in attention_topk(queries, keys, values, sample=sample, impl=impl, **options)))


def assert_equal(found, expected):
    """The same bits, NaN equal to NaN."""
    for name in Attended._fields:
        ours, theirs = getattr(found, name), getattr(expected, name)
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert same.all(), f"{name} differs in {int((~same).sum())} of {same.numel()}"


def assert_same(found, expected, queries, keys, sample=None, scaling=SCALING, slack=0.0):
    """The same attention, within `slack` more; lists of equal scores, their ids distinct and each worth its score."""
    dtype, n_heads = queries.dtype, len(queries)
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.int32, torch.float32]
    assert [t.shape for t in found] == [t.shape for t in expected]
    (out_r, out_a), (lse_r, lse_a), (score_r, score_a) = OUT[dtype], LSE, SCORES
    torch.testing.assert_close(found.out, expected.out, rtol=out_r, atol=out_a + slack)
    torch.testing.assert_close(found.lse, expected.lse, rtol=lse_r, atol=lse_a)
    torch.testing.assert_close(found.scores, expected.scores, rtol=score_r, atol=score_a)
    if sample is None or not found.ids.numel():
        return
    assert torch.equal(found.ids < 0, expected.ids < 0)
    assert torch.equal(found.ids < 0, found.scores.isneginf())
    assert (found.ids >= -1).all()
    assert (found.scores.diff(dim=-1).nan_to_num(0) <= 0).all(), "best first"
    real = found.ids >= 0
    rows = sample.rows.expand(n_heads, -1).clamp(min=0)
    ours = queries.float().gather(1, rows[..., None].expand(-1, -1, queries.shape[2]))
    products = scaling * ours @ keys.float().repeat_interleave(n_heads // len(keys), 0).transpose(1, 2)
    worth = products.gather(2, found.ids.clamp(min=0).long())
    torch.testing.assert_close(worth[real], found.scores[real], rtol=score_r, atol=score_a)
    in_order = found.ids.sort(dim=-1).values
    assert not (in_order.diff(dim=-1).eq(0) & (in_order[..., 1:] >= 0)).any(), "no id twice"


def check(impl, queries, keys, values, *, sample=None, slack=0.0, **options):
    """`impl` gives what the reference gives, and keeps no key that a row may not; returns its result."""
    found = attend(impl, queries, keys, values, sample=sample, **options)
    n_keys, k = keys.shape[1], found.ids.shape[2]
    all_keys = None if sample is None else replace(sample, k=max(n_keys, k))
    expected = attend("naive", queries, keys, values, sample=all_keys, **options)
    may = expected.ids.long()
    expected = expected._replace(ids=expected.ids[..., :k], scores=expected.scores[..., :k])
    assert_same(found, expected, queries, keys, sample, options.get("scaling", SCALING), slack)
    if sample is not None and found.ids.numel():
        allowed = torch.zeros((*may.shape[:2], n_keys + 1), dtype=torch.bool)
        allowed.scatter_(2, torch.where(may < 0, n_keys, may), True)
        assert allowed.gather(2, found.ids.clamp(min=0).long())[found.ids >= 0].all(), "a key the row may not keep"
    return found


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
