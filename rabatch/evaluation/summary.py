"""An evaluation as tables: in Markdown, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rabatch.evaluation.intervals import Estimate
from rabatch.evaluation.metrics import Cell, reference_of

NONE = "-"
_COSTS = (
    *("recipe", "score", "against", "attended", "mass kept", "recall", "ms per token", "bytes per token"),
    *("answers", "failed"),
)


def length_name(length: int) -> str:
    """4096 as ``4K``; 0, of a file that does not say, as a dash."""
    if not length:
        return NONE
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def score_text(score: Estimate | None, *, bounds: bool = True) -> str:
    """In per cent: ``95.0 (88.2-98.1)``."""
    if score is None:
        return NONE
    text = f"{100 * score.mean:.1f}"
    return f"{text} ({100 * score.low:.1f}-{100 * score.high:.1f})" if bounds else text


def difference_text(difference: Estimate | None) -> str:
    """In points: ``-0.4 (-1.2 to +0.4)``."""
    if difference is None:
        return NONE
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def percent(share: float | None) -> str:
    """A share in per cent; none as a dash."""
    return NONE if share is None else f"{100 * share:.1f} %"


def lengths_of(cells: Sequence[Cell]) -> list[int]:
    """In their order."""
    return list(dict.fromkeys(cell.length for cell in cells))


def score_rows(cells: Sequence[Cell], means: Sequence[Cell], length: int) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the scores of one length: a row per task, then their mean; a column per recipe."""
    found = {(cell.task, cell.recipe): cell for cell in cells if cell.length == length}
    tasks, recipes = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    rows = [[task, *(_score(found.get((task, recipe))) for recipe in recipes)] for task in tasks]
    if len(tasks) > 1:
        over = {cell.recipe: cell for cell in means if cell.length == length}
        rows.append(["mean", *(_score(over.get(recipe)) for recipe in recipes)])
    return ["task", *recipes], rows


def _score(cell: Cell | None) -> str:
    return NONE if cell is None else score_text(cell.score)


def cost_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what recipes cost, of cells that differ by recipe."""
    reference = reference_of(cell.recipe for cell in cells)
    head = [f"against {reference}" if name == "against" else name for name in _COSTS]
    return head, [
        [
            cell.recipe,
            score_text(cell.score),
            difference_text(cell.difference),
            percent(cell.attended_share),
            percent(cell.mass_share),
            percent(cell.recall),
            NONE if cell.seconds_per_token is None else f"{1000 * cell.seconds_per_token:.2f}",
            NONE if cell.stored_bytes_per_token is None else f"{cell.stored_bytes_per_token:,.0f}",
            f"{cell.questions - cell.failed:,}",
            f"{cell.failed:,}",
        ]
        for cell in cells
    ]


def failures_of(cells: Sequence[Cell]) -> list[tuple[str, str, int]]:
    """Recipe, kind of reason and how many, of all failed questions."""
    found: dict[tuple[str, str], int] = {}
    for cell in cells:
        for kind, count in cell.failures.items():
            found[cell.recipe, kind] = found.get((cell.recipe, kind), 0) + count
    return [(recipe, kind, count) for (recipe, kind), count in found.items()]


def markdown(cells: Sequence[Cell], means: Sequence[Cell], settings: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    model = settings.get("model", {}).get("name", "")
    about = f"Model `{model}`. Scores in per cent, with the bounds of their 95 % confidence interval."
    lines = ["# Evaluation", "", about]
    for length in lengths_of(cells):
        head, rows = score_rows(cells, means, length)
        lines += ["", f"## Contexts of {length_name(length)} tokens" if length else "## Contexts of a file"]
        lines += ["", *_markdown_table(head, rows)]
        lines += ["", *_markdown_table(*cost_rows([cell for cell in means if cell.length == length]))]
    failures = failures_of(cells)
    if failures:
        rows = [[recipe, f"{count:,}", kind] for recipe, kind, count in failures]
        lines += ["", "## Failures by reason", "", *_markdown_table(("recipe", "rows", "reason"), rows)]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|", *map(line, rows)]


def table_lines(cells: Sequence[Cell], means: Sequence[Cell]) -> list[str]:
    """The same for a terminal."""
    lines: list[str] = []
    for length in lengths_of(cells):
        head, rows = score_rows(cells, means, length)
        lines += ["", *_aligned([[f"{length_name(length)} tokens", *head[1:]], *rows])]
        head, rows = cost_rows([cell for cell in means if cell.length == length])
        lines += ["", *_aligned([head, *rows])]
    return lines[1:]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return lines
