"""Columns of a layer part as memory: `fixed_size_binary` of an array, and back without parsing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NARROW = 65534
"""So many different ids fit 16 bits, where 0xFFFF means none."""


def id_width(n_ids: int) -> int:
    """Bytes of an id below `n_ids`, or of none."""
    return 2 if n_ids <= NARROW else 4


def binary(array: NDArray[Any], width: int) -> pa.Array:
    """The memory of an array, as values of `width` bytes."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return pa.Array.from_buffers(pa.binary(width), flat.size // width, [None, pa.py_buffer(flat)])


def some_rows(array: NDArray[np.uint8], held: NDArray[np.bool_]) -> pa.Array:
    """Bytes of the rows that are `held`, [n, width], as a column of all rows; the others are null, which takes no bytes
    of a file."""
    every = np.zeros((len(held), array.shape[1]), np.uint8)
    every[held] = array
    return _with_nulls(every, held)


def _with_nulls(held: NDArray[np.uint8], valid: NDArray[np.bool_]) -> pa.Array:
    bits = np.packbits(valid, bitorder="little")
    nulls = len(valid) - int(valid.sum())
    buffers = [pa.py_buffer(bits), pa.py_buffer(held.reshape(-1))]
    return pa.Array.from_buffers(pa.binary(held.shape[1]), len(held), buffers, null_count=nulls)


def binary_ids(ids: NDArray[np.int32], *, rows: int, start: int, width: int) -> pa.Array:
    """Ids of the rows from `start` on, [n, ids per row], as a column of `rows`; other rows hold none."""
    every = np.full((rows, ids.shape[1]), -1, np.int32)
    every[start : start + len(ids)] = ids
    # -1 becomes 0xFFFF when cut to 16 bits.
    return binary(every.astype("<u2") if width == 2 else every, ids.shape[1] * width)


def binary_rows(array: NDArray[np.uint8], *, rows: int, start: int) -> pa.Array:
    """Bytes of the rows from `start` on, [n, width], as a column of `rows`; other rows are zero."""
    every = np.zeros((rows, array.shape[1]), np.uint8)
    every[start : start + len(array)] = array
    return binary(every, array.shape[1])


def bytes_of(table: pa.Table, column: str, rows: int) -> NDArray[np.uint8]:
    """A column's memory as [rows, width] bytes; no copy if it is one chunk, as Arrow returns a row group."""
    chunked = table.column(column)
    array = chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)
    width = array.type.byte_width
    if rows == 0 or array.null_count:
        return np.empty((0, width), np.uint8)
    return np.frombuffer(array.buffers()[1], np.uint8, rows * width, array.offset * width).reshape(rows, width)


def some_bytes_of(table: pa.Table, column: str, held: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bytes of the rows of a column that are not null, [n, width].

    Raises:
        ValueError: They are not those that are `held`.
    """
    chunked = table.column(column)
    array = chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)
    rows, width = len(held), array.type.byte_width
    valid = np.ones(rows, np.bool_)
    if array.null_count:
        packed = np.frombuffer(array.buffers()[0], np.uint8)
        valid = np.unpackbits(packed, bitorder="little")[array.offset : array.offset + rows].astype(np.bool_)
    if not np.array_equal(valid, held):
        raise ValueError(f"column {column} must hold {int(held.sum())} rows and be null in the others")
    if not rows:
        return np.empty((0, width), np.uint8)
    every = np.frombuffer(array.buffers()[1], np.uint8, rows * width, array.offset * width).reshape(rows, width)
    first = int(held.argmax())
    few = slice(first, first + int(held.sum()))
    return every[few] if held[few].all() else every[held]  # most are in one piece: no copy


def ids_of(table: pa.Table, column: str, rows: int, width: int) -> NDArray[np.int32]:
    """A column of ids, [rows, ids per row]; -1 for none."""
    stored = bytes_of(table, column, rows).view("<u2" if width == 2 else "<i4")
    ids = stored.astype(np.int32)
    if width == 2:
        ids[stored == 0xFFFF] = -1
    return ids
