"""The k best of a stream of scores: a list that is cut down when it is full, and lists of them in order.

A heap costs a sift per key that enters it, about 0.1 us at k = 100 (one core of x86_64); here a key is appended, and
when the list holds 3 k it is cut to the k best by quickselect. Of 32K random scores the 100 best cost 30 us instead of
87.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from rabatch.compiling import compiled
from rabatch.index.topk.lanes import LANES, above, lowest_bit

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SIGN = _I32(-(1 << 31))


@intrinsic  # type: ignore[misc]
def packed(typing_context, score, key):  # type: ignore[no-untyped-def]
    """(float32 score, key >= 0) as one uint64: the better, the greater. Of equal scores the lower key is the better."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        bits = builder.select(builder.icmp_unsigned("==", bits, _SIGN), _I32(0), bits)  # there is one zero
        # The bits are ordered as a signed number, but for negative ones backwards.
        order = builder.xor(bits, builder.or_(builder.ashr(bits, _I32(31)), _SIGN))
        key = builder.sub(_I64(0xFFFFFFFF), arguments[1])
        return builder.or_(builder.shl(builder.zext(order, _I64), _I64(32)), key)

    return types.uint64(types.float32, types.int64), generate


@intrinsic  # type: ignore[misc]
def score_of(typing_context, pair):  # type: ignore[no-untyped-def]
    """The score in what `packed` made."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        order = builder.trunc(builder.lshr(arguments[0], _I64(32)), _I32)
        bits = builder.xor(order, builder.or_(builder.not_(builder.ashr(order, _I32(31))), _SIGN))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint64), generate


@intrinsic  # type: ignore[misc]
def key_of(typing_context, pair):  # type: ignore[no-untyped-def]
    """The key in what `packed` made."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sub(_I64(0xFFFFFFFF), builder.and_(arguments[0], _I64(0xFFFFFFFF)))

    return types.int64(types.uint64), generate


@compiled
def room_for(k, n_keys):  # type: ignore[no-untyped-def]
    """Places of a list that the `k` best of `n_keys` are collected in."""
    return min(3 * k, n_keys) + LANES


@compiled
def collect(lines, row, begin, limits, pairs, kept, k, bar):  # type: ignore[no-untyped-def]
    """Enter scores into a list of the best; how many it then holds, and the score that others must exceed.

    Keys come in ascending order: one that only equals the bar has a higher id than those that set it.

    Args:
        lines: Flat; the score of key `begin + j` is `lines[row + j]`, for j in range(*limits). What is NaN or -inf
            never enters.
        pairs: [room_for(k, n_keys)], uint64, `packed`, of which the first `kept` are filled, in any order.
        bar: Of the last call; -inf at first.
    """
    for panel in range(limits[0] // LANES * LANES, limits[1], LANES):
        bits = above(lines, row + panel, bar)  # type: ignore[call-arg, var-annotated]
        while bits:
            t = panel + lowest_bit(bits)  # type: ignore[call-arg]
            bits &= bits - 1
            if limits[0] <= t < limits[1]:
                pairs[kept] = packed(lines[row + t], begin + t)  # type: ignore[call-arg]
                kept += 1
        if kept > pairs.shape[0] - LANES:
            bar = score_of(cut(pairs, kept, k))  # type: ignore[call-arg]
            kept = k
    return kept, bar


@compiled
def cut(pairs, n, k):  # type: ignore[no-untyped-def]
    """Bring the `k` greatest of `n` different numbers to the front, in any order; the least of them. 0 < k < n."""
    low, high = 0, n
    while high - low > 1:
        first, middle, last = pairs[low], pairs[(low + high) >> 1], pairs[high - 1]
        pivot = max(min(first, middle), min(max(first, middle), last))
        # Without branches: on which side a number falls is a toss-up, and a wrong guess costs more than the swap.
        place = low
        for i in range(low, high):
            number = pairs[i]
            pairs[i] = pairs[place]
            pairs[place] = number
            place += number >= pivot
        # pairs[low:place] >= pivot: never empty, and without the pivot it is pairs[low:place - 1].
        if place < k:
            low = place
            continue
        for i in range(low, place):
            if pairs[i] == pivot:
                pairs[i], pairs[place - 1] = pairs[place - 1], pivot
                break
        if place == k or place - 1 == k:
            break
        high = place - 1
    least = pairs[0]
    for i in range(1, k):
        least = min(least, pairs[i])
    return least


@compiled
def settle(pairs, kept, k, scores, ids):  # type: ignore[no-untyped-def]
    """Write the best of a list, at most `k`, to scores and ids: the best first and, among equals, the lower id."""
    if kept > k:
        cut(pairs, kept, k)
        kept = k
    best = pairs[:kept]
    best.sort()
    for j in range(kept):
        scores[j] = score_of(best[kept - 1 - j])  # type: ignore[call-arg]
        ids[j] = key_of(best[kept - 1 - j])  # type: ignore[call-arg]


def ranked(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, scores) [..., k] in any order, brought in order as by `settle`; unfilled places last."""
    by_id = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(dim=-1)
    ids, scores = ids.gather(-1, by_id), scores.gather(-1, by_id)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), scores.gather(-1, order)
