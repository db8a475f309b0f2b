"""An evaluation as one HTML file, in the style of `rabatch.report`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rabatch.evaluation import plots
from rabatch.evaluation.metrics import Cell, over_depths
from rabatch.evaluation.summary import (
    cost_rows,
    failures_of,
    length_name,
    lengths_of,
    percent,
    score_rows,
    score_text,
)
from rabatch.report import html
from rabatch.report.run import versions


def page(
    cells: Sequence[Cell],
    means: Sequence[Cell],
    predictions: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> bytes:
    """The page, UTF-8.

    Args:
        predictions: Rows of `predictions.PREDICTIONS`, for the maps of depths.
        settings: By name; mappings among them are shown by dotted names.
    """
    recipes = list(dict.fromkeys(cell.recipe for cell in cells))
    sections = [_length(number, length, cells, means, recipes) for number, length in enumerate(lengths_of(cells))]
    sections.append(_depths(over_depths(predictions), lengths_of(cells)))
    sections.append(_failures(cells))
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    rest = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    sections.append(html.settings({**groups, "questions": rest, "versions": versions()}))
    about = {
        "model": str(settings.get("model", {}).get("name", "")),
        "recipes": ", ".join(recipes),
        "answers": f"{sum(cell.questions for cell in cells):,}",
    }
    return html.document("rabatch evaluate", html.pairs(about), "\n".join(sections))


def _length(number: int, length: int, cells: Sequence[Cell], means: Sequence[Cell], recipes: Sequence[str]) -> str:
    over = [cell for cell in means if cell.length == length]
    title = f"Contexts of {length_name(length)} tokens" if length else "Contexts of a file"
    figures = "".join(_figures(f"l{number}", title, over, recipes))
    return (
        f"<section><h2>{escape(title)}</h2>"
        "<h3>Scores in per cent, with the bounds of their 95 % confidence interval</h3>"
        f"{html.table(*score_rows(cells, means, length))}"
        f"<h3>What each recipe costs, over all tasks</h3>{html.table(*cost_rows(over))}"
        f'<h3>Accuracy and its price</h3><div class="figures">{figures}</div></section>'
    )


def _figures(prefix: str, section: str, means: Sequence[Cell], recipes: Sequence[str]) -> Iterator[str]:
    for name, title, x_label, x_format, value_of in (
        (
            *("bytes", "Accuracy against stored bytes", "stored bytes per token of the context, logarithmic"),
            *(html.short, lambda cell: cell.stored_bytes_per_token),
        ),
        (
            *("attended", "Accuracy against keys attended", "share of the context's keys attended, logarithmic"),
            *(html.percent, lambda cell: cell.attended_share),
        ),
    ):
        known = [(cell, x) for cell in means if (x := value_of(cell)) and cell.score is not None]
        if not known:
            continue
        points = [plots.Point(recipes.index(cell.recipe) + 1, x, cell.score) for cell, x in known if cell.score]
        about = "; ".join(
            f"{cell.recipe} {score_text(cell.score, bounds=False)} % at {x_format(x)}" for cell, x in known
        )
        named: dict[str, Any] = {"name": prefix + name, "title": f"{title}. {section}", "about": about}
        svg = plots.scatter(points, **named, x_label=x_label, x_format=x_format) + plots.legend(recipes)
        rows = [[cell.recipe, score_text(cell.score), x_format(x)] for cell, x in known]
        yield html.figure(title, "mean score over tasks", about, svg, ("recipe", "score, %", x_label), rows)


def _depths(found: Mapping[str, Mapping[tuple[int, int], tuple[float, int]]], lengths: Sequence[int]) -> str:
    if not found:
        return ""
    figures = []
    for number, (recipe, values) in enumerate(found.items()):
        columns = [length for length in lengths if any(place[1] == length for place in values)]
        total = sum(count for _, count in values.values())
        mean = sum(score * count for score, count in values.values()) / total
        about = f"{total:,} questions, {percent(mean)} found"
        named = {"name": f"d{number}", "title": f"Needles found by depth and length: {recipe}", "about": about}
        svg = plots.heat(values, [length_name(length) for length in columns], columns, **named)
        rows = [
            [f"{10 * depth} %", length_name(length), f"{100 * score:.1f}", f"{count:,}"]
            for (depth, length), (score, count) in sorted(values.items())
        ]
        head = ("depth", "tokens", "score, %", "questions")
        figures.append(html.figure(recipe, "score in per cent by depth, from the start down", about, svg, head, rows))
    return f'<section><h2>Needles by depth</h2><div class="figures">{"".join(figures)}</div></section>'


def _failures(cells: Sequence[Cell]) -> str:
    failures = failures_of(cells)
    if not failures:
        return '<section><h2>Failures</h2><p class="none">No question failed.</p></section>'
    rows = [[recipe, f"{count:,}", kind] for recipe, kind, count in failures]
    return f"<section><h2>Failures</h2>{html.table(('recipe', 'rows', 'reason'), rows)}</section>"
