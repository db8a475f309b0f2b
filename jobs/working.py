"""Asking what is not answered yet: batches of questions through one pool of actors, whatever the recipe of each."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ray.data

from rabatch.config import GenerationSettings, ModelConfig, Resources
from rabatch.jobs import cluster
from rabatch.jobs.answering import CALLS, AnswerActor, AnswerSettings
from rabatch.jobs.asking import Asked
from rabatch.jobs.catalog import Batch, batches_of, chunks
from rabatch.jobs.messages import raise_fatal
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import Tally
from rabatch.jobs.settings import weights_bytes
from rabatch.storage.store import IndexStore


class _Asking(NamedTuple):
    """A batch, and the number of the job that it is of."""

    job: int
    batch: Batch


def ask_all(
    jobs: Sequence[Asked],
    *,
    store: IndexStore,
    storage_options: dict[str, Any],
    model: ModelConfig,
    generation: GenerationSettings,
    resources: Resources,
    address: str | None,
    observer: Observer,
) -> None:
    """Ask every open pair of every job and enter what becomes of it; at the end nothing is open.

    Args:
        jobs: One per recipe.
        model: Resolved: with the device it is loaded on.
        address: Of the Ray cluster that is connected.
    """
    work = _open(jobs, resources)
    gpus = cluster.gpus_per_actor(resources, model.device)
    memory = cluster.actor_memory(resources, weights_bytes(model))
    with observer.working(sum(len(asking.batch.pairs) for asking in work)):
        while work:
            dead, connected = cluster.dead_machines(), cluster.connect(address)
            pool = cluster.answer_pool(resources, connected, n_rows=len(work), gpus=gpus, memory=memory)
            actor = AnswerSettings(
                model=model,
                store_url=store.url,
                storage_options=storage_options,
                recipes=tuple(job.recipe for job in jobs),
                generation=generation,
                answers_urls=tuple(None if job.store is None else job.store.url for job in jobs),
                threads=resources.cpus_per_actor,
                slots=resources.questions_per_batch,
                memory_bytes=resources.memory_bytes,
                sharing=math.ceil(pool.most / connected.machines),
                sharing_card=int(1 // gpus) if 0 < gpus < 1 else 1,
                cache_dir=_cache_folder(resources.cache_dir),
                cache_bytes=resources.cache_bytes,
                recall_share=resources.recall_share,
            )
            for asking, told in _run(work, jobs, actor, pool, gpus=gpus, memory=memory.reserved):
                batch, failed = asking.batch, json.loads(told["failed"])
                tally = Tally.from_json(told["tally"])
                if jobs[asking.job].take(batch, failed=failed, tally=tally, data=told["answers"]):
                    of = {"document_id": batch.stored.document_id, "fingerprint": batch.stored.fingerprint}
                    recall = json.loads(told["recall"])
                    observer.answered(json.loads(told["seen"]), **of, recall=recall, recipe=asking.job)
            lost = _open(jobs, resources)
            work = lost if lost and cluster.lost_machine_since(dead) else []  # what it has taken with it is asked again
    for job in jobs:
        for number in job.open_pairs():
            reason = f"its worker died {cluster.TASK_RETRIES + 1} times, perhaps out of memory; use fewer actors, or "
            job.fail(number, reason + "smaller questions_per_batch, then run again")


def _open(jobs: Sequence[Asked], resources: Resources) -> list[_Asking]:
    """All that is not settled yet."""
    most = resources.questions_per_batch
    return [
        _Asking(number, batch)
        for number, job in enumerate(jobs)
        for batch in batches_of(job.pairs, job.open_pairs(), questions_per_batch=most)
    ]


def _cache_folder(folder: str | None) -> str | None:
    """Absolute, for actors work elsewhere; but ``~`` is each machine's own."""
    return folder if folder is None or folder.startswith("~") else os.path.abspath(folder)


def _run(
    work: list[_Asking],
    jobs: Sequence[Asked],
    settings: AnswerSettings,
    pool: cluster.Pool,
    *,
    gpus: float,
    memory: int,
) -> Iterator[tuple[_Asking, dict[str, Any]]]:
    """Each batch and what the actors say of it, as they come."""
    together: dict[tuple[int, str], list[_Asking]] = defaultdict(list)
    for asking in work:
        together[asking.job, asking.batch.stored.document_id].append(asking)
    # One actor opens an index once for all questions of a recipe; with few documents, several share one so that none
    # idles.
    share = max(1, math.ceil(pool.most / len(together)))
    rows = []
    for items in together.values():
        for chunk in chunks(items, math.ceil(len(items) / share)):
            number, stored = chunk[0].job, chunk[0].batch.stored
            asks = [jobs[number].asks(asking.batch) for asking in chunk]
            row: dict[str, Any] = {"recipe": number, "index": json.dumps(stored), "batches": json.dumps(asks)}
            rows.append((stored.context_tokens * len(chunk), row))
    rows.sort(key=lambda item: -item[0])
    named = {(asking.job, asking.batch.name): asking for asking in work}
    with cluster.dataset_context(row_blocks=True):
        told = ray.data.from_items([row for _, row in rows], override_num_blocks=len(rows)).map_batches(
            AnswerActor,
            fn_constructor_args=(settings,),
            **cluster.actor_options(pool, cpus=settings.threads, gpus=gpus, memory=memory, calls=CALLS),
        )
        del rows
        for row in cluster.rows_of(told):
            if row["fatal"] is not None:
                raise_fatal(row["fatal"])
            yield named[row["recipe"], row["name"]], row
