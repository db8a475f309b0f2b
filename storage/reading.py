"""How the bytes of a part come to its decoder: whole or in ranges, from the store or the cache, checked or not."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage.cache import HASH_BYTES, Each, PartCache
from rabatch.storage.failures import REBUILD, MissingFileError, is_transient, store_error
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Part

Check = bool | Literal["once"]
T = TypeVar("T")
_MAGIC_BYTES = 4  # "PAR1", with which a Parquet file begins
_TAIL_BYTES = 1 << 16  # holds the footer of most parts


class PartReader:
    """Reads parts of one store. It can be pickled, and used by several threads.

    Args:
        cache: Of the store's parts. None: every reading goes to the store.
    """

    def __init__(self, folder: Folder, cache: PartCache | None = None) -> None:
        self._folder = folder
        self._cache = cache
        self.verified: dict[str, tuple[str, tuple[int, ...]]] = {}  # digest that was right, and when: a stamp

    def read(self, part: Part, check: Check, decode: Callable[[Any], T], *, groups: range | None = None) -> T:
        """What `decode` makes of a part: of a file, an array of bytes, or a `RangedFile`.

        Args:
            check: As of `IndexStore.read_layer`.
            groups: Row groups that `decode` will read; all by default.

        Raises:
            IntegrityError: The part is missing or not what the manifest says, or `decode` refused it.
        """
        if self._folder.is_local:
            return self._read_local(part, check, decode)
        if self._cache is not None and check == "once":
            source = self._cache.get(part.sha256, part.bytes, lambda each: self._download(part, each))
            return self._decode_entry(self._cache, part, source, decode)
        if check:
            return decode(self._download(part))
        if self._cache is not None and (entry := self._cache.open(part.sha256, part.bytes)) is not None:
            return self._decode_entry(self._cache, part, entry, decode)
        self._check_size(part)
        file = RangedFile(self._folder, part.path, part.bytes)
        with self._named(part):
            file.fetch_groups(groups)
            return self._decode(part, file, decode)

    def _read_local(self, part: Part, check: Check, decode: Callable[[Any], T]) -> T:
        with self._named(part):
            file = self._folder.open(part.path)
        with file, self._named(part):
            stamp = _stamp(file)
            _same_size(part, os.fstat(file.fileno()).st_size)
            if not check:
                return self._decode(part, file, decode)
            if check == "once" and self.verified.get(part.path) == (part.sha256, stamp):
                made = _unless_changed(lambda: self._decode(part, file, decode), lambda: _stamp(file) == stamp)
                if made is not None:
                    return made[0]
                stamp = _stamp(file)  # it was written to meanwhile
                _same_size(part, os.fstat(file.fileno()).st_size)
            # What is decoded are the bytes whose digest was right, whatever becomes of the file.
            data = _read_right(part, file)
            if _stamp(file) == stamp:
                self.verified[part.path] = (part.sha256, stamp)
            return decode(data)

    def _decode_entry(self, cache: PartCache, part: Part, source: Any, decode: Callable[[Any], T]) -> T:
        if isinstance(source, np.ndarray):
            return decode(source)
        with source:
            made = _unless_changed(
                lambda: self._decode(part, source, decode), lambda: cache.holds(part.sha256, part.bytes, source)
            )
        return decode(self._download(part)) if made is None else made[0]

    def _decode(self, part: Part, file: Any, decode: Callable[[Any], T]) -> T:
        """A file that could not be read is not damaged."""
        try:
            return decode(file)
        except IntegrityError as error:
            cause = error.__cause__
            if cause is not None and (is_transient(cause) or getattr(cause, "errno", None) is not None):
                raise store_error(cause, f"{self._folder.url}/{part.path}") from error
            raise

    def _download(self, part: Part, each: Each = lambda piece: None) -> NDArray[np.uint8]:
        """All bytes of a part, which are right. `each` is given them as they come."""
        self._check_size(part)  # before memory is taken for it
        data, digest, at = np.empty(part.bytes, np.uint8), hashlib.sha256(), 0
        view = data.data
        with self._named(part):
            for piece in self._folder.pieces(part.path, 0, part.bytes):
                view[at : at + len(piece)] = piece
                digest.update(piece)
                each(view[at : at + len(piece)])
                at += len(piece)
        _same_size(part, at)
        _same_digest(part, digest.hexdigest())
        return data

    def _check_size(self, part: Part) -> None:
        with self._named(part):
            _same_size(part, self._folder.size(part.path))

    @contextlib.contextmanager
    def _named(self, part: Part) -> Iterator[None]:
        try:
            yield
        except MissingFileError as error:
            raise IntegrityError(part.path, None, f"is missing; {REBUILD}") from error
        except OSError as error:
            raise store_error(error, f"{self._folder.url}/{part.path}") from error


class RangedFile:
    """A file of a store, to be read by Arrow, of which only some ranges are fetched.

    Args:
        nbytes: Its size.
    """

    def __init__(self, folder: Folder, path: str, nbytes: int) -> None:
        self._folder, self._path, self._nbytes = folder, path, nbytes
        self._held: list[tuple[int, memoryview]] = []
        self._at = 0
        self.closed = False

    def fetch_groups(self, groups: range | None) -> None:
        """Fetch the footer, and then the row groups at once, in pieces that come in parallel. A footer that cannot be
        read is left to the decoder to refuse."""
        tail = max(0, self._nbytes - _TAIL_BYTES)
        self._fetch(tail, self._nbytes)
        with contextlib.suppress(pa.ArrowException, OSError, ValueError, OverflowError, RuntimeError):
            metadata = pq.read_metadata(self)
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            wanted = range(len(sizes)) if groups is None else groups
            # They follow each other from the first byte on. Where a writer left gaps, the rest comes when it is read.
            start, stop = _MAGIC_BYTES + sum(sizes[: wanted.start]), _MAGIC_BYTES + sum(sizes[: wanted.stop])
            if 0 <= start < tail and stop <= self._nbytes:  # Parquet that says otherwise is refused by who reads it
                self._fetch(start, stop)
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> Any:
        stop = self._nbytes if size < 0 else min(self._at + size, self._nbytes)
        start, self._at = self._at, max(self._at, stop)
        if stop <= start:
            return b""
        for first, held in self._held:
            if first <= start and stop <= first + len(held):
                return pa.py_buffer(held[start - first : stop - first])
        return b"".join(self._folder.pieces(self._path, start, stop))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self._held.clear()

    def _fetch(self, start: int, stop: int) -> None:
        data = np.empty(stop - start, np.uint8).data
        at = 0
        for piece in self._folder.pieces(self._path, start, stop):
            data[at : at + len(piece)] = piece
            at += len(piece)
        self._held.append((start, data[:at]))


def _read_right(part: Part, file: Any) -> NDArray[np.uint8]:
    """All bytes of a file; IntegrityError unless they are those of the part. Each is fetched from memory once."""
    data, digest, at = np.empty(part.bytes, np.uint8), hashlib.sha256(), 0
    view = data.data
    file.seek(0)
    while count := file.readinto(view[at : at + HASH_BYTES]):
        digest.update(view[at : at + count])
        at += count
    _same_size(part, at)
    _same_digest(part, digest.hexdigest())
    return data


def _unless_changed(call: Callable[[], T], unchanged: Callable[[], bool]) -> tuple[T] | None:
    """What `call` returns or raises; None if the file that it read was changed meanwhile, or could not be read."""
    try:
        made = call()
    except StoreError as error:
        if isinstance(error, IntegrityError) and unchanged():
            raise
        return None
    return (made,) if unchanged() else None


def _stamp(file: Any) -> tuple[int, ...]:
    """What becomes another if the file is replaced or written to; its owner cannot set the last time back."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _same_size(part: Part, nbytes: int) -> None:
    if nbytes != part.bytes:
        raise IntegrityError(f"{part.path}: bytes", nbytes, f"must be {part.bytes}; {REBUILD}")


def _same_digest(part: Part, digest: str) -> None:
    if digest != part.sha256:
        raise IntegrityError(f"{part.path}: sha256", digest, f"must be {part.sha256}; {REBUILD}")
