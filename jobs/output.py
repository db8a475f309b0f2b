"""Result files, written whole or not at all."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rabatch.errors import ConfigError
from rabatch.exporting import jsonl_bytes
from rabatch.jobs.cluster import worker_url
from rabatch.storage.filesystem import Folder


def parquet_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """`rows` as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def write_rows(
    url: str, rows: list[dict[str, Any]], schema: pa.Schema, *, storage_options: dict[str, Any] | None = None
) -> None:
    """Write `rows` to one file, its format told by its suffix.

    Raises:
        ConfigError: the suffix is neither ``.parquet`` nor ``.jsonl``.
        StoreError: it cannot be written.
    """
    write_bytes(url, check_report(url)(rows, schema), field="report", storage_options=storage_options)


def write_bytes(url: str, data: bytes, *, field: str, storage_options: dict[str, Any] | None = None) -> None:
    """Write one file; `field` is the setting that named it.

    Raises:
        StoreError: it cannot be written.
    """
    folder, _, name = worker_url(url, field).rpartition("/")
    Folder(folder, **(storage_options or {})).write(name, data)


def check_report(url: str) -> Any:
    """What makes the bytes of a report at `url`."""
    for suffix, encode in ((".parquet", parquet_bytes), (".jsonl", jsonl_bytes)):
        if url.endswith(suffix):
            return encode
    raise ConfigError("report", url, "must end in .parquet or .jsonl")
