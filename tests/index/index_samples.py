"""Layers of vectors for the tests of key indexes."""

from __future__ import annotations

import numpy as np

from rabatch.index.base import QuerySample
from rabatch.index.synthetic import attention_vectors, stress


def top_lists(queries, keys, length):
    """The exact top lists [n_queries, length], int32, of one head, padded with -1 when there are few keys."""
    lists = np.full((len(queries), length), -1, np.int32)
    order = np.argsort(-(queries.astype(np.float64) @ keys.T), axis=1, kind="stable")[:, :length]
    lists[:, : order.shape[1]] = order
    return lists


def samples_of(queries, keys, length=32):
    """One sample per head: queries [n_heads, n, head_dim] with their exact lists."""
    return [QuerySample(top_lists(q, k, length), q) for q, k in zip(queries, keys, strict=True)]


def stressed_layer(n_keys, n_queries, *, n_heads=1, head_dim=64, seed=0):
    """Queries [n_heads, n_queries, head_dim] and keys [n_heads, n_keys, head_dim] whose clouds lie apart."""
    heads = [
        stress(*attention_vectors(n_keys, n_queries, head_dim=head_dim, seed=seed + head), seed=seed + head)
        for head in range(n_heads)
    ]
    queries, keys = (np.stack(arrays) for arrays in zip(*heads, strict=True))
    return queries, keys


def recall(found, truth):
    """Mean share of `truth` [..., k] that stands in `found` [..., k]; rows are queries."""
    rows = zip(found.reshape(-1, found.shape[-1]), truth.reshape(-1, truth.shape[-1]), strict=True)
    return np.mean([len(np.intersect1d(a, b)) for a, b in rows]) / truth.shape[-1]
