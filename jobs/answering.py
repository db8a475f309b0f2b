"""The actor that answers: the model is loaded once, an index opened once for all questions that come with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.decode import OpenContext, answer_batch, open_context
from rabatch.jobs.catalog import failed_row
from rabatch.jobs.cluster import limit_threads
from rabatch.jobs.messages import fatal, one_row, reason
from rabatch.jobs.output import parquet_bytes
from rabatch.loading import LoadedModel, load_model
from rabatch.records import ANSWERS
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore

PARTS = "_parts"
"""Where finished batches lie in the output folder. Readers of Parquet folders pass over names that begin with ``_``."""


def part_path(key: str) -> str:
    """Where the answers of a batch lie, relative to the output folder."""
    return f"{PARTS}/{key}.parquet"


@dataclass(frozen=True)
class AnswerSettings:
    """What an answer actor needs to know."""

    model: ModelConfig
    store_url: str
    storage_options: dict[str, Any]
    recipe: Recipe
    generation: GenerationSettings
    output: str | None
    threads: int


class AnswerActor:
    """Rows of (document, batches of questions) in; one row per batch out, its answers as Parquet bytes.

    A finished batch is also written to the output folder, so that an interrupted job loses at most the batches under
    way. A batch with a failed question is not: the next run asks it again.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        limit_threads(settings.threads)
        self._settings = settings
        self._fatal: str | None = None
        self._loaded: LoadedModel | None = None
        self._context: OpenContext | None = None
        try:
            self._loaded = load_model(settings.model)
        except Exception as error:  # noqa: BLE001 (raised here it would be Ray's, in fifty lines)
            self._fatal = fatal(error, settings.model)
        self._store = IndexStore(settings.store_url, storage_options=settings.storage_options)
        self._output = None if settings.output is None else Folder(settings.output, **settings.storage_options)
        limit_threads(settings.threads)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            if self._loaded is None:
                yield one_row({"key": "", "answers": b"", "fatal": self._fatal})
                return
            manifest = Manifest.from_json(row["manifest"])
            for batch in json.loads(row["batches"]):
                answers = self._answer(self._loaded, manifest, batch["questions"])
                data = parquet_bytes(answers, ANSWERS)
                if self._output is not None and all(answer["status"] == "ok" for answer in answers):
                    self._output.write(part_path(batch["key"]), data)
                yield one_row({"key": batch["key"], "answers": data, "fatal": None})

    def _answer(self, loaded: LoadedModel, manifest: Manifest, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        settings = self._settings
        try:
            if self._context is None or self._context.manifest != manifest:
                self._context = None  # two contexts at once may be more than the memory holds
                self._context = open_context(self._store, manifest, loaded, settings.recipe, threads=settings.threads)
            return answer_batch(self._context, questions, settings.recipe, settings.generation)
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            why: dict[str, Any] = {"reason": reason(error), "recipe": settings.recipe, "model": settings.model}
            return [failed_row(q, document_id=manifest.document_id, manifest=manifest, **why) for q in questions]
