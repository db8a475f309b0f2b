"""Every answer of an evaluation as a row, with what was asked and what it scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from rabatch.evaluation.questions import Question
from rabatch.evaluation.scoring import string_match

PREDICTIONS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),  # as asked for, in tokens; 0: a file that does not say
        pa.field("index", pa.int64(), nullable=False),  # of the context in its cell, or of the file's row
        pa.field("recipe", pa.string(), nullable=False),  # its name in the evaluation
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("document_id", pa.string()),
        pa.field("question", pa.string()),
        pa.field("answer_prefix", pa.string()),
        pa.field("expected", pa.string()),
        pa.field("answers", pa.list_(pa.string())),  # what a right answer holds
        pa.field("match", pa.string()),  # all | part
        pa.field("answer", pa.string()),
        pa.field("score", pa.float64()),  # in [0, 1]; 0 of a failed question; null: it could not be asked at all
        pa.field("depths", pa.list_(pa.float64())),  # of what is needed, in the context: 0 its start, 1 its end
        pa.field("status", pa.string(), nullable=False),  # ok | failed
        pa.field("reason", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("context_tokens", pa.int64()),
        pa.field("question_tokens", pa.int64()),
        pa.field("answer_tokens", pa.int64()),
        pa.field("attended_share", pa.float64()),
        pa.field("mass_share", pa.float64()),
        pa.field("seconds", pa.float64()),
        pa.field("fingerprint", pa.string()),
    ]
)
_OF_ANSWERS = (
    *("answer", "status", "reason", "finish_reason", "context_tokens", "question_tokens", "answer_tokens"),
    *("attended_share", "mass_share", "seconds", "fingerprint"),
)


def prediction(recipe: str, question: Question, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `PREDICTIONS`.

    Args:
        recipe: Its name.
        answer: The row that `rabatch.jobs.answer` gave; of `records.ANSWERS`.
    """
    row = _asked(recipe, question) | {name: answer[name] for name in _OF_ANSWERS}
    text = row["answer"] if row["status"] == "ok" else None
    return row | {"score": string_match(question.answers, text, question.match)}


def refused(recipe: str, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    """Rows of the questions that could not be asked."""
    for question in questions:
        none = dict.fromkeys((*_OF_ANSWERS, "score"))
        yield _asked(recipe, question) | none | {"status": "failed", "reason": question.error}


def _asked(recipe: str, question: Question) -> dict[str, Any]:
    return {
        "task": question.task,
        "length": question.length,
        "index": question.index,
        "recipe": recipe,
        "question_id": question.question_id,
        "document_id": question.document_id,
        "question": question.question,
        "answer_prefix": question.answer_prefix,
        "expected": question.expected,
        "answers": list(question.answers),
        "match": question.match,
        "depths": list(question.depths),
    }
