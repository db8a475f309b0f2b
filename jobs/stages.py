"""The two actor pools of a build: prefill needs the model, graph construction only CPUs.

What travels between them is one row per (layer, range of KV heads); what reaches the driver is a few hundred bytes per
part. An exception ends the document it came from: as a row with `error`, for the model's faults with `fatal`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import pyarrow as pa

from rabatch.config import BuildConfig, ModelConfig
from rabatch.errors import ModelError, RabatchError
from rabatch.indexing import content_digest, store_unit
from rabatch.jobs.cluster import limit_threads
from rabatch.models import LoadedModel, load_model
from rabatch.prefill import prefill_units
from rabatch.storage.store import IndexStore

_FOR_THE_DRIVER = (
    *("number", "error", "fatal", "n_units", "context_tokens", "geometry", "prefill_s"),
    *("content_sha256", "text_chars", "metadata"),
)
_TYPES: dict[type, pa.DataType] = {
    bytes: pa.large_binary(),
    str: pa.large_string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
}


def one_row(row: dict[str, Any]) -> pa.Table:
    """`row` as a table. None is a null string: every row is a block of its own, so types need not agree."""
    return pa.table({name: pa.array([value], _TYPES.get(type(value), pa.large_string())) for name, value in row.items()})


def reason(error: BaseException) -> str:
    """Why a document or question failed, in one line that names the fix."""
    if isinstance(error, RabatchError):
        return " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory; lower prefill_chunk_tokens, use fewer actors, or a larger machine"
    text = " ".join(str(error).split())[:300]
    return f"unexpected {name}: {text}; run it again, and report it if it stays"


def fatal(error: BaseException, model: ModelConfig) -> str:
    """An error of the model's as a row carries it; `raise_fatal` raises it again on the driver."""
    if isinstance(error, RabatchError):
        return json.dumps([error.field, str(error.value), error.fix])
    return json.dumps(["model", model.name, f"cannot be loaded: {reason(error)}"])


def raise_fatal(text: str) -> NoReturn:
    """Raise what `fatal` wrote down."""
    raise ModelError(*json.loads(text))


class PrefillActor:
    """Documents in, units out. The model is loaded once."""

    def __init__(self, model: ModelConfig, build: BuildConfig, threads: int) -> None:
        limit_threads(threads)
        self._build = build
        self._fatal: str | None = None
        self._loaded: LoadedModel | None = None
        try:
            self._loaded = load_model(model)
        except Exception as error:  # noqa: BLE001 (raised here it would be Ray's, in fifty lines)
            self._fatal = fatal(error, model)
        limit_threads(threads)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            yield from self._prefill(row)

    def _prefill(self, row: dict[str, Any]) -> Iterator[pa.Table]:
        shared = {"number": row["number"], "document_id": row["document_id"], "error": row["error"], "fatal": self._fatal}
        if self._loaded is None or row["error"] is not None:
            yield one_row(shared)
            return
        text = row["text"]
        about = {"content_sha256": content_digest(text), "text_chars": len(text), "metadata": row["metadata"]}
        try:
            for unit in prefill_units(self._loaded, row["document_id"], text, self._build):
                yield one_row({**unit, **shared, **(about if unit["unit_kind"] == "tokens" else {})})
        except ModelError as error:
            yield one_row({**shared, "fatal": fatal(error, self._loaded.config)})
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            yield one_row({**shared, "error": reason(error)})


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
