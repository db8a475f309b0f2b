"""Questions about a folder that grows, answered every night: a schedule in Python.

    python examples/schedule/nightly_qa.py [FOLDER] [--nights N]

A clock that leaps to the next fire makes three nights pass in a minute or two; without `clock=` it is the real one,
and `scheduler.watch(print)` goes on for ever. The first night builds two documents and asks both; each later night
finds one more document, builds it alone, and asks only what has no answer yet.
"""

import argparse
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rabatch.demo.corpus import write_corpus
from rabatch.jobs.cron import Cron
from rabatch.jobs.run import run
from rabatch.jobs.schedule import Scheduler
from rabatch.pipeline import Pipeline
from rabatch.storage.filesystem import Folder


class LeapingClock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)

    def now(self) -> datetime:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="nightly")
    parser.add_argument("--nights", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a document")
    options = parser.parse_args()

    root = Path(options.folder)
    corpus = write_corpus(str(root / "corpus"), n_documents=options.nights + 1, tokens=options.tokens, n_questions=2)
    arriving, asked = (
        [json.loads(line) for line in Path(corpus["paths"][name]).read_text().splitlines()]
        for name in ("documents", "questions")
    )
    inbox = root / "inbox"
    inbox.mkdir(exist_ok=True)
    places = {name: str(root / name) for name in ("index", "answers", "questions.jsonl")}
    pipeline = Pipeline(
        documents=str(inbox), questions=places["questions.jsonl"], store=places["index"], answers=places["answers"]
    )

    def night(fire: datetime) -> dict:
        """What the scheduler runs; what it returns is kept in the books."""
        there = {path.stem for path in inbox.iterdir()}
        for document in arriving[len(there) : max(2, len(there) + 1)]:
            (inbox / f"{document['document_id']}.jsonl").write_text(json.dumps(document) + "\n")
            there.add(document["document_id"])
        questions = [question for question in asked if question["document_id"] in there]
        Path(pipeline.questions).write_text("".join(json.dumps(question) + "\n" for question in questions))
        result = run(pipeline, progress=False)
        new = result.answers.answered - result.answers.reused
        print(f"{fire:%d %b %H:%M} UTC: built {result.build.built}, skipped {result.build.skipped}, {new} new answers")
        return {"exit_code": result.exit_code, "built": result.build.built, "answered": new}

    clock = LeapingClock()
    cron = Cron("0 2 * * *", "Europe/Berlin")
    scheduler = Scheduler(cron, Folder(pipeline.answers), run=night, clock=clock)
    nights = 0
    while nights < options.nights:
        tick = scheduler.tick()
        nights += tick.ran is not None
        clock.sleep(tick.wait_s)
    for past in scheduler.show()["past"]:
        print(f"run {past['run']} of {past['fire']}: {past['built']} built, {past['answered']} answered")
    return 0


# Ray's workers import this module: what it does must not happen at import.
if __name__ == "__main__":
    raise SystemExit(main())
