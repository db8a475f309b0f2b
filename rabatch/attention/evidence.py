"""Where in the document the attention of the answering tokens went, as character spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

SMOOTHING_TOKENS = 9
"""Neighbouring tokens whose attention is pooled: about a clause."""
MARGIN_TOKENS = 12
"""A span reaches at most this far from its peak: about a sentence."""


class Span(TypedDict):
    """A character range of the document's text, `end` exclusive, with its share of the observed attention."""

    start: int
    end: int
    score: float


def spans(
    mass: np.ndarray,
    char_start: np.ndarray,
    char_end: np.ndarray,
    text: str | None = None,
    *,
    most: int = 3,
) -> list[Span]:
    """The `most` heaviest spans, best first, disjoint.

    Args:
        mass: float [n_tokens], attention summed over the heads and answering tokens.
        char_start, char_end: int [n_tokens]; equal for tokens outside the document (template text).
        text: Unused tokens' text is not needed; given, spans are widened to the sentence around them.

    Returns:
        Spans with scores that sum to at most 1.
    """
    inside = (char_end > char_start) & np.isfinite(mass)
    weights = np.where(inside, mass, 0.0).astype(np.float64)
    total = weights.sum()
    if total <= 0:
        return []
    weights /= total
    found: list[Span] = []
    left = weights.copy()
    kernel = np.ones(SMOOTHING_TOKENS)
    for _ in range(most):
        pooled = np.convolve(left, kernel, mode="same")
        peak = int(pooled.argmax())
        if pooled[peak] <= 1e-3:
            break
        low, high = max(0, peak - MARGIN_TOKENS), min(len(left), peak + MARGIN_TOKENS + 1)
        tokens = np.flatnonzero(inside[low:high]) + low
        score = float(left[tokens].sum())
        left[low:high] = 0.0
        start, end = int(char_start[tokens].min()), int(char_end[tokens].max())
        if text is not None:
            start, end = _sentence(text, int(char_start[peak]) if inside[peak] else start, start, end)
        found.append(Span(start=start, end=end, score=score))
    return _disjoint(found)


def _sentence(text: str, peak: int, start: int, end: int) -> tuple[int, int]:
    """The sentence that holds character `peak`, within [start, end) widened by nothing: never longer than it."""
    before = max(text.rfind(mark, start, peak) for mark in (". ", "\n", "? ", "! "))
    stops = [i for i in (text.find(mark, peak, end) for mark in (". ", "\n", "? ", "! ")) if i >= 0]
    return (before + 1 if before >= 0 else start), (min(stops) + 1 if stops else end)


def _disjoint(found: Sequence[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in found:
        if all(span["end"] <= other["start"] or span["start"] >= other["end"] for other in kept):
            kept.append(span)
    return kept
