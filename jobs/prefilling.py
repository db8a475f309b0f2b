"""The first pool of a build, the only one with the model: documents in, keys, values and top-k lists out.

An exception ends the document it came from, as a row with `error`; a fault of the model's ends the job, as `fatal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rabatch.config import BuildConfig, ModelConfig
from rabatch.errors import ModelError
from rabatch.jobs.cluster import limit_threads
from rabatch.jobs.messages import fatal, one_row, reason
from rabatch.jobs.rows import content_sha256
from rabatch.loading import LoadedModel, load_model
from rabatch.prefill import prefill_units


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
        shared = {
            "number": row["number"],
            "document_id": row["document_id"],
            "error": row["error"],
            "fatal": self._fatal,
        }
        if self._loaded is None or row["error"] is not None:
            yield one_row(shared)
            return
        text = row["text"]
        about = {"content_sha256": content_sha256(text), "text_chars": len(text), "metadata": row["metadata"]}
        try:
            for unit in prefill_units(self._loaded, row["document_id"], text, self._build):
                yield one_row({**unit, **shared, **(about if unit["unit_kind"] == "tokens" else {})})
        except ModelError as error:
            yield one_row({**shared, "fatal": fatal(error, self._loaded.config)})
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            yield one_row({**shared, "error": reason(error)})
