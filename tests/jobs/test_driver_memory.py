"""What the driver holds must not grow with the corpus: no text, no manifests, no answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import rabatch
from rabatch.config import BuildConfig, GenerationSettings

DOCUMENTS, QUESTIONS = 1000, 10
MOST_BYTES = 200 << 20


class Peak:
    """The largest resident memory of this process inside a block, in bytes."""

    def __enter__(self):
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.is_set():
            self.bytes = max(self.bytes, resident())
            time.sleep(0.2)


def resident():
    # Shared memory is Ray's object store, which has a bound of its own.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssFile"].split()[0])) * 1024


def run(folder, documents, questions):
    pipeline = rabatch.Pipeline(
        documents=[
            {"document_id": f"d{n}", "text": f"Lamp {n} is kept in tower {n % 7}. It is blue and has a number."}
            for n in range(documents)
        ],
        questions=[
            {"question_id": f"q{n}-{m}", "question": f"Where is lamp {m}?", "document_id": f"d{n}"}
            for n in range(documents)
            for m in range(questions)
        ],
        store=folder / "index",
        answers=folder / "answers",
        build=BuildConfig(sink_tokens=2, window_tokens=4),
        generation=GenerationSettings(max_new_tokens=1),
    )
    return rabatch.run(pipeline, progress=False)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_documents_take_no_more_of_the_driver_than_two(local_ray, tmp_path):
    run(tmp_path / "two", 2, QUESTIONS)  # what is loaded and compiled once
    before = resident()
    with Peak() as peak:
        result = run(tmp_path / "many", DOCUMENTS, QUESTIONS)
    assert (result.build.built, result.answers.answered, result.exit_code) == (DOCUMENTS, DOCUMENTS * QUESTIONS, 0)
    assert peak.bytes - before < MOST_BYTES, f"{before} bytes before, {peak.bytes} at most"
    again = run(tmp_path / "many", DOCUMENTS, QUESTIONS)
    assert (again.build.skipped, again.answers.reused, again.answers.run) == (DOCUMENTS, DOCUMENTS * QUESTIONS, None)
