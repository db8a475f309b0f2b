"""Answer: questions in, one row per question and document out.

The driver joins the questions with the store's manifests; each document's questions go to one actor, which opens the
index once. Killed and run again into the same output, it asks only what is not answered yet.

    python -m rabatch.jobs.answer questions.jsonl --store index/ --output answers/
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import ray.data
from tqdm import tqdm

from rabatch.config import GenerationSettings, Method, ModelConfig, Recipe, Resources
from rabatch.errors import StoreError
from rabatch.evaluation.scoring import exact_match
from rabatch.fingerprint import model_fields
from rabatch.jobs import cluster
from rabatch.jobs.answering import CALLS, PARTS, AnswerActor, AnswerSettings, part_path
from rabatch.jobs.catalog import Batch, Catalog, chunks, failed_row, join
from rabatch.jobs.messages import raise_fatal
from rabatch.jobs.output import jsonl_bytes, parquet_bytes, read_parquet
from rabatch.jobs.results import AnswerResult, count
from rabatch.jobs.rows import question_of, read_unit
from rabatch.jobs.settings import model_settings, resolved_model
from rabatch.jobs.sources import JSONL, PARQUET, Source, list_units
from rabatch.records import ANSWERS
from rabatch.storage.filesystem import Folder
from rabatch.storage.store import IndexStore

Rows = list[dict[str, Any]]


def answer(
    questions: Source,
    *,
    store: str | os.PathLike[str],
    model: ModelConfig | str | None = None,
    recipe: Recipe | Method | None = None,
    generation: GenerationSettings | None = None,
    output: str | os.PathLike[str] | None = None,
    resources: Resources | None = None,
    address: str | None = None,
    storage_options: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> AnswerResult:
    """Ask every question of its document; one without a document of every document in the store.

    Args:
        questions: A path or fsspec URL (.jsonl, .parquet), a `ray.data.Dataset`, a `pyarrow.Table` or a list of dicts,
            with `question`, and optionally `question_id`, `document_id` and `expected`.
        store: Path or fsspec URL of the index store.
        model: Settings, or a hub name or path; must be the one the store was built with.
        recipe: How the context is attended, or the name of a method.
        generation: Overrides of the model's own generation settings.
        output: Folder (path or URL) for ``answers.parquet`` and ``answers.jsonl``. None: only the result.
        resources: Actors, their CPUs, GPUs and memory, questions decoded together, the cache of parts.
        address: Of a Ray cluster. None: an embedded Ray.
        storage_options: Of fsspec, for `questions`, `store` and `output`.
        fingerprint: Answer from these indexes only. None: of each document the newest of this model.
        progress: A bar over questions on stderr.

    Returns:
        Rows in the order of the questions, then of the document ids. A question that cannot be answered is a row with
        status ``failed`` and the reason.

    Raises:
        RabatchError: The job as a whole cannot run: no such questions, model or store.
    """
    began = time.perf_counter()
    recipe = Recipe(method=recipe) if isinstance(recipe, str) else recipe or Recipe()
    generation, resources = generation or GenerationSettings(), resources or Resources()
    options = dict(storage_options or {})
    settings = model_settings(model)
    model_fields(resolved_model(settings, has_cuda=False))  # a missing model is found before Ray starts
    index = IndexStore(cluster.worker_url(store, "store"), storage_options=options)
    folder = None if output is None else Folder(cluster.worker_url(output, "output"), **options)
    if folder is not None:
        folder.write(f"{PARTS}/_started", b"")  # an output that cannot be written must fail now, not after hours
    connected = cluster.connect(address)
    units = list_units(questions, field="questions", storage_options=options, suffixes=JSONL + PARQUET)
    asked = [question_of(record) for unit in units.units for record in read_unit(units, unit)]
    settings = resolved_model(settings, has_cuda=connected.gpus > 0)
    damaged: list[str] = []
    manifests = index.manifests(on_error=lambda path, error: damaged.append(path))
    catalog = Catalog(manifests, model_fields(settings), recipe, fingerprint=fingerprint, damaged=damaged)
    batches, refused = join(
        asked,
        catalog,
        recipe=recipe,
        generation=generation,
        model=settings,
        questions_per_batch=resources.questions_per_batch,
    )
    finished = {} if folder is None else _earlier(folder, batches)
    reused = sum(len(rows) for rows in finished.values())
    open_batches = [batch for batch in batches if batch.key not in finished]
    if open_batches:
        gpus = cluster.gpus_per_actor(resources, settings.device)
        pool = cluster.answer_pool(resources, connected, n_rows=len(open_batches), gpus=gpus)
        actor = AnswerSettings(
            model=settings,
            store_url=index.url,
            storage_options=options,
            recipe=recipe,
            generation=generation,
            output=None if folder is None else folder.url,
            threads=resources.cpus_per_actor,
            slots=resources.questions_per_batch,
            memory_bytes=resources.memory_bytes,
            sharing=math.ceil(pool / connected.machines),
            sharing_card=int(1 // gpus) if 0 < gpus < 1 else 1,
            cache_dir=_cache_folder(resources.cache_dir),
            cache_bytes=resources.cache_bytes,
        )
        n_questions = sum(len(batch.questions) for batch in open_batches)
        with tqdm(total=n_questions, desc="answer", unit="q", file=sys.stderr, disable=not progress) as bar:
            for key, rows in _run(open_batches, actor, pool, gpus):
                if key not in finished:
                    finished[key] = rows
                    bar.update(len(rows))
    ordered: list[tuple[int, str, dict[str, Any]]] = []
    for item in refused:
        row = failed_row(item.question, document_id=item.document_id, reason=item.reason, recipe=recipe, model=settings)
        ordered.append((item.order, item.document_id or "", row))
    for batch in batches:
        rows = finished.get(batch.key) or _lost(batch, recipe, settings)
        ordered += [(o, batch.manifest.document_id, row) for o, row in zip(batch.order, rows, strict=True)]
    ordered.sort(key=lambda item: item[:2])
    rows = [row for _, _, row in ordered]
    if folder is not None:
        folder.write("answers.parquet", parquet_bytes(rows, ANSWERS))
        folder.write("answers.jsonl", jsonl_bytes(rows, ANSWERS))
    return _result(
        rows, reused=reused, seconds=time.perf_counter() - began, output=None if output is None else os.fspath(output)
    )


def _cache_folder(folder: str | None) -> str | None:
    """Absolute, for actors work elsewhere; but ``~`` is each machine's own."""
    return folder if folder is None or folder.startswith("~") else os.path.abspath(folder)


def _earlier(folder: Folder, batches: list[Batch]) -> dict[str, Rows]:
    """The answers of batches that an earlier run has finished."""
    there = folder.list(PARTS)
    found = {}
    for batch in batches:
        if part_path(batch.key) in there:
            try:
                rows = read_parquet(folder.read(part_path(batch.key)))
            except (StoreError, OSError, ValueError):  # not ours to trust: ask again
                continue
            if [row["question_id"] for row in rows] == [q["question_id"] for q in batch.questions]:
                found[batch.key] = rows
    return found


def _run(batches: list[Batch], settings: AnswerSettings, pool: int, gpus: float) -> Iterator[tuple[str, Rows]]:
    """Key and answers of each batch, as they come, from `pool` actors."""
    by_document: dict[str, list[Batch]] = defaultdict(list)
    for batch in batches:
        by_document[batch.manifest.document_id].append(batch)
    # One actor per document opens its index once; with few documents, several share one so that none idles.
    share = max(1, math.ceil(pool / len(by_document)))
    work = []
    for items in by_document.values():
        for chunk in chunks(items, math.ceil(len(items) / share)):
            cost = chunk[0].manifest.context_tokens * len(chunk)
            asked = [{"key": batch.key, "questions": batch.questions} for batch in chunk]
            work.append((cost, {"manifest": chunk[0].manifest.to_json(), "batches": json.dumps(asked)}))
    work.sort(key=lambda item: -item[0])
    with cluster.dataset_context(row_blocks=True):
        rows = ray.data.from_items([row for _, row in work], override_num_blocks=len(work)).map_batches(
            AnswerActor,
            fn_constructor_args=(settings,),
            **cluster.actor_options(pool, cpus=settings.threads, gpus=gpus, calls=CALLS),
        )
        for row in cluster.rows_of(rows):
            if row["fatal"] is not None:
                raise_fatal(row["fatal"])
            yield row["key"], read_parquet(row["answers"])


def _lost(batch: Batch, recipe: Recipe, model: ModelConfig) -> Rows:
    reason = f"its worker died {cluster.TASK_RETRIES + 1} times, perhaps out of memory; use fewer actors, or smaller "
    reason += "questions_per_batch, then run again"
    about: dict[str, Any] = {"document_id": batch.manifest.document_id, "manifest": batch.manifest}
    return [failed_row(q, reason=reason, recipe=recipe, model=model, **about) for q in batch.questions]


def _result(rows: Rows, *, reused: int, seconds: float, output: str | None) -> AnswerResult:
    counts = count(rows)
    judged = [exact_match(row["expected"], row["answer"]) for row in rows if row["expected"] is not None]
    shares = [row["attended_share"] for row in rows if row["attended_share"] is not None]
    return AnswerResult(
        rows=rows,
        answered=counts["ok"],
        failed=counts["failed"],
        reused=reused,
        exact_match=sum(judged) / len(judged) if judged else None,
        attended_share=sum(shares) / len(shares) if shares else None,
        seconds=seconds,
        output=output,
    )


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("answer"))
