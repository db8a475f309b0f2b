"""How sure a mean score is, when questions share contexts.

Answers about one context are not independent: the variance of the mean is taken between contexts (the cluster-robust
one of a ratio, Cochran 1977, section 6.3). Set against that of as many independent right-or-wrong answers it gives an
effective number of answers, with which Wilson's interval stays inside [0, 1] (Korn and Graubard 1998). Where no context
differs from another, that number is the contexts'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def of_contexts(scores: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean over all answers.

    Args:
        scores: Of each context, those of its answers, in [0, 1]. None: without any.
    """
    groups = [group for group in scores if group]
    n = sum(map(len, groups))
    if not n:
        return None
    mean = math.fsum(math.fsum(group) for group in groups) / n
    n_groups = len(groups)
    if n_groups == n and all(score in (0, 1) for group in groups for score in group):
        return _wilson(mean, n, _Z)
    residuals = (math.fsum(group) - mean * len(group) for group in groups)
    between = math.fsum(value * value for value in residuals)
    if n_groups < 2 or between < 1e-18 * n * n:
        return _wilson(mean, n_groups, _Z)
    variance = n_groups / (n_groups - 1) * between / (n * n)
    effective = mean * (1 - mean) / variance
    return _wilson(mean, min(effective, n), _student(n_groups - 1))


def of_differences(differences: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean difference of two scores of the same answers.

    Args:
        differences: Of each context, those of its answers, in [-1, 1]. None: without any.
    """
    groups = [group for group in differences if group]
    n, n_groups = sum(map(len, groups)), len(groups)
    if not n:
        return None
    mean = math.fsum(math.fsum(group) for group in groups) / n
    between = math.fsum((math.fsum(group) - mean * len(group)) ** 2 for group in groups)
    if n_groups < 2 or between < 1e-18 * n * n:  # so large a share of contexts may differ, and none of these would
        half = 1 - 0.025 ** (1 / n_groups)
    else:
        half = _student(n_groups - 1) * math.sqrt(n_groups / (n_groups - 1) * between) / n
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half))


def of_cells(cells: Sequence[Estimate]) -> Estimate | None:
    """The mean over cells of which each counts the same, as tasks do. Cells share no context: their distances from mean
    to bound add up as squares (MOVER, Zou and Donner 2008)."""
    if not cells:
        return None
    mean = math.fsum(cell.mean for cell in cells) / len(cells)
    below = math.sqrt(math.fsum((cell.mean - cell.low) ** 2 for cell in cells)) / len(cells)
    above = math.sqrt(math.fsum((cell.high - cell.mean) ** 2 for cell in cells)) / len(cells)
    return Estimate(mean, mean - below, mean + above)


def _wilson(mean: float, n: float, z: float) -> Estimate:
    """Wilson's score interval of a share of `n`."""
    square = z * z / n
    middle = (mean + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(max(0.0, mean * (1 - mean)) / n + square / (4 * n))
    return Estimate(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; exact for one and two degrees)."""
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95 * 0.95))
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))
