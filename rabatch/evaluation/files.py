"""Questions from a file in the columns that long-context test sets are published in.

`context`, `question`, `answer` (a string or a list of them), and optionally `answer_prefix`, `max_new_tokens`, `task`
and `length`. A row that is wrong becomes a question with the reason; the others go on.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from rabatch.evaluation.questions import Asked, Question
from rabatch.evaluation.scoring import Match

NO_TASK = "file"
"""Task of rows that name none."""
_LARGEST_CELL = 1 << 30
_QUESTION_ANSWERING = "qa"
"""Tasks whose names begin so are right with any of several answers, as RULER scores them."""


def file_contexts(rows: Iterable[tuple[str, dict[str, Any] | None, str | None]]) -> list[Asked]:
    """The questions of a file's rows, those of one context together, in the order in which contexts first stand.

    Args:
        rows: Where each stands, its columns, and why there are none.

    Returns:
        Contexts; questions that cannot be asked are in one with an empty text.
    """
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for number, (source, values, error) in enumerate(rows):
        text, question = _question(number, source, values or {}, error)
        document_id = question.document_id or ""
        texts.setdefault(document_id, text)
        questions.setdefault(document_id, []).append(question)
    return [Asked(document_id, text, tuple(questions[document_id])) for document_id, text in texts.items()]


def _question(number: int, source: str, values: dict[str, Any], error: str | None) -> tuple[str, Question]:
    task = values.get("task")
    known: dict[str, Any] = {"question_id": source, "document_id": None, "index": number, "length": 0}
    known["task"] = task.strip() if isinstance(task, str) and task.strip() else NO_TASK
    try:
        if error is not None:
            raise ValueError(error)
        text, asked = (_text(name, values.get(name)) for name in ("context", "question"))
        known["length"] = _number("length", values.get("length")) or 0
        answers = _answers(values.get("answer"))
        prefix = values.get("answer_prefix")
        if prefix is not None and not isinstance(prefix, str):
            raise ValueError(f"answer_prefix is a {type(prefix).__name__}; it must be a string, or left out")
        longest = _number("max_new_tokens", values.get("max_new_tokens"))
    except ValueError as problem:
        return "", Question(**known, error=str(problem))
    known["document_id"] = f"context/{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    match: Match = "part" if known["task"].startswith(_QUESTION_ANSWERING) else "all"
    own: dict[str, Any] = {"answer_prefix": prefix or "", "max_new_tokens": longest, "match": match}
    return text, Question(**known, question=asked, answers=answers, expected=answers[0], **own)


def _text(name: str, value: Any) -> str:
    if value is None:
        raise ValueError(f"column {name} is missing or null; give every row a {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a string")
    if not value.strip():
        raise ValueError(f"{name} is empty; leave the row out, or give it a {name}")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        what = f"holds bytes that are not UTF-8, or half of a surrogate pair, at character {problem.start}; repair it"
        raise ValueError(f"{name} {what}") from problem
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """One or several: a string, a list, or, as CSV has it, a list written out."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = _listed(value)
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(one, bool | list | dict) for one in found):
        raise ValueError(f"answer is {value!r:.60}; it must be a string, or a list of strings")
    return tuple(_text("answer", str(one) if isinstance(one, int | float) else one) for one in found)


def _listed(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # JSON, or as pandas writes a list: literals only, nothing is run
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return text


def _number(name: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    fix = f"{name} is {value!r:.60}; it must be a whole number from 1 on, or left out"
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0.0
        if number != number // 1 or not 1 <= number < 1 << 31:
            raise ValueError(fix)
    except (ValueError, OverflowError) as problem:
        raise ValueError(fix) from problem
    return int(number)


def csv_rows(lines: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
    """The rows of a CSV file with a header, every cell as text, as `file_contexts` takes them."""
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as problem:
                fix = f"is no CSV from line {reader.line_num} on ({problem}); mend it there"
                yield f"{name}:{number + 1}", None, fix
                return
            if cells is None:
                return
            if header is None:
                header = cells
                continue
            number += 1
            if len(cells) != len(header):
                fix = f"has {len(cells)} cells where the header has {len(header)}; mend the row"
                yield f"{name}:{number}", None, fix
            else:
                yield f"{name}:{number}", dict(zip(header, (cell or None for cell in cells), strict=True)), None
    finally:
        csv.field_size_limit(before)
