"""Build: documents in, committed indexes out.

A planning pass finds faulty, double and already indexed documents. The others run through Ray Data: read, prefill
(model actors), graph construction and writing (CPU actors); the driver commits a document's manifest when its last
part is written. Killed at any point and run again, a build finishes what is missing and repeats nothing committed.

    python -m rabatch.jobs.build documents/ --store index/
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rabatch.config import BuildConfig, ModelConfig, Resources
from rabatch.errors import StoreError
from rabatch.fingerprint import index_fields
from rabatch.indexing import make_manifest
from rabatch.jobs import cluster
from rabatch.jobs.catalog import Stored, read_entries
from rabatch.jobs.indexing import GraphActor, StoreAddress
from rabatch.jobs.messages import raise_fatal, reason
from rabatch.jobs.observing import Observer
from rabatch.jobs.output import check_report, write_rows
from rabatch.jobs.plan import Planned, plan_documents, read_documents
from rabatch.jobs.prefilling import PrefillActor
from rabatch.jobs.results import BuildResult, Failures, count
from rabatch.jobs.settings import model_settings, resolved_model, weights_bytes
from rabatch.jobs.sources import Source, Units, list_units
from rabatch.models import geometry_of, read_config
from rabatch.records import BUILD_REPORT
from rabatch.storage.manifest import Part, fingerprint_of, utc_now
from rabatch.storage.store import IndexStore

_BF16_BYTES = 2
_PACKED_CHARS_PER_TOKEN = 4
"""Short documents are packed until they have about the characters of one chunk; chunks cross their borders anyway."""


def build(
    documents: Source,
    *,
    store: str | os.PathLike[str],
    model: ModelConfig | str | None = None,
    config: BuildConfig | None = None,
    resources: Resources | None = None,
    address: str | None = None,
    storage_options: dict[str, Any] | None = None,
    limit: int | None = None,
    max_failed_rows: int | None = None,
    progress: bool = True,
    report: str | None = None,
    observer: Observer | None = None,
) -> BuildResult:
    """Index every document that is not indexed yet.

    Args:
        documents: A path or fsspec URL (a folder of .txt and .md, .jsonl, .parquet), a `ray.data.Dataset`, a
            `pyarrow.Table` or a list of dicts, with `document_id` and `text`; other columns become metadata.
        store: Path or fsspec URL of the index store; made if there is none.
        model: Settings, or a hub name or path. The default is the demo model.
        config: What is stored. A change means new indexes beside the old ones.
        resources: Actors, their CPUs and GPUs.
        address: Of a Ray cluster. None: an embedded Ray.
        storage_options: Of fsspec, for `documents` and `store`.
        limit: Only the first rows of the input.
        max_failed_rows: Stop when more rows fail.
        progress: A bar over documents on stderr, or a line now and then where that is no terminal.
        report: Where to write the result's rows: a path or URL that ends in ``.parquet`` or ``.jsonl``.
        observer: Is told what becomes of each document. None: one of this call's own, with `progress`.

    Returns:
        One row per row of the input. A bad document is a row with status ``failed`` and the reason.

    Raises:
        FailedRowsError: More than `max_failed_rows` failed. What is committed stays.
        RabatchError: The job as a whole cannot run: no such source, model or store.
    """
    began = time.perf_counter()
    if report is not None:
        check_report(report)
    config = config or BuildConfig()
    resources = resources or Resources()
    settings = model_settings(model)
    store_url = cluster.worker_url(store, "store")
    index_fields(resolved_model(settings, has_cuda=False), config)  # a missing model is found before Ray starts
    connected = cluster.connect(address)
    units = list_units(documents, field="documents", storage_options=storage_options)
    index = IndexStore(store_url, create=True, storage_options=storage_options)
    settings = resolved_model(settings, has_cuda=connected.gpus > 0)
    fields = index_fields(settings, config)
    observer = observer or Observer(progress=progress)
    about = {"model": settings, "build": config, "resources of the build": resources}
    observer.begin("build", places={"documents": documents, "store": store}, settings=about)
    failures = Failures("documents", max_failed_rows, observer.failed)
    job = _Job(plan_documents(units, limit=limit), index, fields, settings, failures, observer)
    numbers = job.skip_committed()
    if numbers:
        pack_chars = _PACKED_CHARS_PER_TOKEN * config.prefill_chunk_tokens
        options: dict[str, Any] = {"model": settings, "config": config, "resources": resources}
        with observer.working(len(numbers)):
            while numbers:
                dead = cluster.dead_machines()
                parts = StoreAddress(store_url, dict(storage_options or {}), job.fingerprint, index.new_attempt())
                options["connected"] = cluster.connect(address)
                for row in _run(units, job.planned, numbers, parts, pack_chars=pack_chars, **options):
                    job.take(row)
                numbers = job.lost(numbers)
                # What a lost machine has taken with it is done again. A pack that kills its worker is lost as a whole;
                # alone, its good documents are built.
                if numbers and not cluster.lost_machine_since(dead):
                    numbers = [number for number in numbers if job.planned[number].chars <= pack_chars // 2]
                    pack_chars = 0
    result = job.result(seconds=time.perf_counter() - began)
    if report is not None:
        write_rows(report, result.rows, BUILD_REPORT, storage_options=storage_options)
    return result


def _run(
    units: Units,
    planned: list[Planned],
    numbers: list[int],
    parts: StoreAddress,
    *,
    pack_chars: int,
    model: ModelConfig,
    config: BuildConfig,
    resources: Resources,
    connected: cluster.Cluster,
) -> Iterator[dict[str, Any]]:
    """Rows about parts and failures, as they come."""
    gpus = cluster.gpus_per_actor(resources, model.device)
    threads = resources.cpus_per_actor
    memory = cluster.actor_memory(resources, weights_bytes(model))
    prefill, graph = cluster.build_pools(resources, connected, n_documents=len(numbers), gpus=gpus, memory=memory)
    with cluster.dataset_context(row_blocks=True):
        rows = (
            read_documents(units, planned, numbers, pack_chars=pack_chars)
            .map_batches(
                PrefillActor,
                fn_constructor_args=(model, config, threads),
                **cluster.actor_options(prefill, cpus=threads, gpus=gpus, memory=memory.reserved),
            )
            .map_batches(
                GraphActor,
                fn_constructor_args=(parts, config, threads),
                **cluster.actor_options(graph, cpus=threads, gpus=0),
            )
        )
        yield from cluster.rows_of(rows)


@dataclass
class _Open:
    """A document under way: what is known of it until its last part is written."""

    parts: dict[tuple[str, int, int], Part] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)  # of the tokens part: it carries what the manifest needs
    graph_s: float = 0.0
    write_s: float = 0.0


class _Job:
    """The driver's view: which documents are planned, under way, committed, failed.

    Manifests are not kept: what is held of a document is its plan and its row of the report.
    """

    def __init__(
        self,
        planned: list[Planned],
        store: IndexStore,
        fields: dict[str, Any],
        model: ModelConfig,
        failures: Failures,
        observer: Observer,
    ) -> None:
        self.planned = planned
        self.fingerprint = fingerprint_of(fields)
        self._store = store
        self._fields = fields
        self._model = model
        self._open: dict[int, _Open] = {}
        self._reports: dict[int, dict[str, Any]] = {}
        self._failures = failures
        self._observer = observer

    def skip_committed(self) -> list[int]:
        """Report faulty and already indexed documents; the numbers of the others."""
        newest: dict[str, Stored] = {}
        known: dict[tuple[str, str], Stored] = {}
        for index in read_entries(self._store, on_error=lambda path, error: None):
            if index.fingerprint == self.fingerprint:
                known[index.document_id, index.content_sha256] = index
                held = newest.get(index.document_id)
                if held is None or index.created_us > held.created_us:
                    newest[index.document_id] = index
        numbers = []
        for number, row in enumerate(self.planned):
            index_known = known.get((row.document_id, row.content_sha256))
            if row.error is not None:
                self._report(number, "failed", error=row.error)
            elif index_known is None:
                numbers.append(number)
            else:
                if newest[row.document_id] is not index_known:
                    self._renew(index_known)
                self._observer.known("skipped")
                self._report(number, "skipped", tokens=index_known.context_tokens, nbytes=index_known.stored_bytes)
        return numbers

    def _renew(self, index: Stored) -> None:
        """A document whose text went back to an earlier one: that index becomes the newest again."""
        manifest = self._store.get(index.document_id, index.content_sha256, index.fingerprint)
        if manifest is None:
            fix = "its index was withdrawn while the build began; run it again"
            raise StoreError("document_id", index.document_id, fix)
        manifest = dataclasses.replace(manifest, created_at=utc_now())
        self._store.folder.write(manifest.path, manifest.to_json().encode())

    def take(self, row: dict[str, Any]) -> None:
        """Enter what the actors report of a part."""
        number = row["number"]
        if row["fatal"] is not None:
            raise_fatal(row["fatal"])
        if number in self._reports:
            return
        if row["error"] is not None:
            self._open.pop(number, None)
            self._report(number, "failed", error=row["error"])
            return
        document = self._open.setdefault(number, _Open())
        part = Part(**json.loads(row["part"]))
        if (part.kind, part.layer, part.head_start) in document.parts:
            return  # a dead actor's work, done twice
        document.parts[part.kind, part.layer, part.head_start] = part
        document.graph_s += row["graph_s"]
        document.write_s += row["write_s"]
        if "metadata" in row:
            document.row = row
        if len(document.parts) < row["n_units"]:
            return
        del self._open[number]
        self._commit(number, document)

    def _commit(self, number: int, document: _Open) -> None:
        row = document.row
        seconds = {"prefill_s": row["prefill_s"], "graph_s": document.graph_s, "write_s": document.write_s}
        try:
            manifest = self._store.commit(
                make_manifest(
                    document_id=self.planned[number].document_id,
                    content_sha256=row["content_sha256"],
                    text_chars=row["text_chars"],
                    metadata=json.loads(row["metadata"]),
                    fingerprint_fields=self._fields,
                    fingerprint=self.fingerprint,
                    units_geometry=row["geometry"],
                    context_tokens=row["context_tokens"],
                    parts=list(document.parts.values()),
                    stats={**seconds, "model": self._model.name, "device": self._model.device},
                )
            )
        except StoreError as error:
            self._report(number, "failed", error=reason(error))
        else:
            tokens, nbytes = manifest.context_tokens, manifest.stored_bytes
            self._report(number, "built", tokens=tokens, nbytes=nbytes, seconds=seconds)
            work = {name.removesuffix("_s"): spent for name, spent in seconds.items()}
            self._observer.built(tokens=tokens, stored_bytes=nbytes, seconds=work, fingerprint=self.fingerprint)

    def _report(
        self,
        number: int,
        status: str,
        *,
        error: str | None = None,
        tokens: int = 0,
        nbytes: int = 0,
        seconds: dict[str, float] | None = None,
    ) -> None:
        seconds = seconds or {}
        self._reports[number] = {
            "document_id": self.planned[number].document_id,
            "source": self.planned[number].source,
            "status": status,
            "reason": error,
            "context_tokens": tokens,
            "stored_bytes": nbytes,
            "prefill_s": seconds.get("prefill_s", 0.0),
            "graph_s": seconds.get("graph_s", 0.0),
            "fingerprint": self.fingerprint,
        }
        if error is not None:
            planned = self.planned[number]
            self._failures.add(f"{planned.document_id!r} ({planned.source})", error)

    def lost(self, numbers: list[int]) -> list[int]:
        """Those of which nothing is known at the end; what came of them is forgotten."""
        unknown = [number for number in numbers if number not in self._reports]
        for number in unknown:
            self._open.pop(number, None)
        return unknown

    def result(self, *, seconds: float) -> BuildResult:
        """Close the books: what never arrived was lost with its actor."""
        for number in range(len(self.planned)):
            if number not in self._reports:
                fix = f"its worker died {cluster.TASK_RETRIES + 1} times, perhaps out of memory; use fewer actors or "
                self._report(number, "failed", error=fix + "a smaller prefill_chunk_tokens, then run again")
        rows = [self._reports[number] for number in range(len(self.planned))]
        counts = count(rows)
        tokens = sum(row["context_tokens"] for row in rows)
        return BuildResult(
            rows=rows,
            built=counts["built"],
            skipped=counts["skipped"],
            failed=counts["failed"],
            tokens=tokens,
            stored_bytes=sum(row["stored_bytes"] for row in rows),
            kv_bytes=tokens * _kv_token_bytes(self._model),
            seconds=seconds,
            fingerprint=self.fingerprint,
        )


def _kv_token_bytes(model: ModelConfig) -> int:
    """Bytes of one context token's keys and values in bf16, every layer in full."""
    shape = geometry_of(read_config(model))
    return shape.n_layers * shape.n_kv_heads * shape.head_dim * 2 * _BF16_BYTES


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("build"))
