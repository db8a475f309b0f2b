"""How `rabatch inspect` prints a list of indexes, which may be of millions: Arrow joins the texts, column by column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from rabatch.errors import IntegrityError
from rabatch.storage.summaries import id_text

JSON_COLUMNS = (
    *("document_id", "context_tokens", "text_chars", "stored_bytes", "index", "degree", "heads", "streaming_heads"),
    *("sink_tokens", "window_tokens", "dtype", "model", "created_at", "parts", "fingerprint", "content_sha256"),
    *("path", "metadata"),
)
TABLE_COLUMNS = (
    *("document_id", "context_tokens", "stored_bytes", "index", "streaming_heads", "heads", "model", "dtype"),
    *("created_us", "fingerprint"),
)
_HEADING = ("document", "tokens", "bytes", "index", "streaming", "model", "dtype", "built", "fingerprint")
_NUMBERS = (1, 2)
_ID_WIDTH = 40
_DIGITS = 12  # shown of a fingerprint
_WIDEST_AGE = "119 seconds ago"
_BATCH_ROWS = 16_384
_PLAIN = r"^[ !#-\[\]-~]*$"  # ASCII that neither JSON nor a terminal needs escaped
_TEXT = pa.large_string()

_json_text = json.encoder.encode_basestring_ascii


def as_json(table: pa.Table) -> Iterator[str]:
    """JSON objects with `JSON_COLUMNS`, one per index; each text holds many of them, with commas between."""
    for batch in table.select(JSON_COLUMNS).to_batches(_BATCH_ROWS):
        cells: list[pa.Array | str] = []
        for name, column in zip(JSON_COLUMNS, batch.columns, strict=True):
            cells.append(f'{", " if cells else "{"}"{"manifest" if name == "path" else name}": ')
            if name == "metadata":
                cells.append(pa.array(map(_checked, column.to_pylist()), _TEXT))
            elif pa.types.is_integer(column.type):
                cells.append(column)
            elif _is_plain(column):
                cells += ['"', column, '"']
            else:
                cells.append(pa.array(map(_json_text, _texts(column)), _TEXT))
        yield ", ".join(_joined([*cells, "}"]))


def as_text(table: pa.Table, damaged: list[str], now: datetime) -> Iterator[str]:
    """Lines of `TABLE_COLUMNS` for people, then the counts and what is damaged."""
    widths = _widths(table)
    pads = [pc.utf8_lpad if number in _NUMBERS else pc.utf8_rpad for number in range(len(widths))]
    titles = [pa.array([word], _TEXT) for word in _HEADING]
    for cells in (titles, *_cells(table, now)):
        padded = [pad(cell, width) for pad, cell, width in zip(pads, cells, widths, strict=True)]
        yield from map(str.rstrip, _joined(padded, "  "))
    total = pc.sum(table["stored_bytes"]).as_py() or 0
    yield f"{table.num_rows} indexes, {total:,} bytes"
    yield from (f"damaged: {text}" for text in damaged)


def _checked(text: str) -> str:
    """The text, which is put into the output as it is, so it must be a whole JSON object."""
    try:
        if isinstance(json.loads(text), dict):
            return text
    except ValueError:
        pass
    raise IntegrityError("catalog: metadata", text, "is no JSON object; run `rabatch compact` on an emptied catalog/")


def _is_plain(column: pa.Array) -> bool:
    return pc.all(pc.match_substring_regex(column, _PLAIN)).as_py() is not False


def _texts(column: pa.Array) -> list[str]:
    """Of a column of texts, or of document ids as bytes."""
    return [id_text(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _joined(cells: list[pa.Array | str], between: str = "") -> list[str]:
    """Row by row, the texts one after another."""
    texts = [pa.scalar(cell, _TEXT) if isinstance(cell, str) else cell.cast(_TEXT) for cell in cells]
    return pc.binary_join_element_wise(*texts, pa.scalar(between, _TEXT)).to_pylist()


def _widths(table: pa.Table) -> list[int]:
    """Of the columns, in characters: at least what the cells take, without making each of them."""
    heads, streaming = (pc.max(table[name]).as_py() or 0 for name in ("heads", "streaming_heads"))
    widths = {"created_us": len(_WIDEST_AGE), "fingerprint": _DIGITS, "streaming_heads": len(f"{streaming} of {heads}")}
    for name in ("context_tokens", "stored_bytes"):
        widths[name] = len(f"{pc.max(table[name]).as_py() or 0:,}")
    for name in ("document_id", "model", "index", "dtype"):
        widths[name] = min(_ID_WIDTH, pc.max(pc.binary_length(table[name])).as_py() or 0)
    cells = [name for name in TABLE_COLUMNS if name != "heads"]  # which stands in the same cell as those that stream
    return [max(len(word), widths[name]) for word, name in zip(_HEADING, cells, strict=True)]


def _cells(table: pa.Table, now: datetime) -> Iterator[list[pa.Array]]:
    """Texts, column by column, some rows at a time."""
    now_us = int(now.timestamp() * 1e6)
    for batch in table.select(TABLE_COLUMNS).to_batches(_BATCH_ROWS):
        ids, tokens, size, index, streaming, heads, model, dtype, created_us, fingerprint = batch.columns
        seconds = pc.divide(pc.subtract(pa.scalar(now_us), created_us), 1_000_000).dictionary_encode()
        ages = pa.array([_age(value) for value in seconds.dictionary.to_pylist()], _TEXT)
        yield [
            *(_short(ids), _grouped(tokens), _grouped(size), index, _streaming(streaming, heads), _short(model), dtype),
            *(ages.take(seconds.indices), pc.utf8_slice_codeunits(fingerprint, 0, _DIGITS)),
        ]


def _short(column: pa.Array) -> pa.Array:
    """Ids or names, cut where they are longer than `_ID_WIDTH`."""
    if _is_plain(column) and (pc.max(pc.binary_length(column)).as_py() or 0) <= _ID_WIDTH:
        return column.cast(_TEXT)
    cut = [text if len(text) <= _ID_WIDTH else text[: _ID_WIDTH - 3] + "..." for text in _texts(column)]
    return pa.array([text.encode("utf-8", "backslashreplace").decode() for text in cut], _TEXT)


def _streaming(some: pa.Array, every: pa.Array) -> pa.Array:
    """How many of all heads stream, or a dash."""
    texts = pc.binary_join_element_wise(some.cast(_TEXT), every.cast(_TEXT), pa.scalar(" of ", _TEXT))
    return pc.if_else(pc.greater(some, 0), texts, pa.scalar("-", _TEXT))


def _grouped(column: pa.Array) -> pa.Array:
    return pa.array([f"{value:,}" for value in column.to_pylist()], _TEXT)


def _age(seconds: int) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} seconds ago"
