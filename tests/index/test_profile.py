"""Profiles of the softmax mass against a loop that does what the words say."""

from __future__ import annotations

import numpy as np
import pytest

from rabatch.errors import KeysError
from rabatch.index import profile
from rabatch.index.profile import GRID, mass_profile


def naive(keys, queries, positions, *, index_range, window_tokens, scaling, softcap=None):
    rows = []
    for query, position in zip(queries, positions, strict=True):
        logits = scaling * (keys[: position + 1].astype(np.float64) @ query)
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        static = 0.0
        rest = []
        for j, weight in enumerate(weights):
            if index_range[0] <= j < index_range[1] and j <= position - window_tokens:
                rest.append(weight)
            else:
                static += weight
        rest.sort(reverse=True)
        rows.append([static + sum(rest[:count]) for count in (0, *GRID)])
    return np.mean(rows, axis=0)


def layer(n_keys, n_queries, *, dim=16, size=1.0, seed=0):
    random = np.random.default_rng(seed)
    keys = random.standard_normal((n_keys, dim)).astype(np.float32)
    queries = (size * random.standard_normal((n_queries, dim))).astype(np.float32)
    return keys, queries, np.sort(random.integers(n_keys // 2, n_keys, n_queries))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("n_keys", [60, 400, 3500])
def test_profile_is_the_naive_one(n_keys, size, softcap):
    keys, queries, positions = layer(n_keys, 9, size=size)
    kwargs = {"index_range": (10, n_keys - 30), "window_tokens": 30, "scaling": 0.25, "softcap": softcap}
    made = mass_profile(keys, queries, positions, **kwargs)
    assert (made.shape, made.dtype) == ((1 + len(GRID),), np.float32)
    np.testing.assert_allclose(made, naive(keys, queries, positions, **kwargs), atol=2e-6)
    assert (np.diff(made) >= 0).all()
    assert made[0] >= 0
    if n_keys <= GRID[-1]:
        assert made[-1] == 1
    else:
        assert size > 1 or made[-1] < 0.99


def test_numbers_have_six_digits():
    made = mass_profile(*layer(500, 3), index_range=(10, 470), window_tokens=30, scaling=0.25)
    np.testing.assert_array_equal(made, [np.float32(round(float(x), 6)) for x in made])


def test_blocks_of_queries_change_nothing(monkeypatch):
    keys, queries, positions = layer(300, 11)
    kwargs = {"index_range": (10, 270), "window_tokens": 30, "scaling": 0.25}
    whole = mass_profile(keys, queries, positions, **kwargs)
    order = np.random.default_rng(0).permutation(11)
    for scores in (1, 900):
        monkeypatch.setattr(profile, "_BLOCK_SCORES", scores)
        made = mass_profile(keys, queries[order], positions[order], **kwargs)
        np.testing.assert_allclose(made, whole, atol=2e-6)


def test_keys_behind_the_query_do_not_count():
    keys, queries, positions = layer(400, 5)
    kwargs = {"index_range": (10, 370), "window_tokens": 30, "scaling": 0.25}
    made = mass_profile(keys, queries, positions, **kwargs)
    keys[positions.max() + 1 :] *= 100
    np.testing.assert_array_equal(mass_profile(keys, queries, positions, **kwargs), made)


@pytest.mark.parametrize("index_range", [(10, 10), (0, 0), (50, 50)])
@pytest.mark.parametrize("position", [0, 5, 49])
def test_without_an_index_the_static_set_holds_everything(index_range, position):
    keys, queries, _ = layer(50, 1)
    made = mass_profile(keys, queries, np.array([position]), index_range=index_range, window_tokens=4, scaling=0.25)
    np.testing.assert_array_equal(made, 1)


def test_one_key_that_holds_the_mass_is_seen_in_the_first_number():
    keys, queries = np.zeros((1000, 4), np.float32), np.ones((2, 4), np.float32)
    keys[500] = 10
    made = mass_profile(keys, queries, np.array([900, 999]), index_range=(10, 950), window_tokens=50, scaling=1.0)
    assert made[0] < 1e-6
    np.testing.assert_allclose(made[1:], 1)


def test_what_has_no_profile_is_named():
    keys, queries, positions = layer(50, 2)
    kwargs = {"index_range": (5, 40), "window_tokens": 10, "scaling": 0.25}
    with pytest.raises(KeysError, match="at least one query"):
        mass_profile(keys, queries[:0], positions[:0], **kwargs)
    for bad in (-1, 50):
        with pytest.raises(KeysError, match="positions"):
            mass_profile(keys, queries, np.array([3, bad]), **kwargs)
