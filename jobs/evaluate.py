"""Evaluate: what sparse attention costs in accuracy, per task, length and recipe.

Contexts are documents: `build` prefills each once, into one store whose index serves all recipes; then the same actors
ask all questions once per recipe, each recipe into an answers store of its own. Killed and run again into the same
folder, an evaluation repeats nothing that is committed.

    python -m rabatch.jobs.evaluate --recipes dense,streaming,graph
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.errors import SourceError
from rabatch.evaluation.files import csv_rows, file_contexts
from rabatch.evaluation.metrics import cells_of, over_tasks
from rabatch.evaluation.predictions import prediction, refused
from rabatch.evaluation.questions import Asked, Question, task_contexts
from rabatch.evaluation.recipes import Recipes, build_for, named_recipes
from rabatch.jobs import cluster
from rabatch.jobs.answer import answer_with
from rabatch.jobs.build import build
from rabatch.jobs.evaluated import Clock, EvaluationResult, Recall, Sizes
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import AnswerResult, BuildResult
from rabatch.jobs.rows import read_unit
from rabatch.jobs.run import may_be_asked
from rabatch.jobs.settings import model_settings
from rabatch.jobs.sources import JSONL, PARQUET, Source, list_units
from rabatch.models import load_tokenizer
from rabatch.storage.answers import AnswerStore
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import fingerprint_of
from rabatch.storage.store import IndexStore

TASKS = ("niah_multikey_1", "niah_multikey_3", "vt")
LENGTHS = (2048,)
RECIPES = ("dense", "streaming", "graph")
GREEDY = GenerationSettings(do_sample=False)
RECALL_SHARE = 0.02


def evaluate(
    *,
    out: str | os.PathLike[str] = "evaluation",
    model: ModelConfig | str | None = None,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    recipes: Recipes = RECIPES,
    heads: Mapping[str, Any] | None = None,
    data: Source | None = None,
    samples: int = 50,
    questions_per_context: int = 5,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    config: BuildConfig | None = None,
    generation: GenerationSettings | None = None,
    resources: Resources | None = None,
    address: str | None = None,
    storage_options: dict[str, Any] | None = None,
    max_failed_rows: int | None = None,
    progress: bool = True,
    observer: Observer | None = None,
) -> EvaluationResult:
    """Ask the same questions with every recipe, from contexts that are prefilled once.

    Args:
        out: Folder of everything that is written, a path or fsspec URL. The same one again: what is there is used.
        model: Settings, or a hub name or path. The default is the demo model.
        tasks: Of `rabatch.evaluation.tasks.TASKS`. None: a few, or with `data` none.
        lengths: Of the tasks' contexts, in tokens of the model.
        recipes: As of `rabatch.evaluation.recipes.named_recipes`.
        heads: What ``duo+`` stands for, likewise.
        data: Questions of one's own: a path or URL (.csv, .jsonl, .parquet), or as of `rabatch.answer`, with the
            columns of `rabatch.evaluation.files`.
        samples: Questions of each task and length.
        questions_per_context: Of one context, where its task has as many.
        seed: Of the contexts.
        store: Path or URL of the index store. None: in `out`.
        config: What is stored of a context. What a recipe needs beyond it is added.
        generation: Overrides of the model's own generation settings. None: greedy.
        resources: Actors, their CPUs, GPUs and memory. None: the defaults, and a sample of the searches is looked at.
        address: Of a Ray cluster. None: an embedded Ray.
        storage_options: Of fsspec, for all places.
        max_failed_rows: Of documents, and of questions of one recipe; more stop the run. What is committed stays.
        progress: Bars on stderr, or lines now and then where that is no terminal.
        observer: Is told what becomes of each document and question. None: one of this call's own, with `progress`.

    Raises:
        FailedRowsError: More than `max_failed_rows` failed.
        RabatchError: The evaluation as a whole cannot run.
    """
    clock = Clock()
    named = named_recipes(recipes, heads)
    settings = model_settings(model)
    options = dict(storage_options or {})
    resources = resources or Resources(recall_share=RECALL_SHARE)
    generation = generation or GREEDY
    build_config = build_for(named, config)
    if tasks is None:
        tasks = TASKS if data is None else ()
    made: list[Asked] = []
    if tasks or data is None:
        counter = None if settings.name == "demo" else _counter(settings)
        about: dict[str, Any] = {"samples": samples, "questions_per_context": questions_per_context, "seed": seed}
        made += task_contexts(tasks, lengths, **about, count_tokens=counter)
    folder = Folder(cluster.worker_url(out, "out"), **options)
    places = {name: f"{folder.url}/answers/{_slug(name, recipe)}" for name, recipe in named.items()}
    for place in places.values():  # what cannot be written must fail now, not after hours of building
        AnswerStore(place, create=True, storage_options=options)
    cluster.connect(address)
    if data is not None:
        made += file_contexts(_rows_of(data, options))
    questions = [question for asked in made for question in asked.questions]
    asked_rows = [question.row() for question in questions if question.error is None]
    clock.lap("contexts")
    observer = observer or Observer(progress=progress)
    shared: dict[str, Any] = {
        "store": f"{folder.url}/index" if store is None else cluster.worker_url(store, "store"),
        "model": settings,
        "resources": resources,
        "address": address,
        "storage_options": options,
        "max_failed_rows": max_failed_rows,
        "observer": observer,
    }
    documents = [{"document_id": asked.document_id, "text": asked.text} for asked in made if asked.text]
    told = f"{len(documents):,} contexts, {len(asked_rows):,} questions, {len(named)} recipes"
    _say(told, progress)
    built = build(documents, config=build_config, **shared)
    clock.lap("build")
    recall = Recall(folder, list(places.values()))
    observer.told_recall = recall.told
    try:
        asked_with = [(recipe, places[name]) for name, recipe in named.items()]
        answered = answer_with(
            asked_with,
            asked_rows,
            generation=generation,
            export=False,
            fingerprint=built.fingerprint,
            documents=may_be_asked(built),
            **shared,
        )
    finally:
        observer.told_recall = None
        recall.write()
    clock.lap("answer")
    results = dict(zip(named, answered, strict=True))
    predictions = list(_predictions(questions, results))
    sizes = Sizes(made, built, build_config, IndexStore(shared["store"], storage_options=options))
    cells = cells_of(predictions, stored=sizes.per_token(named), recall=recall.by_cell(places, questions))
    result = EvaluationResult(
        cells=cells,
        means=over_tasks(cells),
        recipes=named,
        asked=sum(result.answered - result.reused for result in results.values()),
        reused=sum(result.reused for result in results.values()),
        failed=sum(row["status"] != "ok" for row in predictions),
        failed_documents=built.failed,
        seconds=clock.all(),
        folder=folder.url,
        settings={
            **{"model": settings.to_dict(), "build": build_config.to_dict(), "generation": generation.to_dict()},
            **{"tasks": list(tasks), "lengths": list(lengths), "samples": samples, "seed": seed},
            **{"questions_per_context": questions_per_context, "fingerprint": built.fingerprint},
            "data": os.fspath(data) if isinstance(data, str | os.PathLike) else data and type(data).__name__,
        },
        first_failures=_first_failures(built, predictions),
        predictions=predictions,
    )
    result.write(folder)
    return result


def _counter(settings: ModelConfig) -> Any:
    tokenizer = load_tokenizer(settings)
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _slug(name: str, recipe: Recipe) -> str:
    """A folder's name that says which recipe it is of; of another recipe by the same name it is another."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "+-.") else "_" for c in name)[:40]
    return f"{plain}-{fingerprint_of({'name': name, 'recipe': recipe.deciding_fields()})[:8]}"


def _rows_of(data: Source, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
    """Where each row stands, its columns, and why there are none."""
    if isinstance(data, str | os.PathLike) and os.fspath(data).lower().endswith(".csv"):
        url = cluster.worker_url(data, "data")
        try:
            how = {"mode": "rt", "encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
            with fsspec.open(url, **how, **options) as file:
                yield from csv_rows(file, url.rsplit("/", 1)[-1])
        except OSError as error:
            raise SourceError("data", url, f"cannot be read: {error}") from error
        return
    units = list_units(data, field="data", storage_options=options, suffixes=JSONL + PARQUET)
    for unit in units.units:
        for record in read_unit(units, unit):
            yield record.source, record.values, record.error


def _predictions(questions: Sequence[Question], results: Mapping[str, AnswerResult]) -> Iterator[dict[str, Any]]:
    by_id = {question.question_id: question for question in questions}
    faulty = [question for question in questions if question.error is not None]
    for name, result in results.items():
        for rows in result.read_rows():
            for row in rows:
                yield prediction(name, by_id[row["question_id"]], row)
        yield from refused(name, faulty)


def _first_failures(built: BuildResult, predictions: list[dict[str, Any]]) -> tuple[str, ...]:
    shown = [f"{r['question_id']} ({r['recipe']}): {r['reason']}" for r in predictions if r["status"] != "ok"]
    return (*built.first_failures(), *shown[:5])[:5]


def _say(text: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(f"evaluate: {text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("evaluate"))
