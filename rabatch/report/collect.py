"""A report of what lies in an index store and an answers store, whoever put it there."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from rabatch.report.run import Run
from rabatch.report.statistics import Phase
from rabatch.storage.answers import AnswerStore, exported
from rabatch.storage.catalog import entries
from rabatch.storage.store import IndexStore

_INDEX_COLUMNS = ["context_tokens", "stored_bytes", "fingerprint", "model", "created_us"]
_ANSWER_COLUMNS = [
    *("question_id", "document_id", "status", "reason", "answer_tokens", "attended_share", "seconds", "fingerprint"),
]
_RUNS_SHOWN = 20


def collect(store: IndexStore | None, answers: AnswerStore | None) -> Run:
    """What the stores hold: of the indexes when they were committed, of the answers the latest of each question and
    document, by what they cost. When each answer was given is not stored.

    Raises:
        StoreError: One of them is damaged.
    """
    run = Run("rabatch report", began=None)
    if store is not None:
        run.places["store"] = store.url
        run.phases.append(_of_store(run, store))
    if answers is not None:
        run.places["answers"] = answers.url
        run.phases.append(_of_answers(run, answers))
    return run


def _of_store(run: Run, store: IndexStore) -> Phase:
    phase = Phase("build", "documents", "context")
    damaged: list[str] = []
    first, last, models = math.inf, -math.inf, set[str]()
    found = entries(store, columns=_INDEX_COLUMNS, on_error=lambda path, error: damaged.append(path))
    tables = [table.select(_INDEX_COLUMNS) for table in found]
    for table in tables:
        if table.num_rows:
            bounds = pc.min_max(table["created_us"]).as_py()
            first, last = min(first, bounds["min"] / 1e6), max(last, bounds["max"] / 1e6)
    for table in tables:
        for row in table.to_pylist():
            at_s = row["created_us"] / 1e6 - first
            phase.finish("indexed", row["fingerprint"], tokens=row["context_tokens"], seconds={}, at_s=at_s)
            phase.stored_bytes += row["stored_bytes"]
            models.add(row["model"])
    for path in damaged:
        phase.counts["failed"] += 1
        phase.failures.add("manifest is damaged; see rabatch verify", path)
    if phase.rows.total:
        phase.elapsed_s = max(1.0, last - first)
        about: dict[str, Any] = {"models": ", ".join(sorted(models)[:_RUNS_SHOWN])}
        for name, at in (("first index", first), ("last index", last)):
            about[name] = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        run.settings["store"] = about
    return phase


def _of_answers(run: Run, answers: AnswerStore) -> Phase:
    phase = Phase("answer", "answers", "generated")
    for table in exported(answers):
        for row in table.select(_ANSWER_COLUMNS).to_pylist():
            _answer(phase, row)
    runs = answers.runs()
    for made in runs[-_RUNS_SHOWN:]:
        about = {"committed": made.created_at, "seconds": round(made.seconds, 1), **made.counts, **made.settings}
        run.settings[f"run {made.number}"] = about
    return phase


def _answer(phase: Phase, row: dict[str, Any]) -> None:
    if row["status"] != "ok":
        phase.counts["failed"] += 1
        phase.failures.add(row["reason"] or "", f"{row['question_id']!r} on {row['document_id']!r}")
        return
    seconds = row["seconds"] or 0.0
    phase.finish("answered", row["fingerprint"], tokens=row["answer_tokens"] or 0, seconds={"answer": seconds})
    phase.latency.add(seconds)
    if row["attended_share"] is not None:
        phase.attended.add(row["attended_share"])
