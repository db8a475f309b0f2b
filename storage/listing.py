"""Listing more files than one wants to hold: in order of their paths, a bounded number of them at a time.

Below the folders of a fingerprint names begin with a document key, which is a digest: evenly spread hexadecimal digits.
So a server's listing of any size can be cut into pieces of a known size by prefix, and these fetched side by side.
"""

from __future__ import annotations

import functools
import itertools
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

TEMPORARY = ".tmp-"
_NAMES_HELD = 524_288  # of one local folder; the others are found by reading the folder again
_ENTRIES_READ = 16_384
_SHARD_FILES = 32_768  # at most so many are expected in one piece of a server's listing
_MAX_DIGITS = 4
_LISTERS = 16
_DIGITS = "0123456789abcdef"

T = TypeVar("T")
_tuple = tuple.__new__


class Listed(NamedTuple):
    """A file as a listing tells of it.

    Attributes:
        tag: Becomes another if the file is replaced: its size, and the server's ETag or the time of the last change.
            Empty where a listing tells neither.
        changed_s: When it was last written, in seconds since 1970 by the clock of who keeps it; infinite if not told.
    """

    path: str
    bytes: int
    tag: str
    changed_s: float


def of_info(path: str, info: dict[str, Any]) -> Listed:
    """What fsspec's filesystems tell of a file, each in its own words."""
    known = (info.get(name) for name in ("LastModified", "mtime", "last_modified", "updated", "created"))
    when: Any = next((value for value in known if value is not None), None)
    tag = info.get("ETag") or info.get("etag") or when
    size = int(info["size"])
    changed_s = float("inf")
    if isinstance(when, datetime):
        changed_s = when.timestamp()
    elif isinstance(when, int | float):
        changed_s = float(when)
    return Listed(path, size, f"{size}-{tag}" if tag else "", changed_s)


def walk_local(folder: str, prefix: str = "", *, named: str = "") -> Iterator[Listed]:
    """Every file below a local folder, in order of paths. Links to folders are not followed.

    Args:
        prefix: Only what lies in files and folders directly below that begin so.
        named: What paths begin with instead of the folder's own name; empty, or with a slash at the end.
    """
    try:
        itself = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        after, more = "", True
        while more:
            names, more = _next_names(itself, prefix, after)
            for name in names:
                if name[-1] == "/":
                    yield from walk_local(f"{folder}/{name[:-1]}", named=named + name)
                    continue
                try:
                    found = os.stat(name, dir_fd=itself)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if stat.S_ISREG(found.st_mode):
                    size, written_s, inode_s = found.st_size, found.st_mtime, found.st_ctime
                    # The inode's own time cannot be set back: a file copied here with its old times counts as new.
                    changed_s = written_s if written_s > inode_s else inode_s
                    # Made so in two thirds of the time: there may be millions.
                    yield _tuple(Listed, (named + name, size, f"{size}-{found.st_mtime_ns}", changed_s))
            after = names[-1] if names else after
    finally:
        os.close(itself)


def _next_names(folder: int, prefix: str, after: str) -> tuple[list[str], bool]:
    """The first names past `after`, in order, and whether there are more.

    Those of folders end in a slash, so that order is that of whole paths.
    """
    names: list[str] = []
    more = False
    with os.scandir(folder) as found:
        while some := list(itertools.islice(found, _ENTRIES_READ)):
            for entry in some if prefix == "" else [entry for entry in some if entry.name.startswith(prefix)]:
                name = entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                if name > after and not name.startswith(TEMPORARY):
                    names.append(name)
            if len(names) >= 2 * _NAMES_HELD:
                names, more = sorted(names)[:_NAMES_HELD], True
    return sorted(names)[:_NAMES_HELD], more or len(names) > _NAMES_HELD


def in_shards(files: Callable[[str], list[Listed]]) -> Iterator[Listed]:
    """The files of a folder of a server, in order, where names begin with evenly spread hexadecimal digits.

    Args:
        files: Given a prefix of names, the files below, in order.
    """
    digits = 0
    while digits < _MAX_DIGITS and len(files("0" * digits + "00")) * 256 > _SHARD_FILES:
        digits += 1
    prefixes = map("".join, itertools.product(_DIGITS, repeat=digits))
    for shard in in_order((functools.partial(files, prefix) for prefix in prefixes), ahead=_LISTERS):
        yield from shard


def in_order(calls: Iterable[Callable[[], T]], *, ahead: int) -> Iterator[T]:
    """Results of the calls, in their order; up to `ahead` of them run in threads meanwhile."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
