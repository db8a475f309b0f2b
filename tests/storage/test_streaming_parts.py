"""Streaming heads in the store: parts of their own that hold the static set, and manifests that say which they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_samples import FIELDS, FINGERPRINT, GEOMETRY, make_blocks, make_tokens

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage import rules
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.joining import check_against
from rabatch.storage.manifest import DIGEST, Geometry, Manifest, utc_now
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import summarise
from rabatch.storage.verify import verify

SHAPE = dataclasses.replace(GEOMETRY, n_kv_heads=5, n_query_heads=5, n_layers=4, sliding_windows=(0, 6, 0, 0))
MIXED = dataclasses.replace(SHAPE, streaming_heads=((1, 2, 4), (), (), (0, 1, 2, 3, 4)))
RUNS = {0: [(0, 1), (1, 3), (3, 4), (4, 5)], 1: [(0, 5)], 2: [(0, 5)], 3: [(0, 5)]}


def static_only(block: LayerBlock, manifest: Manifest) -> LayerBlock:
    """What is kept of streaming heads."""
    gone = slice(manifest.index_start, manifest.index_stop)
    rows = np.delete(np.arange(block.rows), gone)
    empty = dict.fromkeys(("neighbors", "entries", "scan", "zones", "profile"))
    kept: dict[str, Any] = {"positions": block.positions[rows], "keys": block.keys[:, rows]}
    return dataclasses.replace(block, **kept, values=block.values[:, rows], index_start=0, **empty)  # type: ignore[arg-type]


def prepare(
    store: IndexStore, geometry: Geometry = MIXED, context_tokens: int = 20
) -> tuple[Manifest, list[dict[bool, list[LayerBlock]]]]:
    """An index that is not committed, and its blocks by layer and by whether they stream."""
    where = {"document_id": "doc", "fingerprint": FINGERPRINT, "attempt": store.new_attempt()}
    manifest = Manifest(
        document_id="doc",
        content_sha256=hashlib.sha256(b"text").hexdigest(),
        fingerprint=FINGERPRINT,
        fingerprint_fields=FIELDS,
        context_tokens=context_tokens,
        text_chars=2 * context_tokens,
        created_at=utc_now(),
        geometry=geometry,
        parts=(),
    )
    parts, kept = [store.put_tokens(make_tokens(context_tokens), **where)], []
    for layer, whole in enumerate(make_blocks(context_tokens, geometry)):
        by_kind: dict[bool, list[LayerBlock]] = {False: [], True: []}
        for run, streaming in geometry.head_runs(layer):
            block = whole.select(run)
            by_kind[streaming].append(static_only(block, manifest) if streaming else block)
            parts.append(store.put_layer(by_kind[streaming][-1], **where))
        kept.append(by_kind)
    return dataclasses.replace(manifest, parts=tuple(parts)), kept


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    return IndexStore(tmp_path / "index", create=True)


@pytest.mark.parametrize("context_tokens", [1, 2, 3, 7, 8, 9, 20])
def test_what_is_read_is_what_was_written(store: IndexStore, context_tokens: int) -> None:
    """Also of a document that is all static set."""
    manifest, kept = prepare(store, context_tokens=context_tokens)
    store.commit(manifest)
    (found,) = store.manifests()
    assert found == manifest
    assert verify(store) == []
    for layer, by_kind in enumerate(kept):
        for streaming, blocks in by_kind.items():
            block = store.read_heads(found, layer, streaming=streaming)
            heads = found.geometry.heads(layer, streaming=streaming)
            assert (block is None) == (not blocks) == (not heads)
            if block is None:
                continue
            assert block.n_heads == len(heads) == sum(b.n_heads for b in blocks)
            for mine, head in enumerate(heads):
                (wanted,) = (b.select(range(head, head + 1)) for b in blocks if b.head_start <= head < b.head_stop)
                alone = dataclasses.replace(block.select(range(block.head_start + mine, block.head_start + mine + 1)))
                assert dataclasses.replace(alone, head_start=head).equals(wanted)
    static = store.read_heads(found, 3, streaming=True)
    assert static is not None
    ends = [*range(min(3, context_tokens)), *range(max(3, context_tokens - 5), context_tokens)]
    assert static.positions.tolist() == sorted({*ends} & {*range(context_tokens)})


def test_each_run_of_heads_of_one_kind_is_a_part(store: IndexStore) -> None:
    manifest, _ = prepare(store)
    manifest.check()
    for layer, wanted in RUNS.items():
        parts = [part for part in manifest.parts if part.layer == layer]
        assert [(part.head_start, part.head_stop) for part in parts] == wanted
    rows = {(part.layer, part.head_start): part.rows for part in manifest.parts if part.layer in (0, 3)}
    assert rows == {(0, 0): 20, (0, 1): 8, (0, 3): 20, (0, 4): 8, (3, 0): 8}


def test_either_kind_is_read_by_itself(store: IndexStore) -> None:
    manifest, kept = prepare(store)
    assert store.read_layer(manifest, 0, heads=range(1, 3)).equals(kept[0][True][0])
    assert store.read_layer(manifest, 2).equals(kept[2][False][0])
    for heads in (None, range(2), range(2, 5)):
        with pytest.raises(StoreError, match="of these heads of layer 0 stream; use read_heads"):
            store.read_layer(manifest, 0, heads=heads)


def test_bytes_are_those_of_the_static_set(store: IndexStore) -> None:
    """No bulk rows: a streaming head's part holds its keys, values and positions, and the file's own words."""
    manifest, _ = prepare(store, context_tokens=2000)
    by_place = {(part.layer, part.head_start): part for part in manifest.parts}
    static, whole = by_place[3, 0], by_place[2, 0]
    row_bytes = 2 * GEOMETRY.head_dim * 2 + 4
    assert 5 * 8 * row_bytes < static.bytes < 5 * 8 * row_bytes + 8000
    assert static.bytes < whole.bytes / 20


HOSTILE: list[tuple[Any, str]] = [
    ([[1, 2], [], [], [0, 1, 2, 3, 4]], "must be 20"),  # head 4 of layer 0 would keep every token
    ([[1, 2, 3, 4], [], [], [0, 1, 2, 3, 4]], "must be 8"),
    ([[2, 4], [], [], [0, 1, 2, 3, 4]], "all or none of them must stream"),
    ([[1, 2, 4], [], [], [0, 1, 2, 3]], "all or none of them must stream"),
    ([[1, 2, 4], [0], [], [0, 1, 2, 3, 4]], "none where the layer has a window"),
    ([[1, 2, 4], [], [], [0, 1, 2, 3, 5]], "ascending heads"),
    ([[-1, 2, 4], [], [], [0, 1, 2, 3, 4]], "ascending heads"),
    ([[2, 1, 4], [], [], [0, 1, 2, 3, 4]], "ascending heads"),
    ([[1, 1, 2, 4], [], [], [0, 1, 2, 3, 4]], "ascending heads"),
    ([[1, 2, 4], [], []], "for each of 4 layers"),
    ([[1, 2, 4], [], [], [0, 1, 2, 3, 4], []], "for each of 4 layers"),
    ([], "must be 20"),
    ([[1, 2, "4"], [], [], [0, 1, 2, 3, 4]], "whole numbers"),
    ([[1, 2, True], [], [], [0, 1, 2, 3, 4]], "whole numbers"),
    ([3, [], [], []], "whole numbers"),
    ({"0": [1]}, "must be of type list"),
    (None, "must be of type list"),
]


@pytest.mark.parametrize(("heads", "message"), HOSTILE, ids=lambda v: str(v)[:30])
def test_hostile_manifests_are_refused_by_name(store: IndexStore, heads: Any, message: str) -> None:
    values = json.loads(prepare(store)[0].to_json())
    del values[DIGEST]
    values["geometry"]["streaming_heads"] = heads
    with pytest.raises(IntegrityError, match=message):
        Manifest.from_json(json.dumps(values), name="the-manifest.json")


def test_a_part_with_other_rows_of_the_same_number_is_refused(store: IndexStore) -> None:
    """Not by its size: the rows are those of other tokens."""
    manifest, kept = prepare(store)
    part = next(part for part in manifest.parts if part.layer == 3)
    (block,) = kept[3][True]
    check_against(manifest, part, block)
    moved = dataclasses.replace(block, positions=block.positions + np.arange(block.rows, dtype=np.int32) // 7)
    with pytest.raises(IntegrityError, match="all but tokens 3 to 14"):
        check_against(manifest, part, moved)
    whole = make_blocks(20, MIXED)[3]
    with pytest.raises(IntegrityError, match="position"):
        check_against(manifest, part, whole)


def test_a_streaming_part_has_no_index(store: IndexStore) -> None:
    manifest, kept = prepare(store)
    part = next(part for part in manifest.parts if part.layer == 3)
    (block,) = kept[3][True]
    neighbors = np.zeros((5, 2, GEOMETRY.degree), np.int32)
    linked = dataclasses.replace(block, neighbors=neighbors, entries=np.zeros((5, 1), np.int32), index_start=3)
    with pytest.raises(IntegrityError, match="index_rows"):
        check_against(manifest, part, linked)


def test_a_reader_that_knows_no_streaming_heads_refuses(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prepare(store)[0].to_json()
    monkeypatch.setattr(rules, "_GEOMETRY_OPTIONAL", {})  # as it was before there were any
    with pytest.raises(IntegrityError, match=r"geometry\.streaming_heads.*is not a field"):
        Manifest.from_json(text)


def test_without_streaming_heads_a_manifest_is_as_it_was(store: IndexStore) -> None:
    manifest, _ = prepare(store, SHAPE)
    assert "streaming_heads" not in json.loads(manifest.to_json())["geometry"]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_catalog_tells_how_many_stream(store: IndexStore) -> None:
    row = summarise(prepare(store)[0], "")
    assert (row["heads"], row["streaming_heads"]) == (20, 8)
