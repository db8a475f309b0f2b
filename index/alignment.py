"""Second-moment alignment: a linear change of coordinates in which queries and keys look alike, at no loss.

q . k = (A^T q) . (A^-1 k) for every invertible A, and centring the keys adds one constant to all scores of a query. So
A may be chosen such that queries and centred keys have the same second moments: what is left between the clouds is
what no linear map removes. In these coordinates distances between keys mean what the queries make of them, and the
dimensions carry the error of a code in equal parts.

With Sq, Sk the second moments, B = A A^T = Sq^-1/2 (Sq^1/2 Sk Sq^1/2)^1/2 Sq^-1/2 solves A^-1 Sk A^-T = A^T Sq A: the
optimal transport map between Gaussians (Knott and Smith 1984, On the optimal mapping of distributions, eq. 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RIDGE = 1e-3  # of the mean eigenvalue: directions that no sampled query used keep a finite scale


@dataclass(frozen=True)
class Alignment:
    """A change of coordinates of the keys and queries of one KV head.

    Args:
        center: [head_dim], float32, the mean key.
        to_key: [head_dim, head_dim], float32: an aligned key is `to_key @ (key - center)`.
        to_query: [head_dim, head_dim], float32: an aligned query is `to_query @ query`; the inverse transpose.
    """

    center: NDArray[np.float32]
    to_key: NDArray[np.float32]
    to_query: NDArray[np.float32]

    def keys(self, keys: NDArray[np.float32]) -> NDArray[np.float32]:
        """Aligned keys, [n, head_dim] -> the same shape."""
        aligned: NDArray[np.float32] = np.matmul(keys - self.center, self.to_key.T)
        return aligned

    def queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Aligned queries; `aligned_query . aligned_key = query . key - query . center`."""
        return queries @ self.to_query.T


def align(keys: NDArray[np.float32], queries: NDArray[np.float32] | None) -> Alignment:
    """The alignment of one KV head; without queries, or keys, centring alone.

    Args:
        keys: [n_keys, head_dim], float32.
        queries: [n_queries, head_dim], float32, a sample; fewer than `head_dim` are mixed with the identity.
    """
    dim = keys.shape[1]
    center = keys.mean(axis=0) if len(keys) else np.zeros(dim, np.float32)
    if queries is None or not len(queries) or len(keys) < 2:
        return Alignment(center, np.eye(dim, dtype=np.float32), np.eye(dim, dtype=np.float32))
    of_keys, of_queries = _second_moment(keys - center), _second_moment(queries)
    root_q, inverse_root_q = _powers(of_queries, 0.5), _powers(of_queries, -0.5)
    b = inverse_root_q @ _powers(root_q @ of_keys @ root_q, 0.5) @ inverse_root_q
    return Alignment(center, _powers(b, -0.5).astype(np.float32), _powers(b, 0.5).astype(np.float32))


def _second_moment(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    moment = (vectors.T @ vectors).astype(np.float64) / len(vectors)
    scale = np.trace(moment) / len(moment) or 1.0
    return moment + _RIDGE * scale * np.eye(len(moment))


def _powers(matrix: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, values.max() * 1e-12)
    result: NDArray[np.float64] = (vectors * values**power) @ vectors.T
    return result
