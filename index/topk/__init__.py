"""Exact top-k keys of query vectors, as part of the attention that a prefill computes anyway or apart from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rabatch.errors import ConfigError
from rabatch.index.topk import blocked, knn, launch, naive
from rabatch.index.topk.base import Attended, Request, Sample, Span, check_request

__all__ = ["Attended", "Request", "Sample", "Span", "attention_topk", "topk"]

_log = logging.getLogger(__name__)
_logged_choices: set[tuple[str, str, str]] = set()

KNN: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"naive": naive.topk, "blocked": knn.topk}
ATTENTION: dict[str, Callable[[Request], Attended]] = {
    "naive": naive.attend,
    "blocked": blocked.attend,
    "triton": launch.attend,
}


def attention_topk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    spans: Sequence[Span] | None = None,
    sample: Sample | None = None,
    softcap: float | None = None,
    sliding_window: int = 0,
    impl: str = "auto",
    threads: int = 0,
) -> Attended:
    """Exact causal attention, and the top-k keys of sampled rows out of the scores it computes anyway.

    Logits are scaling * (q . k) in float32, through softcap * tanh(logit / softcap) where there is a soft cap, which
    reorders nothing. RetrievalAttention, section 3.2, links keys to the queries these lists come from.

    Args:
        queries: [n_heads, n_rows, head_dim], float32, float16 or bfloat16, rotated.
        keys, values: [n_kv_heads, n_keys, head_dim] and [n_kv_heads, n_keys, value_dim]; query head `h` uses KV head
            `h // (n_heads // n_kv_heads)`. The heads may lie apart (a slice of a longer cache).
        scaling: Factor on q . k, positive.
        spans: Which rows belong together and which keys they see. None: all rows are the last ones of the keys.
        sample: Whose best keys are kept. None: nobody's.
        softcap: Bound of the logits, or None.
        sliding_window: Keys a row sees, itself the last; 0: all since the start of its span.
        impl: ``naive`` (the reference), ``blocked`` (CPU), ``triton`` (CUDA; on CPU tensors under
            TRITON_INTERPRET=1), or ``auto``: what the device of the queries has.
        threads: Of ``blocked``; 0: as many as torch uses. The result does not depend on it.

    Raises:
        ConfigError: Arguments that do not fit together, or an `impl` that cannot run here; names what can.
    """
    request = check_request(
        queries, keys, values, spans=spans, sample=sample, scaling=scaling, softcap=softcap,
        sliding_window=sliding_window, threads=threads,
    )  # fmt: skip
    device = queries.device.type
    impl = _chosen("attention", device, impl, "blocked" if device == "cpu" else "triton", ATTENTION)
    if impl == "blocked" and device != "cpu":
        raise ConfigError("impl", impl, f"runs on the CPU, these tensors are on {device}; choose triton or naive")
    with torch.no_grad():
        return ATTENTION[impl](request)


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
    impl = _chosen("top-k", queries.device.type, impl, "blocked", KNN)
    with torch.no_grad():
        return KNN[impl](queries, keys, query_positions, k=k, scaling=scaling, first_key=first, end_key=end)


def _chosen(what: str, device: str, impl: str, best: str, known: dict[str, Callable[..., Any]]) -> str:
    if impl == "auto":
        impl = best
        if (what, device, impl) not in _logged_choices:
            _logged_choices.add((what, device, impl))
            _log.info("%s on %s: %s", what, device, impl)
    if impl not in known:
        raise ConfigError("impl", impl, f"must be one of auto, {', '.join(known)}")
    return impl
