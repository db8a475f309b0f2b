"""The catalog: what a store holds, without a request for each of its manifests.

Manifests stay the only truth. The catalog is a cache of their summaries, written by `rabatch.storage.compaction`,
which may be deleted at any time. A reader lists the paths of the manifests, a request per thousand, and takes from
the catalog only the rows whose path is listed with the same tag. So what was withdrawn is not shown, and what was
committed or changed since is read.

A generation of the catalog is a small JSON object that lists Parquet files; it is created only if there is none of its
number, and the highest number counts.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage.failures import MissingFileError
from rabatch.storage.listing import Listed, in_order
from rabatch.storage.store import IndexStore, OnError
from rabatch.storage.summaries import SCHEMA, summarise, table_of

CATALOG = "catalog"
VERSION = 2
_FIX = "run `rabatch compact` to make the catalog anew"
_CHUNK = 16_384  # manifests joined at a time
_GENERATION = re.compile(CATALOG + r"/(\d{8})\.json")
SEGMENT_PATH = re.compile(CATALOG + r"/[0-9a-f]{32}-\d{5}\.parquet")
_TYPES: dict[str, type] = {"path": str, "rows": int, "bytes": int, "sha256": str}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """One Parquet file of the catalog; its rows follow those of the one before in order of `path`."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Generation:
    """The catalog as one compaction left it."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def path(self) -> str:
        return generation_path(self.number)

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)


@dataclass
class Counts:
    """Where the rows of a list came from.

    Attributes:
        kept: From the catalog.
        read: From manifests: those that the catalog lacks, or that were written anew since.
    """

    kept: int = 0
    read: int = 0


def generation_path(number: int) -> str:
    """Where a generation lies."""
    return f"{CATALOG}/{number:08d}.json"


def generations(store: IndexStore) -> list[int]:
    """The numbers there are, ascending."""
    listed = store.folder.files(CATALOG)
    return sorted(int(match[1]) for file in listed if (match := _GENERATION.fullmatch(file.path)))


def read_generation(store: IndexStore, number: int) -> Generation:
    """A generation by its number.

    Raises:
        IntegrityError: It is damaged, or of another version.
        MissingFileError: There is none.
    """
    path = generation_path(number)
    text = store.folder.read(path)
    try:
        values = json.loads(text)
        version, listed = values["version"], values["segments"]
        if version != VERSION:
            raise IntegrityError(f"{path}: version", version, f"this rabatch reads {VERSION}; {_FIX}")
        segments = tuple(Segment(**segment) for segment in listed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(path, text[:40], f"is not a generation of a catalog; {_FIX}") from error
    for segment in segments:
        typed = all(type(getattr(segment, name)) is kind for name, kind in _TYPES.items())
        if not typed or not SEGMENT_PATH.fullmatch(segment.path):
            raise IntegrityError(path, segment, f"is not a segment of a catalog; {_FIX}")
    return Generation(number, segments)


def newest(store: IndexStore) -> Generation | None:
    """The generation that counts. None without a catalog, or with a damaged one, of which a warning is logged."""
    for _ in range(3):  # the newest may be cleared away meanwhile, once it is not the newest any more
        numbers = generations(store)
        if not numbers:
            return None
        try:
            return read_generation(store, numbers[-1])
        except MissingFileError:
            continue
        except IntegrityError as error:
            _log.warning("%s; manifests are read instead", error)
            return None
    return None


def entries(
    store: IndexStore,
    *,
    columns: list[str] | None = None,
    on_error: OnError | None = None,
    generation: Generation | None = None,
    counts: Counts | None = None,
) -> Iterator[pa.Table]:
    """Every committed index, in order of the manifests' paths, as tables of `summaries.SCHEMA`.

    Memory does not grow with the store.

    Args:
        columns: Only these, beside `path` and `tag`.
        on_error: As of `IndexStore.manifests`.
        generation: Of the catalog. By default the newest.
        counts: To be filled.
    """
    generation = generation or newest(store)
    schema = SCHEMA if columns is None else pa.schema([f for f in SCHEMA if f.name in {*columns, "path", "tag"}])
    catalog = _Cursor(_batches(store, generation, schema.names) if generation else iter(()))
    counts = counts or Counts()
    listing = store.folder.walk("manifests")
    while chunk := list(itertools.islice(listing, _CHUNK)):
        kept, lacking = _join(chunk, catalog)
        paths = [file.path for file in lacking]
        tags = {file.path: file.tag for file in lacking}
        # A tag was listed before its manifest was read. If the manifest is replaced in between, the row is newer than
        # its tag, and the next listing has another tag.
        rows = [summarise(m, tags[m.path]) for m in store.read_manifests(paths, on_error=on_error)]
        counts.kept += sum(table.num_rows for table in kept)
        counts.read += len(rows)
        table = pa.concat_tables([*kept, table_of(rows).select(schema.names)])
        if table.num_rows:
            yield table.sort_by("path") if rows else table


def _join(chunk: list[Listed], catalog: _Cursor) -> tuple[list[pa.Table], list[Listed]]:
    """What the catalog holds of the listed manifests, and those it does not hold as they are now."""
    listed_paths, listed_tags = [file.path for file in chunk], [file.tag for file in chunk]
    kept: list[pa.Table] = []
    lacking: list[Listed] = []
    at = 0
    for table in catalog.up_to(chunk[-1].path):
        stop = at + table.num_rows
        if _holds(table["path"], listed_paths[at:stop]) and _holds(table["tag"], listed_tags[at:stop]):
            kept.append(table)  # nothing changed here, as nearly everywhere
            at = stop
            continue
        paths, tags = table["path"].to_pylist(), table["tag"].to_pylist()
        stop = bisect.bisect_right(listed_paths, paths[-1], at)
        wanted = {file.path: file for file in chunk[at:stop]}
        same = [bool(tag) and path in wanted and wanted[path].tag == tag for path, tag in zip(paths, tags, strict=True)]
        kept.append(table.filter(pa.array(same)))
        for path, is_same in zip(paths, same, strict=True):
            if is_same:
                del wanted[path]
        lacking += wanted.values()
        at = stop
    return kept, [*lacking, *chunk[at:]]


def _holds(column: pa.ChunkedArray, texts: list[str]) -> bool:
    return "" not in texts and column.equals(pa.chunked_array([pa.array(texts, column.type)]))


class _Cursor:
    """The catalog's rows, taken from the front."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def up_to(self, path: str) -> Iterator[pa.Table]:
        """The next rows whose path is not past `path`."""
        while True:
            table = self._rest if self._rest is not None else next(self._tables, None)
            self._rest = None
            if table is None:
                return
            n = pc.sum(pc.less_equal(table["path"], path)).as_py() or 0
            if n:
                yield table.slice(0, n)
            if n < table.num_rows:
                self._rest = table.slice(n)
                return


def _batches(store: IndexStore, generation: Generation, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of a generation. A damaged segment is left out, with a warning: its manifests are then read."""

    def load(segment: Segment) -> pq.ParquetFile | None:
        try:
            return _open_segment(store, segment)
        except StoreError as error:
            _log.warning("%s; manifests are read instead of it", error)
            return None

    calls = (functools.partial(load, segment) for segment in generation.segments)
    for file in in_order(calls, ahead=2):
        if file is not None:
            for batch in file.iter_batches(_CHUNK, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def _open_segment(store: IndexStore, segment: Segment) -> pq.ParquetFile:
    try:
        data = store.folder.read(segment.path)
    except MissingFileError as error:
        raise IntegrityError(segment.path, None, f"is missing; {_FIX}") from error
    if (digest := hashlib.sha256(data).hexdigest()) != segment.sha256:
        raise IntegrityError(f"{segment.path}: sha256", digest, f"must be {segment.sha256}; {_FIX}")
    try:
        file = pq.ParquetFile(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(segment.path, None, f"is not Parquet ({error}); {_FIX}") from error
    if not file.schema_arrow.equals(SCHEMA):
        raise IntegrityError(
            f"{segment.path}: columns", file.schema_arrow.names, f"are not those of version {VERSION}; {_FIX}"
        )
    return file


def document_entries(store: IndexStore, document_id: str, *, on_error: OnError | None = None) -> pa.Table:
    """The indexes of one document, from their manifests alone: they are found by prefix, without the catalog."""
    rows: list[dict[str, Any]] = [summarise(m, "") for m in store.find(document_id, on_error=on_error)]
    return table_of(rows)
