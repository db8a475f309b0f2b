"""What pages are made of: nothing is loaded from elsewhere, nothing is executed, every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from rabatch.report.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, header: str, main: str) -> bytes:
    """A page, UTF-8.

    Args:
        header, main: HTML.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{header}</header>
<main>
{main}
</main>
<footer>Written by rabatch on {made}.</footer>
</body>
</html>
"""
    return page.encode("utf-8", "replace")


def figure(title: str, y_label: str, about: str, svg: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plot with its title, what it says in words, and its numbers as a table."""
    return (
        f'<figure><figcaption><h3>{escape(title)}</h3><p class="unit">{escape(y_label)}</p></figcaption>{svg}'
        f'<p class="about">{escape(about)}.</p><details><summary>Table</summary>{table(head, rows)}</details></figure>'
    )


def settings(groups: dict[str, dict[str, Any]]) -> str:
    """A section of settings: by heading, names and values."""
    made = "".join(f"<div><h3>{escape(name)}</h3>{pairs(flat(values))}</div>" for name, values in groups.items())
    return f'<section><h2>Settings and versions</h2><div class="settings">{made}</div></section>'


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = "none" if value is None else str(value)
    return found


def pairs(values: dict[str, str]) -> str:
    """Names and what they are."""
    made = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="pairs">{made}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def short(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def byte_count(value: float) -> str:
    """Bytes with a unit."""
    for size, sign in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.0f} bytes"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.3g} %"


def duration(value: float) -> str:
    """Seconds with a unit."""
    if math.isnan(value):
        return "-"
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 120 else clock(value)


def clock(value: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(value)
    if whole < 120:
        return f"{value:.3g} s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02} h" if hours else f"{minutes}:{whole:02} min"
