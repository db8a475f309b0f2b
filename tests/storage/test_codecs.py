"""Codecs of keys and values against number by number, their error bounds, and packed ids against bits counted out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import KeysError
from rabatch.index import token_codes
from rabatch.storage.codecs import BITS, GROUP, STEPS, Coded, Of, code_width, decode, encode, group_width
from rabatch.storage.packed_ids import ascending, is_ascending, low_bits_of, pack, packed_width, unpack

CODECS = list(BITS)
STATES: list[Of] = ["key", "value"]


def naive(coded: Coded) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, and the step between two that a code can stand for, one by one."""
    heads, rows, dim = coded.shape
    bits = BITS[coded.codec]
    top, width = 2**bits - 1, -(-dim * bits // 8)
    numbers, steps = np.empty((heads, rows, dim)), np.empty((heads, rows, dim))
    for head, row, channel in np.ndindex(heads, rows, dim):
        scale, center = float(coded.scale[head, channel]), float(coded.center[head, channel])
        codes = coded.codes[head, row]
        if coded.codec == "int8":
            step, y = 1.0, float(codes.view(np.int8)[channel])
        else:
            code = (int(codes[channel % width]) >> (bits * (channel // width))) & top
            if coded.of == "key":
                group = coded.groups[head, row // GROUP]
                step = float(STEPS[group[channel]])
                y = step * code + int(group[dim:].view(np.int8)[channel]) / 127
            else:
                group, groups = channel // GROUP, -(-dim // GROUP)
                step = float(STEPS[codes[width + group]])
                zero = (int(codes[width + groups + group // 2]) >> (4 * (group % 2))) & 15
                y = step * (code - zero * top / 15)
        numbers[head, row, channel], steps[head, row, channel] = center + scale * y, scale * step
    return numbers, steps


@st.composite
def states(draw: st.DrawFn) -> np.ndarray:
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(0, 70)), draw(st.sampled_from([1, 7, 16, 17, 32, 33, 80, 128])))
    x = random.standard_normal(shape, np.float32) * np.float32(10.0) ** draw(st.integers(-6, 6))
    kinds = ["normal", "zeros", "constant channels", "far from zero", "one huge channel", "one huge row"]
    kind = draw(st.sampled_from(kinds))
    if kind == "zeros":
        x[:] = 0
    elif kind == "constant channels":
        x[:, :, ::2] = 3.25
    elif kind == "far from zero":
        x += 1000 * np.abs(x).max(initial=0)
    elif kind == "one huge channel":
        x[:, :, -1] *= 1e4
    elif kind == "one huge row":
        x[:, :1] *= 1e4
    return x


@settings(max_examples=60, deadline=None)
@given(x=states(), codec=st.sampled_from(CODECS), of=st.sampled_from(STATES))
def test_numbers_are_within_half_a_step(x: np.ndarray, codec: str, of: Of) -> None:
    coded = encode(x, codec, of)
    heads, rows, dim = x.shape
    assert coded.codes.shape == (heads, rows, code_width(codec, of, dim))
    assert coded.groups.shape == (heads, -(-rows // GROUP), group_width(codec, of, dim))
    found = decode(coded)
    numbers, steps = naive(coded)
    size = np.abs(x).max(initial=0) + np.abs(coded.center).max(initial=0)
    np.testing.assert_allclose(found, numbers, rtol=1e-5, atol=1e-6 * size)
    assert (np.abs(numbers - x) <= steps * (0.5 + 1e-4) + 2e-6 * size).all()


@pytest.mark.parametrize(("codec", "of", "most"), [
    ("int8", "key", 0.012), ("int8", "value", 0.012), ("int4", "key", 0.09), ("int4", "value", 0.09),
    ("kivi2", "key", 0.42), ("kivi2", "value", 0.42),
])  # fmt: skip
def test_steps_are_as_small_as_ranges_allow(codec: str, of: Of, most: float) -> None:
    """Of normal numbers: 32 of them span 4.1 deviations, so an error is at most 4.1 / (2^bits - 1) / sqrt(12) of one,
    and a rounded step adds 2 %; int8 spans all rows."""
    x = np.random.default_rng(0).standard_normal((2, 4096, 64), np.float32)
    error = float(np.sqrt(np.square(decode(encode(x, codec, of)) - x).mean()))
    assert error < most
    assert error > most / 2


def test_a_wide_channel_does_not_cost_the_others_their_precision() -> None:
    x = np.random.default_rng(1).standard_normal((1, 512, 64), np.float32)
    wide = x.copy()
    wide[:, :, 5] *= 1000
    others = np.arange(64) != 5
    for codec in CODECS:
        for of in STATES:
            plain, spread = (np.abs(decode(encode(t, codec, of)) - t)[..., others].mean() for t in (x, wide))
            assert spread < 1.1 * plain


def test_what_no_codec_holds_is_refused() -> None:
    for bad in (np.nan, np.inf, -2e18):
        x = np.zeros((2, 5, 8), np.float32)
        x[1, 3, 2] = bad
        with pytest.raises(KeysError, match="values"):
            encode(x, "int8", "value")


def test_bytes_per_token() -> None:
    """What docs/storage.md promises of head_dim 128."""
    x = np.zeros((1, 64, 128), np.float32)
    found = {(codec, of): encode(x, codec, of).row_bytes for codec in CODECS for of in STATES}
    assert found == {
        ("int8", "key"): 128, ("int8", "value"): 128, ("int4", "key"): 72, ("int4", "value"): 70,
        ("kivi2", "key"): 40, ("kivi2", "value"): 38,
    }  # fmt: skip


def test_kernels_and_format_agree_on_steps() -> None:
    assert np.array_equal(token_codes.STEPS, STEPS)
    assert token_codes.GROUP == GROUP


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_ids=st.sampled_from([1, 2, 12, 100, 7552, 40000, 131072]), per_row=st.integers(1, 40))
def test_packed_ids(data: st.DataObject, n_ids: int, per_row: int) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    ids = ascending(random.integers(-1, n_ids, (9, per_row), dtype=np.int32))
    ids[0], ids[1], ids[2] = -1, 0, n_ids - 1
    assert is_ascending(ids)
    packed = pack(ids, n_ids)
    assert packed.shape == (9, packed_width(n_ids, per_row))
    back = np.empty_like(ids)
    unpack(packed, n_ids, back)
    assert np.array_equal(back, ids)
    low = low_bits_of(n_ids, per_row)
    for row, of_row in zip(packed, ids, strict=True):
        bits = np.unpackbits(row, bitorder="little")
        lows = bits[: per_row * low].reshape(per_row, low) @ (1 << np.arange(low))
        highs = np.flatnonzero(bits[per_row * low :]) - np.arange(per_row)
        expected = np.where(of_row < 0, n_ids, of_row)
        assert ((highs << low) + lows).tolist() == expected.tolist()


def test_packed_ids_take_what_was_promised() -> None:
    assert [packed_width(n, 32) for n in (7552, 32128, 130432)] == [40, 48, 56]
    assert not is_ascending(np.array([[1, 0]], np.int32))
    assert not is_ascending(np.array([[-1, 0]], np.int32))


def test_damaged_packed_ids_are_refused_or_are_ids() -> None:
    ids = ascending(np.random.default_rng(0).integers(-1, 100, (5, 6), dtype=np.int32))
    packed, refused = pack(ids, 100), 0
    for at in range(packed.size * 8):
        damaged = packed.copy()
        damaged.reshape(-1)[at // 8] ^= 1 << (at % 8)
        try:
            found = np.empty((5, 6), np.int32)
            unpack(damaged, 100, found)
            assert is_ascending(found)
            assert found.min() >= -1
            assert found.max() < 100
        except ValueError as error:
            assert f"row {at // 8 // packed.shape[1]}" in str(error)  # noqa: PT017 - either outcome is right
            refused += 1
    assert refused > packed.size * 2
