"""What an evaluation asks: contexts as documents with ids that say what they are, and the questions about each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rabatch.errors import ConfigError
from rabatch.evaluation.scoring import Match
from rabatch.evaluation.tasks import TASKS, generate
from rabatch.evaluation.tasks.base import CountTokens


@dataclass(frozen=True, slots=True)
class Question:
    """One question of an evaluation.

    Attributes:
        index: Number of its context in the cell of task and length; of a file's questions, of its row.
        length: In tokens, as asked for; 0 where a file does not say.
        answers, expected, match, depths: As of `TaskQuestion`.
        error: Why it cannot be asked; then `document_id` may be None and `answers` empty.
    """

    question_id: str
    document_id: str | None
    task: str
    length: int
    index: int
    question: str = ""
    answers: tuple[str, ...] = ()
    expected: str = ""
    answer_prefix: str = ""
    max_new_tokens: int | None = None
    match: Match = "all"
    depths: tuple[float, ...] = ()
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """As `rabatch.jobs.answer` takes it."""
        return {
            "question_id": self.question_id,
            "document_id": self.document_id,
            "question": self.question,
            "expected": self.expected,
            "answer_prefix": self.answer_prefix,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """A context and what is asked of it."""

    document_id: str
    text: str
    questions: tuple[Question, ...]


def task_contexts(
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    samples: int,
    questions_per_context: int,
    seed: int = 0,
    count_tokens: CountTokens | None = None,
) -> Iterator[Asked]:
    """The contexts of all tasks and lengths, each with its questions.

    Args:
        samples: Questions of a task and length.
        questions_per_context: Of one context, where the task has as many to ask.
        count_tokens: As of `rabatch.evaluation.tasks.generate`.

    Raises:
        ConfigError: There is no such task, it stands twice, or a number is out of range.
    """
    for name, values in (("tasks", tasks), ("lengths", lengths)):
        if not values:
            raise ConfigError(name, list(values), "give at least one")
        for value in values:
            if list(values).count(value) > 1:
                raise ConfigError(name, value, "stands twice; leave one out")
    for name, number in (("samples", samples), ("questions_per_context", questions_per_context)):
        if type(number) is not int or number < 1:
            raise ConfigError(name, number, "must be a whole number from 1 on")
    for task in tasks:
        if task not in TASKS:
            raise ConfigError("tasks", task, f"there is no such task; choose of {', '.join(TASKS)}")
    return _contexts(tasks, lengths, samples, questions_per_context, seed, count_tokens)


def _contexts(
    tasks: Sequence[str], lengths: Sequence[int], samples: int, wanted: int, seed: int, count_tokens: CountTokens | None
) -> Iterator[Asked]:
    for task in tasks:
        each = min(wanted, TASKS[task].most_questions)
        for length in lengths:
            about: dict[str, Any] = {"tokens": length, "seed": seed, "n_questions": each, "count_tokens": count_tokens}
            for index in range(math.ceil(samples / each)):
                made = generate(task, index=index, **about)
                document_id = f"{task}/{length}/seed-{seed}/{index:05d}"
                questions = tuple(
                    Question(
                        question_id=f"{document_id}/{number}",
                        document_id=document_id,
                        task=task,
                        length=length,
                        index=index,
                        question=asked.question,
                        answers=asked.answers,
                        expected=asked.expected,
                        answer_prefix=asked.answer_prefix,
                        max_new_tokens=asked.max_new_tokens,
                        match=asked.match,
                        depths=asked.depths,
                    )
                    for number, asked in enumerate(made.questions[: samples - index * each])
                )
                yield Asked(document_id, made.text, questions)
