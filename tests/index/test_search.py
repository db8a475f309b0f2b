"""Graph search: the kernel is the reference, the full budget is everything, and held-out queries find their keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError
from rabatch.index import search_naive
from rabatch.index.graph import build_graph
from rabatch.index.search import GraphLayerIndex, search_graph
from rabatch.index.stress import stressed_vectors
from rabatch.index.topk import topk


def small_layer(n_kv=2, n_keys=300, n_queries=7, seed=0):
    """Vectors of small integers: scores are exact in float32 and full of ties."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-2, 3, (n_kv, n_keys, 6)).astype(np.float32)
    queries = rng.integers(-2, 3, (n_kv, n_queries, 6)).astype(np.float32)
    config = GraphConfig(degree=8, key_neighbors=3, entry_points=4)
    neighbors = np.full((n_kv, n_keys, 8), -1, np.int32)
    entries = np.full((n_kv, 4), -1, np.int32)
    for head in range(n_kv):
        scores = rng.integers(-2, 3, (40, 6)) @ keys[head].T
        lists = np.argsort(-scores, axis=1)[:, :6].astype(np.int32)
        graph = build_graph(keys[head], lists, config=config)
        neighbors[head], entries[head, : len(graph.entries)] = graph.neighbors, graph.entries
    return keys, neighbors, entries, queries


@pytest.mark.parametrize(("k", "search_list"), [(1, 1), (5, 5), (5, 20), (30, 10), (20, 64), (300, 300), (400, 500)])
@pytest.mark.parametrize("threads", [1, 3])
def test_kernel_equals_reference(k, search_list, threads):
    keys, neighbors, entries, queries = small_layer()
    result = search_graph(keys, neighbors, entries, queries, k=k, search_list=search_list, threads=threads)
    for head in range(2):
        for row, query in enumerate(queries[head]):
            ids, scores, scored = search_naive.search_graph(
                keys[head], neighbors[head], entries[head], query, k=k, search_list=search_list
            )
            padding = [-1] * (k - len(ids))
            assert result.ids[head, row].tolist() == ids + padding
            assert result.scores[head, row, : len(scores)].tolist() == scores
            assert np.isneginf(result.scores[head, row, len(scores) :]).all()
            assert result.visited[head, row] == scored


@pytest.mark.parametrize("n_keys", [1, 2, 5, 63, 64, 65, 200])
def test_full_budget_returns_every_key(n_keys):
    keys, neighbors, entries, queries = small_layer(n_keys=n_keys)
    found = search_graph(keys, neighbors, entries, queries, k=n_keys, search_list=n_keys)
    short_cut = GraphLayerIndex(keys, neighbors, entries, search_list=1).search(queries, k=n_keys)
    for result in (found, short_cut):
        assert (np.sort(result.ids, axis=-1) == np.arange(n_keys)).all()
        assert (result.visited == n_keys).all()
    np.testing.assert_array_equal(found.scores, short_cut.scores)


def test_nothing_to_search():
    empty = np.zeros((2, 0, 6), np.float32)
    index = GraphLayerIndex(empty, np.zeros((2, 0, 8), np.int32), np.full((2, 4), -1, np.int32), search_list=9)
    result = index.search(np.ones((2, 3, 6), np.float32), k=5)
    assert (result.ids == -1).all()
    assert index.n_keys == 0
    keys, neighbors, entries, queries = small_layer()
    assert GraphLayerIndex(keys, neighbors, entries, search_list=9).search(queries[:, :0], k=5).ids.shape == (2, 0, 5)


def test_read_only_arrays_and_concurrent_searches():
    arrays = small_layer(n_queries=50)
    for array in arrays:
        array.flags.writeable = False
    *stored, queries = arrays
    index = GraphLayerIndex(*stored, search_list=20, threads=2)
    expected = index.search(queries, k=10)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: index.search(queries, k=10), range(20)):
            np.testing.assert_array_equal(result.ids, expected.ids)


def test_a_query_does_not_depend_on_its_batch():
    keys, neighbors, entries, queries = small_layer(n_queries=6)
    index = GraphLayerIndex(keys, neighbors, entries, search_list=20)
    whole = index.search(queries, k=10)
    for row in range(6):
        np.testing.assert_array_equal(index.search(queries[:, row : row + 1], k=10).ids[:, 0], whole.ids[:, row])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"keys": np.zeros((2, 300, 6))}, "keys"),
        ({"neighbors": np.zeros((2, 299, 8), np.int32)}, "neighbors"),
        ({"neighbors": np.full((2, 300, 8), 300, np.int32)}, "neighbors"),
        ({"entries": np.full((2, 4), -2, np.int32)}, "entries"),
        ({"search_list": 0}, "search_list"),
        ({"threads": 0}, "threads"),
    ],
)
def test_errors_name_the_field(change, field):
    keys, neighbors, entries, queries = small_layer()
    arguments = {"keys": keys, "neighbors": neighbors, "entries": entries, "search_list": 9, **change}
    with pytest.raises(ConfigError) as error:
        GraphLayerIndex(**arguments).search(queries, k=3)
    assert error.value.field == field


@pytest.fixture(scope="module")
def stressed():
    """8K keys, 6K sampled queries and 200 held-out ones, and everyone's exact top-100."""
    queries, keys = stressed_vectors(8192, 6200)
    positions = torch.full((len(queries),), len(keys))
    ids, _ = topk(torch.from_numpy(queries[None]), torch.from_numpy(keys[None]), positions, k=100)
    return queries, keys, ids[0].numpy()


def recall(found, truth):
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1]


def test_recall_of_held_out_queries(stressed):
    queries, keys, truth = stressed
    graph = build_graph(keys, np.ascontiguousarray(truth[:6000, :32]), config=GraphConfig())
    index = GraphLayerIndex(keys[None], graph.neighbors[None], graph.entries[None], search_list=256)
    result = index.search(queries[None, 6000:], k=100)
    assert recall(result.ids[0], truth[6000:]) >= 0.9
    assert result.visited.mean() < 0.25 * len(keys)


def test_the_data_defeats_an_index_of_distances(stressed):
    queries, keys, truth = stressed
    faiss.omp_set_num_threads(1)
    hnsw = faiss.IndexHNSWFlat(keys.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(keys)
    hnsw.hnsw.efSearch = 256
    assert recall(hnsw.search(queries[6000:], 100)[1], truth[6000:]) < 0.6
