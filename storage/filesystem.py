"""A folder anywhere: on this machine's disk through the operating system, elsewhere through fsspec.

Two properties that fsspec does not give by itself: a reader never sees half a file, and `create` lets exactly one of
several writers win. A filesystem that cannot do the second is refused, because a commit rests on it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import mmap
import os
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage import listing, s3_pages
from rabatch.storage.failures import MissingFileError, is_conflict, is_out_of_range, is_transient, store_error
from rabatch.storage.listing import TEMPORARY, Listed

ATTEMPTS = 4
PIECE_BYTES = 8 << 20
"""Of a ranged read. A round trip costs little beside it, and a dropped connection costs no more than it."""
_STREAMS = 8  # ranged reads at the same time: one connection to S3 gives 50 to 100 MB/s
_FIRST_WAIT_S = 0.1
_ATOMIC_CREATE = ("file", "local", "memory", "s3", "s3a")
_MEMORY_LOCK = threading.Lock()  # fsspec's memory filesystem looks first and writes then

T = TypeVar("T")


class Folder:
    """Files below a URL or local path; paths are relative, with ``/``.

    Args:
        url: Local path or any fsspec URL.
        storage_options: Passed to fsspec: endpoint, credentials, profile.

    Every method raises StoreError in one line that names the URL and the fix. Methods may be called from several
    threads, and a Folder can be pickled.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        self.url = os.fspath(url)
        options = dict(storage_options)
        if self.url.split("://")[0] in ("s3", "s3a"):
            options.setdefault("use_listings_cache", False)  # others write too
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, OSError, ValueError, TypeError) as error:
            raise store_error(error, self.url) from error
        protocol = self._fs.protocol
        self._protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        self._local = "file" in self._protocols
        self._root = self._root.rstrip("/")

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"  # without the options: they may hold credentials

    @property
    def is_local(self) -> bool:
        """Whether files lie in a folder of this machine's operating system."""
        return self._local

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """The whole file. MissingFileError (a StoreError) if there is none.

        Args:
            max_bytes: A larger file is refused (IntegrityError), and no more memory taken for it.
        """
        full = self._full(path)
        if max_bytes is None and not self._local:
            return cast(bytes, self._run(path, lambda: self._fs.cat_file(full)))
        stop = None if max_bytes is None else max_bytes + 1
        data = self._run(path, lambda: _read_local(full, 0, stop) if self._local else self._range(full, 0, stop))
        if max_bytes is not None and len(data) > max_bytes:
            raise IntegrityError(path, data[:40], f"is larger than the {max_bytes} bytes it may have; remove it")
        return data

    def pieces(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of a file, in order, in pieces of `PIECE_BYTES` that are read several at a time.

        Each is tried again by itself. Fewer bytes than asked for come of a shorter file.
        """
        full = self._full(path)
        read = _read_local if self._local else self._range

        def get(at: int) -> bytes:
            return self._run(path, lambda: read(full, at, min(at + PIECE_BYTES, stop)))

        starts = range(start, stop, PIECE_BYTES)
        if len(starts) <= 1:
            yield from map(get, starts)
            return
        pool = ThreadPoolExecutor(min(_STREAMS, len(starts)))
        try:
            under_way: deque[Future[bytes]] = deque()
            for at in starts:
                under_way.append(pool.submit(get, at))
                if len(under_way) > _STREAMS:  # what waits to be taken lies in memory
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def open(self, path: str) -> BinaryIO:
        """A file to read pieces of."""
        full = self._full(path)
        return cast(
            BinaryIO,
            self._run(path, lambda: open(full, "rb", buffering=0) if self._local else self._fs.open(full, "rb")),
        )

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Write or replace a file, all at once for any reader."""
        full = self._full(path)
        if self._local:
            self._run(path, lambda: _write_local(full, data, os.replace))
        else:
            self._run(path, lambda: self._fs.pipe_file(full, bytes(data)))

    def put(self, path: str, source: str) -> None:
        """As `write` of the file `source` of this machine's disk, which may be larger than memory."""
        full = self._full(path)
        if self._local:
            with open(source, "rb") as file, _mapped(file) as data:
                self._run(path, lambda: _write_local(full, data, os.replace))
        else:
            self._run(path, lambda: self._fs.put_file(source, full))

    def create(self, path: str, data: bytes | memoryview) -> bool:
        """Put-if-absent: of several writers with different data exactly one gets True.

        A put whose answer was lost is sent again, by us or inside the S3 client, and then meets its own file. So a
        file that already holds exactly `data` counts as created: put something unique into it.

        Raises:
            StoreError: Also if the filesystem has no atomic create.
        """
        if not any(protocol in _ATOMIC_CREATE for protocol in self._protocols):
            fix = f"rabatch knows no atomic create for {self._protocols[0]}, so two builds could overwrite each other"
            raise StoreError("store", self.url, f"{fix}; use a local folder or S3")
        full, content = self._full(path), bytes(data)

        def attempt() -> bool:
            try:
                if self._local:
                    _write_local(full, content, os.link)
                else:
                    with _MEMORY_LOCK if "memory" in self._protocols else contextlib.nullcontext():
                        self._fs.pipe_file(full, content, mode="create")
            except Exception as error:
                if not is_conflict(error):
                    raise
                return False
            return True

        return self._run(path, attempt) or self.read(path) == content

    def list(self, path: str = "") -> dict[str, int]:
        """Sizes in bytes of the files below a folder, by path, sorted. A missing folder is empty."""
        return {file.path: file.bytes for file in self.files(path)}

    def files(self, path: str = "", prefix: str = "") -> builtins.list[Listed]:
        """The files below a folder, by path. A missing folder is empty.

        Args:
            prefix: Only what lies in files and folders directly below that begin so; a server is asked for no others.
        """
        full = self._full(path) if path else self._root
        if self._local:
            named = f"{path}/" if path else ""
            return self._run(path, lambda: [*listing.walk_local(full, prefix, named=named)])
        return self._run(path, lambda: self._find(full, prefix))

    def walk(self, path: str) -> Iterator[Listed]:
        """What `files` finds, in the same order, without holding all of it.

        On a server, names in the folders directly below must begin with evenly spread hexadecimal digits, as those
        below ``manifests/FP`` and ``parts/FP`` do; others may be left out.
        """
        full = self._full(path)
        if self._local:
            try:
                yield from listing.walk_local(full, named=f"{path}/")
            except OSError as error:
                raise store_error(error, f"{self.url.rstrip('/')}/{path}") from error
        elif self._lists_prefixes:
            for folder in self.subfolders(path):
                yield from listing.in_shards(functools.partial(self.files, folder))
        else:
            yield from self.files(path)

    def subfolders(self, path: str) -> builtins.list[str]:
        """The folders directly below a folder, by path, sorted. A missing folder has none."""
        full = self._full(path)
        with contextlib.suppress(MissingFileError):
            if self._local:
                with self._run(path, lambda: os.scandir(full)) as entries:
                    return sorted(f"{path}/{e.name}" for e in entries if e.is_dir(follow_symlinks=False))
            found = self._run(path, lambda: self._fs.ls(full, detail=True, **self._fresh()))
            names = {info["name"].strip("/").rsplit("/", 1)[-1] for info in found if info["type"] == "directory"}
            return sorted(f"{path}/{name}" for name in names)
        return []

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except MissingFileError:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of a file. MissingFileError if there is none."""
        full = self._full(path)
        if self._local:
            return self._run(path, lambda: os.stat(full).st_size)
        return int(self._run(path, lambda: self._fs.info(full, **self._fresh())["size"]))

    def delete(self, path: str) -> None:
        """Remove a file; none there is well."""
        full = self._full(path)
        with contextlib.suppress(MissingFileError):
            self._run(path, lambda: os.unlink(full) if self._local else self._fs.rm_file(full))

    def prune(self, path: str, *, before_s: float) -> None:
        """Remove a local folder if it is empty but for what writes interrupted before then left. Servers have none."""
        if self._local:
            full = self._full(path)
            with contextlib.suppress(OSError):
                for name in os.listdir(full):
                    temporary = os.path.join(full, name)
                    if name.startswith(TEMPORARY) and os.stat(temporary).st_mtime <= before_s:
                        os.unlink(temporary)
                os.rmdir(full)

    def _full(self, path: str) -> str:
        if path.startswith("/") or "\\" in path or "\0" in path or not set(path.split("/")).isdisjoint({"", ".", ".."}):
            raise StoreError("path", path, f"must be a relative path inside {self.url}")
        return f"{self._root}/{path}"

    def _range(self, full: str, start: int, stop: int | None) -> bytes:
        try:
            return cast(bytes, self._fs.cat_file(full, start=start, end=stop))
        except Exception as error:
            if not is_out_of_range(error):
                raise
            return b""  # as a disk answers: there is nothing there

    def _fresh(self) -> dict[str, bool]:
        return {"refresh": True} if "s3" in self._protocols else {}

    @property
    def _lists_prefixes(self) -> bool:
        return "s3" in self._protocols

    def _find(self, full: str, prefix: str) -> builtins.list[Listed]:
        self._fs.invalidate_cache()
        asked = {}
        if self._lists_prefixes:
            s3_pages.install(self._fs.s3)
            asked = {"prefix": prefix} if prefix else {}
        found = self._fs.find(full, detail=True, **asked)
        start = f"{full}/{prefix}"
        names = sorted(name for name in found if name.startswith(start) and not name.endswith("/"))
        cut = len(self._root) + 1
        return [listing.of_info(name[cut:], found[name]) for name in names]

    def _run(self, path: str, call: Callable[[], T]) -> T:
        """The result of `call`, tried again after throttling and dropped connections."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:
                if attempt == ATTEMPTS or self._local or not is_transient(error):
                    raise store_error(error, f"{self.url.rstrip('/')}/{path}") from error
            time.sleep(_FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1))
        raise AssertionError("unreachable")


@contextlib.contextmanager
def _mapped(file: BinaryIO) -> Iterator[memoryview]:
    """A file's bytes, read by need."""
    if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
        yield memoryview(b"")
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        yield view


def _read_local(full: str, start: int, stop: int | None) -> bytes:
    with open(full, "rb", buffering=0) as file:
        file.seek(start)
        return file.read() if stop is None else file.read(stop - start)


def _write_local(full: str, data: bytes | memoryview, publish: Callable[[str, str], None]) -> None:
    """Write a temporary file beside `full`, flush it to disk, then give it its name."""
    folder = os.path.dirname(full)
    _make_folder(folder)
    temporary = os.path.join(folder, TEMPORARY + secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, full)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _sync_folder(folder)


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(folder) from None
        return
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
