"""Zones: of near keys, the same whoever makes them; sums as NumPy makes them; and they estimate what they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import ConfigError, KeysError
from rabatch.index.machine import _numbers
from rabatch.index.zones import SEGMENT_KEYS, _assign, _panels, partition, zone_sums


def clustered(n_keys, *, n_heads=1, dim=16, n_clusters=20, seed=0):
    """Keys around a few centres, in any order, far from the origin."""
    random = np.random.default_rng(seed)
    centers = 3 * random.standard_normal((n_heads, n_clusters, dim))
    near = centers[:, random.integers(0, n_clusters, n_keys)]
    return (50 + near + 0.3 * random.standard_normal(near.shape)).astype(np.float32)


def spread_in(keys, zones):
    """Mean squared distance of the keys [n, dim] of one head to the mean of their zone."""
    means = np.stack([keys[zones == z].mean(axis=0, dtype=np.float64) for z in range(zones.max() + 1)])
    return float(np.square(keys - means[zones]).sum(axis=1).mean())


@pytest.mark.parametrize("n_keys", [1, 63, 64, 65, 700, SEGMENT_KEYS + 1, 2 * SEGMENT_KEYS + 77])
def test_numbers_have_no_gaps_and_stay_in_their_segment(n_keys):
    zones = partition(clustered(n_keys, n_heads=2), zone_tokens=64)
    assert (zones.shape, zones.dtype) == ((2, n_keys), np.int32)
    n_segments = -(-n_keys // SEGMENT_KEYS)
    for of_head in zones:
        np.testing.assert_array_equal(np.unique(of_head), np.arange(of_head.max() + 1))
        assert of_head.max() + 1 <= -(-n_keys // 64) + n_segments
        bounds = np.linspace(0, n_keys, n_segments + 1).astype(int)
        pieces = np.split(of_head, bounds[1:-1])
        assert all(before.max() < after.min() for before, after in itertools.pairwise(pieces))
    if n_keys >= 64:
        assert zones.max() + 1 > 0.5 * n_keys / 64


@pytest.mark.parametrize("n_keys", [300, SEGMENT_KEYS + 500])
def test_threads_change_nothing(n_keys):
    keys = clustered(n_keys, n_heads=3, seed=1)
    one = partition(keys, zone_tokens=16, threads=1)
    for threads in (2, 5):
        np.testing.assert_array_equal(partition(keys, zone_tokens=16, threads=threads), one)
    for head in range(3):  # nor do other heads
        np.testing.assert_array_equal(partition(keys[head : head + 1], zone_tokens=16)[0], one[head])


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_keys_are_near_the_mean_of_their_zone(dim):
    keys = clustered(3000, dim=dim, seed=2)
    zones = partition(keys, zone_tokens=64)[0]
    shuffled = np.random.default_rng(0).permutation(zones)
    assert spread_in(keys[0], zones) < 0.3 * spread_in(keys[0], shuffled)
    pages = np.arange(3000, dtype=np.int32) // 64
    assert spread_in(keys[0], zones) < 0.3 * spread_in(keys[0], pages)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), n_keys=st.integers(1, 60), count=st.integers(1, 40), dim=st.integers(1, 20))
def test_a_key_goes_to_its_nearest_centroid(seed, n_keys, count, dim):
    random = np.random.default_rng(seed)
    keys, centroids = (random.standard_normal((n, dim)).astype(np.float32) for n in (n_keys, count))
    nearest = np.full(n_keys, -1, np.int64)
    rows = np.concatenate([keys, np.ones((n_keys, 1), np.float32)], axis=1)
    _assign(np.pad(rows, ((0, -n_keys % 6), (0, 0))).ravel(), _panels(centroids), dim + 1, count, nearest)
    distances = np.square(keys[:, None].astype(np.float64) - centroids).sum(axis=2)
    np.testing.assert_allclose(distances[np.arange(n_keys), nearest], distances.min(axis=1), atol=1e-4)


@pytest.mark.parametrize("zone_tokens", [1, 7, 64, 10**6])
def test_identical_keys_are_one_zone(zone_tokens):
    zones = partition(np.full((2, 200, 8), 3.7, np.float32), zone_tokens=zone_tokens)
    np.testing.assert_array_equal(zones, 0)


def test_one_key_a_zone():
    zones = partition(clustered(200, n_clusters=200), zone_tokens=1)[0]
    np.testing.assert_array_equal(np.sort(zones), np.arange(200))


def test_nothing_to_divide():
    assert partition(np.empty((3, 0, 8), np.float32), zone_tokens=64).shape == (3, 0)
    sums = zone_sums(np.empty((3, 0, 8), np.float32), np.empty((3, 0, 4), np.float32), np.empty((3, 0), np.int32))
    assert [array.shape for array in sums] == [(3, 0), (3, 0, 8), (3, 0, 4)]


def test_large_keys_do_not_overflow():
    keys = clustered(500, seed=3)
    zones = partition(keys, zone_tokens=32)
    np.testing.assert_array_equal(partition(keys * np.float32(2.0**110), zone_tokens=32), zones)


def test_what_cannot_be_divided_is_named():
    with pytest.raises(ConfigError, match="zone_tokens"):
        partition(clustered(10), zone_tokens=0)
    keys = clustered(100, n_heads=2)
    keys[1, 50, 3] = np.nan
    with pytest.raises(KeysError, match="KV head 1"):
        partition(keys, zone_tokens=8)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_are_those_of_numpy(kind, threads):
    random = np.random.default_rng(4)
    rows, first, n_keys, n_zones = 900, 37, 811, 13
    keys, values = (random.standard_normal((3, rows, dim)).astype(np.float32) for dim in (33, 16))
    if kind == "bfloat16":
        keys, values = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (keys, values))
    elif kind == "float16":
        keys, values = (x.astype(np.float16).view(np.uint16) for x in (keys, values))
    half = kind == "float16"
    zones = random.integers(0, n_zones, (3, n_keys)).astype(np.int32)
    zones[1] = np.minimum(zones[1], 5)  # a head with fewer zones
    made = zone_sums(keys, values, zones, half=half, first_row=first, threads=threads)
    assert [array.dtype for array in made] == [np.int64, np.float32, np.float32]
    for head in range(3):
        np.testing.assert_array_equal(made.counts[head], np.bincount(zones[head], minlength=n_zones))
        for states, sums in ((keys, made.key_sums), (values, made.value_sums)):
            numbers = _numbers(states[head, first : first + n_keys], half).astype(np.float64)
            expected = np.zeros((n_zones, numbers.shape[1]))
            np.add.at(expected, zones[head], numbers)
            np.testing.assert_allclose(sums[head], expected, atol=1e-4)


def test_sums_of_what_does_not_fit_are_refused():
    keys, zones = np.zeros((2, 10, 4), np.float32), np.zeros((2, 8), np.int32)
    with pytest.raises(KeysError, match="from row 3"):
        zone_sums(keys, keys, zones, first_row=3)
    with pytest.raises(KeysError, match="from row -1"):
        zone_sums(keys, keys, zones, first_row=-1)
    with pytest.raises(KeysError, match="keys"):
        zone_sums(keys[:1], keys, zones)
    with pytest.raises(KeysError, match="values"):
        zone_sums(keys, keys[:, :7], zones)
    with pytest.raises(KeysError, match=">= 0"):
        zone_sums(keys, keys, zones - 1)
    with pytest.raises(ConfigError, match=r"values\.dtype"):
        zone_sums(keys, keys.astype(np.float64), zones)


def test_zones_estimate_the_attention_of_a_diffuse_head():
    """With the means of zones for their keys the output is near; without the keys, or with pages, it is not."""
    random = np.random.default_rng(5)
    keys = clustered(4000, dim=32, n_clusters=20, seed=5)
    values = ((keys - 50) @ random.standard_normal((32, 8)) + random.standard_normal((1, 4000, 8))).astype(np.float32)
    queries = 0.2 * random.standard_normal((20, 32))

    def attended(of_keys, of_values, counts):
        logits = queries @ of_keys.T.astype(np.float64) + np.log(counts)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights @ of_values / weights.sum(axis=1, keepdims=True)

    exact = attended(keys[0], values[0], np.ones(4000))

    def error(zones):
        counts, key_sums, value_sums = zone_sums(keys, values, zones)
        means = (sums[0] / counts[0][:, None] for sums in (key_sums, value_sums))
        return np.linalg.norm(attended(*means, counts[0]) - exact) / np.linalg.norm(exact)

    assert error(partition(keys, zone_tokens=64)) < 0.03
    pages = (np.arange(4000, dtype=np.int32) // 64)[None]
    assert error(pages) > 5 * error(partition(keys, zone_tokens=64))
