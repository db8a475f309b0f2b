"""Where searches start: the wanted keys, then the farthest; and what that is for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.config import GraphConfig
from rabatch.index.base import QuerySample
from rabatch.index.entries import choose_entries, most_entries, spread_naive
from rabatch.index.graph import GraphIndex

NONE = np.empty((0, 4), np.int32)


@settings(max_examples=60, deadline=None)
@given(n_keys=st.integers(1, 400), n=st.integers(1, 30), kinds=st.integers(1, 400), seed=st.integers(0, 99))
def test_entries_are_the_farthest_first_traversal(n_keys, n, kinds, seed):
    """Of keys of which some are equal; whole numbers, so that the order of a sum changes no distance."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-9, 10, (kinds, 6)).astype(np.float32)[rng.integers(kinds, size=n_keys)]
    first = int((keys**2).sum(axis=1).argmin())
    found = choose_entries(keys, NONE, n).tolist()
    assert found == spread_naive(keys, [first], most_entries(n_keys, n))
    assert len(np.unique(keys[found], axis=0)) == len(found)


@settings(max_examples=30, deadline=None)
@given(n_queries=st.integers(1, 40), n=st.integers(1, 25), seed=st.integers(0, 99))
def test_wanted_keys_come_first_and_the_farthest_follow(n_queries, n, seed):
    rng = np.random.default_rng(seed)
    keys = rng.permutation(np.arange(4 * 900, dtype=np.float32)).reshape(900, 4)
    lists = rng.integers(900, size=(n_queries, 5)).astype(np.int32)
    found = choose_entries(keys, lists, n).tolist()
    wanted = [key for key in found if key in lists[:, 0]]
    covered = np.isin(lists, wanted).any(axis=1)
    assert len(found) == most_entries(900, n) == n
    assert covered.all() or len(wanted) >= min(n, 16)
    assert found == spread_naive(keys, found[: len(wanted)], n)


def test_small_graphs_have_few_entries():
    assert [most_entries(n, 256) for n in (0, 1, 31, 64, 8192, 1 << 17)] == [0, 1, 1, 2, 256, 256]


def test_what_stands_once_is_found_in_text_that_repeats_itself():
    """Thousands of keys, each almost one of a few, and ten needles: a graph is made of queries for the haystack's
    keys, and the needles are asked for."""
    rng = np.random.default_rng(0)
    dim, n_keys = 32, 6000
    kinds, needles = rng.standard_normal((8, dim)), 1.5 * rng.standard_normal((10, dim))
    keys = kinds[rng.integers(8, size=n_keys)] + 0.05 * rng.standard_normal((n_keys, dim))
    at = np.sort(rng.choice(n_keys, len(needles), replace=False))
    keys[at] = needles
    keys = keys[None].astype(np.float32)
    sampled = (kinds[rng.integers(8, size=500)] + 0.05 * rng.standard_normal((500, dim))).astype(np.float32)
    samples = [QuerySample(np.argsort(-(sampled @ keys[0].T), axis=1)[:, :32].astype(np.int32), sampled)]

    def needles_found(config):
        found = GraphIndex.build(keys, samples, config=config).search(keys[:, at], k=20, effort=40)
        return int((found.ids[0, :, 0] == at).sum())

    assert needles_found(GraphConfig()) == 10
    assert needles_found(GraphConfig(entry_points=8)) < 10  # where queries are at home, and nowhere else
