"""Evaluate: what sparse attention costs in accuracy, per task, length and recipe.

Contexts are documents: `build` prefills each once, into one store whose index serves all recipes; `answer` asks all
questions once per recipe, each recipe into an answers store of its own. Killed and run again into the same folder, an
evaluation repeats nothing that is committed.

    python -m rabatch.jobs.evaluate --recipes dense,streaming,graph
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.errors import SourceError
from rabatch.evaluation.files import csv_rows, file_contexts
from rabatch.evaluation.metrics import Cell, Key, cells_of, over_tasks
from rabatch.evaluation.page import page
from rabatch.evaluation.predictions import PREDICTIONS, prediction, refused
from rabatch.evaluation.questions import Asked, Question, task_contexts
from rabatch.evaluation.recipes import Recipes, build_for, named_recipes
from rabatch.evaluation.stored import built_bytes, needed_bytes
from rabatch.evaluation.summary import markdown, table_lines
from rabatch.exporting import Export
from rabatch.jobs import cluster
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import AnswerResult, BuildResult, failure_lines
from rabatch.jobs.rows import content_sha256, read_unit
from rabatch.jobs.run import may_be_asked
from rabatch.jobs.settings import model_settings
from rabatch.jobs.sources import JSONL, PARQUET, Source, list_units
from rabatch.models import load_tokenizer
from rabatch.storage.answers import AnswerStore
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Geometry, fingerprint_of
from rabatch.storage.store import IndexStore

TASKS = ("niah_multikey_1", "niah_multikey_3", "vt")
LENGTHS = (2048,)
RECIPES = ("dense", "streaming", "graph")
GREEDY = GenerationSettings(do_sample=False)
RECALL_SHARE = 0.02
_RECALL = "recall.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The outcome of an evaluation.

    Args:
        cells: Per task, length and recipe, in that order.
        means: Per length and recipe, over tasks.
        recipes: By name.
        asked, reused: Answers of this run, and of earlier runs into the same folder.
        failed: Questions without an answer, over all recipes.
        failed_documents: Contexts that could not be built.
        seconds: Wall time: ``contexts`` (made or read), ``build``, ``answer`` by recipe, ``all``.
        folder: URL of what was written.
        predictions: Rows of `rabatch.evaluation.predictions.PREDICTIONS`.
    """

    cells: list[Cell]
    means: list[Cell]
    recipes: dict[str, Recipe]
    asked: int
    reused: int
    failed: int
    failed_documents: int
    seconds: dict[str, Any]
    folder: str
    settings: dict[str, Any]
    first_failures: tuple[str, ...] = ()
    predictions: list[dict[str, Any]] = field(repr=False)

    @property
    def exit_code(self) -> int:
        """0: every question is answered by every recipe; 1: some failed."""
        return 1 if self.failed or self.failed_documents else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the predictions: those are in ``predictions.parquet``."""
        return {
            "cells": [cell.to_dict() for cell in self.cells],
            "means": [cell.to_dict() for cell in self.means],
            "recipes": {name: recipe.to_dict() for name, recipe in self.recipes.items()},
            "asked": self.asked,
            "reused": self.reused,
            "failed": self.failed,
            "failed_documents": self.failed_documents,
            "failures": list(self.first_failures),
            "settings": self.settings,
            "seconds": self.seconds,
            "folder": self.folder,
            "exit_code": self.exit_code,
        }

    def summary(self) -> list[str]:
        """The last lines of the command."""
        lines = [*failure_lines(self.first_failures, self.failed), *table_lines(self.cells, self.means)]
        counts = f"asked {self.asked}, reused {self.reused}, failed {self.failed} in {self.seconds['all']:.1f} s"
        return [*lines, "", f"{counts}; {self.folder}/report.html"]


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
    clock = _Clock()
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
    recall = _Recall(folder)
    results: dict[str, AnswerResult] = {}
    for number, (name, recipe) in enumerate(named.items(), 1):
        _say(f"recipe {name} ({number} of {len(named)})", progress)
        observer.told_recall = recall.of(places[name])
        try:
            results[name] = answer(
                asked_rows,
                recipe=recipe,
                generation=generation,
                output=places[name],
                export=False,
                fingerprint=built.fingerprint,
                documents=may_be_asked(built),
                **shared,
            )
        finally:
            observer.told_recall = None
            recall.write()
        clock.lap("answer", name)
    predictions = list(_predictions(questions, results))
    sizes = _Sizes(made, built, build_config, IndexStore(shared["store"], storage_options=options))
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
    _write(folder, result)
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


class _Clock:
    """Seconds of the steps, one after the other."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, Any] = {}

    def lap(self, step: str, part: str | None = None) -> None:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        if part is None:
            self._laps[step] = spent
        else:
            self._laps.setdefault(step, {})[part] = spent

    def all(self) -> dict[str, Any]:
        return {**self._laps, "all": time.perf_counter() - self._began}


class _Recall:
    """Recall of the searches that were looked at, by answers store and document, kept in the folder between runs."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        try:
            self._seen: dict[str, dict[str, list[float]]] = json.loads(folder.read(_RECALL))
        except MissingFileError:
            self._seen = {}

    def of(self, place: str) -> Any:
        """What an observer tells the recall of one recipe's searches."""
        seen = self._seen.setdefault(place.rsplit("/", 1)[-1], {})

        def told(document_id: str, recall: Sequence[float]) -> None:
            count, total = seen.get(document_id, (0, 0.0))
            seen[document_id] = [count + len(recall), total + sum(recall)]

        return told

    def write(self) -> None:
        self._folder.write(_RECALL, json.dumps(self._seen).encode())

    def by_cell(self, places: Mapping[str, str], questions: Sequence[Question]) -> dict[Key, tuple[int, float]]:
        """Searches, and the sum of their recall."""
        cells = {(question.task, question.length, question.document_id) for question in questions}
        found: dict[Key, tuple[int, float]] = {}
        for name, place in places.items():
            seen = self._seen.get(place.rsplit("/", 1)[-1], {})
            for task, length, document_id in cells:
                count, total = seen.get(document_id or "", (0, 0.0))
                before = found.get((task, length, name), (0, 0.0))
                found[task, length, name] = (before[0] + int(count), before[1] + total)
        return found


class _Sizes:
    """Bytes that each recipe needs, of the documents of each cell."""

    def __init__(self, made: Sequence[Asked], built: BuildResult, config: BuildConfig, store: IndexStore) -> None:
        self._config = config
        rows = {row["document_id"]: row for row in built.rows if row["status"] != "failed"}
        self._cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        self._geometry: Geometry | None = None
        for asked in made:
            row = rows.get(asked.document_id)
            if row is None:
                continue
            if self._geometry is None:
                manifest = store.get(asked.document_id, content_sha256(asked.text), built.fingerprint)
                self._geometry = None if manifest is None else manifest.geometry
            for question in asked.questions:
                self._cells.setdefault((question.task, question.length), {})[asked.document_id] = row

    def per_token(self, recipes: Mapping[str, Recipe]) -> dict[Key, float]:
        """By the arithmetic of what is stored, in proportion to what really is."""
        found: dict[Key, float] = {}
        if self._geometry is None:
            return found
        for (task, length), rows in self._cells.items():
            tokens = [row["context_tokens"] for row in rows.values()]
            about = (tokens, self._geometry, self._config)
            scale = sum(row["stored_bytes"] for row in rows.values()) / built_bytes(*about)
            for name, recipe in recipes.items():
                found[task, length, name] = scale * needed_bytes(recipe, *about) / sum(tokens)
        return found


def _write(folder: Folder, result: EvaluationResult) -> None:
    for name in ("predictions.parquet", "predictions.csv"):
        with Export(folder, name, PREDICTIONS) as export:
            export.add(result.predictions)
    folder.write("metrics.json", (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    folder.write("report.md", markdown(result.cells, result.means, result.settings).encode())
    folder.write("report.html", page(result.cells, result.means, result.predictions, result.settings))


def _say(text: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(f"evaluate: {text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("evaluate"))
