"""The jobs as commands: the bodies of `rabatch build` and `rabatch answer`, and of the modules run by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rabatch import cli_arguments
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.observing import Observer


def run_build(arguments: argparse.Namespace) -> int:
    """Build, print what happened; the exit code."""
    with observer("rabatch build", arguments) as watch:
        result = build(arguments.documents, **cli_arguments.build_settings(arguments), observer=watch)
    return cli_arguments.show(result, arguments)


def run_answer(arguments: argparse.Namespace) -> int:
    """Answer, print what happened; the exit code."""
    with observer("rabatch answer", arguments) as watch:
        result = answer(arguments.questions, **cli_arguments.answer_settings(arguments), observer=watch)
    return cli_arguments.show(result, arguments)


def observer(title: str, arguments: argparse.Namespace) -> Observer:
    """What the options of `cli_arguments.add_observing` ask for."""
    return Observer(
        title,
        progress=not arguments.no_progress,
        report_html=arguments.report_html,
        storage_options=arguments.storage_options,
    )


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """``python -m rabatch.jobs.build`` and ``.answer``: the options of the command `name`."""
    parser = cli_arguments.Parser(prog=f"python -m rabatch.jobs.{name}")
    {"build": cli_arguments.add_build, "answer": cli_arguments.add_answer}[name](parser)
    arguments = parser.parse_args(argv)
    return cli_arguments.run({"build": run_build, "answer": run_answer}[name], arguments)
