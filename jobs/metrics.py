"""The counters of a job in Ray's metrics, from where Prometheus and Ray's dashboard read them.

The driver counts, from the rows that reach it: work that a dead actor had to repeat is counted once. Prometheus shows
each name with ``ray_`` before it and, a counter, ``_total`` after it. docs/observing.md has the list.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from rabatch.report.statistics import Phase

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
_SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1]


class Metrics:
    """Counts what the rows of a job say."""

    def __init__(self) -> None:
        def counter(name: str, text: str, *tags: str) -> Counter:
            return Counter(f"rabatch_{name}", description=text, tag_keys=tags)

        def histogram(name: str, text: str, borders: list[float]) -> Histogram:
            return Histogram(f"rabatch_{name}", description=text, boundaries=borders)

        self._rows = {
            "build": counter("documents", "Documents by how they ended", "status"),
            "answer": counter("answers", "Questions by how they ended", "status"),
        }
        self._tokens = counter("tokens", "Tokens of contexts built, and of answers generated", "kind")
        self._bytes = counter("stored_bytes", "Bytes of indexes committed")
        self._failures = counter("failures", "Failed documents and questions", "phase", "reason")
        self._seconds = counter("work_seconds", "Seconds of work, over all workers", "kind")
        self._latency = histogram("answer_seconds", "Seconds of an answer", _SECONDS)
        self._attended = histogram("attended_share", "Share of a context's keys that an answer attended", _SHARES)
        self._recall = histogram("recall", "Share of the exact top-k that sampled searches found", _SHARES)
        self._left = Gauge("rabatch_rows_left", description="Documents or questions under way", tag_keys=("phase",))

    def row(self, phase: Phase, row: dict[str, Any], *, kind: str | None) -> None:
        """Count a document or an answer.

        Args:
            phase: That it belongs to.
            kind: Of failure, if it failed.
        """
        self._rows[phase.name].inc(tags={"status": row["status"]})
        if kind is not None:
            self._failures.inc(tags={"phase": phase.name, "reason": kind})
        elif phase.name == "answer":
            _add(self._tokens, row["answer_tokens"], kind=phase.token_kind)
            _add(self._seconds, row["seconds"], kind="answer")
            self._latency.observe(row["seconds"] or 0.0)
            if row["attended_share"] is not None:
                self._attended.observe(row["attended_share"])
        elif row["status"] == "built":
            _add(self._tokens, row["context_tokens"], kind=phase.token_kind)
            _add(self._bytes, row["stored_bytes"])
            for work in ("prefill", "graph", "write"):
                _add(self._seconds, row.get(f"{work}_s"), kind=work)

    def recall(self, share: float) -> None:
        """Enter a sample."""
        self._recall.observe(share)

    def left(self, phase: str, rows: int) -> None:
        """How many rows of a phase are not finished."""
        self._left.set(rows, tags={"phase": phase})


def _add(counter: Counter, value: float | None, **tags: str) -> None:
    if value:  # Ray refuses to add 0
        counter.inc(value, tags=tags)
