"""Removing what no reader can use any more: attempts without a manifest, withdrawn indexes, old catalogs.

What is removed was last written longer ago than a grace period, and what had a manifest was withdrawn longer ago than
that: a build may be under way, and a reader may have opened an index the moment before. The catalog only narrows down
where garbage may lie. Before anything is removed, the manifests of its document are listed and read again.
"""

from __future__ import annotations

import functools
import itertools
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from rabatch.errors import FormatVersionError, IntegrityError, StoreError
from rabatch.storage.catalog import CATALOG, SEGMENT_PATH, entries, generation_path, generations, read_generation
from rabatch.storage.filesystem import Folder
from rabatch.storage.listing import Listed, in_order
from rabatch.storage.store import WITHDRAWN, IndexStore
from rabatch.storage.summaries import attempts_of

DAY_S = 24 * 3600
_AT_ONCE = 16
_PART = re.compile(r"parts/([0-9a-f]{16}/[0-9a-f]{32})/.+/[^/]+")
_MANIFEST = re.compile(r"manifests/[0-9a-f]{16}/[0-9a-f]{32}-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Attempt:
    """A folder of parts that no manifest lists. `changed_s`: when the newest of them was written."""

    path: str
    files: int
    bytes: int
    changed_s: float


@dataclass(kw_only=True)
class Collection:
    """What was removed, or with `dry_run` would be.

    Attributes:
        attempts: Folders of parts.
        others: Paths of old catalogs and of records of withdrawn manifests; of an answers store, of finished answers
            that no run has taken over.
        waiting: Attempts without a manifest that are within the grace period.
        unknown: Files below ``parts/`` that are not where rabatch puts parts. They are left alone.
        problems: Manifests that could not be read, as ``path: reason``. Nothing of their documents was removed.
    """

    attempts: list[Attempt] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    waiting: int = 0
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(attempt.bytes for attempt in self.attempts)


def collect(
    store: IndexStore, *, grace_s: float = DAY_S, dry_run: bool = False, now_s: float | None = None
) -> Collection:
    """Remove garbage.

    Args:
        grace_s: Longer than any build goes without writing a part, and than any reader keeps an index open.
        now_s: The time, in seconds since 1970. By default that of the store's own clock, or of this machine's with
            `dry_run`, as asking the former takes a write.

    Raises:
        IntegrityError: A damaged manifest lies at a path that does not say whose it is, so that nothing is safe.
        StoreError: The store cannot be read or written.
    """
    if grace_s < 0:
        raise StoreError("grace_s", grace_s, "must not be negative")
    if now_s is None:
        now_s = time.time() if dry_run else store_time(store.folder)
    cutoff_s, found = now_s - grace_s, Collection()
    candidates = list(_candidates(store, cutoff_s, found))  # all are known before one is removed
    calls = (functools.partial(_remove, store, group, cutoff_s, dry_run) for group in candidates)
    for part in in_order(calls, ahead=_AT_ONCE):
        found.attempts += part.attempts
        found.waiting += part.waiting
        found.problems += [problem for problem in part.problems if problem not in found.problems]
    found.others = [*_old_records(store, cutoff_s), *_old_catalogs(store, cutoff_s, found)]
    if not dry_run:
        for path in found.others:
            store.folder.delete(path)
    return found


def store_time(folder: Folder) -> float:
    """Now, by the clock that dates the store's files: another machine's may be hours off."""
    name = f"rabatch-clock-{secrets.token_hex(8)}"
    folder.write(name, b"")
    try:
        (file,) = folder.files("", name)
    finally:
        folder.delete(name)
    return file.changed_s if file.changed_s != float("inf") else time.time()


def _candidates(store: IndexStore, cutoff_s: float, found: Collection) -> Iterator[list[Attempt]]:
    """Attempts that no manifest seems to list, by document."""

    def on_error(path: str, error: StoreError) -> None:
        if _MANIFEST.fullmatch(path) is None or isinstance(error, FormatVersionError):
            fix = f"cannot be read, so nothing can be told from garbage ({error}); move it elsewhere"
            raise IntegrityError("manifest", path, fix) from error
        found.problems.append(f"{path}: {error}")

    references = _References(entries(store, columns=["attempts"], on_error=on_error))
    groups = []
    for owner, files in itertools.groupby(store.folder.walk("parts"), key=_owner):
        if owner == "":
            found.unknown += [file.path for file in files]
            continue
        listed = references.of(owner)
        loose = [attempt for attempt in attempts_in(files) if attempt.path not in listed]
        old = [attempt for attempt in loose if attempt.changed_s <= cutoff_s]
        found.waiting += len(loose) - len(old)
        if old:
            groups.append(old)
    references.of("~")  # the rest: a manifest may list parts of elsewhere
    for old in groups:
        left = [attempt for attempt in old if attempt.path not in references.elsewhere]
        if left:
            yield left


def _owner(file: Listed) -> str:
    match = _PART.fullmatch(file.path)
    return match[1] if match else ""


def attempts_in(files: Iterator[Listed]) -> Iterator[Attempt]:
    """The folders that files lie in; those of one folder must follow each other."""
    for path, group in itertools.groupby(files, key=lambda file: file.path.rsplit("/", 1)[0]):
        some = list(group)
        yield Attempt(path, len(some), sum(f.bytes for f in some), max(f.changed_s for f in some))


class _References:
    """Which attempts manifests list, in order of the documents."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._rows = (row for t in tables for row in zip(t["path"].to_pylist(), t["attempts"].to_pylist(), strict=True))
        self._next = next(self._rows, None)
        self.elsewhere: set[str] = set()
        """Those that lie in a folder of another document."""

    def of(self, owner: str) -> set[str]:
        """Attempts that the manifests of a document list. Owners must come in order."""
        found: set[str] = set()
        while self._next is not None:
            path, attempts = self._next
            own = path.removeprefix("manifests/").split("-")[0]
            if own > owner:
                break
            self.elsewhere |= {attempt for attempt in attempts if not attempt.startswith(f"parts/{own}/")}
            if own == owner:
                found |= set(attempts)
            self._next = next(self._rows, None)
        return found


def _remove(store: IndexStore, attempts: list[Attempt], cutoff_s: float, dry_run: bool) -> Collection:
    """Remove these attempts at one document, if they are garbage now."""
    found = Collection()
    _, fingerprint, key, *_ = attempts[0].path.split("/")
    paths = [file.path for file in store.folder.files(f"manifests/{fingerprint}", f"{key}-")]
    listed: set[str] = set()
    for manifest in store.read_manifests(paths, on_error=lambda path, e: found.problems.append(f"{path}: {e}")):
        listed |= attempts_of(manifest)
    # After the manifests: one that is withdrawn in between has its record by now.
    records = store.folder.files(f"{WITHDRAWN}/{fingerprint}", f"{key}-")
    if found.problems:
        return found
    for attempt in attempts:
        if attempt.path in listed:
            continue
        files = store.folder.files(attempt.path)
        if any(file.changed_s > cutoff_s for file in (*files, *records)):
            found.waiting += 1
            continue
        found.attempts.append(attempt)
        if not dry_run:
            for file in files:
                store.folder.delete(file.path)
            store.folder.prune(attempt.path, before_s=cutoff_s)
    return found


def _old_records(store: IndexStore, cutoff_s: float) -> Iterator[str]:
    return (file.path for file in store.folder.walk(WITHDRAWN) if file.changed_s <= cutoff_s)


def _old_catalogs(store: IndexStore, cutoff_s: float, found: Collection) -> Iterator[str]:
    """Generations whose successor is older than the grace period, and files that no other generation lists."""
    files = {file.path: file for file in store.folder.files(CATALOG)}
    numbers = generations(store)  # after the files: a generation that came meanwhile keeps those it lists
    kept: set[str] = set()
    gone = []
    for number, successor in itertools.zip_longest(numbers, numbers[1:]):
        after = None if successor is None else files.get(generation_path(successor))
        if after is not None and after.changed_s <= cutoff_s:
            gone.append(generation_path(number))
            continue
        try:
            kept |= {segment.path for segment in read_generation(store, number).segments}
        except StoreError as error:
            found.problems.append(str(error))
            return  # which files are its is not known; they may belong to a version that this one cannot read
    yield from gone
    for path, file in files.items():
        if SEGMENT_PATH.fullmatch(path) and path not in kept and file.changed_s <= cutoff_s:
            yield path
