"""Folders: the same behaviour on a disk, in memory and on S3; one-line errors."""

import errno
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rabatch.errors import StoreError
from rabatch.storage import filesystem
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder


@pytest.fixture(params=["local", "file-url", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "s3":
        url, options = request.getfixturevalue("s3_url")
        yield Folder(url, **options)
    elif request.param == "memory":
        yield Folder(f"memory://{tmp_path.name}")
    else:
        yield Folder(str(tmp_path / "new") if request.param == "local" else f"file://{tmp_path}/new")


def test_put_read_list_delete(folder: Folder) -> None:
    assert list(folder.list()) == []
    assert not folder.exists("a/b.bin")
    folder.write("a/b.bin", b"one")
    folder.write("a/b.bin", memoryview(b"two!"))
    folder.write("a/c/d e.bin", b"")
    folder.write("ab.bin", b"1")
    assert folder.read("a/b.bin") == b"two!"
    assert folder.size("a/b.bin") == 4
    assert folder.exists("a/c/d e.bin")
    assert folder.list() == {"a/b.bin": 4, "a/c/d e.bin": 0, "ab.bin": 1}
    assert folder.list("a") == {"a/b.bin": 4, "a/c/d e.bin": 0}
    assert folder.list("nowhere") == {}
    with folder.open("a/b.bin") as file:
        file.seek(2)
        assert file.read(1) == b"o"
    folder.delete("a/b.bin")
    folder.delete("a/b.bin")
    assert not folder.exists("a/b.bin")
    for call in (folder.read, folder.size, folder.open):
        with pytest.raises(MissingFileError, match=r"b\.bin"):
            call("a/b.bin")


def test_create_never_replaces(folder: Folder) -> None:
    assert folder.create("x/m.json", b"mine")
    assert not folder.create("x/m.json", b"theirs")
    assert folder.read("x/m.json") == b"mine"
    assert folder.create("x/m.json", memoryview(b"mine"))  # a put whose answer was lost, sent again


def test_of_many_creators_one_wins(folder: Folder) -> None:
    start = threading.Barrier(8)

    def attempt(i: int) -> bool:
        start.wait()
        return folder.create("m.json", b"%d" % i * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert folder.read("m.json") == b"%d" % won.index(True) * 1000
    assert list(folder.list()) == ["m.json"]


def _create_in_process(url: str, i: int) -> bool:
    return Folder(url).create("m.json", b"%d" % i * 100_000)


def test_of_many_processes_one_wins(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        won = pool.starmap(_create_in_process, [(str(tmp_path), i) for i in range(3)], chunksize=1)
    assert sum(won) == 1
    assert (tmp_path / "m.json").read_bytes() == b"%d" % won.index(True) * 100_000


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    folder, size = Folder(str(tmp_path)), 1 << 20
    stop, seen = threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            for name in folder.list():
                data = folder.read(name)
                seen.add((len(data), len(set(data))))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for i in range(6):
            folder.write("w.bin", bytes([i]) * size)
            folder.create(f"c{i}.bin", bytes([i]) * size)
        stop.set()
        watching.result()
    assert seen <= {(size, 1)}


def test_a_failed_local_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        Folder(str(tmp_path)).write("a.bin", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//b", "", "a/", "./a", "a\\..\\b", "a\0b"])
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    folder = Folder(str(tmp_path))
    for call in (
        folder.read,
        folder.size,
        folder.delete,
        lambda p: folder.write(p, b""),
        lambda p: folder.create(p, b""),
    ):
        with pytest.raises(StoreError, match="path"):
            call(path)


def test_pickles_without_losing_its_place(folder: Folder) -> None:
    folder.write("a.bin", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a.bin") == b"1"  # noqa: S301


def test_credentials_are_not_shown() -> None:
    folder = Folder("s3://bucket/x", key="open", secret="sesame")
    assert "sesame" not in repr(folder)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    for url in (tmp_path / "taken", tmp_path / "taken" / "below"):
        folder = Folder(str(url))
        for call in (lambda f: f.write("a/b", b"1"), lambda f: f.create("a/b", b"1")):
            with pytest.raises(StoreError, match="a file lies where a folder is needed") as caught:
                call(folder)
            assert str(tmp_path / "taken") in str(caught.value)


ERRORS: list[tuple[BaseException, str]] = [
    (PermissionError(errno.EACCES, "Permission denied"), "access denied"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
    (OSError(errno.EOPNOTSUPP, "Operation not supported", "a", None, "b"), "hard links"),
    (PermissionError(errno.EPERM, "Operation not permitted", "a", None, "b"), "hard links"),
    (RuntimeError("several\nlines"), "RuntimeError: several lines"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS, ids=lambda v: repr(v)[:30])
def test_errors_are_one_line_with_url_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match=message) as caught:
        Folder(str(tmp_path)).create("m.json", b"1")
    assert str(tmp_path)[:60] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_urls_are_one_line() -> None:
    with pytest.raises(StoreError, match="nosuch://x"):
        Folder("nosuch://x/y")


class _NoCreate(MemoryFileSystem):
    protocol = "nocreate"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("nocreate://")))


def test_filesystems_without_atomic_create_are_refused(tmp_path: Path) -> None:
    fsspec.register_implementation("nocreate", _NoCreate, clobber=True)
    folder = Folder(f"nocreate://{tmp_path.name}")
    folder.write("a.bin", b"1")
    with pytest.raises(StoreError, match="no atomic create for nocreate"):
        folder.create("m.json", b"1")
    assert list(folder.list()) == ["a.bin"]


class _Flaky:
    """Fails some calls of a filesystem, before or after they took effect."""

    def __init__(self, real: Any, failures: int, error: Exception, *, after: bool = False) -> None:
        self.real, self.failures, self.error, self.after = real, failures, error, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name not in ("cat_file", "pipe_file"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failures > 0:
                self.failures -= 1
                if self.after:
                    found(*args, **kwargs)
                raise self.error
            return found(*args, **kwargs)

        return call


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Folder]:
    monkeypatch.setattr(filesystem, "_FIRST_WAIT_S", 0.001)

    def make(failures: int, error: Exception, **kwargs: bool) -> Folder:
        folder = Folder(f"memory://{tmp_path.name}")
        folder._fs = _Flaky(fsspec.filesystem("memory"), failures, error, **kwargs)
        return folder

    return make


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.EBUSY, "SlowDown")], ids=repr
)
def test_dropped_connections_are_tried_again(flaky: Callable[..., Folder], error: Exception) -> None:
    for failures in (1, 3):
        folder = flaky(failures, error)
        folder.write("a.bin", b"%d" % failures)
        assert flaky(failures, error).read("a.bin") == b"%d" % failures
        assert flaky(failures, error).create(f"m{failures}", b"1")
    with pytest.raises(StoreError, match=r"gave up.*try again later"):
        flaky(4, error).read("a.bin")


def test_a_create_whose_answer_was_lost_is_won(flaky: Callable[..., Folder]) -> None:
    assert flaky(1, ConnectionResetError("reset"), after=True).create("m.json", b"mine")
    assert not flaky(1, ConnectionResetError("reset")).create("m.json", b"other")


def test_lasting_errors_are_not_tried_again(flaky: Callable[..., Folder]) -> None:
    folder = flaky(1, PermissionError("no"))
    with pytest.raises(StoreError, match="access denied"):
        folder.read("a.bin")
    assert folder._fs.failures == 0
