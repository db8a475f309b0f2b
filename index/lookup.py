"""Sums of table lookups for 32 keys at a time, from registers: the inner loop of a scan of 4-bit codes.

A code of 4 bits picks one of 16 bytes, and one instruction (AVX2 `pshufb`, NEON `tbl`) does so for 16 or 32 keys
(Andre et al. 2015). faiss has it as FastScan: for 32K keys of 32 codes that takes 42 us a query on one core (x86_64,
AVX2), and 75 if the best 200 are asked for; this takes 23, and 16 for four queries at once, and what is done with the
sums is left to the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.index.topk.lanes import loop

KEYS_PER_BLOCK = 32
MAX_LEVEL = 127
"""Greatest number in a table: two of them are added in a byte."""
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _WORDS = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16)
_SUMS = ir.VectorType(_I16, 32)
_CODES, _NUMBERS = types.Array(types.uint8, 1, "C"), types.Array(types.int16, 1, "C")


def blocked(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes as `sum_lookups` reads them.

    Args:
        codes: [n_keys, n_bytes], uint8: two codes a byte, lower half first.

    Returns:
        Flat: by block of 32 keys, by byte of a key, the keys of the block; zeros past the last key.
    """
    n_keys, n_bytes = codes.shape
    padded = np.zeros((-(-n_keys // KEYS_PER_BLOCK) * KEYS_PER_BLOCK, n_bytes), np.uint8)
    padded[:n_keys] = codes
    return np.ascontiguousarray(padded.reshape(-1, KEYS_PER_BLOCK, n_bytes).transpose(0, 2, 1)).reshape(-1)


def unblocked(blocks: NDArray[np.uint8], n_keys: int, n_bytes: int) -> NDArray[np.uint8]:
    """What `blocked` was given."""
    by_key = blocks.reshape(-1, n_bytes, KEYS_PER_BLOCK).transpose(0, 2, 1)
    return np.ascontiguousarray(by_key.reshape(-1, n_bytes)[:n_keys])


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


def _add_lookups(queries: int) -> Any:
    """The lookups of a block for so many queries: the codes are loaded, and taken apart, once for all of them."""

    @intrinsic  # type: ignore[misc]
    def add(typing_context, codes, codes_at, tables, n_bytes, sums, sums_at, sums_step, maxima, maxima_at, maxima_step):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes_, codes_at_, tables_, n_bytes_, sums_, sums_at_, sums_step_, *rest = arguments
            maxima_, maxima_at_, maxima_step_ = rest
            table_step = builder.mul(n_bytes_, _I64(64))

            def body(i: Any, totals: list[Any]) -> list[Any]:
                place = builder.add(codes_at_, builder.mul(i, _I64(32)))
                pair = builder.load(_at(context, builder, _CODES, codes_, place, _BYTES), align=1)
                low = builder.and_(pair, _vector(_BYTES, 15))
                high = builder.lshr(builder.bitcast(pair, _WORDS), _vector(_WORDS, 4))
                high = builder.and_(builder.bitcast(high, _BYTES), _vector(_BYTES, 15))
                new = []
                for query in range(queries):
                    first = builder.add(builder.mul(i, _I64(64)), builder.mul(table_step, _I64(query)))
                    found = []
                    for number, half in enumerate((low, high)):
                        place = builder.add(first, _I64(32 * number))
                        table = builder.load(_at(context, builder, _CODES, tables_, place, _BYTES), align=1)
                        found.append(_looked_up(context, builder, table, half))
                    both = builder.bitcast(builder.add(*found), _WORDS)
                    # Words hold two keys: the whole is summed, and the upper key alone; the lower one is what is left.
                    upper = builder.lshr(both, _vector(_WORDS, 8))
                    new += [builder.add(totals[2 * query], both), builder.add(totals[2 * query + 1], upper)]
                return new

            totals = loop(builder, n_bytes_, [_vector(_WORDS, 0)] * (2 * queries), body)
            in_order = ir.Constant(ir.VectorType(_I32, 32), [t // 2 + 16 * (t % 2) for t in range(32)])
            for query in range(queries):
                whole, upper = totals[2 * query : 2 * query + 2]
                lower = builder.sub(whole, builder.shl(upper, _vector(_WORDS, 8)))
                result = builder.shuffle_vector(lower, upper, in_order)
                place = builder.add(sums_at_, builder.mul(sums_step_, _I64(query)))
                builder.store(result, _at(context, builder, _NUMBERS, sums_, place, _SUMS), align=2)
                place = builder.add(maxima_at_, builder.mul(maxima_step_, _I64(query)))
                pointer = _at(context, builder, _NUMBERS, maxima_, place, _SUMS)
                before = builder.load(pointer, align=2)
                greater = builder.icmp_signed(">", result, before)
                builder.store(builder.select(greater, result, before), pointer, align=2)
            return context.get_dummy_value()

        i = types.intp
        return types.void(_CODES, i, _CODES, i, _NUMBERS, i, i, _NUMBERS, i, i), generate

    return add


_add_1, _add_2, _add_3, _add_4 = (_add_lookups(queries) for queries in (1, 2, 3, 4))
MAX_QUERIES = 4
"""Whose sums, two registers each, are made at once."""


@compiled
def sum_lookups(codes, tables, n_bytes, n_keys, per_group, sums, maxima):  # type: ignore[no-untyped-def]
    """Per query, sums[key] = over all codes of a key, tables[its number, code]; and the greatest of each group of keys.

    Args:
        codes: uint8, `blocked`, of one KV head.
        tables: uint8 [queries, ...]: of each code 16 numbers up to MAX_LEVEL, written twice; of 2 * `n_bytes` codes.
        n_bytes: Of a key. A sum must stay below 2^15.
        per_group: The keys that stand in the same place of so many blocks are a group. Keys of a block that is not
            full are in none.
        sums: int16 [queries, blocks * 32], written; at most MAX_QUERIES of them.
        maxima: int16 [queries, groups + 32], raised; the last 32 mean nothing.
    """
    of_tables, of_sums, of_maxima = tables.reshape(-1), sums.reshape(-1), maxima.reshape(-1)
    n, step, maxima_step = len(tables), sums.shape[1], maxima.shape[1]
    for block in range(step // KEYS_PER_BLOCK):
        at = block * KEYS_PER_BLOCK
        place = block // per_group * KEYS_PER_BLOCK if at + KEYS_PER_BLOCK <= n_keys else maxima_step - KEYS_PER_BLOCK
        arguments = (of_tables, n_bytes, of_sums, at, step, of_maxima, place, maxima_step)
        if n == 1:
            _add_1(codes, at * n_bytes, *arguments)
        elif n == 2:
            _add_2(codes, at * n_bytes, *arguments)
        elif n == 3:
            _add_3(codes, at * n_bytes, *arguments)
        else:
            _add_4(codes, at * n_bytes, *arguments)


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
