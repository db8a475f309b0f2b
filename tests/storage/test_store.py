"""The store: what is committed is there, what is not is not, what was changed is refused."""

import dataclasses
import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import FIELDS, FINGERPRINT, GEOMETRY, HOSTILE_IDS, make_tokens, prepare

from rabatch.errors import FormatVersionError, IntegrityError, StoreError
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.manifest import Manifest, Part
from rabatch.storage.store import MARKER, IndexStore


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


def test_build_commit_read(any_store: IndexStore) -> None:
    manifest, blocks = prepare(any_store)
    assert any_store.commit(manifest) == manifest
    assert list(any_store.manifests()) == [manifest]
    assert any_store.find("doc") == any_store.find("doc", fingerprint=FINGERPRINT) == [manifest]
    assert any_store.get("doc", manifest.content_sha256, FINGERPRINT) == manifest
    for layer, block in enumerate(blocks):
        assert any_store.read_layer(manifest, layer).equals(block)
        assert any_store.read_layer(manifest, layer, heads=range(1, 2)).equals(block.select(range(1, 2)))
        assert any_store.read_layer(manifest, layer, heads=range(1, 2), check=False).equals(block.select(range(1, 2)))
    tokens = any_store.read_tokens(manifest)
    assert tokens.token_ids.tolist() == make_tokens(20).token_ids.tolist()
    again = pickle.loads(pickle.dumps(any_store))  # noqa: S301 - as Ray sends it to actors
    assert again.read_layer(manifest, 0).equals(blocks[0])


def test_layout(store: IndexStore) -> None:
    manifest, _ = prepare(store, "../../etc/x")
    store.commit(manifest)
    paths = list(store.folder.list())
    assert paths[-1] == MARKER
    assert json.loads(store.folder.read(MARKER)) == {"format": "rabatch", "format_version": 1}
    assert paths[0] == manifest.path
    stems = sorted(path.split("/")[-1].rsplit("-", 1)[0] for path in paths[1:-1])
    assert stems == [*(f"layer-00{i}-heads-000-002" for i in range(3)), "tokens"]
    assert len({path.rsplit("/", 1)[0] for path in paths[1:-1]}) == 1


@settings(max_examples=15, deadline=None)
@given(
    n_heads=st.integers(1, 5),
    heads_per_part=st.integers(1, 5),
    tokens=st.integers(1, 30),
    head_dim=st.integers(1, 17),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    index=st.sampled_from(["graph", "none"]),
    data=st.data(),
)
def test_sharded_equals_unsharded(
    n_heads: int, heads_per_part: int, tokens: int, head_dim: int, dtype: str, index: str, data: st.DataObject
) -> None:
    store = IndexStore("memory://sharding", create=True)
    geometry = dataclasses.replace(
        GEOMETRY,
        n_kv_heads=n_heads,
        n_query_heads=2 * n_heads,
        head_dim=head_dim,
        kv_dtype=dtype,
        index=index,
    )
    whole, blocks = prepare(store, context_tokens=tokens, geometry=geometry, heads_per_part=n_heads)
    sharded, _ = prepare(store, context_tokens=tokens, geometry=geometry, heads_per_part=heads_per_part)
    first = data.draw(st.integers(0, n_heads - 1))
    heads = range(first, data.draw(st.integers(first + 1, n_heads)))
    for manifest in (whole, sharded):
        manifest.check()
        for layer, block in enumerate(blocks):
            assert store.read_layer(manifest, layer).equals(block)
            for check in (True, False):
                assert store.read_layer(manifest, layer, heads=heads, check=check).equals(block.select(heads))


@pytest.mark.parametrize("document_id", HOSTILE_IDS, ids=lambda i: repr(i[:12]))
def test_any_document_id_is_data(tmp_path: Path, document_id: str) -> None:
    store = IndexStore(tmp_path / "store", create=True)
    manifest, blocks = prepare(store, document_id)
    store.commit(manifest)
    assert store.find(document_id) == [manifest]
    assert store.find(document_id + "x") == []
    assert next(store.manifests()).document_id == document_id
    assert store.read_layer(manifest, 0).equals(blocks[0])
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    for url in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="is no rabatch store; build one"):
            IndexStore(url)
    (tmp_path / "file").write_bytes(b"")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="a file lies where a folder is needed"):
            IndexStore(url, create=True)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        (b'{"format": "rabatch", "format_version": 2}', FormatVersionError),
        (b'{"format": "rabatch"}', FormatVersionError),
        (b'{"format": "rabatch", "format_version": true}', FormatVersionError),
        (b'{"format": "other", "format_version": 1}', IntegrityError),
        (b"[]", IntegrityError),
        (b"\xff", IntegrityError),
        (b"", IntegrityError),
    ],
    ids=repr,
)
def test_other_markers_are_refused_and_kept(tmp_path: Path, marker: bytes, error: type[StoreError]) -> None:
    (tmp_path / MARKER).write_bytes(marker)
    for create in (False, True):
        with pytest.raises(error):
            IndexStore(tmp_path, create=create)
    assert (tmp_path / MARKER).read_bytes() == marker


def test_create_opens_what_is_there(store: IndexStore) -> None:
    manifest, _ = prepare(store)
    store.commit(manifest)
    assert list(IndexStore(store.url, create=True).manifests()) == [manifest]


def test_a_server_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rabatch.storage.filesystem import Folder

    def overwrite(self: Folder, path: str, data: bytes) -> bool:
        self.write(path, data)
        return True

    monkeypatch.setattr(Folder, "create", overwrite)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        IndexStore(tmp_path, create=True)


def test_half_written_attempts_are_invisible(store: IndexStore) -> None:
    manifest, _ = prepare(store)
    assert list(store.manifests()) == store.find("doc") == []
    assert store.get("doc", manifest.content_sha256, FINGERPRINT) is None
    second, blocks = prepare(store, seed=9)  # the attempt after a crash
    store.commit(second)
    assert list(store.manifests()) == [second]
    assert store.read_layer(second, 0).equals(blocks[0])


def test_a_replayed_write_replaces_nothing(store: IndexStore) -> None:
    _, blocks = prepare(store)
    where = {"document_id": "doc", "fingerprint": FINGERPRINT, "attempt": store.new_attempt()}
    first, second = (store.put_layer(blocks[0], **where) for _ in range(2))
    assert first.path != second.path
    assert first.sha256 == second.sha256


def test_nothing_is_committed_without_its_parts(store: IndexStore) -> None:
    manifest, _ = prepare(store)
    store.folder.delete(manifest.parts[2].path)
    with pytest.raises(IntegrityError, match=manifest.parts[2].path):
        store.commit(manifest)
    assert list(store.manifests()) == []
    with pytest.raises(IntegrityError, match="text_chars"):
        store.commit(dataclasses.replace(manifest, text_chars=-1))


def test_of_two_committers_one_wins(any_store: IndexStore) -> None:
    prepared = [prepare(any_store, seed=10 * i) for i in range(4)]
    start = threading.Barrier(len(prepared))

    def commit(manifest: Manifest) -> Manifest:
        start.wait()
        return any_store.commit(manifest)

    with ThreadPoolExecutor(len(prepared)) as pool:
        results = list(pool.map(commit, [manifest for manifest, _ in prepared]))
    winner = results[0]
    assert all(result == winner for result in results)
    assert list(any_store.manifests()) == [winner]
    blocks = next(blocks for manifest, blocks in prepared if manifest == winner)
    assert any_store.read_layer(winner, 0).equals(blocks[0])


def test_contents_and_fingerprints_are_kept_apart(store: IndexStore) -> None:
    one, _ = prepare(store)
    two, _ = prepare(store)
    two = dataclasses.replace(two, content_sha256="c" * 64)
    three, _ = prepare(store, fields={**FIELDS, "dtype": "float32"})
    for manifest in (one, two, three):
        store.commit(manifest)
    assert len(store.find("doc")) == 3
    assert {m.content_sha256 for m in store.find("doc", fingerprint=FINGERPRINT)} == {one.content_sha256, "c" * 64}
    assert store.get("doc", "c" * 64, FINGERPRINT) == two
    assert store.get("doc", "c" * 64, three.fingerprint) is None
    with pytest.raises(IntegrityError, match="content_sha256"):
        store.get("doc", "c" * 16 + "d" * 48, FINGERPRINT)


def _committed(store: IndexStore, **kwargs: object) -> Manifest:
    return store.commit(prepare(store, **kwargs)[0])  # type: ignore[arg-type]


def _read(store: IndexStore, manifest: Manifest, part: Part) -> None:
    if part.kind == "tokens":
        store.read_tokens(manifest)
    else:
        store.read_layer(manifest, part.layer)


@pytest.mark.parametrize("kind", ["tokens", "layer"])
@pytest.mark.parametrize("place", [0, 4, 0.1, 0.25, 0.5, 0.75, 0.9, -9, -8, -5, -4, -1])
def test_a_changed_byte_is_refused(store: IndexStore, kind: str, place: float) -> None:
    manifest = _committed(store)
    part = next(p for p in manifest.parts if p.kind == kind)
    data = bytearray(store.folder.read(part.path))
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    store.folder.write(part.path, bytes(data))
    with pytest.raises(IntegrityError, match=f"{part.path}: sha256"):
        _read(store, manifest, part)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -8, -1])
def test_truncated_and_grown_parts_are_refused(store: IndexStore, keep: float, check: bool) -> None:
    manifest = _committed(store)
    part = manifest.parts[1]
    data = store.folder.read(part.path)
    for changed in (data[: int(keep * len(data)) if isinstance(keep, float) else int(keep)], data + b"x"):
        store.folder.write(part.path, changed)
        for heads in (None, range(1)):
            with pytest.raises(IntegrityError, match=f"{part.path}: bytes"):
                store.read_layer(manifest, part.layer, heads=heads, check=check)


def test_missing_parts_are_refused(store: IndexStore) -> None:
    manifest = _committed(store)
    for part in manifest.parts:
        store.folder.delete(part.path)
        with pytest.raises(IntegrityError, match=f"{part.path}.*missing"):
            _read(store, manifest, part)
    with pytest.raises(IntegrityError, match="missing"):
        store.read_layer(manifest, 0, heads=range(1), check=False)


@pytest.mark.parametrize("what", ["document", "fingerprint", "layer", "heads"])
def test_parts_of_another_are_refused(store: IndexStore, what: str) -> None:
    """Even if the manifest lies in accord with the bytes."""
    if what == "fingerprint":
        other, _ = prepare(store, fields={**FIELDS, "model": "other"})
    else:
        other, _ = prepare(store, "other" if what == "document" else "doc", heads_per_part=1)
    mine, _ = prepare(store, heads_per_part=2 if what == "fingerprint" else 1)
    stolen = next(p for p in other.parts if p.layer == 0)
    target = {"layer": (2, 0), "heads": (0, 1)}.get(what, (0, 0))
    parts = [
        dataclasses.replace(part, path=stolen.path, bytes=stolen.bytes, sha256=stolen.sha256)
        if (part.layer, part.head_start) == target
        else part
        for part in mine.parts
    ]
    lying = store.commit(dataclasses.replace(mine, parts=tuple(parts)))
    field = {"document": "document_key", "heads": "head_start"}.get(what, what)
    for check in (True, False):
        with pytest.raises(IntegrityError, match=f"{stolen.path}: {field}"):
            store.read_layer(lying, target[0], check=check)


def test_tokens_of_another_are_refused(store: IndexStore) -> None:
    other, mine = prepare(store, "other")[0], prepare(store)[0]
    lying = store.commit(dataclasses.replace(mine, parts=(other.parts[0], *mine.parts[1:])))
    with pytest.raises(IntegrityError, match="document_key"):
        store.read_tokens(lying)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sink_tokens": 4}, "index_rows|index_start"),
        ({"sink_tokens": 4, "window_tokens": 4}, "index_start"),
        ({"window_tokens": 6}, "index_rows"),
        ({"degree": 5}, "degree"),
        ({"index": "none"}, "index_rows"),
        ({"kv_dtype": "float16"}, "dtype"),
        ({"head_dim": 7}, "dtype"),
    ],
)
def test_parts_of_another_geometry_are_refused(store: IndexStore, change: dict, field: str) -> None:
    manifest, _ = prepare(store)
    lying = dataclasses.replace(manifest, geometry=dataclasses.replace(manifest.geometry, **change))
    with pytest.raises(IntegrityError, match=field):
        store.read_layer(lying, 0)


def test_a_layer_without_its_graph_is_refused(store: IndexStore) -> None:
    without, _ = prepare(store, geometry=dataclasses.replace(GEOMETRY, index="none"))
    lying = dataclasses.replace(without, geometry=GEOMETRY)
    with pytest.raises(IntegrityError, match="index_rows"):
        store.read_layer(lying, 0)


def test_damaged_manifests_are_named(store: IndexStore) -> None:
    good, bad = _committed(store), _committed(store, document_id="bad")
    store.folder.write(bad.path, store.folder.read(bad.path)[:-20])
    with pytest.raises(IntegrityError, match=bad.path):
        list(store.manifests())
    with pytest.raises(IntegrityError, match=bad.path):
        store.get("bad", bad.content_sha256, FINGERPRINT)
    with pytest.raises(IntegrityError, match=bad.path):
        store.commit(dataclasses.replace(bad, created_at="2026-01-01T00:00:00+00:00"))
    reported = []
    assert list(store.manifests(on_error=lambda path, error: reported.append((path, type(error))))) == [good]
    assert reported == [(bad.path, IntegrityError)]


def test_a_manifest_in_the_place_of_another_is_refused(store: IndexStore) -> None:
    good, other = _committed(store), _committed(store, document_id="other")
    store.folder.write(good.path, store.folder.read(other.path))
    with pytest.raises(IntegrityError, match="document_id"):
        store.get("doc", good.content_sha256, FINGERPRINT)


def test_arguments_are_named(store: IndexStore) -> None:
    manifest = _committed(store)
    for layer in (-1, 3):
        with pytest.raises(StoreError, match=f"layer = {layer}"):
            store.read_layer(manifest, layer)
    for heads in (range(0), range(-1, 1), range(3), range(0, 2, 2)):
        with pytest.raises(StoreError, match="heads"):
            store.read_layer(manifest, 0, heads=heads)


def test_many_manifests(store: IndexStore) -> None:
    one, _ = prepare(store)
    wanted = [f"doc {i}" for i in range(150)]
    for document_id in wanted:
        manifest = dataclasses.replace(one, document_id=document_id)
        store.folder.create(manifest.path, manifest.to_json().encode())
    assert sorted(m.document_id for m in store.manifests()) == sorted(wanted)


def test_reading_does_not_change_the_store(store: IndexStore) -> None:
    manifest = _committed(store)
    block = store.read_layer(manifest, 0)
    block.keys.zero_()
    assert torch.count_nonzero(store.read_layer(manifest, 0).keys) > 0


@pytest.mark.parametrize("name", ["zones", "profile"])
def test_parts_that_differ_in_what_they_hold_are_refused(store: IndexStore, name: str) -> None:
    manifest, blocks = prepare(store, heads_per_part=1)
    head = blocks[0].select(range(1, 2))
    bare = LayerBlock(**{**vars(head), name: None})
    part = store.put_layer(bare, document_id="doc", fingerprint=manifest.fingerprint, attempt=store.new_attempt())
    mixed = dataclasses.replace(manifest, parts=(*manifest.parts[:2], part, *manifest.parts[3:]))
    assert store.read_layer(manifest, 0).equals(blocks[0])
    assert store.read_layer(mixed, 0, heads=range(1, 2)).equals(bare)
    with pytest.raises(IntegrityError, match=f"layer 0: {name}"):
        store.read_layer(mixed, 0)
