"""The search kernel is its reference, whatever the keys are stored as."""

from __future__ import annotations

import numpy as np
import pytest
from index_samples import samples_of, stressed_layer

from rabatch.config import GraphConfig
from rabatch.index import search_naive
from rabatch.index.codes import DTYPES, encode
from rabatch.index.graph import build_layer
from rabatch.index.links import build_graph
from rabatch.index.search import search_graph

DIM = 6


def small_layer(n_kv=2, n_keys=300, n_queries=7, seed=0):
    """Vectors of small integers: every dtype holds them exactly (int8: step 1 about 3), and scores are full of ties."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-2, 3, (n_kv, n_keys, DIM)).astype(np.float32)
    keys[:, :1], keys[:, 1:2] = -124, 130
    queries = rng.integers(-2, 3, (n_kv, n_queries, DIM)).astype(np.float32)
    config = GraphConfig(degree=8, key_neighbors=3, entry_points=4)
    neighbors = np.full((n_kv, n_keys, 8), -1, np.int32)
    entries = np.full((n_kv, 4), -1, np.int32)
    for head in range(n_kv):
        scores = rng.integers(-2, 3, (40, DIM)) @ keys[head].T
        lists = np.argsort(-scores, axis=1)[:, :6].astype(np.int32)
        graph = build_graph(keys[head], lists, config=config)
        neighbors[head], entries[head, : len(graph.entries)] = graph.neighbors, graph.entries
    return keys, neighbors, entries, queries


def assert_is_reference(layer, *, dtype="float32", k, search_list, beta=None, threads=1):
    keys, neighbors, entries, queries = layer
    codes = encode(keys, dtype)
    np.testing.assert_array_equal(codes.decode(), keys)
    result = search_graph(codes, neighbors, entries, queries, k=k, search_list=search_list, beta=beta, threads=threads)
    for head, row in np.ndindex(queries.shape[:2]):
        ids, scores, scored = search_naive.search_graph(
            keys[head],
            neighbors[head],
            entries[head],
            queries[head, row],
            k=k,
            search_list=search_list,
            beta=None if beta is None else float(beta[head]),
        )
        assert result.ids[head, row].tolist() == ids + [-1] * (k - len(ids))
        assert result.scores[head, row].tolist() == scores + [-np.inf] * (k - len(ids))
        assert result.visited[head, row] == result.distances[head, row] == scored


@pytest.mark.parametrize(("k", "search_list"), [(1, 1), (5, 5), (5, 20), (30, 10), (20, 64), (300, 300), (400, 500)])
@pytest.mark.parametrize("threads", [1, 3])
def test_kernel_equals_reference(k, search_list, threads):
    assert_is_reference(small_layer(), k=k, search_list=search_list, threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "search_list", "beta"), [(5, 20, None), (40, 7, None), (40, 7, 4.5)])
def test_kernel_equals_reference_for_every_dtype(dtype, k, search_list, beta):
    beta = None if beta is None else np.array([beta, 2 * beta], np.float32)
    assert_is_reference(small_layer(seed=3), dtype=dtype, k=k, search_list=search_list, beta=beta)


@pytest.mark.parametrize(
    "beta",
    [(0.0, 0.0), (1.0, 3.0), (2.5, 0.5), (8.0, 0.0), (1e6, 1.0), (np.inf, np.inf)],
    ids="beta {0[0]} {0[1]}".format,
)
@pytest.mark.parametrize(("k", "search_list"), [(1, 1), (50, 1), (50, 10), (10, 50), (280, 3)])
def test_kernel_with_beta_equals_reference(beta, k, search_list):
    assert_is_reference(small_layer(seed=5), k=k, search_list=search_list, beta=np.array(beta, np.float32))


@pytest.mark.parametrize(("k", "search_list"), [(50, 1), (50, 10), (10, 50)])
def test_infinite_beta_is_no_limit(k, search_list):
    keys, neighbors, entries, queries = small_layer(seed=6)
    arguments = (encode(keys), neighbors, entries, queries)
    without = search_graph(*arguments, k=k, search_list=search_list)
    infinite = search_graph(*arguments, k=k, search_list=search_list, beta=np.full(2, np.inf, np.float32))
    zero = search_graph(*arguments, k=k, search_list=search_list, beta=np.zeros(2, np.float32))
    np.testing.assert_array_equal(infinite.ids, without.ids)
    np.testing.assert_array_equal(infinite.visited, without.visited)
    assert (zero.visited <= without.visited).all()
    assert (zero.visited < without.visited).any() == (k > search_list)


def test_beta_adapts_the_work_to_the_query():
    """A query with one key far above the rest is done soon; one with many near its best key is not."""
    queries, keys = stressed_layer(3000, 601, head_dim=32)
    graph = build_layer(keys, samples_of(queries[:, :600], keys), config=GraphConfig(entry_points=16))[0]
    tested = queries[:, 600:]
    sharp, blunt = 8 * tested, tested / 8
    arguments = (encode(keys), graph.neighbors[None], graph.entries[None])

    def visited(query, beta):
        beta = np.array([beta], np.float32)
        return int(search_graph(*arguments, query, k=400, search_list=10, beta=beta).visited[0, 0])

    assert visited(sharp, 5.0) < visited(blunt, 5.0) / 2
    assert visited(sharp, 5.0) < visited(sharp, 500.0) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_keys", [2, 5, 63, 64, 65, 200])
def test_full_budget_returns_every_key(n_keys, dtype):
    keys, neighbors, entries, queries = small_layer(n_keys=n_keys)
    found = search_graph(encode(keys, dtype), neighbors, entries, queries, k=n_keys, search_list=n_keys)
    assert (np.sort(found.ids, axis=-1) == np.arange(n_keys)).all()
    assert (found.visited == n_keys).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_links_changes_nothing(seed):
    """They are stored in ascending order. Scores without ties: which of equal keys is kept may depend on it."""
    rng = np.random.default_rng(seed)
    keys, queries = (rng.standard_normal((2, n, 16)).astype(np.float32) for n in (500, 9))
    samples = [np.argsort(-(rng.standard_normal((60, 16)) @ head.T), axis=1)[:, :12].astype(np.int32) for head in keys]
    graphs = [build_graph(head, lists, config=GraphConfig()) for head, lists in zip(keys, samples, strict=True)]
    neighbors, entries = (np.stack([getattr(graph, name) for graph in graphs]) for name in ("neighbors", "entries"))
    mixed = rng.permuted(neighbors, axis=2)
    found, other = (search_graph(encode(keys), n, entries, queries, k=20, search_list=40) for n in (neighbors, mixed))
    assert not np.array_equal(neighbors, mixed)
    for name in ("ids", "scores", "visited"):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
