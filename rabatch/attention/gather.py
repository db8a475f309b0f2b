"""Attention over a different set of keys per row: a compiled kernel on the CPU, torch elsewhere.

The retrieved values lie anywhere in memory. The kernel reads each once, in its stored dtype, and asks for the next
before it needs them; torch copies them together first (`merge.gathered_partial`, the reference).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.merge import Partial, gathered_partial, logits
from rabatch.index.compiled import compiled, read_only, run_ranges
from rabatch.index.machine import add_scaled, prefetch

_AHEAD = 6  # values whose memory is asked for before they are added


def attend_found(
    scores: Tensor, ids: Tensor, values: Tensor, *, scaling: float, softcap: float | None, threads: int = 0
) -> Partial:
    """Attend the keys that an index found, of which the products q.k are known already.

    Args:
        scores: Raw products [n_kv, n_rows, k], float32.
        ids: Rows of `values`, int64 [n_kv, n_rows, k]; -1 where there is no key.
        values: [n_kv, n_keys, head_dim], float32, bfloat16 or float16.
        threads: Threads, on the CPU; 0: as many as torch uses.
    """
    if values.device.type != "cpu" or ids.numel() == 0 or values.shape[1] == 0:
        return gathered_partial(scores, ids, values, scaling=scaling, softcap=softcap)
    n_kv, n_rows, _ = ids.shape
    masked = logits(scores, scaling, softcap).masked_fill(ids < 0, -math.inf)
    out = np.zeros((n_kv, n_rows, values.shape[-1]), np.float32)
    lse = np.empty((n_kv, n_rows), np.float32)
    stored = values.contiguous()
    bits = stored.numpy() if stored.dtype == torch.float32 else stored.view(torch.int16).numpy().view(np.uint16)
    inputs = [read_only(array) for array in (masked.numpy(), ids.numpy(), bits)]
    half = values.dtype == torch.float16

    def attend(start: int, stop: int) -> None:
        _attend_range(*inputs, half, start, stop, out, lse)

    run_ranges(attend, n_kv * n_rows, threads=threads or torch.get_num_threads(), chunks_per_thread=2)
    return Partial(torch.from_numpy(out), torch.from_numpy(lse))


@compiled
def _attend_range(masked, ids, values, half, start, stop, out, lse):  # type: ignore[no-untyped-def]
    n_rows, k = masked.shape[1], masked.shape[2]
    n_keys, dim = values.shape[1], values.shape[2]
    per_line = max(64 // values.itemsize, 1)
    for item in range(start, stop):
        head, row = item // n_rows, item % n_rows
        best = np.float32(-np.inf)
        for j in range(k):
            best = max(best, masked[head, row, j])
        if best == -np.inf:
            lse[head, row] = -np.inf
            continue
        total = np.float32(0.0)
        for j in range(k):
            coming = ids[head, row, j + _AHEAD] if j + _AHEAD < k else -1
            if coming >= 0:
                for line in range(0, dim, per_line):
                    prefetch(values, (head * n_keys + coming) * dim + line)  # type: ignore[call-arg]
            if ids[head, row, j] >= 0:
                weight = np.exp(masked[head, row, j] - best)
                total += weight
                add_scaled(out[head, row], values, head, ids[head, row, j], weight, half)
        for t in range(dim):
            out[head, row, t] /= total
        lse[head, row] = best + np.log(total)
