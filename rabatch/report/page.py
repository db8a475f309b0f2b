"""A run as one HTML file: nothing is loaded from elsewhere, nothing in it is executed, every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from rabatch.report import plots
from rabatch.report.run import Run, versions
from rabatch.report.statistics import Distribution, Phase, Series
from rabatch.report.style import STYLE

_BINS = 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(run: Run) -> bytes:
    """The page, UTF-8."""
    sections = [_phase(number, phase) for number, phase in enumerate(run.phases)]
    error = f'<p class="note">The run failed. {escape(run.error)}</p>' if run.error else ""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(run.title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(run.title)}</h1>{_pairs(run.facts())}{error}</header>
<main>
{"".join(sections)}
{_settings(run)}
</main>
<footer>Written by rabatch on {made}.</footer>
</body>
</html>
"""
    return page.encode("utf-8", "replace")


def _phase(number: int, phase: Phase) -> str:
    figures = "".join(_figures(f"p{number}", phase))
    return (
        f'<section><h2>{escape(phase.name.capitalize())}</h2><dl class="tiles">{"".join(_tiles(phase))}</dl>'
        f"{_warning(phase)}"
        f'<div class="figures">{figures}</div>{_failures(phase)}</section>'
    )


def _warning(phase: Phase) -> str:
    if not phase.unfinished:
        return ""
    return f'<p class="note">Stopped early: {phase.unfinished:,} {phase.unit} were not finished.</p>'


def _tiles(phase: Phase) -> Iterable[str]:
    for status, count in phase.counts.items():
        warn = ' class="warn"' if status == "failed" and count else ""
        yield f"<div{warn}><dt>{escape(status)}</dt><dd>{count:,}</dd></div>"
    found = {f"{phase.token_kind} tokens": f"{phase.n_tokens:,}"}
    if phase.stored_bytes:
        found["stored"] = _bytes(phase.stored_bytes)
    if phase.elapsed_s:
        found["wall time"] = _seconds(phase.elapsed_s)
        if phase.tokens.total:
            found["tokens per second"] = _short(phase.tokens.total / phase.elapsed_s)
    if phase.latency.count:
        found["seconds per answer, median"] = _seconds(phase.latency.quantile(0.5))
        found["95 % below"] = _seconds(phase.latency.quantile(0.95))
    if phase.attended.count:
        found["keys attended, mean"] = _percent(phase.attended.mean)
    if phase.recall.count:
        found["recall, mean of samples"] = _percent(phase.recall.mean)
    for kind, seconds in phase.seconds.items():
        found[f"{kind}, all workers"] = _seconds(seconds)
    for name, value in found.items():
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _figures(prefix: str, phase: Phase) -> Iterable[str]:
    if phase.rows.total:
        unit = phase.unit
        yield _over_time(f"{prefix}rows", f"{unit.capitalize()} over time", phase, phase.rows, unit)
        title = f"{phase.token_kind.capitalize()} tokens over time"
        yield _over_time(f"{prefix}tokens", title, phase, phase.tokens, f"{phase.token_kind} tokens")
    for name, title, of, x_label, form in (
        ("latency", "Seconds per answer", phase.latency, "seconds, logarithmic", _seconds),
        ("attended", "Share of the keys attended", phase.attended, "share of the context's keys", _percent),
        ("recall", "Recall of searches, sampled", phase.recall, "share of the exact top-k found", _percent),
    ):
        if of.count:
            yield _distribution(
                f"{prefix}{name}", title, of, phase.unit if name != "recall" else "samples", x_label, form
            )


def _over_time(name: str, title: str, phase: Phase, series: Series, unit: str) -> str:
    # So few bars that most hold several rows: a bar per row would only show that rows come one by one.
    bins = max(4, min(_BINS, round(phase.rows.total / 2)))
    rates = series.rates(phase.elapsed_s, bins=bins)
    minutes = max(rate for *_, rate in rates) < 1
    scale, per = (60, "minute") if minutes else (1, "second")
    rows = [(start, end, scale * rate) for start, end, rate in rates]
    done, table = 0.0, []
    for start, end, rate in rates:
        done += rate * (end - start)
        table.append((f"{_clock(start)} to {_clock(end)}", f"{scale * rate:,.4g}", f"{done:,.0f}"))
    mean = series.total / phase.elapsed_s if phase.elapsed_s else 0.0
    about = f"{series.total:,.0f} {unit} in {_seconds(phase.elapsed_s)}, {_short(scale * mean)} per {per} on average"
    svg = plots.bars(
        rows,
        name=name,
        title=title,
        about=about,
        x_label="time since the phase began",
        x_format=_clock,
        y_format=_short,
        scale="time",
    )
    return _figure(title, f"{unit} per {per}", about, svg, ("time", f"per {per}", "so far"), table)


def _distribution(name: str, title: str, of: Distribution, unit: str, x_label: str, form: plots.Format) -> str:
    rows = [(start, end, float(count)) for start, end, count in of.bars(bins=_BINS)]
    about = (
        f"{of.count:,} {unit}: median {form(of.quantile(0.5))}, 95 % below {form(of.quantile(0.95))}, "
        f"{form(of.least)} to {form(of.greatest)}"
    )
    svg = plots.bars(
        rows,
        name=name,
        title=title,
        about=about,
        x_label=x_label,
        x_format=form,
        y_format=_short,
        scale="log" if of.logarithmic else "share",
    )
    table = [(f"{form(start)} to {form(end)}", f"{count:,.0f}") for start, end, count in rows if count]
    return _figure(title, unit, about, svg, (x_label, unit), table)


def _figure(title: str, y_label: str, about: str, svg: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return (
        f'<figure><figcaption><h3>{escape(title)}</h3><p class="unit">{escape(y_label)}</p></figcaption>{svg}'
        f'<p class="about">{escape(about)}.</p><details><summary>Table</summary>{_table(head, rows)}</details></figure>'
    )


def _failures(phase: Phase) -> str:
    if not phase.failures.counts:
        return f'<p class="none">No {escape(phase.unit)} failed.</p>'
    ranked = phase.failures.counts.most_common()
    most = ranked[0][1]
    rows = "".join(
        f'<tr><td class="number">{count:,}</td><td class="bar" aria-hidden="true">{plots.share_bar(count / most)}</td>'
        f"<td>{escape(kind)}</td><td><code>{escape(phase.failures.examples[kind])}</code></td></tr>"
        for kind, count in ranked
    )
    head = '<th scope="col">rows</th><th aria-hidden="true"></th><th scope="col">reason</th>'
    head += '<th scope="col">for example</th>'
    return (
        '<h3>Failures by reason</h3><div class="scroll"><table class="failures">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _settings(run: Run) -> str:
    groups = {**run.settings, "versions": versions()}
    made = "".join(f"<div><h3>{escape(name)}</h3>{_pairs(_flat(values))}</div>" for name, values in groups.items())
    return f'<section><h2>Settings and versions</h2><div class="settings">{made}</div></section>'


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = "none" if value is None else str(value)
    return found


def _pairs(values: dict[str, str]) -> str:
    made = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="pairs">{made}</dl>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _short(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for size, sign in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.0f} bytes"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 120 else _clock(value)


def _clock(value: float) -> str:
    seconds = round(value)
    if seconds < 120:
        return f"{value:.3g} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} h" if hours else f"{minutes}:{seconds:02} min"
