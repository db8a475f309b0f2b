"""How the rows of a request are cut into tiles and launches for a card, and the best of many maxima found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rabatch.index.topk.base import Request, Span

FAN = 16  # children of a node, where the best groups are found from above


def tiles(spans: Sequence[Span], n: int) -> np.ndarray:
    """Rows of one span, at most `n`: int64 [n_tiles, 4], as `kernel.attend_tiles` takes them; in the order of rows."""
    parts = [np.empty((0, 4), np.int64)]
    for span in spans:
        starts = np.arange(span.row_start, span.row_stop, n)
        stops = np.minimum(starts + n, span.row_stop)
        parts.append(np.stack([starts, stops, 0 * starts + span.first_key, starts - span.row_start + span.at], axis=1))
    return np.concatenate(parts)


def by_row(request: Request, tiles: np.ndarray, begin: np.ndarray, window: int) -> tuple[Tensor, ...]:
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


def launches(before: np.ndarray, sizes: np.ndarray, room: int) -> Iterator[tuple[int, int, int]]:
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


def highest(values: Tensor, k: int) -> Tensor:
    """Where the `k` highest of the last dimension are, in any order; of -inf, places past the end may be named.

    Of many values, the `k` best nodes are found first, each the maximum of `FAN` values; the best lie below these.
    """
    n = values.shape[-1]
    if n <= 2 * FAN * k:
        return values.topk(k, dim=-1, sorted=False).indices
    values = values if n % FAN == 0 else torch.nn.functional.pad(values, (0, -n % FAN), value=-torch.inf)
    nodes = values.unflatten(-1, (-1, FAN)).amax(-1)
    below = highest(nodes, k)[..., None] * FAN + torch.arange(FAN, device=values.device)
    below = below.flatten(-2)
    return below.gather(-1, values.gather(-1, below).topk(k, dim=-1, sorted=False).indices)
