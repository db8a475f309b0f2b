"""What the kernels need of the machine and numba does not offer: a prefetch, and 16-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from rabatch.compiling import FAST

_I8P, _I32 = ir.IntType(8).as_pointer(), ir.IntType(32)


@intrinsic  # type: ignore[misc]
def prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Ask for the cache line of element `index` of a C-contiguous array, counted as if it had one dimension."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), _I8P)
        kind = ir.FunctionType(ir.VoidType(), [_I8P, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # to read, to keep in every cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[misc]
def _bfloat16(typing_context, bits):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic  # type: ignore[misc]
def _float16(typing_context, bits):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def _numbers(codes: np.ndarray, half: bool) -> np.ndarray:
    """What codes stand for, float32, as NumPy reads them: the reference of the compiled code."""
    if codes.dtype != np.uint16:
        return codes.astype(np.float32)
    return codes.view(np.float16).astype(np.float32) if half else (codes.astype(np.uint32) << 16).view(np.float32)


def dot(codes: np.ndarray, head: int, key: int, query: np.ndarray, half: bool) -> float:
    """Inner product of `codes[head, key]` and `query`, for kernels.

    Args:
        codes: [n_heads, n_keys, head_dim]: float32, int8, or the bits of 16-bit floats as uint16.
        query: [head_dim], float32.
        half: Whether bits are IEEE float16; else they are bfloat16.
    """
    return float(_numbers(codes[head, key], half) @ query)


@overload(dot, jit_options={"fastmath": FAST})  # type: ignore[misc]
def _dot(codes, head, key, query, half):  # type: ignore[no-untyped-def]
    if codes.dtype != types.uint16:

        def number(codes, head, key, query, half):  # type: ignore[no-untyped-def]
            total = np.float32(0.0)
            for t in range(query.shape[0]):
                total += np.float32(codes[head, key, t]) * query[t]
            return total

        return number

    def bits(codes, head, key, query, half):  # type: ignore[no-untyped-def]
        total = np.float32(0.0)
        if half:
            for t in range(query.shape[0]):
                total += _float16(codes[head, key, t]) * query[t]  # type: ignore[call-arg]
        else:
            for t in range(query.shape[0]):
                total += _bfloat16(codes[head, key, t]) * query[t]  # type: ignore[call-arg]
        return total

    return bits


def add_scaled(out: np.ndarray, codes: np.ndarray, head: int, key: int, weight: float, half: bool) -> None:
    """Add `weight` times `codes[head, key]` to `out`, for kernels; arguments as of `dot`."""
    out += np.float32(weight) * _numbers(codes[head, key], half)


@overload(add_scaled, jit_options={"fastmath": FAST})  # type: ignore[misc]
def _add_scaled(out, codes, head, key, weight, half):  # type: ignore[no-untyped-def]
    if not isinstance(codes, types.Array):
        return None  # `rabatch.index.token_codes` has them
    if codes.dtype != types.uint16:

        def number(out, codes, head, key, weight, half):  # type: ignore[no-untyped-def]
            for t in range(out.shape[0]):
                out[t] += np.float32(codes[head, key, t]) * weight

        return number

    def bits(out, codes, head, key, weight, half):  # type: ignore[no-untyped-def]
        if half:
            for t in range(out.shape[0]):
                out[t] += _float16(codes[head, key, t]) * weight  # type: ignore[call-arg]
        else:
            for t in range(out.shape[0]):
                out[t] += _bfloat16(codes[head, key, t]) * weight  # type: ignore[call-arg]

    return bits


def spread(out: np.ndarray, at: int, step: int, codes: np.ndarray, head: int, key: int, half: bool) -> None:
    """Write the numbers of `codes[head, key]` to `out[at]`, `out[at + step]`, ...; codes as of `dot`.

    Args:
        out: One-dimensional, float32.
    """
    numbers = _numbers(codes[head, key], half)
    out[at : at + step * len(numbers) : step] = numbers


@overload(spread, jit_options={"fastmath": FAST})  # type: ignore[misc]
def _spread(out, at, step, codes, head, key, half):  # type: ignore[no-untyped-def]
    if codes.dtype != types.uint16:

        def number(out, at, step, codes, head, key, half):  # type: ignore[no-untyped-def]
            for t in range(codes.shape[2]):
                out[at + t * step] = codes[head, key, t]

        return number

    def bits(out, at, step, codes, head, key, half):  # type: ignore[no-untyped-def]
        for t in range(codes.shape[2]):
            if half:
                out[at + t * step] = _float16(codes[head, key, t])  # type: ignore[call-arg]
            else:
                out[at + t * step] = _bfloat16(codes[head, key, t])  # type: ignore[call-arg]

    return bits


def widen(out: np.ndarray, codes: np.ndarray, head: int, first: int, n: int, half: bool) -> None:
    """Write the numbers of `codes[head, first : first + n]` to `out[:n]`; codes as of `dot`, but [n_heads, any].

    Args:
        out: One-dimensional, float32.
    """
    out[:n] = _numbers(codes[head, first : first + n], half)


@overload(widen)  # type: ignore[misc]
def _widen(out, codes, head, first, n, half):  # type: ignore[no-untyped-def]
    if codes.dtype != types.uint16:

        def number(out, codes, head, first, n, half):  # type: ignore[no-untyped-def]
            part = codes[head, first : first + n]  # sums in an index would keep the loop from being vectorised
            for i in range(n):
                out[i] = part[i]

        return number

    def bits(out, codes, head, first, n, half):  # type: ignore[no-untyped-def]
        part = codes[head, first : first + n]
        if half:
            for i in range(n):
                out[i] = _float16(part[i])  # type: ignore[call-arg]
        else:
            for i in range(n):
                out[i] = _bfloat16(part[i])  # type: ignore[call-arg]

    return bits
