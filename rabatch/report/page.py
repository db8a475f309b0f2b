"""A run as one HTML file: nothing is loaded from elsewhere, nothing in it is executed, every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rabatch.report import html, plots
from rabatch.report.run import Run, versions
from rabatch.report.statistics import Distribution, Phase, Series

_BINS = 40


def render(run: Run) -> bytes:
    """The page, UTF-8."""
    sections = [_phase(number, phase) for number, phase in enumerate(run.phases)]
    error = f'<p class="note">The run failed. {escape(run.error)}</p>' if run.error else ""
    sections.append(html.settings({**run.settings, "versions": versions()}))
    return html.document(run.title, html.pairs(run.facts()) + error, "\n".join(sections))


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
        found["stored"] = html.byte_count(phase.stored_bytes)
    if phase.elapsed_s:
        found["wall time"] = html.duration(phase.elapsed_s)
        if phase.tokens.total:
            found["tokens per second"] = html.short(phase.tokens.total / phase.elapsed_s)
    if phase.latency.count:
        found["seconds per answer, median"] = html.duration(phase.latency.quantile(0.5))
        found["95 % below"] = html.duration(phase.latency.quantile(0.95))
    if phase.attended.count:
        found["keys attended, mean"] = html.percent(phase.attended.mean)
    if phase.recall.count:
        found["recall, mean of samples"] = html.percent(phase.recall.mean)
    for kind, seconds in phase.seconds.items():
        found[f"{kind}, all workers"] = html.duration(seconds)
    for name, value in found.items():
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _figures(prefix: str, phase: Phase) -> Iterable[str]:
    if phase.rows.total:
        unit = phase.unit
        yield _over_time(f"{prefix}rows", f"{unit.capitalize()} over time", phase, phase.rows, unit)
        title = f"{phase.token_kind.capitalize()} tokens over time"
        yield _over_time(f"{prefix}tokens", title, phase, phase.tokens, f"{phase.token_kind} tokens")
    for name, title, of, x_label, form in (
        ("latency", "Seconds per answer", phase.latency, "seconds, logarithmic", html.duration),
        ("attended", "Share of the keys attended", phase.attended, "share of the context's keys", html.percent),
        ("recall", "Recall of searches, sampled", phase.recall, "share of the exact top-k found", html.percent),
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
        table.append((f"{html.clock(start)} to {html.clock(end)}", f"{scale * rate:,.4g}", f"{done:,.0f}"))
    mean = series.total / phase.elapsed_s if phase.elapsed_s else 0.0
    about = f"{series.total:,.0f} {unit} in {html.duration(phase.elapsed_s)}, "
    about += f"{html.short(scale * mean)} per {per} on average"
    svg = plots.bars(
        rows,
        name=name,
        title=title,
        about=about,
        x_label="time since the phase began",
        x_format=html.clock,
        y_format=html.short,
        scale="time",
    )
    return html.figure(title, f"{unit} per {per}", about, svg, ("time", f"per {per}", "so far"), table)


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
        y_format=html.short,
        scale="log" if of.logarithmic else "share",
    )
    table = [(f"{form(start)} to {form(end)}", f"{count:,.0f}") for start, end, count in rows if count]
    return html.figure(title, unit, about, svg, (x_label, unit), table)


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
