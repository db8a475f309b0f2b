"""Gates as a picture: a cell per layer and KV head, an SVG file that brings its style sheet, for light and dark."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 64, 34, 42
_LEAST_WIDTH = 400  # as the plots of a report
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


def picture(gates: NDArray[np.float64], model: str) -> str:
    """SVG text. Gates are [n_layers, n_kv_heads] in [0, 1]: the darker, the more a head needs the whole context."""
    n_rows, n_columns = gates.shape
    cell = min(_MAX_CELL, max(_MIN_CELL, (_LEAST_WIDTH - _LEFT - _RIGHT) / n_columns))
    right, bottom = _LEFT + cell * n_columns, _TOP + cell * n_rows
    width, height = max(_LEAST_WIDTH, round(right + _RIGHT)), round(bottom + _BOTTOM)
    title = f"Gates of {model}"
    about = f"{(gates >= 0.5).sum()} of {gates.size} gates are 0.5 or more"
    parts = [f'<text class="title" x="{_LEFT}" y="20">{escape(title)}</text>']
    for (row, column), gate in np.ndenumerate(gates):
        parts.append(_cell(float(gate), _LEFT + cell * column, _TOP + cell * row, cell))
    for at in _some(n_columns):
        x = _LEFT + cell * (at + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{at}</text>')
    for at in _some(n_rows):
        parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + cell * (at + 0.5) + 4:.1f}" text-anchor="end">{at}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.1f}" y="{height - 8}" text-anchor="middle">KV head</text>')
    down = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {down:.1f})"'
    parts.append(f'<text x="14" y="{down:.1f}" text-anchor="middle" {turned}>layer</text>')
    parts += _legend(right + 16, _TOP, min(100.0, bottom - _TOP))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="t a">'
        f'<title id="t">{escape(title)}</title><desc id="a">{escape(about)}</desc><style>{_STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )


def _cell(gate: float, x: float, y: float, size: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
    made = f'<rect class="cell" {place} fill-opacity="{gate:.3f}"/><rect class="frame" {place}/>'
    if size >= _READABLE:
        on = " on" if gate > 0.6 else ""
        middle = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
        made += f'<text class="number{on}" {middle} text-anchor="middle">{gate:.2f}</text>'
    return made


def _some(count: int) -> range:
    """Numbers to be written beside an axis, evenly, as many as are readable."""
    return range(0, count, -(-count // _MAX_NAMES))


def _legend(x: float, y: float, tall: float) -> list[str]:
    parts, steps = [], 10
    for step in range(steps):
        place = f'x="{x:.1f}" y="{y + tall * step / steps:.1f}" width="12" height="{tall / steps:.1f}"'
        parts.append(f'<rect class="cell" {place} fill-opacity="{1 - (step + 0.5) / steps:.2f}"/>')
    parts.append(f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="12" height="{tall:.1f}"/>')
    parts += [f'<text x="{x + 16:.1f}" y="{at:.1f}">{text}</text>' for at, text in ((y + 10, "1"), (y + tall, "0"))]
    return parts
