"""Keys as searches read them: float32, float16, bfloat16, or int8 with a scale per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import ConfigError, KeysError
from rabatch.index.base import check_keys

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16", "int8")
_CLIPPED = 1.1  # how far beyond the scale, in its own reach, an appended key is clipped
_ARRAYS = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.uint16, "int8": np.int8}


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """The keys of one layer, encoded.

    A raw score is `query . key = (query * scale) . code + query . center`: int8 costs a search nothing but the bits.

    Args:
        dtype: What the codes are.
        codes: [n_kv_heads, n_keys, head_dim]: float32, int8, or the bits of float16 and bfloat16 as uint16.
        scale, center: [n_kv_heads, head_dim], float32, of int8; None otherwise.
    """

    dtype: Dtype
    codes: NDArray
    scale: NDArray[np.float32] | None = None
    center: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        if self.codes.ndim != 3 or self.codes.dtype != _ARRAYS[self.dtype]:
            found = (self.codes.shape, str(self.codes.dtype))
            raise KeysError("codes", found, f"must be {_ARRAYS[self.dtype].__name__} [n_kv_heads, n_keys, head_dim]")
        if (self.dtype == "int8") != (self.scale is not None and self.center is not None):
            raise KeysError("scale", self.scale, "int8 codes have a scale and a center, others have none")
        object.__setattr__(self, "codes", np.ascontiguousarray(self.codes))

    @property
    def shape(self) -> tuple[int, int, int]:
        """n_kv_heads, n_keys, head_dim."""
        n_heads, n_keys, dim = self.codes.shape
        return n_heads, n_keys, dim

    @property
    def bytes_per_key(self) -> float:
        """Bytes per key and KV head, scales included."""
        extra = 0 if self.scale is None else 2 * self.scale.nbytes
        return (self.codes.nbytes + extra) / max(self.shape[0] * self.shape[1], 1)

    def prepare(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Queries to multiply codes with, and what to add to their products: [n_kv, n, d] -> the same, [n_kv, n]."""
        if self.scale is None or self.center is None:
            return queries, np.zeros(queries.shape[:2], np.float32)
        return queries * self.scale[:, None], np.einsum("hqd,hd->hq", queries, self.center)

    def decode(self) -> NDArray[np.float32]:
        """The keys, [n_kv_heads, n_keys, head_dim], float32: a copy unless they are float32."""
        if self.dtype == "float32":
            return self.codes
        if self.dtype == "float16":
            return self.codes.view(np.float16).astype(np.float32)
        if self.dtype == "bfloat16":
            return (self.codes.astype(np.uint32) << 16).view(np.float32)
        assert self.scale is not None
        assert self.center is not None
        return self.codes * self.scale[:, None] + self.center[:, None]

    def select(self, heads: list[int]) -> KeyCodes:
        """The keys of some KV heads, copied."""
        scale = None if self.scale is None else self.scale[heads]
        center = None if self.center is None else self.center[heads]
        return KeyCodes(self.dtype, self.codes[heads], scale, center)

    def rows(self, head: int, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """The keys of some ids of a KV head, [n, head_dim], float32."""
        one = slice(head, head + 1)
        scale = None if self.scale is None else self.scale[one]
        center = None if self.center is None else self.center[one]
        return KeyCodes(self.dtype, self.codes[one, ids], scale, center).decode()[0]

    def append(self, keys: NDArray[np.float32]) -> KeyCodes:
        """With more keys [n_kv_heads, n_new, head_dim], float32.

        int8 keeps its scale and clips what lies little beyond it. Where a channel reaches further, all is encoded
        anew, at the cost of a second rounding.
        """
        check_keys(keys, n_heads=self.shape[0], head_dim=self.shape[2])
        if self.scale is None or self.center is None:
            more = encode(keys, self.dtype).codes
        else:
            reach = np.abs(keys - self.center[:, None]).max(axis=1, initial=0.0)
            if (reach > (127 * _CLIPPED) * self.scale).any():
                return encode(np.concatenate([self.decode(), keys], axis=1), "int8")
            more = _quantise(keys, self.scale, self.center)
        return KeyCodes(self.dtype, np.concatenate([self.codes, more], axis=1), self.scale, self.center)


def encode(keys: NDArray[np.float32], dtype: Dtype = "float32") -> KeyCodes:
    """Encode keys [n_kv_heads, n_keys, head_dim], float32.

    int8 has a scale per KV head and channel, from the channel's largest distance to its middle: channels of rotated
    keys differ in width by an order of magnitude, and a scale per channel is free in a search.

    Raises:
        KeysError: Keys that are not finite, or too large for float16.
    """
    check_keys(keys)
    if dtype == "float32" or dtype not in DTYPES:  # KeyCodes refuses what it does not know
        return KeyCodes(dtype, keys)
    if dtype == "float16":
        if keys.size and float(np.abs(keys).max()) > float(np.finfo(np.float16).max):
            head, row, _ = np.unravel_index(np.abs(keys).argmax(), keys.shape)
            fix = "is beyond float16; use bfloat16 or int8"
            raise KeysError(f"keys: KV head {head}, key {row}", float(np.abs(keys).max()), fix)
        return KeyCodes(dtype, keys.astype(np.float16).view(np.uint16))
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(keys).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
        return KeyCodes(dtype, (rounded >> np.uint32(16)).astype(np.uint16))
    if keys.shape[1] == 0:
        flat = np.zeros((keys.shape[0], keys.shape[2]), np.float32)
        return KeyCodes("int8", keys.astype(np.int8), flat + 1, flat)
    low, high = keys.min(axis=1), keys.max(axis=1)
    center = (low + high) / 2
    scale = np.maximum((high - low) / 254, np.finfo(np.float32).tiny).astype(np.float32)
    return KeyCodes("int8", _quantise(keys, scale, center), scale, center)


def _quantise(keys: NDArray[np.float32], scale: NDArray[np.float32], center: NDArray[np.float32]) -> NDArray[np.int8]:
    return np.clip(np.rint((keys - center[:, None]) / scale[:, None]), -127, 127).astype(np.int8)
