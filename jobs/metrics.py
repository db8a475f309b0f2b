"""The counters of a job in Ray's metrics, from where Prometheus and Ray's dashboard read them.

The driver counts, from the rows that reach it: work that a dead actor had to repeat is counted once. Prometheus shows
each name with ``ray_`` before it and, a counter, ``_total`` after it. docs/observing.md has the list.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        self._stored = counter("stored_bytes", "Bytes of indexes committed")
        self._failures = counter("failures", "Failed documents and questions", "phase", "reason")
        self._seconds = counter("work_seconds", "Seconds of work, over all workers", "kind")
        self._left = Gauge("rabatch_rows_left", description="Documents or questions under way", tag_keys=("phase",))
        self.answer_seconds = histogram("answer_seconds", "Seconds of an answer", _SECONDS)
        self.attended_share = histogram("attended_share", "Share of a context's keys that an answer attended", _SHARES)
        self.recall = histogram("recall", "Share of the exact top-k that sampled searches found", _SHARES)

    def rows(
        self, phase: Phase, status: str, *, rows: int = 1, tokens: int = 0, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Count rows that have ended, their tokens, and the seconds of work by kind."""
        _add(self._rows[phase.name], rows, status=status)
        _add(self._tokens, tokens, kind=phase.token_kind)
        for kind, spent in (seconds or {}).items():
            _add(self._seconds, spent, kind=kind)

    def stored(self, nbytes: int) -> None:
        """Count what was committed."""
        _add(self._stored, nbytes)

    def failed(self, phase: Phase, kind: str) -> None:
        """Count a failed row by its kind, of which there are few."""
        in_ascii = kind.encode("ascii", "backslashreplace").decode()  # Ray's metrics take nothing else
        _add(self._failures, 1, phase=phase.name, reason=in_ascii)

    def left(self, phase: str, rows: int) -> None:
        """How many rows of a phase are not finished."""
        self._left.set(rows, tags={"phase": phase})


def _add(counter: Counter, value: float, **tags: str) -> None:
    if value > 0:  # Ray refuses to add 0
        counter.inc(value, tags=tags)
