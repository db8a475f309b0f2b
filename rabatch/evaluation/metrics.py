"""What came out per task, length and recipe."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rabatch.evaluation.intervals import Estimate, of_cells, of_contexts, of_differences
from rabatch.report.statistics import kind_of

Key = tuple[str, int, str]
"""Task, length, name of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one length, answered by one recipe.

    Args:
        length: In tokens; 0: of a file that does not say.
        questions, contexts: How many, failed ones too.
        score: The mean of the questions' scores, in [0, 1], and the bounds of its 95 % confidence interval; None
            without any. A question that failed while it was asked counts 0, one that could not be asked does not count.
        difference: Of the score and that of recipe `dense` (where there is none, of the first recipe), question by
            question; None of that recipe itself.
        attended_share, mass_share: Means over the answers that have one.
        recall, recall_samples: Mean of the searches that were looked at, and how many those are.
        seconds_per_token: Seconds of all answers by their tokens.
        answer_tokens: Of all answers.
        stored_bytes_per_token: Of the context, that this recipe needs.
        failed: Questions without an answer; `failures` counts them by kind of reason.
    """

    task: str
    length: int
    recipe: str
    questions: int
    contexts: int
    score: Estimate | None
    difference: Estimate | None
    attended_share: float | None
    mass_share: float | None
    recall: float | None
    recall_samples: int
    seconds_per_token: float | None
    answer_tokens: int
    stored_bytes_per_token: float | None
    failed: int
    failures: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the score's bounds as `low` and `high` beside it."""
        values = asdict(self)
        score = values.pop("score") or {"mean": None, "low": None, "high": None}
        return {**values, "score": score["mean"], "low": score["low"], "high": score["high"]}


def reference_of(recipes: Iterable[str]) -> str | None:
    """The recipe that others are compared with."""
    names = list(dict.fromkeys(recipes))
    return "dense" if "dense" in names else names[0] if names else None


def cells_of(
    predictions: Iterable[Mapping[str, Any]],
    *,
    stored: Mapping[Key, float],
    recall: Mapping[Key, tuple[int, float]],
) -> list[Cell]:
    """Cells in the order in which they first stand.

    Args:
        predictions: Rows of `predictions.PREDICTIONS`.
        stored: Bytes per token of context.
        recall: Searches looked at, and the sum of their recall.
    """
    rows: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for row in predictions:
        rows[row["task"], row["length"], row["recipe"]].append(row)
    reference = reference_of(recipe for _, _, recipe in rows)
    cells = []
    for key, some in rows.items():
        other = rows.get((*key[:2], reference or ""), []) if key[2] != reference else []
        compared = {row["question_id"]: row["score"] for row in other if row["score"] is not None}
        cells.append(_cell(key, some, compared, stored.get(key), recall.get(key, (0, 0.0))))
    return cells


def _cell(
    key: Key,
    rows: Sequence[Mapping[str, Any]],
    compared: Mapping[str, float],
    stored: float | None,
    recall: tuple[int, float],
) -> Cell:
    task, length, recipe = key
    differences: dict[str | None, list[float]] = defaultdict(list)
    scores: dict[str | None, list[float]] = defaultdict(list)
    for row in rows:
        if row["score"] is not None:
            scores[row["document_id"]].append(row["score"])
            if row["question_id"] in compared:
                differences[row["document_id"]].append(row["score"] - compared[row["question_id"]])
    answered = [row for row in rows if row["status"] == "ok"]
    tokens = sum(row["answer_tokens"] for row in answered)
    return Cell(
        task=task,
        length=length,
        recipe=recipe,
        questions=len(rows),
        contexts=len({row["document_id"] for row in rows} - {None}),
        score=of_contexts(list(scores.values())),
        difference=of_differences(list(differences.values())),
        attended_share=_mean(answered, "attended_share"),
        mass_share=_mean(answered, "mass_share"),
        recall=recall[1] / recall[0] if recall[0] else None,
        recall_samples=recall[0],
        seconds_per_token=math.fsum(row["seconds"] for row in answered) / tokens if tokens else None,
        answer_tokens=tokens,
        stored_bytes_per_token=stored,
        failed=len(rows) - len(answered),
        failures=dict(Counter(kind_of(row["reason"] or "") for row in rows if row["status"] != "ok").most_common()),
    )


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return math.fsum(values) / len(values) if values else None


def over_tasks(cells: Iterable[Cell]) -> list[Cell]:
    """Per length and recipe the mean over tasks, each of which counts the same, as a cell of task ``mean``; seconds and
    recall by tokens and samples."""
    groups: dict[tuple[int, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.length, cell.recipe].append(cell)
    return [_over(length, recipe, some) for (length, recipe), some in groups.items()]


def _over(length: int, recipe: str, cells: Sequence[Cell]) -> Cell:
    tokens, samples = sum(cell.answer_tokens for cell in cells), sum(cell.recall_samples for cell in cells)
    seconds = math.fsum((cell.seconds_per_token or 0.0) * cell.answer_tokens for cell in cells)
    failures: Counter[str] = Counter()
    for cell in cells:
        failures.update(cell.failures)

    def mean(name: str) -> float | None:
        values = [value for cell in cells if (value := getattr(cell, name)) is not None]
        return math.fsum(values) / len(values) if values else None

    return Cell(
        task="mean",
        length=length,
        recipe=recipe,
        questions=sum(cell.questions for cell in cells),
        contexts=sum(cell.contexts for cell in cells),
        score=of_cells([cell.score for cell in cells if cell.score is not None]),
        difference=of_cells([cell.difference for cell in cells if cell.difference is not None]),
        attended_share=mean("attended_share"),
        mass_share=mean("mass_share"),
        recall=math.fsum((cell.recall or 0.0) * cell.recall_samples for cell in cells) / samples if samples else None,
        recall_samples=samples,
        seconds_per_token=seconds / tokens if tokens else None,
        answer_tokens=tokens,
        stored_bytes_per_token=mean("stored_bytes_per_token"),
        failed=sum(cell.failed for cell in cells),
        failures=dict(failures.most_common()),
    )


def over_depths(predictions: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[int, int], tuple[float, int]]]:
    """By recipe, at (depth in tenths, length) the mean score of questions that need one sentence, and their number.

    Of task ``niah_depth`` where it was asked, else of all tasks.
    """
    rows = [row for row in predictions if len(row["depths"]) == 1 and row["score"] is not None]
    grid = [row for row in rows if row["task"] == "niah_depth"]
    found: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in grid or rows:
        found[row["recipe"]][round(10 * row["depths"][0]), row["length"]].append(row["score"])
    return {
        recipe: {place: (math.fsum(scores) / len(scores), len(scores)) for place, scores in places.items()}
        for recipe, places in found.items()
    }
