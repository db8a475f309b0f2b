"""The manifest: one small JSON object per indexed document. Its creation commits the index.

Manifests come from shared storage, so `Manifest.from_json` takes nothing on trust: types, ranges, paths, coverage of
every layer and head, and the fingerprint are checked before a reader acts on them.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from rabatch.config import IndexKind
from rabatch.errors import DocumentError, FormatVersionError, IntegrityError
from rabatch.storage.failures import REBUILD
from rabatch.storage.rules import FORMAT_VERSION, OPTIONAL_PART_TYPES, check_rules, check_types

DIGEST = "manifest_sha256"
"""Key of the SHA-256 of all other fields: a manifest holds numbers and texts that nothing else would contradict."""

__all__ = [
    "FORMAT_VERSION",
    "Geometry",
    "Manifest",
    "Part",
    "document_key",
    "fingerprint_of",
    "manifest_path",
    "utc_now",
]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of an index.

    Args:
        path: Relative to the store's root, below ``parts/``.
        bytes, sha256: Size and digest of the whole file.
        rows: Tokens in it (per head); its heads all stream or all do not.
        layer, head_start, head_stop: Which KV heads of which layer; -1, 0, 0 for the tokens part.
        key_codec, value_codec: How keys and values of the index are encoded (`rabatch.config.CODECS`); parts of a layer
            may differ.
    """

    kind: Literal["layer", "tokens"]
    path: str
    bytes: int
    sha256: str
    rows: int
    layer: int = -1
    head_start: int = 0
    head_stop: int = 0
    key_codec: str = "none"
    value_codec: str = "none"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shapes of a stored context.

    Args:
        sink_tokens, window_tokens: The static set as configured; the context may be shorter.
        index: ``"graph+scan"``, ``"graph"``, ``"scan"`` or ``"none"``; `degree` is 0 without a graph.
        sliding_windows: One per layer: 0 for full attention, else the layer's own window, and only that many last
            tokens are stored.
        streaming_heads: By layer, the numbers of the KV heads of which only the static set is stored, ascending. Empty:
            there are none in any layer.
    """

    n_layers: int
    n_kv_heads: int
    n_query_heads: int
    head_dim: int
    kv_dtype: str
    sink_tokens: int
    window_tokens: int
    index: IndexKind
    degree: int
    sliding_windows: tuple[int, ...]
    streaming_heads: tuple[tuple[int, ...], ...] = ()

    def holds(self, kind: str) -> bool:
        """Whether the heads that keep every token have a ``"graph"`` or ``"scan"``."""
        return kind in held(self.index)

    def streaming_among(self, layer: int, heads: range) -> int:
        """How many of these consecutive KV heads of a layer stream."""
        streaming = self.streaming_heads[layer] if self.streaming_heads else ()
        return bisect.bisect_left(streaming, heads.stop) - bisect.bisect_left(streaming, heads.start)

    def heads(self, layer: int, *, streaming: bool) -> list[int]:
        """Numbers of the KV heads of a layer that stream, or of those that do not, ascending."""
        heads = range(self.n_kv_heads)
        return [head for head in heads if self.streaming_among(layer, range(head, head + 1)) == streaming]

    def head_runs(self, layer: int) -> list[tuple[range, bool]]:
        """Runs of consecutive heads of a layer that all stream or all do not, and whether they do."""
        streaming = set(self.heads(layer, streaming=True))
        kinds = itertools.groupby(range(self.n_kv_heads), key=streaming.__contains__)
        runs = [(list(heads), kind) for kind, heads in kinds]
        return [(range(heads[0], heads[-1] + 1), kind) for heads, kind in runs]

    def to_dict(self) -> dict[str, Any]:
        """As a manifest holds it; `streaming_heads` only where there are any, as before there were."""
        values = dataclasses.asdict(self)
        if not self.streaming_heads:
            del values["streaming_heads"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        """What `to_dict` gave, or the same from JSON."""
        streaming = tuple(map(tuple, values.get("streaming_heads", ())))
        return cls(**{**values, "sliding_windows": tuple(values["sliding_windows"]), "streaming_heads": streaming})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one document's index consists of.

    Args:
        content_sha256: Of the document's text as UTF-8.
        fingerprint: `fingerprint_of(fingerprint_fields)`.
        text_chars: Length of the document's text in characters (code points).
        created_at: ISO 8601, UTC.
        metadata: Extra columns of the document; JSON values.
        stats: Seconds and counts of the build; informative, never read back by the engine.
    """

    document_id: str
    content_sha256: str
    fingerprint: str
    fingerprint_fields: dict[str, Any]
    context_tokens: int
    text_chars: int
    created_at: str
    geometry: Geometry
    parts: tuple[Part, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def path(self) -> str:
        """Where this manifest lies in its store."""
        return manifest_path(self.document_id, self.content_sha256, self.fingerprint)

    @property
    def stored_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def codecs(self) -> str:
        """How keys and values are encoded, as people read it: ``"none"``, ``"int8/kivi2"``; several where heads
        differ."""
        found = {(p.key_codec, p.value_codec) for p in self.parts if p.kind == "layer"} - {("none", "none")}
        return ", ".join(sorted(f"{keys}/{values}" for keys, values in found)) or "none"

    @property
    def index_start(self) -> int:
        """First row of the key index; rows outside [index_start, index_stop) are the static set."""
        return min(self.geometry.sink_tokens, self.context_tokens)

    @property
    def index_stop(self) -> int:
        return max(self.index_start, self.context_tokens - self.geometry.window_tokens)

    def stored_rows(self, layer: int, *, streaming: bool) -> int:
        """Tokens stored of a layer's heads: all of them, the static set of those that stream, or a sliding window's."""
        sliding = self.geometry.sliding_windows[layer]
        if sliding:
            return min(sliding, self.context_tokens)
        return self.context_tokens - (self.index_stop - self.index_start if streaming else 0)

    def to_json(self) -> str:
        """JSON text, one object.

        Raises:
            DocumentError: The metadata holds something JSON has no word for.
        """
        try:
            json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DocumentError("metadata", self.metadata, f"must be JSON values: {error}") from error
        values = {**dataclasses.asdict(self), "geometry": self.geometry.to_dict()}
        values["parts"] = [_without_defaults(part) for part in values["parts"]]
        values[DIGEST] = hashlib.sha256(_canonical(values)).hexdigest()
        return json.dumps(values, allow_nan=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str = "manifest") -> Manifest:
        """Read and check a manifest; `name` (its path) begins every message.

        Raises:
            FormatVersionError: Written in another format.
            IntegrityError: A field is missing, mistyped, or contradicts another.
        """
        try:
            values = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(name, text[:40], f"is not JSON ({error}); {REBUILD}") from error
        if not isinstance(values, dict):
            raise IntegrityError(name, values, f"must be a JSON object; {REBUILD}")
        version = values.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:  # before the fields: another format has others
            fix = f"this rabatch reads format {FORMAT_VERSION}; use the version that wrote it, or build again"
            raise FormatVersionError(f"{name}: format_version", version, fix)
        if DIGEST in values:  # manifests of before it have none
            stored, found = values.pop(DIGEST), hashlib.sha256(_canonical(values)).hexdigest()
            if stored != found:
                raise IntegrityError(f"{name}: {DIGEST}", stored, f"its fields hash to {found}; {REBUILD}")
        check_types(name, values)
        values["geometry"] = Geometry.from_dict(values["geometry"])
        values["parts"] = tuple(Part(**part) for part in values["parts"])
        manifest = cls(**values)
        manifest.check(name)
        return manifest

    def check(self, name: str = "") -> None:
        """Raise IntegrityError, naming the field, unless every rule of the format holds."""
        expected = fingerprint_of(self.fingerprint_fields)
        check_rules(name or self.path, self, expected)


def held(index: str) -> list[str]:
    """What an index of a kind (`Geometry.index`) holds, of ``"graph"`` and ``"scan"``."""
    return [] if index == "none" else index.split("+")


def fingerprint_of(fields: dict[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of `fields`: keys sorted, no spaces, ASCII.

    Raises:
        DocumentError: A value is not JSON (NaN included).
    """
    try:
        return hashlib.sha256(_canonical(fields)).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise DocumentError("fingerprint_fields", fields, f"must be JSON values: {error}") from error


def _without_defaults(part: dict[str, Any]) -> dict[str, Any]:
    """Parts without a codec are written as they were before there were any, so that readers of then read them."""
    return {key: value for key, value in part.items() if not (key in OPTIONAL_PART_TYPES and value == "none")}


def _canonical(values: dict[str, Any]) -> bytes:
    plain = json.loads(json.dumps(values, allow_nan=False))  # as it is after a round trip: tuples are lists
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def document_key(document_id: str) -> str:
    """The name of a document in paths: ids are data and may hold anything, paths may not."""
    return hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def manifest_path(document_id: str, content_sha256: str, fingerprint: str) -> str:
    """Where the manifest of this document, content and fingerprint lies, relative to the store."""
    return f"manifests/{fingerprint[:16]}/{document_key(document_id)}-{content_sha256[:16]}.json"


def utc_now() -> str:
    """The present time as `created_at` wants it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
