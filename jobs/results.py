"""What build and answer return: one row per document or answer, and the counts."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass, field
from typing import Any

_FAILURES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """The outcome of a build.

    Args:
        rows: One dict per row of the input, in its order; columns of `rabatch.records.BUILD_REPORT`.
        built, skipped, failed: How many rows ended so.
        tokens: Context tokens of the documents built and skipped.
        stored_bytes: Bytes of their indexes.
        kv_bytes: Bytes of the same tokens' keys and values in bf16, every layer in full.
        seconds: Wall time of the whole job.
        fingerprint: Of the indexes.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    built: int
    skipped: int
    failed: int
    tokens: int
    stored_bytes: int
    kv_bytes: int
    seconds: float
    fingerprint: str

    @property
    def exit_code(self) -> int:
        """0: every row is indexed; 1: some failed."""
        return 1 if self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the rows in full."""
        return {**dataclasses.asdict(self), "exit_code": self.exit_code}

    def summary(self) -> list[str]:
        """The last lines of the command."""
        lines = failures(self.rows, lambda row: f"{row['document_id']!r} ({row['source']})")
        size = f"{self.tokens:,} tokens, {self.stored_bytes:,} bytes stored"
        counts = f"built {self.built}, skipped {self.skipped}, failed {self.failed}"
        return [*lines, f"{counts} of {len(self.rows)} documents ({size}) in {self.seconds:.1f} s"]


@dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """The outcome of answering.

    Args:
        rows: One dict per question and document, in the order of the questions, then of document ids; columns of
            `rabatch.records.ANSWERS`.
        answered, failed: How many rows ended so.
        reused: Rows taken over from an earlier, interrupted run into the same output.
        exact_match: Share of the rows with an expected answer that gave it; None without any.
        attended_share: Mean over the answered rows; None without any.
        seconds: Wall time of the whole job.
        output: Folder of ``answers.parquet`` and ``answers.jsonl``.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    answered: int
    failed: int
    reused: int
    exact_match: float | None
    attended_share: float | None
    seconds: float
    output: str | None

    @property
    def exit_code(self) -> int:
        """0: every question is answered; 1: some failed."""
        return 1 if self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the rows in full."""
        return {**dataclasses.asdict(self), "exit_code": self.exit_code}

    def summary(self) -> list[str]:
        """The last lines of the command."""
        lines = failures(self.rows, lambda row: f"{row['question_id']!r} on {row['document_id']!r}")
        counts = f"answered {self.answered}, failed {self.failed} of {len(self.rows)} in {self.seconds:.1f} s"
        if self.reused:
            counts += f", {self.reused} of them from the earlier run"
        if self.exact_match is not None:
            counts += f"; exact match {self.exact_match:.1%}"
        return [*lines, counts]


def failures(rows: list[dict[str, Any]], name: Any) -> list[str]:
    """The first failed rows with their reasons, and how many more there are."""
    failed = [row for row in rows if row["status"] == "failed"]
    lines = [f"failed: {_shorten(name(row))}: {row['reason']}" for row in failed[:_FAILURES_SHOWN]]
    more = len(failed) - len(lines)
    return [*lines, f"failed: {more} more; every reason is in the report"] if more else lines


def _shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def count(rows: list[dict[str, Any]]) -> collections.Counter[str]:
    """How many rows have each status."""
    return collections.Counter(row["status"] for row in rows)
