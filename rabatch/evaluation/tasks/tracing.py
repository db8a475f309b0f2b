"""Variable tracking (RULER, arXiv 2404.06654, section 3.2): a value, and the variables that it is handed along."""

from __future__ import annotations

from rabatch.evaluation.tasks import wording
from rabatch.evaluation.tasks.base import Request, Task, TaskQuestion
from rabatch.evaluation.tasks.haystack import Haystack, noise

HOPS = 4


def _chains(request: Request) -> tuple[str, tuple[TaskQuestion, ...]]:
    """A chain per question; each is in order, at random depths, in repeated text."""
    rng = request.rng
    names, values = set[str](), set[str]()
    needles: list[str] = []
    depths: list[float] = []
    chains = []
    for _ in range(request.n_questions):
        value = wording.another(wording.seven_digits, rng, values)
        variables = wording.distinct(wording.words, rng, HOPS + 1, names)
        needles += wording.states_chain(value, variables)
        depths += sorted(rng.random() for _ in variables)
        chains.append((value, variables))
    placed = Haystack(request, noise(), needles, depths)
    questions = []
    for number, (value, variables) in enumerate(chains):
        at = tuple(placed.depths[number * (HOPS + 1) : (number + 1) * (HOPS + 1)])
        asked, expected = wording.asks_chain(value, len(variables)), ", ".join(variables)
        questions.append(TaskQuestion(asked, tuple(variables), expected, max_new_tokens=64, depths=at))
    return placed.text, tuple(questions)


TRACING = (Task("vt", _chains, f"the {HOPS + 1} variables that a value is copied along, repeated text", 64),)
