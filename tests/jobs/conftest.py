"""Answers to the session's corpus, made once."""

from __future__ import annotations

import pytest
from answer_samples import files

from rabatch.config import GenerationSettings
from rabatch.jobs.answer import answer

SHORT = GenerationSettings(max_new_tokens=24)


@pytest.fixture(scope="session")
def answered(demo_store, tmp_path_factory):
    """All questions of the corpus, and some that cannot be answered; the result and its output folder."""
    output = tmp_path_factory.mktemp("answers")
    asked = [
        *demo_store.questions,
        {"question_id": "everyone", "question": "Who keeps the north tower?"},
        {"question_id": "lost", "question": "Who?", "document_id": "nowhere"},
        {"question_id": "silent", "question": "  ", "document_id": "doc-00000"},
        {"question_id": "long", "question": "number " * 50_000, "document_id": "doc-00000"},
        {"question_id": demo_store.questions[0]["question_id"], "question": "Twice?", "document_id": "doc-00000"},
        {"question": "No id?", "document_id": "doc-00002"},
    ]
    before = files(demo_store.store)
    result = answer(asked, store=demo_store.store, generation=SHORT, output=str(output), progress=False)
    assert files(demo_store.store) == before
    return result, output, asked
