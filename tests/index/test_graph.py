"""The graph index: what it refuses, its corner cases, and held-out queries that find their keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from index_samples import recall, samples_of, stressed_layer, top_lists

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError, IntegrityError, KeysError
from rabatch.index.base import QuerySample
from rabatch.index.codes import encode
from rabatch.index.graph import GraphIndex, build_layer, thinned

CONFIG = GraphConfig(degree=8, key_neighbors=3, entry_points=4)


def random_layer(n_keys=300, n_queries=7, n_heads=2, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((n_heads, n_keys, dim)).astype(np.float32)
    queries = rng.standard_normal((n_heads, n_queries, dim)).astype(np.float32)
    sampled = rng.standard_normal((n_heads, 40, dim)).astype(np.float32)
    return keys, samples_of(sampled, keys, 8), queries


def parts(n_keys=300):
    """Arguments of the constructor."""
    keys, samples, queries = random_layer(n_keys)
    graphs = build_layer(keys, samples, config=CONFIG)
    neighbors, entries = (np.stack([getattr(g, name) for g in graphs]) for name in ("neighbors", "entries"))
    return keys, neighbors, entries, queries


@pytest.mark.parametrize("n_keys", [1, 2, 5, 65])
def test_full_budget_returns_every_key(n_keys):
    keys, samples, queries = random_layer(n_keys)
    index = GraphIndex.build(keys, samples, config=CONFIG, search_list=1)
    for effort in (0, n_keys):
        result = index.search(queries, k=n_keys, effort=effort)
        assert (np.sort(result.ids, axis=-1) == np.arange(n_keys)).all()
        assert (result.visited == n_keys).all()


def test_nothing_to_search():
    keys, samples, queries = random_layer(0)
    index = GraphIndex.build(keys, samples, config=CONFIG)
    assert (index.n_heads, index.n_keys) == (2, 0)
    assert (index.search(queries, k=5).ids == -1).all()
    keys, samples, queries = random_layer()
    assert GraphIndex.build(keys, samples, config=CONFIG).search(queries[:, :0], k=5).ids.shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_read_only_arrays_and_concurrent_searches(dtype):
    keys, samples, queries = random_layer(n_queries=50)
    keys.flags.writeable = queries.flags.writeable = False
    index = GraphIndex.build(keys, samples, config=CONFIG, dtype=dtype, exact="float32", threads=2)
    with ThreadPoolExecutor(4) as pool:
        expected = index.search(queries, k=10)
        for result in pool.map(lambda _: index.search(queries, k=10), range(20)):
            np.testing.assert_array_equal(result.ids, expected.ids)


def test_search_list_is_the_default_effort():
    keys, neighbors, entries, queries = parts()
    narrow, wide = (GraphIndex(encode(keys), neighbors, entries, search_list=n) for n in (3, 100))
    assert narrow.search(queries, k=3).visited.sum() < wide.search(queries, k=3).visited.sum()
    same = narrow.search(queries, k=3, effort=100)
    np.testing.assert_array_equal(same.visited, wide.search(queries, k=3).visited)
    by_k = GraphIndex(encode(keys), neighbors, entries).search(queries, k=5)
    np.testing.assert_array_equal(by_k.visited, narrow.search(queries, k=5, effort=10).visited)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"neighbors": np.zeros((2, 299, 8), np.int32)}, "neighbors", id="rows"),
        pytest.param({"neighbors": np.zeros((2, 300, 8), np.int64)}, "neighbors", id="dtype"),
        pytest.param({"neighbors": np.full((2, 300, 8), 300, np.int32)}, "neighbors", id="link-past-the-end"),
        pytest.param({"entries": np.full((2, 4), -2, np.int32)}, "entries", id="entry-below-none"),
        pytest.param({"entries": np.zeros((3, 4), np.int32)}, "entries", id="heads-of-entries"),
        pytest.param({"exact": encode(np.zeros((2, 300, 5), np.float32))}, "exact", id="exact-of-other-keys"),
        pytest.param({"search_list": -1}, "search_list", id="search_list"),
        pytest.param({"threads": 0}, "threads", id="threads"),
    ],
)
def test_errors_name_the_field(change, field):
    keys, neighbors, entries, queries = parts()
    arguments = {"keys": encode(keys), "neighbors": neighbors, "entries": entries, "search_list": 9, **change}
    with pytest.raises(ConfigError) as error:
        GraphIndex(**arguments).search(queries, k=3)
    assert error.value.field == field


def test_selected_heads_are_searched_alike():
    keys, samples, queries = random_layer(n_heads=3)
    index = GraphIndex.build(keys, samples, config=CONFIG, dtype="int8", exact="float32")
    selected, whole = index.select([2, 0], [0, 0]).search(queries[[2, 0]], k=5), index.search(queries, k=5)
    np.testing.assert_array_equal(selected.ids, whole.ids[[2, 0]])
    np.testing.assert_array_equal(selected.scores, whole.scores[[2, 0]])
    index.select([1], [0]).insert(keys[1:2, :3])
    assert index.n_keys == 300


def test_samples_of_other_keys_are_refused():
    keys, neighbors, entries, _ = parts()
    samples = [QuerySample(np.full((3, 2), 300, np.int32), np.zeros((3, 6), np.float32))] * 2
    with pytest.raises(KeysError, match="KV head 0"):
        GraphIndex(encode(keys), neighbors, entries, samples=samples)


def test_a_table_without_its_entries_is_refused():
    keys, samples, _ = random_layer()
    table = GraphIndex.build(keys, samples, config=CONFIG).to_arrow()
    metadata = {name: value for name, value in table.schema.metadata.items() if b"entries" not in name}
    with pytest.raises(IntegrityError, match="entries"):
        GraphIndex.from_arrow(table.replace_schema_metadata(metadata), keys)


def test_heads_are_built_independently():
    keys, samples, _ = random_layer(n_heads=3)
    together = build_layer(keys, samples, config=CONFIG, threads=2)
    for head in range(3):
        alone = build_layer(keys[head : head + 1], samples[head : head + 1], config=CONFIG)[0]
        np.testing.assert_array_equal(alone.neighbors, together[head].neighbors)
        np.testing.assert_array_equal(alone.entries, together[head].entries)


@pytest.mark.parametrize(("n", "rows"), [(0, []), (1, [0]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_thinned_keeps_queries_with_their_lists(n, rows):
    topk = np.arange(14, dtype=np.int32).reshape(7, 2)
    queries = np.arange(15, dtype=np.float32).reshape(5, 3)  # of the last two lists the vectors are not known
    kept = thinned(QuerySample(topk, queries), n)
    np.testing.assert_array_equal(kept.topk, topk[rows])
    np.testing.assert_array_equal(kept.queries, queries[rows])
    unknown = QuerySample(topk)
    assert thinned(unknown, n) is unknown


@pytest.fixture(scope="module")
def stressed():
    """4K keys, 3K sampled queries and 200 held-out ones with their exact top-50."""
    queries, keys = stressed_layer(4096, 3200)
    return keys, samples_of(queries[:, :3000], keys), queries[:, 3000:], top_lists(queries[0, 3000:], keys[0], 50)


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        pytest.param("float32", None, id="float32"),
        pytest.param("bfloat16", None, id="bfloat16"),
        pytest.param("int8", None, id="int8"),
        pytest.param("int8", "bfloat16", id="int8-bfloat16"),
    ],
)
def test_recall_of_held_out_queries(stressed, dtype, exact):
    keys, samples, tested, truth = stressed
    index = GraphIndex.build(keys, samples, dtype=dtype, exact=exact)
    result = index.search(tested, k=50, effort=128)
    assert recall(result.ids[0], truth) >= 0.9
    assert result.visited.mean() < 0.3 * 4096


def test_the_data_defeats_an_index_of_distances(stressed):
    keys, _, tested, truth = stressed
    faiss.omp_set_num_threads(1)
    hnsw = faiss.IndexHNSWFlat(keys.shape[2], 16, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(keys[0])
    hnsw.hnsw.efSearch = 128
    assert recall(hnsw.search(tested[0], 50)[1], truth) < 0.6
