"""Causal attention on a CUDA card that also keeps the best keys of sampled rows: every score is computed once.

The kernel is the forward pass of FlashAttention-2 (arXiv 2307.08691): one program takes a tile of rows of one span
through the keys that it sees, with the online softmax. Of the sampled rows it also stores the maximum of each group
of keys. A row's k best keys lie in its k best groups by maximum: a key outside of them is no better than k others, the
maxima of these groups. So the k best groups are chosen, their keys scored again, and the k best of those are the
result. Besides the result that takes at most `ROOM` bytes, or what one tile of rows needs if that is more: the rows are
worked on in as many launches as it takes.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from rabatch.errors import ConfigError
from rabatch.index.topk.base import Attended, Request
from rabatch.index.topk.best import ranked
from rabatch.index.topk.tiling import FAN, by_row, highest, launches
from rabatch.index.topk.tiling import tiles as tiles_of

ROOM = 1 << 30
MAX_DIM = 256


class Blocks(NamedTuple):
    """How the work is cut. `group` keys have one maximum; `keys` is a multiple of 4 * group, all are powers of two."""

    rows: int
    keys: int
    group: int
    warps: int
    stages: int


# By the wider of head_dim and value_dim, at most; of 16 bits and of float32, whose products tensor cores do not take.
# Reasoned for the 227 KiB of shared memory and 64K registers of a Hopper multiprocessor, and compiled for it, but not
# measured: no card was at hand. `_HALF_SMALL` fits the 99 KiB of the other cards.
_HALF = {64: Blocks(128, 128, 16, 8, 3), 128: Blocks(128, 128, 16, 8, 2), 256: Blocks(128, 64, 16, 8, 2)}
_HALF_SMALL = {128: Blocks(64, 64, 16, 4, 2), 256: Blocks(64, 32, 8, 4, 1)}
_FULL = {64: Blocks(32, 32, 8, 4, 2), 128: Blocks(32, 32, 8, 8, 1), 256: Blocks(16, 32, 8, 8, 1)}
_LARGE = (9, 10)  # the major compute capabilities, of Hopper and its successor, that `_HALF` is for
_INTERPRETED = Blocks(32, 64, 16, 1, 1)  # small, so that few rows and keys take every path
# Rows, and keys of each, scored at a time. The interpreter takes as long for many as for few.
_SCORED = (1, 64)
_SCORED_INTERPRETED = (16, 64)


def attend(request: Request) -> Attended:
    """See `rabatch.index.topk.attention_topk`; for tensors on a CUDA card. Of equal scores, any are kept.

    Raises:
        ConfigError: Without triton, or for tensors that its kernels cannot take; names what can.
    """
    kernel = _kernels(request)
    return attend_in(request, _blocks(request, bool(kernel.INTERPRETED)))


def attend_in(request: Request, blocks: Blocks, room: int = ROOM) -> Attended:
    """`attend` with the work cut as given."""
    kernel = _kernels(request)
    on_card = request.queries.is_cuda and not kernel.INTERPRETED
    with torch.cuda.device(request.queries.device) if on_card else nullcontext():
        return _attend(kernel, request, blocks, room)


def _kernels(request: Request) -> ModuleType:
    instead = "choose blocked (on the CPU) or naive"
    try:
        from rabatch.index.topk import kernel
    except ImportError as error:
        raise ConfigError("impl", "triton", f"needs triton: pip install rabatch[gpu]; or {instead}") from error
    device = request.queries.device
    if device.type != "cuda" and not (device.type == "cpu" and kernel.INTERPRETED):
        fix = f"runs on CUDA cards, these tensors are on {device}; {instead}, or set TRITON_INTERPRET=1 before"
        raise ConfigError("impl", "triton", f"{fix} Python starts to run the kernels without a card, slowly")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError("impl", "triton", f"needs a card of compute capability 8.0 or more; {instead}")
    for name, tensor in (("keys", request.keys), ("values", request.values)):
        if tensor.device != device:
            raise ConfigError(name, str(tensor.device), f"must lie beside the queries, on {device}")
        if not 1 <= tensor.shape[2] <= MAX_DIM:
            fix = f"the last dimension must be 1 .. {MAX_DIM} for impl=triton; {instead}"
            raise ConfigError(name, tuple(tensor.shape), fix)
    return kernel


def _blocks(request: Request, interpreted: bool) -> Blocks:
    if interpreted:
        return _INTERPRETED
    widest = max(request.keys.shape[2], request.values.shape[2])
    if torch.float32 == torch.promote_types(request.queries.dtype, request.keys.dtype):
        table = _FULL
    else:
        table = _HALF if torch.cuda.get_device_capability(request.queries.device)[0] in _LARGE else _HALF_SMALL
    return next(blocks for most, blocks in table.items() if widest <= most)


def _attend(kernel: ModuleType, request: Request, blocks: Blocks, room: int) -> Attended:
    sample, device = request.sample, request.queries.device
    n_heads, n_rows, dim = request.queries.shape
    n_keys, value_dim = request.values.shape[1:]
    k, n_sampled = sample.k, sample.rows.shape[1]
    dtype = torch.promote_types(request.queries.dtype, request.keys.dtype)
    queries, keys, values = (
        t if t.stride(2) == 1 else t.contiguous() for t in (request.queries.to(dtype), request.keys, request.values)
    )
    window = min(request.sliding_window or n_keys, n_keys)
    tiles = tiles_of(request.spans, blocks.rows)
    first = np.maximum(tiles[:, 3] - window + 1, tiles[:, 2])
    begin, end = first // blocks.keys * blocks.keys, tiles[:, 3] + tiles[:, 1] - tiles[:, 0]

    order, rows, lower, upper, base = by_row(request, tiles, begin, window)
    slots = torch.full((len(rows), n_rows + 1), -1, dtype=torch.int32, device=device)
    ours = torch.arange(n_sampled, dtype=torch.int32, device=device)
    slots.scatter_(1, rows, torch.where(lower < upper, ours, -1))
    slots, small_rows = slots[:, :n_rows].contiguous(), rows.clamp(max=n_rows - 1).to(torch.int32)
    bounds = torch.from_numpy(np.append(tiles[:, 0], n_rows)).to(device)
    before = torch.searchsorted(rows, bounds.expand(len(rows), -1).contiguous())  # slots before each tile

    out = torch.zeros((n_rows, n_heads, value_dim), dtype=request.queries.dtype, device=device)
    lse = torch.full((n_heads, n_rows), -torch.inf, device=device)
    # One line more than there are slots: a head that has fewer in a launch than others leaves its surplus there.
    ids = torch.full((n_heads, n_sampled + 1, k), -1, dtype=torch.int32, device=device)
    scores = torch.full((n_heads, n_sampled + 1, k), -torch.inf, device=device)

    slots_at_once, keys_at_once = _SCORED_INTERPRETED if kernel.INTERPRETED else _SCORED
    log2e = 1 / float(np.log(2))
    cap = (request.softcap or 0.0) * log2e
    scale = request.scaling * log2e * (2 / request.softcap if request.softcap else 1)
    wide, value_wide = (max(16, 1 << (d - 1).bit_length()) for d in (dim, value_dim))
    heads = {"SHARED": request.group, "BY_HEAD": len(rows) > 1}
    strides = (*queries.stride()[:2], *keys.stride()[:2])
    n_groups = -(-(end - begin) // blocks.keys) * (blocks.keys // blocks.group)
    floats = n_groups + k * (6 * FAN + 3 * blocks.group)  # of a slot: its maxima, and what it takes to find the best
    for start, stop, n_slots in launches(before.cpu().numpy(), 4 * n_heads * floats, room):
        most_work_first = start + np.argsort(begin[start:stop] - end[start:stop], kind="stable")
        table = torch.from_numpy(tiles[most_work_first].astype(np.int32)).to(device)
        first_slots = before[:, start].to(torch.int32)
        width = -(-int(n_groups[start:stop].max()) // FAN) * FAN
        maxima = torch.full((n_heads, n_slots, width), -torch.inf, device=device)
        kernel.attend_tiles[(len(table) * n_heads,)](
            queries, keys, values, out, lse, table, slots, lower, upper, first_slots, maxima,
            *strides, *values.stride()[:2], len(table), n_rows, n_sampled, n_slots, width, window, scale, cap,
            HEADS=n_heads, DIM=dim, VALUE_DIM=value_dim, WIDE=wide, VALUE_WIDE=value_wide,
            ROWS=blocks.rows, KEYS=blocks.keys, GROUP=blocks.group, CAPPED=request.softcap is not None,
            SAMPLED=n_slots > 0, **heads, num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if not n_slots:
            continue
        groups = highest(maxima, min(k, width))
        del maxima
        shape = (*groups.shape[:2], groups.shape[2] * blocks.group)
        found, found_ids = torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
        kernel.score_groups[(-(-n_slots // slots_at_once) * n_heads,)](
            queries, keys, small_rows, lower, upper, base, first_slots, groups, found, found_ids,
            *strides, n_sampled, n_slots, groups.shape[2], float(request.scaling),
            DIM=dim, WIDE=wide, GROUP=blocks.group, SLOTS=slots_at_once, KEYS=keys_at_once, **heads,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        found, chosen = found.topk(min(k, shape[2]), dim=2)
        line = before[:, start, None] + torch.arange(n_slots, device=device)
        line = torch.where(line < before[:, stop, None], order.gather(1, line.clamp(max=n_sampled - 1)), n_sampled)
        line = line[..., None].expand(n_heads, -1, found.shape[2])
        scores[..., : found.shape[2]].scatter_(1, line, found)
        ids[..., : found.shape[2]].scatter_(1, line, found_ids.gather(2, chosen))
    scores = scores[:, :n_sampled]
    kept = ranked(ids[:, :n_sampled].masked_fill(scores == -torch.inf, -1), scores)
    return Attended(out.transpose(0, 1), lse, *kept)
