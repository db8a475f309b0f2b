"""What becomes of a job is told here, row by row: to the terminal or log, to Ray's metrics and to the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

from rabatch.errors import ConfigError
from rabatch.jobs.metrics import Metrics
from rabatch.jobs.output import write_bytes
from rabatch.jobs.progress import Progress, showing
from rabatch.report.page import render
from rabatch.report.run import Run
from rabatch.report.statistics import Phase

Answer: TypeAlias = tuple[float, int, float | None]


class Observer:
    """Watches the phases of a run; one may watch a build and the answering after it. Its memory is bounded.

    As a context manager it writes the report at the end of the block, also when the run has failed.

    Args:
        title: Of the report.
        progress: Whether the terminal or log is told.
        report_html: Where to write the report: a path or URL that ends in ``.html``. None: nowhere.
        storage_options: Of fsspec, for the report.

    Attributes:
        told_recall: If set, is called with the number of a recipe, a document's id, and the recall of searches sampled.

    Raises:
        ConfigError: `report_html` ends otherwise.
    """

    def __init__(
        self,
        title: str = "rabatch",
        *,
        progress: bool = True,
        report_html: str | os.PathLike[str] | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self._report = None if report_html is None else os.fspath(report_html)
        if self._report is not None and not self._report.endswith((".html", ".htm")):
            raise ConfigError("report_html", report_html, "must end in .html")
        self.run = Run(title)
        self.told_recall: Callable[[int, str, Sequence[float]], None] | None = None
        self._visible, self._options = progress, storage_options
        self._metrics: Metrics | None = None
        self._phase: Phase | None = None
        self._progress: Progress | None = None
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.run.error = f"{kind.__name__ if kind else ''}: {error}"
        self.write_report()

    def write_report(self) -> None:
        """Write the report as it is now, if one is wanted."""
        if self._report is not None:
            write_bytes(self._report, render(self.run), field="report_html", storage_options=self._options)

    def begin(self, name: str, *, places: dict[str, Any], settings: dict[str, Any]) -> None:
        """A phase, ``build`` or ``answer``, once Ray is connected.

        Args:
            places: By name, paths and URLs; of other values the type is shown.
            settings: By name, objects with `to_dict`.
        """
        of_build = name == "build"
        self._phase = Phase(name, "documents" if of_build else "answers", "context" if of_build else "generated")
        self._metrics = self._metrics or Metrics()
        self.run.phases.append(self._phase)
        self.run.places |= {
            key: os.fspath(place) if isinstance(place, str | os.PathLike) else type(place).__name__
            for key, place in places.items()
            if place is not None
        }
        self.run.settings |= {key: value.to_dict() for key, value in settings.items()}

    @contextmanager
    def working(self, rows: int) -> Iterator[None]:
        """The part of a phase in which its rows are worked on.

        Args:
            rows: How many that are.
        """
        phase, metrics = self._current()
        self._began = time.monotonic()
        try:
            with showing(phase.name, phase.unit, rows, visible=self._visible and rows > 0) as self._progress:
                yield
        finally:
            phase.elapsed_s += time.monotonic() - self._began
            phase.unfinished = 0 if self._progress is None else max(0, rows - self._progress.done)
            metrics.left(phase.name, 0)
            self._progress = None

    def built(self, *, tokens: int, stored_bytes: int, seconds: dict[str, float], fingerprint: str) -> None:
        """A document is committed.

        Args:
            tokens: Of its context.
            seconds: Of work, by kind: prefill, graph, write.
        """
        phase, metrics = self._current()
        phase.finish("built", fingerprint, tokens=tokens, seconds=seconds, at_s=self._now())
        phase.stored_bytes += stored_bytes
        metrics.rows(phase, "built", tokens=tokens, seconds=seconds)
        metrics.stored(stored_bytes)
        self._advance(tokens=tokens)

    def answered(
        self,
        answers: Iterable[Answer],
        *,
        document_id: str,
        fingerprint: str,
        recall: Sequence[float] = (),
        recipe: int = 0,
    ) -> None:
        """Questions of a document are answered.

        Args:
            answers: Seconds, generated tokens and share of the keys attended of each.
            recall: Sampled while they were answered.
            recipe: Number of the recipe that they are answered with.
        """
        phase, metrics = self._current()
        for seconds, tokens, share in answers:
            work = {"answer": seconds}
            phase.finish("answered", fingerprint, tokens=tokens, seconds=work, at_s=self._now())
            phase.latency.add(seconds)
            metrics.rows(phase, "answered", tokens=tokens, seconds=work)
            metrics.answer_seconds.observe(seconds)
            if share is not None:
                phase.attended.add(share)
                metrics.attended_share.observe(share)
            self._advance(tokens=tokens)
        if recall and self.told_recall is not None:
            self.told_recall(recipe, document_id, recall)
        for share in recall:
            phase.recall.add(share)
            metrics.recall.observe(share)

    def known(self, status: str, rows: int = 1) -> None:
        """Rows that an earlier run has finished: ``skipped`` or ``reused``."""
        phase, metrics = self._current()
        phase.counts[status] += rows
        metrics.rows(phase, status, rows=rows)

    def failed(self, name: str, reason: str) -> None:
        """A row has failed; `name` says which."""
        phase, metrics = self._current()
        phase.counts["failed"] += 1
        kind = phase.failures.add(reason, name)
        metrics.rows(phase, "failed")
        metrics.failed(phase, kind)
        if self._progress is None and phase.unfinished:  # its worker died: known once all others are done
            phase.unfinished -= 1
        self._advance(failed=True)

    def _current(self) -> tuple[Phase, Metrics]:
        assert self._phase is not None
        assert self._metrics is not None
        return self._phase, self._metrics

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _advance(self, *, tokens: int = 0, failed: bool = False) -> None:
        if self._progress is not None:
            phase, metrics = self._current()
            self._progress.advance(tokens=tokens, failed=failed)
            metrics.left(phase.name, self._progress.total - self._progress.done)
