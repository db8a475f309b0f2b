"""Answering questions over one stored context, many at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from rabatch.attention.evidence import spans
from rabatch.config import GenerationSettings, Recipe
from rabatch.contexts import OpenContext
from rabatch.costs import chosen
from rabatch.errors import QuestionError, RabatchError, StoreError
from rabatch.executor import Answered, Executor
from rabatch.generation import Course, Generation

_log = logging.getLogger(__name__)
Row = dict[str, Any]


def answer_batch(
    context: OpenContext,
    questions: Sequence[Row],
    recipe: Recipe,
    generation: GenerationSettings,
    *,
    slots: int = 0,
) -> list[Row]:
    """What `answer_each` gives, in the order of the questions."""
    rows = dict(answer_each(context, questions, recipe, generation, slots=slots))
    return [rows[number] for number in range(len(questions))]


def answer_each(
    context: OpenContext,
    questions: Sequence[Row],
    recipe: Recipe,
    generation: GenerationSettings,
    *,
    slots: int = 0,
) -> Iterator[tuple[int, Row]]:
    """Answer questions over one context; each as soon as its answer has ended.

    A question that cannot be answered becomes a row with status "failed" and a reason. If a pass fails, the questions
    that have no answer yet are asked again in halves, so that the one at fault ends alone; if the index can no longer
    be read, all of them fail.

    Args:
        questions: Rows with question_id, question and, optionally, expected, answer_prefix and max_new_tokens.
        slots: Questions under way at the same time; as one ends, the next begins. More where the context is read anew
            for every pass: `OpenContext.slots`. 0: all of them.

    Yields:
        (number of the question, row with the fields of `records.ANSWERS`).
    """
    made = Generation(context.loaded, generation, context.token_ids)
    ready: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        try:
            ready[number] = _encode(context, question, generation)
        except RabatchError as error:
            yield number, _failed(context, question, recipe, str(error))
    groups = [list(ready)] if ready else []
    most = context.slots(slots) or len(ready)
    try:
        recipe = chosen(context, recipe, questions=min(most, len(ready))) if ready else recipe
    except StoreError as error:
        yield from _lost(context, questions, list(ready), recipe, error)
        return
    while groups:
        group = groups.pop(0)
        executor = Executor(context, recipe, made, slots=min(most, len(group)))
        courses = [_course(made, ready[number], questions[number]) for number in group]
        answers, number_of = executor.run(courses), tuple(group)
        while group:
            try:
                answered = next(answers)
            except StoreError as error:
                left = [number for numbers in (group, *groups) for number in numbers]
                yield from _lost(context, questions, left, recipe, error)
                return
            except Exception as error:  # noqa: BLE001 - one question must not fail the others, whatever it does
                if len(group) > 1:
                    _log.warning("a pass over %d questions failed (%s); asking in halves", len(group), error)
                    half = len(group) // 2
                    groups = [group[:half], group[half:], *groups]
                else:
                    question = questions[group[0]]
                    _log.exception("question %s failed", question.get("question_id"))
                    yield group[0], _failed(context, question, recipe, f"{type(error).__name__}: {error}")
                break
            number = number_of[answered.number]
            group.remove(number)
            yield number, _answered(context, questions[number], recipe, made, answered)


def _lost(
    context: OpenContext, questions: Sequence[Row], numbers: list[int], recipe: Recipe, error: StoreError
) -> Iterator[tuple[int, Row]]:
    """Rows of the questions that had no answer when the index could no longer be read."""
    _log.warning("the index of %r cannot be read any more: %s", context.manifest.document_id, error)
    for number in numbers:
        yield number, _failed(context, questions[number], recipe, str(error))


def _answered(context: OpenContext, question: Row, recipe: Recipe, made: Generation, answered: Answered) -> Row:
    course: Course = answered.course
    text, n_tokens = made.text(course)
    return _row(context, question, recipe) | {
        "status": "ok",
        "answer": text,
        "finish_reason": course.done,
        "evidence": spans(answered.seen.mass, context.tokens.char_start, context.tokens.char_end),
        "question_tokens": course.question_tokens,
        "answer_tokens": n_tokens,
        "attended_share": answered.seen.attended_share,
        "mass_share": answered.seen.mass_share,
        "seconds": answered.seconds,
    }


def _course(made: Generation, tail: list[int], question: Row) -> Course:
    return made.begin(tail, question.get("question_id"), max_new_tokens=question.get("max_new_tokens"))


def _encode(context: OpenContext, question: Row, generation: GenerationSettings) -> list[int]:
    text = question.get("question")
    if not isinstance(text, str):
        raise QuestionError("question", text, "is missing; every question needs a text")
    prefix = question.get("answer_prefix") or ""
    ids = context.loaded.template.encode_question(context.loaded.tokenizer, text, prefix)
    longest = question.get("max_new_tokens") or generation.max_new_tokens
    room = context.loaded.max_context_tokens - len(context.token_ids) - longest
    if len(ids) > room:
        raise QuestionError(
            "question",
            text,
            f"has {len(ids)} tokens, the model has room for {max(room, 0)} beside document and answer; shorten it",
        )
    return ids


def _row(context: OpenContext, question: Row, recipe: Recipe) -> Row:
    return {
        "question_id": question.get("question_id"),
        "document_id": context.manifest.document_id,
        "question": question.get("question"),
        "expected": question.get("expected"),
        "status": "failed",
        "reason": None,
        "answer": None,
        "finish_reason": None,
        "evidence": [],
        "context_tokens": context.manifest.context_tokens,
        "question_tokens": None,
        "answer_tokens": None,
        "attended_share": None,
        "mass_share": None,
        "seconds": None,
        "recipe": recipe.method,
        "model": context.loaded.config.name,
        "fingerprint": context.manifest.fingerprint,
    }


def _failed(context: OpenContext, question: Row, recipe: Recipe, reason: str) -> Row:
    return _row(context, question, recipe) | {"reason": reason}
