"""What build and answer return: one row per document or answer, and the counts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
import ray.data

from rabatch.errors import FailedRowsError
from rabatch.evaluation.scoring import exact_match
from rabatch.records import ANSWERS, BUILD_REPORT

FAILURES_SHOWN = 5
_NAME_CHARS = 100


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

    def first_failures(self) -> list[str]:
        """A line for each of the first rows that failed."""
        rows = itertools.islice((row for row in self.rows if row["status"] == "failed"), FAILURES_SHOWN)
        return [failure(f"{row['document_id']!r} ({row['source']})", row["reason"]) for row in rows]

    def to_dataset(self) -> ray.data.Dataset:
        """The rows as a Ray dataset."""
        return ray.data.from_arrow(pa.Table.from_pylist(self.rows, BUILD_REPORT))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the rows in full."""
        return {**dataclasses.asdict(self), "exit_code": self.exit_code}

    def summary(self) -> list[str]:
        """The last lines of the command."""
        lines = failure_lines(self.first_failures(), self.failed)
        size = f"{self.tokens:,} tokens, {self.stored_bytes:,} bytes stored"
        counts = f"built {self.built}, skipped {self.skipped}, failed {self.failed}"
        return [*lines, f"{counts} of {len(self.rows)} documents ({size}) in {self.seconds:.1f} s"]


@dataclass
class Failures:
    """Counts what fails, and stops the run when it is too much.

    Args:
        what: ``documents`` or ``questions``.
        limit: How many may fail; None: all.
        told: Is called with the name and the reason of each.
    """

    what: str
    limit: int | None = None
    told: Callable[[str, str], None] | None = None
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Enter a failed row.

        Raises:
            FailedRowsError: It is one too many.
        """
        self.count += 1
        if self.told is not None:
            self.told(name, reason)
        if len(self.first) < FAILURES_SHOWN:
            self.first.append(failure(name, reason))
        if self.limit is not None and self.count > self.limit:
            fix = f"{self.count} {self.what} failed, so the run stops; what is committed stays. The first: "
            raise FailedRowsError("max_failed_rows", self.limit, fix + "; ".join(self.first))


@dataclass
class Tally:
    """Sums over answered rows."""

    answered: int = 0
    judged: int = 0
    """Rows with an expected answer, and how many of them gave it (`matched`)."""
    matched: int = 0
    shares: int = 0
    share_sum: float = 0.0

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Tally:
        """Of rows with `status`, `expected`, `answer` and `attended_share`; failed ones do not count."""
        tally = cls()
        for row in rows:
            if row["status"] == "ok":
                tally.answered += 1
                if row["expected"] is not None:
                    tally.judged += 1
                    tally.matched += exact_match(row["expected"], row["answer"])
                if row["attended_share"] is not None:
                    tally.shares += 1
                    tally.share_sum += row["attended_share"]
        return tally

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Tally:
        return cls(**json.loads(text))

    def add(self, other: Tally) -> None:
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """The outcome of answering.

    Args:
        answered, failed: How many (question, document) pairs ended so.
        reused: Pairs among `answered` that earlier runs into the same answers store had answered.
        superseded: Earlier answers in whose place newer ones of the same question and document stand now.
        exact_match: Share of the answered pairs with an expected answer that gave it, failed ones counted as wrong;
            None without any.
        attended_share: Mean over the answered pairs; None without any.
        seconds: Wall time of the whole job.
        output: Folder of ``answers.parquet`` and ``answers.jsonl``.
        run: Number of the run in the answers store; None where nothing new was stored.
    """

    answered: int
    failed: int
    reused: int
    superseded: int = 0
    exact_match: float | None
    attended_share: float | None
    seconds: float
    output: str | None
    run: int | None = None
    first_failures: tuple[str, ...] = ()
    read_rows: Callable[[], Iterator[list[dict[str, Any]]]] = field(repr=False)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per question and document, in the order of the questions, then of document ids; columns of
        `rabatch.records.ANSWERS`. Read from the answers store when first asked for, and then held."""
        return [row for rows in self.read_rows() for row in rows]

    def to_dataset(self) -> ray.data.Dataset:
        """The rows as a Ray dataset, in their order; read some thousand at a time into Ray's object store."""
        tables = (pa.Table.from_pylist(rows, ANSWERS) for rows in self.read_rows())
        references: Any = [ray.put(table) for table in tables] or [ray.put(ANSWERS.empty_table())]
        return ray.data.from_arrow_refs(references)

    @property
    def exit_code(self) -> int:
        """0: every question is answered; 1: some failed."""
        return 1 if self.failed else 0

    def counts(self) -> dict[str, Any]:
        """JSON values without the rows."""
        names = ("answered", "failed", "reused", "superseded", "exact_match", "attended_share", "seconds", "run")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the rows in full."""
        return {"rows": self.rows, **self.counts(), "output": self.output, "exit_code": self.exit_code}

    def summary(self) -> list[str]:
        """The last lines of the command."""
        counts = f"answered {self.answered}, failed {self.failed} of {self.answered + self.failed}"
        counts += f" in {self.seconds:.1f} s"
        if self.reused:
            counts += f", {self.reused} of them from earlier runs"
        if self.superseded:
            counts += f", {self.superseded} earlier answers superseded"
        if self.exact_match is not None:
            counts += f"; exact match {self.exact_match:.1%}"
        return [*failure_lines(self.first_failures, self.failed), counts]


def failure(name: str, reason: str | None) -> str:
    """A failed row in one line."""
    return f"{name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 3] + '...'}: {reason}"


def failure_lines(first: Sequence[str], n_failed: int) -> list[str]:
    """The first failures, and how many more there are."""
    lines, more = [f"failed: {text}" for text in first], n_failed - len(first)
    return [*lines, f"failed: {more} more; every reason is in the report"] if more > 0 else lines


def count(rows: list[dict[str, Any]]) -> collections.Counter[str]:
    """How many rows have each status."""
    return collections.Counter(row["status"] for row in rows)
