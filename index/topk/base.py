"""What attention with top-k is asked, and what it gives: the words shared by every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rabatch.errors import ConfigError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Span:
    """One document's rows in a call: a chunk of it, or one of several documents packed together.

    Row `row_start + i` stands at key `at + i` and sees the keys `first_key` .. `at + i`. Rows of no span (padding on
    the left, say) see nothing: their output is 0, their log-sum-exp -inf.
    """

    row_start: int
    row_stop: int
    first_key: int
    at: int


@dataclass(frozen=True)
class Sample:
    """Rows whose highest-scoring keys are kept.

    Attributes:
        rows: int64 [n_sampled], or [n_heads, n_sampled] where every query head has its own; each row at most once
            a head, -1 for none.
        low, high: int64, shaped as `rows`: the keys low <= j < high may be kept, of those that the row sees.
        k: Keys per row, at most.
    """

    rows: Tensor
    low: Tensor
    high: Tensor
    k: int


class Attended(NamedTuple):
    """Attention, and the top-k of the sampled rows.

    Attributes:
        out: [n_heads, n_rows, value_dim], in the dtype of the queries.
        lse: [n_heads, n_rows], float32: log of the sum of exp(logit).
        ids: [n_heads, n_sampled, k], int32, key rows, best first; -1 where there are no more.
        scores: [n_heads, n_sampled, k], float32: scaling * (q . k), before any soft cap; -inf where the id is -1.
    """

    out: Tensor
    lse: Tensor
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Request:
    """A call whose arguments were checked; every implementation takes one.

    `sample.rows`, `low` and `high` have a head dimension of 1 or n_heads and lie beside the queries.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    spans: tuple[Span, ...]
    sample: Sample
    scaling: float
    softcap: float | None
    sliding_window: int
    threads: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[0] // self.keys.shape[0]


def check_request(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    spans: Sequence[Span] | None,
    sample: Sample | None,
    scaling: float,
    softcap: float | None,
    sliding_window: int,
    threads: int,
) -> Request:
    """The arguments of `rabatch.index.topk.attention_topk`, checked and completed.

    Raises:
        ConfigError: Naming the argument that does not fit, and how it must be.
    """
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.ndim != 3 or tensor.dtype not in DTYPES:
            shown = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ConfigError(name, shown, "must be [heads, tokens, dim] of float32, float16 or bfloat16")
    n_rows, n_keys = queries.shape[1], keys.shape[1]
    if keys.shape[:2] != values.shape[:2] or keys.dtype != values.dtype:
        shape = f"{values.dtype} {tuple(values.shape)}"
        raise ConfigError("values", shape, f"must match keys, {keys.dtype} {tuple(keys.shape)}, in all but head_dim")
    if not len(keys) or queries.shape[0] % len(keys) or queries.shape[2] != keys.shape[2]:
        fix = f"heads must be a multiple of, head_dim equal to, keys' {tuple(keys.shape)}"
        raise ConfigError("queries", tuple(queries.shape), fix)
    if not scaling > 0:
        raise ConfigError("scaling", scaling, "must be > 0")
    if softcap is not None and not softcap > 0:
        raise ConfigError("softcap", softcap, "must be > 0, or None")
    if sliding_window < 0:
        raise ConfigError("sliding_window", sliding_window, "must be >= 1 token, or 0 for full attention")
    if threads < 0:
        raise ConfigError("threads", threads, "must be >= 1, or 0 for as many as torch uses")
    if spans is None:
        if n_rows > n_keys:
            raise ConfigError(
                "queries", n_rows, f"rows, of which only {n_keys} can be the last of the keys; give spans"
            )
        spans = (Span(0, n_rows, 0, n_keys - n_rows),)
    after = 0
    for span in spans:
        fits = span.row_start >= after and span.row_start <= span.row_stop <= n_rows
        last = span.at + span.row_stop - span.row_start
        if not fits or not 0 <= span.first_key <= span.at or last > n_keys:
            raise ConfigError("spans", span, f"must be ordered, apart, and within {n_rows} rows and {n_keys} keys")
        after = span.row_stop
    return Request(
        queries=queries,
        keys=keys,
        values=values,
        spans=tuple(span for span in spans if span.row_start < span.row_stop),
        sample=_checked_sample(sample, queries),
        scaling=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
        threads=threads or torch.get_num_threads(),
    )


def _checked_sample(sample: Sample | None, queries: Tensor) -> Sample:
    n_heads, n_rows = queries.shape[:2]
    if sample is None:
        nothing = torch.empty((1, 0), dtype=torch.int64, device=queries.device)
        return Sample(nothing, nothing, nothing, 1)
    if sample.k < 1:
        raise ConfigError("k", sample.k, "must be >= 1")
    rows = sample.rows if sample.rows.ndim == 2 else sample.rows[None]
    if rows.ndim != 2 or len(rows) not in (1, n_heads):
        raise ConfigError("sample.rows", tuple(sample.rows.shape), f"must be [n_sampled] or [{n_heads}, n_sampled]")
    for name in ("low", "high"):
        if getattr(sample, name).shape != sample.rows.shape:
            fix = f"must be shaped as sample.rows, {tuple(sample.rows.shape)}"
            raise ConfigError(f"sample.{name}", tuple(getattr(sample, name).shape), fix)
    if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= n_rows):
        raise ConfigError("sample.rows", [int(rows.min()), int(rows.max())], f"must lie in -1 .. {n_rows - 1}")
    in_order = rows.sort(dim=1).values
    if (in_order.diff(dim=1).eq(0) & (in_order[:, 1:] >= 0)).any():
        raise ConfigError("sample.rows", "a row twice", "must name each row of a head at most once")
    rows, low, high = (
        t.reshape(rows.shape).to(queries.device, torch.int64) for t in (sample.rows, sample.low, sample.high)
    )
    return Sample(rows, low, high, sample.k)
