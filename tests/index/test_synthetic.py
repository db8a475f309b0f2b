"""The generated vectors have what tests rely on, and the stress keeps what attention sees."""

from __future__ import annotations

import numpy as np
import pytest

from rabatch.index.synthetic import attention_vectors, stress


def test_same_seed_same_vectors():
    first, second, other = (attention_vectors(333, 57, head_dim=32, seed=seed) for seed in (7, 7, 8))
    for a, b, c in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    first, second, other = (stress(*attention_vectors(99, 9, head_dim=32), seed=seed) for seed in (7, 7, 8))
    for a, b, c in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


@pytest.mark.parametrize("n_keys", [0, 1, 23, 25, 301])
@pytest.mark.parametrize("n_queries", [0, 1, 3, 50])
@pytest.mark.parametrize(("head_dim", "query_heads"), [(2, 1), (6, 3), (64, 4), (7, 5)])
def test_shapes(n_keys, n_queries, head_dim, query_heads):
    made = attention_vectors(n_keys, n_queries, head_dim=head_dim, query_heads=query_heads)
    for queries, keys in (made, stress(*made)) if head_dim % 2 == 0 and n_keys else (made,):
        assert queries.shape == (n_queries, head_dim)
        assert keys.shape == (n_keys, head_dim)
        assert queries.dtype == keys.dtype == np.float32
        assert np.isfinite(queries).all()
        assert np.isfinite(keys).all()


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_sharper_queries_look_at_fewer_keys():
    def mass_of_best(sharpness):
        queries, keys = attention_vectors(2000, 100, head_dim=32, sharpness=sharpness)
        weights = np.sort(softmax(queries @ keys.T / np.sqrt(32)), axis=1)
        return weights[:, -20:].sum(axis=1).mean()

    blunt, usual, sharp = (mass_of_best(s) for s in (0.5, 2.0, 8.0))
    assert blunt + 0.1 < usual < sharp - 0.1


def test_neighbouring_keys_are_alike():
    _, keys = attention_vectors(2000, 0, head_dim=32)
    keys = keys - keys.mean(axis=0)
    near = (keys[:-1] * keys[1:]).sum(axis=1).mean()
    far = (keys[:-700] * keys[700:]).sum(axis=1).mean()
    size = (keys * keys).sum(axis=1).mean()
    assert near > 0.5 * size
    assert abs(far) < 0.1 * size


def test_clouds_lie_apart():
    queries, keys = attention_vectors(2000, 500, head_dim=64)
    means = [x.mean(axis=0) / np.linalg.norm(x.mean(axis=0)) for x in (queries, keys)]
    assert means[0] @ means[1] < 0.7
    cosines = keys @ means[1] / np.linalg.norm(keys, axis=1)
    assert cosines.mean() > 0.7


@pytest.mark.parametrize("head_dim", [2, 8, 64])
@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0, 16.0])
def test_stress_keeps_the_best_keys_and_the_softmax(head_dim, strength):
    plain = attention_vectors(500, 60, head_dim=head_dim)
    hard = stress(*plain, strength=strength)
    before, after = ((q.astype(np.float64) @ k.T) for q, k in (plain, hard))
    shift = after - before
    rounding = np.finfo(np.float32).eps * (np.abs(hard[0]).astype(np.float64) @ np.abs(hard[1]).T).max() * 4
    assert np.ptp(shift, axis=1).max() <= rounding
    np.testing.assert_allclose(softmax(after / 8), softmax(before / 8), rtol=0, atol=rounding)
    for row in range(60):
        best = np.argsort(-before[row])[:10]
        assert after[row, best].min() >= np.partition(after[row], -10)[-10] - 2 * rounding


def test_stress_changes_the_distances():
    plain = attention_vectors(1500, 60, head_dim=64)
    hard = stress(*plain)

    def nearest(q, k):
        return (np.square(k).sum(axis=1) - 2 * q @ k.T).argmin(axis=1)

    def recall_of_distance(q, k):
        """How many of the best keys by score are the nearest by distance."""
        by_distance = np.argsort(np.square(k).sum(axis=1) - 2 * q @ k.T, axis=1)[:, :50]
        by_score = np.argsort(-q @ k.T, axis=1)[:, :50]
        return np.mean([len(np.intersect1d(a, b)) for a, b in zip(by_distance, by_score, strict=True)]) / 50

    assert (nearest(*plain) != nearest(*hard)).mean() > 0.5
    assert recall_of_distance(*hard) < recall_of_distance(*plain) - 0.1


def test_strength_one_only_moves_the_keys():
    queries, keys = attention_vectors(100, 10, head_dim=16)
    same, moved = stress(queries, keys, strength=1.0)
    np.testing.assert_array_equal(same, queries)
    offsets = moved - keys
    np.testing.assert_allclose(offsets, np.broadcast_to(offsets[0], offsets.shape), atol=1e-4)
    assert np.linalg.norm(offsets[0]) > 1
