"""The command line: `rabatch demo | corpus | build | answer | inspect | verify`.

Each command imports what it runs, so that `rabatch --help` stays fast. Exit codes: 0 all good, 1 some rows failed or
something is wrong with a store, 2 could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rabatch import __version__, cli_arguments
from rabatch.cli_arguments import print_json, write_out

if TYPE_CHECKING:
    from rabatch.storage.manifest import Manifest

_ID_WIDTH = 40
_PROBLEMS_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. `argv` without the program's name; None: the process's own."""
    arguments = make_parser().parse_args(argv)
    return cli_arguments.run(arguments.run, arguments)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = cli_arguments.Parser(
        prog="rabatch",
        description="Prefill long documents once, store their attention state, answer many questions in batch.",
        epilog="Exit codes: 0 all good, 1 some rows failed, 2 could not run.",
    )
    parser.add_argument("--version", action="version", version=f"rabatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,corpus,build,answer,inspect,verify}")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"Example:\n  rabatch {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _add_demo(add("demo", _demo, "build and answer a small corpus, print a table", "--documents 2 --tokens 2048"))
    example = "--out corpus --documents 8 --tokens 8192 --questions 8"
    _add_corpus(add("corpus", _corpus, "write long documents with planted facts, and questions", example))
    example = "corpus/documents.jsonl --store index"
    cli_arguments.add_build(add("build", _build, "prefill documents and store their indexes", example))
    example = "corpus/questions.jsonl --store index --output answers"
    cli_arguments.add_answer(add("answer", _answer, "answer questions from stored indexes", example))
    for name, run, text in (
        ("inspect", _inspect, "list the documents of a store"),
        ("verify", _verify, "read a whole store back and say what is wrong with it"),
    ):
        command = add(name, run, text, "--store index")
        cli_arguments.add_store(command)
        if name == "verify":
            command.add_argument(
                "--remove-damaged", action="store_true", help="withdraw damaged indexes, so that build makes them anew"
            )
        cli_arguments.add_common(command)
    return parser


def _add_corpus_size(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("--documents", 8, "documents"),
        ("--tokens", 8192, "tokens of each, at least"),
        ("--questions", 8, "questions about each"),
        ("--seed", 0, "same seed, same corpus"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} ({default})")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_corpus_size(parser)
    parser.add_argument("--keep", metavar="DIR", help="keep corpus, store and answers here; default: removed again")
    cli_arguments.add_common(parser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help="where to write: a path or fsspec URL (corpus)")
    parser.add_argument("--out", metavar="DIR", help="the same as an option")
    _add_corpus_size(parser)
    parser.add_argument(
        "--kinds", metavar="A,B", help="kinds of facts asked for (single,many_keys,several_values,two_hop)"
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the files (jsonl)")
    cli_arguments.add_common(parser)


def _demo(arguments: argparse.Namespace) -> int:
    from rabatch.demo.run import format_report, run_demo

    report = run_demo(
        documents=arguments.documents,
        tokens=arguments.tokens,
        questions=arguments.questions,
        seed=arguments.seed,
        keep=arguments.keep,
    )
    if arguments.json:
        print_json(report)
    else:
        write_out(format_report(report))
    return 1 if report["failed"] else 0


def _corpus(arguments: argparse.Namespace) -> int:
    from rabatch.demo.corpus import KINDS, write_corpus

    written = write_corpus(
        arguments.out or arguments.folder or "corpus",
        n_documents=arguments.documents,
        tokens=arguments.tokens,
        n_questions=arguments.questions,
        kinds=arguments.kinds.split(",") if arguments.kinds else KINDS,
        seed=arguments.seed,
        format=arguments.format,
    )
    if arguments.json:
        print_json(written)
    else:
        counts = f"{written['documents']} documents ({written['tokens']:,} tokens), {written['questions']} questions"
        write_out(f"{counts}\n{written['paths']['documents']}\n{written['paths']['questions']}")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.command import run_build

    return run_build(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.command import run_answer

    return run_answer(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from rabatch.storage.store import IndexStore

    store = IndexStore(arguments.store, storage_options=arguments.storage_options)
    damaged: list[str] = []
    manifests = list(store.manifests(on_error=lambda path, error: damaged.append(f"{path}: {error}")))
    rows = [_describe(manifest) for manifest in sorted(manifests, key=lambda m: (m.document_id, m.created_at))]
    if arguments.json:
        print_json({"store": arguments.store, "documents": rows, "damaged": damaged})
    else:
        table: list[tuple[str, ...]] = [
            ("document", "tokens", "bytes", "index", "model", "dtype", "built", "fingerprint")
        ]
        for row in rows:
            size = (f"{row['context_tokens']:,}", f"{row['stored_bytes']:,}")
            about = (
                row["index"],
                _shorten(row["model"]),
                row["dtype"],
                _age(row["created_at"]),
                row["fingerprint"][:12],
            )
            table.append((_shorten(row["document_id"]), *size, *about))
        total = sum(row["stored_bytes"] for row in rows)
        lines = [*_columns(table, right=(1, 2)), f"{len(rows)} indexes, {total:,} bytes"]
        write_out("\n".join([*lines, *(f"damaged: {line}" for line in damaged)]))
    return 1 if damaged else 0


def _describe(manifest: Manifest) -> dict[str, Any]:
    shape = manifest.geometry
    return {
        "document_id": manifest.document_id,
        "context_tokens": manifest.context_tokens,
        "text_chars": manifest.text_chars,
        "stored_bytes": manifest.stored_bytes,
        "index": shape.index,
        "degree": shape.degree,
        "sink_tokens": shape.sink_tokens,
        "window_tokens": shape.window_tokens,
        "dtype": shape.kv_dtype,
        "model": str(manifest.stats.get("model", "")),
        "created_at": manifest.created_at,
        "parts": len(manifest.parts),
        "fingerprint": manifest.fingerprint,
        "content_sha256": manifest.content_sha256,
        "metadata": manifest.metadata,
    }


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rabatch.index.links import unreachable
    from rabatch.storage.store import IndexStore
    from rabatch.storage.verify import verify

    store = IndexStore(arguments.store, storage_options=arguments.storage_options)
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
        lines = [f"wrong: {p['document_id']!r} {p['part'] or p['manifest']}: {p['reason']}" for p in found]
        more = [f"wrong: {len(lines) - _PROBLEMS_SHOWN} more"] if len(lines) > _PROBLEMS_SHOWN else []
        if withdrawn:
            more.append(f"withdrew {len(withdrawn)} indexes; run build again to make them anew")
        elif problems:
            more.append("--remove-damaged withdraws these indexes, so that build makes them anew")
        counts_line = f"{indexes} indexes of {documents} documents, {checked_bytes:,} bytes read: "
        write_out(
            "\n".join([*lines[:_PROBLEMS_SHOWN], *more, counts_line + (f"{len(found)} problems" if found else "ok")])
        )
    return 1 if problems else 0


def _columns(rows: list[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= _ID_WIDTH else text[: _ID_WIDTH - 3] + "..."


def _age(created_at: str) -> str:
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} seconds ago"


if __name__ == "__main__":
    sys.exit(main())
