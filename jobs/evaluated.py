"""What an evaluation comes to: its result and files, seconds, recall of its searches, bytes of each recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rabatch.config import BuildConfig, Recipe
from rabatch.evaluation.metrics import Cell, Key
from rabatch.evaluation.page import page
from rabatch.evaluation.predictions import PREDICTIONS
from rabatch.evaluation.questions import Asked, Question
from rabatch.evaluation.stored import built_bytes, needed_bytes
from rabatch.evaluation.summary import markdown, table_lines
from rabatch.exporting import Export
from rabatch.jobs.results import BuildResult, failure_lines
from rabatch.jobs.rows import content_sha256
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Geometry
from rabatch.storage.store import IndexStore

RECALL_FILE = "recall.json"


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
        seconds: Wall time: ``contexts`` (made or read), ``build``, ``answer``, ``all``.
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
    seconds: dict[str, float]
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

    def write(self, folder: Folder) -> None:
        """Predictions, metrics, tables and the page, into a folder."""
        for name in ("predictions.parquet", "predictions.csv"):
            with Export(folder, name, PREDICTIONS) as export:
                export.add(self.predictions)
        folder.write("metrics.json", (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        folder.write("report.md", markdown(self.cells, self.means, self.settings).encode())
        folder.write("report.html", page(self.cells, self.means, self.predictions, self.settings))


class Clock:
    """Seconds of the steps, one after the other."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self._laps[step], self._last = now - self._last, now

    def all(self) -> dict[str, float]:
        return {**self._laps, "all": time.perf_counter() - self._began}


class Recall:
    """Recall of the searches that were looked at, by answers store and document, kept in the folder between runs.

    Args:
        places: URLs of the answers stores, one per recipe.
    """

    def __init__(self, folder: Folder, places: Sequence[str]) -> None:
        self._folder = folder
        self._names = [place.rsplit("/", 1)[-1] for place in places]
        try:
            self._seen: dict[str, dict[str, list[float]]] = json.loads(folder.read(RECALL_FILE))
        except MissingFileError:
            self._seen = {}

    def told(self, recipe: int, document_id: str, recall: Sequence[float]) -> None:
        """Enter the recall of searches of a recipe, by its number."""
        seen = self._seen.setdefault(self._names[recipe], {})
        count, total = seen.get(document_id, (0, 0.0))
        seen[document_id] = [count + len(recall), total + sum(recall)]

    def write(self) -> None:
        self._folder.write(RECALL_FILE, json.dumps(self._seen).encode())

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


class Sizes:
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
