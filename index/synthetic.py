"""Query and key vectors as attention has them, for tests and benchmarks, and the stress that keeps every ordering.

What is imitated, measured on real heads: keys and queries lie in cones of their own that point elsewhere; the spectrum
decays as a power law (effective dimension about 20); neighbouring tokens are correlated (topics in runs, a drift
from token to token); the heads of a group look for different things; a few keys are wanted by many queries. Never
test with keys as queries: that is easy for every index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOPICS = 1024
_RUN_TOKENS = 24
_DRIFT = 0.7  # correlation of a key's own part with that of the key before


def attention_vectors(
    n_keys: int,
    n_queries: int,
    *,
    head_dim: int = 128,
    query_heads: int = 4,
    sharpness: float = 2.0,
    seed: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Queries of one query group and the keys of its KV head.

    Args:
        query_heads: Query heads that share the keys; each has a cone and a weighting of directions of its own.
        sharpness: Of the queries. At 64K keys of 128 dimensions the 100 best keys of a query hold 0.56 of the
            softmax mass at sharpness 1, 0.87 at 2, 0.97 at 3.

    Returns:
        queries: [n_queries, head_dim], float32, heads shuffled, so that a prefix is a random sample.
        keys: [n_keys, head_dim], float32.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, head_dim + 1) ** -0.5).astype(np.float32)
    spectrum *= np.float32(np.sqrt(head_dim / np.square(spectrum).sum()))
    basis = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0].astype(np.float32)
    length = np.float32(np.sqrt(head_dim))

    def noise(n: int) -> NDArray[np.float32]:
        return rng.standard_normal((n, head_dim), dtype=np.float32) * spectrum

    centers, weights = noise(_TOPICS), np.arange(1, _TOPICS + 1) ** -0.8
    runs = rng.choice(_TOPICS, n_keys // _RUN_TOKENS + 1, p=weights / weights.sum())
    drift = noise(n_keys)
    for token in range(1, n_keys):
        drift[token] = _DRIFT * drift[token - 1] + np.sqrt(1 - _DRIFT**2) * drift[token]
    latent = 0.75 * centers[np.repeat(runs, _RUN_TOKENS)[:n_keys]] + 0.65 * drift

    query_cone = _direction(rng, head_dim)
    popularity = np.minimum(rng.pareto(3.0, n_keys), 4.0).astype(np.float32)
    keys = latent @ basis.T + 3.0 * length * _direction(rng, head_dim) + 0.3 * popularity[:, None] * query_cone

    queries = np.zeros((n_queries, head_dim), np.float32)
    for head in range(query_heads):
        rows = slice(head, None, query_heads)
        n = len(range(head, n_queries, query_heads))
        gain = np.exp(0.5 * rng.standard_normal(head_dim, dtype=np.float32))
        if not n_keys:
            break  # without keys, there is nothing to look for: queries are zero
        wanted = 0.6 * latent[rng.integers(0, n_keys, n)] + 0.4 * latent[rng.integers(0, n_keys, n)]
        cone = 2.0 * _direction(rng, head_dim) + 0.45 * query_cone
        queries[rows] = ((wanted + 0.5 * noise(n)) * gain) @ basis.T * sharpness + length * cone
    rng.shuffle(queries)
    return queries, keys.astype(np.float32)


def stress(
    queries: NDArray[np.float32], keys: NDArray[np.float32], *, strength: float = 4.0, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pull the clouds of queries and keys apart and keep every ordering and every softmax.

    Query dimensions are multiplied and key dimensions divided by a factor, pairwise as RoPE would allow, and one
    constant vector is added to all keys, which adds a constant to all scores of a query. An index built from distances
    between keys alone fails on it; attention does not notice.

    Args:
        queries, keys: [n, head_dim], float32, `head_dim` even.
        strength: Largest factor, and the length of the constant in standard deviations of a key.
    """
    rng = np.random.default_rng(seed)
    dim = keys.shape[1]
    scale = np.repeat(strength ** rng.uniform(-1, 1, dim // 2), 2).astype(np.float32)
    stressed = keys / scale
    stressed += strength * stressed.std() * np.sqrt(dim, dtype=np.float32) * _direction(rng, dim)
    return queries * scale, stressed


def _direction(rng: np.random.Generator, dim: int) -> NDArray[np.float32]:
    vector = rng.standard_normal(dim, dtype=np.float32)
    return vector / np.linalg.norm(vector)
