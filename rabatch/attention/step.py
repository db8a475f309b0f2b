"""Sparse attention of questions over one context on the CPU: `rabatch.attention.sets` in one compiled pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.sets import Attended, Found, StaticSet, stored_bits
from rabatch.index.compiled import compiled, read_only, run_ranges
from rabatch.index.machine import add_scaled, prefetch
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, exp_minus, greatest, soften

_AHEAD = 6  # values whose memory is asked for before they are added


def attend_compiled(
    queries: Tensor,
    static: StaticSet,
    find: Callable[[], Found],
    values: Tensor,
    tail: tuple[Tensor, Tensor],
    begins: Tensor,
    places: Tensor,
    counts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    goal: float,
    mass: np.ndarray,
    threads: int = 0,
) -> Attended:
    """See `sets.attend_sets`, for tensors on the CPU.

    Args:
        threads: 0: as many as torch uses. They share the (question, KV head) pairs; the result does not depend on it.
    """
    n_kv, batch, group, q_tokens, _ = queries.shape
    scores, ids = find()
    k, dim, n_static = ids.shape[2], values.shape[2], len(static.positions)
    codes = read_only(stored_bits(values))
    inputs = [
        read_only(t.numpy())
        for t in (queries.float() * scaling, scores * scaling, ids, *(t.float() for t in tail), begins, places, counts)
    ]
    keys, static_values, bias, positions, of_key, zone_keys = static.panels
    first_row = static.zones.first_row if static.zones is not None else 0
    settings = values.dtype == torch.float16, np.float32(softcap or 0), np.float32(goal), first_row, n_static
    out = np.zeros((batch, q_tokens, n_kv * group, dim), np.float32)
    seen = np.zeros((batch, n_kv, n_static + group * k), np.float32)
    stats = np.zeros((batch, n_kv, 2))

    def attend(start: int, stop: int) -> None:
        for question, head in (divmod(pair, n_kv) for pair in range(start, stop)):
            fixed = keys[head], static_values[head], bias[head], of_key[head], zone_keys[head]
            results = out[question], seen[question, head], stats[question, head]
            _attend_question(question, head, *inputs, *fixed, codes, *settings, *results)

    run_ranges(attend, batch * n_kv, threads=threads or torch.get_num_threads(), chunks_per_thread=2)
    _add_mass(mass, seen, positions, inputs[2], inputs[-1], group, q_tokens, values.shape[1])
    per_head = stats.sum(1) / (n_kv * group)
    return Attended(torch.from_numpy(out), per_head[:, 0], per_head[:, 1])


@compiled
def _attend_question(  # type: ignore[no-untyped-def]
    b, head, queries, scores, ids, tail_keys, tail_values, begins, places, counts,
    panels, static_values, bias, of_key, zone_keys, codes, half, softcap, goal, first_row, n_static, out, seen, stats,
):  # fmt: skip
    _, _, group, q_tokens, dim = queries.shape
    k, n_keys, value_dim = ids.shape[2], codes.shape[1], codes.shape[2]
    wide = (value_dim + LANES - 1) // LANES * LANES
    n_fixed, begin = n_static + zone_keys.shape[0], begins[b]
    n_tail = places[b, counts[b] - 1] + 1 - begin
    at_found = (n_fixed + LANES - 1) // LANES * LANES
    at_tail = at_found + (k + LANES - 1) // LANES * LANES
    width = at_tail + (n_tail + LANES - 1) // LANES * LANES
    ours = np.zeros(TILE_ROWS * dim, np.float32)
    lines, line = np.zeros(TILE_ROWS * width, np.float32), np.empty(width, np.float32)
    sums = np.zeros(TILE_ROWS * wide, np.float32)
    kept, zones = np.zeros(TILE_ROWS, np.int64), np.empty(TILE_ROWS * k, np.int64)
    per_line = max(64 // codes.itemsize, 1)
    n = group * counts[b]
    for top in range(0, n, TILE_ROWS):
        for r in range(min(TILE_ROWS, n - top)):
            for t in range(dim):
                ours[r * dim + t] = queries[head, b, (top + r) % group, (top + r) // group, t]
        for p in range(0, at_found, LANES):
            add_tile(ours, 0, dim, panels, p * dim, LANES, lines, p, width, dim, False)  # type: ignore[call-arg]
        for r in range(min(TILE_ROWS, n - top)):
            g, token, row = (top + r) % group, (top + r) // group, r * width
            item = (b * group + g) * q_tokens + token
            found, own = row + at_found, row + at_tail
            lines[found : row + width] = -np.inf
            n_found = 0
            while n_found < k and ids[head, item, n_found] >= 0:
                lines[found + n_found] = scores[head, item, n_found]
                n_found += 1
            for j in range(places[b, token] + 1 - begin):
                product = np.float32(0)
                for t in range(dim):
                    product += ours[r * dim + t] * tail_keys[b, head, begin + j, t]
                lines[own + j] = product
            if softcap > 0:
                soften(lines, row, width // LANES, softcap, line)
            for j in range(at_found):
                lines[row + j] += bias[j]
            best = greatest(lines, row, width // LANES)  # type: ignore[call-arg, var-annotated]
            total = exp_minus(lines, row, width // LANES, best)  # type: ignore[call-arg, var-annotated]
            certain = np.float32(0)
            for j in range(n_static):
                certain += lines[row + j]
            for j in range(places[b, token] + 1 - begin):
                certain += lines[own + j]
            for j in range(n_found):  # a key that is found is taken out of its zone
                zones[r * k + j] = -1
                at = ids[head, item, j] - first_row
                if 0 <= at < of_key.shape[0] and ids[head, item, j] < n_keys:
                    zones[r * k + j] = of_key[at]
                    total -= lines[row + n_static + of_key[at]] / zone_keys[of_key[at]]
            attended = certain
            kept[r] = n_found
            if goal < 1:
                wanted = goal * total
                for j in range(n_found):
                    if attended >= wanted:
                        kept[r] = j
                        break
                    attended += lines[found + j]
                for j in range(kept[r], n_found):
                    total -= lines[found + j]
                    if zones[r * k + j] >= 0:
                        total += lines[row + n_static + zones[r * k + j]] / zone_keys[zones[r * k + j]]
            else:
                for j in range(n_found):
                    attended += lines[found + j]
            stats[0] += n_static
            stats[1] += attended / total
            for j in range(row, row + width):
                lines[j] /= total
        for t in range(0, wide, LANES):
            add_tile(lines, 0, width, static_values, t, wide, sums, t, wide, n_fixed, False)  # type: ignore[call-arg]
        for r in range(min(TILE_ROWS, n - top)):
            g, token, row = (top + r) % group, (top + r) // group, r * width
            item = (b * group + g) * q_tokens + token
            result = out[token, head * group + g]
            for t in range(value_dim):
                result[t] = sums[r * wide + t]
            for j in range(kept[r]):
                coming = ids[head, item, j + _AHEAD] if j + _AHEAD < kept[r] else -1
                if 0 <= coming < n_keys:
                    for at in range(0, value_dim, per_line):
                        prefetch(codes, (head * n_keys + coming) * value_dim + at)  # type: ignore[call-arg]
                weight, zone = lines[row + at_found + j], zones[r * k + j]
                if ids[head, item, j] >= n_keys:
                    for t in range(value_dim):
                        result[t] += weight * tail_values[b, head, ids[head, item, j] - n_keys, t]
                    continue
                stats[0] += 1
                if token == counts[b] - 1:
                    seen[n_static + g * k + j] = weight
                if zone >= 0:
                    weight -= lines[row + n_static + zone] / zone_keys[zone]
                add_scaled(result, codes, head, ids[head, item, j], weight, half)
            for j in range(places[b, token] + 1 - begin):
                for t in range(value_dim):
                    result[t] += lines[row + at_tail + j] * tail_values[b, head, begin + j, t]
            if token == counts[b] - 1:
                for j in range(n_static):
                    seen[j] += lines[row + j]


@compiled
def _add_mass(mass, seen, positions, ids, counts, group, q_tokens, n_keys):  # type: ignore[no-untyped-def]
    """Where the attention of each question's last token went, to mass [batch, context_tokens]."""
    batch, n_kv, _ = seen.shape
    n_static, k = len(positions), ids.shape[2]
    for b in range(batch):
        for head in range(n_kv):
            for j in range(n_static):
                mass[b, positions[j]] += seen[b, head, j]
            for g in range(group):
                item = (b * group + g) * q_tokens + counts[b] - 1
                for j in range(k):
                    if 0 <= ids[head, item, j] < n_keys:
                        mass[b, ids[head, item, j]] += seen[b, head, n_static + g * k + j]
