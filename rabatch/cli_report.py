"""The command `rabatch report`: a page about what lies in a store and in an answers store."""

from __future__ import annotations

import argparse
import os

from rabatch import cli_arguments
from rabatch.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rabatch report`."""
    parser.add_argument("--store", metavar="URL", help="index store: a path or any fsspec URL")
    parser.add_argument("--answers", metavar="URL", help="answers store, likewise")
    cli_arguments.add_storage_options(parser)
    parser.add_argument("--report-html", metavar="FILE", default="report.html", help="where to write (report.html)")
    cli_arguments.add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; exit code 1 if something failed in it."""
    from rabatch.report.collect import collect
    from rabatch.report.page import render
    from rabatch.storage.answers import AnswerStore
    from rabatch.storage.filesystem import Folder
    from rabatch.storage.store import IndexStore

    if arguments.store is None and arguments.answers is None:
        raise ConfigError("--store", None, "give an index store, an answers store (--answers), or both")
    url = arguments.report_html if "://" in arguments.report_html else os.path.abspath(arguments.report_html)
    if not url.endswith((".html", ".htm")):
        raise ConfigError("report_html", arguments.report_html, "must end in .html")
    options = arguments.storage_options
    store = IndexStore(arguments.store, storage_options=options) if arguments.store is not None else None
    answers = AnswerStore(arguments.answers, storage_options=options) if arguments.answers is not None else None
    made = collect(store, answers)
    folder, _, name = url.rpartition("/")
    Folder(folder, **(options or {})).write(name, render(made))
    counts = {phase.name: dict(phase.counts) for phase in made.phases}
    if arguments.json:
        cli_arguments.print_json({"report": arguments.report_html, "counts": counts})
    else:
        for phase in made.phases:
            rows = ", ".join(f"{count:,} {status}" for status, count in phase.counts.items()) or "nothing"
            cli_arguments.write_out(f"{phase.unit}: {rows}")
        cli_arguments.write_out(arguments.report_html)
    return cli_arguments.EXIT_FAILED_ROWS if any("failed" in found for found in counts.values()) else 0
