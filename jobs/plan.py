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
_PACK = pa.schema([("documents", pa.list_(pa.struct(list(_DOCUMENT))))])


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


def read_documents(units: Units, planned: list[Planned], numbers: list[int], *, pack_chars: int) -> ray.data.Dataset:
    """A dataset of the documents `planned[number]` in packs, one to a row and block: they share forward passes.

    A document of more than `pack_chars` / 2 characters is a pack of its own. The largest come first, so that no long
    one is left for the end. Call it inside `dataset_context(row_blocks=True)`. The rows of one Parquet row group or
    table block are read by one task.

    Args:
        pack_chars: Characters of a pack at most; 0: every document alone.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in numbers:
        row = planned[number]
        alone = row.place.row if units.units[row.unit].kind == "jsonl" else 0
        groups[row.unit, alone].append(number)
    items: list[list[dict[str, Any]]] = []
    room = _Room(pack_chars)
    for group in sorted(groups.values(), key=lambda group: -max(planned[n].chars for n in group)):
        group.sort(key=lambda n: planned[n].place.row)
        places = [dataclasses.astuple(planned[n].place) for n in group]
        if room.opens_pack(sum(planned[n].chars for n in group)):
            items.append([])
        items[-1].append({"unit": planned[group[0]].unit, "places": places, "numbers": group})
    dataset = ray.data.from_items([{"groups": json.dumps(item)} for item in items], override_num_blocks=len(items))
    return dataset.map_batches(_reader(units, pack_chars), batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS)


class _Room:
    """What is left of a pack of `pack_chars` characters, in which nothing longer than half of it shares."""

    def __init__(self, pack_chars: int) -> None:
        self._pack_chars = pack_chars
        self._left = -1  # no pack is open yet

    def opens_pack(self, chars: int) -> bool:
        """Whether so many characters begin a new pack; they are counted in."""
        opens = chars > min(self._left, self._pack_chars // 2)
        left = self._pack_chars if opens else self._left
        self._left = left - chars if chars <= self._pack_chars // 2 else 0
        return opens


def _reader(units: Units, pack_chars: int) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def read(table: pa.Table) -> Iterator[pa.Table]:
        pack: list[dict[str, Any]] = []
        room = _Room(pack_chars)
        for group in json.loads(table.column("groups")[0].as_py()):
            for document in _documents(units, group):
                if room.opens_pack(len(document["text"])) and pack:
                    yield pa.Table.from_pylist([{"documents": pack}], schema=_PACK)
                    pack = []
                pack.append(document)
        if pack:
            yield pa.Table.from_pylist([{"documents": pack}], schema=_PACK)

    return read


def _documents(units: Units, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    places = [Place(*place) for place in group["places"]]
    numbers = dict(zip([place.row for place in places], group["numbers"], strict=True))
    for record in read_unit(units, units.units[group["unit"]], only=places):
        found = [numbers[record.row]] if record.row in numbers else list(numbers.values())
        for number in found:  # a record without a row is the failure of the whole unit
            document = document_of(record)
            yield {"number": number, **{name: document[name] for name in _DOCUMENT.names if name != "number"}}
