"""Shares of the softmax mass, and the distances from the best score that keep them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import ConfigError
from rabatch.index.mass import beta_bound, beta_for, recovered_mass


def softmax(scores, scaling):
    weights = np.exp((scores - scores.max(axis=-1, keepdims=True)) * scaling)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_recovered_mass_is_relative_to_the_ideal():
    ideal = np.array([[3.0, 2.0, 1.0], [300.0, 200.0, 100.0]], np.float32)
    found = np.array([[3.0, 1.0, -np.inf], [200.0, 100.0, -np.inf]], np.float32)
    share = recovered_mass(found, ideal, scaling=0.5)
    weights = softmax(ideal[0], 0.5)
    np.testing.assert_allclose(share, [weights[0] + weights[2], 0.0], atol=1e-12)
    np.testing.assert_allclose(recovered_mass(ideal, ideal, scaling=0.5), 1.0)


def test_a_query_with_nothing_to_find_has_lost_nothing():
    nothing = np.full((2, 3), -np.inf, np.float32)
    np.testing.assert_array_equal(recovered_mass(nothing, nothing, scaling=1.0), 1.0)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    n_keys=st.integers(1, 200),
    spread=st.floats(0.01, 30),
    share=st.floats(0.01, 0.999),
    scaling=st.floats(0.05, 2),
)
def test_the_bound_holds_whatever_the_scores_are(seed, n_keys, spread, share, scaling):
    scores = spread * np.random.default_rng(seed).standard_normal((3, n_keys))
    beta = beta_bound(share, n_keys, scaling=scaling)
    kept = scores >= scores.max(axis=1, keepdims=True) - beta
    assert (np.where(kept, softmax(scores, scaling), 0).sum(axis=1) >= share - 1e-9).all()


def test_the_bound_of_one_key_is_that_of_the_paper():
    assert beta_bound(0.9, 1, scaling=128**-0.5) == pytest.approx(-np.log(0.1) * 128**0.5)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_beta_of_sampled_queries_keeps_the_share_for_a_quantile_of_them(quantile):
    scores = (5 * np.random.default_rng(1).standard_normal((400, 300))).astype(np.float32)
    beta = beta_for(scores, 0.9, scaling=0.5, quantile=quantile)
    weights = softmax(scores.astype(np.float64), 0.5)

    def share_of_queries(radius):
        kept = scores >= scores.max(axis=1, keepdims=True) - radius
        return float((np.where(kept, weights, 0).sum(axis=1) >= 0.9).mean())

    assert share_of_queries(beta + 1e-4) >= quantile - 0.01
    assert share_of_queries(0.5 * beta) < quantile


def test_beta_without_queries_is_nothing():
    assert beta_for(np.empty((0, 5), np.float32), 0.9, scaling=1.0) == 0.0


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, np.nan])
def test_shares_out_of_range(share):
    with pytest.raises(ConfigError, match="share"):
        beta_bound(share, 10, scaling=1.0)
    with pytest.raises(ConfigError, match="share"):
        beta_for(np.ones((1, 3), np.float32), share, scaling=1.0)
