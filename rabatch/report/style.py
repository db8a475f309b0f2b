"""The style sheet of the report: light and dark, narrow and wide."""

STYLE = """
:root { --page: #f6f7f8; --card: #fff; --text: #1c2126; --soft: #5a646e; --line: #dde1e5; --bar: #2f6f9f;
  --bad: #b3402e; --track: #eceff1; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #14181b; --card: #1d2327; --text: #e6e9eb; --soft: #a2adb6;
  --line: #343c42; --bar: #6fb1dd; --bad: #ee8a76; --track: #2a3136; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem clamp(0.75rem, 3vw, 2.5rem) 3rem; max-width: 92rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
dl { margin: 0; }
dt { color: var(--soft); font-size: 0.86rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.pairs > div { display: grid; grid-template-columns: minmax(7rem, 13rem) 1fr; gap: 0.75rem; padding: 0.1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.6rem;
  margin-bottom: 1rem; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.75rem; }
.tiles dd { font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles .warn dd { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.9rem;
  min-width: 0; max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; }
.unit, .about { color: var(--soft); font-size: 0.86rem; margin: 0; }
svg text { fill: var(--soft); font-size: 12.5px; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); }
svg .bar { fill: var(--bar); }
svg .bad { fill: var(--bad); }
svg .track { fill: var(--track); }
svg .whisker { stroke: var(--soft); stroke-opacity: 0.5; }
svg .spot { fill: var(--soft); }
svg .mark { fill: var(--card); stroke-width: 2; }
svg text.mark-name { fill: var(--text); font-size: 11px; stroke: none; }
svg .heat { fill: var(--bar); }
svg text.heat-value { fill: var(--text); font-size: 10.5px; }
.series-0 { stroke: #0072b2; } .series-1 { stroke: #d55e00; } .series-2 { stroke: #009e73; }
.series-3 { stroke: #cc79a7; } .series-4 { stroke: #e69f00; } .series-5 { stroke: #56b4e9; }
.series-6 { stroke: #9467bd; } .series-7 { stroke: #8c564b; } .series-8 { stroke: #7f7f7f; }
.series-9 { stroke: #6b8e23; }
.legend { display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; margin: 0.35rem 0; padding: 0; list-style: none;
  font-size: 0.86rem; }
.legend svg { display: inline-block; width: 1.3rem; height: 1.3rem; vertical-align: -0.3rem; margin-right: 0.3rem; }
td.total { border-top: 2px solid var(--line); }
svg.share { display: block; width: 6rem; height: 0.7rem; }
details { margin-top: 0.5rem; }
summary { cursor: pointer; color: var(--soft); font-size: 0.86rem; }
.scroll { overflow-x: auto; max-height: 24rem; overflow-y: auto; }
section > .scroll { max-height: none; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; }
td.number { text-align: right; }
.failures td { overflow-wrap: anywhere; }
.failures td.bar { padding-top: 0.6rem; width: 7.5rem; }
code { font: 0.92em ui-monospace, "DejaVu Sans Mono", monospace; }
section > h3 { margin: 1.25rem 0 0.5rem; }
.note { border-left: 3px solid var(--bad); padding-left: 0.75rem; }
.none { color: var(--soft); margin: 1rem 0 0; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem;
  font-size: 0.9rem; }
.settings h3 { margin-bottom: 0.25rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: 0.86rem; }
@media (max-width: 34rem) { .pairs > div { grid-template-columns: 1fr; gap: 0; padding: 0.2rem 0; }
  .failures thead { display: none; } .failures tr { display: block; padding: 0.6rem 0.75rem;
  border-bottom: 1px solid var(--line); } .failures td { display: block; border: 0; padding: 0.1rem 0;
  text-align: left; } .failures td.bar { width: auto; } }
"""
