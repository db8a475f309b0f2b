"""The jobs as commands: the bodies of `rabatch run`, `build` and `answer`, and of the modules run by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rabatch import cli_arguments, cli_evaluate
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.observing import Observer
from rabatch.jobs.run import run
from rabatch.pipeline import Pipeline


def run_build(arguments: argparse.Namespace) -> int:
    """Build, print what happened; the exit code."""
    with observer("rabatch build", arguments, arguments.storage_options) as watch:
        result = build(arguments.documents, **cli_arguments.build_settings(arguments), observer=watch)
    return cli_arguments.show(result, arguments)


def run_answer(arguments: argparse.Namespace) -> int:
    """Answer, print what happened; the exit code."""
    with observer("rabatch answer", arguments, arguments.storage_options) as watch:
        result = answer(arguments.questions, **cli_arguments.answer_settings(arguments), observer=watch)
    return cli_arguments.show(result, arguments)


def observer(title: str, arguments: argparse.Namespace, storage_options: dict[str, Any] | None) -> Observer:
    """What the options of `cli_arguments.add_observing` ask for."""
    visible, path = not arguments.no_progress, arguments.report_html
    return Observer(title, progress=visible, report_html=path, storage_options=storage_options)


def run_pipeline(arguments: argparse.Namespace) -> int:
    """Run a pipeline, print what happened; the exit code."""
    pipeline = Pipeline.from_yaml(arguments.pipeline)
    with observer("rabatch run", arguments, pipeline.storage_options) as watch:
        result = run(pipeline, address=arguments.address, observer=watch)
    return cli_arguments.show(result, arguments)


_COMMANDS = {
    "build": (cli_arguments.add_build, run_build),
    "answer": (cli_arguments.add_answer, run_answer),
    "run": (cli_arguments.add_run, run_pipeline),
    "evaluate": (cli_evaluate.add_arguments, cli_evaluate.run),
}


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """``python -m rabatch.jobs.build``, ``.answer``, ``.run`` and ``.evaluate``: the options of the command `name`."""
    parser = cli_arguments.Parser(prog=f"python -m rabatch.jobs.{name}")
    add, command = _COMMANDS[name]
    add(parser)
    return cli_arguments.run(command, parser.parse_args(argv))
