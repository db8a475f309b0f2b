"""Ascending ids in few bits: Elias-Fano, a row of ids in as many bytes as any other row.

Of ids in [0, n], n for none, the `low_bits` low bits stand one after another; then of each id in order the rest in
unary: bit `(id >> low_bits) + place` is set. 32 links of 8K keys take 40 bytes, of 128K keys 56.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rabatch.compiling import compiled

_WORD = 8  # bytes read or written at once, past the end of a row too
_WORD_BITS = 56  # of those are a row's from any bit on
_I64 = ir.IntType(64)


def low_bits_of(n_ids: int, per_row: int) -> int:
    """Low bits of each of `per_row` ids in [0, n_ids]: floor(log2((n_ids + 1) / per_row)), at least 0."""
    return max(((n_ids + 1) // max(per_row, 1)).bit_length() - 1, 0)


def packed_width(n_ids: int, per_row: int) -> int:
    """Bytes of a row."""
    low = low_bits_of(n_ids, per_row)
    return -(-(per_row * low + per_row + (n_ids >> low)) // 8)


def is_ascending(ids: NDArray[np.int32]) -> bool:
    """Whether ids ascend in every row of [..., per_row], with none (-1) last."""
    unsigned = ids.view(np.uint32)
    return bool((unsigned[..., 1:] >= unsigned[..., :-1]).all())


def ascending(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """The ids of each row in ascending order, none (-1) last."""
    return np.sort(np.ascontiguousarray(ids).view(np.uint32), axis=-1).view(np.int32)


def pack(ids: NDArray[np.int32], n_ids: int) -> NDArray[np.uint8]:
    """Rows of ascending ids, [rows, per_row] int32 in [-1, n_ids), as [rows, packed_width] bytes."""
    rows, per_row = ids.shape
    width = packed_width(n_ids, per_row)
    padded = np.zeros(rows * width + _WORD, np.uint8)
    _pack(np.ascontiguousarray(ids), n_ids, low_bits_of(n_ids, per_row), width, padded)
    return padded[: rows * width].reshape(rows, width)


def unpack(packed: NDArray[np.uint8], n_ids: int, ids: NDArray[np.int32]) -> None:
    """Write what `pack` was given to `ids`, [rows, per_row].

    Raises:
        ValueError: A row holds another number of ids, one out of range, or is not ascending.
    """
    per_row = ids.shape[1]
    padded = np.empty(packed.size + _WORD, np.uint8)
    padded[: packed.size], padded[packed.size :] = packed.reshape(-1), 0
    wrong = _unpack(padded, packed.shape[1], n_ids, low_bits_of(n_ids, per_row), ids)
    if wrong >= 0:
        raise ValueError(f"neighbors of row {wrong} of the index are no {per_row} ascending ids in [0, {n_ids}]")


@intrinsic  # type: ignore[misc]
def _word(typing_context, array, at):  # type: ignore[no-untyped-def]
    """The 8 bytes from `at` on, of an array of bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.bitcast(builder.gep(data, [arguments[1]]), _I64.as_pointer()), align=1)

    return types.uint64(array, types.intp), generate


@intrinsic  # type: ignore[misc]
def _set_bits(typing_context, array, at, bits):  # type: ignore[no-untyped-def]
    """Set bits of the 8 bytes from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), _I64.as_pointer())
        builder.store(builder.or_(builder.load(place, align=1), arguments[2]), place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic  # type: ignore[misc]
def _lowest_bit(typing_context, bits):  # type: ignore[no-untyped-def]
    """The place of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@compiled
def _pack(ids, n_ids, low_bits, width, packed):  # type: ignore[no-untyped-def]
    mask = (np.int64(1) << low_bits) - 1
    for row in range(ids.shape[0]):
        base, start = row * width, ids.shape[1] * low_bits
        for j in range(ids.shape[1]):
            number = np.int64(ids[row, j]) if ids[row, j] >= 0 else np.int64(n_ids)
            at, upper = j * low_bits, start + (number >> low_bits) + j
            _set_bits(packed, base + (at >> 3), np.uint64((number & mask) << (at & 7)))  # type: ignore[call-arg]
            _set_bits(packed, base + (upper >> 3), np.uint64(np.int64(1) << (upper & 7)))  # type: ignore[call-arg]


@compiled
def _unpack(packed, width, n_ids, low_bits, ids):  # type: ignore[no-untyped-def]
    """The first row that is wrong, or -1."""
    per_row = ids.shape[1]
    mask = (np.int64(1) << low_bits) - 1
    start, stop = per_row * low_bits, per_row * low_bits + per_row + (n_ids >> low_bits)
    one = np.uint64(1)
    for row in range(ids.shape[0]):
        base, j, before, at = row * width, 0, np.int64(-1), start
        while at < stop:
            taken = min(stop - at, _WORD_BITS)
            bits = _word(packed, base + (at >> 3)) >> np.uint64(at & 7)  # type: ignore[call-arg, var-annotated]
            bits &= (one << np.uint64(taken)) - one
            while bits != 0:
                if j == per_row:
                    return row
                first = j * low_bits
                word = _word(packed, base + (first >> 3))  # type: ignore[call-arg, var-annotated]
                low = np.int64(word >> np.uint64(first & 7)) & mask
                number = ((at + _lowest_bit(bits) - start - j) << low_bits) | low
                if number > n_ids or number < before:
                    return row
                before = number
                ids[row, j] = number if number < n_ids else -1
                bits &= bits - one
                j += 1
            at += taken
        if j != per_row:
            return row
    return -1
