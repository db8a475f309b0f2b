"""A heat map as SVG, coloured by the page's style sheet, or alone in a file with a style sheet of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from rabatch.report.plots import WIDTH

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 64, 34, 42
_MAX_CELL, _MIN_CELL = 36.0, 8.0
_READABLE = 28.0  # a cell so wide holds its number
_MAX_NAMES = 16
_STYLE = """svg { --text: #1c2126; --soft: #5a646e; --line: #dde1e5; --bar: #2f6f9f; --on: #fff; background: #fff;
  font-family: system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --text: #e6e9eb; --soft: #a2adb6; --line: #343c42; --bar: #6fb1dd;
  --on: #14181b; background: #14181b; } }
text { fill: var(--soft); font-size: 12.5px; } .title { fill: var(--text); } .cell { fill: var(--bar); }
.frame { fill: none; stroke: var(--line); } .number { font-size: 10.5px; fill: var(--text); }
.number.on { fill: var(--on); }"""


def heat_map(
    values: NDArray[np.floating],
    *,
    name: str,
    title: str,
    about: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    y_names: Sequence[str] | None = None,
) -> str:
    """A cell for each number, the darker the larger.

    Args:
        values: [rows, columns], in [0, 1]; NaN: an empty cell.
        name: Unique on the page, of letters and digits.
        title, about: What it shows, and what it says; read out instead of the plot.
        x_names, y_names: Of columns and rows. None: their numbers, from 0.
    """
    n_rows, n_columns = values.shape
    cell = min(_MAX_CELL, max(_MIN_CELL, (WIDTH - _LEFT - _RIGHT) / n_columns))
    width = max(WIDTH, round(_LEFT + cell * n_columns + _RIGHT))
    height = round(_TOP + cell * n_rows + _BOTTOM)
    parts = [f'<text class="title" x="{_LEFT}" y="20">{escape(title)}</text>']
    for row in range(n_rows):
        for column in range(n_columns):
            parts.append(_cell(float(values[row, column]), _LEFT + cell * column, _TOP + cell * row, cell))
    for at, text in _names(x_names, n_columns):
        x = _LEFT + cell * (at + 0.5)
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + cell * n_rows + 16:.1f}" text-anchor="middle">{escape(text)}</text>'
        )
    for at, text in _names(y_names, n_rows):
        y = _TOP + cell * (at + 0.5) + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>')
    middle = _LEFT + cell * n_columns / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    down = _TOP + cell * n_rows / 2
    turned = f'transform="rotate(-90 14 {down:.1f})"'
    parts.append(f'<text x="14" y="{down:.1f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    parts += _legend(_LEFT + cell * n_columns + 16, _TOP, min(100.0, cell * n_rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-about">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-about">{escape(about)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def standalone(svg: str) -> str:
    """A picture's own file: it brings its style sheet, for light and dark."""
    start = svg.index(">") + 1
    return f"{svg[:start]}<style>{_STYLE}</style>{svg[start:]}\n"


def _cell(value: float, x: float, y: float, size: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
    if np.isnan(value):
        return f'<rect class="frame" {place}/>'
    made = f'<rect class="cell" {place} fill-opacity="{value:.3f}"/><rect class="frame" {place}/>'
    if size >= _READABLE:
        on = " on" if value > 0.6 else ""
        middle = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
        made += f'<text class="number{on}" {middle} text-anchor="middle">{value:.2f}</text>'
    return made


def _names(names: Sequence[str] | None, count: int) -> list[tuple[int, str]]:
    """Some of the names, evenly, as many as are readable."""
    step = -(-count // _MAX_NAMES)
    return [(at, str(at) if names is None else names[at]) for at in range(0, count, step)]


def _legend(x: float, y: float, tall: float) -> list[str]:
    parts, steps = [], 10
    for step in range(steps):
        value = 1 - (step + 0.5) / steps
        place = f'x="{x:.1f}" y="{y + tall * step / steps:.1f}" width="12" height="{tall / steps:.1f}"'
        parts.append(f'<rect class="cell" {place} fill-opacity="{value:.2f}"/>')
    parts.append(f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="12" height="{tall:.1f}"/>')
    parts += [f'<text x="{x + 16:.1f}" y="{at:.1f}">{text}</text>' for at, text in ((y + 10, "1"), (y + tall, "0"))]
    return parts
