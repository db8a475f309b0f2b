"""The commands about a store: `rabatch inspect | verify | compact | gc`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rabatch import cli_arguments
from rabatch.cli_arguments import print_json, print_json_list, write_lines, write_out
from rabatch.errors import ConfigError

if TYPE_CHECKING:
    from rabatch.storage.store import IndexStore

Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]

_SHOWN = 20
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def add_commands(add: Add) -> None:
    """Add the commands to a parser; `add` takes name, function, text and example."""
    example = "--store index --model demo --newer-than 7d"
    inspect = add("inspect", _inspect, "list the documents of a store", example)
    cli_arguments.add_store(inspect)
    inspect.add_argument("--document", metavar="ID", help="only the indexes of this document")
    inspect.add_argument("--model", metavar="NAME", help="only of this model: the name shown, or its part after the /")
    inspect.add_argument(
        "--index", choices=("graph", "scan", "none"), help="only with a graph, with codes, or with neither"
    )
    inspect.add_argument("--newer-than", metavar="AGE", help="only built so long ago or less: 90s, 30m, 12h, 7d, 2w")
    inspect.add_argument("--older-than", metavar="AGE", help="only built so long ago or more")
    text = "read a whole store back and say what is wrong with it"
    verify = add("verify", _verify, text, "--store index")
    cli_arguments.add_store(verify)
    text = "withdraw damaged indexes, so that build makes them anew"
    verify.add_argument("--remove-damaged", action="store_true", help=text)
    text = "bring the catalog up to date, which makes lists of large stores fast"
    compact = add("compact", _compact, text, "--store index")
    cli_arguments.add_store(compact)
    gc = add("gc", _gc, "remove parts that no index and no answer uses", "--store index --dry-run")
    which = gc.add_mutually_exclusive_group(required=True)
    which.add_argument("--store", metavar="URL", help="index store, a path or fsspec URL")
    which.add_argument("--answers", metavar="URL", help="answers store: what runs have left that did not commit")
    cli_arguments.add_storage_options(gc)
    text = "keep what was written, or withdrawn, in the last H hours (24)"
    gc.add_argument("--grace-hours", type=float, default=24.0, metavar="H", help=text)
    text = "also withdraw indexes that a newer one of the same document and model has taken the place of"
    gc.add_argument("--superseded", action="store_true", help=text)
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    for command in (inspect, verify, compact, gc):
        cli_arguments.add_common(command)


def _open(arguments: argparse.Namespace) -> IndexStore:
    from rabatch.storage.store import IndexStore

    return IndexStore(arguments.store, storage_options=arguments.storage_options)


def _inspect(arguments: argparse.Namespace) -> int:
    import pyarrow as pa

    from rabatch.cli_list import JSON_COLUMNS, TABLE_COLUMNS, as_json, as_text
    from rabatch.storage.catalog import document_entries, entries
    from rabatch.storage.summaries import Filter, table_of

    now = datetime.now(UTC)
    chosen = Filter(
        model=arguments.model,
        index=arguments.index,
        since=_ago(now, "--newer-than", arguments.newer_than),
        until=_ago(now, "--older-than", arguments.older_than),
    )
    store = _open(arguments)
    damaged: list[str] = []
    columns = [*dict.fromkeys((*(JSON_COLUMNS if arguments.json else TABLE_COLUMNS), "created_us"))]
    on_error = lambda path, error: damaged.append(f"{path}: {error}")  # noqa: E731
    if arguments.document is None:
        tables = entries(store, columns=columns, on_error=on_error)
    else:
        tables = iter([document_entries(store, arguments.document, on_error=on_error)])
    found = [chosen.of(table).select(columns) for table in tables]
    table = pa.concat_tables(found) if found else table_of([])
    table = table.sort_by([("document_id", "ascending"), ("created_us", "ascending")])
    if arguments.json:
        print_json_list({"store": arguments.store}, "documents", as_json(table), {"damaged": damaged})
    else:
        write_lines(as_text(table, damaged, now))
    return 1 if damaged else 0


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rabatch.index.links import unreachable
    from rabatch.storage.verify import verify

    store = _open(arguments)
    with tqdm(desc="verify", unit="B", unit_scale=True, file=sys.stderr) as bar:
        problems = verify(
            store,
            progress=lambda path, size: (bar.update(size), None)[1],
            check_graph=lambda neighbors, entries: len(unreachable(neighbors, entries)),
        )
        checked_bytes = int(bar.n)
    withdrawn = sorted({p.manifest_path for p in problems if p.damaged}) if arguments.remove_damaged else []
    for path in withdrawn:
        store.withdraw(path)
    ids = [manifest.document_id for manifest in store.manifests(on_error=lambda path, error: None)]
    documents, indexes = len(set(ids)), len(ids)
    found = [
        {"document_id": p.document_id, "manifest": p.manifest_path, "part": p.part, "reason": p.reason}
        for p in problems
    ]
    if arguments.json:
        counts = {"documents": documents, "indexes": indexes, "bytes": checked_bytes}
        print_json({"store": arguments.store, **counts, "problems": found, "withdrawn": withdrawn})
    else:
        lines = _first(f"wrong: {p['document_id']!r} {p['part'] or p['manifest']}: {p['reason']}" for p in found)
        if withdrawn:
            lines.append(f"withdrew {len(withdrawn)} indexes; run build again to make them anew")
        elif problems:
            lines.append("--remove-damaged withdraws these indexes, so that build makes them anew")
        counts_line = f"{indexes} indexes of {documents} documents, {checked_bytes:,} bytes read: "
        write_out("\n".join([*lines, counts_line + (f"{len(found)} problems" if found else "ok")]))
    return 1 if problems else 0


def _compact(arguments: argparse.Namespace) -> int:
    from rabatch.storage.compaction import compact

    done = compact(_open(arguments))
    if arguments.json:
        print_json({"store": arguments.store, **vars(done)})
    else:
        state = "written" if done.written else "was up to date" if done.generation else "not needed: the store is empty"
        if not done.written and (done.read or done.dropped):
            state = "was written by another compaction meanwhile"
        lines = [*_first(f"damaged: {line}" for line in done.damaged)]
        lines.append(f"{done.entries:,} indexes, {done.read:,} manifests read; generation {done.generation} {state}")
        write_out("\n".join(lines))
    return 1 if done.damaged else 0


def _gc(arguments: argparse.Namespace) -> int:
    from rabatch.storage.answers import AnswerStore
    from rabatch.storage.answers_garbage import collect_answers
    from rabatch.storage.garbage import collect
    from rabatch.storage.superseded import Withdrawal, withdraw_superseded

    if arguments.answers and arguments.superseded:
        raise ConfigError("--superseded", arguments.answers, "is of an index store; leave it out with --answers")
    grace_s = 3600 * arguments.grace_hours
    if not 0 <= grace_s < float("inf"):
        raise ConfigError("--grace-hours", arguments.grace_hours, "must be a number of hours, 0 or more")
    dry_run, withdrawal = arguments.dry_run, Withdrawal()
    if arguments.answers:
        answers = AnswerStore(arguments.answers, storage_options=arguments.storage_options)
        found = collect_answers(answers, grace_s=grace_s, dry_run=dry_run)
    else:
        store = _open(arguments)
        if arguments.superseded:
            withdrawal = withdraw_superseded(store, dry_run=dry_run)
        found = collect(store, grace_s=grace_s, dry_run=dry_run)
    problems = list(dict.fromkeys([*withdrawal.problems, *found.problems]))
    if arguments.json:
        print_json(
            {
                **{"store": arguments.store or arguments.answers, "dry_run": dry_run, "withdrawn": withdrawal.paths},
                "attempts": [{"path": a.path, "files": a.files, "bytes": a.bytes} for a in found.attempts],
                **{"others": found.others, "bytes": found.bytes, "waiting": found.waiting},
                **{"unknown": found.unknown, "problems": problems},
            }
        )
        return 1 if problems else 0
    removed, withdrew = ("would remove", "would withdraw") if dry_run else ("removed", "withdrew")
    lines = _first(f"{withdrew}: {path}" for path in withdrawal.paths)
    lines += _first(f"{removed}: {one.path} ({one.files} files, {one.bytes:,} bytes)" for one in found.attempts)
    lines += _first(f"left alone: {path} is nothing of rabatch" for path in found.unknown)
    lines += _first(f"damaged, nothing of it was removed: {line}" for line in problems)
    if arguments.superseded:
        lines.append(f"{withdrew} {len(withdrawal.paths)} superseded indexes; their parts go after the grace period")
    others = "answers left by killed runs" if arguments.answers else "old records"
    counts = f"{len(found.attempts)} attempts, {found.bytes:,} bytes, and {len(found.others)} {others}"
    lines.append(f"{removed} {counts}; {found.waiting} attempts are within the grace period")
    write_out("\n".join(lines))
    return 1 if problems else 0


def _first(lines: Iterator[str]) -> list[str]:
    every = list(lines)
    kind = every[0].split(":")[0] if every else ""
    return every[:_SHOWN] + ([f"{kind}: {len(every) - _SHOWN:,} more"] if len(every) > _SHOWN else [])


def _ago(now: datetime, field: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if match is None:
        raise ConfigError(field, text, "must be a number and s, m, h, d or w, such as 12h or 7d")
    try:
        return now - timedelta(seconds=int(match[1]) * _UNITS_S[match[2]])
    except OverflowError as error:
        raise ConfigError(field, text, "is before the year 1") from error
