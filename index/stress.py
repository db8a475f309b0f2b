"""Out-of-distribution queries and keys for tests and benchmarks, as attention has them.

Keys are clustered and drift from token to token; queries come from another cloud that looks at mixtures of the
clusters. Then the transform that pulls the clouds apart and keeps every ordering: query dimensions are multiplied
and key dimensions divided by a factor, pairwise as RoPE would allow, and one constant vector is added to all keys.
An index built from distances between keys fails on it; attention does not notice (q . k changes by a constant per
query). Never test with keys as queries: that is easy for every index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stressed_vectors(
    n_keys: int, n_queries: int, *, head_dim: int = 64, seed: int = 0, strength: float = 4.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Queries and keys whose clouds lie far apart.

    Args:
        strength: Largest factor between the scales of a dimension in queries and in keys, and the length of the
            constant in standard deviations of a key. 1 and below: no transform.

    Returns:
        queries: [n_queries, head_dim], float32, shuffled, so that a prefix is a random sample.
        keys: [n_keys, head_dim], float32.
    """
    rng = np.random.default_rng(seed)
    rank, clusters = head_dim // 4, 96
    mix_keys = rng.standard_normal((rank, head_dim)) / np.sqrt(rank)
    centers = rng.standard_normal((clusters, rank)) * rng.gamma(2.0, 0.5, (clusters, 1))
    runs = np.repeat(rng.integers(0, clusters, n_keys // 12 + 1), 12)[:n_keys]
    latent = centers[runs] + 0.6 * rng.standard_normal((n_keys, rank))
    keys = latent @ mix_keys + 0.35 * rng.standard_normal((n_keys, head_dim))

    blend = rng.dirichlet(np.full(clusters, 0.02), n_queries)
    wanted = blend @ centers + 0.5 * rng.standard_normal((n_queries, rank))
    queries = wanted @ mix_keys * 1.5 + 0.25 * rng.standard_normal((n_queries, head_dim))
    queries += rng.standard_normal(head_dim)

    if strength > 1:
        scale = np.repeat(strength ** rng.uniform(-1, 1, head_dim // 2), 2)
        queries *= scale
        keys /= scale
        keys += strength * keys.std() * np.sqrt(head_dim) * _unit(rng.standard_normal(head_dim))
    return queries.astype(np.float32), keys.astype(np.float32)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.linalg.norm(vector)
