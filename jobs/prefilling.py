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
from rabatch.prefill import encode, prefill_units


class PrefillActor:
    """Packs of documents in, units out. The model is loaded once."""

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
            yield from self._prefill_pack(row["documents"])

    def _prefill_pack(self, documents: list[dict[str, Any]]) -> Iterator[pa.Table]:
        """A pack shares forward passes. If it fails, its documents are tried alone, so that only a bad one fails."""
        good, contexts = [], []
        for document in documents:
            problem = {"error": document["error"], "fatal": self._fatal}
            if self._loaded is not None and document["error"] is None:
                try:
                    contexts.append(encode(self._loaded, document["document_id"], document["text"]))
                except Exception as error:  # noqa: BLE001 (one document must not end the job)
                    problem["error"] = reason(error)
                else:
                    good.append(document)
                    continue
            yield one_row({**_about(document), **problem})
        if not good:
            return
        assert self._loaded is not None
        none_yielded = True
        try:
            for number, unit in prefill_units(self._loaded, contexts, self._build):
                none_yielded = False
                yield one_row({**unit, **_about(good[number], of_tokens=unit["unit_kind"] == "tokens")})
        except ModelError as error:
            yield one_row({**_about(good[0]), "error": None, "fatal": fatal(error, self._loaded.config)})
        except Exception as error:  # noqa: BLE001 (one document must not end the job)
            if len(good) > 1 and none_yielded:
                for document in good:
                    yield from self._prefill_pack([document])
            else:
                for document in good:
                    yield one_row({**_about(document), "error": reason(error), "fatal": None})


def _about(document: dict[str, Any], *, of_tokens: bool = False) -> dict[str, Any]:
    shared = {"number": document["number"], "document_id": document["document_id"], "error": None, "fatal": None}
    if not of_tokens:
        return shared
    text = document["text"]
    about = {"content_sha256": content_sha256(text), "text_chars": len(text), "metadata": document["metadata"]}
    return {**shared, **about}
