"""The indexes the graph is measured against: exact at full effort, honest in what they return, and no strawmen."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rabatch.errors import ConfigError, IntegrityError, KeysError
from rabatch.index.base import KeyIndex, QuerySample
from rabatch.index.baselines.common import MIN_KEYS
from rabatch.index.baselines.hnsw import HnswIndex
from rabatch.index.baselines.ivf import IvfIndex, IvfPqIndex
from rabatch.index.baselines.lift import Reduction
from rabatch.index.baselines.nsg import NsgIndex
from rabatch.index.baselines.vamana import VamanaIndex
from rabatch.index.flat import FlatIndex
from rabatch.index.synthetic import attention_vectors, stress

KINDS = [HnswIndex, IvfIndex, IvfPqIndex, NsgIndex, VamanaIndex]
GROWING = [kind for kind in KINDS if kind is not NsgIndex]
DIM = 16
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
growing_kinds = pytest.mark.parametrize("kind", GROWING, ids=lambda kind: kind.kind)


def near_layer(n_keys=2000, n_queries=40, n_heads=2, seed=0):
    """Keys of one length in clusters, and queries near keys: easy for every index."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((n_heads, 30, DIM))
    keys = centers[:, rng.integers(0, 30, n_keys)] + 0.5 * rng.standard_normal((n_heads, n_keys, DIM))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    queries = keys[:, rng.integers(0, n_keys, n_queries)] + 0.1 * rng.standard_normal((n_heads, n_queries, DIM))
    return keys.astype(np.float32), queries.astype(np.float32)


def samples_of(queries):
    """The vectors alone: none of these indexes reads the lists."""
    return [QuerySample(np.full((len(q), 1), -1, np.int32), q) for q in queries]


def build(kind, keys, queries, **options):
    return kind.build(keys, samples_of(queries), **options)


@pytest.fixture(scope="module")
def layer():
    return near_layer()


@pytest.fixture(scope="module")
def built(layer):
    keys, _ = layer
    _, sampled = near_layer(n_queries=200)
    return {kind: build(kind, keys, sampled) for kind in KINDS}


def check_result(result, keys, queries, k):
    """Scores are those of the ids and fall, ids are keys and unique, padding comes last."""
    for head, row in np.ndindex(result.ids.shape[:2]):
        ids, scores = result.ids[head, row], result.scores[head, row]
        found = int((ids >= 0).sum())
        assert (ids[found:] == -1).all()
        assert np.isneginf(scores[found:]).all()
        assert len(set(ids[:found].tolist())) == found
        assert (np.diff(scores[:found]) <= 0).all()
        exact = keys[head, ids[:found]].astype(np.float64) @ queries[head, row]
        np.testing.assert_allclose(scores[:found], exact, rtol=1e-5, atol=1e-5)
    assert result.ids.shape == (*queries.shape[:2], k)


def recall(found, exact):
    hits = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(found.ids[0], exact.ids[0], strict=True)]
    return sum(hits) / exact.ids[0].size


@all_kinds
def test_is_a_key_index(kind, built):
    assert isinstance(built[kind], KeyIndex)
    assert (built[kind].n_heads, built[kind].n_keys) == (2, 2000)
    # Vectors, at least a code or a link, and no more than a few copies.
    assert DIM * 4 + 4 < built[kind].bytes_per_key < DIM * 4 * 8


@all_kinds
def test_full_effort_is_exact(kind, built, layer):
    keys, queries = layer
    exact = FlatIndex(keys).search(queries, k=20)
    result = built[kind].search(queries, k=20, effort=2000)
    check_result(result, keys, queries, 20)
    np.testing.assert_allclose(result.scores, exact.scores, rtol=1e-5)
    assert (result.visited == 2000).all()
    assert (result.distances == 2000).all()


@all_kinds
@pytest.mark.parametrize(("k", "effort"), [(1, 0), (10, 0), (10, 40), (40, 10)])
def test_scores_belong_to_ids(kind, built, layer, k, effort):
    keys, queries = layer
    result = built[kind].search(queries, k=k, effort=effort)
    check_result(result, keys, queries, k)
    assert (result.ids[:, :, 0] >= 0).all()
    assert (result.visited > 0).all()
    assert (result.visited <= 2000).all()
    assert (result.visited <= result.distances).all()


@all_kinds
def test_moderate_effort_finds_most(kind, built, layer):
    keys, queries = layer
    exact = FlatIndex(keys).search(queries, k=10)
    effort = 20 if kind is IvfIndex else 100
    result = built[kind].search(queries, k=10, effort=effort)
    assert recall(result, exact) > 0.95
    assert result.visited.mean() < 1000
    worse = built[kind].search(queries, k=10, effort=1)
    assert recall(worse, exact) < recall(result, exact)


@all_kinds
def test_apart_clouds_are_searched_by_score(kind):
    """Where queries lie far from all keys, distances between raw vectors are of no use."""
    queries, keys = stress(*attention_vectors(3000, 440, head_dim=32))
    index = build(kind, keys[None], queries[None, :400])
    exact = FlatIndex(keys[None]).search(queries[None, 400:], k=10)
    result = index.search(queries[None, 400:], k=10, effort=30 if kind is IvfIndex else 150)
    assert recall(result, exact) > 0.9


@all_kinds
def test_batch_equals_one_by_one(kind, built, layer):
    _, queries = layer
    together = built[kind].search(queries, k=10)
    for row in range(queries.shape[1]):
        alone = built[kind].search(queries[:, row : row + 1], k=10)
        assert (alone.ids[:, 0] == together.ids[:, row]).all()
        assert (alone.scores[:, 0] == together.scores[:, row]).all()


@all_kinds
def test_threads_change_nothing(kind, layer):
    keys, queries = layer
    keys = keys[:, :600]
    one, two = (build(kind, keys, queries, threads=threads, seed=3) for threads in (1, 2))
    many = np.concatenate([queries] * 4, axis=1)  # several blocks per head
    a, b = one.search(many, k=10), two.search(many, k=10)
    assert (a.ids == b.ids).all()
    assert (a.scores == b.scores).all()
    assert (a.visited == b.visited).all()
    assert one.to_arrow().equals(two.to_arrow(), check_metadata=True)


@all_kinds
def test_saved_equals_loaded(kind, built, layer):
    keys, queries = layer
    sink = pa.BufferOutputStream()
    table = built[kind].to_arrow()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    loaded = kind.from_arrow(pa.ipc.open_file(sink.getvalue()).read_all(), keys)
    before, after = built[kind].search(queries, k=10), loaded.search(queries, k=10)
    assert (before.ids == after.ids).all()
    assert (before.scores == after.scores).all()
    assert loaded.bytes_per_key == built[kind].bytes_per_key
    if kind in GROWING:
        loaded.insert(keys[:, :5])
        assert loaded.search(queries, k=10, effort=40).ids.max() < 2005
    with pytest.raises(KeysError, match="2000 keys"):
        kind.from_arrow(table, keys[:, :-1])
    other = KINDS[KINDS.index(kind) - 1]
    with pytest.raises(IntegrityError, match=kind.kind):
        other.from_arrow(table, keys)


@growing_kinds
def test_inserted_keys_are_found(kind, layer):
    keys, queries = layer
    index = build(kind, keys[:, :1200], queries)
    index.insert(keys[:, 1200:1900])
    index.insert(keys[:, 1900:])
    assert index.n_keys == 2000
    exact = FlatIndex(keys).search(queries, k=10)
    full = index.search(queries, k=10, effort=2000)
    np.testing.assert_allclose(full.scores, exact.scores, rtol=1e-5)
    some = index.search(queries, k=10, effort=20 if kind is IvfIndex else 100)
    check_result(some, keys, queries, 10)
    assert (some.ids >= 1900).any()
    assert recall(some, exact) > 0.93


@growing_kinds
def test_inserted_keys_may_be_longer_than_all_before(kind, layer):
    keys, queries = layer
    index = build(kind, keys, queries)
    longer = 2 * keys[:, :50]
    index.insert(longer)
    result = index.search(longer, k=1, effort=30 if kind is IvfIndex else 60)
    assert (result.ids[:, :, 0] == np.arange(2000, 2050)).mean() > 0.9
    check_result(result, np.concatenate([keys, longer], axis=1), longer, 1)


@growing_kinds
def test_a_small_index_grows_into_a_built_one(kind, layer):
    keys, queries = layer
    index = build(kind, keys[:, :0], queries)
    for stop in (3, MIN_KEYS - 1, MIN_KEYS, 700):
        index.insert(keys[:, index.n_keys : stop])
        check_result(index.search(queries, k=5), keys, queries, 5)
    assert kind.from_arrow(index.to_arrow(), keys[:, :700]).n_keys == 700


def test_nsg_says_that_it_cannot_grow(built, layer):
    with pytest.raises(ConfigError, match="build it anew"):
        built[NsgIndex].insert(layer[0])


@all_kinds
@pytest.mark.parametrize("n_keys", [0, 1, 3, MIN_KEYS - 1, MIN_KEYS])
def test_few_keys(kind, n_keys, layer):
    keys, queries = layer[0][:, :n_keys], layer[1][:, :3]
    index = build(kind, keys, queries)
    index = kind.from_arrow(index.to_arrow(), keys)
    for k in (1, 5, 400):
        result = index.search(queries, k=k)
        check_result(result, keys, queries, k)
        assert ((result.ids >= 0).sum(axis=2) <= n_keys).all()
        if k >= n_keys:
            assert ((result.ids >= 0).sum(axis=2) == n_keys).all()
    assert index.search(queries[:, :0], k=5).ids.shape == (2, 0, 5)


@all_kinds
@pytest.mark.parametrize("distinct", [1, 2, 7])
def test_duplicates(kind, distinct, layer):
    keys = np.ascontiguousarray(np.tile(layer[0][:, :distinct], (1, 600, 1))[:, :600])
    queries = layer[1][:, :5]
    index = build(kind, keys, queries)
    result = index.search(queries, k=10, effort=300)  # more than the copies of one key
    check_result(result, keys, queries, 10)
    exact = FlatIndex(keys).search(queries, k=10)
    np.testing.assert_allclose(result.scores[:, :, 0], exact.scores[:, :, 0], rtol=1e-5)


@all_kinds
def test_zero_keys_and_queries(kind):
    keys, queries = np.zeros((1, 300, DIM), np.float32), np.zeros((1, 4, DIM), np.float32)
    check_result(build(kind, keys, queries).search(queries, k=3), keys, queries, 3)


@all_kinds
@pytest.mark.parametrize("dim", [1, 3, 30])
def test_any_dimension(kind, dim):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 400, dim)).astype(np.float32)
    queries = rng.standard_normal((1, 9, dim)).astype(np.float32)
    check_result(build(kind, keys, queries).search(queries, k=3), keys, queries, 3)


@all_kinds
def test_beta_cuts_what_scores_too_little(kind, built, layer):
    keys, queries = layer
    beta = np.array([0.2, 0.0], np.float32)
    result = built[kind].search(queries, k=10, beta=beta)
    check_result(result, keys, queries, 10)
    best = result.scores[:, :, :1]
    assert ((result.scores >= best - beta[:, None, None]) == (result.ids >= 0)).all()
    assert (result.ids[0] == -1).any()


@all_kinds
def test_bad_arguments_are_named(kind, built, layer):
    keys, queries = layer
    bad = keys.copy()
    bad[1, 7, 2] = np.nan
    with pytest.raises(KeysError, match="KV head 1, key 7"):
        build(kind, bad, queries)
    with pytest.raises(KeysError, match="queries"):
        built[kind].search(queries[:, :, :-1], k=3)
    with pytest.raises(KeysError, match="one per KV head"):
        build(kind, keys, queries[:1])
    with pytest.raises(ConfigError, match="effort"):
        built[kind].search(queries, k=3, effort=-1)
    with pytest.raises(ConfigError, match=kind.kind):
        build(kind, keys, queries, unheard_of=1)
    if kind in GROWING:
        with pytest.raises(KeysError, match="head_dim"):
            built[kind].insert(keys[:, :, :-1])


def test_damaged_tables_are_refused(built, layer):
    table = built[HnswIndex].to_arrow()
    metadata = {name: value for name, value in table.schema.metadata.items() if b"faiss" not in name}
    with pytest.raises(IntegrityError, match="does not hold the index"):
        HnswIndex.from_arrow(table.replace_schema_metadata(metadata), layer[0])
    table = built[VamanaIndex].to_arrow()
    column = pa.array([b"\x7f" * 128] * len(table), table.schema.field("links").type)
    with pytest.raises(IntegrityError, match="links"):
        VamanaIndex.from_arrow(table.set_column(0, table.schema.field("links"), column), layer[0])


def test_sampled_queries_improve_vamana():
    """Queries that blend clusters of keys; what those of `attention_vectors` want is found either way."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((16, 64)) / 4
    centers = rng.standard_normal((96, 16)) * rng.gamma(2.0, 0.5, (96, 1))
    keys = (centers[rng.integers(0, 96, 4000)] + 0.6 * rng.standard_normal((4000, 16))) @ mix
    keys += 0.35 * rng.standard_normal((4000, 64))
    queries = rng.dirichlet(np.full(96, 0.02), 2064) @ centers @ mix + rng.standard_normal(64)
    queries += 0.4 * rng.standard_normal((2064, 64))
    queries, keys = stress(queries.astype(np.float32), keys.astype(np.float32))
    tested = queries[None, 2000:]
    exact = FlatIndex(keys[None]).search(tested, k=50)
    nothing = [QuerySample(np.empty((0, 1), np.int32))]
    samples = (samples_of(queries[None, :2000]), nothing)
    index, plain = (VamanaIndex.build(keys[None], s, build_list=60) for s in samples)
    assert recall(index.search(tested, k=50, effort=50), exact) > 0.88
    assert recall(plain.search(tested, k=50, effort=50), exact) < 0.84


def test_nearest_lifted_key_has_the_highest_score():
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal((200, 8)) * rng.gamma(1.0, 1.0, (200, 1)) + 5).astype(np.float32)
    queries = rng.standard_normal((20, 8)).astype(np.float32)
    lifted = Reduction.of(keys).lift(keys)
    np.testing.assert_allclose(np.linalg.norm(lifted, axis=1), Reduction.of(keys).radius, rtol=1e-5)
    distances = ((lifted[None, :, :8] - queries[:, None]) ** 2).sum(axis=2) + lifted[None, :, 8] ** 2
    assert (distances.argmin(axis=1) == (queries @ keys.T).argmax(axis=1)).all()
