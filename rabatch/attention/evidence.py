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
    *,
    most: int = 3,
) -> list[Span]:
    """The `most` heaviest spans, best first, disjoint.

    Args:
        mass: float [n_tokens], attention summed over the heads and answering tokens.
        char_start, char_end: int [n_tokens]; equal for tokens outside the document (template text).
        most: At most so many spans.

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
        found.append(Span(start=int(char_start[tokens].min()), end=int(char_end[tokens].max()), score=score))
    return _disjoint(found)


def _disjoint(found: Sequence[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in found:
        if all(span["end"] <= other["start"] or span["start"] >= other["end"] for other in kept):
            kept.append(span)
    return kept
