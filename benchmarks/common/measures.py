"""What a search found, how long it took, and whether it may be timed at all."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.heads import Head
from rabatch.index.mass import recovered_mass


def best_seconds(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result, and the least seconds of `repeats` calls after one warm-up."""
    result = function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def check(ids: np.ndarray, scores: np.ndarray, head: Head, tolerance: float) -> None:
    """A wrong result is not timed: every id once per query, and worth the score that came with it."""
    ranked = np.sort(ids, axis=1)
    if ((np.diff(ranked, axis=1) == 0) & (ranked[:, 1:] >= 0)).any():
        raise AssertionError("an id came twice")
    worth = np.einsum("qd,qkd->qk", head.queries, head.keys[np.maximum(ids, 0)])
    found = ids >= 0
    lengths = np.linalg.norm(head.queries, axis=1)[:, None] * np.linalg.norm(head.keys, axis=1).max()
    error = np.abs(np.where(found, scores - worth, 0.0)) / lengths
    if error.max() > tolerance:
        raise AssertionError(f"a score is {error.max():.2g} |q||k| from q . k, more than {tolerance}")


def quality(ids: np.ndarray, head: Head) -> dict[str, float]:
    """recall@k, and the share of the ideal top-k's softmax mass: mean and 10th percentile.

    Where the static set is known, `whole_mass` is the share of all attention that it and the found keys hold.
    """
    scaling = head.keys.shape[1] ** -0.5
    hits = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, head.truth, strict=True)]
    found = np.einsum("qd,qkd->qk", head.queries, head.keys[np.maximum(ids, 0)])
    ideal = np.einsum("qd,qkd->qk", head.queries, head.keys[head.truth])
    share = recovered_mass(np.where(ids >= 0, found, -np.inf), ideal, scaling=scaling)
    return {
        "recall": round(float(np.mean(hits)), 4),
        "recall_p10": round(float(np.quantile(hits, 0.1)), 3),
        "mass": round(float(share.mean()), 4),
        "mass_p10": round(float(np.quantile(share, 0.1)), 4),
    }


def machine(threads: int) -> str:
    """One line for the head of a result."""
    return f"{platform.machine()}, {threads} thread(s), Python {platform.python_version()}, torch {torch.__version__}"


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows under their columns, as wide as they need."""
    cells = [columns] + [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
