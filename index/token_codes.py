"""Values whose channels are encoded in groups of 32 per token (`rabatch.storage.codecs`), as the kernels read them.

They are decoded where they are used: added to a sum, or written out as blocks of rows. What a kernel gets is `y`; scale
and center of the channels are its caller's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from rabatch.compiling import FAST, compiled
from rabatch.index.machine import add_scaled, prefetch, widen

GROUP = 32
STEPS = np.concatenate([[0.0], np.exp2((np.arange(1, 256) - 255) / 16)]).astype(np.float32)
"""What the byte of a group says."""


class TokenCodes(NamedTuple):
    """Values of one layer.

    Attributes:
        codes: [n_heads, n_keys, width], uint8: codes in planes, then a step per group, then zeros of 4 bits.
        dim: Channels.
        bits: Of a code, 2 or 4.
    """

    codes: np.ndarray
    dim: int
    bits: int


def numbers(codes: TokenCodes, head: int, key: int) -> np.ndarray:
    """`y` of one value, [dim], float32, channel by channel: the reference of the compiled code."""
    row, dim, bits = codes.codes[head, key], codes.dim, codes.bits
    width, groups, top = -(-dim * bits // 8), -(-dim // GROUP), 2**bits - 1
    y = np.empty(dim, np.float32)
    for channel in range(dim):
        group = channel // GROUP
        code = (row[channel % width] >> (bits * (channel // width))) & top
        zero = (row[width + groups + group // 2] >> (4 * (group % 2))) & 15
        y[channel] = STEPS[row[width + group]] * (np.float32(code) - np.float32(zero) * np.float32(top / 15))
    return y


@compiled
def add_token(out, out_at, row, dim, bits, weight):  # type: ignore[no-untyped-def]
    """Add `weight` times `y` of one row to out[out_at : out_at + dim], in pieces within a group and a plane."""
    width, groups = (dim * bits + 7) // 8, (dim + GROUP - 1) // GROUP
    mask = np.int32((1 << bits) - 1)
    unit = np.float32(mask) / np.float32(15)
    at = 0
    while at < dim:
        plane, group = at // width, at // GROUP
        stop = min((plane + 1) * width, (group + 1) * GROUP, dim)
        zero = np.float32((row[width + groups + group // 2] >> (4 * (group & 1))) & 15)
        step = STEPS[row[width + group]] * weight
        base, shift = -step * zero * unit, np.int32(plane * bits)
        some, sums = row[at - plane * width : stop - plane * width], out[out_at + at : out_at + stop]
        for i in range(len(some)):  # of one length, side by side: vectorised
            sums[i] += base + step * np.float32((np.int32(some[i]) >> shift) & mask)
        at = stop


def _is_token_codes(kind: types.Type) -> bool:
    return isinstance(kind, types.BaseNamedTuple) and getattr(kind, "instance_class", None) is TokenCodes


@overload(add_scaled, jit_options={"fastmath": FAST})  # type: ignore[misc]
def _add_scaled(out, codes, head, key, weight, half):  # type: ignore[no-untyped-def]
    if not _is_token_codes(codes):
        return None

    def add(out, codes, head, key, weight, half):  # type: ignore[no-untyped-def]
        add_token(out, 0, codes.codes[head, key], codes.dim, codes.bits, weight)

    return add


def sizes(values: np.ndarray | TokenCodes) -> tuple[int, int]:
    """Keys and channels of values, for kernels."""
    if isinstance(values, TokenCodes):
        return values.codes.shape[1], values.dim
    return values.shape[1], values.shape[2]


@overload(sizes)  # type: ignore[misc]
def _sizes(values):  # type: ignore[no-untyped-def]
    if _is_token_codes(values):
        return lambda values: (values.codes.shape[1], values.dim)
    return lambda values: (values.shape[1], values.shape[2])


def prefetch_row(values: np.ndarray | TokenCodes, head: int, key: int) -> None:
    """Ask for the memory of a row, for kernels."""


@overload(prefetch_row)  # type: ignore[misc]
def _prefetch_row(values, head, key):  # type: ignore[no-untyped-def]
    if _is_token_codes(values):

        def of_codes(values, head, key):  # type: ignore[no-untyped-def]
            width = values.codes.shape[2]
            first = (head * values.codes.shape[1] + key) * width
            for at in range(0, width, 64):
                prefetch(values.codes, first + at)  # type: ignore[call-arg]
            prefetch(values.codes, first + width - 1)  # type: ignore[call-arg]

        return of_codes

    def of_array(values, head, key):  # type: ignore[no-untyped-def]
        width = values.shape[2]
        for at in range(0, width, max(64 // values.itemsize, 1)):
            prefetch(values, (head * values.shape[1] + key) * width + at)  # type: ignore[call-arg]

    return of_array


def widen_rows(
    out: np.ndarray, step: int, values: np.ndarray | TokenCodes, head: int, first: int, n: int, dim: int, half: bool
) -> None:
    """Write the numbers of rows [first, first + n) to out, `step` apart, for kernels.

    Args:
        out: One-dimensional, float32.
        values: `TokenCodes`, or as of `rabatch.index.machine.widen`, rows of `dim` numbers.
        half: Whether bits are IEEE float16.
    """
    for i in range(n):
        if isinstance(values, TokenCodes):
            out[i * step : i * step + dim] = numbers(values, head, first + i)
        else:
            widen(out[i * step :], values, head, (first + i) * dim, dim, half)


@overload(widen_rows)  # type: ignore[misc]
def _widen_rows(out, step, values, head, first, n, dim, half):  # type: ignore[no-untyped-def]
    if _is_token_codes(values):

        def of_codes(out, step, values, head, first, n, dim, half):  # type: ignore[no-untyped-def]
            for i in range(n):
                out[i * step : i * step + dim] = 0
                add_token(out, i * step, values.codes[head, first + i], dim, values.bits, np.float32(1))

        return of_codes

    def of_array(out, step, values, head, first, n, dim, half):  # type: ignore[no-untyped-def]
        if step == dim:
            widen(out, values, head, first * dim, n * dim, half)
        else:
            for i in range(n):
                widen(out[i * step :], values, head, (first + i) * dim, dim, half)

    return of_array
