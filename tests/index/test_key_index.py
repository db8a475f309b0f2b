"""What the protocol promises, asked of every key index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_kinds import (
    KINDS,
    all_kinds,
    assert_close,
    assert_equal,
    check_result,
    efforts,
    exact_scores,
    ks,
    layers,
    make_layer,
    quick,
    stored,
    tolerance,
)
from index_samples import samples_of

from rabatch.index.base import KeyIndex
from rabatch.index.flat import FlatIndex

pytestmark = pytest.mark.usefixtures("small_scans")


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
    before, after = (i.search(layer.queries, k=k, effort=effort) for i in (index, loaded))
    assert_equal(before, after)
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
