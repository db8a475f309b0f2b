"""What is removed is what no reader can use: tested by what is left."""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from storage_samples import FIELDS, GEOMETRY, HOSTILE_IDS, prepare

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage import garbage
from rabatch.storage.catalog import generations, newest
from rabatch.storage.compaction import compact
from rabatch.storage.filesystem import Folder
from rabatch.storage.garbage import DAY_S, Collection, collect
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import attempts_of
from rabatch.storage.superseded import Index, superseded, withdraw_superseded
from rabatch.storage.verify import verify


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


def committed(store: IndexStore, document_id: str = "doc", **changes: Any) -> Manifest:
    names = ("content_sha256", "created_at")
    manifest, _ = prepare(store, document_id, **{k: v for k, v in changes.items() if k not in names})
    return store.commit(dataclasses.replace(manifest, **{k: v for k, v in changes.items() if k in names}))


def attempt(manifest: Manifest) -> str:
    (path,) = attempts_of(manifest)
    return path


def later(store: IndexStore, days: float, **options: Any) -> Collection:
    """`collect` as it would be so many days from now."""
    return collect(store, now_s=time.time() + days * DAY_S, **options)


def paths(found: Collection) -> list[str]:
    return [one.path for one in found.attempts]


def test_attempts_without_a_manifest_go_after_the_grace_period(any_store: IndexStore) -> None:
    kept = [committed(any_store, document_id) for document_id in ("doc", HOSTILE_IDS[0])]
    interrupted, _ = prepare(any_store)  # of a document that has an index, from another attempt
    alone, _ = prepare(any_store, "never committed")
    gone = sorted([attempt(interrupted), attempt(alone)])
    before = any_store.folder.list()
    found = later(any_store, 0.9)
    assert (found.attempts, found.waiting, any_store.folder.list()) == ([], 2, before)
    found = later(any_store, 1.1, dry_run=True)
    assert (paths(found), any_store.folder.list()) == (gone, before)
    found = later(any_store, 1.1)
    assert paths(found) == gone
    assert (sum(one.files for one in found.attempts), found.bytes) == (
        8,
        sum(p.bytes for m in (interrupted, alone) for p in m.parts),
    )
    assert any_store.folder.list() == {p: n for p, n in before.items() if not p.startswith(tuple(gone))}
    assert verify(any_store) == []
    assert {m.document_id for m in any_store.manifests()} == {m.document_id for m in kept}
    assert later(any_store, 9) == Collection()


def test_an_empty_store_has_no_garbage(any_store: IndexStore) -> None:
    assert collect(any_store, grace_s=0) == Collection()
    assert list(any_store.folder.list()) == ["rabatch-store.json"]  # what told the time is gone


def test_one_fresh_part_keeps_its_attempt(store: IndexStore, tmp_path: Path) -> None:
    manifest, _ = prepare(store)
    collected_s = time.time() + 2 * DAY_S
    walk, files = store.folder.walk, store.folder.files

    def aged(listed: Any) -> Any:
        fresh = manifest.parts[2].path
        return (f._replace(changed_s=collected_s - 60) if f.path == fresh else f for f in listed)

    store.folder.walk = lambda path: aged(walk(path))  # type: ignore[method-assign]
    store.folder.files = lambda path="", prefix="": list(aged(files(path, prefix)))  # type: ignore[method-assign]
    found = collect(store, now_s=collected_s)
    assert (found.attempts, found.waiting) == ([], 1)


def test_a_commit_between_listing_and_removal_is_safe(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = prepare(store)
    remove = garbage._remove

    def after_commit(*arguments: Any) -> Collection:
        store.commit(manifest)
        return remove(*arguments)

    monkeypatch.setattr(garbage, "_remove", after_commit)
    assert later(store, 2).attempts == []
    assert verify(store) == []
    assert list(store.manifests()) == [manifest]


def test_an_attempt_that_goes_on_is_kept(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is written between the listing and the removal."""
    prepare(store)
    files = store.folder.files
    in_two_days = time.time() + 2 * DAY_S

    def still_writing(path: str = "", prefix: str = "") -> Any:
        return [f._replace(changed_s=in_two_days) if path.startswith("parts/") else f for f in files(path, prefix)]

    monkeypatch.setattr(store.folder, "files", still_writing)
    found = collect(store, now_s=in_two_days)
    assert (found.attempts, found.waiting) == ([], 1)


def test_a_withdrawn_index_stays_readable_for_the_grace_period(any_store: IndexStore) -> None:
    manifest = committed(any_store)
    opened_s = time.time() + 30 * DAY_S  # the parts are old, its withdrawal is not
    any_store.withdraw(manifest.path)
    withdrawn = any_store.folder.files("withdrawn")
    assert [any_store.folder.read(file.path) for file in withdrawn] == [manifest.to_json().encode()]
    files = any_store.folder.files

    def as_of_then(path: str = "", prefix: str = "") -> Any:
        return [f._replace(changed_s=opened_s) if path.startswith("withdrawn") else f for f in files(path, prefix)]

    any_store.folder.files = as_of_then  # type: ignore[method-assign]
    walk = any_store.folder.walk
    any_store.folder.walk = lambda path: iter(as_of_then(path) if path == "withdrawn" else walk(path))  # type: ignore[method-assign]
    found = collect(any_store, now_s=opened_s + 0.9 * DAY_S)
    assert (found.attempts, found.waiting, found.others) == ([], 1, [])
    any_store.read_layer(manifest, 0)  # by whoever opened it before
    found = collect(any_store, now_s=opened_s + 1.1 * DAY_S)
    assert (paths(found), found.others) == ([attempt(manifest)], [withdrawn[0].path])
    assert list(any_store.folder.list()) == ["rabatch-store.json"]


def test_a_withdrawal_leaves_its_record_first(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = committed(store)

    def killed(path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            store.withdraw(manifest.path)
    assert len(store.folder.list("withdrawn")) == 1
    assert later(store, 2).attempts == []  # the record is old and gone, the manifest is there
    assert (verify(store), store.folder.list("withdrawn")) == ([], {})
    store.withdraw(manifest.path)
    store.withdraw(manifest.path)  # one that is gone
    assert len(store.folder.list("withdrawn")) == 1


def test_what_was_withdrawn_can_be_put_back(store: IndexStore) -> None:
    manifest = committed(store)
    store.withdraw(manifest.path)
    (record,) = store.folder.list("withdrawn")
    store.folder.write(manifest.path, store.folder.read(record))
    assert later(store, 5).attempts == []
    assert verify(store) == []
    assert list(store.manifests()) == [manifest]


def test_withdrawals_between_the_reads_wait(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = committed(store)
    other, _ = prepare(store)
    read = store.read_manifests

    def withdrawn_then(*arguments: Any, **options: Any) -> Any:
        store.withdraw(manifest.path)
        return read(*arguments, **options)

    compact(store)  # so that only `_remove` reads it
    monkeypatch.setattr(garbage, "_candidates", _with_all(manifest, other))
    monkeypatch.setattr(store, "read_manifests", withdrawn_then)
    start_s = time.time()
    found = collect(store, grace_s=0, now_s=start_s - 0.001)  # parts of a moment ago are old, the record is not
    assert (found.attempts, found.waiting) == ([], 2)


def _with_all(*manifests: Manifest) -> Any:
    def candidates(*_: Any) -> Iterator[list[garbage.Attempt]]:
        yield [garbage.Attempt(attempt(manifest), 4, 0, 0.0) for manifest in manifests]

    return candidates


@pytest.mark.parametrize("text", [b"{}", b"", b"\xff"], ids=repr)
def test_nothing_goes_of_a_document_with_a_damaged_manifest(store: IndexStore, text: bytes) -> None:
    bad, other = committed(store, "bad"), committed(store, "other")
    loose = [prepare(store, name)[0] for name in ("bad", "other")]
    store.folder.write(bad.path, text)
    found = later(store, 2)
    assert paths(found) == [attempt(loose[1])]
    assert len(found.problems) == 1
    assert bad.path in found.problems[0]
    assert set(store.folder.list(attempt(bad))) == {part.path for part in bad.parts}
    assert verify(store)[0].manifest_path == bad.path
    assert [m.document_id for m in store.manifests(on_error=lambda path, error: None)] == [other.document_id]
    store.withdraw(bad.path)  # damaged, and still dated
    assert later(store, 2).waiting == 0
    assert store.folder.list(attempt(bad)) == {}


def test_damage_that_the_catalog_hides_is_found_before_anything_goes(store: IndexStore, tmp_path: Path) -> None:
    bad = committed(store)
    loose, _ = prepare(store)
    compact(store)
    file = tmp_path / "store" / bad.path
    before = file.stat()
    file.write_bytes(b" " * before.st_size)  # as a disk does it: same size, same time
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = later(store, 2)
    assert (found.attempts, [bad.path in problem for problem in found.problems]) == ([], [True])
    assert set(store.folder.list(attempt(loose))) == {part.path for part in loose.parts}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("manifests/notes.json", b"{}"),
        ("manifests/0123456789abcdef/x.json", b"{}"),
        (None, b'{"format_version": 2}'),
    ],
)
def test_a_manifest_of_nobody_knows_whom_stops_everything(store: IndexStore, path: str | None, text: bytes) -> None:
    path = path or committed(store).path
    prepare(store, "interrupted")
    store.folder.write(path, text)
    before = store.folder.list()
    with pytest.raises(IntegrityError, match=path):
        later(store, 2)
    assert store.folder.list() == before


def test_parts_of_elsewhere_are_kept(store: IndexStore) -> None:
    """A manifest may list parts that lie below another document: readers refuse them, but they are not garbage."""
    loose, _ = prepare(store, "a")
    for name in ("0", "b", "z"):  # before and after it in order of paths
        mine, _ = prepare(store, name)
        store.commit(dataclasses.replace(mine, parts=(loose.parts[0], *mine.parts[1:])))
    compact(store)
    assert later(store, 2).attempts == []
    assert set(store.folder.list(attempt(loose))) == {part.path for part in loose.parts}


def test_foreign_files_are_named_and_left(store: IndexStore) -> None:
    for path in (
        "parts/readme.txt",
        "parts/x/y/z/part.parquet",
        "catalog/notes.txt",
        "parts/" + "0" * 16 + "/a.parquet",
    ):
        store.folder.write(path, b"1")
    before = store.folder.list()
    assert sorted(later(store, 9).unknown) == sorted(p for p in before if p.startswith("parts/"))
    assert store.folder.list() == before


def test_a_catalog_that_lies_removes_nothing(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = committed(store)
    loose, _ = prepare(store)
    summarise = garbage.entries.__globals__["summarise"]
    with monkeypatch.context() as patch:
        patch.setitem(garbage.entries.__globals__, "summarise", lambda *a: {**summarise(*a), "attempts": []})
        compact(store)
    assert paths(later(store, 2)) == [attempt(loose)]
    assert verify(store) == []
    assert list(store.manifests()) == [manifest]


def test_interrupted_local_writes_go_with_their_attempt(store: IndexStore, tmp_path: Path) -> None:
    manifest, _ = prepare(store)
    folder = tmp_path / "store" / attempt(manifest)
    (folder / ".tmp-0123").write_bytes(b"half")
    found = collect(store, now_s=time.time() + 2 * DAY_S)
    assert paths(found) == [attempt(manifest)]
    assert not folder.exists()


def test_the_time_is_the_stores(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of this machine that is years ahead removes nothing."""
    prepare(store)
    monkeypatch.setattr(garbage.time, "time", lambda: 9e9)
    found = collect(store)
    assert (found.attempts, found.waiting) == ([], 1)
    assert collect(store, dry_run=True).waiting == 0


def test_a_negative_grace_period_is_refused(store: IndexStore) -> None:
    with pytest.raises(StoreError, match=r"grace_s = -1"):
        collect(store, grace_s=-1)


def test_old_catalogs_go_once_nobody_reads_them(store: IndexStore) -> None:
    for i in range(3):
        committed(store, f"doc {i}")
        compact(store)
    store.folder.write(f"catalog/{'a' * 32}-00000.parquet", b"of an interrupted compaction")
    before = store.folder.list("catalog")
    assert len(before) == 7
    assert later(store, 0.9).others == []
    assert len(later(store, 1.1, dry_run=True).others) == 5
    assert store.folder.list("catalog") == before
    assert len(later(store, 1.1).others) == 5
    found = newest(store)
    assert found is not None
    assert sorted(store.folder.list("catalog")) == sorted([found.path, found.segments[0].path])
    assert generations(store) == [3]
    assert compact(store).entries == 3


def test_a_generation_is_read_until_its_successor_is_old(store: IndexStore) -> None:
    committed(store, "a")
    compact(store)
    files = store.folder.files
    start_s = time.time()
    aged = set(store.folder.list("catalog"))
    committed(store, "b")
    compact(store)
    store.folder.files = lambda path="", prefix="": [  # type: ignore[method-assign]
        f._replace(changed_s=start_s - 9 * DAY_S) if f.path in aged else f for f in files(path, prefix)
    ]
    assert collect(store, now_s=start_s + 0.5 * DAY_S).others == []
    assert set(collect(store, now_s=start_s + 1.5 * DAY_S).others) == aged


def test_files_of_a_damaged_catalog_are_left(store: IndexStore) -> None:
    committed(store)
    compact(store)
    store.folder.write("catalog/00000001.json", b"{")
    before = store.folder.list()
    found = later(store, 2)
    assert (found.others, len(found.problems)) == ([], 1)
    assert "`rabatch compact`" in found.problems[0]
    assert store.folder.list() == before


def index(path: str, text: str, kind: str, day: int, model: str = "m") -> Index:
    return Index(path, model, text, kind, day)


@pytest.mark.parametrize(
    ("indexes", "gone"),
    [
        ([], ""),
        ([index("a", "t", "graph", 1)], ""),
        ([index("a", "t", "graph", 1), index("b", "t", "graph", 2)], "a"),
        ([index("a", "t", "graph", 1), index("b", "t", "graph", 1)], ""),
        ([index("a", "t", "graph", 1), index("b", "t", "none", 2)], ""),
        ([index("a", "t", "none", 1), index("b", "t", "graph", 2)], "a"),
        ([index("a", "t", "graph", 1), index("b", "t", "graph+scan", 2)], "a"),
        ([index("a", "t", "graph+scan", 1), index("b", "t", "graph", 2)], ""),
        ([index("a", "t", "graph+scan", 1), index("b", "t", "graph", 2), index("c", "t", "scan", 3)], "a"),
        ([index("a", "t", "scan", 1), index("b", "t", "graph", 2), index("c", "t", "none", 3)], ""),
        ([index("a", "t", "graph", 1, "m"), index("b", "t", "graph", 2, "n")], ""),
        ([index("a", "old", "graph", 1), index("b", "new", "none", 2)], "a"),
        ([index("a", "t", "graph", 1), index("b", "u", "graph", 2), index("c", "t", "none", 3)], "b"),
        ([index("a", "t", "graph", 1), index("b", "u", "graph", 1)], ""),
        ([index("a", "t", "none", 1), index("b", "t", "graph", 2), index("c", "t", "graph", 3)], "ab"),
    ],
)  # fmt: skip
def test_what_is_superseded(indexes: list[Index], gone: str) -> None:
    assert {one.path for one in superseded(indexes)} == set(gone)


def test_superseded_indexes_are_withdrawn_and_their_parts_go_later(store: IndexStore) -> None:
    kinds = {"graph": GEOMETRY, "none": dataclasses.replace(GEOMETRY, index="none", degree=0)}
    days = iter(range(1, 9))

    def make(document_id: str, kind: str = "graph", text: str = "a", **fields: Any) -> Manifest:
        created = f"2030-01-0{next(days)}T00:00:00+00:00"
        fields = {**FIELDS, "index": kind, **fields}
        where: dict[str, Any] = {"geometry": kinds[kind], "fields": fields}
        return committed(store, document_id, content_sha256=text * 64, created_at=created, **where)

    old_text, old = make("doc", text="b"), make("doc", build=1)
    kept = [make("doc", build=2), make("doc", "none"), make("doc", model="other"), make("alone")]
    gone = sorted([old_text.path, old.path])
    before = store.folder.list()
    assert withdraw_superseded(store, dry_run=True).paths == gone
    assert store.folder.list() == before
    compact(store)
    assert withdraw_superseded(store).paths == gone
    assert sorted(m.path for m in store.manifests()) == sorted(m.path for m in kept)
    assert withdraw_superseded(store).paths == []
    found = later(store, 0.9)
    assert (found.attempts, found.waiting) == ([], 2)
    assert sorted(paths(later(store, 1.1))) == sorted([attempt(old_text), attempt(old)])
    assert verify(store) == []


def test_an_index_is_not_superseded_by_a_damaged_one(store: IndexStore) -> None:
    old = committed(store, created_at="2030-01-01T00:00:00+00:00", fields={**FIELDS, "build": 1})
    new = committed(store, created_at="2030-01-02T00:00:00+00:00", fields={**FIELDS, "build": 2})
    part = store.folder.read(new.parts[1].path)
    store.folder.delete(new.parts[1].path)
    found = withdraw_superseded(store)
    assert (found.paths, len(found.problems)) == ([], 1)
    assert new.parts[1].path in found.problems[0]
    store.folder.write(new.parts[1].path, part)
    text = store.folder.read(new.path)
    store.folder.write(new.path, b"{}")
    found = withdraw_superseded(store)
    assert (found.paths, new.path in found.problems[0]) == ([], True)
    store.folder.write(new.path, text)
    assert withdraw_superseded(store).paths == [old.path]


def test_what_the_catalog_calls_superseded_is_asked_again(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer index was withdrawn between the listing and the decision."""
    committed(store, created_at="2030-01-01T00:00:00+00:00", fields={**FIELDS, "build": 1})
    new = committed(store, created_at="2030-01-02T00:00:00+00:00", fields={**FIELDS, "build": 2})
    find = store.find

    def withdrawn_then(*arguments: Any, **options: Any) -> list[Manifest]:
        store.withdraw(new.path)
        return find(*arguments, **options)

    monkeypatch.setattr(store, "find", withdrawn_then)
    assert withdraw_superseded(store).paths == []
    assert len(list(store.manifests())) == 1


def test_two_collections_at_once(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was faster: files are gone between listing and removal."""
    manifest, _ = prepare(store)
    delete = Folder.delete

    def twice(self: Folder, path: str) -> None:
        delete(self, path)
        delete(self, path)

    monkeypatch.setattr(Folder, "delete", twice)
    assert paths(later(store, 2)) == [attempt(manifest)]
    assert list(store.folder.list()) == ["rabatch-store.json"]
