"""The report: numbers of bounded size, a page that loads nothing and runs nothing."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rabatch.report import plots
from rabatch.report.page import render
from rabatch.report.run import Run, versions
from rabatch.report.statistics import MAX_BINS, MAX_KINDS, OTHER, Distribution, Failures, Phase, Series, kind_of
from tests.rabatch import browser

HOSTILE = "<script>document.title = 'changed'</script>"
NAMES = (
    HOSTILE,
    '"><img src=http://127.0.0.1:9/x onerror=alert(1)>',
    "</style></title><svg onload=alert(2)>",
    "名前 & <b>",
)


def test_a_series_keeps_sums_however_long_it_runs():
    series, random_ = Series(), random.Random(0)
    events = [(random_.uniform(0, 50_000), random_.random()) for _ in range(2000)]
    for at_s, amount in events:
        series.add(at_s, amount)
    assert series.total == pytest.approx(sum(amount for _, amount in events))
    rates = series.rates(50_000, bins=40)
    assert len(rates) <= 40
    assert len(series._bins) <= MAX_BINS
    assert rates[-1][1] == 50_000
    for start, end, rate in rates:
        amount = sum(a for at_s, a in events if start <= at_s < end)
        assert rate == pytest.approx(amount / (end - start))


@pytest.mark.parametrize("logarithmic", [True, False])
def test_quantiles_are_right_to_a_bin(logarithmic):
    draw = np.random.default_rng(0)
    values = draw.lognormal(0, 1.5, 3000) if logarithmic else draw.beta(2, 5, 3000)
    found = Distribution(logarithmic=logarithmic)
    for value in values:
        found.add(float(value))
    assert found.count == 3000
    assert found.mean == pytest.approx(values.mean())
    assert (found.least, found.greatest) == (values.min(), values.max())
    for share in (0.05, 0.5, 0.95, 1.0):
        exact = float(np.quantile(values, share))
        allowed = 0.13 * exact if logarithmic else 0.006
        assert abs(found.quantile(share) - exact) <= allowed
    bars = found.bars(bins=40)
    assert sum(count for *_, count in bars) == 3000
    assert bars[0][0] <= values.min()
    assert values.max() <= bars[-1][1] * 1.0001
    assert math.isnan(Distribution(logarithmic=True).quantile(0.5))


def test_extreme_values_stay_in_the_bins():
    found = Distribution(logarithmic=True)
    for value in (0.0, 1e-9, 1e9):
        found.add(value)
    assert sum(count for *_, count in found.bars(bins=10)) == 3
    share = Distribution(logarithmic=False)
    share.add(1.0)
    assert share.bars(bins=10) == [(0.995, 1.0, 1)]


def test_kinds_of_failures_are_few_whatever_the_reasons():
    failures = Failures()
    for number in range(1000):
        failures.add(f"text = 'document {number}': has {number} tokens", f"d{number}")
    assert failures.counts == {"text = …: has N tokens": 1000}
    assert failures.examples == {"text = …: has N tokens": "d0"}
    for number in range(500):
        failures.add("reason " + "abcdefghij"[number % 10] * (number // 10 + 1), "x" * 5000)
    assert len(failures.counts) == MAX_KINDS + 1
    assert sum(failures.counts.values()) == 1500
    assert failures.counts[OTHER] > 0
    assert max(map(len, failures.examples.values())) <= 120
    assert len(kind_of("word " * 1000)) <= 160


def a_run(hostile: bool = True) -> Run:
    """A build and its answering, some rows failed, with every plot."""
    draw = random.Random(0)
    names = NAMES if hostile else ("a", "b", "c", "d")
    build = Phase("build", "documents", "context")
    answers = Phase("answer", "answers", "generated", elapsed_s=400)
    for number in range(200):
        work = {"prefill": 9.0, "graph": 4.0, "write": 0.2}
        build.finish(
            "built", "ab" * 32, tokens=draw.randint(2000, 9000), seconds=work, at_s=4.4 * number + draw.random()
        )
    build.stored_bytes, build.elapsed_s, build.unfinished = 4_000_000_000, 900, 3
    for number in range(1500):
        seconds = draw.lognormvariate(-1, 0.6)
        work = {"answer": seconds}
        answers.finish("answered", "cd" * 32, tokens=draw.randint(3, 40), seconds=work, at_s=number / 4)
        answers.latency.add(seconds)
        answers.attended.add(min(1.0, max(0.0, draw.gauss(0.086, 0.01))))
        answers.recall.add(min(1.0, draw.gauss(0.93, 0.03)))
    for phase in (build, answers):
        for number, name in enumerate(names):
            for _ in range(3 * number + 1):
                phase.counts["failed"] += 1
                phase.failures.add(f"a reason of {'abcd'[number]} {name if hostile else ''} that is mended soon", name)
    return Run(
        f"rabatch run {names[0]}",
        phases=[build, answers],
        places={"documents": f"s3://user:pass@bucket/{names[1]}", "store": names[2]},
        settings={names[3]: {"stop_strings": (names[0],), "model": {"name": names[1], "revision": None}}},
        error=names[2] if hostile else None,
    )


class Elements(HTMLParser):
    """All elements and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_what_is_data_stays_text():
    page = render(a_run()).decode()
    elements = Elements()
    elements.feed(page)
    assert not elements.tags & {"script", "img", "iframe", "object", "embed", "b"}
    assert [name for name, _ in elements.attributes if name.startswith("on") or name == "src"] == []
    assert [value for name, value in elements.attributes if name == "href"] == ["data:,"]
    text = "".join(elements.text)
    for name in NAMES:
        assert name in text
    assert "default-src 'none'" in page
    assert "user:pass" not in page


def test_every_plot_has_a_title_words_and_a_table():
    page = render(a_run(hostile=False)).decode()
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    assert len(figures) == 2 + 5
    for figure in figures:
        for part in ("<title id=", "<desc id=", "<h3>", 'scope="col"', "<details>"):
            assert figure.count(part) >= 1
        assert len(re.findall(r"<tr>", figure)) >= 3
        named = re.search(r'aria-labelledby="(\S+) (\S+)"', figure)
        assert all(page.count(f'id="{name}"') == 1 for name in named.groups())
    assert set(versions()) >= {"rabatch", "ray", "torch"}


def test_a_run_in_which_nothing_happened_is_a_page_too():
    phase = Phase("answer", "answers", "generated")
    assert "No answers failed" in render(Run("empty", phases=[phase])).decode()
    phase.finish("answered", None, tokens=0, seconds={"answer": 0.0}, at_s=0.0)
    phase.latency.add(0.0)
    phase.attended.add(1.0)
    assert render(Run("one", phases=[phase], began=None)).count(b"<figure>") == 4


@pytest.mark.parametrize("greatest", [0.0, 0.003, 1, 7, 1234.5, 9e11])
def test_axes_have_few_round_ticks_up_to_the_greatest(greatest):
    top, ticks = plots._axis(greatest)
    assert ticks[0] == 0
    assert top >= greatest
    assert ticks[-1] == pytest.approx(top)
    assert 2 <= len(ticks) <= 6


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [
        (0, 0.4, "time"),
        (0, 95, "time"),
        (0, 900, "time"),
        (0, 5e6, "time"),
        (0.005, 0.01, "share"),
        (0, 1, "share"),
        (0.04, 4.0, "log"),
        (1e-4, 1e5, "log"),
        (0.21, 0.24, "log"),
    ],
)
def test_ticks_lie_on_the_axis(low, high, scale):
    ticks = plots._x_ticks(low, high, scale)
    assert 2 <= len(ticks) <= 10
    assert all(low - 1e-9 <= tick <= high * 1.001 for tick in ticks)


@pytest.mark.slow
@pytest.mark.skipif(browser.found() is None, reason=browser.MISSING)
def test_a_browser_shows_it(tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(render(a_run()))
    for found, dark in browser.looks(path, _LOOK):
        assert found["title"] == f"rabatch run {HOSTILE}"
        assert len(found["plots"]) == 7
        for plot in found["plots"]:
            assert plot["width"] >= 250
            assert plot["height"] >= 130
            assert plot["bars"] >= 2
            assert plot["tallest"] > 0.3 * plot["height"]
            assert plot["outside"] == 0
            assert plot["overlaps"] == 0
        assert found["contrast"] >= 4.5
        assert found["dark"] is dark


_LOOK = """
const box = e => e.getBoundingClientRect();
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const light = color => {
  const linear = c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const [r, g, b] = color.match(/[\\d.]+/g).map(c => linear(c / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const page = light(getComputedStyle(document.body).backgroundColor);
const soft = light(getComputedStyle(document.querySelector("figure .about")).color);
return {
  title: document.title,
  scripts: document.scripts.length,
  page: document.documentElement.scrollWidth,
  window: innerWidth,
  dark: page < .2,
  contrast: (Math.max(page, soft) + .05) / (Math.min(page, soft) + .05),
  plots: [...document.querySelectorAll("figure > svg")].map(svg => {
    const all = box(svg), bars = [...svg.querySelectorAll(".bar")].map(box);
    const texts = [...svg.querySelectorAll("text")].map(box);
    const off = b => Math.max(all.left - b.left, b.right - all.right, all.top - b.top, b.bottom - all.bottom) > 1;
    return {
      width: all.width, height: all.height, bars: bars.length, tallest: Math.max(...bars.map(b => b.height)),
      outside: [...bars, ...texts].filter(off).length,
      overlaps: texts.filter((a, i) => texts.slice(i + 1).some(b => !apart(a, b))).length,
    };
  }),
};
"""
