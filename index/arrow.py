"""Key indexes as Arrow tables: one row per key of a head, head after head, and small arrays in the schema's metadata.

A column of `fixed_size_binary` holds one row of an array [n_kv_heads, n_keys, width]; its dtype stands in the field's
metadata. What belongs to a head or to the whole index (entry points, codebooks, scales) is an array in the schema's
metadata, in NumPy's own format (read without pickle). So nothing that is read executes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from rabatch.errors import IntegrityError

_SETTINGS = b"rabatch.index"
_ARRAY = b"rabatch.array."


def to_table(
    settings: Mapping[str, Any], columns: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> pa.Table:
    """Pack an index.

    Args:
        settings: JSON values; `kind`, `n_heads` and `n_keys` among them.
        columns: Arrays [n_kv_heads, n_keys, ...], of any dtype of fixed size.
        arrays: Small arrays of any shape.
    """
    fields, data = [], []
    for name, array in columns.items():
        rows = np.ascontiguousarray(array).reshape(array.shape[0] * array.shape[1], int(np.prod(array.shape[2:])))
        width = rows.shape[1] * rows.itemsize
        kind = {b"dtype": array.dtype.str.encode(), b"shape": json.dumps(array.shape[2:]).encode()}
        fields.append(pa.field(name, pa.binary(width), nullable=False, metadata=kind))
        data.append(pa.Array.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)]))
    metadata = {_SETTINGS: json.dumps(dict(settings)).encode()}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        metadata[_ARRAY + name.encode()] = buffer.getvalue()
    return pa.Table.from_arrays(data, schema=pa.schema(fields, metadata=metadata))


def from_table(table: pa.Table, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `to_table` was given; arrays are views where the table is in one piece: not to be written to.

    Raises:
        IntegrityError: The table is of no index, of another kind, or does not hold what it says.
    """
    metadata = table.schema.metadata or {}
    try:
        settings = json.loads(metadata[_SETTINGS])
        found, n_heads, n_keys = settings["kind"], int(settings["n_heads"]), int(settings["n_keys"])
        if found != kind:
            raise IntegrityError("kind", found, f"this table holds another index; open it as {found}")
        if table.num_columns and table.num_rows != n_heads * n_keys:
            raise IntegrityError("rows", table.num_rows, f"must be {n_heads} heads x {n_keys} keys")
        columns = {field.name: _column(table, field, n_heads, n_keys) for field in table.schema}
        arrays = {
            name.removeprefix(_ARRAY).decode(): np.load(io.BytesIO(value), allow_pickle=False)
            for name, value in metadata.items()
            if name.startswith(_ARRAY)
        }
    except (KeyError, TypeError, ValueError, OverflowError, EOFError, BadZipFile) as error:
        raise IntegrityError("index table", str(table.schema)[:80], f"is no key index: {error}") from error
    return settings, columns, arrays


def _column(table: pa.Table, field: pa.Field, n_heads: int, n_keys: int) -> np.ndarray:
    column = table.column(field.name)
    chunk = (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else None
    )
    dtype, shape = np.dtype(field.metadata[b"dtype"].decode()), tuple(json.loads(field.metadata[b"shape"]))
    if column.null_count:
        raise ValueError(f"column {field.name} has empty cells")
    if dtype.hasobject or field.type.byte_width != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"column {field.name} is not {dtype}{shape}")
    if chunk is None or len(chunk) == 0:
        return np.empty((n_heads, n_keys, *shape), dtype)
    data = np.frombuffer(
        chunk.buffers()[1], dtype, offset=chunk.offset * field.type.byte_width, count=len(chunk) * int(np.prod(shape))
    )
    return data.reshape(n_heads, n_keys, *shape)
