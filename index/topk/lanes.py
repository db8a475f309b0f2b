"""Vector code of the CPU attention, which numba does not offer: 16 float32 lanes at a time, products, exp, comparing.

Written for any machine: LLVM maps 16 lanes to two AVX2, one AVX-512 or four NEON registers. Arrays are flat and
float32; `at` counts elements. Tests hold each function against NumPy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rabatch.compiling import compiled

LANES = 16
TILE_ROWS = 6  # 6 x 16 sums fill 12 of the 16 registers of AVX2: measured 85 of about 100 GFLOP/s of a core
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_V, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_FLAT = types.Array(types.float32, 1, "C")
# Minimax polynomial of 2^x on [-1/2, 1/2], highest power first; relative error below 4e-7 with float32 arithmetic.
_EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)


def _splat(value: float) -> ir.Constant:
    return ir.Constant(_V, [float(np.float32(value))] * LANES)


def _broadcast(builder: Any, scalar: Any) -> Any:
    nothing = ir.Constant(_V, ir.Undefined)
    first = builder.insert_element(nothing, scalar, _I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_VI, [0] * LANES))


def _pointer(context: Any, builder: Any, array: Any, at: Any) -> Any:
    return builder.gep(context.make_array(_FLAT)(context, builder, array).data, [at])


def _lanes_at(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _V.as_pointer()), align=4)


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **options: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, **options)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _V, [x, y, z])


def loop(builder: Any, count: Any, starts: list[Any], body: Any) -> list[Any]:
    """`values = body(i, values)` for i in range(count), from `starts`; the values after it."""
    entry, function = builder.block, builder.function
    again, done = function.append_basic_block("lanes.loop"), function.append_basic_block("lanes.done")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), again, done)
    builder.position_at_end(again)
    i = builder.phi(_I64)
    i.add_incoming(_I64(0), entry)
    values = [builder.phi(start.type) for start in starts]
    after = body(i, values)
    for value, start, new in zip(values, starts, after, strict=True):
        value.add_incoming(start, entry)
        value.add_incoming(new, again)
    following = builder.add(i, _I64(1))
    i.add_incoming(following, again)
    builder.cbranch(builder.icmp_signed("<", following, count), again, done)
    builder.position_at_end(done)
    results = []
    for start, new in zip(starts, after, strict=True):
        result = builder.phi(start.type)
        result.add_incoming(start, entry)
        result.add_incoming(new, again)
        results.append(result)
    return results


@intrinsic  # type: ignore[misc]
def add_tile(typing_context, a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth, keep):  # type: ignore[no-untyped-def]
    """c[6, 16] = a[6, depth] @ b[depth, 16], added to what c held if `keep`; `_step` is from row to row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a_, a_at_, a_step_, b_, b_at_, b_step_, c_, c_at_, c_step_, depth_, keep_ = arguments
        a_0, b_0 = _pointer(context, builder, a_, a_at_), _pointer(context, builder, b_, b_at_)
        c_0 = _pointer(context, builder, c_, c_at_)
        rows = [builder.gep(a_0, [builder.mul(a_step_, _I64(r))]) for r in range(TILE_ROWS)]

        def body(i: Any, sums: list[Any]) -> list[Any]:
            lanes = _lanes_at(builder, builder.gep(b_0, [builder.mul(i, b_step_)]))
            numbers = [builder.load(builder.gep(row, [i]), align=4) for row in rows]
            return [_fma(builder, _broadcast(builder, x), lanes, s) for x, s in zip(numbers, sums, strict=True)]

        sums = loop(builder, depth_, [_splat(0)] * TILE_ROWS, body)
        for r, new in enumerate(sums):
            target = builder.bitcast(builder.gep(c_0, [builder.mul(c_step_, _I64(r))]), _V.as_pointer())
            old = builder.load(target, align=4)
            builder.store(builder.select(keep_, builder.fadd(old, new), new), target, align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.void(_FLAT, i, i, _FLAT, i, i, _FLAT, i, i, i, types.boolean), generate


@intrinsic  # type: ignore[misc]
def exp_minus(typing_context, array, at, panels, offset):  # type: ignore[no-untyped-def]
    """array[at : at + 16 * panels] = exp(itself - offset), all of it <= offset; returns the sum of the results.

    Differences below -126 ln 2 (-87.3) count as that, so a result is never 0. The relative error is below 5e-7 down to
    -9 and grows to 4e-6 at the end, where a result adds nothing to a sum that holds exp(0).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _pointer(context, builder, arguments[0], arguments[1])
        offsets = _broadcast(builder, arguments[3])

        def body(i: Any, sums: list[Any]) -> list[Any]:
            pointer = builder.gep(base, [builder.mul(i, _I64(LANES))])
            x = builder.fmul(builder.fsub(_lanes_at(builder, pointer), offsets), _splat(1 / math.log(2)))
            x = builder.select(builder.fcmp_ordered("<", x, _splat(-126)), _splat(-126), x)
            whole = builder.fptosi(builder.fsub(x, _splat(0.5)), _VI)  # x <= 0, so this rounds to the nearest
            part = builder.fsub(x, builder.sitofp(whole, _V))
            y = _splat(_EXP2[0])
            for factor in _EXP2[1:]:
                y = _fma(builder, y, part, _splat(factor))
            exponent = builder.shl(builder.add(whole, ir.Constant(_VI, [127] * LANES)), ir.Constant(_VI, [23] * LANES))
            y = builder.fmul(y, builder.bitcast(exponent, _V))
            builder.store(y, builder.bitcast(pointer, _V.as_pointer()), align=4)
            # A flag of its own, or numba gives it `reassoc`: LLVM then splits the sum by how many panels there are, and
            # a row's result depends on the rows beside it.
            return [builder.fadd(sums[0], y, flags=("nsz",))]

        (total,) = loop(builder, arguments[2], [_splat(0)], body)
        arguments = [_F32(0.0), total]
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, arguments, fastmath=("reassoc",))

    return types.float32(_FLAT, types.intp, types.intp, types.float32), generate


@intrinsic  # type: ignore[misc]
def greatest(typing_context, array, at, panels):  # type: ignore[no-untyped-def]
    """The maximum of array[at : at + 16 * panels], NaN left out; -inf where there is nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _pointer(context, builder, arguments[0], arguments[1])

        def body(i: Any, best: list[Any]) -> list[Any]:
            x = _lanes_at(builder, builder.gep(base, [builder.mul(i, _I64(LANES))]))
            return [builder.select(builder.fcmp_ordered(">", x, best[0]), x, best[0])]

        (best,) = loop(builder, arguments[2], [_splat(-math.inf)], body)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", _F32, [best])

    return types.float32(_FLAT, types.intp, types.intp), generate


@intrinsic  # type: ignore[misc]
def above(typing_context, array, at, bar):  # type: ignore[no-untyped-def]
    """Which of the 16 elements from `at` on exceed `bar`: bit t of the result is element at + t."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _lanes_at(builder, _pointer(context, builder, arguments[0], arguments[1]))
        bits = builder.bitcast(builder.fcmp_ordered(">", lanes, _broadcast(builder, arguments[2])), ir.IntType(LANES))
        return builder.zext(bits, _I64)

    return types.int64(_FLAT, types.intp, types.float32), generate


@intrinsic  # type: ignore[misc]
def lowest_bit(typing_context, bits):  # type: ignore[no-untyped-def]
    """The place of the lowest bit that is set, of an int64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@compiled
def soften(lines, row, panels, softcap, line):  # type: ignore[no-untyped-def]
    """Gemma 2: softcap * tanh(score / softcap), by tanh(x) = (1 - exp(-2x)) / (1 + exp(-2x)) for x >= 0."""
    n = panels * LANES
    for j in range(n):
        line[j] = -2 * abs(lines[row + j]) / softcap
    exp_minus(line, 0, panels, np.float32(0))  # type: ignore[call-arg]
    for j in range(n):
        x = softcap * (1 - line[j]) / (1 + line[j])
        if lines[row + j] == -np.inf:
            continue
        lines[row + j] = x if lines[row + j] > 0 else -x
