"""Plots as inline SVG, coloured by the page's style sheet. Every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

WIDTH, HEIGHT = 400, 225
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 42
_MAX_TICKS = 6
_PLOT_W, _PLOT_H = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

Format = Callable[[float], str]
Bar = tuple[float, float, float]
"""From, to, height."""
Scale = Literal["time", "share", "log"]
_TIMES_S = (
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
    15,
    30,
    *(60 * m for m in (1, 2, 5, 10, 15, 30)),
    *(3600 * h for h in (1, 2, 4, 8)),
)


def bars(
    rows: Sequence[Bar],
    *,
    name: str,
    title: str,
    about: str,
    x_label: str,
    x_format: Format,
    y_format: Format,
    scale: Scale,
) -> str:
    """A bar plot; the bars' borders are the x axis.

    Args:
        name: Unique on the page, of letters and digits.
        title, about: What it shows, and what it says; read out instead of the plot.
        scale: Of x: seconds, a share, or a logarithm.
    """
    place = math.log10 if scale == "log" else float
    low, high = place(rows[0][0]), place(rows[-1][1])
    top_value, y_ticks = _axis(max(height for _, _, height in rows))

    def x_of(value: float) -> float:
        return _LEFT + _PLOT_W * (place(value) - low) / (high - low or 1)

    def y_of(value: float) -> float:
        return _TOP + _PLOT_H * (1 - value / top_value)

    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(tick))}</text>')
    for start, end, height in rows:
        if height <= 0:
            continue
        x, y = x_of(start), y_of(height)
        wide, tall = max(0.6, x_of(end) - x - 0.6), max(0.6, _TOP + _PLOT_H - y)
        parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
    base = _TOP + _PLOT_H
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for at in _x_ticks(rows[0][0], rows[-1][1], scale):
        x = x_of(at)
        anchor = "start" if x < _LEFT + 12 else "end" if x > WIDTH - _RIGHT - 12 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="{anchor}">{escape(x_format(at))}</text>')
    parts.append(
        f'<text class="label" x="{_LEFT + _PLOT_W / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-about">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-about">{escape(about)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def share_bar(share: float) -> str:
    """A bar as wide as a share, for a table's cell. Its value stands beside it, so it is not read out."""
    return (
        '<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="bad" width="{100 * share:.2f}" height="10"/></svg>'
    )


def _axis(greatest: float) -> tuple[float, list[float]]:
    """The top of an axis from 0 on, and round ticks up to it."""
    if greatest <= 0:
        return 1.0, [0.0, 1.0]
    size = 10 ** math.floor(math.log10(greatest / 4))
    step = next(size * times for times in (1, 2, 2.5, 5, 10) if greatest / (size * times) <= 4.0001)
    n_steps = math.ceil(greatest / step - 1e-9)
    return n_steps * step, [number * step for number in range(n_steps + 1)]


def _x_ticks(low: float, high: float, scale: Scale) -> list[float]:
    """Up to six round values of an axis."""
    if scale == "log":
        return log_ticks(low, high)
    if scale == "time":
        days = math.ceil(high / 86400 / (_MAX_TICKS - 1)) * 86400
        step = next((time for time in _TIMES_S if high / time <= _MAX_TICKS - 1), days)
    else:
        size = 10 ** math.floor(math.log10(high - low))
        step = next(size * times for times in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (size * times) <= _MAX_TICKS - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Up to six round values of a logarithmic axis; its ends where there are none."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick * 1.0001 and tick <= high * 1.0001]
        if len(ticks) <= _MAX_TICKS:
            break
    return ticks if len(ticks) > 1 else [low, high]
