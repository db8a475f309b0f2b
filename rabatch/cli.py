"""The command line: `rabatch COMMAND`, with the commands of `_COMMANDS`.

Each command imports what it runs, so that `rabatch --help` stays fast. Exit codes: 0 all good, 1 some rows failed or
something is wrong with a store, 2 could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rabatch import (
    __version__,
    cli_answers,
    cli_arguments,
    cli_calibrate,
    cli_evaluate,
    cli_jobs,
    cli_report,
    cli_store,
)
from rabatch.cli_arguments import print_json, write_out

_COMMANDS = "demo,corpus,run,build,answer,answers,calibrate,evaluate,report"
_COMMANDS += ",plan,submit,schedule,inspect,verify,compact,gc"


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
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{_COMMANDS}}}")

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
    text = "run a pipeline: build what is new, answer what is not answered"
    cli_arguments.add_run(add("run", _run, text, "pipeline.yaml"))
    example = "corpus/documents.jsonl --store index"
    cli_arguments.add_build(add("build", _build, "prefill documents and store their indexes", example))
    example = "corpus/questions.jsonl --store index --output answers"
    cli_arguments.add_answer(add("answer", _answer, "answer questions from stored indexes", example))
    cli_answers.add_command(add)
    cli_calibrate.add_command(add)
    text = "say what recipes cost in accuracy, on tasks or on a file of questions"
    example = "--tasks niah_multikey_3,vt --lengths 2K,4K --recipes dense,streaming,graph,graph:top_k=50"
    cli_evaluate.add_arguments(add("evaluate", cli_evaluate.run, text, example))
    example = "--store index --answers answers --report-html report.html"
    cli_report.add_arguments(add("report", cli_report.run, "write a page about what lies in the stores", example))
    cli_jobs.add_commands(add)
    cli_store.add_commands(add)
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
    cli_arguments.add_store(parser, default="in that folder")
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
        store=arguments.store,
        storage_options=arguments.storage_options,
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


def _run(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.command import run_pipeline

    return run_pipeline(arguments)


def _build(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.command import run_build

    return run_build(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.command import run_answer

    return run_answer(arguments)


if __name__ == "__main__":
    sys.exit(main())
