"""One row per committed index: what a list of a store shows, and what a list is filtered by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rabatch.storage.manifest import Manifest

_INT64_MAX = 2**63 - 1
# Ids and texts of a user's may be large, and an id any string: UTF-8, lone surrogates as they are.
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("path", pa.string()),  # of the manifest
            ("tag", pa.string()),  # as listings tell it of the manifest that this row was made of
            ("document_id", pa.large_binary()),
            ("content_sha256", pa.string()),
            ("fingerprint", pa.string()),
            ("model", pa.string()),
            ("model_sha256", pa.string()),
            ("dtype", pa.string()),
            ("index", pa.string()),
            ("degree", pa.int64()),
            ("heads", pa.int64()),  # KV heads of all layers
            ("streaming_heads", pa.int64()),  # of them, those that keep the static set only
            ("sink_tokens", pa.int64()),
            ("window_tokens", pa.int64()),
            ("context_tokens", pa.int64()),
            ("text_chars", pa.int64()),
            ("stored_bytes", pa.int64()),
            ("parts", pa.int64()),
            ("created_at", pa.string()),
            ("created_us", pa.int64()),
            ("attempts", pa.list_(pa.field("item", pa.string(), nullable=False))),
            ("metadata", pa.large_string()),  # JSON
        )
    ]
)


def summarise(manifest: Manifest, tag: str) -> dict[str, Any]:
    """The row of a manifest, columns as of `SCHEMA`."""
    shape = manifest.geometry
    created = datetime.fromisoformat(manifest.created_at)
    return {
        "path": manifest.path,
        "tag": tag,
        "document_id": id_bytes(manifest.document_id),
        "content_sha256": manifest.content_sha256,
        "fingerprint": manifest.fingerprint,
        "model": str(manifest.stats.get("model", "")).encode("utf-8", "backslashreplace").decode(),
        "model_sha256": model_digest(manifest),
        "dtype": shape.kv_dtype if manifest.codecs == "none" else f"{shape.kv_dtype} {manifest.codecs}",
        "index": shape.index,
        "degree": shape.degree,
        "heads": shape.n_layers * shape.n_kv_heads,
        "streaming_heads": sum(map(len, shape.streaming_heads)),
        "sink_tokens": shape.sink_tokens,
        "window_tokens": shape.window_tokens,
        "context_tokens": manifest.context_tokens,
        "text_chars": min(manifest.text_chars, _INT64_MAX),
        "stored_bytes": min(manifest.stored_bytes, _INT64_MAX),
        "parts": len(manifest.parts),
        "created_at": manifest.created_at,
        "created_us": int((created - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6),
        "attempts": sorted(attempts_of(manifest)),
        "metadata": json.dumps(manifest.metadata),
    }


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist(rows, SCHEMA)


def id_bytes(document_id: str) -> bytes:
    """A document id as the column holds it."""
    return document_id.encode("utf-8", "surrogatepass")


def id_text(data: bytes) -> str:
    """The document id that `id_bytes` wrote."""
    return data.decode("utf-8", "surrogatepass")


def attempts_of(manifest: Manifest) -> set[str]:
    """The folders that the manifest's parts lie in."""
    return {part.path.rsplit("/", 1)[0] for part in manifest.parts}


def model_digest(manifest: Manifest) -> str:
    """What tells models apart that an index is served to."""
    return digest_of(manifest.fingerprint_fields.get("model"))


def digest_of(model_fields: dict[str, Any] | None) -> str:
    """SHA-256 of the model's part of a fingerprint's fields."""
    text = json.dumps(model_fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which rows to list; None takes all.

    Args:
        model: The name a model was built under, or what follows its last slash.
        index: What an index must hold: ``"graph"`` or ``"scan"``; or ``"none"`` of them.
        since, until: Bounds of when an index was made, both included.
    """

    model: str | None = None
    index: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def of(self, table: pa.Table) -> pa.Table:
        """The rows that pass; needs the columns `model`, `index` and `created_us`."""
        if self.model is not None:
            exact = pc.equal(table["model"], self.model)
            table = table.filter(pc.or_(exact, pc.ends_with(table["model"], "/" + self.model)))
        if self.index is not None:
            words = pc.split_pattern(table["index"], "+")
            table = table.filter(pa.array([self.index in held for held in words.to_pylist()], pa.bool_()))
        if self.since is not None:
            table = table.filter(pc.greater_equal(table["created_us"], int(self.since.timestamp() * 1e6)))
        if self.until is not None:
            table = table.filter(pc.less_equal(table["created_us"], int(self.until.timestamp() * 1e6)))
        return table
