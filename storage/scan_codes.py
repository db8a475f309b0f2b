"""What a scan needs of a layer part: a code per key, and beside them a few small arrays of each head."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLOATS = ("books", "to_query")


@dataclass(frozen=True, eq=False)
class ScanCodes:
    """The codes of consecutive KV heads of one layer (`rabatch.index.scan`).

    Args:
        codes: [n_heads, index_rows, code_width], uint8: two codes of 4 bits a byte, lower half first.
        books: [n_heads, n_codes, 16, 2], float32: what each word of each code stands for, in aligned coordinates.
        exceptions: [n_heads, n_exceptions], int32: keys that are scored exactly for every query, -1 for none.
        to_query: [n_heads, head_dim, head_dim], float32: aligns a query.
    """

    codes: NDArray[np.uint8]
    books: NDArray[np.float32]
    exceptions: NDArray[np.int32]
    to_query: NDArray[np.float32]

    def select(self, heads: slice | NDArray[np.int64]) -> ScanCodes:
        """Of some heads, counted from the first here; sharing memory if they are a slice."""
        return ScanCodes(*(array[heads] for array in vars(self).values()))

    def equals(self, other: ScanCodes) -> bool:
        """Whether every number is the same."""
        return all(np.array_equal(array, getattr(other, name)) for name, array in vars(self).items())

    @property
    def code_width(self) -> int:
        """Bytes of the codes of a key."""
        return int(self.codes.shape[2])

    def metadata(self) -> dict[str, object]:
        """The small arrays as JSON values: floats as base64 of little-endian float32."""
        packed = {name: base64.b64encode(getattr(self, name).astype("<f4").tobytes()).decode() for name in _FLOATS}
        return {"code_width": self.code_width, "exceptions": self.exceptions.tolist(), **packed}


def joined(parts: Sequence[ScanCodes]) -> ScanCodes:
    """Of heads that follow each other."""
    return ScanCodes(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def from_metadata(
    meta: Mapping[str, Any], codes: NDArray[np.uint8], heads: slice, *, n_heads: int, head_dim: int
) -> ScanCodes:
    """What `metadata` wrote.

    Args:
        codes: Of `heads` alone.
        heads: Which of the part's `n_heads`.

    Raises:
        ValueError, TypeError, KeyError: The metadata do not hold such arrays.
    """
    n_codes = -(-head_dim // 2)
    shapes = {"books": (n_heads, n_codes, 16, 2), "to_query": (n_heads, head_dim, head_dim)}
    arrays = {
        name: np.frombuffer(base64.b64decode(meta[name], validate=True), "<f4").reshape(shape)[heads]
        for name, shape in shapes.items()
    }
    exceptions = np.array(meta["exceptions"], np.int64).reshape(n_heads, -1)[heads]
    if exceptions.size and not -1 <= int(exceptions.min()) <= int(exceptions.max()) < 2**31:
        raise ValueError("exceptions are no ids")
    return ScanCodes(codes, arrays["books"], exceptions.astype(np.int32), arrays["to_query"])


def check_scan(
    scan: ScanCodes,
    *,
    n_heads: int,
    index_rows: int,
    head_dim: int,
    rule: Callable[[bool, str, object, str], None],
) -> None:
    """Apply `rule(holds, what, value, fix)` to shapes, dtypes, ids and numbers."""
    n_codes = -(-head_dim // 2)
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "codes": ((n_heads, index_rows, -(-n_codes // 2)), np.uint8),
        "books": ((n_heads, n_codes, 16, 2), np.float32),
        "to_query": ((n_heads, head_dim, head_dim), np.float32),
        "exceptions": ((n_heads, *scan.exceptions.shape[1:2]), np.int32),
    }
    for name, (shape, dtype) in wanted.items():
        array = getattr(scan, name)
        found = (array.shape, str(array.dtype))
        rule(array.shape == shape and array.dtype == dtype, name, found, f"must be {dtype.__name__} {list(shape)}")
    for name in _FLOATS:
        rule(bool(np.isfinite(getattr(scan, name)).all()), name, "not finite", "must be finite")
    for ids in scan.exceptions:
        known = ids[ids >= 0]
        sound = bool((ids >= -1).all()) and len(np.unique(known)) == len(known)
        sound = sound and int(known.max(initial=-1)) < index_rows
        rule(sound, "exceptions", ids.tolist(), f"must be different ids in [0, {index_rows}), or -1")
