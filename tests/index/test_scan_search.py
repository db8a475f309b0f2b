"""The kernels of the scan against NumPy."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.compiling import FAST
from rabatch.index import lookup, scan_search
from rabatch.index.alignment import Alignment
from rabatch.index.base import QuerySample
from rabatch.index.codes import encode
from rabatch.index.scan import ScanIndex
from rabatch.index.scan_naive import scan, sums_of, tables_of


def kernel(function):
    """As `rabatch.index.compiled.compiled`, without the cache: it would not notice a change in another file."""
    return numba.njit(fastmath=FAST)(function)


@kernel
def all_sums(codes, tables, n_bytes, n_keys, per_group, sums, maxima):
    lookup.sum_lookups(codes, tables, n_bytes, n_keys, per_group, sums, maxima)


@kernel
def above(sums, at, bar):
    return lookup.above_sums(sums, at, bar)


def twice(tables):
    """As the kernel reads tables: 16 numbers two times, an even number of codes."""
    even = np.pad(tables, ((0, len(tables) % 2), (0, 0)))
    return np.repeat(even[:, None], 2, axis=1).reshape(-1).copy()


@pytest.mark.parametrize("n_queries", [1, 2, 3, 4])
@pytest.mark.parametrize("n_codes", [1, 2, 7, 32, 64, 129])
@pytest.mark.parametrize(("n_keys", "per_group"), [(1, 1), (31, 2), (64, 1), (100, 2), (300, 4)])
def test_lookups_are_added(n_codes, n_keys, per_group, n_queries):
    rng = np.random.default_rng(n_codes * n_keys)
    n_bytes = -(-n_codes // 2)
    codes = rng.integers(0, 256, (n_keys, n_bytes), np.uint8)
    tables = rng.integers(0, lookup.MAX_LEVEL + 1, (n_queries, n_codes, 16), np.uint8)
    tables[:, :, 3] = lookup.MAX_LEVEL
    codes[0] = 0x33  # the greatest sum there can be
    blocks, whole = -(-n_keys // 32), n_keys // 32
    sums = np.full((n_queries, blocks * 32), -9, np.int16)
    maxima = np.full((n_queries, -(-blocks // per_group) * 32 + 32), 60, np.int16)
    pairs = np.stack([twice(of_query) for of_query in tables])
    all_sums(lookup.blocked(codes), pairs, n_bytes, n_keys, per_group, sums, maxima)
    for of_query, found, most in zip(tables, sums, maxima, strict=True):
        np.testing.assert_array_equal(found[:n_keys], sums_of(of_query, codes))
        assert found[0] == n_codes * lookup.MAX_LEVEL
        for group in range(len(most) // 32 - 1):
            members = found[group * per_group * 32 : min(group + 1, whole) * per_group * 32][
                : (whole - group * per_group) * 32
            ]
            expected = members.reshape(-1, 32).max(axis=0, initial=60)
            np.testing.assert_array_equal(most[group * 32 : group * 32 + 32], expected)


def test_bits_of_what_is_above():
    sums = np.array([5, 6, 7, -1, 32767, 0, *[6] * 26, 9], np.int16)
    assert above(sums, 0, np.int16(6)) == 0b10100
    assert above(sums, 1, np.int16(8)) == 0b1000 | 1 << 31
    assert above(sums, 0, np.int16(-1)) == (1 << 32) - 1 - 0b1000


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(-1, 32766), min_size=1, max_size=50), wanted=st.integers(1, 60))
def test_the_greatest_bar(numbers, wanted):
    bar = scan_search.greatest_bar(np.array(numbers, np.int16), wanted)
    assert bar == -1 or sum(number > bar for number in numbers) >= wanted
    assert sum(number > bar + 1 for number in numbers) < wanted


def test_the_greatest_bar_of_more_numbers_than_16_bits_count():
    numbers = np.arange(100_000) % 1000
    assert scan_search.greatest_bar(numbers.astype(np.int16), 50_000) == 499


@pytest.mark.parametrize("n_codes", [1, 3, 32, 200])
def test_tables(n_codes):
    rng = np.random.default_rng(n_codes)
    query = rng.integers(-3, 4, 2 * n_codes).astype(np.float32)
    books = rng.integers(-9, 10, (n_codes, 16, 2)).astype(np.float32)
    tables = np.empty(64 * -(-n_codes // 2), np.uint8)
    scan_search.fill_tables(query, books, tables)
    expected = twice(tables_of(query, books))
    assert np.abs(tables.astype(int) - expected).max() <= 1  # rounding of what lies halfway
    assert (tables != expected).mean() < 0.02
    assert expected.reshape(-1, 2, 16).max(axis=(1, 2)).astype(int).sum() <= 32767
    scan_search.fill_tables(np.zeros_like(query), books, tables)
    assert not tables.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("n_keys", "dim"), [(1024, 8), (1500, 7), (5000, 16)])
@pytest.mark.parametrize(("k", "effort"), [(1, 1), (10, 40), (33, 700)])
def test_scan_equals_the_reference(n_keys, dim, k, effort, dtype):
    """Small whole numbers, so that sums are exact and full of ties."""
    rng = np.random.default_rng(n_keys + dim)
    n_codes = -(-dim // 2)
    raw = rng.integers(-4, 5, (2, n_keys, dim)).astype(np.float32)
    keys = encode(raw, dtype)
    codes = rng.integers(0, 256, (2, n_keys, -(-n_codes // 2)), np.uint8)
    books = rng.integers(-3, 4, (2, n_codes, 16, 2)).astype(np.float32)
    exceptions = np.stack([rng.choice(n_keys, 20, replace=False) for _ in range(2)]).astype(np.int32)
    exceptions[1, 7:] = -1
    plain = Alignment(np.zeros(dim, np.float32), *[np.eye(dim, dtype=np.float32)] * 2)
    index = ScanIndex(keys, codes, books, exceptions, [plain] * 2, threads=2)
    queries = rng.integers(-1, 2, (2, 9, dim)).astype(np.float32)
    queries[:, 0] = 0
    found = index.search(queries, k=k, effort=effort)
    for head in range(2):
        for row, query in enumerate(queries[head]):
            aligned = np.pad(query, (0, dim % 2))
            arguments = codes[head], books[head], exceptions[head], keys, head
            ids, scores = scan(query, aligned, *arguments, k=k, effort=effort)
            np.testing.assert_allclose(found.scores[head, row], scores, atol=0.02 if dtype == "int8" else 1e-5)
            if dtype != "int8":  # whose scores have no exact ties
                np.testing.assert_array_equal(found.ids[head, row], ids)


def test_the_scan_finds_what_attention_looks_for():
    """Far above chance, which is 1 %: the codes of a key are those that its tables are looked up by."""
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((1, 20_000, 32)).astype(np.float32)
    queries = rng.standard_normal((1, 60, 32)).astype(np.float32)
    exact = np.argsort(-np.einsum("hqd,hkd->hqk", queries, keys), axis=2)[:, :, :10]
    index = ScanIndex.build(keys, [QuerySample(exact[0, :30].astype(np.int32), queries[0, :30])])
    found = index.search(queries[:, 30:], k=10, effort=200)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.ids[0], exact[0, 30:], strict=True)]
    assert np.mean(shares) > 0.7
