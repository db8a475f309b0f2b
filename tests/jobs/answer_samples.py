"""A small answers store, without a model; the files of a folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerStore, Run
from rabatch.storage.manifest import utc_now


def files(folder: str | Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by path."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def answer_rows(texts: dict[tuple[str, str], str]) -> pa.Table:
    """Rows with the given answers, by (question, document)."""
    made = []
    for (question_id, document_id), text in texts.items():
        values = dict.fromkeys(STORED_ANSWERS.names)
        values |= {"question_id": question_id, "document_id": document_id, "status": "ok", "answer": text}
        values |= {"evidence": [{"start": 0, "end": 3, "score": 0.5}], "answer_key": f"{question_id}{text}"}
        made.append(values)
    return pa.Table.from_pylist(made, STORED_ANSWERS)


def fill(url: str) -> AnswerStore:
    """Two runs, the second of which answers one question anew."""
    store = AnswerStore(url, create=True)
    for number, texts in enumerate([{("q0", "a"): "old", ("q1", "a"): 'line\n2, "quoted"'}, {("q0", "a"): "new"}], 1):
        attempt = store.new_attempt()
        part = store.put(answer_rows(texts), attempt=attempt, number=0)
        about = {"number": number, "created_at": utc_now(), "attempt": attempt, "definition_sha256": "d"}
        assert store.commit(Run(**about, parts=(part,)))
    return store
