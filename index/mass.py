"""How much of the softmax is found, and how far below the best score a key may lie to be worth finding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import ConfigError


def recovered_mass(found: NDArray[np.float32], ideal: NDArray[np.float32], *, scaling: float) -> NDArray[np.float64]:
    """Softmax mass of the keys found relative to that of the ideal ones, per query.

    Args:
        found, ideal: [..., k], float32, raw scores; -inf for nothing.
        scaling: Of the scores before the softmax.

    Returns:
        [...], 1 where as much was found; 1 for a query with nothing to find.
    """
    best = ideal.max(axis=-1, keepdims=True).astype(np.float64)
    best = np.where(np.isfinite(best), best, 0.0)
    of_found = np.exp((found - best) * scaling).sum(axis=-1)
    of_ideal = np.exp((ideal - best) * scaling).sum(axis=-1)
    return np.where(of_ideal > 0, of_found / np.maximum(of_ideal, np.finfo(np.float64).tiny), 1.0)


def beta_bound(share: float, n_keys: int, *, scaling: float) -> float:
    """The `beta` that keeps at least `share` of the softmax mass whatever the scores are.

    n keys that score less than the best minus beta hold less than n exp(-beta scaling) of the best key's weight, and
    of the mass not more than that: beta = ln(n / (1 - share)) / scaling. With n = 1 it is DIPR's -ln(alpha) sqrt(d)
    (AlayaDB, arXiv 2504.10326, section 6.1), where alpha is a share of the best key's weight.
    """
    if not 0 < share < 1:
        raise ConfigError("share", share, "must be in (0, 1)")
    return float(np.log(max(n_keys, 1) / (1 - share)) / scaling)


def beta_for(scores: NDArray[np.float32], share: float, *, scaling: float, quantile: float = 0.9) -> float:
    """The least `beta` that kept `share` of the softmax mass for a `quantile` of sampled queries of a head.

    Args:
        scores: [n_queries, n_keys], float32, raw scores of every key, or the best ones if they hold the mass.
        share: Of the mass of `scores`, in (0, 1).
        quantile: Of the queries for which it has to hold.
    """
    if not 0 < share < 1:
        raise ConfigError("share", share, "must be in (0, 1)")
    if scores.size == 0:
        return 0.0
    ranked = -np.sort(-scores, axis=1).astype(np.float64)
    weights = np.exp((ranked - ranked[:, :1]) * scaling)
    reached = np.cumsum(weights, axis=1) >= share * weights.sum(axis=1, keepdims=True)
    last = reached.argmax(axis=1)
    below = ranked[:, 0] - np.take_along_axis(ranked, last[:, None], axis=1)[:, 0]
    return float(np.quantile(below, quantile))
