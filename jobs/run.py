"""Run: a pipeline, build and answer, incrementally.

Only documents that are new or changed are built, and only questions without an answer are asked. Killed at any point
and run again, it goes on.

    python -m rabatch.jobs.run pipeline.yaml
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rabatch.jobs import cluster
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.observing import Observer
from rabatch.jobs.results import AnswerResult, BuildResult
from rabatch.jobs.sources import JSONL, PARQUET, list_units
from rabatch.pipeline import Pipeline
from rabatch.storage.answers import AnswerStore


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a pipeline's run.

    Args:
        build, answers: Of the two steps.
        location: URL of the answers store.
        seconds: Wall time of the whole.
    """

    build: BuildResult
    answers: AnswerResult
    location: str
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: every document is built and every question answered; 1: some failed."""
        return self.build.exit_code or self.answers.exit_code

    def to_dict(self) -> dict[str, Any]:
        """JSON values: counts and the first failures. The rows are in the answers store (`rabatch answers`)."""
        build, answers = self.build, self.answers
        names = ("built", "skipped", "failed", "tokens", "stored_bytes", "kv_bytes", "seconds", "fingerprint")
        return {
            "build": {**{name: getattr(build, name) for name in names}, "failures": build.first_failures()},
            "answers": {**answers.counts(), "failures": list(answers.first_failures)},
            "location": self.location,
            "seconds": self.seconds,
            "exit_code": self.exit_code,
        }

    def summary(self) -> list[str]:
        """The last lines of the command."""
        stored = f"run {self.answers.run} of {self.location}" if self.answers.run else f"nothing new in {self.location}"
        return [*self.build.summary(), *self.answers.summary(), f"{stored}; in all {self.seconds:.1f} s"]


def run(
    pipeline: Pipeline, *, address: str | None = None, progress: bool = True, observer: Observer | None = None
) -> RunResult:
    """Build the pipeline's new and changed documents, ask what has no answer yet, and commit the answers as one run.

    A question without a document is asked of every document of the pipeline. A document that could not be built is not
    asked, not even of an earlier text.

    Args:
        address: Of a Ray cluster. None: an embedded Ray.
        progress: Bars on stderr, or lines now and then where that is no terminal.
        observer: Is told what becomes of each document and question. None: one of this call's own, with `progress`.

    Raises:
        FailedRowsError: More than `max_failed_rows` documents or questions failed. What is committed stays.
        RabatchError: The job as a whole cannot run.
    """
    began = time.perf_counter()
    options = pipeline.storage_options
    # What cannot be read or written must fail now, not after hours of building.
    location = cluster.worker_url(pipeline.answers, "answers")
    AnswerStore(location, create=True, storage_options=options)
    cluster.connect(address)
    list_units(pipeline.questions, field="questions", storage_options=options, suffixes=JSONL + PARQUET)
    shared: dict[str, Any] = {
        "store": pipeline.store,
        "model": pipeline.model,
        "resources": pipeline.resources,
        "address": address,
        "storage_options": options,
        "max_failed_rows": pipeline.max_failed_rows,
        "observer": observer or Observer(progress=progress),
    }
    built = build(pipeline.documents, config=pipeline.build, **shared)
    answered = answer(
        pipeline.questions,
        recipe=pipeline.recipe,
        generation=pipeline.generation,
        output=location,
        export=False,
        fingerprint=built.fingerprint,
        documents=may_be_asked(built),
        definition_sha256=pipeline.digest if _is_written_down(pipeline) else None,
        **shared,
    )
    return RunResult(build=built, answers=answered, location=location, seconds=time.perf_counter() - began)


def may_be_asked(built: BuildResult) -> dict[str, str | None]:
    """The documents of a build, and why some cannot be asked."""
    documents: dict[str, str | None] = {}
    for row in built.rows:
        if row["status"] != "failed":
            documents[row["document_id"]] = None
        else:
            documents.setdefault(row["document_id"], f"its document was not built: {row['reason']}")
    return documents


def _is_written_down(pipeline: Pipeline) -> bool:
    return isinstance(pipeline.documents, str) and isinstance(pipeline.questions, str)


if __name__ == "__main__":
    from rabatch.jobs.command import main

    sys.exit(main("run"))
