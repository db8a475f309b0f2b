"""References of the exact top-k and of the attention it comes with: every score at once, a full sort. Not fast."""

from __future__ import annotations

import torch
from torch import Tensor

from rabatch.index.topk.base import Attended, Request


def topk(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    *,
    k: int,
    scaling: float,
    first_key: int,
    end_key: int,
) -> tuple[Tensor, Tensor]:
    """See `rabatch.index.topk.topk`. Ties go to the lower id."""
    n_heads = queries.shape[0]
    repeated = keys.float().repeat_interleave(n_heads // keys.shape[0], dim=0)
    scores = scaling * (queries.float() @ repeated.transpose(1, 2))
    key_ids = torch.arange(keys.shape[1], device=keys.device)
    visible = (key_ids >= first_key) & (key_ids < end_key) & (key_ids <= query_positions[:, None].to(keys.device))
    scores = scores.masked_fill(~visible, float("-inf"))
    return _best(scores, k)


def attend(request: Request) -> Attended:
    """See `rabatch.index.topk.attention_topk`. Ties go to the lower id."""
    sample, device = request.sample, request.queries.device
    n_heads, n_rows, _ = request.queries.shape
    keys, values = (t.float().repeat_interleave(request.group, dim=0) for t in (request.keys, request.values))
    products = request.scaling * (request.queries.float() @ keys.transpose(1, 2))
    key_ids = torch.arange(keys.shape[1], device=device)
    visible = torch.zeros((n_rows, keys.shape[1]), dtype=torch.bool, device=device)
    for span in request.spans:
        positions = torch.arange(span.row_stop - span.row_start, device=device)[:, None] + span.at
        seen = (key_ids >= span.first_key) & (key_ids <= positions)
        if request.sliding_window:
            seen &= key_ids > positions - request.sliding_window
        visible[span.row_start : span.row_stop] = seen
    logits = products if request.softcap is None else request.softcap * torch.tanh(products / request.softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    out = torch.softmax(logits, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0) @ values
    rows, low, high = (t.expand(n_heads, -1) for t in (sample.rows, sample.low, sample.high))
    if not n_rows:
        nothing = torch.full((n_heads, rows.shape[1], sample.k), -1, dtype=torch.int32, device=device)
        return Attended(out.to(request.queries.dtype), torch.logsumexp(logits, dim=-1), nothing, nothing - torch.inf)
    of_rows = products.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, keys.shape[1]))
    kept = visible[rows.clamp(min=0)] & (key_ids >= low[..., None]) & (key_ids < high[..., None])
    ids, scores = _best(of_rows.masked_fill(~kept | (rows < 0)[..., None], float("-inf")), sample.k)
    return Attended(out.to(request.queries.dtype), torch.logsumexp(logits, dim=-1), ids, scores)


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    scores, ids = scores[..., :k], ids[..., :k].to(torch.int32)
    missing = k - ids.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return ids.masked_fill(scores == float("-inf"), -1), scores
