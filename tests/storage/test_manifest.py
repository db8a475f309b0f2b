"""A manifest that comes from somewhere else is believed only as far as it holds together."""

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import FIELDS, FINGERPRINT, HOSTILE_IDS, prepare

from rabatch.errors import DocumentError, FormatVersionError, IntegrityError
from rabatch.storage.manifest import DIGEST, Manifest, document_key, fingerprint_of, manifest_path
from rabatch.storage.store import IndexStore


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    store = IndexStore(str(tmp_path_factory.mktemp("store")), create=True)
    return prepare(store, heads_per_part=1)[0]


def test_round_trip(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json().encode()) == manifest
    assert manifest.stored_bytes == sum(p.bytes for p in manifest.parts) > 0
    assert (manifest.index_start, manifest.index_stop) == (3, 15)


@pytest.mark.parametrize(
    ("tokens", "start", "stop"), [(1, 1, 1), (3, 3, 3), (4, 3, 3), (8, 3, 3), (9, 3, 4), (100, 3, 95)]
)
def test_the_index_range_of_short_contexts(manifest: Manifest, tokens: int, start: int, stop: int) -> None:
    short = dataclasses.replace(manifest, context_tokens=tokens)
    assert (short.index_start, short.index_stop) == (start, stop)


def test_fingerprint_is_canonical() -> None:
    # Part of the format: SHA-256 of the bytes {"a":[1,2.5],"b":"\\u00e9"}, by another program.
    expected = "60d4fe7d84d09285a774fa6c850ed0e739e0153890529471751ae4df4e1df886"
    assert fingerprint_of({"b": "é", "a": (1, 2.5)}) == expected
    assert fingerprint_of({"a": [1, 2.5], "b": "é"}) == expected
    assert fingerprint_of({"a": [1, 2.5], "b": "e"}) != expected
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": b"bytes"}):
        with pytest.raises(DocumentError, match="fingerprint_fields"):
            fingerprint_of(bad)


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
@settings(max_examples=50, deadline=None)
def test_fingerprint_survives_the_manifest(fields: dict[str, Any]) -> None:
    assert fingerprint_of(json.loads(json.dumps(fields))) == fingerprint_of(fields)


@pytest.mark.parametrize("document_id", HOSTILE_IDS, ids=lambda i: repr(i[:12]))
def test_ids_never_reach_paths(document_id: str) -> None:
    path = manifest_path(document_id, "c" * 64, FINGERPRINT)
    assert re.fullmatch(r"manifests/[0-9a-f]{16}/[0-9a-f]{32}-c{16}\.json", path)


@given(st.text(), st.text())
@settings(max_examples=50, deadline=None)
def test_ids_have_their_own_keys(a: str, b: str) -> None:
    assert (document_key(a) == document_key(b)) == (a == b)


def _set(values: dict[str, Any], where: str, value: object) -> None:
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    for key in path:
        values = values[key]  # type: ignore[index]
    if value is KeyError:
        del values[last]  # type: ignore[arg-type]
    else:
        values[last] = value  # type: ignore[index]


HOSTILE = [
    ("format_version", KeyError),
    ("format_version", None),
    ("format_version", "1"),
    ("format_version", 1.0),
    ("format_version", True),
    ("document_id", KeyError),
    ("document_id", 5),
    ("content_sha256", "ABC"),
    ("content_sha256", "g" * 64),
    ("fingerprint", "0" * 64),
    ("fingerprint_fields", {**FIELDS, "model": "other"}),
    ("fingerprint_fields", []),
    ("fingerprint_fields.model", KeyError),
    ("context_tokens", 0),
    ("context_tokens", -1),
    ("context_tokens", 21),
    ("context_tokens", 2**40),
    ("context_tokens", 20.0),
    ("context_tokens", True),
    ("context_tokens", "20"),
    ("text_chars", -1),
    ("created_at", "yesterday"),
    ("created_at", "2026-01-01T00:00:00"),
    ("created_at", "2026-01-01T00:00:00+02:00"),
    ("metadata", None),
    ("stats", KeyError),
    ("surprise", 1),
    ("geometry", []),
    ("geometry.n_layers", 0),
    ("geometry.n_layers", 2),
    ("geometry.n_layers", 10**9),
    ("geometry.n_kv_heads", 3),
    ("geometry.n_kv_heads", 0),
    ("geometry.n_query_heads", 5),
    ("geometry.head_dim", -8),
    ("geometry.head_dim", 2**62),
    ("geometry.kv_dtype", "pickle"),
    ("geometry.sink_tokens", -1),
    ("geometry.window_tokens", 2**31),
    ("geometry.index", "tree"),
    ("geometry.degree", 0),
    ("geometry.sliding_windows", [0, 6]),
    ("geometry.sliding_windows", [0, -6, 0]),
    ("geometry.sliding_windows", [0, 5, 0]),
    ("geometry.sliding_windows", [0, "6", 0]),
    ("geometry.extra", 1),
    ("parts", {}),
    ("parts", []),
    ("parts.0", KeyError),
    ("parts.1", KeyError),
    ("parts.1", "parts/x.parquet"),
    ("parts.1.path", "../outside.parquet"),
    ("parts.1.path", "parts/../../outside.parquet"),
    ("parts.1.path", "parts/.hidden/x.parquet"),
    ("parts.1.path", "/etc/passwd"),
    ("parts.1.path", "/parts/x.parquet"),
    ("parts.1.path", "s3://bucket/parts/x.parquet"),
    ("parts.1.path", "file:///etc/x.parquet"),
    ("parts.1.path", "parts//x.parquet"),
    ("parts.1.path", "parts/x.pkl"),
    ("parts.1.path", "parts\\..\\x.parquet"),
    ("parts.1.path", "parts/x\n.parquet"),
    ("parts.1.path", "parts/x.parquet\n"),
    ("parts.1.path", "manifests/x.parquet"),
    ("parts.1.path", ""),
    ("parts.1.bytes", -1),
    ("parts.1.bytes", 0),
    ("parts.1.bytes", 100),
    ("parts.1.bytes", 2**60),
    ("parts.1.bytes", 1e3),
    ("parts.1.sha256", "f" * 63),
    ("parts.1.rows", 19),
    ("parts.1.rows", -20),
    ("parts.1.rows", 2**40),
    ("parts.1.layer", 1),
    ("parts.1.layer", 3),
    ("parts.1.layer", -1),
    ("parts.1.head_start", 1),
    ("parts.1.head_start", -1),
    ("parts.1.head_stop", 2),
    ("parts.1.head_stop", 0),
    ("parts.1.kind", "tokens"),
    ("parts.1.kind", "code"),
    ("parts.0.kind", "layer"),
    ("parts.0.layer", 0),
    ("parts.0.rows", 5),
    ("parts.1.codec", "int8"),
]


@pytest.mark.parametrize(("where", "value"), HOSTILE, ids=lambda v: repr(v)[:40])
def test_hostile_manifests_are_refused_by_name(manifest: Manifest, where: str, value: object) -> None:
    values = json.loads(manifest.to_json())
    del values[DIGEST]  # or, for a hostile one, made anew
    _set(values, where, value)
    with pytest.raises(IntegrityError, match=r"the-manifest\.json") as caught:
        Manifest.from_json(json.dumps(values), name="the-manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("metadata.title", "Grosse"),
        ("metadata.year", 2025),
        ("text_chars", 41),
        ("created_at", "2026-01-01T00:00:00+00:00"),
        ("stats", {"seconds": 1}),
        ("geometry.n_query_heads", 6),
        (DIGEST, "0" * 64),
        (DIGEST, None),
    ],
)
def test_what_no_rule_contradicts_is_refused_by_the_digest(manifest: Manifest, where: str, value: object) -> None:
    values = json.loads(manifest.to_json())
    _set(values, where, value)
    with pytest.raises(IntegrityError, match=r"the-manifest\.json: manifest_sha256.*verify --remove-damaged"):
        Manifest.from_json(json.dumps(values), name="the-manifest.json")


def test_manifests_of_before_the_digest_are_read(manifest: Manifest) -> None:
    values = json.loads(manifest.to_json())
    del values[DIGEST]
    assert Manifest.from_json(json.dumps(values)) == manifest


def test_a_part_listed_twice_is_refused(manifest: Manifest) -> None:
    for twice in range(len(manifest.parts)):
        double = dataclasses.replace(manifest, parts=(*manifest.parts, manifest.parts[twice]))
        with pytest.raises(IntegrityError, match="twice"):
            double.check()
    renamed = dataclasses.replace(manifest.parts[1], path="parts/other.parquet")
    with pytest.raises(IntegrityError, match="heads from 1"):
        dataclasses.replace(manifest, parts=(*manifest.parts, renamed)).check()


@pytest.mark.parametrize("version", [2, 0, -1])
def test_other_format_versions_say_so(manifest: Manifest, version: object) -> None:
    values = {**json.loads(manifest.to_json()), "format_version": version, "unknown_then": 1}
    with pytest.raises(FormatVersionError, match="format_version"):
        Manifest.from_json(json.dumps(values))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\x00", '{"format_version": NaN}', "[" * 100_000, b"\xff\xfe"],
    ids=lambda t: repr(t)[:12],
)
def test_what_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(IntegrityError, match="some-path"):
        Manifest.from_json(text, name="some-path")


def test_metadata_must_be_json(manifest: Manifest) -> None:
    for bad in ({"x": {1, 2}}, {"x": float("inf")}, {"x": b"1"}):
        with pytest.raises(DocumentError, match="metadata"):
            dataclasses.replace(manifest, metadata=bad).to_json()


def test_messages_begin_with_the_path_in_the_store(manifest: Manifest) -> None:
    with pytest.raises(IntegrityError, match=r"^manifests/"):
        dataclasses.replace(manifest, text_chars=-1).check()
