"""The rules that a manifest keeps. `Manifest.from_json` and `Manifest.check` apply them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from rabatch.config import CODECS, DTYPES, INDEX_KINDS
from rabatch.errors import IntegrityError
from rabatch.storage.codecs import GROUP, Of, code_width, group_width
from rabatch.storage.failures import REBUILD

if TYPE_CHECKING:
    from rabatch.storage.manifest import Geometry, Manifest, Part

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
"""Of a manifest. A part and a document's metadata take some hundred bytes each; the rest is room for odd columns."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_INT32_MAX = 2**31 - 1
_MAX_WIDTH = 2**16  # layers, heads, head_dim, degree: far above any model, far below harm
_MAX_PART_BYTES = 5 * 2**40  # the largest object S3 takes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART_PATH = re.compile(r"parts(/[A-Za-z0-9][A-Za-z0-9._-]*)+\.parquet")

Rule = Callable[[bool, str, object, str], None]
_MANIFEST_TYPES: dict[str, type] = {
    **dict.fromkeys(("format_version", "context_tokens", "text_chars"), int),
    **dict.fromkeys(("document_id", "content_sha256", "fingerprint", "created_at"), str),
    **dict.fromkeys(("fingerprint_fields", "geometry", "metadata", "stats"), dict),
    "parts": list,
}
_GEOMETRY_TYPES: dict[str, type] = {
    **dict.fromkeys(("n_layers", "n_kv_heads", "n_query_heads", "head_dim", "degree"), int),
    **dict.fromkeys(("sink_tokens", "window_tokens"), int),
    **dict.fromkeys(("kv_dtype", "index"), str),
    "sliding_windows": list,
}
_GEOMETRY_OPTIONAL: dict[str, type] = {"streaming_heads": list}
_PART_TYPES: dict[str, type] = {
    **dict.fromkeys(("bytes", "rows", "layer", "head_start", "head_stop"), int),
    **dict.fromkeys(("kind", "path", "sha256"), str),
}
OPTIONAL_PART_TYPES: dict[str, type] = {"key_codec": str, "value_codec": str}
"""Absent of a part that has none."""


def _refuse(name: str, where: str, value: object, fix: str) -> NoReturn:
    raise IntegrityError(f"{name}: {where}", value, f"{fix}; the manifest is damaged, {REBUILD}")


def check_types(name: str, values: dict[str, Any]) -> None:
    """Raise IntegrityError, naming the field, unless exactly the format's fields are there, each of its type."""
    _check_fields(name, values, _MANIFEST_TYPES)
    there = {key: kind for key, kind in _GEOMETRY_OPTIONAL.items() if key in values["geometry"]}
    _check_fields(name, values["geometry"], _GEOMETRY_TYPES | there, "geometry.")
    windows = values["geometry"]["sliding_windows"]
    if any(type(window) is not int for window in windows):
        _refuse(name, "geometry.sliding_windows", windows, "must be whole numbers")
    streaming = values["geometry"].get("streaming_heads", [])
    if any(type(heads) is not list or any(type(head) is not int for head in heads) for heads in streaming):
        _refuse(name, "geometry.streaming_heads", streaming, "must be an array of whole numbers for each layer")
    for i, part in enumerate(values["parts"]):
        if not isinstance(part, dict):
            _refuse(name, f"parts[{i}]", part, "must be an object")
        optional = {key: kind for key, kind in OPTIONAL_PART_TYPES.items() if key in part}
        _check_fields(name, part, _PART_TYPES | optional, f"parts[{i}].")


def check_rules(name: str, manifest: Manifest, fingerprint: str) -> None:
    """Raise IntegrityError, naming the field, unless ranges, paths, coverage and the fingerprint are right.

    Args:
        fingerprint: What the manifest's fingerprint fields hash to.
    """

    def rule(holds: bool, where: str, value: object, fix: str) -> None:
        if not holds:
            _refuse(name, where, value, fix)

    _check_identity(manifest, fingerprint, rule)
    _check_geometry(manifest.geometry, rule)
    rule(1 <= manifest.context_tokens <= _INT32_MAX, "context_tokens", manifest.context_tokens, "must be in [1, 2^31)")
    rule(manifest.text_chars >= 0, "text_chars", manifest.text_chars, "must be >= 0")
    for i, part in enumerate(manifest.parts):
        _check_part(manifest, f"parts[{i}]", part, rule)
    _check_coverage(manifest, rule)


def _check_fields(name: str, values: dict[str, Any], types: dict[str, type], prefix: str = "") -> None:
    for key, kind in types.items():
        if key not in values:
            _refuse(name, prefix + key, None, "is missing")
        if type(values[key]) is not kind:  # not isinstance: true is no number
            _refuse(name, prefix + key, values[key], f"must be of type {kind.__name__}")
    for key in values:
        if key not in types:
            _refuse(name, prefix + key, values[key], f"is not a field of format {FORMAT_VERSION}")


def _check_identity(manifest: Manifest, expected: str, rule: Rule) -> None:
    for where in ("content_sha256", "fingerprint"):
        value = getattr(manifest, where)
        rule(bool(_SHA256.fullmatch(value)), where, value, "must be 64 hexadecimal digits")
    rule(manifest.fingerprint == expected, "fingerprint", manifest.fingerprint, f"its fields hash to {expected}")
    try:
        offset = datetime.fromisoformat(manifest.created_at).utcoffset()
    except ValueError:
        offset = None
    rule(offset == timedelta(0), "created_at", manifest.created_at, "must be an ISO 8601 time in UTC")


def _check_geometry(geometry: Geometry, rule: Rule) -> None:
    for where in ("n_layers", "n_kv_heads", "n_query_heads", "head_dim"):
        value = getattr(geometry, where)
        rule(1 <= value <= _MAX_WIDTH, f"geometry.{where}", value, f"must be in [1, {_MAX_WIDTH}]")
    for where in ("sink_tokens", "window_tokens"):
        value = getattr(geometry, where)
        rule(0 <= value <= _INT32_MAX, f"geometry.{where}", value, "must be in [0, 2^31)")
    rule(
        geometry.n_query_heads % geometry.n_kv_heads == 0,
        "geometry.n_query_heads",
        geometry.n_query_heads,
        f"must be a multiple of n_kv_heads = {geometry.n_kv_heads}",
    )
    rule(geometry.kv_dtype in DTYPES, "geometry.kv_dtype", geometry.kv_dtype, f"must be one of {', '.join(DTYPES)}")
    rule(geometry.index in INDEX_KINDS, "geometry.index", geometry.index, f"must be one of {', '.join(INDEX_KINDS)}")
    low = 1 if geometry.holds("graph") else 0
    rule(low <= geometry.degree <= _MAX_WIDTH, "geometry.degree", geometry.degree, f"must be in [{low}, {_MAX_WIDTH}]")
    windows = geometry.sliding_windows
    rule(
        len(windows) == geometry.n_layers and all(0 <= window <= _INT32_MAX for window in windows),
        "geometry.sliding_windows",
        windows,
        f"must be one number >= 0 for each of {geometry.n_layers} layers",
    )
    streaming = geometry.streaming_heads
    sound = len(streaming) in (0, geometry.n_layers) and all(
        not heads or (not window and _ascending(heads, geometry.n_kv_heads))
        for heads, window in zip(streaming, windows, strict=False)
    )
    fix = f"must be, for each of {geometry.n_layers} layers, ascending heads; none where the layer has a window"
    rule(sound, "geometry.streaming_heads", streaming, fix)


def _check_part(manifest: Manifest, where: str, part: Part, rule: Rule) -> None:
    geometry = manifest.geometry
    rule(part.kind in ("layer", "tokens"), f"{where}.kind", part.kind, "must be layer or tokens")
    rule(bool(_PART_PATH.fullmatch(part.path)), f"{where}.path", part.path, "must lie below parts/ of this store")
    rule(bool(_SHA256.fullmatch(part.sha256)), f"{where}.sha256", part.sha256, "must be 64 hexadecimal digits")
    codecs: tuple[tuple[Of, str], ...] = (("key", part.key_codec), ("value", part.value_codec))
    for of, codec in codecs:
        rule(codec in CODECS, f"{where}.{of}_codec", codec, f"must be one of {', '.join(CODECS)}")
    if part.kind == "tokens":
        place = (part.layer, part.head_start, part.head_stop)
        rule(place == (-1, 0, 0), f"{where}.layer", place, "a tokens part has layer -1 and no heads")
        rows, low = manifest.context_tokens, 0
    else:
        rule(0 <= part.layer < geometry.n_layers, f"{where}.layer", part.layer, f"must be in [0, {geometry.n_layers})")
        heads = (part.head_start, part.head_stop)
        rule(0 <= heads[0] < heads[1] <= geometry.n_kv_heads, f"{where}.head_start", heads, "must be a range of heads")
        streaming = geometry.streaming_among(part.layer, range(*heads))
        rule(streaming in (0, heads[1] - heads[0]), f"{where}.head_start", heads, "all or none of them must stream")
        rows = manifest.stored_rows(part.layer, streaming=streaming > 0)
        low = (heads[1] - heads[0]) * sum(_least_bytes(manifest, rows, of, codec) for of, codec in codecs)
    rule(part.rows == rows, f"{where}.rows", part.rows, f"must be {rows}")
    rule(low < part.bytes <= _MAX_PART_BYTES, f"{where}.bytes", part.bytes, f"must be in ({low}, {_MAX_PART_BYTES}]")


def _least_bytes(manifest: Manifest, rows: int, of: Of, codec: str) -> int:
    """Of the keys or values of one head in so many rows."""
    geometry = manifest.geometry
    row_bytes = geometry.head_dim * ITEM_BYTES[geometry.kv_dtype]
    if codec == "none":
        return rows * row_bytes
    indexed = manifest.index_stop - manifest.index_start
    groups = -(-indexed // GROUP) * group_width(codec, of, geometry.head_dim)
    return max(rows - indexed, 0) * row_bytes + indexed * code_width(codec, of, geometry.head_dim) + groups


def _check_coverage(manifest: Manifest, rule: Rule) -> None:
    twice = [path for path, count in Counter(part.path for part in manifest.parts).items() if count > 1]
    rule(not twice, "parts", twice, "lists a path twice")
    n_tokens = sum(part.kind == "tokens" for part in manifest.parts)
    rule(n_tokens == 1, "parts", n_tokens, "must hold exactly one tokens part")
    stops = [0] * manifest.geometry.n_layers
    for part in sorted(manifest.parts, key=lambda p: (p.layer, p.head_start)):
        if part.kind == "layer":
            what = f"layer {part.layer}: heads from {stops[part.layer]} are missing or listed twice"
            rule(part.head_start == stops[part.layer], "parts", (part.head_start, part.head_stop), what)
            stops[part.layer] = part.head_stop
    for layer, stop in enumerate(stops):
        what = f"layer {layer}: must cover {manifest.geometry.n_kv_heads} heads"
        rule(stop == manifest.geometry.n_kv_heads, "parts", stop, what)


def _ascending(heads: tuple[int, ...], n_heads: int) -> bool:
    return list(heads) == sorted({*heads}) and heads[0] >= 0 and heads[-1] < n_heads
