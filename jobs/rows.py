"""Reading one unit of a source: every row of it becomes a `Record`, a bad one with the reason and what mends it.

Nothing here raises for what is in a file: a byte that is not UTF-8 must cost one document, not the job.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rabatch.jobs.sources import Unit, Units

MAX_ID_BYTES = 4096
_BATCH_ROWS = 16


@dataclass(frozen=True)
class Record:
    """One row of a unit.

    Args:
        row: Of its unit, from 0.
        source: Where it stands, for people: ``file:row``, rows from 1; a text file is its name alone.
        values: Its columns. None where `error` says why there are none.
        offset, length: Bytes of a JSONL line; 0 otherwise.
    """

    row: int
    source: str
    values: dict[str, Any] | None = None
    error: str | None = None
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class Place:
    """Where one row of a unit is found again without reading what comes before."""

    row: int
    offset: int = 0
    length: int = 0


def read_unit(
    units: Units, unit: Unit, *, only: Iterable[Place] | None = None, columns: tuple[str, ...] | None = None
) -> Iterator[Record]:
    """The rows of `unit`, in order.

    Args:
        only: These rows, and no others.
        columns: Of Parquet: read these alone (planning needs no metadata). None: all.
    """
    places = None if only is None else {place.row: place for place in only}
    if unit.kind == "unreadable":
        yield Record(0, unit.name, error=unit.reason)
        return
    try:
        if unit.kind == "block":
            yield from _read_block(units, unit, places)
            return
        filesystem, _ = fsspec.core.url_to_fs(units.url, **units.storage_options)
        if unit.kind == "text":
            yield _text_record(unit, filesystem.cat_file(unit.path))
        elif unit.kind == "jsonl":
            yield from _read_jsonl(filesystem, unit, places)
        else:
            yield from _read_parquet(filesystem, unit, places, columns)
    except Exception as error:  # noqa: BLE001 (fsspec backends raise what they like)
        yield Record(-1, unit.name, error=f"cannot be read ({_line(error)}); check the file, then run again")


def _text_record(unit: Unit, data: bytes) -> Record:
    text, error = decode(data)
    if error is not None:
        return Record(0, unit.name, {"document_id": unit.name}, error=error)
    return Record(0, unit.name, {"document_id": unit.name, "text": text})


def decode(data: bytes) -> tuple[str, str | None]:
    """Text of UTF-8 bytes without its byte order mark, or why there is none."""
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        byte = data[error.start]
        return "", f"not UTF-8 at byte {error.start} (0x{byte:02x}); convert it, e.g. iconv -f LATIN1 -t UTF-8"


def _read_jsonl(filesystem: Any, unit: Unit, places: dict[int, Place] | None) -> Iterator[Record]:
    if places is not None:
        for row, place in places.items():
            line = filesystem.cat_file(unit.path, start=place.offset, end=place.offset + place.length)
            yield _json_record(unit, row, place.offset, line)
        return
    offset = 0
    with filesystem.open(unit.path, "rb") as file:
        for row, line in enumerate(file):
            if line.strip():
                yield _json_record(unit, row, offset, line)
            offset += len(line)


def _json_record(unit: Unit, row: int, offset: int, line: bytes) -> Record:
    where: dict[str, Any] = {"row": row, "source": f"{unit.name}:{row + 1}", "offset": offset, "length": len(line)}
    text, error = decode(line)
    if error is not None:
        return Record(**where, error=f"line is {error}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return Record(**where, error=f"line is not JSON ({_line(problem)}); write one JSON object a line")
    if not isinstance(values, dict):
        return Record(**where, error=f"line is a JSON {type(values).__name__}; write one JSON object a line")
    return Record(**where, values=values)


def _read_parquet(
    filesystem: Any, unit: Unit, places: dict[int, Place] | None, columns: tuple[str, ...] | None
) -> Iterator[Record]:
    with filesystem.open(unit.path, "rb") as file:
        parquet = pq.ParquetFile(file)
        present = parquet.schema_arrow.names
        wanted = present if columns is None else [name for name in columns if name in present]
        row = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[unit.row_group], columns=wanted):
            yield from _table_records(unit, batch, row, places)
            row += batch.num_rows


def _read_block(units: Units, unit: Unit, places: dict[int, Place] | None) -> Iterator[Record]:
    block = ray.get(units.blocks[unit.number])
    if isinstance(block, pa.Table):
        yield from _table_records(unit, block, 0, places)
        return
    for row, values in enumerate(block):
        if places is None or row in places:
            source = f"{unit.name}:{unit.first_row + row + 1}"
            if isinstance(values, dict):
                yield Record(row, source, values)
            else:
                yield Record(row, source, error=f"is a {type(values).__name__}; give a dict a row")


def _table_records(
    unit: Unit, table: pa.Table | pa.RecordBatch, start: int, places: dict[int, Place] | None
) -> Iterator[Record]:
    for i in range(table.num_rows):
        row = start + i
        if places is not None and row not in places:
            continue
        source = f"{unit.name}:{unit.first_row + row + 1}"
        values: dict[str, Any] = {}
        error = None
        for name in table.column_names:
            try:
                values[name] = table.column(name)[i].as_py()
            except (UnicodeDecodeError, pa.ArrowException, ValueError) as problem:
                error = f"column {name} cannot be read ({_line(problem)}); write it again"
        yield Record(row, source, values, error)


def document_of(record: Record) -> dict[str, Any]:
    """The document in a record: `document_id, text, source, metadata` (JSON of the other columns) and `error`, which is
    None where it can be built."""
    values = dict(record.values or {})
    given_id, text = values.pop("document_id", None), values.pop("text", None)
    document_id, error = check_id("document_id", given_id) if record.values is not None else ("", None)
    error = record.error or error
    if error is None:
        text, error = check_text("text", text, present="text" in (record.values or {}))
    return {
        "document_id": document_id,
        "text": text if error is None else "",
        "source": _encodable(record.source),
        "metadata": json.dumps({str(key): _json_value(value) for key, value in values.items()}) if not error else "{}",
        "error": _encodable(error) if error is not None else None,
    }


def question_of(record: Record) -> dict[str, Any]:
    """The question in a record: `question_id, question, document_id, expected, answer_prefix, max_new_tokens, source,
    error`.

    Without a `question_id` it is ``q-`` and 16 digits of the SHA-256 of document id and question, and of the prefix and
    the limit of the answer where the row has them.
    """
    values = record.values or {}
    error = record.error
    ids: dict[str, str | None] = {"question_id": None, "document_id": None}
    for name in ids:
        if values.get(name) is not None:
            ids[name], problem = check_id(name, values[name])
            error = error or problem
    question, problem = check_text("question", values.get("question"), present="question" in values)
    error = error or problem
    expected = values.get("expected")
    prefix, problem = check_prefix(values.get("answer_prefix"))
    error = error or problem
    longest, problem = check_limit(values.get("max_new_tokens"))
    error = error or problem
    if ids["question_id"] is None:
        own = [value for value in (prefix, longest) if value is not None]
        content = json.dumps([ids["document_id"], question or record.source, *own])
        ids["question_id"] = "q-" + hashlib.sha256(content.encode()).hexdigest()[:16]
    return {
        **ids,
        "question": question,
        "expected": None if expected is None else _encodable(str(expected)),
        "answer_prefix": prefix,
        "max_new_tokens": longest,
        "source": _encodable(record.source),
        "error": _encodable(error) if error is not None else None,
    }


def check_id(name: str, value: Any) -> tuple[str, str | None]:
    """An id as a string, and why it is refused. Ids are data: any script, any punctuation, ``../../etc/x`` as well."""
    if value is None:
        return "", f"column {name} is missing or null; give every row a {name}"
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return "", f"{name} is a {type(value).__name__}; it must be a string"
    shown = _encodable(value)[:MAX_ID_BYTES]
    if not value.strip():
        return shown, f"{name} is empty; give every row a {name}"
    if len(value.encode("utf-8", "replace")) > MAX_ID_BYTES:
        return shown[:100], f"{name} is longer than {MAX_ID_BYTES} bytes; use a shorter one"
    bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad is not None:
        return shown, f"{name} holds the control character U+{ord(bad):04X}; remove it"
    return value, None


def check_text(name: str, value: Any, *, present: bool) -> tuple[str, str | None]:
    """A text, and why it is refused."""
    if value is None:
        return "", f"column {name} is {'null' if present else 'missing'}; give every row a {name}"
    if isinstance(value, bytes):
        value, error = decode(value)
        if error is not None:
            return "", f"{name} is {error}"
    if not isinstance(value, str):
        return "", f"{name} is a {type(value).__name__}; it must be a string"
    if not value.strip():
        return value, f"{name} is empty; leave the row out, or give it a {name}"
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        return _encodable(value), f"{name} holds half of a surrogate pair at character {problem.start}; repair it"
    return value, None


def check_prefix(value: Any) -> tuple[str | None, str | None]:
    """A question's `answer_prefix`, None if it has none, and why it is refused."""
    if value is None or value == "":
        return None, None
    if not isinstance(value, str):
        return None, f"answer_prefix is a {type(value).__name__}; it must be a string, or left out"
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        return None, f"answer_prefix holds half of a surrogate pair at character {problem.start}; repair it"
    return value, None


def check_limit(value: Any) -> tuple[int | None, str | None]:
    """A question's `max_new_tokens`, None if it has none, and why it is refused."""
    if value is None:
        return None, None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not 1 <= value < 1 << 31:
        return None, f"max_new_tokens is {value!r}; it must be a whole number from 1 on, or left out"
    return int(value), None


def content_sha256(text: str) -> str:
    """SHA-256 of a document's text as UTF-8, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _json_value(value: Any) -> Any:
    """`value` as JSON has it; what JSON lacks (dates, NaN, bytes) as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {_encodable(str(key)): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return _encodable(str(value))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
