"""A folder of this machine that keeps parts of object storage, so that a node downloads each of them once.

An entry is known by the SHA-256 and size of its bytes: it cannot be another document's, and never becomes stale. Its
name is `DIGEST-SIZE`; while it is downloaded, `DIGEST-SIZE.part`. The processes of a node share the folder:

- A download holds a lock (`flock`) on its file. Who wants the same part meanwhile waits, for the network is what is
  slow; the system lets go of the lock when its holder dies, and the next one starts anew. Who waits on a download
  that makes no headway reads the store itself.
- The file is renamed when its digest was right, so that every entry is whole. Nothing is flushed to the disk: what a
  crash of the machine leaves is found by its digest, which every process takes once of each entry it reads.
- Room is made before a download begins, under a lock of the folder, and counts what other downloads will take; so
  the entries never exceed the bound. The entry that was used longest ago goes first. One that is open may go too:
  its reader keeps what it has opened.

A cache that cannot be used, for want of space or permissions, costs one warning and never a read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rabatch.errors import ConfigError, IntegrityError
from rabatch.storage.claims import Claim, alone, claimed_bytes, remove, stamp_of

Each: TypeAlias = Callable[[memoryview], None]
"""Is given what a download brings, piece by piece and in order."""

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}-[0-9]{1,16}")
_PART = re.compile(r"[0-9a-f]{64}-[0-9]{1,16}\.part")
_LOCK = ".lock"
HASH_BYTES = 1 << 20
"""Read and hashed at a time: they stay in the processor's cache meanwhile."""


def default_cache_folder() -> Path:
    """Of the user, on this machine: ``$XDG_CACHE_HOME/rabatch/parts``, or below ``~/.cache``. Not the folder for
    temporary files, which often lies in memory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "rabatch" / "parts"


def automatic_cache_bytes(folder: Path) -> int:
    """A quarter of what the disk of `folder` has free, where the entries that are there count as free; 0 if unknown."""
    there = folder
    while not there.is_dir() and there != there.parent:
        there = there.parent
    try:
        return (shutil.disk_usage(there).free + sum(size for _, size, _ in _entries(folder))) // 4
    except OSError:
        return 0


class PartCache:
    """Parts on this machine's disk.

    Args:
        folder: Made when needed, for this user only. ``~`` is the home of whoever reads.
        max_bytes: Of all entries together; larger parts are not kept. None: `automatic_cache_bytes`.

    Raises:
        ConfigError: `folder` is a URL, or `max_bytes` is no number of bytes.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None) -> None:
        if not str(folder) or "://" in str(folder) or "\0" in str(folder):
            raise ConfigError("cache", str(folder), "must be a folder of this machine")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
            raise ConfigError("cache_bytes", max_bytes, "must be a whole number of bytes, at least 0")
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self.max_bytes = automatic_cache_bytes(self.folder) if max_bytes is None else max_bytes
        self._right: dict[str, tuple[int, ...]] = {}  # entries whose digest this process has taken, and their stamps
        self._warned = False

    def __repr__(self) -> str:
        return f"PartCache({str(self.folder)!r}, {self.max_bytes})"

    def get(self, sha256: str, nbytes: int, fetch: Callable[[Each], Any]) -> BinaryIO | Any:
        """A part's entry, open for reading, its bytes right; or, if there was none, what `fetch` returned.

        Args:
            fetch: Downloads the part, gives its pieces to its argument and raises unless their digest is `sha256`. Its
                errors are raised; nothing is kept then.

        Raises:
            IntegrityError: `sha256` or `nbytes` cannot be one.
        """
        name = _name(sha256, nbytes)
        claim: Claim | BinaryIO | None = None
        if nbytes <= self.max_bytes:
            try:
                claim = self._claim(name, sha256, nbytes)
            except OSError as error:
                self._warn(error)
        if claim is None:
            return fetch(lambda piece: None)
        if not isinstance(claim, Claim):
            return claim
        with claim:
            data = fetch(claim.write)
            if claim.publish():
                self._right[name] = claim.stamp
        return data

    def open(self, sha256: str, nbytes: int) -> BinaryIO | None:
        """A part's entry, open for reading, its bytes right; None if there is none. A damaged entry is removed."""
        try:
            return self._open(_name(sha256, nbytes), sha256, nbytes)
        except OSError as error:
            self._warn(error)
            return None

    def holds(self, sha256: str, nbytes: int, file: BinaryIO) -> bool:
        """Whether a file that `get` or `open` gave still has the bytes that were right, as far as its times tell."""
        return self._right.get(_name(sha256, nbytes)) == stamp_of(os.fstat(file.fileno()))

    def _open(self, name: str, sha256: str, nbytes: int) -> BinaryIO | None:
        path = self.folder / name
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (the caller's)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            found = os.fstat(file.fileno())
            stamp = stamp_of(found)
            if self._right.get(name) != stamp:
                if found.st_size != nbytes or digest_of(file) != sha256:
                    _log.warning("the cache entry %s is damaged and is fetched anew", path)
                    remove(path, found.st_ino)
                    file.close()
                    return None
                file.seek(0)
                self._right[name] = stamp
            with contextlib.suppress(OSError):  # of another user, or on a disk that is read only
                os.utime(file.fileno(), ns=(time.time_ns(), found.st_mtime_ns))
        except BaseException:
            file.close()
            raise
        return file  # type: ignore[return-value]

    def _claim(self, name: str, sha256: str, nbytes: int) -> Claim | BinaryIO | None:
        """The entry; or the right and room to make it; or None if there is no room now."""
        part, entry = self.folder / f"{name}.part", self.folder / name
        while True:
            if (file := self._open(name, sha256, nbytes)) is not None:
                return file
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            claim, kept = Claim(part, entry, self._warn), False
            try:
                if claim.counts and not entry.exists():  # else it was made while we waited
                    with alone(self.folder / _LOCK):
                        if not self._make_room(part, nbytes):
                            return None
                        claim.take(nbytes)
                    kept = True
                    return claim
            finally:
                if not kept:
                    claim.close()

    def _make_room(self, own: Path, nbytes: int) -> bool:
        """Remove what was used longest ago until there is room; whether there is. The caller takes it at once."""
        entries = sorted(_entries(self.folder))
        taken = sum(size for _, size, _ in entries)
        others = [path for path in self.folder.glob("*.part") if path != own and _PART.fullmatch(path.name)]
        taken += sum(claimed_bytes(path) for path in others)
        for _, size, path in entries:
            if taken + nbytes <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            taken -= size
        return taken + nbytes <= self.max_bytes

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the cache folder %s cannot be used (%s): parts are read from the store every time; free some space, "
                "make the folder writable, or choose another with --cache-dir",
                self.folder,
                error.strerror or error,
            )


def digest_of(file: Any) -> str:
    """SHA-256, in hex, of an open file, from its start to its end."""
    file.seek(0)
    digest, piece = hashlib.sha256(), memoryview(bytearray(HASH_BYTES))
    while count := file.readinto(piece):
        digest.update(piece[:count])
    return digest.hexdigest()


def _name(sha256: str, nbytes: int) -> str:
    """Digests come from manifests: none may become a path."""
    if type(sha256) is not str or not _DIGEST.fullmatch(sha256):
        raise IntegrityError("sha256", sha256, "must be 64 hexadecimal digits; the manifest is damaged")
    if type(nbytes) is not int or not 0 <= nbytes < 10**16:
        raise IntegrityError("bytes", nbytes, "must be a size in bytes; the manifest is damaged")
    return f"{sha256}-{nbytes}"


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, size and path of each. Files that are not ours are not seen."""
    try:
        found = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in found:
        if _ENTRY.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                about = entry.stat(follow_symlinks=False)
                yield about.st_atime_ns, about.st_size, Path(entry.path)
