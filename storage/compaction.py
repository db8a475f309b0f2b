"""Writing the catalog: summaries of all manifests in a few Parquet files, in memory that does not grow with the store.

Files get new names and count once a generation lists them. Two compactions at once do no harm: the second to finish
finds the number taken, and removes what it wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from rabatch.errors import StoreError
from rabatch.storage.catalog import (
    CATALOG,
    VERSION,
    Counts,
    Generation,
    Segment,
    entries,
    generation_path,
    generations,
    newest,
)
from rabatch.storage.manifest import utc_now
from rabatch.storage.store import IndexStore, OnError
from rabatch.storage.summaries import SCHEMA

SEGMENT_ROWS = 131_072
_SEGMENT_BYTES = 64 << 20  # of Arrow; users' metadata may be long
_PLAIN = ["path", "tag", "content_sha256", "attempts.list.item"]  # digests: a dictionary would only be in the way


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What a compaction did.

    Attributes:
        generation: The one that counts now; 0 if there is none, as the store is empty.
        written: Whether this compaction wrote it. False: nothing was new, or another compaction was faster.
        entries: Indexes in it.
        read: Manifests that were read, because the catalog lacked them as they are.
        dropped: Rows of the generation before that are not as its manifests are any more.
        damaged: Manifests that could not be read, as ``path: reason``; the catalog leaves them out.
    """

    generation: int
    written: bool
    entries: int
    read: int
    dropped: int
    damaged: list[str] = field(default_factory=list)


def compact(store: IndexStore) -> Compaction:
    """Bring the catalog up to date with the manifests.

    Raises:
        StoreError: The store cannot be read or written. What was written so far does not count.
    """
    numbers = generations(store)
    before = newest(store)
    damaged: list[str] = []
    counts = Counts()
    on_error: OnError = lambda path, error: damaged.append(f"{path}: {error}")  # noqa: E731
    source = before or Generation(0, ())
    tables = entries(store, generation=source, counts=counts, on_error=on_error)
    segments: list[Segment] = []
    try:
        for segment in write_segments(store, tables):
            segments.append(segment)
        done = Compaction(
            generation=before.number if before else 0,
            written=False,
            entries=counts.kept + counts.read,
            read=counts.read,
            dropped=source.rows - counts.kept,
            damaged=damaged,
        )
        if done.read == done.dropped == 0 and (before is not None or not numbers):
            return done
        number = max(numbers, default=0) + 1
        if not publish(store, Generation(number, tuple(segments))):
            return dataclasses.replace(done, generation=number)
        segments = []
        return dataclasses.replace(done, generation=number, written=True)
    finally:
        for segment in segments:
            store.folder.delete(segment.path)


def publish(store: IndexStore, generation: Generation) -> bool:
    """Create a generation; False if there is one of its number."""
    values = {
        "version": VERSION,
        "created_at": utc_now(),
        "writer": uuid.uuid4().hex,  # of two with the same content one wins
        "segments": [dataclasses.asdict(segment) for segment in generation.segments],
    }
    return store.folder.create(generation_path(generation.number), json.dumps(values, indent=1).encode())


def write_segments(store: IndexStore, tables: Iterator[pa.Table]) -> Iterator[Segment]:
    """Write rows that come in order of their paths; each file once it is full."""
    writer = uuid.uuid4().hex
    held: list[pa.Table] = []
    number = 0
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= SEGMENT_ROWS or sum(t.nbytes for t in held) >= _SEGMENT_BYTES:
            yield _write_segment(store, f"{CATALOG}/{writer}-{number:05d}.parquet", pa.concat_tables(held))
            held, number = [], number + 1
    if held:
        yield _write_segment(store, f"{CATALOG}/{writer}-{number:05d}.parquet", pa.concat_tables(held))


def _write_segment(store: IndexStore, path: str, table: pa.Table) -> Segment:
    buffer = io.BytesIO()
    dictionary = [name for name in SCHEMA.names if name not in _PLAIN and name not in ("document_id", "attempts")]
    try:
        pq.write_table(table, buffer, row_group_size=16_384, compression="zstd", use_dictionary=dictionary)
    except pa.ArrowException as error:
        raise StoreError("catalog", path, f"cannot be written: {error}") from error
    data = buffer.getbuffer()
    store.folder.write(path, data)
    return Segment(path, table.num_rows, data.nbytes, hashlib.sha256(data).hexdigest())
