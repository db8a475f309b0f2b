"""Encoded keys: how far each dtype may be from the vectors, and that a score is that of the code."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rabatch.errors import ConfigError, KeysError
from rabatch.index import machine
from rabatch.index.codes import DTYPES, KeyCodes, encode
from rabatch.index.machine import dot

EPSILON = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative rounding error


def random_keys(n_heads=2, n_keys=37, dim=7, seed=0):
    """Channels of widths over four orders of magnitude, with middles of their own."""
    rng = np.random.default_rng(seed)
    width = 10 ** rng.uniform(-2, 2, (n_heads, 1, dim))
    keys = width * (rng.standard_normal((n_heads, n_keys, dim)) + 3 * rng.standard_normal((n_heads, 1, dim)))
    return keys.astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 7), (3, 130, 65), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_keys_are_near(dtype, shape):
    keys = random_keys(*shape)
    codes = encode(keys, dtype)
    decoded = codes.decode()
    assert codes.shape == decoded.shape == shape
    assert decoded.dtype == np.float32
    if dtype == "int8":
        rounding = 4 * np.finfo(np.float32).eps * np.abs(keys).max(axis=1, initial=0.0)
        bound = (codes.scale / 2 + rounding)[:, None]
    else:
        bound = EPSILON[dtype] * np.abs(keys) + 2.0**-25  # the second: half the smallest float16
    assert (np.abs(decoded - keys) <= bound).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_encoding_twice_changes_nothing(dtype):
    codes = encode(random_keys(), dtype)
    again = encode(codes.decode(), dtype)
    np.testing.assert_array_equal(again.codes, codes.codes)


@settings(max_examples=60, deadline=None)
@given(keys=arrays(np.float32, (1, 5, 3), elements=st.floats(-(2.0**59), 2.0**59, width=32)))
def test_bfloat16_is_that_of_torch(keys):
    expected = torch.from_numpy(keys).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(encode(keys, "bfloat16").codes, expected)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        pytest.param(0x3F808000, 0x3F80, id="tie-down-to-even"),
        pytest.param(0x3F818000, 0x3F82, id="tie-up-to-even"),
        pytest.param(0x3F807FFF, 0x3F80, id="below-tie"),
        pytest.param(0x3F808001, 0x3F81, id="above-tie"),
        pytest.param(0xBF818000, 0xBF82, id="negative-tie"),
        pytest.param(0x3FFF8000, 0x4000, id="carry-into-exponent"),
        pytest.param(0x80000000, 0x8000, id="minus-zero"),
        pytest.param(0x00008000, 0x0000, id="subnormal-tie"),
    ],
)
def test_bfloat16_ties_go_to_even(bits, expected):
    keys = np.array([[[bits]]], np.uint32).view(np.float32)
    assert encode(keys, "bfloat16").codes.item() == expected
    assert torch.from_numpy(keys).to(torch.bfloat16).view(torch.int16).item() & 0xFFFF == expected


@settings(max_examples=60, deadline=None)
@given(keys=arrays(np.float32, (1, 5, 3), elements=st.floats(-65504, 65504, width=32)))
def test_float16_is_that_of_numpy(keys):
    np.testing.assert_array_equal(encode(keys, "float16").codes.view(np.float16), keys.astype(np.float16))
    np.testing.assert_array_equal(encode(keys, "float16").decode(), keys.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [0.0, -3.7, 1e-20])
def test_a_constant_channel_is_kept_exactly_by_int8(value):
    keys = random_keys()
    keys[:, :, 2] = value
    decoded = encode(keys, "int8").decode()
    np.testing.assert_allclose(decoded[:, :, 2], np.float32(value), rtol=1e-6)


@pytest.mark.parametrize("split", [0, 1, 20, 37])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_appended_equals_encoded_together(dtype, split):
    keys = random_keys()
    whole, grown = encode(keys, dtype), encode(keys[:, :split], dtype).append(keys[:, split:])
    np.testing.assert_array_equal(grown.codes, whole.codes)
    assert grown.shape == keys.shape


def test_appended_to_int8_little_beyond_its_scale_is_clipped():
    keys = random_keys(n_keys=200)
    codes = encode(keys, "int8")
    low, high = keys.min(axis=1), keys.max(axis=1)
    beyond = np.stack([high + 0.04 * (high - low), low - 0.04 * (high - low), (low + high) / 2], axis=1)
    grown = codes.append(beyond)
    assert grown.codes[:, 200:].tolist() == [[[127] * 7, [-127] * 7, [0] * 7]] * 2
    np.testing.assert_array_equal(grown.codes[:, :200], codes.codes)
    np.testing.assert_array_equal(grown.scale, codes.scale)


@pytest.mark.parametrize("start", [0, 1, 2, 20])
def test_int8_that_is_outgrown_gets_a_new_scale(start):
    keys = random_keys(n_keys=200)
    grown, whole = encode(keys[:, :start], "int8").append(keys[:, start:]), encode(keys, "int8")
    assert grown.scale.shape == whole.scale.shape
    error = np.abs(grown.decode() - keys).max(axis=1)
    assert (error <= 1.6 * whole.scale + 0.1 * np.abs(keys).max(axis=1)).all()
    assert np.median(np.abs(grown.decode() - keys) / whole.scale[:, None]) <= 0.5


def test_bytes_per_key():
    keys = random_keys(2, 2000, 128)
    per_key = {dtype: encode(keys, dtype).bytes_per_key for dtype in DTYPES}
    assert per_key["float32"] == 512
    assert per_key["float16"] == per_key["bfloat16"] == 256
    assert 128 < per_key["int8"] <= 0.55 * per_key["bfloat16"]
    assert encode(keys[:, :0], "bfloat16").bytes_per_key == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite_are_named(dtype, value):
    keys = random_keys()
    keys[1, 5, 3] = value
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        encode(keys, dtype)
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        encode(random_keys(seed=1), dtype).append(keys)


def test_both_infinities_in_one_head_are_found():
    keys = random_keys()
    keys[0, 3, 1], keys[0, 4, 1] = np.inf, -np.inf
    with pytest.raises(KeysError, match="KV head 0, key 3"):
        encode(keys)


def test_keys_beyond_float16_are_named():
    keys = random_keys()
    keys[1, 6, 2] = -70000
    with pytest.raises(KeysError, match=r"KV head 1, key 6.*use bfloat16 or int8"):
        encode(keys, "float16")
    assert np.isfinite(encode(keys, "bfloat16").decode()).all()


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        pytest.param(np.zeros((2, 3), np.float32), "keys", id="two-dimensions"),
        pytest.param(np.zeros((2, 3, 4)), "keys", id="float64"),
        pytest.param(np.zeros((2, 3, 0), np.float32), "keys", id="no-channels"),
    ],
)
def test_wrong_keys_are_refused(keys, field):
    with pytest.raises(KeysError) as error:
        encode(keys)
    assert error.value.field == field


@pytest.mark.parametrize("shape", [(1, 2, 7), (2, 2, 6)], ids=["heads", "head_dim"])
def test_appending_other_shapes_is_refused(shape):
    with pytest.raises(KeysError, match="2 KV heads of head_dim 7"):
        encode(random_keys()).append(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(("float8", np.zeros((1, 2, 3), np.int8)), ConfigError, id="unknown-dtype"),
        pytest.param(("float32", np.zeros((1, 2, 3), np.float16)), KeysError, id="other-array"),
        pytest.param(("bfloat16", np.zeros((2, 3), np.uint16)), KeysError, id="two-dimensions"),
        pytest.param(("int8", np.zeros((1, 2, 3), np.int8)), KeysError, id="no-scale"),
        pytest.param(
            ("float32", np.zeros((1, 2, 3), np.float32), np.ones((1, 3), np.float32), np.ones((1, 3), np.float32)),
            KeysError,
            id="scale-of-float32",
        ),
    ],
)
def test_wrong_codes_are_refused(arguments, error):
    with pytest.raises(error):
        KeyCodes(*arguments)


def test_encoding_to_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="float8"):
        encode(random_keys(), "float8")


@numba.njit  # not cached: numba would not notice a change of `dot`
def _dots(codes, query, half, out):
    for head in range(codes.shape[0]):
        for key in range(codes.shape[1]):
            out[head, key] = dot(codes, head, key, query, half)


@pytest.mark.parametrize("dim", [1, 3, 7, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot(dtype, dim):
    rng = np.random.default_rng(dim)
    values = rng.integers(-9, 10, (2, 5, dim)).astype(np.float32)
    query = rng.integers(-9, 10, dim).astype(np.float32)
    codes = values.astype(np.int8) if dtype == "int8" else encode(values, dtype).codes
    out = np.empty((2, 5), np.float32)
    _dots(codes, query, dtype == "float16", out)
    np.testing.assert_array_equal(out, values @ query)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dot_reads_every_bit_pattern(dtype):
    """All finite 16-bit floats, subnormals and minus zero included."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32) if dtype == "float16" else (bits.astype(np.uint32) << 16).view("f4")
    )
    finite = np.isfinite(values)
    out = np.empty((1, int(finite.sum())), np.float32)
    _dots(np.ascontiguousarray(bits[finite][None, :, None]), np.ones(1, np.float32), dtype == "float16", out)
    np.testing.assert_array_equal(out[0], values[finite])


@pytest.mark.parametrize("dim", [1, 3, 7, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_of_the_kernels_read_codes_as_decode_does(dtype, dim):
    codes = encode(random_keys(2, 5, dim), dtype)
    plain = KeyCodes(dtype, codes.codes, *[None if s is None else np.ones_like(s) for s in (codes.scale, codes.center)])
    numbers = plain.decode() - (0 if plain.center is None else 1)
    query = np.random.default_rng(2).standard_normal(dim).astype(np.float32)
    out = np.ones(dim, np.float32)
    machine.add_scaled(out, codes.codes, 1, 3, 0.5, dtype == "float16")
    np.testing.assert_allclose(out, 1 + 0.5 * numbers[1, 3], rtol=1e-6)
    assert machine.dot(codes.codes, 1, 3, query, dtype == "float16") == pytest.approx(
        float(numbers[1, 3] @ query), rel=1e-4, abs=1e-4
    )
