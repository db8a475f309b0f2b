"""Training sequences of the evaluation's tasks: needles of several kinds in one document, and questions about many."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from rabatch.demo.corpus import ANSWER_TEMPLATE, QUESTION_TEMPLATE
from rabatch.evaluation.tasks import wording
from rabatch.evaluation.tasks.base import Request
from rabatch.evaluation.tasks.haystack import Haystack, noise, prose
from rabatch.evaluation.tasks.needles import SEVERAL
from rabatch.evaluation.tasks.tracing import HOPS

Taken = set[str]


@dataclass(frozen=True, slots=True)
class Item:
    """Sentences of a document, questions about them with their answers; `in_order`: the sentences keep their order."""

    needles: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    in_order: bool = False


def _pair(key: Callable[[Random], str], value: Callable[[Random], str]) -> Callable[[Random, Taken], Item]:
    def make(rng: Random, taken: Taken) -> Item:
        k = wording.another(key, rng, taken)
        v = value(rng)
        return Item((wording.states(k, v),), ((wording.asks(k), v),))

    return make


def _json_pair(rng: Random, taken: Taken) -> Item:
    key = wording.another(wording.uuid, rng, taken)
    value = wording.uuid(rng)
    return Item((f'"{key}": "{value}",',), ((wording.asks(key), value),))


def _several(rng: Random, taken: Taken) -> Item:
    key = wording.another(wording.words, rng, taken)
    n = rng.choice((2, 3, SEVERAL, SEVERAL, SEVERAL))
    values = wording.distinct(wording.seven_digits, rng, n, set())
    asked = wording.asks_several(key, n), wording.answers_several(key, values)
    return Item(tuple(wording.states_several(key, values)), (asked,))


def _keys(rng: Random, taken: Taken) -> Item:
    keys = wording.distinct(wording.words, rng, rng.choice((2, 3, SEVERAL)), taken)
    values = [wording.seven_digits(rng) for _ in keys]
    needles = tuple(wording.states(*pair) for pair in zip(keys, values, strict=True))
    return Item(needles, ((wording.asks_keys(keys), wording.answers_keys(keys, values)),))


def _chain(rng: Random, taken: Taken) -> Item:
    value = wording.another(wording.seven_digits, rng, taken)
    variables = wording.distinct(wording.words, rng, rng.choice((2, 3, HOPS, HOPS + 1, HOPS + 1)), taken)
    asked = wording.asks_chain(value, len(variables)), ", ".join(variables)
    return Item(tuple(wording.states_chain(value, variables)), (asked,), in_order=rng.random() < 0.7)


ITEMS: dict[str, Callable[[Random, Taken], Item]] = {
    "words_number": _pair(wording.words, wording.seven_digits),
    "words_uuid": _pair(wording.words, wording.uuid),
    "uuid_uuid": _pair(wording.uuid, wording.uuid),
    "json": _json_pair,
    "several": _several,
    "keys": _keys,
    "chain": _chain,
}
WEIGHTS = {
    "words_number": 0.2, "words_uuid": 0.06, "uuid_uuid": 0.22, "json": 0.1,
    "several": 0.2, "keys": 0.08, "chain": 0.14,
}  # fmt: skip
"""Relative numbers of the items."""


def task_sequence(rng: Random, tokenizer: Tokenizer, length: int) -> tuple[list[int], list[bool], int]:
    """One document and questions with answers: at most `length` ids, which of them are answers, the document's end."""

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def count(text: str) -> int:
        return len(ids_of(text))

    kinds = list(WEIGHTS) if rng.random() < 0.5 else rng.sample(list(WEIGHTS), 2)
    weights = [WEIGHTS[kind] for kind in kinds]
    taken: Taken = set()
    needles: list[str] = []
    depths: list[float] = []
    turns: list[tuple[list[int], list[int]]] = []
    room = int(length * rng.uniform(0.75, 1.0)) - 8
    asking = rng.uniform(0.6, 1.0)  # share of the items that are asked for
    while True:
        item = ITEMS[rng.choices(kinds, weights)[0]](rng, taken)
        cost = sum(count(" " + needle) for needle in item.needles)
        asked = item.asked if rng.random() < asking or not turns else ()
        new = [
            (ids_of(QUESTION_TEMPLATE.format(question=q)), ids_of(ANSWER_TEMPLATE.format(expected=a))) for q, a in asked
        ]
        cost += sum(len(question) + len(answer) for question, answer in new)
        if cost > room and turns:
            break
        room -= cost
        needles += item.needles
        places = [rng.random() for _ in item.needles]
        depths += sorted(places) if item.in_order else places
        turns += new
    tokens = length - 4 - sum(len(question) + len(answer) for question, answer in turns)
    filling = noise() if rng.random() < 0.3 else prose(rng)
    text = Haystack(Request(rng, tokens - 32, 0, 1, count), filling, needles, depths).text
    begin = [tokenizer.token_to_id("<|begin|>")] if rng.random() < 0.4 else []
    ids = (begin + ids_of(text))[:length]
    document_end = len(ids)
    is_answer = [False] * document_end
    for question, answer in rng.sample(turns, len(turns)):
        if len(ids) + len(question) + len(answer) > length:
            break
        ids += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    return ids, is_answer, document_end
