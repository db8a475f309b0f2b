"""What the protocol promises, asked of every key index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import samples_of

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError, KeysError, RabatchError
from rabatch.index import scan
from rabatch.index.auto import AutoIndex, Choice, Group
from rabatch.index.base import KeyIndex, QuerySample, check_keys, check_samples
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.scan import ScanIndex

CONFIG = GraphConfig(degree=6, key_neighbors=2, entry_points=3)


@dataclass(frozen=True)
class Kind:
    """An index as it is built here, and the dtype of the scores it returns."""

    type: type[KeyIndex]
    options: dict[str, Any] = field(default_factory=dict)
    scores: str = "float32"

    def build(self, keys, samples, **options):
        return self.type.build(keys, samples, **self.options, **options)


class Mixed(Kind):
    """An auto index with the heads divided among all kinds, the last head first."""

    def build(self, keys, samples, **options):
        check_keys(keys)
        check_samples(samples, *keys.shape)
        groups = []
        for head in reversed(range(len(keys))):
            kind = (GraphIndex, ScanIndex, FlatIndex)[head]
            groups.append(Group([head], kind.build(keys[head : head + 1], samples[head : head + 1], **options)))
        return AutoIndex(groups, [Choice(group.index.kind, 6, 1.0, 1.0, 0.0) for group in reversed(groups)])


KINDS = {
    "flat": Kind(FlatIndex),
    "graph-float32": Kind(GraphIndex, {"config": CONFIG}),
    "graph-bfloat16": Kind(GraphIndex, {"config": CONFIG, "dtype": "bfloat16"}, "bfloat16"),
    "graph-int8": Kind(GraphIndex, {"config": CONFIG, "dtype": "int8"}, "int8"),
    "graph-int8-exact": Kind(GraphIndex, {"config": CONFIG, "dtype": "int8", "exact": "float32"}),
    "scan-float32": Kind(ScanIndex),
    "scan-bfloat16": Kind(ScanIndex, {"dtype": "bfloat16"}, "bfloat16"),
    "auto": Kind(AutoIndex, {"config": CONFIG, "k": 4, "probes": 5, "mass": 0.6, "worst": 0.2}),
    "auto-mixed": Mixed(AutoIndex),
    "auto-strict": Kind(AutoIndex, {"config": CONFIG, "k": 3, "probes": 9}),
}
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
quick = settings(max_examples=10, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _small_scans():
    """Scans use their codes from 20 keys on; the shipped limit would make every scan here an exact search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "MIN_KEYS", 20)
        patch.setattr(scan, "EXCEPTIONS", 3)
        yield


@dataclass(frozen=True)
class Layer:
    keys: np.ndarray
    samples: list[QuerySample]
    queries: np.ndarray


def make_layer(n_heads=2, n_keys=60, dim=8, n_queries=3, seed=0, integers=False):
    rng = np.random.default_rng(seed)

    def draw(n):
        vectors = rng.standard_normal((n_heads, n, dim)) + 0.5
        return np.round(2 * vectors).astype(np.float32) if integers else vectors.astype(np.float32)

    keys, sampled, queries = draw(n_keys), draw(30), draw(n_queries)
    return Layer(keys, samples_of(sampled, keys, 6), queries)


layers = st.builds(
    make_layer,
    n_heads=st.integers(1, 3),
    n_keys=st.one_of(st.integers(0, 80), st.sampled_from([0, 1, 2, 19, 20, 80])),
    dim=st.sampled_from([2, 4, 6, 10, 16]),
    n_queries=st.integers(1, 4),
    seed=st.integers(0, 999),
    integers=st.booleans(),
)
ks = st.sampled_from([1, 2, 5, 11, 90])
efforts = st.sampled_from([0, 1, 4, 13, 50])


def tolerance(kind, keys, queries):
    """How far a score may be from that of the float32 key, [n_heads, n_queries, 1]."""
    if keys.shape[1] == 0:
        return np.zeros((*queries.shape[:2], 1))
    size = (
        np.linalg.norm(queries.astype(np.float64), axis=2)[:, :, None]
        * np.linalg.norm(keys, axis=2).max(axis=1)[:, None, None]
    )
    bound = 4 * np.finfo(np.float32).eps * size
    if kind.scores == "bfloat16":
        bound += 2.0**-8 * size
    if kind.scores == "int8":
        half_step = np.ptp(keys, axis=1) / 254 / 2 * 1.001
        bound += np.einsum("hqd,hd->hq", np.abs(queries), half_step)[:, :, None] + 4 * np.finfo(np.float32).eps * size
    return bound


def check_result(result, keys, queries, k, bound):
    """Shapes and dtypes; ids are keys and unique; scores fall and are those of their ids; padding comes last."""
    n_heads, n_keys, _ = keys.shape
    shape = (n_heads, queries.shape[1])
    assert result.ids.shape == result.scores.shape == (*shape, k)
    assert result.visited.shape == result.distances.shape == shape
    assert [a.dtype for a in (result.ids, result.scores, result.visited, result.distances)] == ["i4", "f4", "i8", "i8"]
    assert ((result.ids >= -1) & (result.ids < n_keys)).all()
    assert (np.isneginf(result.scores) == (result.ids < 0)).all()
    assert (result.scores[:, :, 1:] <= result.scores[:, :, :-1]).all()
    assert ((result.visited >= 0) & (result.visited <= n_keys)).all()
    assert ((result.ids >= 0).sum(axis=2) <= result.visited).all()
    for ids in result.ids.reshape(-1, k):
        found = ids[ids >= 0]
        assert len(np.unique(found)) == len(found)
    if n_keys:
        exact = np.einsum("hqd,hkd->hqk", queries.astype(np.float64), keys)
        of_ids = np.take_along_axis(exact, np.maximum(result.ids, 0).astype(int), axis=2)
        wrong = np.where(result.ids >= 0, np.abs(np.where(result.ids >= 0, result.scores, 0) - of_ids), 0)
        assert (wrong <= bound).all()


def assert_equal(a, b):
    for name, array in vars(a).items():
        np.testing.assert_array_equal(getattr(b, name), array, err_msg=name)


def assert_close(a, b, bound):
    """The same scores; ids may be exchanged where scores are as good as equal."""
    assert a.scores.shape == b.scores.shape
    assert (np.isneginf(a.scores) == np.isneginf(b.scores)).all()
    real = np.isfinite(a.scores)
    assert (np.abs(np.where(real, a.scores, 0) - np.where(real, b.scores, 0)) <= bound).all()


def exact_scores(keys, queries, k):
    """The k highest scores [n_heads, n_queries, k] in float64, padded with -inf."""
    padded = np.full((*queries.shape[:2], k), -np.inf)
    best = -np.sort(-np.einsum("hqd,hkd->hqk", queries.astype(np.float64), keys), axis=2)[:, :, :k]
    padded[:, :, : best.shape[2]] = best
    return padded


def stored(table):
    """The table as it comes out of a file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_file(sink.getvalue()).read_all()


@all_kinds
@pytest.mark.parametrize("n_keys", [0, 1, 60])
def test_is_a_key_index(kind, n_keys):
    layer = make_layer(n_keys=n_keys)
    index = kind.build(layer.keys, layer.samples)
    assert isinstance(index, KeyIndex)
    assert isinstance(type(index).kind, str)
    assert (index.n_heads, index.n_keys) == (2, n_keys)
    assert index.bytes_per_key >= (8 * {"float32": 4, "bfloat16": 2, "int8": 1}[kind.scores] if n_keys else 0)


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts)
def test_results_are_sound(kind, layer, k, effort):
    index = kind.build(layer.keys, layer.samples)
    result = index.search(layer.queries, k=k, effort=effort)
    check_result(result, layer.keys, layer.queries, k, tolerance(kind, layer.keys, layer.queries))
    if k <= layer.keys.shape[1]:
        assert (result.ids >= 0).all()


@all_kinds
@quick
@given(layer=layers, k=ks)
def test_full_effort_is_exact(kind, layer, k):
    index = kind.build(layer.keys, layer.samples)
    n_keys = layer.keys.shape[1]
    result = index.search(layer.queries, k=k, effort=max(n_keys, 1))
    bound = tolerance(kind, layer.keys, layer.queries)
    check_result(result, layer.keys, layer.queries, k, bound)
    assert ((result.ids >= 0).sum(axis=2) == min(k, n_keys)).all()
    expected = exact_scores(layer.keys, layer.queries, k)
    # The sorted scores of two sets of scores that differ by at most `bound` differ by at most `bound`.
    assert_close(result, FlatIndex(layer.keys).search(layer.queries, k=k), 2 * bound)
    real = np.isfinite(expected)
    assert (np.abs(np.where(real, result.scores, 0) - np.where(real, expected, 0)) <= bound).all()


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts)
def test_saved_equals_loaded(kind, layer, k, effort):
    index = kind.build(layer.keys, layer.samples)
    loaded = kind.type.from_arrow(stored(index.to_arrow()), layer.keys)
    assert_equal(index.search(layer.queries, k=k, effort=effort), loaded.search(layer.queries, k=k, effort=effort))
    assert (loaded.n_heads, loaded.n_keys, loaded.kind) == (index.n_heads, index.n_keys, index.kind)
    assert loaded.bytes_per_key == index.bytes_per_key
    assert loaded.to_arrow().equals(index.to_arrow(), check_metadata=True)


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts)
def test_same_arguments_same_index(kind, layer, k, effort):
    one, two = (kind.build(layer.keys.copy(), layer.samples, seed=7) for _ in range(2))
    assert one.to_arrow().equals(two.to_arrow(), check_metadata=True)
    assert_equal(one.search(layer.queries, k=k, effort=effort), two.search(layer.queries, k=k, effort=effort))


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts)
def test_batch_equals_one_by_one(kind, layer, k, effort):
    index = kind.build(layer.keys, layer.samples)
    together = index.search(layer.queries, k=k, effort=effort)
    alone = [index.search(layer.queries[:, row : row + 1], k=k, effort=effort) for row in range(layer.queries.shape[1])]
    scores = np.concatenate([result.scores for result in alone], axis=1)
    assert (np.isneginf(scores) == np.isneginf(together.scores)).all()
    bound = 2 * tolerance(KINDS["flat"], layer.keys, layer.queries)
    assert (np.abs(np.where(np.isneginf(scores), 0, scores - together.scores)) <= bound).all()
    np.testing.assert_array_equal(np.concatenate([r.visited for r in alone], axis=1), together.visited)


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts)
def test_threads_change_nothing(kind, layer, k, effort):
    one, three = (kind.build(layer.keys, layer.samples, threads=threads) for threads in (1, 3))
    assert one.to_arrow().equals(three.to_arrow(), check_metadata=True)
    assert_equal(one.search(layer.queries, k=k, effort=effort), three.search(layer.queries, k=k, effort=effort))


@all_kinds
@quick
@given(layer=layers, k=ks, effort=efforts, beta=st.sampled_from([0.0, 0.7, 2.0, 1e6]))
def test_beta_cuts_what_scores_too_little(kind, layer, k, effort, beta):
    index = kind.build(layer.keys, layer.samples)
    betas = beta * np.arange(1, len(layer.keys) + 1, dtype=np.float32)
    result = index.search(layer.queries, k=k, effort=effort, beta=betas)
    check_result(result, layer.keys, layer.queries, k, tolerance(kind, layer.keys, layer.queries))
    found = result.ids >= 0
    assert (np.where(found, result.scores, np.inf) >= result.scores[:, :, :1] - betas[:, None, None]).all()
    full = index.search(layer.queries, k=k, effort=max(index.n_keys, 1))
    cut = index.search(layer.queries, k=k, effort=max(index.n_keys, 1), beta=betas)
    within = full.scores >= full.scores[:, :, :1] - betas[:, None, None]
    np.testing.assert_array_equal(cut.ids, np.where(within, full.ids, -1))


@all_kinds
@settings(max_examples=8, deadline=None)
@given(layer=layers, share=st.sampled_from([0.0, 0.3, 0.6, 0.95, 1.0]), k=ks, effort=efforts)
def test_inserted_keys_are_searched_too(kind, layer, share, k, effort):
    n_keys = layer.keys.shape[1]
    first = round(share * n_keys)
    samples = samples_of(np.stack([s.queries for s in layer.samples]), layer.keys[:, :first], 6)
    index = kind.build(layer.keys[:, :first], samples)
    middle = (first + n_keys) // 2
    index.search(layer.queries, k=k)
    index.insert(layer.keys[:, first:middle])
    index.insert(layer.keys[:, middle:])
    assert index.n_keys == n_keys
    rough = kind.scores == "int8"  # keys beyond the first ones are clipped, as documented
    bound = np.inf if rough else tolerance(kind, layer.keys, layer.queries)
    for wanted in (effort, max(n_keys, 1)):
        check_result(index.search(layer.queries, k=k, effort=wanted), layer.keys, layer.queries, k, bound)
    full = index.search(layer.queries, k=max(n_keys, 1), effort=max(n_keys, 1))
    assert ((full.ids >= 0).sum(axis=2) == n_keys).all()
    if not rough:
        assert_close(full, FlatIndex(layer.keys).search(layer.queries, k=max(n_keys, 1)), 2 * bound)
    loaded = kind.type.from_arrow(stored(index.to_arrow()), layer.keys)
    assert_equal(index.search(layer.queries, k=k, effort=effort), loaded.search(layer.queries, k=k, effort=effort))


@all_kinds
@pytest.mark.parametrize("n_keys", [0, 1, 2, 21])
@pytest.mark.parametrize("k", [1, 3, 21, 22, 50])
def test_more_wanted_than_there_is(kind, n_keys, k):
    layer = make_layer(n_keys=n_keys, n_heads=3)
    result = kind.build(layer.keys, layer.samples).search(layer.queries, k=k)
    check_result(result, layer.keys, layer.queries, k, tolerance(kind, layer.keys, layer.queries))
    assert ((result.ids >= 0).sum(axis=2) == min(k, n_keys)).all()


@all_kinds
def test_no_queries(kind):
    layer = make_layer()
    for effort in (0, 60):
        result = kind.build(layer.keys, layer.samples).search(layer.queries[:, :0], k=4, effort=effort)
        assert result.ids.shape == result.scores.shape == (2, 0, 4)
        assert result.visited.shape == (2, 0)


@all_kinds
@pytest.mark.parametrize("distinct", [1, 2, 5])
@pytest.mark.parametrize("value", [None, 0.0, 1.0], ids=["random", "zeros", "ones"])
def test_duplicates(kind, distinct, value):
    layer = make_layer(n_keys=distinct)
    keys = np.tile(layer.keys if value is None else np.full_like(layer.keys, value), (1, 61, 1))[:, :61]
    keys = np.ascontiguousarray(keys)
    index = kind.build(keys, samples_of(np.stack([s.queries for s in layer.samples]), keys, 6))
    bound = tolerance(kind, keys, layer.queries)
    for effort in (0, 61):
        result = index.search(layer.queries, k=7, effort=effort)
        check_result(result, keys, layer.queries, 7, bound)
        assert (result.ids >= 0).all()


@all_kinds
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_queries_of_any_length(kind, scale):
    layer = make_layer()
    queries = layer.queries * np.float32(scale)
    index = kind.build(layer.keys, layer.samples)
    for effort in (0, 60):
        result = index.search(queries, k=7, effort=effort)
        check_result(result, layer.keys, queries, 7, tolerance(kind, layer.keys, queries))
        assert (result.ids >= 0).all()


@all_kinds
def test_searches_leave_their_arguments_alone(kind):
    layer = make_layer()
    keys, queries = layer.keys.copy(), layer.queries.copy()
    keys.flags.writeable = queries.flags.writeable = False
    index = kind.build(keys, layer.samples)
    for beta in (None, np.ones(2, np.float32)):
        index.search(queries, k=5, beta=beta)
    index.insert(keys[:, :3])
    strided = np.ascontiguousarray(queries.transpose(0, 2, 1)).transpose(0, 2, 1)
    assert_close(index.search(queries, k=5), index.search(strided, k=5), 2 * tolerance(KINDS["flat"], keys, queries))
    np.testing.assert_array_equal(keys, layer.keys)


@all_kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite_are_named(kind, value):
    layer = make_layer()
    bad = layer.keys.copy()
    bad[1, 5, 3] = value
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        kind.build(bad, layer.samples)
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        index.insert(bad)
    assert index.n_keys == 60
    assert_equal(index.search(layer.queries, k=5), kind.build(layer.keys, layer.samples).search(layer.queries, k=5))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[0], id="two-dimensions"),
        pytest.param(lambda keys: keys.astype(np.float64), id="float64"),
        pytest.param(lambda keys: keys[:, :, :0], id="no-channels"),
    ],
)
def test_wrong_keys_are_refused(kind, change):
    layer = make_layer()
    with pytest.raises(KeysError):
        kind.build(change(layer.keys), layer.samples)
    with pytest.raises(KeysError):
        kind.build(layer.keys, layer.samples).insert(change(layer.keys))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[:1], id="heads"),
        pytest.param(lambda keys: keys[:, :, :-2].copy(), id="head_dim"),
    ],
)
def test_inserting_keys_of_another_shape_is_refused(kind, change):
    layer = make_layer()
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError):
        index.insert(change(layer.keys))
    assert index.n_keys == 60
    check_result(index.search(layer.queries, k=5), layer.keys, layer.queries, 5, np.inf)


@all_kinds
@pytest.mark.parametrize("n_keys", [0, 60])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda queries: queries[:, :, :-1], id="head_dim"),
        pytest.param(lambda queries: queries[:1], id="heads"),
        pytest.param(lambda queries: queries[0], id="two-dimensions"),
        pytest.param(lambda queries: queries.astype(np.float64), id="float64"),
    ],
)
def test_wrong_queries_are_refused(kind, change, n_keys):
    layer = make_layer(n_keys=n_keys)
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError, match="queries"):
        index.search(change(layer.queries), k=3)


@all_kinds
def test_no_key_wanted_is_refused(kind):
    layer = make_layer()
    with pytest.raises(ConfigError) as error:
        kind.build(layer.keys, layer.samples).search(layer.queries, k=0)
    assert error.value.field == "k"


@all_kinds
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)], ids=str)
def test_beta_of_another_shape_is_refused(kind, shape):
    layer = make_layer()
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(RabatchError, match="beta"):
        index.search(layer.queries, k=20, effort=2, beta=np.ones(shape, np.float32))


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.type is not FlatIndex], ids=list(KINDS)[1:])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s[:1], "one per KV head", id="a-head-missing"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk + 60, s[1].queries)], "KV head 1", id="id-too-high"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk - 99, s[1].queries)], "KV head 1", id="id-too-low"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk.astype(np.int64), s[1].queries)], "KV head 1", id="int64"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk, s[1].queries[:, :-1])], "KV head 1", id="head_dim"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk[:-1], s[1].queries)], "KV head 1", id="more-vectors"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk, s[1].queries * np.nan)], "KV head 1", id="nan"),
    ],
)
def test_wrong_samples_are_refused(kind, change, message):
    layer = make_layer()
    with pytest.raises(KeysError, match=message):
        kind.build(layer.keys, change(layer.samples))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[:, :-1], id="a-key-missing"),
        pytest.param(lambda keys: np.concatenate([keys, keys], axis=1), id="twice-the-keys"),
        pytest.param(lambda keys: keys[:1], id="a-head-missing"),
    ],
)
def test_loading_with_other_keys_is_refused(kind, change):
    layer = make_layer()
    table = stored(kind.build(layer.keys, layer.samples).to_arrow())
    with pytest.raises(RabatchError):
        kind.type.from_arrow(table, np.ascontiguousarray(change(layer.keys)))


@all_kinds
def test_the_table_of_another_kind_is_refused(kind):
    layer = make_layer()
    table = stored(kind.build(layer.keys, layer.samples).to_arrow())
    for other in {k.type for k in KINDS.values()} - {kind.type}:
        with pytest.raises(RabatchError, match=f"open it as {kind.type.kind}"):
            other.from_arrow(table, layer.keys)


def test_the_codes_of_scans_are_used_here():
    """Without the codes every test of a scan above would be one of the flat index."""
    layer = make_layer(n_keys=80, n_queries=40, dim=16)
    index = ScanIndex.build(layer.keys, layer.samples)
    found, exact = index.search(layer.queries, k=4, effort=4), FlatIndex(layer.keys).search(layer.queries, k=4)
    assert (found.ids != exact.ids).any()
