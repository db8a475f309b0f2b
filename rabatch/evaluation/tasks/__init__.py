"""Tasks of long contexts, made by rule at any length: RULER's, InfiniteBench's key-value retrieval, a grid of depths.

Everything is a function of task, tokens, index and seed (and of the tokenizer, which says when a context is long
enough).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rabatch.demo.corpus import count_tokens as demo_tokens
from rabatch.errors import ConfigError
from rabatch.evaluation.tasks.base import CountTokens, Request, Task, TaskContext, TaskQuestion
from rabatch.evaluation.tasks.counting import COUNTING
from rabatch.evaluation.tasks.needles import NEEDLES
from rabatch.evaluation.tasks.reading import READING
from rabatch.evaluation.tasks.tracing import TRACING

__all__ = ["TASKS", "Task", "TaskContext", "TaskQuestion", "generate"]

TASKS: Mapping[str, Task] = {task.name: task for task in (*NEEDLES, *TRACING, *COUNTING, *READING)}
_LEAST_TOKENS = 256


def generate(
    task: str,
    *,
    tokens: int,
    index: int,
    seed: int = 0,
    n_questions: int = 1,
    count_tokens: CountTokens | None = None,
) -> TaskContext:
    """The `index`-th context of a task.

    Args:
        task: A name in `TASKS`.
        tokens: Of the context: at least as many, and hardly more, by `count_tokens`.
        index: Contexts of one task, length and seed differ by it.
        n_questions: Wanted about one context. Where a task asks for one thing, the context then holds several of it,
            each a distractor of the others; tasks that are defined by there being one make one
            (`Task.most_questions`).
        count_tokens: Of a text, by the tokenizer of the model, without special tokens. None: the demo model's.

    Raises:
        ConfigError: There is no such task, or a number is out of range.
    """
    if task not in TASKS:
        raise ConfigError("task", task, f"there is no such task; choose of {', '.join(TASKS)}")
    if tokens < _LEAST_TOKENS:
        raise ConfigError("tokens", tokens, f"contexts have at least {_LEAST_TOKENS} tokens")
    if n_questions < 1:
        raise ConfigError("n_questions", n_questions, "ask at least one question")
    wanted = min(n_questions, TASKS[task].most_questions)
    rng = Random(f"rabatch-tasks/{seed}/{task}/{tokens}/{index}/{wanted}")
    text, questions = TASKS[task].make(Request(rng, tokens, index, wanted, count_tokens or demo_tokens))
    return TaskContext(task, tokens, index, text, questions)
