"""Where documents and questions come from, and the units a job reads them by.

A source is a folder or file at any fsspec URL (``.txt``, ``.md``, ``.jsonl``, ``.ndjson``, ``.parquet``), a
`ray.data.Dataset`, an Arrow table, or a list of dicts. It is cut into units: a text file, a JSONL file, a row
group of a Parquet file, a block of a table. What is inside a unit never raises: see `rabatch.jobs.rows`.

The id of a text file is its path relative to the folder, extension included (``reports/2024.txt``), so that two files
never share one; JSONL and Parquet carry a column.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from rabatch.errors import SourceError
from rabatch.jobs.cluster import worker_url

TEXT = (".txt", ".md")
JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
_FOOTER_THREADS = 16
_TABLE_ROWS = 256

Source: TypeAlias = str | os.PathLike[str] | ray.data.Dataset | pa.Table | list[dict[str, Any]]


@dataclass(frozen=True)
class Unit:
    """What one task reads.

    Args:
        number: Position in input order.
        kind: ``unreadable`` is a file whose content cannot be listed; `reason` says why.
        name: What reports call it: the path relative to the source's folder, or ``table``.
        path: Of the file, inside its filesystem; empty for a block.
        row_group: Of a Parquet file.
        first_row: Number of rows of the same file or table in earlier units.
    """

    number: int
    kind: Literal["text", "jsonl", "parquet", "block", "unreadable"]
    name: str
    path: str = ""
    row_group: int = 0
    first_row: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Units:
    """A source, cut up. `blocks[number]` holds the Arrow table of a block unit in Ray's object store."""

    units: tuple[Unit, ...]
    url: str
    storage_options: dict[str, Any]
    blocks: dict[int, ray.ObjectRef]
    ignored_files: int = 0


def list_units(
    source: Source,
    *,
    field: str,
    storage_options: dict[str, Any] | None = None,
    suffixes: tuple[str, ...] = TEXT + JSONL + PARQUET,
) -> Units:
    """Cut `source` into units, in input order: files by path, then rows as they stand.

    Args:
        field: What messages call it: ``documents`` or ``questions``.
        suffixes: Of the files that are read; others are counted, hidden ones (``.`` or ``_`` first) passed over.
        storage_options: Of fsspec, for URLs.

    Raises:
        SourceError: it does not exist, cannot be listed, holds no file of a known kind, or is of another type.
    """
    if isinstance(source, str | os.PathLike):
        return _list_files(worker_url(source, field), field, dict(storage_options or {}), suffixes)
    if isinstance(source, ray.data.Dataset):
        blocks = source.to_arrow_refs()
        rows = ray.get([_n_rows.remote(block) for block in blocks])
        return _list_blocks(blocks, rows, "dataset")
    if isinstance(source, pa.Table):
        tables = [source.slice(start, _TABLE_ROWS) for start in range(0, source.num_rows, _TABLE_ROWS)]
        return _list_blocks([ray.put(table) for table in tables], [t.num_rows for t in tables], "table")
    if isinstance(source, list):
        chunks = [source[start : start + _TABLE_ROWS] for start in range(0, len(source), _TABLE_ROWS)]
        return _list_blocks([ray.put(chunk) for chunk in chunks], [len(c) for c in chunks], "table")
    fix = "give a path or URL, a ray.data.Dataset, a pyarrow.Table, or a list of dicts"
    raise SourceError(field, type(source).__name__, fix)


@ray.remote(num_cpus=0)
def _n_rows(block: pa.Table) -> int:
    return block.num_rows


def _list_blocks(blocks: list[ray.ObjectRef], rows: list[int], name: str) -> Units:
    units, first_row = [], 0
    for number, n_rows in enumerate(rows):
        units.append(Unit(number, "block", name, first_row=first_row))
        first_row += n_rows
    return Units(tuple(units), "", {}, dict(enumerate(blocks)))


def _list_files(url: str, field: str, storage_options: dict[str, Any], suffixes: tuple[str, ...]) -> Units:
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **storage_options)
        is_file = filesystem.isfile(root)
        paths = [root] if is_file else sorted(filesystem.find(root))
    except Exception as error:
        raise SourceError(field, url, f"cannot be read: {error}") from error
    base = root.rsplit("/", 1)[0] if is_file else root.rstrip("/")
    known, ignored = [], 0
    for path in paths:
        name = path[len(base) :].lstrip("/")
        if any(part.startswith((".", "_")) for part in name.split("/")) and not is_file:
            continue
        if path.lower().endswith(suffixes):
            known.append((path, name))
        else:
            ignored += 1
    if not known:
        exists = bool(paths) or filesystem.exists(root)
        fix = f"holds no file of {', '.join(suffixes)}" if exists else "does not exist; check the path or URL"
        raise SourceError(field, url, fix)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        listed = list(pool.map(lambda item: list(_units_of(filesystem, *item)), known))
    flat = [unit for units in listed for unit in units]
    numbered = tuple(Unit(number, *unit) for number, unit in enumerate(flat))
    return Units(numbered, url, storage_options, {}, ignored)


_UnitFields = tuple[Literal["text", "jsonl", "parquet", "block", "unreadable"], str, str, int, int, str]


def _units_of(filesystem: Any, path: str, name: str) -> Iterator[_UnitFields]:
    lower = path.lower()
    if lower.endswith(TEXT):
        yield "text", name, path, 0, 0, ""
    elif lower.endswith(JSONL):
        yield "jsonl", name, path, 0, 0, ""
    else:
        try:
            with filesystem.open(path, "rb") as file:
                footer = pq.ParquetFile(file).metadata
                rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        except (OSError, pa.ArrowException) as error:
            yield "unreadable", name, path, 0, 0, f"is not a readable Parquet file ({error}); write it again"
            return
        for index, _ in enumerate(rows):
            yield "parquet", name, path, index, sum(rows[:index]), ""
