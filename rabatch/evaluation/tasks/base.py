"""What a task makes: contexts, each with questions and the strings that right answers hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from rabatch.evaluation.scoring import Match

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """One question about a context.

    Attributes:
        question: The question's text.
        answers: The strings that a right answer holds.
        expected: One whole right answer.
        answer_prefix: What the answer begins with; given to the model after the prompt.
        max_new_tokens: Room for the answer.
        match: ``"all"``: the score is the share of `answers` found; ``"part"``: one of them is enough.
        depths: Where in the context the sentences needed stand, 0 its start and 1 its end.
    """

    question: str
    answers: tuple[str, ...]
    expected: str
    answer_prefix: str = ""
    max_new_tokens: int = 64
    match: Match = "all"
    depths: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskContext:
    """A context of about `length` tokens, the `index`-th of its task and length, and what is asked of it."""

    task: str
    length: int
    index: int
    text: str
    questions: tuple[TaskQuestion, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What a task is asked to make.

    Attributes:
        rng: Where every choice comes from.
        tokens: Length of the context, at least and with little more than a sentence over it.
        index: Number of the context; the depth grid goes by it.
        n_questions: Wanted; a task may make fewer.
        count_tokens: Of a text, by the tokenizer of the model.
    """

    rng: Random
    tokens: int
    index: int
    n_questions: int
    count_tokens: CountTokens


@dataclass(frozen=True, slots=True)
class Task:
    """A task by name.

    Attributes:
        make: The context's text and its questions.
        about: One line for people.
        most_questions: Questions that a context of it can have, at most.
    """

    name: str
    make: Callable[[Request], tuple[str, tuple[TaskQuestion, ...]]]
    about: str
    most_questions: int
