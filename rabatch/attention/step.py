"""Sparse attention of questions over one context on the CPU: `rabatch.attention.sets` in one compiled pass.

The rows of a KV head, all query heads and questions, share each load of the static set and of the zones; six rows at a
time, in registers. What was found, and the tail, are each row's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.coded import CodedRows
from rabatch.attention.sets import Attended, Found, StaticSet, n_rows_of, stored_bits
from rabatch.compiling import compiled
from rabatch.index.compiled import read_only, run_tasks
from rabatch.index.machine import add_scaled
from rabatch.index.token_codes import prefetch_row
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, exp_minus, greatest, soften

_AHEAD = 6  # values whose memory is asked for before they are added
_BLOCK_ROWS = 48  # rows under way at once: their weights stay in the second-level cache
_BLOCK_KEYS = 128  # values of the static set that stay in the first-level cache while rows take them


def attend_compiled(
    queries: Tensor,
    static: StaticSet,
    find: Callable[[], Found],
    values: Tensor | CodedRows,
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
    n_keys = n_rows_of(values, static)
    if isinstance(values, CodedRows):
        codes, first_value, half = values.kernel, values.first_row, False
        affine = [read_only(t.numpy()) for t in values.affine]
    else:
        codes, first_value, half = read_only(stored_bits(values)), 0, values.dtype == torch.float16
        affine = [read_only(np.full((n_kv, dim), number, np.float32)) for number in (1, 0)]
    inputs = [
        read_only(t.numpy())
        for t in (queries.float() * scaling, scores * scaling, ids, *(t.float() for t in tail), begins, places, counts)
    ]
    keys, static_values, bias, positions, of_key, zone_keys = static.panels
    first_row = static.zones.first_row if static.zones is not None else 0
    settings = half, np.float32(softcap or 0), np.float32(goal), first_row, n_static, n_keys, first_value
    out = np.zeros((batch, q_tokens, n_kv * group, dim), np.float32)
    seen = np.zeros((batch, n_kv, n_static + group * k), np.float32)
    stats = np.zeros((batch, n_kv, 2))

    def attend(head: int, first: int, last: int) -> None:
        fixed = keys[head], static_values[head], bias[head], of_key[head], zone_keys[head]
        results = out, seen[:, head], stats[:, head]
        _attend_questions(first, last, head, *inputs, *fixed, codes, *affine, *settings, *results)

    threads = threads or torch.get_num_threads()
    together = -(-batch * n_kv // (2 * threads))  # more share more loads, fewer keep all threads at work
    together = max(together, min(-(-TILE_ROWS // (group * q_tokens)), batch))
    tasks = [(head, first, min(first + together, batch)) for first in range(0, batch, together) for head in range(n_kv)]
    run_tasks(attend, tasks, threads=threads)
    _add_mass(mass, seen, positions, inputs[2], inputs[-1], group, q_tokens, n_keys)
    per_head = stats.sum(1) / (n_kv * group)
    return Attended(torch.from_numpy(out), per_head[:, 0], per_head[:, 1])


@compiled
def _attend_questions(  # type: ignore[no-untyped-def]
    first, last, head, queries, scores, ids, tail_keys, tail_values, begins, places, counts,
    panels, static_values, bias, of_key, zone_keys, codes, scale, center, half, softcap, goal, first_row, n_static,
    n_keys, first_value, out, seen, stats,
):  # fmt: skip
    """Questions `first` to `last` - 1 under one KV head, `_BLOCK_ROWS` rows at a time."""
    group, dim, value_dim = queries.shape[2], queries.shape[4], scale.shape[1]
    k, wide = ids.shape[2], (value_dim + LANES - 1) // LANES * LANES
    found_sum = np.empty(value_dim, np.float32)
    n_fixed = n_static + zone_keys.shape[0]
    at_found = (n_fixed + LANES - 1) // LANES * LANES
    at_tail = at_found + (k + LANES - 1) // LANES * LANES
    longest, n_rows = 0, 0
    for b in range(first, last):
        longest = max(longest, places[b, counts[b] - 1] + 1 - begins[b])
        n_rows += group * counts[b]
    width = at_tail + (longest + LANES - 1) // LANES * LANES
    room = min((n_rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS, _BLOCK_ROWS)
    rows = np.zeros((room, 3), np.int64)  # question, token, query head within the group
    ours, sums = np.zeros(room * dim, np.float32), np.zeros(room * wide, np.float32)
    lines, line = np.zeros(room * width, np.float32), np.empty(width, np.float32)
    kept, zones = np.zeros(room, np.int64), np.empty((room, k), np.int64)
    n = 0
    for b in range(first, last):
        for i in range(group * counts[b]):
            rows[n, 0], rows[n, 1], rows[n, 2] = b, i // group, i % group
            n += 1
            if n < room and (b < last - 1 or i < group * counts[b] - 1):
                continue
            for r in range(n):
                query = queries[head, rows[r, 0], rows[r, 2], rows[r, 1]]
                for t in range(dim):
                    ours[r * dim + t] = query[t]
            for at in range(0, at_found, LANES):
                for top in range(0, n, TILE_ROWS):
                    add_tile(  # type: ignore[call-arg]
                        ours, top * dim, dim, panels, at * dim, LANES, lines, top * width + at, width, dim, False
                    )
            for r in range(n):
                question = rows[r, 0]
                weigh = _weigh(
                    lines, r * width, line, ours, r * dim, rows[r], group, head, scores, ids, tail_keys, begins, places,
                    counts, bias, of_key, zone_keys, zones[r], softcap, goal, first_row, n_static, n_keys,
                    (at_found, at_tail, width), seen[question],
                )  # fmt: skip
                kept[r] = weigh[0]
                stats[question, 0] += weigh[1]
                stats[question, 1] += weigh[2]
            sums[:] = 0
            for at in range(0, n_fixed, _BLOCK_KEYS):
                depth = min(_BLOCK_KEYS, n_fixed - at)
                for top in range(0, n, TILE_ROWS):
                    for t in range(0, wide, LANES):
                        add_tile(  # type: ignore[call-arg]
                            lines, top * width + at, width, static_values, at * wide + t, wide,
                            sums, top * wide + t, wide, depth, True,
                        )  # fmt: skip
            for r in range(n):
                question, token, g = rows[r]
                result = out[question, token, head * group + g]
                for t in range(value_dim):
                    result[t] = sums[r * wide + t]
                weights = lines[r * width : (r + 1) * width]
                item = (question * group + g) * queries.shape[3] + token
                found_sum[:] = 0
                all_found = _add_found(
                    result, found_sum, weights, at_found, ids[head, item], kept[r], zones[r], zone_keys, n_static,
                    codes, n_keys, first_value, head, half, tail_values[question],
                )  # fmt: skip
                for t in range(value_dim):
                    result[t] += scale[head, t] * found_sum[t] + center[head, t] * all_found
                begin = begins[question]
                for j in range(places[question, token] + 1 - begin):
                    value, weight = tail_values[question, head, begin + j], weights[at_tail + j]
                    for t in range(value_dim):
                        result[t] += weight * value[t]
            n = 0


@compiled
def _weigh(  # type: ignore[no-untyped-def]
    lines, at, line, ours, ours_at, row, group, head, scores, ids, tail_keys, begins, places, counts, bias, of_key,
    zone_keys, zones, softcap, goal, first_row, n_static, n_keys, ends, seen,
):  # fmt: skip
    """Turn the logits of a row over the static set and zones into softmax weights over all that it attends.

    Returns:
        Found keys that are kept, context keys attended, and the share of the softmax mass that these hold.
    """
    b, token, g = row
    at_found, at_tail, width = ends
    k, item, begin, dim = ids.shape[2], (b * group + g) * places.shape[1] + token, begins[b], tail_keys.shape[3]
    n_tail = places[b, token] + 1 - begin
    found, own = at + at_found, at + at_tail
    lines[found : at + width] = -np.inf
    n_found = 0
    while n_found < k and ids[head, item, n_found] >= 0:
        lines[found + n_found] = scores[head, item, n_found]
        n_found += 1
    for j in range(n_tail):
        key, product = tail_keys[b, head, begin + j], np.float32(0)
        for t in range(dim):
            product += ours[ours_at + t] * key[t]
        lines[own + j] = product
    if softcap > 0:
        soften(lines, at, width // LANES, softcap, line)
    for j in range(at_found):
        lines[at + j] += bias[j]
    best = greatest(lines, at, width // LANES)  # type: ignore[call-arg, var-annotated]
    total = exp_minus(lines, at, width // LANES, best)  # type: ignore[call-arg, var-annotated]
    attended = np.float32(0)
    for j in range(n_static):
        attended += lines[at + j]
    for j in range(n_tail):
        attended += lines[own + j]
    n_context = n_static
    for j in range(n_found):  # a key that is found is taken out of its zone
        zones[j] = -1
        place = ids[head, item, j] - first_row
        if 0 <= place < of_key.shape[0] and ids[head, item, j] < n_keys:
            zones[j] = of_key[place]
            total -= lines[at + n_static + zones[j]] / zone_keys[zones[j]]
    kept = n_found
    if goal < 1:
        wanted = goal * total
        for j in range(n_found):
            if attended >= wanted:
                kept = j
                break
            attended += lines[found + j]
        for j in range(kept, n_found):
            total -= lines[found + j]
            if zones[j] >= 0:
                total += lines[at + n_static + zones[j]] / zone_keys[zones[j]]
    else:
        for j in range(n_found):
            attended += lines[found + j]
    for j in range(at, at + width):
        lines[j] /= total
    last = token == counts[b] - 1
    for j in range(kept):
        if ids[head, item, j] < n_keys:
            n_context += 1
            if last:
                seen[n_static + g * k + j] = lines[found + j]
    if last:
        for j in range(n_static):
            seen[j] += lines[at + j]
    return kept, n_context, attended / total


@compiled
def _add_found(  # type: ignore[no-untyped-def]
    result, found_sum, weights, at_found, ids, kept, zones, zone_keys, n_static, codes, n_keys, first_value, head, half,
    tail_values,
):  # fmt: skip
    """Add the values of the keys that were found: of the context to `found_sum`, past it those of the tail to `result`.

    Returns:
        The weights of the context's together.
    """
    together = np.float32(0)
    for j in range(kept):
        coming = ids[j + _AHEAD] if j + _AHEAD < kept else -1
        if 0 <= coming < n_keys:
            prefetch_row(codes, head, coming - first_value)
        weight = weights[at_found + j]
        if ids[j] >= n_keys:
            value = tail_values[head, ids[j] - n_keys]
            for t in range(len(found_sum)):
                result[t] += weight * value[t]
            continue
        if zones[j] >= 0:
            weight -= weights[n_static + zones[j]] / zone_keys[zones[j]]
        add_scaled(found_sum, codes, head, ids[j] - first_value, weight, half)
        together += weight
    return together


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
