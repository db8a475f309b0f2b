"""Scores of an answer against the expected text."""

from __future__ import annotations


def exact_match(expected: str, answer: str | None) -> bool:
    """Whether the answer is the expected text, surrounding white space aside."""
    return answer is not None and answer.strip() == expected.strip()
