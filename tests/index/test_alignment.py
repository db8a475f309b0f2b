"""Alignment loses nothing, makes queries and keys alike, and undoes the stress that keeps every score."""

from __future__ import annotations

import numpy as np
import pytest

from rabatch.index.alignment import align
from rabatch.index.synthetic import attention_vectors, stress


def vectors(n_keys=700, n_queries=500, dim=24, seed=0):
    queries, keys = attention_vectors(n_keys, n_queries, head_dim=dim, seed=seed)
    return queries, keys


def moment(x):
    return x.T.astype(np.float64) @ x / len(x)


def distances(x):
    x = x.astype(np.float64)
    return np.sqrt(((x[:, None] - x) ** 2).sum(axis=2))


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("stressed", [False, True], ids=["plain", "stressed"])
def test_scores_are_kept(dim, stressed):
    queries, keys = vectors(dim=dim)
    if stressed and dim % 2 == 0:
        queries, keys = stress(queries, keys)
    alignment = align(keys, queries)
    unseen = np.random.default_rng(5).standard_normal((9, dim)).astype(np.float32)
    for q in (queries[:50], unseen):
        expected = q.astype(np.float64) @ keys.T - (q.astype(np.float64) @ alignment.center)[:, None]
        scores = alignment.queries(q) @ alignment.keys(keys).T
        size = np.linalg.norm(alignment.queries(q), axis=1).max() * np.linalg.norm(alignment.keys(keys), axis=1).max()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5 * size + 1e-4)


def test_without_queries_keys_are_centred():
    _, keys = vectors()
    alignment = align(keys, None)
    np.testing.assert_allclose(alignment.keys(keys), keys - keys.mean(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stressed", [False, True], ids=["plain", "stressed"])
def test_second_moments_agree(stressed):
    queries, keys = stress(*vectors()) if stressed else vectors()
    before = [moment(queries), moment(keys - keys.mean(axis=0))]
    alignment = align(keys, queries)
    of_queries, of_keys = moment(alignment.queries(queries)), moment(alignment.keys(keys))
    size = np.linalg.norm(of_queries)
    assert np.linalg.norm(of_queries - of_keys) < 0.05 * size
    assert np.linalg.norm(before[0] - before[1]) > 0.2 * np.linalg.norm(before[0])
    # What is left is the ridge: a thousandth of the mean eigenvalue on each side.
    ridges = [1e-3 * np.trace(m) / len(m) for m in before]
    of_queries += ridges[0] * alignment.to_query @ alignment.to_query.T
    of_keys += ridges[1] * alignment.to_key @ alignment.to_key.T
    assert np.linalg.norm(of_queries - of_keys) < 1e-4 * size


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distances_do_not_notice_the_stress(seed):
    queries, keys = vectors(seed=seed)
    plain = distances(align(keys, queries).keys(keys)[:100])
    hard_queries, hard_keys = stress(queries, keys, seed=seed)
    hard = distances(align(hard_keys, hard_queries).keys(hard_keys)[:100])
    raw = distances(hard_keys[:100])
    other = ~np.eye(100, dtype=bool)
    change = np.abs(hard - plain)[other] / plain[other]
    assert change.mean() < 0.03
    assert change.max() < 0.15
    unaligned = raw[other] / distances(keys[:100])[other]
    assert unaligned.std() / unaligned.mean() > 0.1  # without alignment the stress is noticed


@pytest.mark.parametrize("n_keys", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("n_queries", [None, 0, 1, 5])
@pytest.mark.parametrize("dim", [1, 8])
def test_little_to_go_by(n_keys, n_queries, dim):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((n_keys, dim)).astype(np.float32)
    queries = None if n_queries is None else rng.standard_normal((n_queries, dim)).astype(np.float32)
    alignment = align(keys, queries)
    tested = rng.standard_normal((4, dim)).astype(np.float32)
    scores = alignment.queries(tested) @ alignment.keys(keys).T
    assert scores.shape == (4, n_keys)
    expected = tested @ (keys - alignment.center).T
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert alignment.to_key.dtype == alignment.to_query.dtype == alignment.center.dtype == np.float32


@pytest.mark.parametrize("key", [0.0, 1.0, -1e4])
@pytest.mark.parametrize("query", [0.0, 1.0])
@pytest.mark.parametrize("n_keys", [1, 2, 300])
def test_constant_vectors_stay_finite(key, query, n_keys):
    keys, queries = np.full((n_keys, 6), key, np.float32), np.full((20, 6), query, np.float32)
    alignment = align(keys, queries)
    for array in (alignment.center, alignment.to_key, alignment.to_query, alignment.keys(keys)):
        assert np.isfinite(array).all()
    assert np.isfinite(alignment.queries(queries)).all()
    np.testing.assert_allclose(alignment.to_key @ alignment.to_query.T, np.eye(6), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_any_scale_of_keys(scale):
    queries, keys = vectors(200, 100, 8)
    plain, scaled = align(keys, queries), align(keys * np.float32(scale), queries)
    expected = plain.keys(keys) * np.sqrt(scale)
    np.testing.assert_allclose(scaled.keys(keys * np.float32(scale)), expected, rtol=1e-2, atol=1e-3 * np.sqrt(scale))
