"""The catalog is a cache: what it makes of a store is always what the manifests say."""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from storage_samples import FIELDS, FINGERPRINT, HOSTILE_IDS, prepare

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage import catalog, compaction, filesystem, listing
from rabatch.storage.catalog import Counts, document_entries, entries, generations, newest, read_generation
from rabatch.storage.compaction import compact
from rabatch.storage.manifest import Manifest, document_key, manifest_path
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import SCHEMA, Filter, id_text, summarise, table_of


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    return IndexStore(str(tmp_path / "store"), create=True)


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexStore]:
    if request.param == "s3":
        url, options = request.getfixturevalue("s3_url")
        yield IndexStore(url, create=True, storage_options=options)
    else:
        yield IndexStore(f"memory://{tmp_path.name}" if request.param == "memory" else tmp_path, create=True)


@pytest.fixture
def sample(store: IndexStore) -> Manifest:
    """A manifest whose parts are there, not committed."""
    return prepare(store)[0]


def put(store: IndexStore, like: Manifest, document_id: str, **changes: Any) -> Manifest:
    """A manifest in the store. Its parts are another document's: a catalog never looks at them."""
    content = hashlib.sha256(str(changes.pop("text", document_id)).encode("utf-8", "surrogatepass")).hexdigest()
    manifest = dataclasses.replace(like, document_id=document_id, content_sha256=content, **changes)
    store.folder.write(manifest.path, manifest.to_json().encode())
    return manifest


def listed(store: IndexStore, counts: Counts | None = None) -> dict[str, dict[str, Any]]:
    """All rows by path, after a check that they are in order and whole."""
    tables = list(entries(store, counts=counts))
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    assert [row["path"] for row in rows] == sorted({row["path"] for row in rows})
    return {row["path"]: row for row in rows}


def truth(store: IndexStore) -> dict[str, dict[str, Any]]:
    """What the rows must be, from manifests and a listing of files."""
    tags = {file.path: file.tag for file in store.folder.files("manifests")}
    return {m.path: table_of([summarise(m, tags[m.path])]).to_pylist()[0] for m in store.manifests()}


def sources(store: IndexStore) -> tuple[int, int]:
    counts = Counts()
    assert listed(store, counts) == truth(store)
    return counts.kept, counts.read


def test_what_changed_since_is_read_and_nothing_else(any_store: IndexStore) -> None:
    store = any_store
    like, _ = prepare(store)
    first = [put(store, like, f"doc {i}") for i in range(5)]
    assert sources(store) == (0, 5)
    done = compact(store)
    assert (done.generation, done.written, done.entries, done.read, done.dropped) == (1, True, 5, 5, 0)
    assert sources(store) == (5, 0)
    put(store, like, "later")  # committed after it
    store.withdraw(first[1].path)  # withdrawn after it
    renewed = dataclasses.replace(first[2], created_at="2031-01-01T00:00:00+00:00")  # as a build renews an index
    assert len(renewed.to_json()) == len(first[2].to_json())
    store.folder.write(renewed.path, renewed.to_json().encode())
    assert sources(store) == (3, 2)
    assert listed(store)[renewed.path]["created_at"] == renewed.created_at
    assert first[1].path not in listed(store)
    done = compact(store)
    assert (done.generation, done.written, done.entries, done.read, done.dropped) == (2, True, 5, 2, 2)
    assert sources(store) == (5, 0)


def test_a_compaction_of_nothing_new_writes_nothing(store: IndexStore, sample: Manifest) -> None:
    assert compact(store) == compaction.Compaction(generation=0, written=False, entries=0, read=0, dropped=0)
    put(store, sample, "doc")
    assert compact(store).written
    before = store.folder.list()
    done = compact(store)
    assert (done.generation, done.written, done.entries) == (1, False, 1)
    assert store.folder.list() == before


@pytest.mark.parametrize("document_id", [*HOSTILE_IDS, "lone \ud800 surrogate", "\u202e"])
def test_ids_are_data(store: IndexStore, sample: Manifest, document_id: str) -> None:
    manifest = put(store, sample, document_id, metadata={"title": document_id, "n": [1, None]})
    put(store, sample, document_id + "x")
    compact(store)
    assert sources(store) == (2, 0)
    assert id_text(listed(store)[manifest.path]["document_id"]) == document_id
    (row,) = document_entries(store, document_id).to_pylist()
    assert (row["path"], id_text(row["document_id"])) == (manifest.path, document_id)


def test_a_document_is_found_without_reading_others(any_store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    like, _ = prepare(any_store)
    one, two = (put(any_store, like, "doc", text=text) for text in "ab")
    other, _ = prepare(any_store, "doc", fields={**FIELDS, "model": "other"})
    any_store.commit(other)
    for i in range(3):
        put(any_store, like, f"other {i}")
    any_store.folder.write(manifest_path("other 0", "0" * 64, FINGERPRINT), b"damaged")
    read: list[str] = []
    original = any_store.folder.read
    monkeypatch.setattr(any_store.folder, "read", lambda path, **o: (read.append(path), original(path, **o))[1])
    found = document_entries(any_store, "doc")
    assert sorted(found["path"].to_pylist()) == sorted(read) == sorted([one.path, two.path, other.path])
    assert document_entries(any_store, "nowhere").num_rows == 0


def test_without_the_catalog_nothing_is_lost(store: IndexStore, sample: Manifest) -> None:
    put(store, sample, "doc")
    compact(store)
    for path in store.folder.list("catalog"):
        store.folder.delete(path)
    assert sources(store) == (0, 1)
    assert compact(store).generation == 1


def _truncate(data: bytes) -> bytes:
    return data[:-7]


def _flip(data: bytes) -> bytes:
    at = 0 if data.startswith(b"{") else len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [_truncate, _flip, None], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("kind", [".json", ".parquet"])
def test_a_damaged_catalog_is_named_and_gone_without(
    store: IndexStore, sample: Manifest, caplog: pytest.LogCaptureFixture, kind: str, damage: Any
) -> None:
    for i in range(4):
        put(store, sample, f"doc {i}")
    compact(store)
    (path,) = [path for path in store.folder.list("catalog") if path.endswith(kind)]
    if damage is None:
        store.folder.delete(path)
    else:
        store.folder.write(path, damage(store.folder.read(path)))
    silent = kind == ".json" and damage is None  # then there is no catalog, which is well
    with caplog.at_level(logging.WARNING):
        assert sources(store) == (0, 4)
    assert len(caplog.messages) == (0 if silent else 1)
    for message in caplog.messages:
        assert path in message
        assert "`rabatch compact`" in message
        assert "\n" not in message
    done = compact(store)
    assert (done.written, done.entries, done.generation) == (True, 4, 1 if silent else 2)
    caplog.clear()
    assert sources(store) == (4, 0)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b'{"version": 2}',
        b'{"version": 2, "segments": [{}]}',
        b'{"version": 2, "segments": [{"path": "../x", "rows": 1, "bytes": 1, "sha256": ""}]}',
        b'{"version": 2, "segments": [{"path": "rabatch-store.json", "rows": 1, "bytes": 1, "sha256": ""}]}',
        b'{"version": 1, "segments": []}',
        b'{"version": 9, "segments": []}',
        b"\xff",
    ],
)
def test_generations_are_not_trusted(store: IndexStore, sample: Manifest, text: bytes) -> None:
    put(store, sample, "doc")
    store.folder.write("catalog/00000003.json", text)
    with pytest.raises(IntegrityError, match=r"catalog/00000003\.json.*`rabatch compact`"):
        read_generation(store, 3)
    assert sources(store) == (0, 1)
    assert compact(store).generation == 4


def test_one_damaged_segment_costs_its_own_rows(
    store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_CHUNK", 3)
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", 3)
    for i in range(10):
        put(store, sample, f"doc {i}")
    compact(store)
    found = newest(store)
    assert found is not None
    assert [segment.rows for segment in found.segments] == [3, 3, 3, 1]
    store.folder.write(found.segments[1].path, b"")
    assert sources(store) == (7, 3)
    store.withdraw(next(iter(listed(store))))
    assert sources(store) == (6, 3)


@pytest.mark.parametrize(("chunk", "segment"), [(1, 1), (2, 5), (5, 2), (100, 3)])
def test_pieces_of_any_size_make_the_same_list(
    store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch, chunk: int, segment: int
) -> None:
    monkeypatch.setattr(catalog, "_CHUNK", chunk)
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", segment)
    manifests = [put(store, sample, f"doc {i}") for i in range(9)]
    compact(store)
    by_path = sorted(manifests, key=lambda m: m.path)
    for gone in (by_path[0], by_path[3], by_path[4], by_path[8]):
        store.withdraw(gone.path)
    for i in range(9, 14):
        put(store, sample, f"doc {i}")
    assert sources(store) == (5, 5)
    compact(store)
    assert sources(store) == (10, 0)


def test_of_two_compactions_one_counts(any_store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    like, _ = prepare(any_store)
    for i in range(3):
        put(any_store, like, f"doc {i}")
    start = threading.Barrier(3)
    publish = compaction.publish

    def together(*arguments: Any) -> bool:
        start.wait()
        return publish(*arguments)

    monkeypatch.setattr(compaction, "publish", together)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: compact(any_store), range(3)))
    assert sorted(one.written for one in done) == [False, False, True]
    assert {one.generation for one in done} == {1}
    assert len(any_store.folder.list("catalog")) == 2  # the losers removed what they wrote
    assert sources(any_store) == (3, 0)


@pytest.mark.parametrize("crash", ["segment", "generation"])
def test_an_interrupted_compaction_changes_nothing(
    store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    put(store, sample, "doc 0")
    compact(store)
    put(store, sample, "doc 1")

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "create" if crash == "generation" else "write", killed)
        patch.setattr(store.folder, "delete", lambda path: None)  # a killed process clears nothing away
        with pytest.raises(KeyboardInterrupt):
            compact(store)
    assert generations(store) == [1]
    assert sources(store) == (1, 1)
    assert compact(store).generation == 2
    assert sources(store) == (2, 0)


def test_commits_during_a_compaction_are_listed(
    store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed, renewed or withdrawn between a compaction's listing and its end."""
    manifests = [put(store, sample, f"doc {i}") for i in range(3)]
    original = store.read_manifests

    def meanwhile(*arguments: Any, **options: Any) -> Iterator[Manifest]:
        put(store, sample, "new")
        store.withdraw(manifests[0].path)
        renewed = dataclasses.replace(manifests[1], created_at="2031-01-01T00:00:00+00:00")
        store.folder.write(renewed.path, renewed.to_json().encode())
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_manifests", meanwhile)
        assert compact(store).entries == 2
    assert sources(store) == (1, 2)  # the renewed one was summarised as it is, under the tag of what it was


def test_damaged_manifests_are_reported_and_left_out(store: IndexStore, sample: Manifest) -> None:
    put(store, sample, "good")
    bad = put(store, sample, "bad")
    store.folder.write(bad.path, b"{}")
    with pytest.raises(IntegrityError, match=bad.path):
        listed(store)
    done = compact(store)
    assert (done.entries, len(done.damaged)) == (1, 1)
    assert bad.path in done.damaged[0]
    seen: list[str] = []
    tables = list(entries(store, on_error=lambda path, error: seen.append(path)))
    assert seen == [bad.path]
    assert sum(table.num_rows for table in tables) == 1


def test_a_manifest_damaged_after_it_was_listed_is_reported(store: IndexStore, sample: Manifest) -> None:
    bad = put(store, sample, "bad")
    compact(store)
    store.folder.write(bad.path, b"{}")
    with pytest.raises(IntegrityError, match=bad.path):
        listed(store)


def test_a_listing_without_tags_reads_every_manifest(
    store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, sample, "doc")
    walk = store.folder.walk
    monkeypatch.setattr(store.folder, "walk", lambda path: (file._replace(tag="") for file in walk(path)))
    compact(store)
    counts = Counts()
    list(entries(store, counts=counts))
    assert (counts.kept, counts.read) == (0, 1)


def test_only_the_wanted_columns_are_read(store: IndexStore, sample: Manifest) -> None:
    put(store, sample, "a")
    compact(store)
    put(store, sample, "b")
    (table,) = entries(store, columns=["document_id"])
    assert table.column_names == ["path", "tag", "document_id"]
    assert sorted(table["document_id"].to_pylist()) == [b"a", b"b"]
    (table,) = entries(store)
    assert table.schema.equals(SCHEMA)


def test_filters(store: IndexStore, sample: Manifest) -> None:
    now = datetime(2030, 1, 10, tzinfo=UTC)
    none = dataclasses.replace(sample.geometry, index="none", degree=0)
    for name, days, changes in (
        ("old", 9, {"stats": {"model": "hub/demo"}}),
        ("new", 1, {"stats": {"model": "demo"}, "geometry": none}),
        ("other", 1, {"stats": {"model": "mydemo"}}),
        ("unnamed", 1, {"stats": {}}),
    ):
        put(store, sample, name, created_at=(now - timedelta(days=days)).isoformat(), **changes)
    (table,) = entries(store)

    def names(**chosen: Any) -> set[str]:
        return {id_text(data) for data in Filter(**chosen).of(table)["document_id"].to_pylist()}

    assert names() == {"old", "new", "other", "unnamed"}
    assert names(model="demo") == {"old", "new"}
    assert names(model="hub/demo") == {"old"}
    assert names(index="none") == {"new"}
    assert names(since=now - timedelta(days=1)) == {"new", "other", "unnamed"}
    assert names(until=now - timedelta(days=1, seconds=1)) == {"old"}
    assert names(model="demo", index="graph", since=now - timedelta(days=1)) == set()


def test_walking_finds_what_listing_finds_in_the_same_order(
    any_store: IndexStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder is read in several rounds, and a server's listing is cut by prefix."""
    keys = [document_key(str(i)) for i in range(12)]
    for key in keys:
        for folder in ("0" * 16, "f" * 16):
            any_store.folder.write(f"parts/{folder}/{key}/a/x.parquet", b"1")
            any_store.folder.write(f"parts/{folder}/{key}-a", b"12")
    whole = any_store.folder.files("parts")
    assert len(whole) == 48
    assert [file.path for file in whole] == sorted(file.path for file in whole)
    assert list(any_store.folder.walk("parts")) == whole
    monkeypatch.setattr(listing, "_NAMES_HELD", 7)
    monkeypatch.setattr(listing, "_SHARD_FILES", -1)
    monkeypatch.setattr(listing, "_MAX_DIGITS", 1)
    asked: list[str] = []
    files = any_store.folder.files
    monkeypatch.setattr(
        any_store.folder, "files", lambda path, prefix="": (asked.append(prefix), files(path, prefix))[1]
    )
    assert list(any_store.folder.walk("parts")) == whole
    if "s3" in any_store.url:
        assert set(asked) == {"00", *"0123456789abcdef"}  # it was cut
    some = any_store.folder.files(f"parts/{'0' * 16}", keys[3][:2])
    assert [f.path for f in some] == [f.path for f in whole if f.path.startswith(f"parts/{'0' * 16}/{keys[3][:2]}")]
    assert any_store.folder.subfolders("parts") == [f"parts/{'0' * 16}", f"parts/{'f' * 16}"]
    assert any_store.folder.subfolders("nowhere") == []
    assert list(any_store.folder.walk("nowhere")) == []


def test_a_replaced_file_has_another_tag(any_store: IndexStore) -> None:
    any_store.folder.write("x/a", b"one")
    before = any_store.folder.files("x")[0]
    any_store.folder.write("x/a", b"two")
    after = any_store.folder.files("x")[0]
    assert before.tag != after.tag
    assert (before.path, before.bytes) == (after.path, after.bytes) == ("x/a", 3)
    assert abs(after.changed_s - datetime.now(UTC).timestamp()) < 300


def test_links_to_folders_are_not_followed(store: IndexStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious.parquet").write_bytes(b"1")
    (tmp_path / "store/parts").mkdir()
    (tmp_path / "store/parts/link").symlink_to(tmp_path / "outside")
    assert list(store.folder.walk("parts")) == store.folder.subfolders("parts") == []


def test_a_failing_listing_is_one_line(store: IndexStore, sample: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, sample, "doc")

    def fail(*_: Any) -> Any:
        raise PermissionError("no")

    monkeypatch.setattr(filesystem.os, "scandir", fail)
    with pytest.raises(StoreError, match="access denied"):
        list(entries(store))
