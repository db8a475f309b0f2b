"""Reference of the exact top-k: every score at once, a full sort. Clear, not fast."""

from __future__ import annotations

import torch
from torch import Tensor


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
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    scores, ids = scores[..., :k], ids[..., :k].to(torch.int32)
    missing = k - ids.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return ids.masked_fill(scores == float("-inf"), -1), scores
