"""Indexes that a newer one has taken the place of.

`rabatch answer` asks, of each document and model, the newest text, and of it the newest index that serves the recipe,
unless it is told a fingerprint. What it never asks so is superseded: indexes of an earlier text, and of one text all
but the newest, the newest with a graph and the newest with codes for a scan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from rabatch.errors import StoreError
from rabatch.storage.catalog import entries
from rabatch.storage.manifest import held
from rabatch.storage.store import IndexStore, OnError
from rabatch.storage.summaries import id_text, summarise

_DECIDES = ("path", "model_sha256", "content_sha256", "index", "created_us")


@dataclass(frozen=True)
class Index:
    """What decides between the indexes of one document."""

    path: str
    model_sha256: str
    content_sha256: str
    index: str
    created_us: int


@dataclass(kw_only=True)
class Withdrawal:
    """What was withdrawn, or with `dry_run` would be.

    Attributes:
        paths: Of the manifests.
        problems: Documents of which nothing was withdrawn, as ``path: reason``, because an index of them is damaged.
    """

    paths: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def superseded(indexes: Iterable[Index]) -> list[Index]:
    """Those of one document that a newer one has taken the place of. Of equally new ones none has."""
    by_model: dict[str, list[Index]] = defaultdict(list)
    for index in indexes:
        by_model[index.model_sha256].append(index)
    gone = []
    for group in by_model.values():
        newest_us = max(index.created_us for index in group)
        texts = {index.content_sha256 for index in group if index.created_us == newest_us}
        newest_of: dict[str, int] = {}
        for index in group:
            for need in _serves(index) if index.content_sha256 in texts else ():
                newest_of[need] = max(index.created_us, newest_of.get(need, index.created_us))
        gone += [
            index
            for index in group
            if index.content_sha256 not in texts or all(index.created_us < newest_of[need] for need in _serves(index))
        ]
    return gone


def _serves(index: Index) -> list[str]:
    """What recipes need of an index: one that is there, or one that holds this."""
    return ["", *held(index.index)]


def withdraw_superseded(store: IndexStore, *, dry_run: bool = False) -> Withdrawal:
    """Withdraw superseded indexes; their parts are garbage once the grace period is over.

    Whether an index is superseded is decided by manifests read at that moment, and only if all files of those that
    stay are there. Holds the ids of all documents in memory.

    Raises:
        StoreError: The store cannot be read or written.
    """
    found = Withdrawal()
    for document_id in _documents(store, found):
        problems: list[str] = []
        manifests = store.find(document_id, on_error=_into(problems))
        rows = [summarise(manifest, "") for manifest in manifests]
        gone = {i.path for i in superseded(Index(**{name: row[name] for name in _DECIDES}) for row in rows)}
        for manifest in manifests if gone and not problems else ():
            if manifest.path not in gone:
                try:
                    store.check_parts(manifest)
                except StoreError as error:
                    problems.append(str(error))
        if problems:
            found.problems += problems
            continue
        for path in sorted(gone):
            found.paths.append(path)
            if not dry_run:
                store.withdraw(path)
    return found


def _into(problems: list[str]) -> OnError:
    return lambda path, error: problems.append(f"{path}: {error}")


def _documents(store: IndexStore, found: Withdrawal) -> list[str]:
    """Documents with several indexes for one model."""
    wanted = ["document_id", "model_sha256"]
    tables = [t.select(wanted) for t in entries(store, columns=wanted, on_error=_into(found.problems))]
    if not tables:
        return []
    table = pa.concat_tables(tables)
    counted = table.group_by(wanted).aggregate([([], "count_all")])
    several = counted.filter(pc.greater(counted["count_all"], 1))
    return sorted({id_text(data) for data in several["document_id"].to_pylist()})
