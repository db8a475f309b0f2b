"""The second pool of a build: graph construction and writing, CPU work that needs no model.

What comes in is one row per (layer, range of KV heads); what reaches the driver is a few hundred bytes per part.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rabatch.config import BuildConfig
from rabatch.indexing import store_unit
from rabatch.jobs.cluster import limit_threads
from rabatch.jobs.messages import one_row, reason
from rabatch.storage.store import IndexStore

_FOR_THE_DRIVER = (
    *("number", "error", "fatal", "n_units", "context_tokens", "geometry", "prefill_s"),
    *("content_sha256", "text_chars", "metadata"),
)


@dataclasses.dataclass(frozen=True)
class StoreAddress:
    """What an actor needs to write parts."""

    url: str
    storage_options: dict[str, Any]
    fingerprint: str
    attempt: str


class GraphActor:
    """Units in, parts written, a small row about each out."""

    def __init__(self, address: StoreAddress, build: BuildConfig, threads: int) -> None:
        limit_threads(threads)
        self._address = address
        self._build = build
        self._threads = threads
        self._store = IndexStore(address.url, storage_options=address.storage_options)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for unit in table.to_pylist():
            yield one_row(self._write(unit))

    def _write(self, unit: dict[str, Any]) -> dict[str, Any]:
        small = {name: unit[name] for name in _FOR_THE_DRIVER if name in unit}
        if unit["error"] is not None or unit["fatal"] is not None:
            return small
        began = time.perf_counter()
        try:
            part, graph_s = store_unit(
                self._store,
                unit,
                self._build,
                document_id=unit["document_id"],
                fingerprint=self._address.fingerprint,
                attempt=self._address.attempt,
                threads=self._threads,
            )
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            return {**small, "error": reason(error)}
        write_s = time.perf_counter() - began - graph_s
        return {**small, "part": json.dumps(dataclasses.asdict(part)), "graph_s": graph_s, "write_s": write_s}
