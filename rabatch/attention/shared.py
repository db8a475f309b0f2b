"""Exact attention of many rows over the same keys, which are loaded once for all of them (prefix sharing, DeFT)."""

from __future__ import annotations

import torch
from torch import Tensor

from rabatch.attention.merge import Partial
from rabatch.index.topk import Sample, attention_topk


def attend_all(
    rows: Tensor, keys: Tensor, values: Tensor, *, top_k: int, scaling: float, softcap: float | None
) -> tuple[Partial, Tensor, Tensor]:
    """Attend every key of a set, and the keys that each row scores highest.

    Rows of a KV head stand beside each other as if they were its query heads, at the position of the last key: the
    kernel that prefills then takes each block of keys through all of them, in the stored dtype.

    Args:
        rows: [n_kv, n_rows, head_dim].
        keys, values: [n_kv, n_keys, head_dim].
        top_k: Keys named per row, at most.

    Returns:
        The partial result, [n_kv, n_rows, ...]; ids int64 [n_kv, n_rows, top_k], -1 where there are no more; and their
        raw products q . k.
    """
    n_kv, n_rows, dim = rows.shape
    n_keys = keys.shape[1]
    first = torch.zeros(1, dtype=torch.int64)
    found = attention_topk(
        rows.reshape(n_kv * n_rows, 1, dim).float(),
        keys,
        values,
        scaling=scaling,
        softcap=softcap,
        sample=Sample(first, first, first + n_keys, min(top_k, n_keys)),
    )
    out = found.out.reshape(n_kv, n_rows, -1)
    ids, scores = (t.reshape(n_kv, n_rows, -1) for t in (found.ids.long(), found.scores))
    return Partial(out, found.lse.reshape(n_kv, n_rows)), ids, scores / scaling
