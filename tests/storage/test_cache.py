"""The cache of parts: one download for all processes, within its bound, and never a wrong byte or a failed read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from storage_samples import prepare

from rabatch import cli_arguments
from rabatch.config import Resources
from rabatch.errors import ConfigError, IntegrityError, StoreError
from rabatch.storage import claims
from rabatch.storage.cache import PartCache, automatic_cache_bytes, default_cache_folder
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import decode_layer
from rabatch.storage.store import IndexStore

SIZE = 3000


def content(seed: int, nbytes: int = SIZE) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Source:
    """A store of one part: counts its downloads."""

    def __init__(self, data: bytes) -> None:
        self.data, self.downloads = data, 0

    def __call__(self, each: Callable[[memoryview], None]) -> bytes:
        self.downloads += 1
        for start in range(0, len(self.data), 1000):
            each(memoryview(self.data)[start : start + 1000])
        return self.data


def get(cache: PartCache, source: Source) -> bytes:
    found = cache.get(sha(source.data), len(source.data), source)
    if isinstance(found, bytes):
        return found
    with found:
        return found.read()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def name_of(data: bytes) -> str:
    return f"{sha(data)}-{len(data)}"


def test_a_part_is_downloaded_once(tmp_path: Path) -> None:
    cache, source = PartCache(tmp_path / "a/b", 10 * SIZE), Source(content(0))
    assert [get(cache, source) for _ in range(3)] == [source.data] * 3
    assert source.downloads == 1
    assert names(tmp_path / "a/b") == [name_of(source.data)]
    assert get(pickle.loads(pickle.dumps(cache)), source) == source.data  # noqa: S301 - as Ray sends it to actors
    assert get(PartCache(tmp_path / "a/b", 10 * SIZE), source) == source.data
    assert source.downloads == 1
    assert (tmp_path / "a/b").stat().st_mode & 0o077 == 0  # documents may be confidential


# Many processes: each is this text with its own arguments, so that none imports more than the cache.
_PROCESS = """
import hashlib, os, sys, time
from pathlib import Path
from rabatch.storage.cache import PartCache
folder, state, me, others, stop_after = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
data = bytes(range(256)) * 400

def fetch(each):
    with open(state / "downloads", "a") as log:
        log.write(f"{me}\\n")
    (state / f"downloading-{me}").touch()
    while len(list(state.glob("ready-*"))) < others:
        time.sleep(0.005)
    for number, start in enumerate(range(0, len(data), 25600)):
        if number == stop_after:
            (state / "half").touch()
            time.sleep(600)
        each(memoryview(data)[start : start + 25600])
    return data

cache = PartCache(folder, 1 << 20)
(state / f"ready-{me}").touch()
found = cache.get(hashlib.sha256(data).hexdigest(), len(data), fetch)
got = found if isinstance(found, bytes) else found.read()
sys.exit(0 if got == data else 3)
"""
PROCESS_DATA = bytes(range(256)) * 400


def start(folder: Path, state: Path, me: int, *, others: int = 1, stop_after: int = -1) -> subprocess.Popen:
    state.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _PROCESS, str(folder), str(state), str(me), str(others), str(stop_after)]
    return subprocess.Popen(command)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def test_of_many_processes_one_downloads(tmp_path: Path) -> None:
    folder, state = tmp_path / "cache", tmp_path / "state"
    processes = [start(folder, state, me, others=5) for me in range(5)]
    assert [process.wait(60) for process in processes] == [0] * 5
    assert len((state / "downloads").read_text().split()) == 1
    assert names(folder) == [name_of(PROCESS_DATA)]


def test_a_killed_download_is_begun_anew_by_who_waits(tmp_path: Path) -> None:
    folder, state = tmp_path / "cache", tmp_path / "state"
    first = start(folder, state, 0, stop_after=2)
    wait_for(state / "half")
    waiting = start(folder, state, 1)
    wait_for(state / "ready-1")
    (part,) = names(folder)
    assert part.endswith(".part")
    assert not (state / "downloading-1").exists()
    first.send_signal(signal.SIGKILL)
    assert waiting.wait(60) == 0
    first.wait(60)
    assert (state / "downloads").read_text().split() == ["0", "1"]
    assert names(folder) == [name_of(PROCESS_DATA)]
    assert (folder / name_of(PROCESS_DATA)).read_bytes() == PROCESS_DATA


def test_what_killed_downloads_left_makes_room(tmp_path: Path) -> None:
    folder, state = tmp_path / "cache", tmp_path / "state"
    process = start(folder, state, 0, stop_after=2)
    wait_for(state / "half")
    cache, source = PartCache(folder, len(PROCESS_DATA)), Source(content(1))
    assert get(cache, source) == source.data
    assert len(names(folder)) == 1  # no room beside the download that is under way, and none was made
    process.kill()
    process.wait(60)
    assert get(cache, source) == source.data
    assert names(folder) == [name_of(source.data)]


def test_who_waits_for_a_download_without_headway_reads_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, state = tmp_path / "cache", tmp_path / "state"
    process = start(folder, state, 0, stop_after=2)
    wait_for(state / "half")
    monkeypatch.setattr(claims, "PATIENCE_S", 0.1)
    source = Source(PROCESS_DATA)
    assert get(PartCache(folder, 1 << 20), source) == PROCESS_DATA
    assert source.downloads == 1
    assert "does not go on" in caplog.text
    assert names(folder) == [f"{name_of(PROCESS_DATA)}.part"]  # it is its holder's still
    process.kill()
    process.wait(60)


_READS = """
import hashlib, random, sys
from pathlib import Path
from rabatch.storage.cache import PartCache
folder, bound, seed = Path(sys.argv[1]), *map(int, sys.argv[2:4])
cache, choose = PartCache(folder, bound), random.Random(seed)
for _ in range(150):
    part = choose.randrange(12)
    data = bytes([part]) * (1000 + 300 * part)

    def fetch(each):
        each(memoryview(data)[:700])
        each(memoryview(data)[700:])
        return data

    found = cache.get(hashlib.sha256(data).hexdigest(), len(data), fetch)
    if (found if isinstance(found, bytes) else found.read()) != data:
        sys.exit(3)
"""


def test_many_processes_keep_within_the_bound(tmp_path: Path) -> None:
    bound, most = 9000, 0  # of 31,800 bytes that they read in any order
    command = [sys.executable, "-c", _READS, str(tmp_path), str(bound)]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in range(4)]
    while any(process.poll() is None for process in processes):
        with claims.alone(tmp_path / ".lock"):  # only then does nobody take room
            taken = {}
            for path in tmp_path.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    taken[about.st_ino] = about.st_size  # one that is renamed meanwhile is seen under both names
        most = max(most, sum(taken.values()))
        time.sleep(0.001)  # let them have the lock
    assert [process.returncode for process in processes] == [0] * 4
    assert bound / 2 < most <= bound
    assert not any(name.endswith(".part") for name in names(tmp_path))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, sources = PartCache(tmp_path, 3 * SIZE), [Source(content(seed)) for seed in range(5)]
    for used in (0, 1, 2, 0, 3, 0, 4):
        get(cache, sources[used])
    assert names(tmp_path) == sorted(name_of(sources[i].data) for i in (0, 3, 4))
    assert [source.downloads for source in sources] == [1] * 5
    smaller = PartCache(tmp_path, SIZE)  # of a process that was told otherwise
    get(smaller, sources[1])
    assert names(tmp_path) == [name_of(sources[1].data)]


def test_an_entry_that_is_open_outlives_its_eviction(tmp_path: Path) -> None:
    cache, first, second = PartCache(tmp_path, SIZE), Source(content(1)), Source(content(2))
    get(cache, first)
    opened = cache.open(sha(first.data), SIZE)
    assert opened is not None
    get(cache, second)
    assert names(tmp_path) == [name_of(second.data)]
    with opened:
        assert opened.read() == first.data
        assert cache.holds(sha(first.data), SIZE, opened)


def test_larger_parts_than_the_bound_pass_by(tmp_path: Path) -> None:
    kept, large = Source(content(1)), Source(content(2, SIZE + 1))
    for bound in (0, SIZE):
        cache = PartCache(tmp_path / str(bound), bound)
        get(cache, kept)
        assert [get(cache, large) for _ in range(2)] == [large.data] * 2
        assert names(tmp_path / "3000") == [name_of(kept.data)] if bound else not (tmp_path / "0").exists()
    assert (kept.downloads, large.downloads) == (2, 4)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    others = ["notes.txt", "x.part", f"{'0' * 64}-5.parquet", f"{'0' * 63}-5", "data-3000.part"]
    for name in others:
        (tmp_path / name).write_bytes(content(0, 5 * SIZE))
    cache = PartCache(tmp_path, SIZE)
    for seed in range(3):
        get(cache, Source(content(seed)))
    assert names(tmp_path) == sorted([*others, name_of(content(2))])


def _truncate(path: Path) -> None:
    os.truncate(path, SIZE // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[SIZE // 3] ^= 4
    path.write_bytes(data)


def _zero(path: Path) -> None:
    """As after a crash of the machine: the size is right and the bytes were not written."""
    path.write_bytes(bytes(SIZE))


def _replace(path: Path) -> None:
    path.unlink()
    path.write_bytes(content(77))


@pytest.mark.parametrize("damage", [_truncate, _flip, _zero, _replace])
@pytest.mark.parametrize("same", [True, False], ids=["same process", "another process"])
def test_damaged_entries_are_fetched_anew(
    tmp_path: Path, damage: Callable[[Path], None], same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache, source = PartCache(tmp_path, 10 * SIZE), Source(content(0))
    get(cache, source)
    damage(tmp_path / name_of(source.data))
    cache = cache if same else PartCache(tmp_path, 10 * SIZE)
    assert cache.open(sha(source.data), SIZE) is None
    assert [get(cache, source) for _ in range(2)] == [source.data] * 2
    assert source.downloads == 2
    assert (tmp_path / name_of(source.data)).read_bytes() == source.data
    assert name_of(source.data) in caplog.text


def test_the_digest_is_taken_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source, taken = PartCache(tmp_path, 10 * SIZE), Source(content(0)), []
    get(cache, source)
    from rabatch.storage import cache as module

    digest_of = module.digest_of
    monkeypatch.setattr(module, "digest_of", lambda file: (taken.append(1), digest_of(file))[1])
    for _ in range(3):
        get(cache, source)
    assert taken == []  # it was, while the bytes came
    other = PartCache(tmp_path, 10 * SIZE)
    for _ in range(3):
        get(other, source)
    assert taken == [1]


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache, source = PartCache(tmp_path, 10 * SIZE), Source(content(0))

    def broken(each: Callable[[memoryview], None]) -> bytes:
        each(memoryview(source.data)[:1000])
        raise StoreError("store", "s3://x", "the connection broke")

    for _ in range(2):
        with pytest.raises(StoreError, match="the connection broke"):
            cache.get(sha(source.data), SIZE, broken)
        assert names(tmp_path) == []
    assert get(cache, source) == source.data


@pytest.mark.parametrize("call", ["write", "ftruncate", "rename", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_full_disk_costs_a_warning_and_no_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, number: int
) -> None:
    cache, source, other = PartCache(tmp_path, 10 * SIZE), Source(content(0)), Source(content(1))
    get(cache, other)
    real, calls = getattr(os, call), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if call == "write" and len(calls) % 3 == 1:  # only after some of it is there
            return real(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(claims.os, call, fails)
        with caplog.at_level(logging.WARNING):
            assert [get(cache, source) for _ in range(2)] == [source.data] * 2
            assert get(cache, other) == other.data  # what is there still is
    assert calls
    assert names(tmp_path) == [name_of(other.data)]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(tmp_path) in warning.getMessage()
    assert os.strerror(number) in warning.getMessage()
    assert "--cache-dir" in warning.getMessage()
    assert get(cache, source) == source.data  # there is space again
    assert len(names(tmp_path)) == 2
    assert (source.downloads, other.downloads) == (3, 1)


def test_a_file_in_the_place_of_the_folder_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        cache, source = PartCache(place, 10 * SIZE), Source(content(0))
        caplog.clear()
        assert [get(cache, source) for _ in range(2)] == [source.data] * 2
        assert str(place) in caplog.text
        assert len(caplog.records) == 1


HOSTILE = [
    "",
    "../" * 20 + "etc/passwd",
    "0" * 63,
    "0" * 65,
    "G" * 64,
    "A" * 64,
    "0" * 64 + "\n",
    "/" + "0" * 63,
    None,
    5,
]


@pytest.mark.parametrize("digest", HOSTILE, ids=repr)
def test_hostile_digests_never_become_paths(tmp_path: Path, digest: Any) -> None:
    cache, source = PartCache(tmp_path / "cache", 10 * SIZE), Source(content(0))
    for call in (lambda: cache.get(digest, SIZE, source), lambda: cache.open(digest, SIZE)):
        with pytest.raises(IntegrityError, match="sha256"):
            call()
    for size in (-1, 2**70, "5", 1.0, True):
        with pytest.raises(IntegrityError, match="bytes"):
            cache.get("0" * 64, size, source)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "s3://bucket/cache", "file:///tmp/x", "a\0b"])
def test_the_folder_must_be_one_of_this_machine(folder: str) -> None:
    with pytest.raises(ConfigError, match="cache"):
        PartCache(folder)
    with pytest.raises(ConfigError, match="cache_dir"):
        Resources(cache_dir=folder)


@pytest.mark.parametrize("nbytes", [-1, 1.5, True, "5"])
def test_the_bound_must_be_a_number_of_bytes(tmp_path: Path, nbytes: Any) -> None:
    with pytest.raises(ConfigError, match="cache_bytes"):
        PartCache(tmp_path, nbytes)
    with pytest.raises(ConfigError, match="cache_bytes"):
        Resources(cache_bytes=nbytes)
    with pytest.raises(ConfigError, match="cache_bytes"):
        IndexStore(f"memory://{tmp_path.name}", create=True, cache=tmp_path, cache_bytes=nbytes)


def test_the_command_line_sets_both() -> None:
    for arguments, expected in (
        ([], (None, None)),
        (["--cache-dir", "/mnt/nvme", "--cache-bytes", "0"], ("/mnt/nvme", 0)),
    ):
        parser = cli_arguments.Parser()
        cli_arguments.add_answer(parser)
        settings = cli_arguments.answer_settings(parser.parse_args(["q.jsonl", "--store", "s", *arguments]))
        assert (settings["resources"].cache_dir, settings["resources"].cache_bytes) == expected


def test_the_defaults_are_of_the_user_and_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert default_cache_folder() == tmp_path / ".cache/rabatch/parts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert default_cache_folder() == tmp_path / "other/rabatch/parts"
    assert PartCache("~/x").folder == tmp_path / "x"
    free = [1000]
    monkeypatch.setattr("rabatch.storage.cache.shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    assert automatic_cache_bytes(tmp_path / "not/yet/there") == 250
    free[0] = 10 * SIZE
    get(PartCache(tmp_path, SIZE), Source(content(0)))
    assert automatic_cache_bytes(tmp_path) == 11 * SIZE // 4  # what it holds, it may hold


# The cache in a store.


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of parts that were downloaded whole."""
    downloads: list[str] = []
    pieces = Folder.pieces

    def counting(self: Folder, path: str, start: int, stop: int) -> Any:
        downloads.append(path)
        return pieces(self, path, start, stop)

    monkeypatch.setattr(Folder, "pieces", counting)
    return downloads


def committed(tmp_path: Path, **options: Any) -> tuple[IndexStore, Manifest, Any]:
    store = IndexStore(f"memory://{tmp_path.name}", create=True, cache=tmp_path / "cache", **options)
    manifest, blocks = prepare(store)
    return store, store.commit(manifest), blocks


def test_a_store_reads_through_its_cache(tmp_path: Path, read: list[str]) -> None:
    store, manifest, blocks = committed(tmp_path)
    for reader in (store, IndexStore(store.url, cache=tmp_path / "cache"), pickle.loads(pickle.dumps(store))):  # noqa: S301
        for layer, block in enumerate(blocks):
            assert reader.read_layer(manifest, layer, check="once").equals(block)
            assert reader.read_layer(manifest, layer, heads=range(1, 2), check=False).equals(block.select(range(1, 2)))
        reader.read_tokens(manifest, check="once")
    assert sorted(read) == sorted(part.path for part in manifest.parts)
    assert len(names(tmp_path / "cache")) == len(manifest.parts)


def test_a_check_asks_the_store_and_not_the_cache(tmp_path: Path, read: list[str]) -> None:
    store, manifest, blocks = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    part = next(part for part in manifest.parts if part.layer == 0)
    store.folder.write(part.path, bytes(part.bytes))
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])
    with pytest.raises(IntegrityError, match=f"{part.path}: sha256"):
        store.read_layer(manifest, 0)
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])


def test_damage_in_the_store_never_enters_the_cache(tmp_path: Path) -> None:
    store, manifest, _ = committed(tmp_path)
    part = next(part for part in manifest.parts if part.layer == 0)
    data = store.folder.read(part.path)
    for wrong in (bytes(part.bytes), data[:-1], data + b"x"):
        store.folder.write(part.path, wrong)
        with pytest.raises(IntegrityError, match=part.path):
            store.read_layer(manifest, 0, check="once")
        assert not (tmp_path / "cache").exists() or names(tmp_path / "cache") == []
    store.folder.delete(part.path)
    with pytest.raises(IntegrityError, match="is missing"):
        store.read_layer(manifest, 0, check="once")


def test_a_few_heads_do_not_fill_the_cache(tmp_path: Path) -> None:
    store, manifest, blocks = committed(tmp_path)
    assert store.read_layer(manifest, 0, heads=range(1), check=False).equals(blocks[0].select(range(1)))
    assert not (tmp_path / "cache").exists()


def test_parts_of_another_are_refused_from_the_cache_too(tmp_path: Path) -> None:
    """A manifest that names the digest of another document's part."""
    store, manifest, _ = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    mine, _ = prepare(store, "other")
    stolen = next(part for part in manifest.parts if part.layer == 0)
    parts = [
        dataclasses.replace(part, bytes=stolen.bytes, sha256=stolen.sha256) if part.layer == 0 else part
        for part in mine.parts
    ]
    with pytest.raises(IntegrityError, match="document_key"):
        store.read_layer(dataclasses.replace(mine, parts=tuple(parts)), 0, check="once")


def _flip_a_key(path: Path) -> None:
    """Which only the digest can notice."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [_flip_a_key, _truncate, lambda path: path.write_bytes(bytes(path.stat().st_size))])
def test_an_entry_written_to_while_it_is_read_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], change: Callable[[Path], None]
) -> None:
    store, manifest, blocks = committed(tmp_path)
    store.read_layer(manifest, 0, check="once")
    decode, changes = decode_layer, [change]

    def decoding(source: Any, **options: Any) -> Any:
        if changes:
            changes.pop()(tmp_path / "cache" / names(tmp_path / "cache")[0])
        return decode(source, **options)

    monkeypatch.setattr("rabatch.storage.parts.decode_layer", decoding)
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])
    assert not changes
    assert len(read) == 2  # the first time, and now
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])
    assert len(read) == 3  # and it is an entry again
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])
    assert len(read) == 3


def test_threads_share_one_download(tmp_path: Path, read: list[str]) -> None:
    store, manifest, blocks = committed(tmp_path)
    barrier = threading.Barrier(6)

    def load(_: int) -> bool:
        barrier.wait()
        return store.read_layer(manifest, 0, check="once").equals(blocks[0])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(load, range(6)))
    assert len(read) == 1


def test_a_local_store_has_no_cache(tmp_path: Path) -> None:
    store = IndexStore(tmp_path / "store", create=True, cache=tmp_path / "cache")
    manifest, blocks = prepare(store)
    store.commit(manifest)
    assert store.read_layer(manifest, 0, check="once").equals(blocks[0])
    assert not (tmp_path / "cache").exists()
