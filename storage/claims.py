"""Files of a folder that several processes share: locks that end with their holder, and downloads that are claimed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 60.0
"""How long a lock is waited for whose file is not written to; a piece of a download is tried again for less."""
_POLL_S = 0.02


class Claim:
    """The right to make a file: a file beside it, locked, that gets its name when it is whole.

    Args:
        part: The file to write; made if there is none.
        entry: Its name once it is whole.
        on_error: Told why the file could not be written; this ends the claim.

    Raises:
        TimeoutError: Another process holds it and does not go on.
        OSError: The file cannot be made or locked.
    """

    def __init__(self, part: Path, entry: Path, on_error: Callable[[OSError], None]) -> None:
        self._part, self._entry, self._on_error = part, entry, on_error
        self._descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held = True
        try:
            _wait_for_lock(self._descriptor, part)
        except BaseException:
            self._held = False
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def counts(self) -> bool:
        """False if the holder before us has renamed or removed the file while we waited for it."""
        try:
            return os.stat(self._part).st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return False

    @property
    def stamp(self) -> tuple[int, ...]:
        """As of the entry."""
        return stamp_of(os.fstat(self._descriptor))

    def take(self, nbytes: int) -> None:
        """Set the file's size, by which others see what it will take, and begin it anew."""
        os.ftruncate(self._descriptor, 0)  # what a holder that died has left
        os.ftruncate(self._descriptor, nbytes)

    def write(self, piece: memoryview) -> None:
        """Append."""
        if not self._held:
            return
        try:
            while len(piece):
                piece = piece[os.write(self._descriptor, piece) :]
        except OSError as error:
            self._on_error(error)
            self.close()  # at once: others need not wait for the rest

    def publish(self) -> bool:
        """Give the file its name; whether that was possible."""
        if not self._held:
            return False
        try:
            os.utime(self._descriptor)
            os.rename(self._part, self._entry)
        except OSError as error:
            self._on_error(error)
            return False
        return True

    def close(self) -> None:
        """Let go of it; what was not published is removed."""
        if self._held:
            self._held = False
            with contextlib.suppress(OSError):
                remove(self._part, os.fstat(self._descriptor).st_ino)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked process may have it open
            os.close(self._descriptor)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Nobody else is between these lines with the same lock file. Errors as of `Claim`."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _wait_for_lock(descriptor, lock)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # as in `Claim.close`
    finally:
        os.close(descriptor)


def claimed_bytes(part: Path) -> int:
    """What the claim of another process takes; 0 if its holder has died, and then the file is removed."""
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if not _try_lock(descriptor):
            return os.fstat(descriptor).st_size
        remove(part, os.fstat(descriptor).st_ino)
        return 0
    finally:
        os.close(descriptor)


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """What becomes another if a file is replaced or written to. Without the time of its last change: every use of an
    entry, by whatever process, is noted in its access time."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def remove(path: Path, inode: int) -> None:
    """Unlink `path` if it still is that file."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path, follow_symlinks=False).st_ino == inode:
            os.unlink(path)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_lock(descriptor: int, path: Path) -> None:
    written, since = -1, time.monotonic()
    while not _try_lock(descriptor):
        now = os.fstat(descriptor).st_mtime_ns
        if now != written:
            written, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            raise TimeoutError(f"{path.name} is held by a process that does not go on")
        time.sleep(_POLL_S)
