"""How much each key of a context was attended by the context's own queries (H2O's accumulated attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from rabatch.attention.merge import logits

_BLOCK_SCORES = 1 << 22  # float32 at once: 16 MiB


def key_mass(
    queries: Tensor,
    lse: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    index_range: tuple[int, int],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The softmax weights that queries give to the keys of an index, summed over queries and the heads of a group.

    Args:
        queries: [n_query_heads, n, head_dim], rotated.
        lse: [n_query_heads, n], float32: log of the sum of exp(logit) over all that each query sees.
        keys: [n_kv_heads, n_keys, head_dim]: of the context so far.
        positions: int64 [n], on the queries' device: each query sees the keys up to its own.
        index_range: Rows of the keys that the index will hold; those that are not there yet get nothing.

    Returns:
        [n_kv_heads, keys of the index], float32, on the CPU.
    """
    start, stop = index_range
    n_kv, last = len(keys), min(stop, keys.shape[1])
    mass = torch.zeros((n_kv, stop - start), device=keys.device)
    group = len(queries) // n_kv
    rows = torch.arange(start, last, device=keys.device)
    step = max(1, _BLOCK_SCORES // max(1, group * len(rows)))
    for head in range(n_kv):
        seen, of_head = keys[head, start:last].float(), slice(head * group, (head + 1) * group)
        for first in range(0, len(positions), step):
            some = slice(first, first + step)
            raw = logits(queries[of_head, some].float() @ seen.T, scaling, softcap)
            weights = torch.exp(raw - lse[of_head, some, None])
            weights = weights.masked_fill(rows > positions[some, None], 0.0)
            mass[head, : len(rows)] += weights.sum(dim=(0, 1))
    return mass.cpu()
