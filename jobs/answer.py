"""Answer: questions in, one row per question and document out.

The driver joins questions and indexes into pairs, and leaves out those that the answers store has an answer to. Each
document's questions go to one actor, which opens the index once. Killed and run again into the same answers store, it
asks only what is not answered yet.

    python -m rabatch.jobs.answer questions.jsonl --store index/ --output answers/
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import ray.data

from rabatch.config import GenerationSettings, Method, ModelConfig, Recipe, Resources
from rabatch.exporting import write_windows
from rabatch.fingerprint import check_heads, model_fields
from rabatch.jobs import cluster
from rabatch.jobs.answering import CALLS, AnswerActor, AnswerSettings
from rabatch.jobs.asking import Asked
from rabatch.jobs.catalog import Batch, Catalog, batches_of, chunks, join, read_entries
from rabatch.jobs.messages import raise_fatal
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import AnswerResult, Failures, Tally
from rabatch.jobs.rows import question_of, read_unit
from rabatch.jobs.settings import model_settings, resolved_model, weights_bytes
from rabatch.jobs.sources import JSONL, PARQUET, Source, list_units
from rabatch.models import geometry_of, read_config
from rabatch.storage.answers import AnswerKeys, AnswerStore
from rabatch.storage.manifest import fingerprint_of
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import digest_of


def answer(
    questions: Source,
    *,
    store: str | os.PathLike[str],
    model: ModelConfig | str | None = None,
    recipe: Recipe | Method | None = None,
    generation: GenerationSettings | None = None,
    output: str | os.PathLike[str] | None = None,
    export: bool = True,
    resources: Resources | None = None,
    address: str | None = None,
    storage_options: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    documents: Mapping[str, str | None] | None = None,
    definition_sha256: str | None = None,
    max_failed_rows: int | None = None,
    progress: bool = True,
    observer: Observer | None = None,
) -> AnswerResult:
    """Ask every question of its document; one without a document of every document in the store.

    Args:
        questions: A path or fsspec URL (.jsonl, .parquet), a `ray.data.Dataset`, a `pyarrow.Table` or a list of dicts,
            with `question`, and optionally `question_id`, `document_id`, `expected`, `answer_prefix` (how the answer
            begins; the prompt ends with it) and `max_new_tokens` (longest answer to this question).
        store: Path or fsspec URL of the index store.
        model: Settings, or a hub name or path; must be the one the store was built with.
        recipe: How the context is attended, or the name of a method.
        generation: Overrides of the model's own generation settings.
        output: Path or URL of the answers store. What it answers already is not asked again, and what is new is
            committed as one run. None: only the result, which then holds all answers in memory.
        export: Also write this call's rows to ``answers.parquet`` and ``answers.jsonl`` there.
        resources: Actors, their CPUs, GPUs and memory, questions decoded together, the cache of parts.
        address: Of a Ray cluster. None: an embedded Ray.
        storage_options: Of fsspec, for `questions`, `store` and `output`.
        fingerprint: Answer from these indexes only. None: of each document the newest of this model.
        documents: Ids of the documents that may be asked, each with the reason why it may not be after all, or None.
            By default all of the store.
        definition_sha256: What the run is said to be of. None: model, recipe and generation settings.
        max_failed_rows: Stop when more rows fail.
        progress: A bar over questions on stderr, or a line now and then where that is no terminal.
        observer: Is told what becomes of each question. None: one of this call's own, with `progress`.

    Returns:
        Counts, and the rows in the order of the questions, then of the document ids. A question that cannot be answered
        is a row with status ``failed`` and the reason.

    Raises:
        FailedRowsError: More than `max_failed_rows` failed. What is answered is kept for the next run.
        RabatchError: The job as a whole cannot run: no such questions, model or store.
    """
    began = time.perf_counter()
    recipe = Recipe(method=recipe) if isinstance(recipe, str) else recipe or Recipe()
    generation, resources = generation or GenerationSettings(), resources or Resources()
    options = dict(storage_options or {})
    settings = model_settings(model)
    model_fields(resolved_model(settings, has_cuda=False))  # a missing model is found before Ray starts
    check_heads(recipe, geometry_of(read_config(settings)))
    index = IndexStore(cluster.worker_url(store, "store"), storage_options=options)
    answers = None  # an output that cannot be written must fail now, not after hours
    if output is not None:
        answers = AnswerStore(cluster.worker_url(output, "output"), create=True, storage_options=options)
    connected = cluster.connect(address)
    units = list_units(questions, field="questions", storage_options=options, suffixes=JSONL + PARQUET)
    asked = [question_of(record) for unit in units.units for record in read_unit(units, unit)]
    settings = resolved_model(settings, has_cuda=connected.gpus > 0)
    said: dict[str, Any] = {"recipe": recipe.deciding_fields(), "generation": generation.to_dict()}
    keys = AnswerKeys({**said, "context_template": settings.context_template})
    said["model"] = settings.to_dict()
    observer = observer or Observer(progress=progress)
    about = {"model": settings, "recipe": recipe, "generation": generation, "resources of answering": resources}
    observer.begin("answer", places={"questions": questions, "store": store, "answers": output}, settings=about)
    failures = Failures("questions", max_failed_rows, observer.failed)
    job = _join(asked, index, settings, keys, recipe, fingerprint, documents, answers, failures)
    reused = job.find_answered()
    observer.known("reused", reused)
    batches = batches_of(job.pairs, job.open_pairs(), questions_per_batch=resources.questions_per_batch)
    gpus = cluster.gpus_per_actor(resources, settings.device)
    memory = cluster.actor_memory(resources, weights_bytes(settings))
    with observer.working(sum(len(batch.pairs) for batch in batches)):
        while batches:
            dead, connected = cluster.dead_machines(), cluster.connect(address)
            pool = cluster.answer_pool(resources, connected, n_rows=len(batches), gpus=gpus, memory=memory)
            actor = AnswerSettings(
                model=settings,
                store_url=index.url,
                storage_options=options,
                recipe=recipe,
                generation=generation,
                answers_url=None if answers is None else answers.url,
                threads=resources.cpus_per_actor,
                slots=resources.questions_per_batch,
                memory_bytes=resources.memory_bytes,
                sharing=math.ceil(pool.most / connected.machines),
                sharing_card=int(1 // gpus) if 0 < gpus < 1 else 1,
                cache_dir=_cache_folder(resources.cache_dir),
                cache_bytes=resources.cache_bytes,
                recall_share=resources.recall_share,
            )
            for batch, told in _run(batches, job, actor, pool, gpus=gpus, memory=memory.reserved):
                failed, tally = json.loads(told["failed"]), Tally.from_json(told["tally"])
                if job.take(batch, failed=failed, tally=tally, data=told["answers"]):
                    seen, recall = json.loads(told["seen"]), json.loads(told["recall"])
                    of = {"document_id": batch.stored.document_id, "fingerprint": batch.stored.fingerprint}
                    observer.answered(seen, **of, recall=recall)
            lost = job.open_pairs()
            batches = []
            if lost and cluster.lost_machine_since(dead):  # what it has taken with it is asked again
                batches = batches_of(job.pairs, lost, questions_per_batch=resources.questions_per_batch)
    for number in job.open_pairs():
        reason = f"its worker died {cluster.TASK_RETRIES + 1} times, perhaps out of memory; use fewer actors, or "
        job.fail(number, reason + "smaller questions_per_batch, then run again")
    run = job.commit(
        definition_sha256=definition_sha256 or fingerprint_of(said),
        settings=said,
        reused=reused,
        seconds=time.perf_counter() - began,
    )
    if answers is not None and export:
        write_windows(answers.folder, "answers", job.windows())
    tally, failed = job.tally, job.failures
    judged = sum(q["expected"] is not None for q in job.all_questions())
    return AnswerResult(
        answered=tally.answered,
        failed=failed.count,
        reused=reused,
        superseded=job.superseded,
        exact_match=tally.matched / judged if judged else None,
        attended_share=tally.share_sum / tally.shares if tally.shares else None,
        seconds=time.perf_counter() - began,
        output=None if output is None else os.fspath(output),
        run=run,
        first_failures=tuple(failed.first),
        read_rows=job.windows,
    )


def _join(
    asked: list[dict[str, Any]],
    index: IndexStore,
    model: ModelConfig,
    keys: AnswerKeys,
    recipe: Recipe,
    fingerprint: str | None,
    documents: Mapping[str, str | None] | None,
    answers: AnswerStore | None,
    failures: Failures,
) -> Asked:
    damaged: list[str] = []
    indexes = read_entries(index, on_error=lambda path, error: damaged.append(path))
    which: dict[str, Any] = {"fingerprint": fingerprint, "damaged": damaged, "only": documents}
    pairs, refused = join(asked, Catalog(indexes, digest_of(model_fields(model)), recipe, **which), keys)
    return Asked(asked, pairs, refused, keys=keys, recipe=recipe, model=model, store=answers, failures=failures)


def _cache_folder(folder: str | None) -> str | None:
    """Absolute, for actors work elsewhere; but ``~`` is each machine's own."""
    return folder if folder is None or folder.startswith("~") else os.path.abspath(folder)


def _run(
    batches: list[Batch], job: Asked, settings: AnswerSettings, pool: cluster.Pool, *, gpus: float, memory: int
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Each batch and what the actors say of it, as they come."""
    by_document: dict[str, list[Batch]] = defaultdict(list)
    for batch in batches:
        by_document[batch.stored.document_id].append(batch)
    # One actor per document opens its index once; with few documents, several share one so that none idles.
    share = max(1, math.ceil(pool.most / len(by_document)))
    work = []
    for items in by_document.values():
        for chunk in chunks(items, math.ceil(len(items) / share)):
            stored, asks = chunk[0].stored, [job.asks(batch) for batch in chunk]
            row = {"index": json.dumps(stored), "batches": json.dumps(asks)}
            work.append((stored.context_tokens * len(chunk), row))
    work.sort(key=lambda item: -item[0])
    named = {batch.name: batch for batch in batches}
    with cluster.dataset_context(row_blocks=True):
        rows = ray.data.from_items([row for _, row in work], override_num_blocks=len(work)).map_batches(
            AnswerActor,
            fn_constructor_args=(settings,),
            **cluster.actor_options(pool, cpus=settings.threads, gpus=gpus, memory=memory, calls=CALLS),
        )
        del work
        for row in cluster.rows_of(rows):
            if row["fatal"] is not None:
                raise_fatal(row["fatal"])
            yield named[row["name"]], row


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("answer"))
