"""The sentences that state keys, values and variables, and the questions that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from uuid import UUID

from rabatch.demo.grammar import ADJECTIVES, ANIMALS, COLORS, FOODS, NOUNS, TOOLS

_FIRST = (*ADJECTIVES, *COLORS)
_SECOND = (*NOUNS, *ANIMALS, *TOOLS, *FOODS)
_COUNTED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def words(rng: Random) -> str:
    """Two words with a hyphen."""
    return f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}".replace(" ", "-")


def seven_digits(rng: Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def uuid(rng: Random) -> str:
    """A random UUID (version 4), 36 characters."""
    return str(UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[Random], str], rng: Random, n: int, taken: set[str]) -> list[str]:
    """`n` strings that are not in `taken`; they are added there."""
    return [another(make, rng, taken) for _ in range(n)]


def another(make: Callable[[Random], str], rng: Random, taken: set[str]) -> str:
    """A string that is not in `taken`; it is added there."""
    one, misses = make(rng), 0
    while one in taken:
        misses += 1
        one = make(rng)
        if misses > 20:  # the words are used up
            one = f"{one}-{rng.randint(10, 99)}"
    taken.add(one)
    return one


def states(key: str, value: str) -> str:
    return f"The value of key {key} is {value}."


def asks(key: str) -> str:
    return f"What is the value of key {key}?"


def states_several(key: str, values: Sequence[str]) -> list[str]:
    """Every value in a sentence of its own, with its number."""
    return [f"Of key {key} value {number} is {value}." for number, value in enumerate(values, start=1)]


def asks_several(key: str, n: int) -> str:
    return f"What are values 1 to {n} of key {key}?"


def answers_several(key: str, values: Sequence[str]) -> str:
    return ", ".join(f"{key} value {number} is {value}" for number, value in enumerate(values, start=1))


def asks_keys(keys: Sequence[str]) -> str:
    """One question for the values of several keys."""
    return f"What are the values of keys {', '.join(keys[:-1])} and {keys[-1]}?"


def answers_keys(keys: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{key} is {value}" for key, value in zip(keys, values, strict=True))


def states_chain(value: str, variables: Sequence[str]) -> list[str]:
    """A value, and the variables that it is handed along."""
    first = f"The value {value} was first given to variable {variables[0]}."
    return [first, *(f"It was copied from variable {a} to {b}." for a, b in pairwise(variables))]


def asks_chain(value: str, n: int) -> str:
    count = _COUNTED[n] if n < len(_COUNTED) else str(n)
    return f"Which {count} variables hold the value {value}, itself or as a copy?"
