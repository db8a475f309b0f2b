"""Needles in haystacks (RULER, arXiv 2404.06654, section 3.1), a grid of depths, and pairs as InfiniteBench has them.

The tasks are RULER's: how many keys, values and questions there are, of which kind, and in which haystack. The wording
is rabatch's own. The several values of a key are numbered, and what is asked for is said in the order of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from rabatch.evaluation.tasks import wording
from rabatch.evaluation.tasks.base import Request, Task, TaskQuestion
from rabatch.evaluation.tasks.haystack import Haystack, noise, only, prose

Make = Callable[[Random], str]
Made = tuple[str, tuple[TaskQuestion, ...]]
DEPTHS = 11
"""Of the grid: 0, 0.1, ..., 1."""
SEVERAL = 4
"""Keys, values and queries where RULER has several."""
_MANY = 64


def _single(haystack: Callable[[Random], Iterator[str]], value: Make, n_keys: int = 1) -> Callable[[Request], Made]:
    def make(request: Request) -> Made:
        rng = request.rng
        keys = wording.distinct(wording.words, rng, n_keys, set())
        values = wording.distinct(value, rng, n_keys, set())
        needles = [wording.states(*pair) for pair in zip(keys, values, strict=True)]
        placed = Haystack(request, haystack(rng), needles, [rng.random() for _ in needles])
        asked = rng.sample(range(n_keys), min(n_keys, request.n_questions))
        return placed.text, tuple(_question(keys[n], values[n], placed.depths[n]) for n in asked)

    return make


def _depth(request: Request) -> Made:
    rng = request.rng
    key, value = wording.words(rng), wording.seven_digits(rng)
    depth = request.index % DEPTHS / (DEPTHS - 1)
    placed = Haystack(request, prose(rng), [wording.states(key, value)], [depth])
    return placed.text, (_question(key, value, depth),)


def _haystack_of_needles(kind: Make, value: Make) -> Callable[[Request], Made]:
    def make(request: Request) -> Made:
        rng, keys, values = request.rng, set[str](), set[str]()
        pairs: list[tuple[str, str]] = []

        def needle() -> str:
            pairs.append((wording.another(kind, rng, keys), wording.another(value, rng, values)))
            return wording.states(*pairs[-1])

        needles = only(request, needle, request.n_questions)
        asked = rng.sample(range(len(needles)), request.n_questions)
        return " ".join(needles), tuple(_question(*pairs[n], n / len(needles)) for n in asked)

    return make


def _multivalue(request: Request) -> Made:
    rng = request.rng
    keys = wording.distinct(wording.words, rng, request.n_questions, set())
    values = [wording.distinct(wording.seven_digits, rng, SEVERAL, set()) for _ in keys]
    needles = [s for key, some in zip(keys, values, strict=True) for s in wording.states_several(key, some)]
    placed = Haystack(request, prose(rng), needles, [rng.random() for _ in needles])
    questions = []
    for number, (key, some) in enumerate(zip(keys, values, strict=True)):
        depths = tuple(placed.depths[number * SEVERAL : (number + 1) * SEVERAL])
        asked, expected = wording.asks_several(key, SEVERAL), wording.answers_several(key, some)
        questions.append(TaskQuestion(asked, tuple(some), expected, max_new_tokens=128, depths=depths))
    return placed.text, tuple(questions)


def _multiquery(request: Request) -> Made:
    rng = request.rng
    n_keys = SEVERAL * request.n_questions
    keys = wording.distinct(wording.words, rng, n_keys, set())
    values = wording.distinct(wording.seven_digits, rng, n_keys, set())
    needles = [wording.states(*pair) for pair in zip(keys, values, strict=True)]
    placed = Haystack(request, prose(rng), needles, [rng.random() for _ in needles])
    questions = []
    for first in range(0, n_keys, SEVERAL):
        some = slice(first, first + SEVERAL)
        expected = wording.answers_keys(keys[some], values[some])
        asked, depths = wording.asks_keys(keys[some]), tuple(placed.depths[some])
        questions.append(TaskQuestion(asked, tuple(values[some]), expected, max_new_tokens=128, depths=depths))
    return placed.text, tuple(questions)


def _pairs(request: Request) -> Made:
    rng, keys = request.rng, set[str]()
    pairs: list[tuple[str, str]] = []

    def entry() -> str:
        pairs.append((wording.another(wording.uuid, rng, keys), wording.uuid(rng)))
        return f'"{pairs[-1][0]}": "{pairs[-1][1]}",'

    entries = only(request, entry, request.n_questions)
    asked = rng.sample(range(len(entries)), request.n_questions)
    text = "{" + " ".join(entries).removesuffix(",") + "}"
    return text, tuple(_question(*pairs[n], n / len(entries)) for n in asked)


def _question(key: str, value: str, depth: float) -> TaskQuestion:
    return TaskQuestion(wording.asks(key), (value,), value, max_new_tokens=48, depths=(depth,))


def _of_noise(rng: Random) -> Iterator[str]:
    return noise()


NEEDLES = (
    Task("niah_single_1", _single(_of_noise, wording.seven_digits), "one key of words, a number, repeated text", 1),
    Task("niah_single_2", _single(prose, wording.seven_digits), "one key of words, a number, prose", 1),
    Task("niah_single_3", _single(prose, wording.uuid), "one key of words, a UUID, prose", 1),
    Task(
        "niah_multikey_1", _single(prose, wording.seven_digits, SEVERAL), "one of four keys of words, prose", SEVERAL
    ),
    Task(
        "niah_multikey_2", _haystack_of_needles(wording.words, wording.seven_digits),
        "one key of words among nothing but needles", _MANY,
    ),
    Task(
        "niah_multikey_3", _haystack_of_needles(wording.uuid, wording.uuid),
        "one UUID by another among nothing but needles", _MANY,
    ),
    Task("niah_multivalue", _multivalue, "four values of one key, prose", _MANY),
    Task("niah_multiquery", _multiquery, "four keys in one question, prose", _MANY),
    Task("niah_depth", _depth, f"niah_single_2 at {DEPTHS} depths in turn", 1),
    Task("kv_retrieval", _pairs, "one value of a JSON object of UUIDs (InfiniteBench Retr.KV)", _MANY),
)  # fmt: skip
