"""Answer: questions in, one row per question and document out.

The driver joins questions and indexes into pairs, and leaves out those that the answers store has an answer to. Each
document's questions go to one actor, which opens the index once. Killed and run again into the same answers store, it
asks only what is not answered yet.

    python -m rabatch.jobs.answer questions.jsonl --store index/ --output answers/
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rabatch.config import GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.exporting import write_windows
from rabatch.fingerprint import check_heads, model_fields
from rabatch.jobs import cluster
from rabatch.jobs.asking import Asked
from rabatch.jobs.catalog import Catalog, Stored, join, read_entries
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import AnswerResult, Failures
from rabatch.jobs.rows import question_of, read_unit
from rabatch.jobs.settings import model_settings, resolved_model
from rabatch.jobs.sources import JSONL, PARQUET, Source, list_units
from rabatch.jobs.working import ask_all
from rabatch.models import geometry_of, read_config
from rabatch.storage.answers import AnswerKeys, AnswerStore
from rabatch.storage.manifest import fingerprint_of
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import digest_of
from rabatch.traits import Method

Place: TypeAlias = str | os.PathLike[str]


def answer(
    questions: Source,
    *,
    store: Place,
    model: ModelConfig | str | None = None,
    recipe: Recipe | Method | None = None,
    generation: GenerationSettings | None = None,
    output: Place | None = None,
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
    [result] = answer_with(
        [(Recipe(method=recipe) if isinstance(recipe, str) else recipe or Recipe(), output)],
        questions,
        store=store,
        model=model_settings(model),
        generation=generation or GenerationSettings(),
        resources=resources or Resources(),
        address=address,
        storage_options=dict(storage_options or {}),
        fingerprint=fingerprint,
        documents=documents,
        max_failed_rows=max_failed_rows,
        observer=observer or Observer(progress=progress),
        export=export,
        definition_sha256=definition_sha256,
    )
    return result


def answer_with(
    recipes: Sequence[tuple[Recipe, Place | None]],
    questions: Source,
    *,
    store: Place,
    model: ModelConfig,
    generation: GenerationSettings,
    resources: Resources,
    address: str | None,
    storage_options: dict[str, Any],
    fingerprint: str | None,
    documents: Mapping[str, str | None] | None,
    max_failed_rows: int | None,
    observer: Observer,
    export: bool = False,
    definition_sha256: str | None = None,
) -> list[AnswerResult]:
    """Ask the same questions once per recipe, by the same actors: each loads the model once.

    Args:
        recipes: Each with its own answers store, the `output` of `answer`. The other arguments are as there, and count
            for each recipe.

    Returns:
        One result per recipe; their `seconds` are those of the whole. Each is committed by itself.
    """
    began = time.perf_counter()
    model_fields(resolved_model(model, has_cuda=False))  # a missing model is found before Ray starts
    for recipe, _ in recipes:
        check_heads(recipe, geometry_of(read_config(model)))
    index = IndexStore(cluster.worker_url(store, "store"), storage_options=storage_options)
    stores = [_answers_store(output, storage_options) for _, output in recipes]
    connected = cluster.connect(address)
    units = list_units(questions, field="questions", storage_options=storage_options, suffixes=JSONL + PARQUET)
    asked = [question_of(record) for unit in units.units for record in read_unit(units, unit)]
    model = resolved_model(model, has_cuda=connected.gpus > 0)
    several = len(recipes) > 1
    about: dict[str, Any] = {"model": model, "generation": generation, "resources of answering": resources}
    about |= {f"recipe {n}" if several else "recipe": recipe for n, (recipe, _) in enumerate(recipes, 1)}
    places = {f"answers {n}" if several else "answers": output for n, (_, output) in enumerate(recipes, 1)}
    observer.begin("answer", places={"questions": questions, "store": store, **places}, settings=about)
    damaged: list[str] = []
    indexes: Iterable[Stored] = read_entries(index, on_error=lambda path, error: damaged.append(path))
    indexes = list(indexes) if several else indexes  # in a large store those of other models are not held
    which: dict[str, Any] = {"fingerprint": fingerprint, "damaged": damaged, "only": documents}
    jobs = []
    for (recipe, _), answers in zip(recipes, stores, strict=True):
        keys = AnswerKeys({**_deciding(recipe, generation), "context_template": model.context_template})
        pairs, refused = join(asked, Catalog(indexes, digest_of(model_fields(model)), recipe, **which), keys)
        failures = Failures("questions", max_failed_rows, observer.failed)
        of_run: dict[str, Any] = {"keys": keys, "recipe": recipe, "model": model}
        jobs.append(Asked(asked, pairs, refused, **of_run, store=answers, failures=failures))
        observer.known("reused", jobs[-1].find_answered())
    ask_all(
        jobs,
        store=index,
        storage_options=storage_options,
        model=model,
        generation=generation,
        resources=resources,
        address=address,
        observer=observer,
    )
    results = []
    for (recipe, output), job in zip(recipes, jobs, strict=True):
        said = {**_deciding(recipe, generation), "model": model.to_dict()}
        of = definition_sha256 or fingerprint_of(said)
        run = job.commit(definition_sha256=of, settings=said, seconds=time.perf_counter() - began)
        if job.store is not None and export:
            write_windows(job.store.folder, "answers", job.windows())
        results.append(_result(job, output=output, run=run, seconds=time.perf_counter() - began))
    return results


def _deciding(recipe: Recipe, generation: GenerationSettings) -> dict[str, Any]:
    """What answers go by beside model, index and question."""
    return {"recipe": recipe.deciding_fields(), "generation": generation.to_dict()}


def _answers_store(output: Place | None, options: dict[str, Any]) -> AnswerStore | None:
    """An output that cannot be written fails here, not after hours."""
    if output is None:
        return None
    return AnswerStore(cluster.worker_url(output, "output"), create=True, storage_options=options)


def _result(job: Asked, *, output: Place | None, run: int | None, seconds: float) -> AnswerResult:
    tally, failed = job.tally, job.failures
    judged = sum(q["expected"] is not None for q in job.all_questions())
    return AnswerResult(
        answered=tally.answered,
        failed=failed.count,
        reused=job.reused,
        superseded=job.superseded,
        exact_match=tally.matched / judged if judged else None,
        attended_share=tally.share_sum / tally.shares if tally.shares else None,
        seconds=seconds,
        output=None if output is None else os.fspath(output),
        run=run,
        first_failures=tuple(failed.first),
        read_rows=job.windows,
    )


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("answer"))
