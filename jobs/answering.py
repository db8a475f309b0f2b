"""The actor that answers: the model is loaded once, an index opened once for all questions that come with it.

Ray runs two calls of an actor at the same time, each with one document. One of them decodes; the other fetches its
index, as far as the memory allows, and waits. Which document comes next to an actor only Ray knows, and it says so by
calling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rabatch.attention.layer import ContextLayer
from rabatch.attention.recall import RecallSampler
from rabatch.available import automatic_budget
from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_each
from rabatch.errors import StoreError
from rabatch.jobs.catalog import Stored, failed_row
from rabatch.jobs.cluster import limit_threads
from rabatch.jobs.messages import fatal, one_row, reason
from rabatch.jobs.results import Tally
from rabatch.jobs.turns import Turn, Turns
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import LayerPool
from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerStore, encode
from rabatch.storage.cache import default_cache_folder
from rabatch.storage.store import IndexStore

CALLS = 2
"""Calls of an actor at the same time: the one that decodes, and the one whose index is fetched meanwhile."""

SEEN = ("seconds", "answer_tokens", "attended_share")
"""What the driver's observer is told of each answer."""


@dataclass(frozen=True)
class AnswerSettings:
    """What an answer actor needs to know.

    Attributes:
        recipes: A row says by number which of them its questions are asked with.
        answers_urls: Of each one's answers store, where finished batches are kept. None: they go to the driver.
        slots: Questions of a document decoded at the same time.
        memory_bytes: Of opened indexes that an actor holds. 0: `automatic_budget`.
        sharing, sharing_card: Actors on one machine, and on one card.
        cache_dir, cache_bytes: Of parts on the actor's machine, as of `Resources`.
        recall_share: As of `Resources`.
    """

    model: ModelConfig
    store_url: str
    storage_options: dict[str, Any]
    recipes: tuple[Recipe, ...]
    generation: GenerationSettings
    answers_urls: tuple[str | None, ...]
    threads: int
    slots: int
    memory_bytes: int
    sharing: int
    sharing_card: int
    cache_dir: str | None = None
    cache_bytes: int | None = None
    recall_share: float = 0.0


class AnswerActor:
    """Rows of (recipe, document, batches of questions) in; one row per batch out: what became of it, and without an
    answers store its answers, as Parquet bytes.

    A finished batch is kept in the answers store, so that an interrupted job loses at most the batches under way. It
    may be called from several threads.
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
        self._answers = [
            None if url is None else AnswerStore(url, storage_options=settings.storage_options)
            for url in settings.answers_urls
        ]
        limit_threads(settings.threads)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            if self._loaded is None:
                yield one_row({"fatal": self._fatal})
                return
            index, number = Stored(*json.loads(row["index"])), row["recipe"]
            asked = self._settings.recipes[number], json.loads(row["batches"])
            recall = RecallSampler(self._settings.recall_share) if self._settings.recall_share else None
            with self._turns.queue() as turn:
                for batch, answers in self._answer(turn, self._loaded, index, *asked, recall):
                    samples = [] if recall is None else recall.take()
                    told = {"recipe": number, "recall": json.dumps(samples)}
                    yield one_row({**self._keep(number, index, batch, answers), **told})

    def _keep(self, number: int, index: Stored, batch: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
        """Put a finished batch where it is safe; what the driver is told of it."""
        rows = [
            {**answer, "content_sha256": index.content_sha256, "answer_key": key}
            for answer, key in zip(answers, batch["keys"], strict=True)
        ]
        failed = [[place, row["reason"]] for place, row in enumerate(rows) if row["status"] != "ok"]
        table, data = pa.Table.from_pylist(rows, STORED_ANSWERS), b""
        store = self._answers[number]
        if store is None:
            data = encode(table)
        elif len(failed) < len(rows):
            try:
                store.put_pending(batch["name"], table)
            except StoreError as error:
                failed = [[place, f"its answer cannot be kept: {reason(error)}"] for place in range(len(rows))]
                answers = []
        seen = [[row[name] for name in SEEN] for row in answers if row["status"] == "ok"]
        told = {"failed": json.dumps(failed), "tally": Tally.of(answers).to_json(), "seen": json.dumps(seen)}
        return {"name": batch["name"], "answers": data, **told, "fatal": None}

    def _answer(
        self,
        turn: Turn,
        loaded: LoadedModel,
        index: Stored,
        recipe: Recipe,
        batches: list[dict[str, Any]],
        recall: RecallSampler | None,
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each batch and its answers. As a question of one ends, the next of another begins."""
        settings = self._settings
        places = [(number, place) for number, batch in enumerate(batches) for place in range(len(batch["questions"]))]
        questions = [batches[number]["questions"][place] for number, place in places]
        rows: list[dict[int, dict[str, Any]]] = [{} for _ in batches]

        def complete(number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            done, rows[number] = rows[number], {}
            return batches[number], [done[place] for place in sorted(done)]

        open_batches = set(range(len(batches)))
        try:
            turn.wait_to_prepare()
            manifest = self._store.get(index.document_id, index.content_sha256, index.fingerprint)
            if manifest is None:
                raise StoreError("document_id", index.document_id, "its index was withdrawn meanwhile; run again")
            where = (self._store, manifest, loaded, recipe)
            with open_context(*where, threads=settings.threads, pool=self._pool, ahead=True) as context:
                turn.wait()
                context.load()
                turn.settle()
                asked = dataclasses.replace(context, recall=recall)
                for question, row in answer_each(asked, questions, recipe, settings.generation, slots=settings.slots):
                    number, place = places[question]
                    rows[number][place] = row
                    if len(rows[number]) == len(batches[number]["questions"]):
                        open_batches.discard(number)
                        yield complete(number)
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            why: dict[str, Any] = {"reason": reason(error), "recipe": recipe, "model": settings.model}
            for number in sorted(open_batches):
                for place, question in enumerate(batches[number]["questions"]):
                    failed = failed_row(question, document_id=index.document_id, index=index, **why)
                    rows[number].setdefault(place, failed)
                yield complete(number)
