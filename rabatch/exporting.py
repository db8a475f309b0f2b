"""Answer rows as files for others: Parquet, JSON lines, CSV. Written some thousand rows at a time."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rabatch.errors import ConfigError
from rabatch.records import ANSWERS
from rabatch.storage.filesystem import Folder

SUFFIXES = (".parquet", ".jsonl", ".csv")


def write_windows(folder: Folder, stem: str, windows: Iterable[list[dict[str, Any]]]) -> None:
    """Answer rows, some at a time, as ``STEM.parquet`` and ``STEM.jsonl`` in `folder`."""
    with Export(folder, f"{stem}.parquet", ANSWERS) as parquet, Export(folder, f"{stem}.jsonl", ANSWERS) as lines:
        for rows in windows:
            parquet.add(rows)
            lines.add(rows)


class Export:
    """A file of rows in the format of its suffix, made on this machine's disk and given its name when it is whole.

    Used as a context: an exception inside leaves no file.

    Raises:
        ConfigError: The suffix is of no known format.
    """

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._suffix = suffix_of(name)
        self._file = tempfile.NamedTemporaryFile(suffix=self._suffix)  # noqa: SIM115 (closed by __exit__)
        self._parquet: pq.ParquetWriter | None = None
        if self._suffix == ".parquet":
            self._parquet = pq.ParquetWriter(self._file, schema, compression="zstd")
        elif self._suffix == ".csv":
            self._write_csv([schema.names])

    def __enter__(self) -> Export:
        return self

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        names = self._schema.names
        if self._parquet is not None:
            self._parquet.write_table(pa.Table.from_pylist(rows, self._schema))
        elif self._suffix == ".csv":
            self._write_csv([[_cell(row[name]) for name in names] for row in rows])
        else:
            self._file.write(jsonl_bytes(rows, self._schema))

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._parquet is not None:
                self._parquet.close()
            self._file.flush()
            if kind is None:
                self._folder.put(self._name, self._file.name)
        finally:
            self._file.close()

    def _write_csv(self, rows: list[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode("utf-8", "surrogatepass"))


def _cell(value: Any) -> Any:
    """A value of a CSV file: lists as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def suffix_of(name: str) -> str:
    """The suffix of a file to export to."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise ConfigError("out", name, "must end in .parquet, .jsonl or .csv")


def place_of(url: str, storage_options: dict[str, Any] | None = None) -> tuple[Folder, str]:
    """The folder and the name of a file to export to. Errors as of `suffix_of`."""
    suffix_of(url)
    folder, _, name = (url if "://" in url else os.path.abspath(os.path.expanduser(url))).rpartition("/")
    return Folder(folder, **(storage_options or {})), name


def jsonl_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """`rows` as JSON lines, the columns of `schema` in its order."""
    lines = (json.dumps({name: row.get(name) for name in schema.names}, ensure_ascii=False) for row in rows)
    return "".join(line + "\n" for line in lines).encode()
