"""What `rabatch.index.scan_search` does, in NumPy: the reference of its kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.index.codes import KeyCodes
from rabatch.index.lookup import MAX_LEVEL


def tables_of(query: NDArray[np.float32], books: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What each word adds to a score: query [2 * n_codes], books [n_codes, 16, 2] -> whole numbers, [n_codes, 16]."""
    products = np.einsum("cwd,cd->cw", books, query.reshape(-1, 2)).astype(np.float32)
    products -= products.min(axis=1, keepdims=True)
    level = min(MAX_LEVEL, 32767 // (2 * -(-len(books) // 2)))
    widest = products.max(initial=0)
    return np.floor(products * (level / widest if widest > 0 else 0) + 0.5).astype(np.uint8)


def sums_of(tables: NDArray[np.uint8], codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Per key the sum over its codes [n_keys, n_bytes], two to a byte, the lower half first: [n_keys]."""
    words = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)[:, : len(tables)]
    return tables[np.arange(len(tables)), words].astype(np.int64).sum(axis=1)


def scan(
    query: NDArray[np.float32],
    aligned: NDArray[np.float32],
    codes: NDArray[np.uint8],
    books: NDArray[np.float32],
    exceptions: NDArray[np.int32],
    keys: KeyCodes,
    head: int,
    *,
    k: int,
    effort: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `k` best of the exceptions and of the `effort` keys with the greatest sums: ids and scores, best first."""
    sums = sums_of(tables_of(aligned, books), codes)
    known = exceptions[exceptions >= 0]
    sums[known] = -1
    chosen = np.concatenate([np.argsort(-sums, kind="stable")[: min(effort, len(sums) - len(known))], known])
    scores = keys.rows(head, chosen.astype(np.int32)) @ query
    best = np.lexsort((chosen, -scores))[:k]
    return chosen[best], scores[best]
