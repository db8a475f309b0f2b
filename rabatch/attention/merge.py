"""Partial attention results over disjoint key sets, and their exact merge by log-sum-exp.

With partial outputs ``o_i`` and log-sum-exps ``l_i`` over disjoint key sets: ``l = logsumexp_i(l_i)`` and
``o = sum_i exp(l_i - l) * o_i`` (RetrievalAttention, section 3.3, equations 4 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLOCK_SCORES = 1 << 24
"""Scores held at once per KV head group by `dense_partial`: 64 MiB of float32."""


class Partial(NamedTuple):
    """Attention over one key set.

    Attributes:
        out: [..., n_rows, head_dim], float32; zero where the row sees no key of the set.
        lse: [..., n_rows], float32; log of the sum of exp(score), -inf where the row sees no key.
    """

    out: Tensor
    lse: Tensor


def logits(raw: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Raw products q·k to attention logits, float32. The soft cap (Gemma 2) is monotone: it reorders no keys."""
    scores = raw.float() * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _softmax_partial(scores: Tensor, values: Tensor) -> Partial:
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return Partial(weights @ values.float(), lse)


def dense_partial(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Partial:
    """Attend every key of a set, in blocks of rows so that memory stays bounded.

    Args:
        queries: [..., n_rows, head_dim].
        keys, values: [..., n_keys, head_dim]; the leading dimensions are those of the queries.
        scaling: Factor on q·k.
        softcap: Bound of the logits, or None.
        mask: Broadcastable to [..., n_rows, n_keys], True where a row sees a key. None: all.
    """
    n_rows, n_keys = queries.shape[-2], keys.shape[-2]
    if n_keys == 0 or n_rows == 0:
        return Partial(
            queries.new_zeros((*queries.shape[:-1], values.shape[-1]), dtype=torch.float32),
            torch.full(queries.shape[:-1], -torch.inf, device=queries.device),
        )
    keys_f, values_f = keys.float(), values.float()
    block_rows = max(1, MAX_BLOCK_SCORES // n_keys)
    parts = []
    for start in range(0, n_rows, block_rows):
        rows = slice(start, start + block_rows)
        scores = logits(queries[..., rows, :].float() @ keys_f.transpose(-1, -2), scaling, softcap)
        if mask is not None:
            scores = scores.masked_fill(~(mask if mask.shape[-2] == 1 else mask[..., rows, :]), -torch.inf)
        parts.append(_softmax_partial(scores, values_f))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], dim=-2), torch.cat([p.lse for p in parts], dim=-1))


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over the union of disjoint key sets. A row that sees no key at all gets zeros."""
    lse = torch.logsumexp(torch.stack([p.lse for p in parts]), dim=0)
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    out = torch.stack([torch.exp(p.lse - safe).unsqueeze(-1) * p.out for p in parts]).sum(dim=0)
    return Partial(out, lse)
