"""Questions about planted facts, for RULER's question answering: other facts of the same form are the distractors."""

from __future__ import annotations

from rabatch.demo.facts import Fact, make_entities, make_fact
from rabatch.evaluation.tasks.base import Request, Task, TaskQuestion
from rabatch.evaluation.tasks.haystack import Haystack, prose

_DISTRACTORS = 0.1
"""Share of the tokens that state facts that nobody asks for."""


def _facts(request: Request) -> tuple[str, tuple[TaskQuestion, ...]]:
    """Half of the questions need one sentence, half of them two."""
    rng, taken = request.rng, set[str]()
    entities = make_entities(rng, max(3, request.tokens // 200))
    kinds = ["two_hop" if number % 2 else "single" for number in range(request.n_questions)]
    asked: list[Fact] = [make_fact(rng, kind, entities, taken) for kind in kinds]
    needles = [sentence for fact in asked for sentence in fact.sentences]
    tokens = 0
    while tokens < request.tokens * _DISTRACTORS:
        fact = make_fact(rng, rng.choice(("single", "two_hop")), entities, taken)
        needles += fact.sentences
        tokens += sum(request.count_tokens(" " + sentence) for sentence in fact.sentences)
    placed = Haystack(request, prose(rng), needles, [rng.random() for _ in needles])
    questions, first = [], 0
    for fact in asked:
        depths = tuple(placed.depths[first : first + len(fact.sentences)])
        first += len(fact.sentences)
        answers = (fact.values[-1],)
        questions.append(
            TaskQuestion(fact.question, answers, fact.expected, max_new_tokens=48, match="part", depths=depths)
        )
    return placed.text, tuple(questions)


READING = (Task("qa", _facts, "a fact from one or two sentences, prose with other facts", 64),)
