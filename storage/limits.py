"""What a Parquet file may make its reader do: sizes are compared before memory is taken, so that no small file becomes
a large one when it is read."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from rabatch.errors import IntegrityError
from rabatch.storage.failures import REBUILD

TOKEN_RATIO = 64
"""Bytes of the tokens in memory, per byte of their part. Of one token over and over and no text it is 9.5."""


def check_layer_bytes(metadata: pq.FileMetaData, value_bytes: Callable[[int], int], nbytes: int, name: str) -> None:
    """Refuse a layer part whose values take more memory than it has bytes. One that is compressed and lies about its
    sizes can take 2 GiB more, of one page; where columns are null in some rows, one row group at a time takes the
    memory of those too.

    Args:
        metadata: Only what Arrow reads without a check of its own is asked of it: `column` of a damaged footer ends
            the process.
        value_bytes: Of so many rows of a row group. Positions do not count: they take 4 bytes a row, and next to none
            of a file.
        nbytes: Size of the part.

    Raises:
        IntegrityError: It is compressed, its row groups differ in size, or its rows do not fit into it.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    _rule(len(set(rows)) == 1 and rows[0] >= 0, f"{name}: row groups", rows, "must have the same number of rows")
    unpacked = [group.total_byte_size for group in groups]
    fits = min(unpacked) >= 0 and sum(unpacked) <= nbytes
    _rule(fits, f"{name}: compression", unpacked, f"are the sizes of row groups in {nbytes} bytes, and must be none")
    wanted = len(rows) * value_bytes(rows[0])
    _rule(wanted <= nbytes, f"{name}: rows", rows[0], f"take {wanted} bytes and do not fit into {nbytes} bytes")


def check_tokens_bytes(metadata: pq.FileMetaData, schema: pa.Schema, nbytes: int, rows: int | None, name: str) -> None:
    """Refuse a tokens part that has another number of rows, or is compressed beyond what tokens can be.

    Raises:
        IntegrityError: It does, or is.
    """
    found = metadata.num_rows
    groups = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    _rule(groups == found, f"{name}: row groups", groups, f"must hold {found} rows together")
    _rule(rows in (None, found), f"{name}: rows", found, f"must be {rows}")
    wanted = found * sum(field.type.bit_width // 8 for field in schema)
    _rule(wanted <= TOKEN_RATIO * nbytes, f"{name}: rows", found, f"take {wanted} bytes, too many for {nbytes} bytes")


def _rule(holds: bool, where: str, value: object, what: str) -> None:
    if not holds:
        raise IntegrityError(where, value, f"{what}; {REBUILD}")
