"""Parts that are read again and again: their digest is taken once, unless the file may have become another."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storage_samples import prepare

from rabatch.errors import IntegrityError
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import decode_layer
from rabatch.storage.store import IndexStore


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every digest that is taken, by the bytes of what it is taken of."""
    taken: list[int] = []
    sha256 = hashlib.sha256

    class Counting:
        def __init__(self, data: Any = b"", **options: Any) -> None:
            self.digest, self.nbytes = sha256(data, **options), len(data)

        def update(self, data: Any) -> None:
            self.digest.update(data)
            self.nbytes += len(data)

        def hexdigest(self) -> str:
            taken.append(self.nbytes)
            return self.digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    return taken


def committed(folder: Path | str, **options: Any) -> tuple[IndexStore, Manifest, Path]:
    """A store, its manifest, and the file of layer 0."""
    store = IndexStore(folder, create=True, **options)
    manifest, _ = prepare(store)
    store.commit(manifest)
    part = next(part for part in manifest.parts if part.layer == 0)
    return store, manifest, Path(folder) / part.path


def sums_of_parts(sums: list[int], manifest: Manifest) -> int:
    return sum(nbytes in {part.bytes for part in manifest.parts} for nbytes in sums)


def test_a_digest_is_taken_once_of_an_unchanged_part(tmp_path: Path, sums: list[int]) -> None:
    store, manifest, _ = committed(tmp_path)
    n_parts = sum(part.layer == 0 for part in manifest.parts)
    sums.clear()
    blocks = [store.read_layer(manifest, 0, check="once") for _ in range(3)]
    assert sums_of_parts(sums, manifest) == n_parts
    assert blocks[0].equals(blocks[2])
    store.read_layer(manifest, 0)  # checked is checked
    assert sums_of_parts(sums, manifest) == 2 * n_parts
    IndexStore(tmp_path).read_layer(manifest, 0, check="once")  # another store has not seen it
    assert sums_of_parts(sums, manifest) == 3 * n_parts


def flip(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def flip_and_set_the_time_back(file: Path) -> None:
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    """By one of the same size and time of writing."""
    before, other = file.stat(), file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [flip, flip_and_set_the_time_back, replace])
def test_what_was_changed_is_found(tmp_path: Path, change: Callable[[Path], None]) -> None:
    store, manifest, file = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    change(file)
    for _ in range(2):  # it is not held to be right by having been read
        with pytest.raises(IntegrityError, match="sha256"):
            store.read_layer(manifest, 0, check="once")


def test_what_was_taken_away_is_missed(tmp_path: Path) -> None:
    store, manifest, file = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    file.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        store.read_layer(manifest, 0, check="once")


def test_another_manifest_of_the_same_part_is_checked_for_itself(tmp_path: Path) -> None:
    """A right digest is right for who names it, not for the path."""
    store, manifest, _ = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    parts = tuple(dataclasses.replace(part, sha256="0" * 64) for part in manifest.parts)
    with pytest.raises(IntegrityError, match="sha256"):
        store.read_layer(dataclasses.replace(manifest, parts=parts), 0, check="once")


def test_elsewhere_than_on_a_disk_every_reading_is_checked(s3_url: tuple[str, dict[str, Any]], sums: list[int]) -> None:
    url, options = s3_url
    store, manifest, _ = committed(url, storage_options=options)
    assert not store.folder.is_local
    n_parts = sum(part.layer == 0 for part in manifest.parts)
    sums.clear()
    for _ in range(2):
        store.read_layer(manifest, 0, check="once")
    assert sums_of_parts(sums, manifest) == 2 * n_parts


def test_a_part_written_while_it_is_read_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is right when it is taken, and its bytes are others before they are decoded."""
    store, manifest, file = committed(tmp_path)
    decode = decode_layer

    def decoding(source: Any, **options: Any) -> Any:
        if changes:
            changes.pop()(file)
        return decode(source, **options)

    monkeypatch.setattr("rabatch.storage.parts.decode_layer", decoding)
    changes: list[Callable[[Path], None]] = []
    block = store.read_layer(manifest, 0, check="once")
    store = IndexStore(tmp_path)
    changes = [lambda file: os.utime(file)]
    assert store.read_layer(manifest, 0, check="once").equals(block)  # the same bytes, and so it is found
    for check in (True, "once"):  # what is decoded is the copy whose digest was right
        changes = [flip]
        assert IndexStore(tmp_path).read_layer(manifest, 0, check=check).equals(block)
        flip(file)
    store.read_layer(manifest, 0, check="once")
    changes = [flip]
    with pytest.raises(IntegrityError, match="sha256"):  # now it is the file that is decoded
        store.read_layer(manifest, 0, check="once")
