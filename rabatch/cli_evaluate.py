"""The command `rabatch evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from rabatch import cli_arguments
from rabatch.cli_options import add_heads, heads_of
from rabatch.config import INDEX_KINDS, BuildConfig, Resources
from rabatch.errors import ConfigError

_BUILD, _RESOURCES = BuildConfig(), Resources(recall_share=0.02)
_RESOURCE_OPTIONS = (
    *("prefill_actors", "graph_actors", "answer_actors", "questions_per_batch", "memory_bytes", "recall_share"),
    *("gpus_per_actor", "cpus_per_actor", "actor_memory_bytes"),
)
_MODEL_OPTIONS = ("model", "revision", "device", "dtype", "trust_remote_code", "context_template")
_BUILD_OPTIONS = ("index", "sink_tokens", "window_tokens")
_PLAIN = ("out", "store", "storage_options", "data", "samples", "questions_per_context", "seed", "address")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rabatch evaluate`."""
    text = "a definition in YAML: a path or URL; options that are given count before it"
    parser.add_argument("--config", metavar="FILE", help=text)
    parser.add_argument("--out", metavar="URL", default="evaluation", help="where to write (evaluation)")
    group = parser.add_argument_group("what is asked")
    text = "of rabatch.evaluation.tasks (niah_multikey_1,niah_multikey_3,vt; with --data none)"
    group.add_argument("--tasks", type=_names, metavar="A,B", help=text)
    group.add_argument(
        "--lengths", type=_lengths, metavar="N,M", help="tokens of the contexts: 2048,4096 or 2K,4K (2K)"
    )
    cli_arguments.add_number(group, "--samples", 50, "questions of each task and length")
    cli_arguments.add_number(group, "--questions-per-context", 5, "questions of one context, where its task has more")
    cli_arguments.add_number(group, "--seed", 0, "of the contexts")
    text = "questions of one's own: .csv, .jsonl or .parquet with context, question and answer"
    group.add_argument("--data", metavar="URL", help=text)
    group = parser.add_argument_group("recipes")
    text = "METHOD[:field=value...] with commas between; duo+METHOD (dense,streaming,graph)"
    group.add_argument("--recipes", metavar="A,B", help=text)
    add_heads(parser.add_argument_group("what duo+ stands for"), "attend")
    cli_arguments.add_model(parser)
    group = parser.add_argument_group("what is stored of a context")
    cli_arguments.add_store(parser, default="in --out")
    group.add_argument("--index", choices=INDEX_KINDS, default=_BUILD.index, help="none: keys and values only")
    cli_arguments.add_number(group, "--sink-tokens", _BUILD.sink_tokens, "first tokens that every query attends")
    cli_arguments.add_number(group, "--window-tokens", _BUILD.window_tokens, "last tokens that every query attends")
    group = cli_arguments.add_resources(parser, "--prefill-actors", "--graph-actors", "--answer-actors")
    text = "questions decoded together"
    cli_arguments.add_number(group, "--questions-per-batch", _RESOURCES.questions_per_batch, text)
    text = "of opened indexes in an actor; 0: half of what is free"
    cli_arguments.add_number(group, "--memory-bytes", _RESOURCES.memory_bytes, text)
    text = "share of the searches whose recall is measured"
    cli_arguments.add_number(group, "--recall-share", _RESOURCES.recall_share, text, kind=float)
    cli_arguments.add_observing(parser)
    cli_arguments.add_common(parser)
    parser.set_defaults(_defaults={name: parser.get_default(name) for name in (*_PLAIN, *_given_names())})


def _given_names() -> tuple[str, ...]:
    more = ("tasks", "lengths", "recipes", "head_pattern", "sparsity", "threshold", "max_failed_rows")
    return (*_MODEL_OPTIONS, *_BUILD_OPTIONS, *_RESOURCE_OPTIONS, *more)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str) -> list[int]:
    found = []
    for name in _names(text):
        number, kilo = (name[:-1], 1024) if name[-1] in "kK" else (name, 1)
        if not number.isdecimal():
            raise argparse.ArgumentTypeError(f"{name!r} is no number of tokens; write 4096 or 4K")
        found.append(int(number) * kilo)
    return found


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `rabatch.evaluate`: the definition's, and before it what is given as options."""
    from rabatch.evaluation.definition import read

    defined = {} if arguments.config is None else read(arguments.config)
    given = {n: getattr(arguments, n) for n, v in arguments._defaults.items() if getattr(arguments, n) != v}

    def part(name: str, options: tuple[str, ...], made: Any) -> dict[str, Any]:
        """A group of options counts as a whole; none of them: the definition's, or else the defaults."""
        some = [option for option in options if option in given]
        if some and name in defined:
            fix = f"{name} stands in the definition; leave the option out, or {name} there"
            raise ConfigError(some[0], given[some[0]], fix)
        return {name: made()} if name not in defined else {}

    values = {**defined, **{n: given[n] for n in (*_PLAIN, "tasks", "lengths", "recipes") if n in given}}
    values |= part("model", _MODEL_OPTIONS, lambda: cli_arguments.model_of(arguments))
    build = {name: getattr(arguments, name) for name in _BUILD_OPTIONS}
    values |= part("config", _BUILD_OPTIONS, lambda: BuildConfig(**build))
    resources = {name: getattr(arguments, name) for name in _RESOURCE_OPTIONS}
    values |= part("resources", _RESOURCE_OPTIONS, lambda: Resources(**resources))
    if "max_failed_rows" in given:
        values["max_failed_rows"] = given["max_failed_rows"]
    heads = {name: value for name, value in heads_of(arguments).items() if value is not None}
    if heads and "heads" in defined:
        heads = {**{k: v for k, v in defined["heads"].items() if k == "head_pattern"}, **heads}
    return {**values, **({"heads": heads} if heads else {}), "progress": not arguments.no_progress}


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print what came out; the exit code."""
    from rabatch.jobs.command import observer
    from rabatch.jobs.evaluate import evaluate

    ready = settings(arguments)
    with observer("rabatch evaluate", arguments, arguments.storage_options) as watch:
        result = evaluate(**ready, observer=watch)
    return cli_arguments.show(result, arguments)
