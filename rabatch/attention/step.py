"""Sparse attention of questions over one context on the CPU: static set, found keys and tail in one compiled pass.

The reference is what `QuestionAttention` does elsewhere: a partial result of each set, merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rabatch.index.compiled import compiled, read_only, run_ranges
from rabatch.index.machine import add_scaled, prefetch
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, exp_minus, greatest, soften

_AHEAD = 6  # values whose memory is asked for before they are added


@dataclass(frozen=True)
class StaticSet:
    """The static set as the kernel reads it.

    Attributes:
        panels: [n_kv, padded * head_dim], float32: keys, 16 beside each other, number by number.
        values: [n_kv, n_static * wide], float32, rows padded to a multiple of 16.
        positions: [n_static], int64, in the context.
    """

    panels: np.ndarray
    values: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor) -> StaticSet:
        """From keys and values [n_kv, n_static, head_dim], float32."""
        n_kv, n, dim = keys.shape
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -n % LANES))
        panels = padded.view(n_kv, -1, LANES, dim).transpose(2, 3).reshape(n_kv, -1)
        rows = torch.nn.functional.pad(values, (0, -values.shape[2] % LANES)).reshape(n_kv, -1)
        return cls(*(read_only(t.numpy()) for t in (panels, rows, positions)))


def attend_sets(
    queries: Tensor,
    static: StaticSet,
    found: tuple[Tensor, Tensor],
    values: Tensor,
    tail: tuple[Tensor, Tensor],
    places: Tensor,
    counts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    mass: np.ndarray,
    threads: int = 0,
) -> Tensor:
    """Attention of every question's new tokens.

    Args:
        queries: [n_kv, batch, group, q_tokens, head_dim].
        found: Raw products and rows of `values`, [n_kv, batch * group * q_tokens, k]; -1 where there is no key.
        values: [n_kv, n_keys, head_dim], float32, bfloat16 or float16.
        tail: Keys and values [batch, n_kv, tail_tokens, head_dim].
        places: int64 [batch, q_tokens]: where each token stands in its tail; it sees what comes before, and itself.
        counts: int64 [batch]: tokens of each question; what follows is padding, whose output is 0.
        scaling: Factor on q . k.
        softcap: Bound of the logits, or None.
        mass: [batch, context_tokens], float32: the attention of each question's last token is added, summed over heads.
        threads: 0: as many as torch uses.

    Returns:
        [batch, q_tokens, n_kv * group, head_dim], float32.
    """
    n_kv, batch, group, q_tokens, _ = queries.shape
    dim = values.shape[2]
    stored = values.contiguous()
    codes = stored.numpy() if stored.dtype == torch.float32 else stored.view(torch.int16).numpy().view(np.uint16)
    scores, ids = found
    inputs = [
        read_only(t.numpy())
        for t in (queries.float() * scaling, scores * scaling, ids, *(t.float() for t in tail), places, counts)
    ]
    out = np.zeros((batch, q_tokens, n_kv * group, dim), np.float32)
    half, cap = values.dtype == torch.float16, np.float32(softcap or 0)
    of_static = (static.panels, static.values, static.positions)

    def attend(start: int, stop: int) -> None:
        for question in range(start, stop):
            _attend_question(question, *inputs, *of_static, read_only(codes), half, cap, out[question], mass[question])

    run_ranges(attend, batch, threads=threads or torch.get_num_threads(), chunks_per_thread=2)
    return torch.from_numpy(out)


@compiled
def _attend_question(  # type: ignore[no-untyped-def]
    b, queries, scores, ids, tail_keys, tail_values, places, counts, panels, static_values, positions, codes, half,
    softcap, out, mass,
):  # fmt: skip
    n_kv, _, group, q_tokens, dim = queries.shape
    n_static, k, value_dim = len(positions), ids.shape[2], codes.shape[2]
    wide = (value_dim + LANES - 1) // LANES * LANES
    n_tail = places[b, counts[b] - 1] + 1
    at_found = (n_static + LANES - 1) // LANES * LANES
    at_tail = at_found + (k + LANES - 1) // LANES * LANES
    width = at_tail + (n_tail + LANES - 1) // LANES * LANES
    ours = np.zeros(TILE_ROWS * dim, np.float32)
    lines, line = np.zeros(TILE_ROWS * width, np.float32), np.empty(width, np.float32)
    sums = np.zeros(TILE_ROWS * wide, np.float32)
    per_line = max(64 // codes.itemsize, 1)
    n_keys = codes.shape[1]
    n = group * counts[b]
    for head in range(n_kv):
        for top in range(0, n, TILE_ROWS):
            for r in range(min(TILE_ROWS, n - top)):
                for t in range(dim):
                    ours[r * dim + t] = queries[head, b, (top + r) % group, (top + r) // group, t]
            for p in range(0, at_found, LANES):
                add_tile(ours, 0, dim, panels[head], p * dim, LANES, lines, p, width, dim, False)  # type: ignore[call-arg]
            for r in range(min(TILE_ROWS, n - top)):
                g, token, row = (top + r) % group, (top + r) // group, r * width
                item = (b * group + g) * q_tokens + token
                lines[row + n_static : row + at_found] = -np.inf
                lines[row + at_found : row + width] = -np.inf
                for j in range(k):
                    if ids[head, item, j] >= 0:
                        lines[row + at_found + j] = scores[head, item, j]
                for j in range(places[b, token] + 1):
                    product = np.float32(0)
                    for t in range(dim):
                        product += ours[r * dim + t] * tail_keys[b, head, j, t]
                    lines[row + at_tail + j] = product
                if softcap > 0:
                    soften(lines, row, width // LANES, softcap, line)
                best = greatest(lines, row, width // LANES)  # type: ignore[call-arg, var-annotated]
                total = exp_minus(lines, row, width // LANES, best)  # type: ignore[call-arg, var-annotated]
                for j in range(row, row + width):
                    lines[j] /= total
            for t in range(0, wide, LANES):
                add_tile(lines, 0, width, static_values[head], t, wide, sums, t, wide, n_static, False)  # type: ignore[call-arg]
            for r in range(min(TILE_ROWS, n - top)):
                g, token, row = (top + r) % group, (top + r) // group, r * width
                item = (b * group + g) * q_tokens + token
                result = out[token, head * group + g]
                for t in range(value_dim):
                    result[t] = sums[r * wide + t]
                for j in range(k):
                    coming = ids[head, item, j + _AHEAD] if j + _AHEAD < k else -1
                    if coming >= 0:
                        for at in range(0, value_dim, per_line):
                            prefetch(codes, (head * n_keys + coming) * value_dim + at)  # type: ignore[call-arg]
                    if ids[head, item, j] >= 0:
                        add_scaled(result, codes, head, ids[head, item, j], lines[row + at_found + j], half)
                for j in range(places[b, token] + 1):
                    for t in range(value_dim):
                        result[t] += lines[row + at_tail + j] * tail_values[b, head, j, t]
                if token == counts[b] - 1:
                    for j in range(n_static):
                        mass[positions[j]] += lines[row + j]
                    for j in range(k):
                        if ids[head, item, j] >= 0:
                            mass[ids[head, item, j]] += lines[row + at_found + j]
