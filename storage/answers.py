"""The answers store: parts of answer rows, and one manifest per run whose creation makes them count.

Runs are numbered without gaps; a run's manifest is created only if there is none of its number. So two runs commit one
after the other, and the later one, which has read the earlier one's rows, leaves out what those say already. What a run
has finished before it commits lies below ``pending/``, for the next run to take over if this one is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import secrets
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rabatch.errors import FormatVersionError, IntegrityError, StoreError
from rabatch.records import ANSWERS, STORED_ANSWERS
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import fingerprint_of
from rabatch.storage.marker import check_marker, create_marker
from rabatch.storage.rules import MAX_MANIFEST_BYTES

FORMAT = "rabatch-answers"
FORMAT_VERSION = 1
MARKER = "rabatch-answers.json"
DIGEST = "run_sha256"
PENDING = "pending"
_ANSWER_KEY_VERSION = 1
_INDEX_MARKER = "rabatch-store.json"
_READERS = 16
_PATH = re.compile(r"parts/[0-9a-f]{32}/\d{5}-[0-9a-f]{8}\.parquet")
_RUN = re.compile(r"runs/(\d{8})\.json")
_FIX = "restore it from a copy, or use another answers store"


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """One Parquet file of answer rows. `bytes` and `sha256` are of the whole file."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run added.

    Args:
        number: From 1, without gaps; later runs count before earlier ones.
        created_at: ISO 8601, UTC.
        attempt: Folder of the parts, unique to the run.
        definition_sha256: Of what was asked for: a pipeline's digest.
        settings: Model, recipe and generation settings; informative.
        counts: Rows that are ``ok`` and ``failed``, and how many answers of earlier runs stood; informative.
        seconds: Wall time until the commit.
    """

    number: int
    created_at: str
    attempt: str
    definition_sha256: str
    parts: tuple[AnswerPart, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    format_version: int = FORMAT_VERSION

    @property
    def path(self) -> str:
        return run_path(self.number)

    def to_json(self) -> str:
        """JSON text, one object, with the SHA-256 of its other fields."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, DIGEST: fingerprint_of(values)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, *, name: str) -> Run:
        """Read and check a run's manifest; `name` (its path) begins every message.

        Raises:
            FormatVersionError: Written in another format.
            IntegrityError: It is damaged.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if type(version) is int and version != FORMAT_VERSION:
                fix = f"this rabatch reads format {FORMAT_VERSION}; use the version that wrote it"
                raise FormatVersionError(f"{name}: format_version", version, fix)
            digest = values.pop(DIGEST)
            same = digest == fingerprint_of(values)
            parts = tuple(AnswerPart(**part) for part in values.pop("parts"))
            run = cls(**values, parts=parts)
            datetime.fromisoformat(run.created_at)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise IntegrityError(name, text[:40], f"is not the manifest of a run; {_FIX}") from error
        if not same:
            raise IntegrityError(f"{name}: {DIGEST}", digest, f"is not that of its other fields; {_FIX}")
        for part in parts:
            if not _PATH.fullmatch(part.path) or type(part.rows) is not int or type(part.bytes) is not int:
                raise IntegrityError(f"{name}: parts", part, f"is not a part; {_FIX}")
        if run.path != name:
            raise IntegrityError(f"{name}: number", run.number, f"belongs at {run.path}; {_FIX}")
        return run


class AnswerStore:
    """The answers at a URL.

    Args:
        url: Local path or fsspec URL.
        create: Make the store if there is none.
        storage_options: Passed to fsspec.

    Raises:
        StoreError: No answers there, an index store is, or the place cannot be read or written.
        FormatVersionError: Answers of another format.
    """

    def __init__(self, url: str | Path, *, create: bool = False, storage_options: dict[str, Any] | None = None) -> None:
        self.url = str(url)
        self.folder = Folder(self.url, **(storage_options or {}))
        if create:
            if self.folder.exists(_INDEX_MARKER):
                raise StoreError("answers", self.url, "holds an index store; give the answers a folder of their own")
            create_marker(self.folder, MARKER, FORMAT, FORMAT_VERSION)
        missing = "holds no answers; run a pipeline into it first (rabatch run, rabatch answer), or correct the path"
        check_marker(self.folder, MARKER, FORMAT, FORMAT_VERSION, field="answers", missing=missing)

    def __repr__(self) -> str:
        return f"AnswerStore({self.url!r})"

    def runs(self, *, after: int = 0) -> list[Run]:
        """The committed runs, in order of their numbers.

        Args:
            after: Only those with a higher number.

        Raises:
            IntegrityError: One is damaged or missing.
        """
        numbers = sorted(int(match[1]) for file in self.folder.files("runs") if (match := _RUN.fullmatch(file.path)))
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                raise IntegrityError(f"{self.url}/{run_path(expected)}", None, f"is missing; {_FIX}")
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._load, numbers[after:]))

    def read(self, part: AnswerPart, *, columns: list[str] | None = None) -> pa.Table:
        """The rows of a part, checked against its run's manifest.

        Raises:
            IntegrityError: It is missing or changed.
        """
        try:
            data = self.folder.read(part.path)
        except MissingFileError as error:
            raise IntegrityError(f"{self.url}/{part.path}", None, f"is missing; {_FIX}") from error
        if (digest := hashlib.sha256(data).hexdigest()) != part.sha256:
            raise IntegrityError(f"{self.url}/{part.path}: sha256", digest, f"must be {part.sha256}; {_FIX}")
        table = decode(data, name=f"{self.url}/{part.path}", columns=columns)
        if table.num_rows != part.rows:
            raise IntegrityError(f"{self.url}/{part.path}: rows", table.num_rows, f"must be {part.rows}; {_FIX}")
        return table

    def new_attempt(self) -> str:
        """A name under which one run writes its parts."""
        return uuid.uuid4().hex

    def put(self, table: pa.Table, *, attempt: str, number: int) -> AnswerPart:
        """Write a part; visible only once a run's manifest lists it."""
        data = encode(table)
        path = f"parts/{attempt}/{number:05d}-{secrets.token_hex(4)}.parquet"
        self.folder.write(path, data)
        return AnswerPart(path=path, rows=table.num_rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def commit(self, run: Run) -> bool:
        """Make a run visible. False if another run has taken its number: read that one, and commit under the next.

        Raises:
            IntegrityError: A part is not there with its size.
        """
        there = self.folder.list(f"parts/{run.attempt}")
        for part in run.parts:
            if there.get(part.path) != part.bytes:
                fix = f"must be there with {part.bytes} bytes before its manifest; run again"
                raise IntegrityError(f"{self.url}/{part.path}", there.get(part.path), fix)
        return self.folder.create(run.path, run.to_json().encode())

    def discard(self, parts: tuple[AnswerPart, ...]) -> None:
        """Remove parts that no manifest lists."""
        for part in parts:
            self.folder.delete(part.path)

    def put_pending(self, name: str, table: pa.Table) -> None:
        """Keep finished rows of a run that has not committed yet; `name` is new or says the same rows."""
        self.folder.write(f"{PENDING}/{name}.parquet", encode(table))

    def pending(self) -> list[str]:
        """Names of what runs that have not committed have left, or are about to commit."""
        start, end = len(PENDING) + 1, -len(".parquet")
        return [file.path[start:end] for file in self.folder.files(PENDING) if file.path.endswith(".parquet")]

    def read_pending(self, name: str) -> pa.Table:
        """What was put under a name.

        Raises:
            MissingFileError: Nothing is there (any more): a run has committed it.
            IntegrityError: It is damaged.
        """
        path = f"{PENDING}/{name}.parquet"
        return decode(self.folder.read(path), name=f"{self.url}/{path}")

    def drop_pending(self, name: str) -> None:
        """Remove what was put under a name, once it is committed."""
        self.folder.delete(f"{PENDING}/{name}.parquet")

    def _load(self, number: int) -> Run:
        path = run_path(number)
        return Run.from_json(self.folder.read(path, max_bytes=MAX_MANIFEST_BYTES), name=path)


def run_path(number: int) -> str:
    """Where a run's manifest lies."""
    return f"runs/{number:08d}.json"


def encode(table: pa.Table) -> bytes:
    """Rows of `records.STORED_ANSWERS` as a Parquet file; its pages carry checksums."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def decode(data: bytes, *, name: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet file that `encode` made. IntegrityError if it is none."""
    try:
        with pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(STORED_ANSWERS):
                raise IntegrityError(f"{name}: columns", file.schema_arrow.names, f"are not those of answers; {_FIX}")
            return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(name, None, f"is not readable Parquet ({str(error).splitlines()[0]}); {_FIX}") from error


class AnswerKeys:
    """Names of answers: what was asked, of which text, how.

    Args:
        settings: All that the answers depend on beside question and index, as JSON values.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = fingerprint_of(settings)

    def answer(
        self,
        question_id: str,
        question: str,
        *,
        document_id: str,
        content_sha256: str,
        fingerprint: str,
        answer_prefix: str | None = None,
        max_new_tokens: int | None = None,
    ) -> str:
        """Of a question to one index: the same again must not be asked again."""
        about = [document_id, content_sha256, fingerprint]
        own = {"answer_prefix": answer_prefix, "max_new_tokens": max_new_tokens}
        given = {name: value for name, value in own.items() if value is not None}
        more = [given] if given else []  # without any the key is what it was before there were any
        return _digest([_ANSWER_KEY_VERSION, self._settings, question_id, question, about, *more])

    def failure(self, question_id: str, document_id: str | None, reason: str) -> str:
        """Of a question that was not answered: the same failure again need not be stored again."""
        return _digest([_ANSWER_KEY_VERSION, self._settings, question_id, document_id, "failed", reason])


def pair_key(question_id: str, document_id: str | None) -> bytes:
    """A (question, document) pair in 16 bytes."""
    return hashlib.sha256(_plain([question_id, document_id])).digest()[:16]


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(_plain(values)).hexdigest()[:32]


def _plain(values: list[Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def latest(store: AnswerStore, runs: list[Run]) -> dict[bytes, tuple[int, int, int]]:
    """Run, part and row of the latest row of each (question, document) pair. Takes some 200 bytes per pair."""
    rows: dict[bytes, tuple[int, int, int]] = {}
    for run in runs:
        for number, part in enumerate(run.parts):
            table = store.read(part, columns=["question_id", "document_id"])
            for row, pair in enumerate(_pairs(table)):
                rows[pair] = (run.number, number, row)
    return rows


def exported(
    store: AnswerStore, *, every: bool = False, question_id: str | None = None, document_id: str | None = None
) -> Iterator[pa.Table]:
    """The answers as a reader wants them: of every (question, document) pair the latest row, in order of the runs.

    Args:
        every: Also the rows that later ones have taken the place of, and a column `superseded` that says so.
        question_id, document_id: Only of this question, of this document.

    Yields:
        Tables of `records.ANSWERS` and the columns `run` and `answered_at`.
    """
    runs = store.runs()
    newest = latest(store, runs)
    for run in runs:
        for number, part in enumerate(run.parts):
            table = store.read(part)
            current = [newest[pair] == (run.number, number, row) for row, pair in enumerate(_pairs(table))]
            n = table.num_rows
            table = table.select(ANSWERS.names).append_column("run", pa.array([run.number] * n, pa.int64()))
            table = table.append_column("answered_at", pa.array([run.created_at] * n, pa.string()))
            keep = pa.array(current, pa.bool_())
            if every:
                table = table.append_column("superseded", pc.invert(keep))
                keep = pa.array([True] * n, pa.bool_())
            for column, wanted in (("question_id", question_id), ("document_id", document_id)):
                if wanted is not None:
                    keep = pc.and_(keep, pc.fill_null(pc.equal(table[column], wanted), False))
            yield table.filter(keep)


def _pairs(table: pa.Table) -> Iterator[bytes]:
    ids = zip(table["question_id"].to_pylist(), table["document_id"].to_pylist(), strict=True)
    return (pair_key(question_id, document_id) for question_id, document_id in ids)
