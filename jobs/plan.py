"""The planning pass: which documents there are, which are faulty or double, before any is prefilled."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from rabatch.jobs.cluster import READER_CPUS, dataset_context
from rabatch.jobs.rows import Place, Record, content_sha256, document_of, read_unit
from rabatch.jobs.sources import Units

_MAX_TASKS = 1000
_END = "end"  # marks a unit as read to its end; one whose reader died has none
_PLAN = pa.schema(
    [
        *((name, pa.int64()) for name in ("unit", "row", "offset", "length", "chars")),
        *((name, pa.string()) for name in ("document_id", "source", "content_sha256", "error")),
    ]
)
_DOCUMENT = pa.schema(
    [("number", pa.int64()), *((n, pa.large_string()) for n in ("document_id", "text", "metadata", "error"))]
)


@dataclass(frozen=True)
class Planned:
    """One row of the input: a document, or the reason (`error`) why it is none."""

    document_id: str
    source: str
    content_sha256: str
    chars: int
    error: str | None
    unit: int
    place: Place


def plan_documents(units: Units, *, limit: int | None = None) -> list[Planned]:
    """Every row of the source in input order, without its text.

    Of several rows with one id the first that can be built stands; the others carry an error that names it.

    Args:
        limit: Only the first rows.
    """
    if not units.units:
        return []
    with dataset_context(row_blocks=False):
        numbers = ray.data.from_items(
            [{"unit": unit.number} for unit in units.units], override_num_blocks=min(len(units.units), _MAX_TASKS)
        )
        read = numbers.map_batches(_planner(units), batch_size=None, batch_format="pyarrow", num_cpus=READER_CPUS)
        rows = [row for batch in _tables(read) for row in batch.to_pylist()]
    read_to_end = {row["unit"] for row in rows if row["source"] == _END}
    rows = [row for row in rows if row["source"] != _END]
    for unit in units.units:
        if unit.number not in read_to_end:
            error = "cannot be read: its reader died, perhaps out of memory; cut the file into smaller ones"
            rows.append(_plan_row(unit.number, Record(2**62, unit.name, error=error)))
    rows.sort(key=lambda row: (row["unit"], row["row"]))
    return _mark_doubles([_planned(row) for row in rows[:limit]])


def _tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _planner(units: Units) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def plan(table: pa.Table) -> Iterator[pa.Table]:
        for number in table.column("unit").to_pylist():
            records = read_unit(units, units.units[number], columns=("document_id", "text"))
            rows = [_plan_row(number, record) for record in records]
            rows.append(_plan_row(number, Record(0, _END)))
            yield pa.Table.from_pylist(rows, schema=_PLAN)

    return plan


def _plan_row(unit: int, record: Record) -> dict[str, Any]:
    document = document_of(record)
    return {
        **document,
        "unit": unit,
        "row": record.row,
        "offset": record.offset,
        "length": record.length,
        "chars": len(document["text"]),
        "content_sha256": content_sha256(document["text"]),
    }


def _planned(row: dict[str, Any]) -> Planned:
    place = Place(row["row"], row["offset"], row["length"])
    fields = {field.name: row[field.name] for field in dataclasses.fields(Planned) if field.name != "place"}
    return Planned(**fields, place=place)


def _mark_doubles(planned: list[Planned]) -> list[Planned]:
    first: dict[str, str] = {}
    marked = []
    for row in planned:
        if row.error is None and row.document_id in first:
            error = f"document_id is the same as that of {first[row.document_id]}, which is kept; give it another id"
            row = dataclasses.replace(row, error=error)
        elif row.error is None:
            first[row.document_id] = row.source
        marked.append(row)
    return marked


def read_documents(units: Units, planned: list[Planned], numbers: list[int]) -> ray.data.Dataset:
    """A dataset of the documents `planned[number]`, one row per block: `number, document_id, text, metadata, error`.

    The largest come first, so that no long one is left for the end. Call it inside
    `dataset_context(row_blocks=True)`. The rows of one Parquet row group or table block are read by one task.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in numbers:
        row = planned[number]
        alone = row.place.row if units.units[row.unit].kind == "jsonl" else 0
        groups[row.unit, alone].append(number)
    ordered = sorted(groups.values(), key=lambda group: -max(planned[n].chars for n in group))
    items = []
    for group in ordered:
        group.sort(key=lambda n: planned[n].place.row)
        places = [dataclasses.astuple(planned[n].place) for n in group]
        items.append({"unit": planned[group[0]].unit, "places": json.dumps(places), "numbers": json.dumps(group)})
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(_reader(units), batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS)


def _reader(units: Units) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def read(table: pa.Table) -> Iterator[pa.Table]:
        for item in table.to_pylist():
            places = [Place(*place) for place in json.loads(item["places"])]
            numbers = dict(zip([place.row for place in places], json.loads(item["numbers"]), strict=True))
            for record in read_unit(units, units.units[item["unit"]], only=places):
                found = [numbers[record.row]] if record.row in numbers else list(numbers.values())
                for number in found:  # a record without a row is the failure of the whole unit
                    yield pa.Table.from_pylist([{**document_of(record), "number": number}], schema=_DOCUMENT)

    return read
