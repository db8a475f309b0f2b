"""The flat index returns the exact top-k, in blocks or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rabatch.errors import KeysError
from rabatch.index import flat
from rabatch.index.flat import FlatIndex


@pytest.mark.parametrize(
    ("n_kv", "n_keys", "n_queries", "k"),
    [
        pytest.param(2, 1500, 9, 20, id="folded"),
        pytest.param(3, 7, 2, 20, id="fewer-keys-than-k"),
        pytest.param(1, 300, 1, 300, id="all"),
        pytest.param(2, 0, 3, 4, id="no-keys"),
        pytest.param(2, 5, 0, 4, id="no-queries"),
    ],
)
@pytest.mark.parametrize("block_scores", [1 << 22, 4000])
def test_exact(monkeypatch, n_kv, n_keys, n_queries, k, block_scores):
    monkeypatch.setattr(flat, "_MAX_BLOCK_SCORES", block_scores)
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((n_kv, n_keys, 8), np.float32)
    queries = rng.standard_normal((n_kv, n_queries, 8), np.float32)
    result = FlatIndex(keys).search(queries, k=k)
    expected = -np.sort(-(queries @ keys.transpose(0, 2, 1)), axis=-1)[..., :k]
    found = min(k, n_keys)
    np.testing.assert_allclose(result.scores[..., :found], expected, rtol=1e-5, atol=1e-5)
    assert (result.ids[..., found:] == -1).all()
    assert (result.visited == n_keys).all()
    if n_keys:
        of_ids = np.take_along_axis(queries @ keys.transpose(0, 2, 1), result.ids[..., :found].astype(int), axis=-1)
        np.testing.assert_allclose(of_ids, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_takes_read_only_keys():
    keys = np.ones((1, 4, 2), np.float32)
    keys.flags.writeable = False
    queries = np.ones((1, 1, 2), np.float32)
    queries.flags.writeable = False
    assert FlatIndex(keys).search(queries, k=4).scores.tolist() == [[[2.0] * 4]]
    assert isinstance(FlatIndex(keys)._keys, torch.Tensor)


def test_wrong_dtype():
    with pytest.raises(KeysError, match="keys"):
        FlatIndex(np.ones((1, 4, 2)))
