"""The command `rabatch answers`: what an answers store holds, printed or written to a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rabatch import cli_arguments
from rabatch.cli_arguments import print_json, print_json_list, write_lines, write_out

if TYPE_CHECKING:
    import pyarrow as pa

Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]

_SLICE_ROWS = 10_000


def add_command(add: Add) -> None:
    """Add the command to a parser; `add` takes name, function, text and example."""
    text = "export answers: of every question and document the latest"
    parser = add("answers", _answers, text, "--answers answers --out answers.csv")
    parser.add_argument("--answers", required=True, metavar="URL", help="answers store: a path or any fsspec URL")
    cli_arguments.add_storage_options(parser)
    parser.add_argument("--out", metavar="FILE", help="write to this .parquet, .jsonl or .csv file; default: print")
    parser.add_argument("--all", action="store_true", help="also superseded rows; the column superseded tells them")
    parser.add_argument("--question-id", metavar="ID", help="only of this question")
    parser.add_argument("--document", metavar="ID", help="only of this document")
    cli_arguments.add_common(parser)


def _answers(arguments: argparse.Namespace) -> int:
    from rabatch.exporting import suffix_of
    from rabatch.storage.answers import AnswerStore, exported

    if arguments.out is not None:
        suffix_of(arguments.out)
    store = AnswerStore(arguments.answers, storage_options=arguments.storage_options)
    which = {"question_id": arguments.question_id, "document_id": arguments.document}
    tables = exported(store, every=arguments.all, **which)
    rows = (table.slice(at, _SLICE_ROWS) for table in tables for at in range(0, table.num_rows, _SLICE_ROWS))
    if arguments.out is not None:
        _write(rows, arguments)
    elif arguments.json:
        texts = (json.dumps(row) for table in rows for row in table.to_pylist())
        print_json_list({"answers": arguments.answers}, "rows", texts, {"all": arguments.all})
    else:
        write_lines(_line(row) for table in rows for row in table.to_pylist())
    return 0


def _write(tables: Iterator[pa.Table], arguments: argparse.Namespace) -> None:
    import pyarrow as pa

    from rabatch.exporting import Export, place_of
    from rabatch.records import EXPORTED_ANSWERS

    schema = EXPORTED_ANSWERS.append(pa.field("superseded", pa.bool_())) if arguments.all else EXPORTED_ANSWERS
    n_rows = 0
    with Export(*place_of(arguments.out, arguments.storage_options), schema) as export:
        for table in tables:
            export.add(table.to_pylist())
            n_rows += table.num_rows
    if arguments.json:
        print_json({"answers": arguments.answers, "out": arguments.out, "rows": n_rows})
    else:
        write_out(f"{n_rows} answers written to {arguments.out}")


def _line(row: dict[str, Any]) -> str:
    text = row["answer"] if row["status"] == "ok" else f"failed: {row['reason']}"
    mark = " (superseded)" if row.get("superseded") else ""
    return f"{row['question_id']} on {row['document_id']}{mark}: {' '.join(text.split())}"
