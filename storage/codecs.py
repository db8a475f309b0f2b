"""Codecs of the keys and values of an index: int8 with a step per channel, and KIVI's groups of 32 in 4 or 2 bits.

A number is `center + scale * y`, with a center and a scale per KV head and channel, which a query or a sum of values
takes in once; y is
- int8: the code, -127 to 127;
- int4 and kivi2, keys: `step * code + low / 127`, step and low of 32 consecutive keys in one channel;
- int4 and kivi2, values: `step * (code - zero * top / 15)`, step and zero of 32 consecutive channels of one token, top
  the largest code (arXiv 2402.02750: keys vary by channel, values by token).

A step is a byte (`STEPS`), low a byte and zero half of one: 32 values cost 12 bits beside their codes. Codes are made
against step, low and zero as they are decoded, so that what rounding does to these is no error of the numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import KeysError

Of = Literal["key", "value"]
GROUP = 32
BITS = {"int8": 8, "int4": 4, "kivi2": 2}
STEPS = np.concatenate([[0.0], np.exp2((np.arange(1, 256) - 255) / 16)]).astype(np.float32)
"""What a byte stands for as a step, relative to the scale of its channel."""
_MAX = 1e18  # beyond, differences and scores overflow float32
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class Coded:
    """Keys or values of the index of consecutive KV heads, encoded.

    Args:
        codec: `int8`, `int4` or `kivi2`.
        of: Which of the two it is of.
        codes: [n_heads, index_rows, code_width], uint8.
        groups: [n_heads, index_rows / 32 rounded up, group_width], uint8: steps and lows of keys in groups; else the
            width is 0.
        scale, center: [n_heads, head_dim], float32.
    """

    codec: str
    of: Of
    codes: NDArray[np.uint8]
    groups: NDArray[np.uint8]
    scale: NDArray[np.float32]
    center: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int, int]:
        """n_heads, index_rows, head_dim."""
        return int(self.codes.shape[0]), int(self.codes.shape[1]), int(self.scale.shape[1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, groups included."""
        return int(self.codes.shape[2]) + -(-int(self.groups.shape[2]) // GROUP)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Codes, groups, scale, center."""
        return self.codes, self.groups, self.scale, self.center

    def select(self, heads: slice | NDArray[np.int64]) -> Coded:
        """Of some heads, counted from the first here; sharing memory if they are a slice."""
        return Coded(self.codec, self.of, *(array[heads] for array in self.arrays()))

    def equals(self, other: Coded) -> bool:
        """Whether every number is the same."""
        same = zip(self.arrays(), other.arrays(), strict=True)
        return (self.codec, self.of) == (other.codec, other.of) and all(np.array_equal(a, b) for a, b in same)

    def metadata(self) -> dict[str, object]:
        """The small arrays as JSON values: base64 of little-endian float32."""
        small = {"scale": self.scale, "center": self.center}
        return {f"{self.of}_{name}": base64.b64encode(a.astype("<f4").tobytes()).decode() for name, a in small.items()}


def code_width(codec: str, of: Of, head_dim: int) -> int:
    """Bytes of a row's codes; of values in groups with their steps and zeros."""
    width = -(-head_dim * BITS[codec] // 8)
    groups = -(-head_dim // GROUP)
    return width + (groups + -(-groups // 2) if of == "value" and codec != "int8" else 0)


def group_width(codec: str, of: Of, head_dim: int) -> int:
    """Bytes of the steps and lows of 32 keys; 0 where there are none."""
    return 2 * head_dim if of == "key" and codec != "int8" else 0


def encode(states: NDArray[np.float32], codec: str, of: Of) -> Coded:
    """Encode keys or values [n_heads, rows, head_dim], float32.

    Raises:
        KeysError: A number is not finite, or beyond 1e18.
    """
    n_heads, rows, dim = states.shape
    widest = float(np.abs(states).max(initial=0.0))
    if not widest < _MAX:  # NaN is not less
        raise KeysError(f"{of}s", widest, f"must be below {_MAX:.0e} for the codec {codec}")
    codes = np.empty((n_heads, rows, code_width(codec, of, dim)), np.uint8)
    groups = np.empty((n_heads, -(-rows // GROUP), group_width(codec, of, dim)), np.uint8)
    scale, center = np.ones((n_heads, dim), np.float32), np.zeros((n_heads, dim), np.float32)
    for head, x in enumerate(states):
        if not rows:
            continue
        if codec == "int8":
            codes[head], scale[head], center[head] = _int8(x)
        elif of == "key":
            codes[head], groups[head], scale[head], center[head] = _grouped_keys(x, BITS[codec])
        else:
            codes[head], scale[head], center[head] = _grouped_values(x, BITS[codec])
    return Coded(codec, of, codes, groups, scale, center)


def decode(coded: Coded) -> NDArray[np.float32]:
    """The numbers, [n_heads, rows, head_dim], float32."""
    _, rows, dim = coded.shape
    bits = BITS[coded.codec]
    if coded.codec == "int8":
        y = coded.codes.view(np.int8).astype(np.float32)
    elif coded.of == "key":
        step = STEPS[coded.groups[..., :dim]]
        low = coded.groups[..., dim:].view(np.int8).astype(np.float32) / np.float32(127)
        of_row = np.arange(rows) // GROUP
        y = step[:, of_row] * unpacked(coded.codes, dim, bits) + low[:, of_row]
    else:
        step, zero = value_groups(coded.codes, dim, bits)
        top = np.float32(2**bits - 1)
        channels = np.arange(dim) // GROUP
        y = step[..., channels] * (unpacked(coded.codes, dim, bits) - zero[..., channels] * (top / 15))
    numbers: NDArray[np.float32] = y * coded.scale[:, None] + coded.center[:, None]
    return numbers


def unpacked(codes: NDArray[np.uint8], dim: int, bits: int) -> NDArray[np.float32]:
    """Codes of `bits` bits, [..., width or more] -> [..., dim]: channel c is in byte c % width, from bit (c // width) *
    bits on, so that neighbours come out of neighbouring bytes by the same shift."""
    width = -(-dim * bits // 8)
    planes = [(codes[..., :width] >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.concatenate(planes, axis=-1)[..., :dim].astype(np.float32)


def value_groups(codes: NDArray[np.uint8], dim: int, bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps and zeros of values in groups, [..., code_width] -> [..., groups]; they follow the codes."""
    width, groups = -(-dim * bits // 8), -(-dim // GROUP)
    halves = codes[..., width + groups :]
    zero = np.stack([halves & 15, halves >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * halves.shape[-1])[..., :groups]
    return STEPS[codes[..., width : width + groups]], zero.astype(np.float32)


def joined(parts: Sequence[Coded]) -> Coded:
    """Of heads that follow each other, all of one codec."""
    arrays = zip(*(part.arrays() for part in parts), strict=True)
    return Coded(parts[0].codec, parts[0].of, *(np.concatenate(each) for each in arrays))


def from_metadata(
    meta: Mapping[str, Any],
    of: Of,
    codes: NDArray[np.uint8],
    groups: NDArray[np.uint8],
    heads: slice,
    *,
    n_heads: int,
    head_dim: int,
) -> Coded:
    """What `Coded.metadata` wrote, of `heads` of the part's `n_heads`; codes and groups are of `heads` alone.

    Raises:
        ValueError, TypeError, KeyError: The metadata do not hold such arrays.
    """
    small = [
        np.frombuffer(base64.b64decode(meta[f"{of}_{name}"], validate=True), "<f4").reshape(n_heads, head_dim)[heads]
        for name in ("scale", "center")
    ]
    return Coded(meta[f"{of}_codec"], of, codes, groups, *small)


def check_coded(
    coded: Coded, *, n_heads: int, index_rows: int, head_dim: int, rule: Callable[[bool, str, object, str], None]
) -> None:
    """Apply `rule(holds, what, value, fix)` to shapes, dtypes and numbers."""
    of, codec = coded.of, coded.codec
    rule(codec in BITS, f"{of}_codec", codec, f"must be one of {', '.join(BITS)}")
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "codes": ((n_heads, index_rows, code_width(codec, of, head_dim)), np.uint8),
        "groups": ((n_heads, -(-index_rows // GROUP), group_width(codec, of, head_dim)), np.uint8),
        "scale": ((n_heads, head_dim), np.float32),
        "center": ((n_heads, head_dim), np.float32),
    }
    for name, (shape, dtype) in wanted.items():
        array = getattr(coded, name)
        found = (array.shape, str(array.dtype))
        rule(array.shape == shape and array.dtype == dtype, f"{of}_{name}", found, f"must be {dtype.__name__} {shape}")
    for name in ("scale", "center"):
        array = getattr(coded, name)
        sound = bool((np.abs(array) < 2 * _MAX).all()) and (name == "center" or bool((array > 0).all()))
        rule(sound, f"{of}_{name}", "out of range", "must be finite, and a scale above 0")


def _int8(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    low, high = x.min(axis=0), x.max(axis=0)
    center = (low + high) / 2
    scale = np.maximum((high - low) / 254, _TINY).astype(np.float32)
    return np.clip(np.rint((x - center) / scale), -127, 127).astype(np.int8).view(np.uint8), scale, center


def _grouped_keys(
    x: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    rows, top = len(x), 2**bits - 1
    center = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.maximum(np.abs(x - center).max(axis=0), _TINY)
    y = np.pad((x - center) / scale, ((0, -rows % GROUP), (0, 0)), mode="edge").reshape(-1, GROUP, x.shape[1])
    low_code = np.clip(np.floor(y.min(axis=1) * 127), -127, 127).astype(np.int8)
    low = low_code / np.float32(127)
    step_code = _step_code((y.max(axis=1) - low) / top)
    codes = _rounded(y - low[:, None], STEPS[step_code][:, None], np.float32(0), top)
    groups = np.concatenate([step_code, low_code.view(np.uint8)], axis=1)
    return _packed(codes.reshape(-1, x.shape[1])[:rows], bits), groups, scale, center


def _grouped_values(
    x: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    (rows, dim), top = x.shape, 2**bits - 1
    center = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Channels are made alike first: a wide one would cost the 31 beside it their precision.
    scale = np.maximum(np.abs(x - center).mean(axis=0, dtype=np.float64), _TINY).astype(np.float32)

    def grouped(scale: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.pad((x - center) / scale, ((0, 0), (0, -dim % GROUP))).reshape(rows, -1, GROUP)

    y = grouped(scale)
    widest = np.float32((y.max(axis=2).clip(0) - y.min(axis=2).clip(None, 0)).max() / top) or np.float32(1)
    scale = np.maximum(scale * widest, np.float32(_TINY))  # so that the largest step is 1
    y = grouped(scale)
    low, high = y.min(axis=2).clip(None, 0), y.max(axis=2).clip(0)
    step_code = _step_code((high - low) / top)
    step = STEPS[step_code]
    zero = np.clip(np.rint(np.divide(-low * (15 / top), step, out=np.zeros_like(step), where=step > 0)), 0, 15)
    codes = _rounded(y, step[..., None], (zero * np.float32(top / 15))[..., None], top).reshape(rows, -1)[:, :dim]
    halves = np.pad(zero.astype(np.uint8), ((0, 0), (0, zero.shape[1] % 2)))
    held = _packed(codes, bits), step_code, halves[:, ::2] | halves[:, 1::2] << 4
    return np.concatenate(held, axis=1), scale, center


def _step_code(wanted: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The least step that is not below what is wanted, which is at most 1."""
    exponent = np.log2(wanted, out=np.full_like(wanted, -np.inf), where=wanted > 0)
    return np.where(wanted > 0, np.clip(np.ceil(255 + 16 * exponent), 1, 255), 0).astype(np.uint8)


def _rounded(y: NDArray[np.float32], step: NDArray[np.float32], zero: Any, top: int) -> NDArray[np.uint8]:
    steps = np.divide(y, step, out=np.zeros_like(y), where=np.broadcast_to(step > 0, y.shape))
    return np.clip(np.rint(steps + zero), 0, top).astype(np.uint8)


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The reverse of `unpacked`."""
    width = -(-codes.shape[1] * bits // 8)
    planes = np.pad(codes, ((0, 0), (0, width * (8 // bits) - codes.shape[1]))).reshape(len(codes), -1, width)
    packed = np.zeros((len(codes), width), np.uint8)
    for number, plane in enumerate(planes.transpose(1, 0, 2)):
        packed |= plane << (bits * number)
    return packed
