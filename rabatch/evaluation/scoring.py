"""Scores of an answer against the expected text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Match = Literal["all", "part"]


def exact_match(expected: str, answer: str | None) -> bool:
    """Whether the answer is the expected text, surrounding white space aside."""
    return answer is not None and answer.strip() == expected.strip()


def string_match(answers: Sequence[str], text: str | None, match: Match = "all") -> float:
    """How much of what was asked for stands in an answer, in [0, 1], whatever the case of its letters.

    As RULER (arXiv 2404.06654) scores: of retrieval, tracing and aggregation the share of the wanted strings that the
    answer holds (``all``), of question answering whether it holds any of them (``part``). What else it says does not
    count.

    Args:
        answers: The wanted strings; at least one.
        text: The answer; None, if there is none, scores 0.
    """
    said = (text or "").lower()
    held = [answer.lower() in said for answer in answers]
    return float(any(held)) if match == "part" else sum(held) / len(held)
