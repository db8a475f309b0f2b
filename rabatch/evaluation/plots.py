"""The pictures of an evaluation, as inline SVG in the style of `rabatch.report.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rabatch.evaluation.intervals import Estimate
from rabatch.report.plots import HEIGHT, WIDTH, Format, log_ticks

COLORS = 10
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 42
_PLOT_W, _PLOT_H = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_RADIUS = 8.5
_MOST_VALUES = 8
"""Columns of a heat map up to which its values are written into it."""
_TENTHS = 11


@dataclass(frozen=True, slots=True)
class Point:
    """A recipe in a plot: `number`, from 1, is what its mark says."""

    number: int
    x: float
    y: Estimate


def scatter(points: Sequence[Point], *, name: str, title: str, about: str, x_label: str, x_format: Format) -> str:
    """Scores, from 0 to 100 %, over something above 0 on a logarithmic axis. Marks that would hide each other stand
    beside their spot, with a line to it.

    Args:
        name: Unique on the page, of letters and digits.
        title, about: What it shows, and what it says; read out instead of the plot.
    """
    values = [math.log10(point.x) for point in points]
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.05)
    low, high = low - pad, high + pad

    def x_of(value: float) -> float:
        return _LEFT + _PLOT_W * (math.log10(value) - low) / (high - low)

    def y_of(share: float) -> float:
        return _TOP + _PLOT_H * (1 - share)

    parts = _frame(x_label)
    for tick in log_ticks(10**low, 10**high):
        x = x_of(tick)
        anchor = "start" if x < _LEFT + 12 else "end" if x > WIDTH - _RIGHT - 12 else "middle"
        base = _TOP + _PLOT_H
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="{anchor}">{escape(x_format(tick))}</text>')
    spots = [(x_of(point.x), y_of(point.y.mean)) for point in points]
    for point, (x, y) in zip(points, spots, strict=True):
        ends = y_of(point.y.low), y_of(point.y.high)
        parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        parts.append(f'<circle class="spot" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    for point, spot, place in zip(points, spots, _apart(spots), strict=True):
        parts.append(_mark(point.number, spot, place))
    return _svg(name, title, about, parts)


def legend(names: Sequence[str]) -> str:
    """Which recipe each mark is, for all plots of a page."""
    items = []
    for number, name in enumerate(names, 1):
        mark = f'<svg viewBox="0 0 20 20" aria-hidden="true">{_mark(number, (10, 10), (10, 10))}</svg>'
        items.append(f"<li>{mark}{escape(name)}</li>")
    return f'<ol class="legend">{"".join(items)}</ol>'


def heat(
    values: Mapping[tuple[int, int], tuple[float, int]],
    lengths: Sequence[str],
    columns: Sequence[int],
    *,
    name: str,
    title: str,
    about: str,
) -> str:
    """Scores by depth, from above the start of the context to its end, and length.

    Args:
        values: At (depth in tenths, length) a score in [0, 1], and of how many questions it is.
        lengths: Names of `columns`.
        name, title, about: As of `scatter`.
    """
    wide, tall = _PLOT_W / max(1, len(columns)), _PLOT_H / _TENTHS
    parts: list[str] = []
    for row in range(_TENTHS):
        y = _TOP + tall * row
        if row % 2 == 0:
            parts.append(f'<text x="{_LEFT - 6}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{10 * row} %</text>')
        for column, length in enumerate(columns):
            x = _LEFT + wide * column
            box = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}"'
            parts.append(f'<rect class="track" {box}/>')
            if (row, length) not in values:
                continue
            score = values[row, length][0]
            parts.append(f'<rect class="heat" {box} fill-opacity="{0.45 * score:.2f}"/>')
            if len(columns) <= _MOST_VALUES:
                at = f'x="{x + wide / 2:.1f}" y="{y + tall / 2 + 3.5:.1f}"'
                parts.append(f'<text class="heat-value" {at} text-anchor="middle">{100 * score:.0f}</text>')
    step = max(1, math.ceil(len(columns) / _MOST_VALUES))
    for column in range(0, len(columns), step):
        at = f'x="{_LEFT + wide * (column + 0.5):.1f}" y="{_TOP + _PLOT_H + 17}"'
        parts.append(f'<text {at} text-anchor="middle">{escape(lengths[column])}</text>')
    parts.append(_label("tokens of the context"))
    return _svg(name, title, about, parts)


def _frame(x_label: str) -> list[str]:
    parts = []
    for tenth in range(0, 11, 2):
        y = _TOP + _PLOT_H * (1 - tenth / 10)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10 * tenth} %</text>')
    base = _TOP + _PLOT_H
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    return [*parts, _label(x_label)]


def _label(text: str) -> str:
    at = f'x="{_LEFT + _PLOT_W / 2}" y="{HEIGHT - 6}"'
    return f'<text class="label" {at} text-anchor="middle">{escape(text)}</text>'


def _mark(number: int, spot: tuple[float, float], place: tuple[float, float]) -> str:
    (x, y), series = place, f"series-{(number - 1) % COLORS}"
    line = ""
    if place != spot:
        line = f'<line class="{series}" x1="{spot[0]:.1f}" y1="{spot[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
    circle = f'<circle class="mark {series}" cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}"/>'
    text = f'<text class="mark-name" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number}</text>'
    return line + circle + text


def _apart(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places of marks, each at its spot or as near to it as there is room."""
    taken: list[tuple[float, float]] = []
    for x, y in spots:
        around = ((r, turn) for r in range(0, WIDTH, 4) for turn in range(24 if r else 1))
        places = (
            (x + r * math.cos(turn * math.tau / 24), y + r * math.sin(turn * math.tau / 24)) for r, turn in around
        )
        taken.append(next(place for place in places if _is_free(place, taken)))
    return taken


def _is_free(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> bool:
    x, y = place
    inside = _LEFT + _RADIUS <= x <= WIDTH - _RADIUS - 2 and _RADIUS + 2 <= y <= _TOP + _PLOT_H - _RADIUS
    return inside and all(math.hypot(x - a, y - b) >= 2 * _RADIUS + 2 for a, b in taken)


def _svg(name: str, title: str, about: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-about">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-about">{escape(about)}</desc>'
        f"{''.join(parts)}</svg>"
    )
