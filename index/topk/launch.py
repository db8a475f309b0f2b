"""Causal attention on a CUDA card that also keeps the best keys of sampled rows: every score is computed once.

The kernel is the forward pass of FlashAttention-2 (arXiv 2307.08691): one program takes a tile of rows of one span
through the keys that it sees, with the online softmax. Of the sampled rows it also stores the maximum of each group
of keys. A row's k best keys lie in its k best groups by maximum: a key outside of them is no better than k others, the
maxima of these groups. So the k best groups are chosen, their keys scored again, and the k best of those are the
result. Memory for it: at most `ROOM` bytes and what one tile of rows needs; the rows are worked on in as many launches
as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rabatch.errors import ConfigError
from rabatch.index.topk.base import Attended, Request, Span
from rabatch.index.topk.best import ranked

ROOM = 1 << 30
MAX_DIM = 256
_FAN = 16  # children of a node, where the best groups are found from above


class Blocks(NamedTuple):
    """How the work is cut. `group` keys have one maximum; `keys` is a multiple of 4 * group, all are powers of two."""

    rows: int
    keys: int
    group: int
    warps: int
    stages: int


# By the wider of head_dim and value_dim, at most; 16-bit and float32. Reasoned for the 227 KiB of shared memory and
# 64K registers of a Hopper multiprocessor, and compiled for it, but not measured: no card was at hand.
_HALF = {64: Blocks(128, 128, 16, 8, 3), 128: Blocks(128, 128, 16, 8, 2), 256: Blocks(128, 64, 16, 8, 2)}
_FULL = {64: Blocks(32, 32, 8, 4, 2), 128: Blocks(32, 32, 8, 8, 1), 256: Blocks(16, 32, 8, 8, 1)}
_INTERPRETED = Blocks(32, 64, 16, 1, 1)  # small, so that few rows and keys take every path
_SCORED = (4, 16)  # rows, and keys of each, scored at a time; under the interpreter, which is slow by the operation:
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
        fix = f"runs on CUDA cards, these tensors are on {device}; {instead}, or start with TRITON_INTERPRET=1 to try"
        raise ConfigError("impl", "triton", f"{fix} the kernels without a card, slowly")
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
    dtype = torch.promote_types(request.queries.dtype, request.keys.dtype)
    widest = max(request.keys.shape[2], request.values.shape[2])
    return next(b for most, b in (_FULL if dtype == torch.float32 else _HALF).items() if widest <= most)


def _attend(kernel: ModuleType, request: Request, blocks: Blocks, room: int) -> Attended:
    sample, device = request.sample, request.queries.device
    n_heads, n_rows, dim = request.queries.shape
    n_kv, n_keys, value_dim = request.values.shape
    k, n_sampled = sample.k, sample.rows.shape[1]
    dtype = torch.promote_types(request.queries.dtype, request.keys.dtype)
    queries, keys, values = (
        t if t.stride(2) == 1 else t.contiguous() for t in (request.queries.to(dtype), request.keys, request.values)
    )
    window = min(request.sliding_window or n_keys, n_keys)
    tiles = _tiles(request.spans, blocks.rows)
    first = np.maximum(tiles[:, 3] - window + 1, tiles[:, 2])
    begin, end = first // blocks.keys * blocks.keys, tiles[:, 3] + tiles[:, 1] - tiles[:, 0]

    order, rows, lower, upper, base = _by_row(request, tiles, begin, window)
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
    floats = n_groups + k * (4 * _FAN + 3 * blocks.group)  # of a slot: its maxima, and what it takes to find the best
    for start, stop, n_slots in _launches(before.cpu().numpy(), 4 * n_heads * floats, room):
        most_work_first = start + np.argsort(begin[start:stop] - end[start:stop], kind="stable")
        table = torch.from_numpy(tiles[most_work_first].astype(np.int32)).to(device)
        first_slots = before[:, start].to(torch.int32)
        width = -(-int(n_groups[start:stop].max()) // _FAN) * _FAN
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
        groups = _highest(maxima, min(k, width))
        del maxima
        shape = (*groups.shape[:2], groups.shape[2] * blocks.group)
        found, found_ids = torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
        kernel.score_groups[(-(-n_slots // slots_at_once) * n_heads,)](
            queries, keys, small_rows, lower, upper, base, first_slots, groups, found, found_ids,
            *strides, n_sampled, n_slots, groups.shape[2], request.scaling,
            DIM=dim, WIDE=wide, GROUP=blocks.group, SLOTS=slots_at_once, KEYS=keys_at_once, **heads, num_warps=4, enable_fp_fusion=True,
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


def _tiles(spans: Sequence[Span], n: int) -> np.ndarray:
    """Rows of one span, at most `n`: int64 [n_tiles, 4], as `kernel.attend_tiles` takes them; in the order of rows."""
    parts = [np.empty((0, 4), np.int64)]
    for span in spans:
        starts = np.arange(span.row_start, span.row_stop, n)
        stops = np.minimum(starts + n, span.row_stop)
        parts.append(np.stack([starts, stops, 0 * starts + span.first_key, starts - span.row_start + span.at], axis=1))
    return np.concatenate(parts)


def _by_row(request: Request, tiles: np.ndarray, begin: np.ndarray, window: int) -> tuple[Tensor, ...]:
    """The sample in the order of its rows.

    Returns:
        order: int64 [1 or n_heads, n_sampled]: where each slot stands in the sample.
        rows: int64, likewise; n_rows in place of -1.
        lower, upper: int32, likewise: the keys that count, of those that the row sees.
        base: int32, likewise: the key at which the row's tile begins to read.
    """
    sample, device, n_rows = request.sample, request.queries.device, request.queries.shape[1]
    of_row = np.zeros((3, n_rows + 1), np.int64)  # first key, past the last key, where the tile begins
    lengths = tiles[:, 1] - tiles[:, 0]
    offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    ours = np.repeat(tiles[:, 0], lengths) + offsets
    past = np.repeat(tiles[:, 3], lengths) + offsets + 1
    of_row[:, ours] = np.maximum(past - window, np.repeat(tiles[:, 2], lengths)), past, np.repeat(begin, lengths)
    first, past_last, base = torch.from_numpy(of_row).to(device)
    rows, order = torch.where(sample.rows < 0, n_rows, sample.rows).sort(dim=1)
    lower = torch.maximum(sample.low.gather(1, order), first[rows])
    upper = torch.minimum(sample.high.gather(1, order), past_last[rows])
    n_keys = request.keys.shape[1]
    return order, rows, *(t.clamp(0, n_keys).to(torch.int32) for t in (lower, upper, base[rows]))


def _launches(before: np.ndarray, sizes: np.ndarray, room: int) -> Iterator[tuple[int, int, int]]:
    """Tiles start .. stop - 1 and the most slots that a head has in them, so that slots times bytes stay below `room`.

    Args:
        before: [1 or n_heads, n_tiles + 1]: slots before each tile.
        sizes: [n_tiles]: bytes of a slot of each tile.
    """
    start = size = 0
    for tile in range(len(sizes)):
        size = max(size, int(sizes[tile]))
        if tile > start and int((before[:, tile + 1] - before[:, start]).max()) * size > room:
            yield start, tile, int((before[:, tile] - before[:, start]).max())
            start, size = tile, int(sizes[tile])
    if start < len(sizes):
        yield start, len(sizes), int((before[:, -1] - before[:, start]).max())


def _highest(values: Tensor, k: int) -> Tensor:
    """Where the `k` highest of the last dimension are, in any order; of -inf, places past the end may be named.

    Of many values, the `k` best nodes are found first, each the maximum of `_FAN` values; the best lie below these.
    """
    n = values.shape[-1]
    if n <= 2 * _FAN * k:
        return values.topk(k, dim=-1, sorted=False).indices
    values = values if n % _FAN == 0 else torch.nn.functional.pad(values, (0, -n % _FAN), value=-torch.inf)
    nodes = values.unflatten(-1, (-1, _FAN)).amax(-1)
    below = _highest(nodes, k)[..., None] * _FAN + torch.arange(_FAN, device=values.device)
    below = below.flatten(-2)
    return below.gather(-1, values.gather(-1, below).topk(k, dim=-1, sorted=False).indices)
