"""The actor that answers: the model is loaded once, an index opened once for all questions that come with it.

Ray runs two calls of an actor at the same time, each with one document. One of them decodes; the other fetches its
index, as far as the memory allows, and waits. Which document comes next to an actor only Ray knows, and it says so by
calling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rabatch.attention.layer import ContextLayer
from rabatch.available import automatic_budget
from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_each
from rabatch.jobs.catalog import failed_row
from rabatch.jobs.cluster import limit_threads
from rabatch.jobs.messages import fatal, one_row, reason
from rabatch.jobs.output import parquet_bytes
from rabatch.jobs.turns import Turn, Turns
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import LayerPool
from rabatch.records import ANSWERS
from rabatch.storage.cache import default_cache_folder
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore

CALLS = 2
"""Calls of an actor at the same time: the one that decodes, and the one whose index is fetched meanwhile."""

PARTS = "_parts"
"""Where finished batches lie in the output folder. Readers of Parquet folders pass over names that begin with ``_``."""


def part_path(key: str) -> str:
    """Where the answers of a batch lie, relative to the output folder."""
    return f"{PARTS}/{key}.parquet"


@dataclass(frozen=True)
class AnswerSettings:
    """What an answer actor needs to know.

    Attributes:
        slots: Questions of a document decoded at the same time.
        memory_bytes: Of opened indexes that an actor holds. 0: `automatic_budget`.
        sharing, sharing_card: Actors on one machine, and on one card.
        cache_dir, cache_bytes: Of parts on the actor's machine, as of `Resources`.
    """

    model: ModelConfig
    store_url: str
    storage_options: dict[str, Any]
    recipe: Recipe
    generation: GenerationSettings
    output: str | None
    threads: int
    slots: int
    memory_bytes: int
    sharing: int
    sharing_card: int
    cache_dir: str | None = None
    cache_bytes: int | None = None


class AnswerActor:
    """Rows of (document, batches of questions) in; one row per batch out, its answers as Parquet bytes.

    A finished batch is also written to the output folder, so that an interrupted job loses at most the batches under
    way. A batch with a failed question is not: the next run asks it again. It may be called from several threads.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        limit_threads(settings.threads)
        self._settings = settings
        self._fatal: str | None = None
        self._loaded: LoadedModel | None = None
        self._turns = Turns()
        try:
            self._loaded = load_model(settings.model)
            shares = {"sharing": settings.sharing, "sharing_card": settings.sharing_card}
            budget = settings.memory_bytes or automatic_budget(self._loaded.config.device, **shares)
            self._pool: LayerPool[ContextLayer] = LayerPool(budget)
        except Exception as error:  # noqa: BLE001 (raised here it would be Ray's, in fifty lines)
            self._fatal = fatal(error, settings.model)
        self._store = IndexStore(
            settings.store_url,
            storage_options=settings.storage_options,
            cache=settings.cache_dir or default_cache_folder(),
            cache_bytes=settings.cache_bytes,
        )
        self._output = None if settings.output is None else Folder(settings.output, **settings.storage_options)
        limit_threads(settings.threads)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            if self._loaded is None:
                yield one_row({"key": "", "answers": b"", "fatal": self._fatal})
                return
            manifest = Manifest.from_json(row["manifest"])
            with self._turns.queue() as turn:
                for key, answers in self._answer(turn, self._loaded, manifest, json.loads(row["batches"])):
                    data = parquet_bytes(answers, ANSWERS)
                    if self._output is not None and all(answer["status"] == "ok" for answer in answers):
                        self._output.write(part_path(key), data)
                    yield one_row({"key": key, "answers": data, "fatal": None})

    def _answer(
        self, turn: Turn, loaded: LoadedModel, manifest: Manifest, batches: list[dict[str, Any]]
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Key and answers of each batch. As a question of one ends, the next of another begins."""
        settings = self._settings
        places = [(number, place) for number, batch in enumerate(batches) for place in range(len(batch["questions"]))]
        questions = [batches[number]["questions"][place] for number, place in places]
        rows: list[dict[int, dict[str, Any]]] = [{} for _ in batches]

        def complete(number: int) -> tuple[str, list[dict[str, Any]]]:
            return batches[number]["key"], [rows[number][place] for place in sorted(rows[number])]

        try:
            turn.wait_to_prepare()
            where = (self._store, manifest, loaded, settings.recipe)
            with open_context(*where, threads=settings.threads, pool=self._pool, ahead=True) as context:
                turn.wait()
                context.load()
                turn.settle()
                for question, row in answer_each(
                    context, questions, settings.recipe, settings.generation, slots=settings.slots
                ):
                    number, place = places[question]
                    rows[number][place] = row
                    if len(rows[number]) == len(batches[number]["questions"]):
                        yield complete(number)
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            why: dict[str, Any] = {"reason": reason(error), "recipe": settings.recipe, "model": settings.model}
            for number, batch in enumerate(batches):
                if len(rows[number]) < len(batch["questions"]):
                    for place, question in enumerate(batch["questions"]):
                        failed = failed_row(question, document_id=manifest.document_id, manifest=manifest, **why)
                        rows[number].setdefault(place, failed)
                    yield complete(number)
