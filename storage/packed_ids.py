"""Ascending ids in few bits: Elias-Fano, a row of ids in as many bytes as any other row.

Of ids in [0, n], n for none, the `low_bits` low bits stand one after another; then of each id in order the rest in
unary: bit `(id >> low_bits) + place` is set. 32 links of 8K keys take 40 bytes, of 128K keys 56.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


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
    packed = np.zeros((rows, packed_width(n_ids, per_row)), np.uint8)
    _pack(np.ascontiguousarray(ids), n_ids, low_bits_of(n_ids, per_row), packed)
    return packed


def unpack(packed: NDArray[np.uint8], n_ids: int, per_row: int) -> NDArray[np.int32]:
    """What `pack` was given.

    Raises:
        ValueError: A row holds another number of ids, one out of range, or is not ascending.
    """
    ids = np.empty((len(packed), per_row), np.int32)
    padded = np.zeros((len(packed) + 1) * packed.shape[1] + 16, np.uint8)  # words are read past the end
    padded[: packed.size] = packed.reshape(-1)
    wrong = _unpack(padded, packed.shape[1], n_ids, low_bits_of(n_ids, per_row), ids)
    if wrong >= 0:
        raise ValueError(f"neighbors of row {wrong} of the index are no {per_row} ascending ids in [0, {n_ids}]")
    return ids


@numba.njit(nogil=True, cache=True)  # type: ignore[misc]
def _pack(ids, n_ids, low_bits, packed):  # type: ignore[no-untyped-def]
    for row in range(ids.shape[0]):
        start = ids.shape[1] * low_bits
        for j in range(ids.shape[1]):
            number = ids[row, j] if ids[row, j] >= 0 else n_ids
            for b in range(low_bits):
                if (number >> b) & 1:
                    at = j * low_bits + b
                    packed[row, at >> 3] |= np.uint8(1 << (at & 7))
            at = start + (number >> low_bits) + j
            packed[row, at >> 3] |= np.uint8(1 << (at & 7))


@numba.njit(nogil=True, cache=True)  # type: ignore[misc]
def _unpack(packed, width, n_ids, low_bits, ids):  # type: ignore[no-untyped-def]
    """The first row that is wrong, or -1."""
    per_row = ids.shape[1]
    mask = (np.int64(1) << low_bits) - 1
    start, stop = per_row * low_bits, per_row * low_bits + per_row + (n_ids >> low_bits)
    for row in range(ids.shape[0]):
        base = row * width
        j, before = 0, np.int64(-1)
        word, left = np.int64(0), 0
        for at in range(start, stop):
            if left == 0:
                word, left = np.int64(packed[base + (at >> 3)]) >> (at & 7), 8 - (at & 7)
            if word & 1:
                if j == per_row:
                    return row
                first = j * low_bits
                low = np.int64(0)
                for byte in range(5):
                    low |= np.int64(packed[base + (first >> 3) + byte]) << (8 * byte)
                number = ((at - start - j) << low_bits) | ((low >> (first & 7)) & mask)
                if number > n_ids or number < before:
                    return row
                before = number
                ids[row, j] = number if number < n_ids else -1
                j += 1
            word >>= 1
            left -= 1
        if j != per_row:
            return row
    return -1
