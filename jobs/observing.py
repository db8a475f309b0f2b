"""What becomes of a job is told here, row by row: to the terminal or log, to Ray's metrics and to the report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rabatch.errors import ConfigError
from rabatch.jobs.metrics import Metrics
from rabatch.jobs.output import write_bytes
from rabatch.jobs.progress import Progress, showing
from rabatch.report.page import render
from rabatch.report.run import Run
from rabatch.report.statistics import Phase

Row = dict[str, Any]


class Observer:
    """Watches the phases of a run; one may watch a build and the answering after it. Its memory is bounded.

    Args:
        title: Of the report.
        progress: Whether the terminal or log is told.
        report_html: Where `close` writes the report: a path or URL that ends in ``.html``. None: nowhere.
        storage_options: Of fsspec, for the report.

    Raises:
        ConfigError: `report_html` ends otherwise.
    """

    def __init__(
        self,
        title: str,
        *,
        progress: bool = True,
        report_html: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if report_html is not None and not report_html.endswith((".html", ".htm")):
            raise ConfigError("report_html", report_html, "must end in .html")
        self.run = Run(title)
        self._visible = progress
        self._report, self._options = report_html, storage_options
        self._metrics: Metrics | None = None
        self._phase: Phase | None = None
        self._progress: Progress | None = None
        self._began = 0.0

    def about(self, *, places: dict[str, Any], **settings: Any) -> None:
        """What the report says about the job.

        Args:
            places: By name, paths and URLs; of other values the type is shown.
            settings: Objects with `to_dict`.
        """
        for name, place in places.items():
            if place is not None:
                self.run.places[name] = str(place) if hasattr(place, "__fspath__") or isinstance(place, str) else type(place).__name__
        self.run.settings |= {name: value.to_dict() for name, value in settings.items() if value is not None}

    @contextmanager
    def phase(self, name: str, *, known: int, total: int) -> Iterator[None]:
        """A phase, ``build`` or ``answer``, once Ray is connected.

        Args:
            known: Rows that had ended before it, as faulty or as finished by an earlier run.
            total: Rows to be done.
        """
        of_build = name == "build"
        phase = Phase(name, "documents" if of_build else "answers", "context" if of_build else "generated")
        phase.total = known + total
        self.run.phases.append(phase)
        self._metrics = self._metrics or Metrics()
        self._phase, self._began = phase, time.monotonic()
        try:
            with showing(name, phase.unit, total, visible=self._visible) as self._progress:
                yield
        finally:
            phase.elapsed_s = time.monotonic() - self._began
            self._metrics.left(name, 0)
            self._progress = None

    def document(self, row: Row) -> None:
        """A document has ended: a row of `rabatch.records.BUILD_REPORT`, perhaps with `write_s`."""
        self._enter(row, row["context_tokens"])

    def answers(self, rows: Iterable[Row], *, recall: Iterable[float] = ()) -> None:
        """Questions have ended: rows of `rabatch.records.ANSWERS`.

        Args:
            recall: Sampled while they were answered.
        """
        for row in rows:
            self._enter(row, row["answer_tokens"] or 0)
        assert self._phase is not None and self._metrics is not None
        for share in recall:
            self._phase.recall.add(share)
            self._metrics.recall(share)

    def reused(self, rows: int) -> None:
        """So many questions had been answered by an earlier run."""
        assert self._phase is not None
        self._phase.counts["reused"] += rows

    def _enter(self, row: Row, tokens: int) -> None:
        phase, metrics, progress = self._phase, self._metrics, self._progress
        assert phase is not None and metrics is not None
        enter = phase.document if phase.name == "build" else phase.answer
        at_s = None if progress is None else time.monotonic() - self._began
        kind = enter(row, at_s=at_s)
        metrics.row(phase, row, kind=kind)
        if progress is not None:
            progress.advance(tokens=tokens, failed=kind is not None)
            metrics.left(phase.name, progress.total - progress.done)

    def close(self) -> None:
        """Write the report, if one is wanted."""
        if self._report is not None:
            write_bytes(self._report, render(self.run), field="report_html", storage_options=self._options)
