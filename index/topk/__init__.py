"""Exact top-k keys of query vectors: what prefill keeps for graph construction, and what flat retrieval returns."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from rabatch.errors import ConfigError
from rabatch.index.topk import blocked, naive

_log = logging.getLogger(__name__)
_logged_choices: set[tuple[str, str]] = set()

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"naive": naive.topk, "blocked": blocked.topk}


def topk(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    *,
    k: int,
    scaling: float = 1.0,
    key_range: tuple[int, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `k` highest-scoring visible keys of every query; score = scaling * (q . k), in float32.

    Key `j` is visible to a query at position `p` when `j <= p` (causal) and `first <= j < end` of `key_range`.

    Args:
        queries: [n_heads, n_queries, head_dim], float32, float16 or bfloat16.
        keys: [n_kv_heads, n_keys, head_dim]; query head `h` uses KV head `h // (n_heads // n_kv_heads)`.
        query_positions: [n_queries], int64, positions in the context (key `j` stands at position `j`).
        k: Keys per query, >= 1. May exceed the number of visible keys.
        scaling: Factor of the scores; must be positive, so it never changes the order.
        key_range: (first, end) of the keys that count, for example the context without the static set. None: all.
        impl: ``naive`` (the reference), ``blocked`` (bounded memory), or ``auto``.

    Returns:
        ids: [n_heads, n_queries, k], int32, indexes into `keys`, best first; -1 past the visible keys.
        scores: [n_heads, n_queries, k], float32; -inf where the id is -1.

    Raises:
        ConfigError: Unknown `impl`, or shapes, `k` or `key_range` that do not fit.
    """
    n_keys = keys.shape[1]
    first, end = key_range if key_range is not None else (0, n_keys)
    if k < 1:
        raise ConfigError("k", k, "must be >= 1")
    if not scaling > 0:
        raise ConfigError("scaling", scaling, "must be > 0")
    if not 0 <= first <= end <= n_keys:
        raise ConfigError("key_range", key_range, f"must satisfy 0 <= first <= end <= {n_keys} (the number of keys)")
    if queries.shape[0] % keys.shape[0] or queries.shape[2] != keys.shape[2]:
        raise ConfigError(
            "queries",
            tuple(queries.shape),
            f"heads must be a multiple of, head_dim equal to, keys' {tuple(keys.shape)}",
        )
    if query_positions.shape != queries.shape[1:2]:
        raise ConfigError("query_positions", tuple(query_positions.shape), "needs one position per query")
    if impl == "auto":
        impl = "blocked"
        choice = (impl, queries.device.type)
        if choice not in _logged_choices:
            _logged_choices.add(choice)
            _log.info("top-k on %s: %s", queries.device.type, impl)
    if impl not in IMPLEMENTATIONS:
        raise ConfigError("impl", impl, f"must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    with torch.no_grad():
        return IMPLEMENTATIONS[impl](queries, keys, query_positions, k=k, scaling=scaling, first_key=first, end_key=end)
