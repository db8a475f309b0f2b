"""Scoring candidates again: the kernel is a sort of exact scores."""

from __future__ import annotations

import numpy as np
import pytest

from rabatch.index.base import empty_result
from rabatch.index.codes import DTYPES, encode
from rabatch.index.rerank import rerank


def candidates(n_heads, n_queries, m, n_keys, *, gaps, seed=0):
    """Different ids per query, every `gaps`-th of them missing."""
    rng = np.random.default_rng(seed)
    found = empty_result(n_heads, n_queries, m)
    for row in found.ids.reshape(-1, m):
        row[:] = rng.permutation(n_keys)[:m]
        row[::gaps] = -1
    found.visited[:], found.distances[:] = 7, 11
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 3), (40, 40), (33, 64), (64, 7)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_by_exact_score(dtype, m, k, threads):
    rng = np.random.default_rng(1)
    keys = rng.integers(-2, 3, (2, 70, 6)).astype(np.float32)  # full of ties
    queries = rng.integers(-2, 3, (2, 5, 6)).astype(np.float32)
    exact = encode(keys, dtype)
    found = candidates(2, 5, m, 70, gaps=4)
    result = rerank(found, exact, queries, k=k, threads=threads)
    decoded = exact.decode()
    for head in range(2):
        for row in range(5):
            listed = [int(i) for i in found.ids[head, row] if i >= 0]
            worth = {i: float(decoded[head, i] @ queries[head, row]) for i in listed}
            n = min(k, len(listed))
            assert (result.ids[head, row, n:] == -1).all()
            assert np.isneginf(result.scores[head, row, n:]).all()
            got = result.ids[head, row, :n].tolist()
            assert len(set(got)) == n
            np.testing.assert_allclose(result.scores[head, row, :n], [worth[i] for i in got], rtol=0, atol=2e-5)
            np.testing.assert_allclose(
                result.scores[head, row, :n], sorted(worth.values())[::-1][:n], rtol=0, atol=2e-5
            )
            if dtype != "int8":  # scores of small integers are exact: ties go to the lower id
                assert got == sorted(listed, key=lambda i: (-worth[i], i))[:n]
            assert result.visited[head, row] == 7
            assert result.distances[head, row] == 11 + len(listed)
