"""Removing what no run of an answers store can use any more: parts without a run, and what killed runs have left.

As of an index store (`rabatch.storage.garbage`), only what was last written longer ago than a grace period goes: a run
may be under way.
"""

from __future__ import annotations

import re
import time

from rabatch.errors import StoreError
from rabatch.storage.answers import PENDING, AnswerStore
from rabatch.storage.garbage import DAY_S, Collection, attempts_in, store_time

_PART = re.compile(r"parts/[0-9a-f]{32}/\d{5}-[0-9a-f]{8}\.parquet")


def collect_answers(
    store: AnswerStore, *, grace_s: float = DAY_S, dry_run: bool = False, now_s: float | None = None
) -> Collection:
    """Remove garbage: `attempts` are parts that no run lists, `others` finished answers of runs that never committed.

    Args:
        grace_s: Longer than any run takes. What a killed run had finished is asked again once it is removed.
        now_s: As of `rabatch.storage.garbage.collect`.

    Raises:
        IntegrityError: A run's manifest is damaged or missing, so that nothing can be told from garbage.
        StoreError: The store cannot be read or written.
    """
    if grace_s < 0:
        raise StoreError("grace_s", grace_s, "must not be negative")
    if now_s is None:
        now_s = time.time() if dry_run else store_time(store.folder)
    cutoff_s, found = now_s - grace_s, Collection()
    pending = [file for file in store.folder.files(PENDING) if file.changed_s <= cutoff_s]
    owned = []
    for file in store.folder.walk("parts"):
        if _PART.fullmatch(file.path):
            owned.append(file)
        else:
            found.unknown.append(file.path)
    # After the listing: what a run commits meanwhile is listed by its manifest.
    listed = {part.path.rsplit("/", 1)[0] for run in store.runs() for part in run.parts}
    for attempt in attempts_in(iter(owned)):
        if attempt.path in listed:
            continue
        if attempt.changed_s > cutoff_s:
            found.waiting += 1
            continue
        found.attempts.append(attempt)
        if not dry_run:
            for file in store.folder.files(attempt.path):
                store.folder.delete(file.path)
            store.folder.prune(attempt.path, before_s=cutoff_s)
    found.others = [file.path for file in pending]
    if not dry_run:
        for path in found.others:
            store.folder.delete(path)
    return found
