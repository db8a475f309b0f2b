"""Causal attention on the CPU that also keeps the best keys of sampled rows: every score is computed once.

A task takes the rows of one KV head (all query heads of its group) against blocks of 256 keys, six rows at a time:
their scores stay in the first-level cache while maxima, exp and the sum of values are made of them (the online
softmax of FlashAttention, arXiv 2205.14135, algorithm 1). A sampled row lists its k best; 16 scores are compared
with the worst of them at once, and few pass. Keeping a maximum per group of keys and scoring the best groups
again was measured too, and lost (docs/prefill.md). Memory beyond the result: a few hundred rows and 256 keys per
thread. No row's result depends on which rows share its task, so a chunk changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rabatch.compiling import compiled
from rabatch.index.compiled import read_only, run_tasks
from rabatch.index.machine import spread
from rabatch.index.topk.base import Attended, Request, Span
from rabatch.index.topk.best import collect, room_for, settle
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, exp_minus, greatest, soften

BLOCK_KEYS = 256  # their keys and values, as float32, fit the second-level cache; 128 and 512 measured no faster
_TASK_ROWS = 480  # rows over which a block's unpacking is shared; 192 to 768 are within the noise of each other


def attend(request: Request) -> Attended:
    """See `rabatch.index.topk.attention_topk`; for tensors on the CPU. Ties go to the lower id."""
    queries, group = request.queries, request.group
    n_heads, n_rows, _ = queries.shape
    n_kv, n_keys, value_dim = request.values.shape
    scaled = read_only((queries.float() * request.scaling).numpy())
    keys, values = (_codes(states) for states in (request.keys, request.values))
    slots = _slots(request.sample.rows, n_rows)
    low, high = (read_only(bound.numpy()) for bound in (request.sample.low, request.sample.high))
    out = np.zeros((n_rows, n_heads, value_dim), np.float32)
    lse = np.full((n_heads, n_rows), -np.inf, np.float32)
    shape = (n_heads, request.sample.rows.shape[1], request.sample.k)
    scores, ids = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    half = request.keys.dtype == torch.float16
    window, softcap = request.sliding_window or n_keys + 1, np.float32(request.softcap or 0)

    def work(head: int, span: Span, start: int, stop: int) -> None:
        where = (head, group, start, stop, span.at + start - span.row_start, span.first_key, window)
        _attend_rows(scaled, keys[head], values[head], half, *where, softcap, slots, low, high, scores, ids, out, lse)

    step = max(1, _TASK_ROWS // group)
    tasks = [
        (head, span, start, min(start + step, span.row_stop))
        for span in request.spans
        for start in range(span.row_start, span.row_stop, step)
        for head in range(n_kv)
    ]
    tasks.sort(key=lambda task: task[1].row_start - task[1].at - task[2])  # the rows that see most go first
    run_tasks(work, tasks, threads=request.threads)
    attended = torch.from_numpy(out).transpose(0, 1).to(queries.dtype)
    return Attended(attended, *(torch.from_numpy(array) for array in (lse, ids, scores)))


def _codes(states: Tensor) -> list[np.ndarray]:
    """The states of each KV head, [1, n_keys, dim]: float32, or the bits of 16-bit floats as uint16. No copy."""
    bits = states if states.dtype == torch.float32 else states.view(torch.int16)
    arrays = (head[None].numpy() for head in bits)
    return [read_only(a if a.dtype == np.float32 else a.view(np.uint16)) for a in arrays]


def _slots(rows: Tensor, n_rows: int) -> np.ndarray:
    """Where in the sample each row stands, int32 [1 or n_heads, n_rows]; -1 for the rows that are not in it."""
    slots = torch.full((len(rows), n_rows + 1), -1, dtype=torch.int32)
    ours = torch.arange(rows.shape[1], dtype=torch.int32).expand(rows.shape)
    slots.scatter_(1, torch.where(rows < 0, n_rows, rows), ours)
    return read_only(slots[:, :n_rows].numpy())


@compiled
def _attend_rows(  # type: ignore[no-untyped-def]
    queries, keys, values, half, head, group, start, stop, at, first, window, softcap,
    slots, low, high, scores, ids, out, lse,
):  # fmt: skip
    """Rows start .. stop - 1 of every query head of a group; row `start` stands at key `at`."""
    dim, value_dim = keys.shape[2], values.shape[2]
    wide = (value_dim + LANES - 1) // LANES * LANES
    n = (stop - start) * group
    n_strips = (n + TILE_ROWS - 1) // TILE_ROWS
    ours = np.zeros(n_strips * TILE_ROWS * dim, np.float32)
    for i in range(n):
        for t in range(dim):
            ours[i * dim + t] = queries[head * group + i % group, start + i // group, t]
    sums = np.zeros(n_strips * TILE_ROWS * wide, np.float32)
    best, total = np.full(n, np.float32(-np.inf)), np.zeros(n, np.float32)
    maps = slots.shape[0]
    after = at + stop - start
    listed = np.full(n, -1)  # which list a sampled row has
    n_lists = 0
    for i in range(n):
        if slots[min(head * group + i % group, maps - 1), start + i // group] >= 0:
            listed[i] = n_lists
            n_lists += 1
    k = scores.shape[2]
    lists = np.empty((n_lists, room_for(k, after - first)), np.uint64)
    kept, bars = np.zeros(n_lists, np.int64), np.full(n_lists, np.float32(-np.inf))
    panels_of_keys = np.zeros(BLOCK_KEYS * dim, np.float32)
    block_values = np.zeros(BLOCK_KEYS * wide, np.float32)
    lines, line = np.empty(TILE_ROWS * BLOCK_KEYS, np.float32), np.empty(BLOCK_KEYS, np.float32)
    origin = first + (max(first, at - window + 1) - first) // BLOCK_KEYS * BLOCK_KEYS
    for begin in range(origin, after, BLOCK_KEYS):
        end = min(begin + BLOCK_KEYS, after)
        for j in range(end - begin):  # 16 keys side by side, for products with one number of a query each
            spread(panels_of_keys, j // LANES * LANES * dim + j % LANES, LANES, keys, 0, begin + j, half)
            spread(block_values, j * wide, 1, values, 0, begin + j, half)
        for top in range(0, n, TILE_ROWS):
            seen = min(at + (min(top + TILE_ROWS, n) - 1) // group + 1, end) - begin
            if seen <= 0 or at + top // group - window + 1 >= end:
                continue
            panels = (seen + LANES - 1) // LANES
            for p in range(0, panels * LANES, LANES):
                add_tile(ours, top * dim, dim, panels_of_keys, p * dim, LANES, lines, p, BLOCK_KEYS, dim, False)  # type: ignore[call-arg]
            for r in range(TILE_ROWS):
                i, row = top + r, r * BLOCK_KEYS
                position = at + i // group - begin
                from_, to = max(first - begin, position - window + 1, 0), min(position + 1, seen)
                if i >= n or from_ >= to:
                    lines[row : row + panels * LANES] = 0
                    continue
                lines[row : row + from_] = -np.inf
                lines[row + to : row + panels * LANES] = -np.inf
                query_head = head * group + i % group
                map_ = min(query_head, maps - 1)
                slot = slots[map_, start + i // group]
                if slot >= 0 and low[map_, slot] < begin + to and high[map_, slot] > begin:
                    limits = max(low[map_, slot] - begin, from_), min(high[map_, slot] - begin, to)
                    own = listed[i]
                    kept[own], bars[own] = collect(lines, row, begin, limits, lists[own], kept[own], k, bars[own])
                if softcap > 0:
                    soften(lines, row, panels, softcap, line)
                highest = greatest(lines, row, panels)  # type: ignore[call-arg, var-annotated]
                if highest > best[i]:
                    factor = np.float32(np.exp(best[i] - highest))
                    total[i] *= factor
                    for t in range(i * wide, (i + 1) * wide):
                        sums[t] *= factor
                    best[i] = highest
                total[i] += exp_minus(lines, row, panels, best[i])  # type: ignore[call-arg]
                lines[row : row + from_] = 0
                lines[row + to : row + panels * LANES] = 0
            for t in range(0, wide, LANES):
                add_tile(lines, 0, BLOCK_KEYS, block_values, t, wide, sums, top * wide + t, wide, seen, True)  # type: ignore[call-arg]
    for i in range(n):
        query_head, row = head * group + i % group, start + i // group
        for t in range(value_dim):
            out[row, query_head, t] = sums[i * wide + t] / total[i]
        lse[query_head, row] = best[i] + np.log(total[i])
        slot = slots[min(query_head, maps - 1), row]
        if slot >= 0:
            own = listed[i]
            settle(lists[own], kept[own], k, scores[query_head, slot], ids[query_head, slot])
