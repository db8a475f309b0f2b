"""Keys inserted into a graph: reachable, found, and with links as sound as those that were built."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from index_samples import recall, samples_of, stressed_layer, top_lists

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError, KeysError
from rabatch.index.base import QuerySample
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.insertion import Growing
from rabatch.index.links import unreachable
from rabatch.index.scan import ScanIndex

CONFIG = GraphConfig(degree=8, key_neighbors=3, entry_points=4)
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8-exact": {"dtype": "int8", "exact": "float32"},
}
all_kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def random_keys(n_keys, n_heads=2, dim=7, seed=0):
    return np.random.default_rng(seed).standard_normal((n_heads, n_keys, dim)).astype(np.float32)


def build(keys, n_queries=60, length=9, **options):
    samples = samples_of(random_keys(n_queries, len(keys), keys.shape[2], seed=1), keys, length)
    return GraphIndex.build(keys, samples, **{"config": CONFIG, **options})


def grown(keys, stops, **options):
    """An index of the first keys, into which the others are inserted up to each of `stops`."""
    index = build(keys[:, : stops[0]], **options)
    for stop in stops[1:]:
        index.insert(keys[:, index.n_keys : stop])
    return index


def assert_sound(index):
    """Every key can be reached, is linked to the keys before and after it, and never to itself."""
    n_keys = index.n_keys
    assert index.neighbors.shape[:2] == (index.n_heads, n_keys)
    for neighbors, entries in zip(index.neighbors, index.entries, strict=True):
        assert unreachable(neighbors, entries).tolist() == []
        assert ((neighbors >= -1) & (neighbors < n_keys)).all()
        for key, row in enumerate(neighbors):
            links = row[row >= 0].tolist()
            assert key not in links
            assert {key - 1, key + 1} & set(range(n_keys)) <= set(links)


@all_kinds
@pytest.mark.parametrize("degree", [4, 5, 8, 33])
@pytest.mark.parametrize(
    "stops",
    [(0, 1), (0, 1, 2, 3, 50), (0, 77), (1, 2), (1, 60), (2, 3, 4), (2, 90), (3, 3, 40), (70, 71), (70, 140, 141, 190)],
    ids=lambda stops: "-".join(map(str, stops)),
)
def test_every_key_can_be_reached(stops, degree, options):
    config = GraphConfig(degree=degree, key_neighbors=2, entry_points=3)
    keys = random_keys(stops[-1])
    index = grown(keys, stops, config=config, **options)
    assert index.n_keys == stops[-1]
    assert_sound(index)
    found = index.search(random_keys(3, seed=2), k=stops[-1], effort=stops[-1])
    assert (np.sort(found.ids, axis=2) == np.arange(stops[-1])).all()


@pytest.mark.parametrize("stops", [(0, 40), (1, 40), (70, 120)], ids=lambda stops: "-".join(map(str, stops)))
def test_no_link_twice(stops):
    index = grown(random_keys(stops[-1]), stops)
    for head in range(2):
        for row in index.neighbors[head]:
            links = row[row >= 0].tolist()
            assert len(set(links)) == len(links)


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_and_outliers_can_be_reached(seed):
    rng = np.random.default_rng(seed)
    keys = random_keys(150, seed=seed)
    keys[:, 60:] = keys[:, rng.integers(0, 3, 90)]
    keys[:, rng.integers(60, 150, 9)] *= 1000
    assert_sound(grown(keys, (60, 61, 100, 150)))
    assert_sound(grown(np.zeros_like(keys), (60, 61, 100, 150)))


@all_kinds
def test_batches_do_not_matter(options):
    keys = random_keys(200)
    whole, halves = grown(keys, (90, 200), **options), grown(keys, (90, 145, 200), **options)
    single = grown(keys, (90, *range(91, 201)), **options)
    queries = random_keys(20, seed=5)
    for index in (whole, halves, single):
        expected = FlatIndex(index.keys.decode() if index.exact is None else keys).search(queries, k=200)
        full = index.search(queries, k=200, effort=200)
        np.testing.assert_allclose(full.scores, expected.scores, rtol=1e-5, atol=1e-5)
        if index.keys.dtype == "int8":  # its scale grows with the keys, and what lies a tenth beyond is clipped
            np.testing.assert_allclose(index.keys.decode(), whole.keys.decode(), atol=14 * index.keys.scale.max())
        else:
            np.testing.assert_array_equal(index.keys.codes, whole.keys.codes)
        # Scores of several keys at once may round otherwise than one by one, and a link in a hundred fall otherwise.
        assert (index.neighbors == whole.neighbors).mean() > (0.5 if index.keys.dtype == "int8" else 0.98)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_links(threads):
    keys = random_keys(200, n_heads=3)
    one, more = (grown(keys, (90, 150, 200), threads=n) for n in (1, threads))
    np.testing.assert_array_equal(one.neighbors, more.neighbors)
    np.testing.assert_array_equal(one.entries, more.entries)
    queries = random_keys(9, n_heads=3, seed=5)
    np.testing.assert_array_equal(one.search(queries, k=5).ids, more.search(queries, k=5).ids)


@all_kinds
def test_a_query_along_an_inserted_key_finds_it(options):
    keys = random_keys(420, dim=16)
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    index = grown(keys, (350, 385, 420), n_queries=300, config=GraphConfig(), **options)
    found = index.search(keys[:, 350:], k=1, effort=40)
    assert (found.ids[:, :, 0] == np.arange(350, 420)).mean() > 0.95


@pytest.fixture(scope="module")
def attention():
    """2,000 keys and 500 later ones; 1,500 queries sampled before them, and 200 held out."""
    queries, keys = stressed_layer(2500, 1700)
    return keys, queries[:, :1500], queries[:, 1500:]


@all_kinds
def test_held_out_queries_find_old_and_new_keys(attention, options):
    keys, sampled, tested = attention
    samples = samples_of(sampled, keys[:, :2000])
    index = GraphIndex.build(keys[:, :2000], samples, **options)
    for start in range(2000, 2500, 50):
        index.insert(keys[:, start : start + 50])
    scored = (index.exact or index.keys).decode()
    truth = top_lists(tested[0], scored[0], 10)
    new = truth >= 2000
    found = index.search(tested, k=10, effort=24)
    assert 0.1 < new.mean() < 0.5
    hits = (found.ids[0][:, :, None] == truth[:, None, :]).any(axis=1)
    assert hits[~new].mean() >= 0.95
    assert hits[new].mean() >= 0.9
    assert found.visited.mean() < 0.15 * 2500
    rebuilt = GraphIndex.build(keys, samples_of(sampled, keys), **options).search(tested, k=10, effort=24)
    assert recall(found.ids[0], truth) >= recall(rebuilt.ids[0], truth) - 0.05


@pytest.mark.parametrize("length", [1, 5, 100])
def test_the_lists_of_the_samples_learn_of_new_keys(length):
    keys, queries = random_keys(90)[0], random_keys(40, seed=1)[0]
    growing = Growing(QuerySample(top_lists(queries, keys[:30], length), queries), keys[:30])
    neighbors = np.full((90, 8), -1, np.int32)
    growing.insert(keys[30:50], neighbors[:50])
    growing.insert(keys[50:], neighbors)
    np.testing.assert_array_equal(growing._topk, top_lists(queries, keys, length))


def test_a_saved_index_grows_too(attention):
    keys, sampled, tested = attention
    index = GraphIndex.build(keys[:, :1900], samples_of(sampled, keys[:, :1900]))
    index.insert(keys[:, 1900:2000])
    sink = pa.BufferOutputStream()
    table = index.to_arrow()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    loaded = GraphIndex.from_arrow(pa.ipc.open_file(sink.getvalue()).read_all(), keys[:, :2000])
    before = loaded.search(tested, k=10)
    np.testing.assert_array_equal(before.ids, index.search(tested, k=10).ids)
    truth = top_lists(tested[0], keys[0], 10)
    for grown_index in (index, loaded):
        grown_index.insert(keys[:, 2000:])
        assert grown_index.n_keys == 2500
        assert_sound(grown_index)
    results = [recall(i.search(tested, k=10, effort=64).ids[0], truth) for i in (index, loaded)]
    assert min(results) >= 0.85
    assert results[1] >= results[0] - 0.05


def test_nothing_to_insert():
    index = build(random_keys(50))
    before = index.neighbors.copy()
    index.insert(np.empty((2, 0, 7), np.float32))
    np.testing.assert_array_equal(index.neighbors, before)
    assert index.n_keys == 50


@pytest.mark.parametrize("n_queries", [0, 1, 5])
@pytest.mark.parametrize("length", [0, 1, 40])
def test_few_samples_and_lists_of_any_length(n_queries, length):
    keys = random_keys(60)
    index = build(keys[:, :30], n_queries=n_queries, length=length)
    index.insert(keys[:, 30:])
    assert_sound(index)


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda topk, queries: QuerySample(topk), id="no-vectors"),
        pytest.param(lambda topk, queries: QuerySample(topk, queries), id="none-kept"),
    ],
)
def test_without_samples_it_says_so(samples):
    keys = random_keys(30)
    topk, queries = np.zeros((5, 2), np.int32), random_keys(5)
    given = [samples(topk, queries[head]) for head in range(2)]
    index = GraphIndex.build(keys, given, config=CONFIG, insertable=2048 if given[0].queries is None else 0)
    with pytest.raises(ConfigError, match="build it with query vectors"):
        index.insert(keys)
    assert index.n_keys == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda keys: keys[:1], "2 KV heads", id="heads"),
        pytest.param(lambda keys: keys[:, :, :-1], "head_dim 7", id="head_dim"),
        pytest.param(lambda keys: keys.astype(np.float64), "float32", id="dtype"),
        pytest.param(lambda keys: keys[0], "float32", id="two-dimensions"),
        pytest.param(lambda keys: np.where(np.arange(7) == 3, np.nan, keys), "KV head 0, key 0", id="nan"),
    ],
)
def test_wrong_keys_are_refused_and_change_nothing(change, message):
    keys = random_keys(30)
    index = build(keys)
    with pytest.raises(KeysError, match=message):
        index.insert(change(keys))
    assert index.n_keys == 30
    assert_sound(index)
    index.insert(keys)
    assert_sound(index)


@pytest.mark.parametrize("kind", [GraphIndex, ScanIndex], ids=["graph", "scan"])
def test_a_refused_insertion_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr("rabatch.index.scan.MIN_KEYS", 20)
    keys = random_keys(90)
    lists = FlatIndex(keys).search(keys[:, :40], k=8).ids
    samples = [QuerySample(lists[head], keys[head, :40].copy()) for head in range(len(keys))]
    index = kind.build(keys, samples, dtype="float16")
    untouched = kind.build(keys, samples, dtype="float16")
    with pytest.raises(KeysError, match="float16"):
        index.insert(np.full((len(keys), 3, keys.shape[2]), 1e6, np.float32))
    for each in (index, untouched):
        each.insert(random_keys(5, seed=8))
    queries = random_keys(9, seed=9)
    one, other = (each.search(queries, k=12, effort=30) for each in (index, untouched))
    np.testing.assert_array_equal(one.ids, other.ids)
    assert index.to_arrow().equals(untouched.to_arrow(), check_metadata=True)
