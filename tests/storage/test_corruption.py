"""Random damage to a stored index, and files made to harm their reader: refused by name, nothing of it served."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_samples import make_block, make_tokens, prepare

from rabatch.errors import DocumentError, IntegrityError, StoreError
from rabatch.storage import rules
from rabatch.storage.blocks import TokensBlock
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import decode_layer, decode_tokens, encode_layer, encode_tokens
from rabatch.storage.store import IndexStore
from rabatch.storage.verify import verify

NAMED = {"fingerprint": "f" * 64, "document_key": "d" * 32}


def _flip(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    changed = bytearray(data)
    changed[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    start = choose.randrange(len(data))
    length = min(choose.randrange(1, 600), len(data) - start)
    return data[:start] + choose.randbytes(length) + data[start + length :]


def _truncate(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    return data[: choose.randrange(len(data))]


def _grow(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    return data + choose.randbytes(choose.randrange(1, 100))


def _swap(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    return choose.choice([other for other in others if other != data])


def _delete(data: bytes, others: list[bytes], choose: random.Random) -> None:
    return None


DAMAGE = [_flip, _flip, _overwrite, _truncate, _grow, _swap, _delete]


def _read_all(store: IndexStore, manifest: Manifest, check: Any) -> None:
    for layer in range(manifest.geometry.n_layers):
        store.read_layer(manifest, layer, check=check)
    store.read_tokens(manifest, check=check)


def test_random_damage_is_refused_by_name(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, create=True)
    prepared = {name: prepare(store, name, heads_per_part=1, seed=seed) for seed, name in enumerate("ab")}
    manifests = {name: store.commit(manifest) for name, (manifest, _) in prepared.items()}
    paths = [path for m in manifests.values() for path in (m.path, *(part.path for part in m.parts))]
    sound = {path: store.folder.read(path) for path in paths}
    choose = random.Random(0)
    for number in range(84):
        damage, path = DAMAGE[number % len(DAMAGE)], choose.choice(paths)
        owner = next(name for name, m in manifests.items() if path in (m.path, *(part.path for part in m.parts)))
        manifest, kind = manifests[owner], "manifests/" if path.startswith("manifests/") else "parts/"
        changed = damage(sound[path], [sound[p] for p in paths if p.startswith(kind)], choose)
        if changed == sound[path]:
            continue
        store.folder.delete(path) if changed is None else store.folder.write(path, changed)
        where = f"{damage.__name__} of {path}, the {number}th"
        if path == manifest.path and changed is None:
            assert store.find(owner) == [], where  # a document that is not there is not served
        elif path == manifest.path:
            with pytest.raises(StoreError, match=path):
                store.find(owner)
            (problem,) = verify(store)
            assert (problem.manifest_path, problem.part) == (path, ""), where
        else:
            for reader in (store, IndexStore(tmp_path)):  # one has read it when it was sound
                for check in ("once", True):
                    with pytest.raises(IntegrityError, match=path):
                        _read_all(reader, manifest, check)
            problems = verify(store)
            assert {(problem.manifest_path, problem.part) for problem in problems} == {(manifest.path, path)}, where
        other = "ab".replace(owner, "")
        assert store.read_layer(manifests[other], 0).equals(prepared[other][1][0]), where
        store.folder.write(path, sound[path])
    assert verify(store) == []
    for name, (_, blocks) in prepared.items():
        for layer, block in enumerate(blocks):
            assert store.read_layer(manifests[name], layer, check="once").equals(block)


def test_a_flipped_bit_anywhere_in_a_manifest_is_refused(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest = store.commit(prepare(store)[0])
    data, choose = store.folder.read(manifest.path), random.Random(1)
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << choose.randrange(8)
        with pytest.raises(StoreError, match="some-path"):
            Manifest.from_json(bytes(changed), name="some-path")


@pytest.mark.parametrize("where", ["local", "elsewhere"])
def test_a_damaged_footer_that_nobody_checked_is_refused(tmp_path: Path, where: str) -> None:
    """Without a digest Arrow sees it first, and there are questions about a damaged footer that end the process."""
    store = IndexStore(tmp_path if where == "local" else f"memory://{tmp_path.name}", create=True)
    manifest, blocks = prepare(store)
    part = next(part for part in manifest.parts if part.layer == 0)
    data, choose = store.folder.read(part.path), random.Random(2)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = []
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(choose.randrange(1, 4)):
            changed[choose.randrange(footer, len(data))] ^= 1 << choose.randrange(8)
        store.folder.write(part.path, bytes(changed))
        try:
            store.read_layer(manifest, 0, check=False)
        except StoreError as error:
            refused.append(str(error))
    assert all(part.path in message for message in refused)
    assert len(refused) > 200  # the rest changed what has no meaning here, as the name of the writer
    store.folder.write(part.path, data)
    assert store.read_layer(manifest, 0, check=False).equals(blocks[0])


# Files that are small and would become large.


def _peak_bytes(call: Callable[[], object]) -> int:
    """Most memory of Python and numpy, and of Arrow, that was taken meanwhile."""
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="part"):
            call()
        return tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().bytes_allocated() - before
    finally:
        tracemalloc.stop()


def _bomb(rows: int, **options: Any) -> bytes:
    """A layer part of equal rows, which take next to nothing compressed or as a dictionary."""
    file = pq.ParquetFile(pa.BufferReader(encode_layer(make_block(degree=None), **NAMED)))
    schema, sink = file.schema_arrow, pa.BufferOutputStream()
    columns = [pa.array(np.zeros(rows, np.int32)), *(pa.array([bytes(16)] * rows, pa.binary(16)) for _ in range(2))]
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for _ in range(2):
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compression": "zstd", "use_dictionary": False}, "compression"),
        ({"compression": "gzip", "use_dictionary": False}, "compression"),
        ({"compression": "none", "use_dictionary": True}, "rows"),
    ],
)
def test_bombs_are_refused_before_they_go_off(options: dict[str, Any], reason: str) -> None:
    rows = 200_000
    data = _bomb(rows, **options)
    assert len(data) < rows * 36 / 20
    with pytest.raises(IntegrityError, match=f"part: {reason}"):
        decode_layer(data, name="part")
    assert _peak_bytes(lambda: decode_layer(data, name="part")) < rows * 36 / 10


def test_row_groups_that_lie_are_refused_before_they_are_read() -> None:
    """The first is as it should be, the second is the bomb."""
    file = pq.ParquetFile(pa.BufferReader(encode_layer(make_block(degree=None), **NAMED)))
    sink, rows = pa.BufferOutputStream(), 200_000
    columns = [pa.array(np.zeros(rows, np.int32)), *(pa.array([bytes(16)] * rows, pa.binary(16)) for _ in range(2))]
    with pq.ParquetWriter(sink, file.schema_arrow, compression="none", use_dictionary=True) as writer:
        writer.write_table(file.read_row_group(0))
        writer.write_table(pa.Table.from_arrays(columns, schema=file.schema_arrow))
    data = sink.getvalue().to_pybytes()
    with pytest.raises(IntegrityError, match="part: row groups"):
        decode_layer(data, name="part")
    assert _peak_bytes(lambda: decode_layer(data, name="part")) < rows * 36 / 10


def test_tokens_that_are_a_bomb_are_refused(tmp_path: Path) -> None:
    n = 2_000_000
    none, wide = np.zeros(n, np.int32), np.zeros(n, np.int64)
    data = encode_tokens(TokensBlock(positions=none, token_ids=none, char_start=wide, char_end=wide), **NAMED)
    assert data.size < n * 24 / 1000
    with pytest.raises(IntegrityError, match="part: rows"):
        decode_tokens(data, name="part")
    assert _peak_bytes(lambda: decode_tokens(data, name="part")) < n
    with pytest.raises(IntegrityError, match=r"part: rows = 20: must be 19"):
        decode_tokens(encode_tokens(make_tokens(20), **NAMED), name="part", rows=19)
    # What tokens can be at their most regular: one token, over and over, of no text.
    plain = TokensBlock(positions=np.arange(n, dtype=np.int32), token_ids=none, char_start=wide, char_end=wide)
    assert len(decode_tokens(encode_tokens(plain, **NAMED), name="part", rows=n).positions) == n


def test_nested_metadata_is_refused_and_no_crash() -> None:
    for encoded, decode in (
        (encode_layer(make_block(), **NAMED), decode_layer),
        (encode_tokens(make_tokens(5), **NAMED), decode_tokens),
    ):
        file = pq.ParquetFile(pa.BufferReader(encoded))
        metadata = {**file.schema_arrow.metadata, b"kind": b"[" * 100_000}
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, file.schema_arrow.with_metadata(metadata)) as writer:
            writer.write_table(file.read().replace_schema_metadata(metadata))
        with pytest.raises(IntegrityError, match="part"):
            decode(sink.getvalue(), name="part")


def test_sizes_that_lie_cost_no_memory(tmp_path: Path) -> None:
    """A manifest that says a part has a terabyte: the file is asked first."""
    for url in (str(tmp_path), f"memory://{tmp_path.name}"):
        store = IndexStore(url, create=True, cache=tmp_path / "cache", cache_bytes=2**50)
        manifest, _ = prepare(store)
        parts = tuple(dataclasses.replace(part, bytes=2**40) for part in manifest.parts)
        lying = dataclasses.replace(manifest, parts=parts)
        lying.check()
        for check in (True, False, "once"):
            tracemalloc.start()
            with pytest.raises(IntegrityError, match=r"part.*: bytes = \d+: must be 1099511627776"):
                store.read_layer(lying, 0, check=check)
            with pytest.raises(IntegrityError, match=r"part.*: bytes = \d+: must be 1099511627776"):
                store.read_tokens(lying, check=check)
            assert tracemalloc.get_traced_memory()[1] < 2**24
            tracemalloc.stop()


@pytest.mark.parametrize("where", ["local", "memory", "s3"])
def test_manifests_of_any_size_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, where: str
) -> None:
    url, options = (str(tmp_path), {}) if where == "local" else (f"memory://{tmp_path.name}", {})
    if where == "s3":
        url, options = request.getfixturevalue("s3_url")
    store = IndexStore(url, create=True, storage_options=options)
    manifest = store.commit(prepare(store)[0])
    text = store.folder.read(manifest.path)
    monkeypatch.setattr("rabatch.storage.store.MAX_MANIFEST_BYTES", len(text))
    assert list(store.manifests()) == [manifest]
    for wrong in (text + b" ", text * 50, b""):
        store.folder.write(manifest.path, wrong)
        with pytest.raises(IntegrityError, match=manifest.path):
            list(store.manifests())


@pytest.mark.parametrize("check", [True, False, "once"])
def test_a_part_that_goes_while_it_is_read_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Any
) -> None:
    """Elsewhere than on a disk it is asked for several times."""
    store = IndexStore(f"memory://{tmp_path.name}", create=True, cache=tmp_path)
    manifest = store.commit(prepare(store)[0])
    part = next(part for part in manifest.parts if part.layer == 0)
    size = Folder.size

    def sizing(self: Folder, path: str) -> int:
        found = size(self, path)
        self.delete(path)
        return found

    monkeypatch.setattr(Folder, "size", sizing)
    with pytest.raises(IntegrityError, match=f"{part.path} = None: is missing"):
        store.read_layer(manifest, 0, check=check)
    assert list(tmp_path.glob("*-*")) == []


def test_a_manifest_that_nobody_would_read_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest, _ = prepare(store)
    monkeypatch.setattr("rabatch.storage.store.MAX_MANIFEST_BYTES", 5000)
    with pytest.raises(DocumentError, match=r"metadata.*leave columns"):
        store.commit(dataclasses.replace(manifest, metadata={"body": "x" * 5000}))
    assert list(store.manifests()) == []
    assert store.commit(manifest) == manifest


def test_part_paths_of_unchecked_manifests_stay_inside(tmp_path: Path) -> None:
    """Who makes a `Manifest` by hand passes the checks of `from_json` by."""
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(b"secret")
    store = IndexStore(tmp_path / "store", create=True)
    manifest, _ = prepare(store)
    for path in ("../secret.parquet", str(secret), f"file://{secret}", "parts/../../secret.parquet"):
        digest = hashlib.sha256(b"secret").hexdigest()
        parts = [
            dataclasses.replace(part, path=path, bytes=6, sha256=digest) if part.layer == 0 else part
            for part in manifest.parts
        ]
        for check in (True, False, "once"):
            with pytest.raises(StoreError):
                store.read_layer(dataclasses.replace(manifest, parts=tuple(parts)), 0, check=check)


def test_nothing_that_executes_is_imported() -> None:
    """Neither pickle nor its relatives; Arrow and numpy are called with what cannot run code."""
    import ast

    storage = Path(rules.__file__).parent
    for file in storage.glob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert names.isdisjoint({"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}), file
        text = file.read_text()
        assert not any(call in text for call in ("torch.load", "np.load", "eval(", "exec(", "allow_pickle")), file


def test_the_digest_of_a_manifest_is_the_documented_one(tmp_path: Path) -> None:
    """By another program."""
    store = IndexStore(tmp_path, create=True)
    manifest = store.commit(prepare(store)[0])
    values = json.loads((tmp_path / manifest.path).read_text())
    stored = values.pop("manifest_sha256")
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == stored
