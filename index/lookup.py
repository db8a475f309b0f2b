"""Sums of table lookups for 32 keys at a time, from registers: the inner loop of a scan of 4-bit codes.

A code of 4 bits picks one of 16 bytes, and one instruction (AVX2 `pshufb`, NEON `tbl`) does so for 16 or 32 keys
(Andre et al. 2015). faiss has it as FastScan: for 32K keys of 32 codes that takes 42 us on one core, and 75 if the best
200 are asked for; this takes 18, and what is done with the sums is left to the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from rabatch.index.topk.lanes import _loop

KEYS_PER_BLOCK = 32
MAX_LEVEL = 127
"""Greatest number in a table: two of them are added in a byte."""
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _HALF, _WORDS = ir.VectorType(_I8, 32), ir.VectorType(_I8, 16), ir.VectorType(_I16, 16)
_SUMS = ir.VectorType(_I16, 32)
_CODES, _NUMBERS = types.Array(types.uint8, 1, "C"), types.Array(types.int16, 1, "C")


def blocked(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes as `add_lookups` reads them.

    Args:
        codes: [n_keys, n_bytes], uint8: two codes a byte, lower half first.

    Returns:
        Flat: by block of 32 keys, by byte of a key, the keys of the block; zeros past the last key.
    """
    n_keys, n_bytes = codes.shape
    padded = np.zeros((-(-n_keys // KEYS_PER_BLOCK) * KEYS_PER_BLOCK, n_bytes), np.uint8)
    padded[:n_keys] = codes
    return np.ascontiguousarray(padded.reshape(-1, KEYS_PER_BLOCK, n_bytes).transpose(0, 2, 1)).reshape(-1)


def _at(context: Any, builder: Any, kind: Any, array: Any, at: Any, result: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), result.as_pointer())


def _vector(kind: Any, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _halves(builder: Any, both: Any) -> list[Any]:
    places = ir.VectorType(_I32, 16)
    return [builder.shuffle_vector(both, both, ir.Constant(places, list(range(at, at + 16)))) for at in (0, 16)]


def _looked_up(context: Any, builder: Any, table: Any, codes: Any) -> Any:
    """table[code] for 32 codes below 16; `table` is <32 x i8>, its 16 bytes twice."""
    triple, _, features = context.codegen().magic_tuple()

    def call(name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    if "+avx2" in features:
        return call("llvm.x86.avx2.pshuf.b", table, codes)
    in_halves = None
    if "+ssse3" in features:
        in_halves = "llvm.x86.ssse3.pshuf.b.128"
    elif triple.startswith(("aarch64", "arm64")):
        in_halves = "llvm.aarch64.neon.tbl1.v16i8"
    if in_halves is not None:
        first = _halves(builder, table)[0]
        parts = [call(in_halves, first, half) for half in _halves(builder, codes)]
        return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
    found = ir.Constant(_BYTES, ir.Undefined)
    for i in range(KEYS_PER_BLOCK):
        code = builder.zext(builder.extract_element(codes, _I32(i)), _I32)
        found = builder.insert_element(found, builder.extract_element(table, code), _I32(i))
    return found


@intrinsic  # type: ignore[misc]
def add_lookups(typing_context, codes, codes_at, tables, n_bytes, sums, sums_at, maxima, maxima_at):  # type: ignore[no-untyped-def]
    """sums[32] = over all codes of a key, tables[its number, code]; maxima[32] = the greater of it and of sums.

    Args:
        codes: uint8, `blocked`; the block begins at `codes_at`.
        tables: uint8, flat: of each code 16 numbers up to MAX_LEVEL, written twice; of 2 * `n_bytes` codes.
        n_bytes: Of a key. A sum must stay below 2^15.
        sums, maxima: int16, flat.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_, codes_at_, tables_, n_bytes_, sums_, sums_at_, maxima_, maxima_at_ = arguments
        zero = _vector(_WORDS, 0)

        def body(i: Any, totals: list[Any]) -> list[Any]:
            place = builder.add(codes_at_, builder.mul(i, _I64(32)))
            pair = builder.load(_at(context, builder, _CODES, codes_, place, _BYTES), align=1)
            low = builder.and_(pair, _vector(_BYTES, 15))
            high = builder.lshr(builder.bitcast(pair, _WORDS), _vector(_WORDS, 4))
            high = builder.and_(builder.bitcast(high, _BYTES), _vector(_BYTES, 15))
            found = []
            for number, half in enumerate((low, high)):
                place = builder.add(builder.mul(i, _I64(64)), _I64(32 * number))
                table = builder.load(_at(context, builder, _CODES, tables_, place, _BYTES), align=1)
                found.append(_looked_up(context, builder, table, half))
            both = builder.bitcast(builder.add(*found), _WORDS)
            # Words hold two keys: the whole is summed, and the upper key alone; the lower one is what is left.
            upper = builder.lshr(both, _vector(_WORDS, 8))
            return [builder.add(totals[0], both), builder.add(totals[1], upper)]

        whole, upper = _loop(builder, n_bytes_, [zero, zero], body)
        lower = builder.sub(whole, builder.shl(upper, _vector(_WORDS, 8)))
        in_order = [t // 2 + 16 * (t % 2) for t in range(32)]
        result = builder.shuffle_vector(lower, upper, ir.Constant(ir.VectorType(_I32, 32), in_order))
        builder.store(result, _at(context, builder, _NUMBERS, sums_, sums_at_, _SUMS), align=2)
        place = _at(context, builder, _NUMBERS, maxima_, maxima_at_, _SUMS)
        before = builder.load(place, align=2)
        builder.store(builder.select(builder.icmp_signed(">", result, before), result, before), place, align=2)
        return context.get_dummy_value()

    i = types.intp
    return types.void(_CODES, i, _CODES, i, _NUMBERS, i, _NUMBERS, i), generate


@intrinsic  # type: ignore[misc]
def above_sums(typing_context, sums, at, bar):  # type: ignore[no-untyped-def]
    """Which of the 32 sums (int16) from `at` on exceed `bar`: bit t of the result is sum at + t."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = builder.load(_at(context, builder, _NUMBERS, arguments[0], arguments[1], _SUMS), align=2)
        nothing = ir.Constant(_SUMS, ir.Undefined)
        bar = builder.insert_element(nothing, arguments[2], _I32(0))
        bar = builder.shuffle_vector(bar, nothing, _vector(ir.VectorType(_I32, 32), 0))
        bits = builder.bitcast(builder.icmp_signed(">", numbers, bar), _I32)
        return builder.zext(bits, _I64)

    return types.int64(_NUMBERS, types.intp, types.int16), generate
