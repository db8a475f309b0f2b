"""Haystacks, and needles put into them at depths.

Everything is made of sentences that follow one another after a space, so that a sentence's tokens are the same
wherever it stands.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from random import Random

from rabatch.demo.grammar import filler_sentence
from rabatch.evaluation.tasks.base import CountTokens, Request

NOISE = (
    "The path is dry.",
    "The field is wide.",
    "The moon is far.",
    "On we walk.",
    "Out and home once more.",
)
"""The repeated haystack: a few sentences over and over."""


def noise() -> Iterator[str]:
    """Sentences that repeat."""
    return (NOISE[number % len(NOISE)] for number in count())


def prose(rng: Random) -> Iterator[str]:
    """Sentences that all differ."""
    return (filler_sentence(rng) for _ in count())


class Haystack:
    """Sentences up to a number of tokens, and needles among them.

    Args:
        request: Its `tokens` are those of haystack and needles together.
        filling: Sentences without end.
        needles: What is put in.
        depths: Of each needle, in [0, 1]: the share of the haystack's tokens that stand before it.
    """

    def __init__(
        self, request: Request, filling: Iterator[str], needles: Sequence[str], depths: Sequence[float]
    ) -> None:
        counted = _Counted(request.count_tokens)
        wanted = request.tokens - sum(map(counted, needles))
        sentences: list[str] = []
        sizes: list[int] = []
        filled = 0
        while filled < wanted:
            sentence = next(filling)
            sentences.append(sentence)
            sizes.append(counted(sentence))
            filled += sizes[-1]
        ends = list(accumulate(sizes, initial=0))
        places = [bisect_left(ends, depth * filled) for depth in depths]
        order = sorted(range(len(needles)), key=lambda number: (places[number], depths[number]))
        pieces: list[str] = []
        at: dict[int, int] = {}
        done = 0
        for number in order:
            pieces += sentences[done : places[number]]
            done = places[number]
            at[number] = len(pieces)
            pieces.append(needles[number])
        pieces += sentences[done:]
        starts = list(accumulate((len(piece) + 1 for piece in pieces), initial=0))
        self.text = " ".join(pieces)
        self.depths = [starts[at[number]] / max(1, len(self.text)) for number in range(len(needles))]
        """Of each needle, in characters: 0 the start of the text, 1 its end."""


class _Counted:
    """Tokens of a sentence and the space before it; repeated sentences are counted once."""

    def __init__(self, count_tokens: CountTokens) -> None:
        self._count = count_tokens
        self._known: dict[str, int] = {}

    def __call__(self, sentence: str) -> int:
        if sentence not in self._known:
            self._known[sentence] = self._count(" " + sentence)
        return self._known[sentence]


def only(request: Request, make: Callable[[], str], at_least: int) -> list[str]:
    """Needles alone, as many as make up the tokens of the request and at least some."""
    needles: list[str] = []
    tokens = 0
    while tokens < request.tokens or len(needles) < at_least:
        needle = make()
        needles.append(needle)
        tokens += request.count_tokens(" " + needle)
    return needles
