"""Exact attention of many rows over the same keys, which are loaded once for all of them (prefix sharing, DeFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.coded import Affine, CodedRows
from rabatch.attention.merge import Partial, merge
from rabatch.attention.sets import stored_bits
from rabatch.compiling import compiled
from rabatch.index.compiled import read_only, run_tasks
from rabatch.index.machine import widen
from rabatch.index.token_codes import TokenCodes, widen_rows
from rabatch.index.topk.best import collect, room_for, settle
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, exp_minus, greatest, soften

BLOCK_KEYS = 256  # widened to float32 at once, for all rows: keys and values fit the second-level cache
SPLIT_KEYS = 8192  # keys of a task; results depend on it, so it does not depend on rows or threads


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Keys and values of one layer, or of some of its rows, on the CPU, as the kernel reads them.

    Attributes:
        panels: [n_kv, padded * head_dim], float32, int8 or bits of 16-bit floats: keys, 16 beside each other, number by
            number; zeros past the last.
        values: [n_kv, n_keys * head_dim], likewise; or codes.
        half: Whether bits are IEEE float16; else they are bfloat16.
        value_dim: Numbers of a value.
        of_keys, of_values: What makes keys and values of the numbers that are read; None: they are these.
        rows: int64 [n_keys], of the layer; None: 0, 1, 2, ...
    """

    panels: np.ndarray
    values: np.ndarray | TokenCodes
    half: bool
    n_keys: int
    value_dim: int
    of_keys: Affine | None = None
    of_values: Affine | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor | CodedRows, values: Tensor | CodedRows, *, rows: Tensor | None = None) -> SharedKeys:
        """From keys and values [n_kv, n_keys, head_dim]; the keys are copied."""
        numbers, of_keys = (keys.codes, keys.affine) if isinstance(keys, CodedRows) else (keys, None)
        n_kv, n_keys, dim = numbers.shape
        padded = torch.nn.functional.pad(numbers, (0, 0, 0, -n_keys % LANES))
        panels = padded.view(n_kv, -1, LANES, dim).transpose(2, 3).reshape(n_kv, -1)
        of_values = values.affine if isinstance(values, CodedRows) else None
        flat: np.ndarray | TokenCodes
        if isinstance(values, CodedRows):
            held = values.kernel
            flat = held if isinstance(held, TokenCodes) else held.reshape(n_kv, -1)
        else:
            flat = read_only(stored_bits(values.reshape(n_kv, -1)))
        half = torch.float16 in (t.dtype for t in (keys, values) if isinstance(t, Tensor))
        held_keys = read_only(panels.numpy() if of_keys is not None else stored_bits(panels))
        return cls(held_keys, flat, half, n_keys, int(values.shape[2]), of_keys, of_values, rows)


def attend_several(
    rows: Tensor, sets: Sequence[SharedKeys], *, top_k: int, scaling: float, softcap: float | None, threads: int = 0
) -> tuple[Partial, Tensor, Tensor]:
    """`attend_all` over disjoint sets together, ids being rows of the layer."""
    options: dict[str, Any] = {"top_k": top_k, "scaling": scaling, "softcap": softcap, "threads": threads}
    found = [attend_all(rows, some, **options) for some in sets if some.n_keys]
    if len(found) == 1:
        return found[0]
    partials, ids, products = zip(*found, strict=True)
    every_id, every_product = torch.cat(ids, -1), torch.cat(products, -1)
    best = every_product.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return merge(partials), every_id.gather(-1, best), every_product.gather(-1, best)


def attend_all(
    rows: Tensor, shared: SharedKeys, *, top_k: int, scaling: float, softcap: float | None, threads: int = 0
) -> tuple[Partial, Tensor, Tensor]:
    """Attend every key of a set, and name the keys that each row scores highest. Ties go to the lower id.

    A task takes all rows of a KV head over a stretch of the keys; each block of them is widened once and stays in the
    cache while scores, exp and sums of values are made, six rows at a time (FlashAttention's online softmax over
    split keys). The stretches are merged by log-sum-exp. No row's result depends on the others or on `threads`.

    What encoded keys are scaled by, the queries take in; what values are, the result.

    Args:
        rows: [n_kv, n_rows, head_dim].
        top_k: Keys named per row, at most.
        threads: 0: as many as torch uses.

    Returns:
        The partial result, [n_kv, n_rows, ...]; ids int64 [n_kv, n_rows, top_k], -1 where there are no more; and their
        raw products q . k.
    """
    n_kv, n_rows, _ = rows.shape
    n_keys, k = shared.n_keys, min(top_k, shared.n_keys)
    splits = range(0, n_keys, SPLIT_KEYS)
    scaled, offsets = rows.float() * scaling, torch.zeros((n_kv, n_rows))
    if shared.of_keys is not None:
        offsets = torch.einsum("hrd,hd->hr", scaled, shared.of_keys.center)
        scaled = scaled * shared.of_keys.scale[:, None]
    queries, added = read_only(scaled.numpy()), read_only(offsets.numpy())
    best = np.full((len(splits), n_kv, n_rows), -np.inf, np.float32)
    total = np.zeros((len(splits), n_kv, n_rows), np.float32)
    out = np.zeros((len(splits), n_kv, n_rows, shared.value_dim), np.float32)
    scores = np.full((len(splits), n_kv, n_rows, k), -np.inf, np.float32)
    ids = np.full((len(splits), n_kv, n_rows, k), -1, np.int32)
    cap = np.float32(softcap or 0)

    def attend(split: int, head: int) -> None:
        results = (array[split, head] for array in (best, total, out, scores, ids))
        stretch = splits[split], min(splits[split] + SPLIT_KEYS, n_keys)
        _attend_stretch(
            queries[head], added[head], shared.panels, shared.values, shared.half, head, *stretch, cap, *results
        )

    tasks = [(split, head) for split in range(len(splits)) for head in range(n_kv)]
    run_tasks(attend, tasks, threads=threads or torch.get_num_threads())
    highest = best.max(axis=0)
    factors = np.exp(best - highest)
    sums = (factors * total).sum(axis=0)
    merged = torch.from_numpy((out * factors[..., None]).sum(axis=0) / sums[..., None])
    if shared.of_values is not None:
        merged = merged * shared.of_values.scale[:, None] + shared.of_values.center[:, None]
    named = [torch.from_numpy(np.moveaxis(array, 0, 2).reshape(n_kv, n_rows, -1)) for array in (scores, ids)]
    if len(splits) > 1:
        top = named[0].sort(dim=-1, descending=True, stable=True).indices[..., :k]
        named = [array.gather(-1, top) for array in named]
    found = named[1].long()
    if shared.rows is not None:
        found = torch.where(found < 0, -1, shared.rows[found.clamp_min(0)])
    return Partial(merged, torch.from_numpy(highest + np.log(sums))), found, named[0] / scaling


@compiled
def _attend_stretch(  # type: ignore[no-untyped-def]
    queries, added, panels, values, half, head, start, stop, softcap, best, total, out, scores, ids
):
    n, dim = queries.shape
    value_dim = out.shape[1]
    wide = (value_dim + LANES - 1) // LANES * LANES
    n_strips = (n + TILE_ROWS - 1) // TILE_ROWS
    ours = np.zeros(n_strips * TILE_ROWS * dim, np.float32)
    for i in range(n):
        for t in range(dim):
            ours[i * dim + t] = queries[i, t]
    sums = np.zeros(n_strips * TILE_ROWS * wide, np.float32)
    k = scores.shape[1]
    lists = np.empty((n, room_for(k, stop - start)), np.uint64)
    kept, bars = np.zeros(n, np.int64), np.full(n, np.float32(-np.inf))
    block_keys = np.empty(BLOCK_KEYS * dim, np.float32)
    block_values = np.zeros(BLOCK_KEYS * wide, np.float32)
    lines, line = np.empty(TILE_ROWS * BLOCK_KEYS, np.float32), np.empty(BLOCK_KEYS, np.float32)
    for begin in range(start, stop, BLOCK_KEYS):
        seen = min(BLOCK_KEYS, stop - begin)
        n_panels = (seen + LANES - 1) // LANES
        widen(block_keys, panels, head, begin * dim, n_panels * LANES * dim, half)
        widen_rows(block_values, wide, values, head, begin, seen, value_dim, half)
        for top in range(0, n, TILE_ROWS):
            for p in range(0, n_panels * LANES, LANES):
                add_tile(ours, top * dim, dim, block_keys, p * dim, LANES, lines, p, BLOCK_KEYS, dim, False)  # type: ignore[call-arg]
            for r in range(min(TILE_ROWS, n - top)):
                i, row = top + r, r * BLOCK_KEYS
                if added[i] != 0:
                    lines[row : row + seen] += added[i]
                kept[i], bars[i] = collect(lines, row, begin, (0, seen), lists[i], kept[i], k, bars[i])
                if softcap > 0:
                    soften(lines, row, n_panels, softcap, line)
                lines[row + seen : row + n_panels * LANES] = -np.inf
                highest = greatest(lines, row, n_panels)  # type: ignore[call-arg, var-annotated]
                if highest > best[i]:
                    factor = np.float32(np.exp(best[i] - highest))
                    total[i] *= factor
                    for t in range(i * wide, (i + 1) * wide):
                        sums[t] *= factor
                    best[i] = highest
                total[i] += exp_minus(lines, row, n_panels, best[i])  # type: ignore[call-arg]
            for t in range(0, wide, LANES):
                add_tile(lines, 0, BLOCK_KEYS, block_values, t, wide, sums, top * wide + t, wide, seen, True)  # type: ignore[call-arg]
    for i in range(n):
        for t in range(value_dim):
            out[i, t] = sums[i * wide + t]
        settle(lists[i], kept[i], k, scores[i], ids[i])
