"""The options of the commands, and what all commands share: error style, `--json`, printing of results.

Used by `rabatch.cli` and by the jobs' own entry points (``python -m rabatch.jobs.build``); imports nothing heavy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

from rabatch.cli_options import add_heads, heads_of, json_object, pool
from rabatch.config import (
    CODECS,
    DTYPES,
    INDEX_KINDS,
    BuildConfig,
    GenerationSettings,
    GraphConfig,
    ModelConfig,
    Recipe,
    Resources,
)
from rabatch.errors import ConfigError, RabatchError
from rabatch.traits import COMPARED, METHODS

EXIT_FAILED_ROWS = 1
EXIT_COULD_NOT_RUN = 2
_INTERRUPTED = 130
_ANSWERING = ("answer_actors", "questions_per_batch", "memory_bytes", "cache_dir", "cache_bytes", "recall_share")
_LINES = 1024  # looked at and written together

_BUILD, _GRAPH, _MODEL, _RECIPE = BuildConfig(), GraphConfig(), ModelConfig(), Recipe()
_GENERATION, _RESOURCES = GenerationSettings(), Resources()


class Parser(argparse.ArgumentParser):
    """Errors in one line, as every error of rabatch."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"rabatch: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(EXIT_COULD_NOT_RUN)


class Result(Protocol):
    """What `build` and `answer` return."""

    @property
    def exit_code(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...

    def summary(self) -> list[str]: ...


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The command's exit code; an error of the user's is one line on stderr and 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return command(arguments)
    except RabatchError as error:
        sys.stderr.write(f"rabatch: error: {' '.join(str(error).split())}\n")
        return EXIT_COULD_NOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("rabatch: interrupted; run the same command again to go on\n")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return EXIT_FAILED_ROWS


def show(result: Result, arguments: argparse.Namespace) -> int:
    """Print a result; the exit code."""
    if arguments.json:
        print_json(result.to_dict())
    else:
        write_out("\n".join(result.summary()))
    return result.exit_code


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, in one line, ASCII."""
    write_out(json.dumps(value))


def print_json_list(before: dict[str, Any], name: str, rows: Iterable[str], after: dict[str, Any]) -> None:
    """As `print_json` of one object with `before`, the list `name` and `after`.

    Args:
        rows: JSON texts of an element or of several, with commas between; they are printed as they come.
    """
    sys.stdout.write(f"{json.dumps(before)[:-1]}, {json.dumps(name)}: [")
    comma = ""
    for row in rows:
        sys.stdout.write(comma + row)
        comma = ", "
    write_out(f"], {json.dumps(after)[1:]}")


def write_out(text: str) -> None:
    """Text to stdout; what the terminal cannot show is escaped, control characters too."""
    write_lines(text.split("\n"))


def write_lines(lines: Iterable[str]) -> None:
    """Lines to stdout as `write_out` does, as they come: there may be millions."""
    encoding = sys.stdout.encoding or "utf-8"
    rest = iter(lines)
    while some := list(itertools.islice(rest, _LINES)):
        together = "".join(some)
        if not (together.isascii() and together.isprintable()):
            some = [_escaped(line, encoding) for line in some]
        sys.stdout.write("\n".join(some) + "\n")
    sys.stdout.flush()


def _escaped(line: str, encoding: str) -> str:
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def add_common(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")


def add_observing(parser: argparse.ArgumentParser) -> None:
    """`--no-progress` and `--report-html`."""
    parser.add_argument("--no-progress", action="store_true", help="no progress on stderr")
    parser.add_argument("--report-html", metavar="FILE", help="write a report with plots to this .html file")


def add_store(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """`--store` and how to reach it. It must be given unless there is a `default`, which the help names."""
    text = "index store: a path or any fsspec URL" + (f" ({default})" if default else "")
    parser.add_argument("--store", required=not default, metavar="URL", help=text)
    add_storage_options(parser)


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """`--storage-options`."""
    parser.add_argument(
        "--storage-options", type=json_object, metavar="JSON", help='for fsspec, e.g. \'{"endpoint_url": "..."}\''
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """The options of `rabatch run`."""
    parser.add_argument("pipeline", help="the definition: a .yaml file, a path or fsspec URL")
    parser.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, else a local Ray")
    add_observing(parser)
    add_common(parser)


def add_build(parser: argparse.ArgumentParser) -> None:
    """The options of `rabatch build`."""
    parser.add_argument("documents", help="folder of .txt and .md, or .jsonl or .parquet; a path or fsspec URL")
    add_store(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of the input")
    parser.add_argument("--report", metavar="FILE", help="write a row per document to this .parquet or .jsonl file")
    add_model(parser)
    group = parser.add_argument_group("what is stored (part of the fingerprint)")
    group.add_argument("--index", choices=INDEX_KINDS, default=_BUILD.index, help="none: keys and values only")
    add_number(group, "--sink-tokens", _BUILD.sink_tokens, "first tokens that every query attends")
    add_number(group, "--window-tokens", _BUILD.window_tokens, "last tokens that every query attends")
    add_number(group, "--graph-degree", _GRAPH.degree, "links per key")
    add_number(group, "--graph-key-neighbors", _GRAPH.key_neighbors, "links of them to nearest keys")
    add_number(group, "--graph-entry-points", _GRAPH.entry_points, "keys where a search starts, at most")
    add_number(group, "--query-share", _BUILD.query_share, "share of the context's queries sampled", kind=float)
    add_number(group, "--query-top-k", _BUILD.query_top_k, "keys kept per sampled query")
    add_number(group, "--sample-vectors", _BUILD.sample_vectors, "sampled queries per KV head to align graphs by")
    add_number(group, "--zone-tokens", _BUILD.zone_tokens, "keys per zone that estimates unretrieved keys; 0: no zones")
    group.add_argument("--key-mass", action="store_true", help="keep how much sampled queries attend each key, for h2o")
    group.add_argument("--query-vectors", action="store_true", help="keep the sampled query vectors, for vamana")
    group.add_argument("--kv-dtype", choices=("auto", *DTYPES), default=_BUILD.kv_dtype, help="stored dtype")
    for of in ("key", "value"):
        what = f"how {of}s of the index are encoded: none (as --kv-dtype), int8, or 4 or 2 bits in KIVI's groups of 32"
        group.add_argument(f"--{of}-codec", choices=CODECS, default="none", help=what)
    add_heads(group, "keep")
    group = add_resources(parser, "--prefill-actors", "--graph-actors")
    add_number(
        group, "--prefill-chunk-tokens", _BUILD.prefill_chunk_tokens, "tokens per forward pass; memory grows with it"
    )
    add_observing(parser)
    add_common(parser)


def add_answer(parser: argparse.ArgumentParser) -> None:
    """The options of `rabatch answer`."""
    parser.add_argument("questions", help=".jsonl or .parquet with question, and optionally question_id, document_id")
    add_store(parser)
    parser.add_argument(
        "--output", metavar="URL", default="answers", help="answers store; also answers.parquet and .jsonl (answers)"
    )
    parser.add_argument("--fingerprint", metavar="SHA256", help="answer from the indexes of this build only")
    add_model(parser)
    group = parser.add_argument_group("recipe")
    text = f"how to attend ({_RECIPE.method}); from {COMPARED[0]} on they are there to be compared with"
    group.add_argument("--recipe", choices=METHODS, default=_RECIPE.method, help=text)
    add_number(group, "--top-k", _RECIPE.top_k, "keys retrieved per query head")
    add_number(group, "--search-list", _RECIPE.search_list, "candidates of a search; 0: as docs/cli.md says")
    group.add_argument(
        "--budget",
        choices=("auto", "fixed", "mass", "profile", "pyramid"),
        default=_RECIPE.budget,
        help=f"how many of the top-k each head retrieves ({_RECIPE.budget})",
    )
    add_number(
        group, "--mass", _RECIPE.mass, "share of the softmax mass that budgets mass and profile keep", kind=float
    )
    group.add_argument(
        "--estimate",
        action=argparse.BooleanOptionalAction,
        default=_RECIPE.estimate,
        help="estimate keys that are not retrieved by the index's zones (where it has zones)",
    )
    text = "first layers that attend every key (2 of quest, 1 of infinigen, else 0)"
    group.add_argument("--dense-layers", type=int, metavar="N", default=_RECIPE.dense_layers, help=text)
    add_number(group, "--tail-tokens", _RECIPE.tail_tokens, "question and generated tokens attended whole")
    group.add_argument(
        "--question-attention",
        choices=("exact", "index", "auto"),
        default=_RECIPE.question_attention,
        help=f"how question tokens attend ({_RECIPE.question_attention})",
    )
    add_heads(group, "attend")
    group = parser.add_argument_group("generation (default: the model's own settings)")
    add_number(group, "--max-new-tokens", _GENERATION.max_new_tokens, "longest answer")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    group.add_argument("--temperature", type=float, help="sample with this temperature")
    group.add_argument("--top-p", type=float, help="sample from this share of the probability")
    group.add_argument("--sampling-top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    add_number(group, "--seed", _GENERATION.seed, "of sampling")
    group = add_resources(parser, "--answer-actors")
    add_number(group, "--questions-per-batch", _RESOURCES.questions_per_batch, "questions decoded together")
    add_number(
        group, "--memory-bytes", _RESOURCES.memory_bytes, "of opened indexes in an actor; 0: half of what is free"
    )
    group.add_argument("--cache-dir", metavar="DIR", help="keeps parts of a remote store (~/.cache/rabatch/parts)")
    group.add_argument(
        "--cache-bytes", type=int, metavar="N", help="of all parts in it; 0: no cache (a quarter of the free disk)"
    )
    text = "share of the searches whose recall is measured for reports and metrics"
    add_number(group, "--recall-share", _RESOURCES.recall_share, text, kind=float)
    add_observing(parser)
    add_common(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of `model_of`."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=_MODEL.name, help="hub name or path; demo: the one in the package (demo)")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--device", default=_MODEL.device, help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default=_MODEL.dtype, help="compute dtype (auto)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--context-template", metavar="TEXT", help="prompt with {document} and {question} once each, document first"
    )


def add_resources(parser: argparse.ArgumentParser, *pools: str) -> argparse._ArgumentGroup:
    """The options of what a job takes of the cluster; their group."""
    group = parser.add_argument_group("resources")
    group.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, else a local Ray")
    for name in pools:
        text = "actors, or between MIN and MAX; 0: as many as there is room for (0)"
        group.add_argument(name, type=pool, default=0, metavar="N|MIN-MAX", help=text)
    group.add_argument("--gpus-per-actor", type=float, metavar="X", help="GPUs of a model actor (1 on CUDA)")
    add_number(group, "--cpus-per-actor", _RESOURCES.cpus_per_actor, "CPUs, and threads, of an actor")
    text = "main memory that Ray reserves for an actor that runs the model; 0: none"
    add_number(group, "--actor-memory-bytes", _RESOURCES.actor_memory_bytes, text)
    group.add_argument("--max-failed-rows", type=int, metavar="N", help="stop when more rows fail (no limit)")
    return group


def add_number(group: Any, name: str, default: float, text: str, *, kind: type = int) -> None:
    group.add_argument(
        name, type=kind, default=default, metavar="N" if kind is int else "X", help=f"{text} ({default})"
    )


def build_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `rabatch.build`."""
    graph = GraphConfig(
        degree=arguments.graph_degree,
        key_neighbors=arguments.graph_key_neighbors,
        entry_points=arguments.graph_entry_points,
    )
    config = BuildConfig(
        sink_tokens=arguments.sink_tokens,
        window_tokens=arguments.window_tokens,
        index=arguments.index,
        graph=graph,
        query_share=arguments.query_share,
        query_top_k=arguments.query_top_k,
        sample_vectors=arguments.sample_vectors,
        zone_tokens=arguments.zone_tokens,
        key_mass=arguments.key_mass,
        query_vectors=arguments.query_vectors,
        prefill_chunk_tokens=arguments.prefill_chunk_tokens,
        kv_dtype=arguments.kv_dtype,
        key_codec=arguments.key_codec,
        value_codec=arguments.value_codec,
        **heads_of(arguments),
    )
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError("limit", arguments.limit, "must be at least 1")
    return {
        "config": config,
        "limit": arguments.limit,
        "report": arguments.report,
        "resources": resources_of(arguments, "prefill_actors", "graph_actors"),
        **shared_settings(arguments),
    }


def answer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `rabatch.answer`."""
    recipe = Recipe(
        method=arguments.recipe,
        top_k=arguments.top_k,
        budget=arguments.budget,
        mass=arguments.mass,
        estimate=arguments.estimate,
        tail_tokens=arguments.tail_tokens,
        dense_layers=arguments.dense_layers,
        search_list=arguments.search_list,
        question_attention=arguments.question_attention,
        **heads_of(arguments),
    )
    sampling = (arguments.temperature, arguments.top_p, arguments.sampling_top_k)
    generation = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        stop_strings=tuple(arguments.stop),
        do_sample=True if any(value is not None for value in sampling) else None,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.sampling_top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    return {
        "recipe": recipe,
        "generation": generation,
        "output": arguments.output,
        "fingerprint": arguments.fingerprint,
        "resources": resources_of(arguments, *_ANSWERING),
        **shared_settings(arguments),
    }


def model_of(arguments: argparse.Namespace) -> ModelConfig:
    """What the options of `add_model` say."""
    return ModelConfig(
        name=arguments.model,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        context_template=arguments.context_template,
    )


def shared_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "store": arguments.store,
        "storage_options": arguments.storage_options,
        "model": model_of(arguments),
        "address": arguments.address,
        "max_failed_rows": arguments.max_failed_rows,
    }


def resources_of(arguments: argparse.Namespace, *names: str) -> Resources:
    values = {name: getattr(arguments, name) for name in names}
    values |= {name: getattr(arguments, name) for name in ("gpus_per_actor", "cpus_per_actor", "actor_memory_bytes")}
    return Resources(**values)
