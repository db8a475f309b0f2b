"""What an evaluation shows: cells, tables for people and the page, in a browser too."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

from rabatch.evaluation import plots
from rabatch.evaluation.intervals import Estimate
from rabatch.evaluation.metrics import cells_of, over_depths, over_tasks
from rabatch.evaluation.page import page
from rabatch.evaluation.predictions import PREDICTIONS, prediction, refused
from rabatch.evaluation.questions import Question
from rabatch.evaluation.summary import markdown, score_text, table_lines
from tests.rabatch import browser

HOSTILE = "<script>alert(1)</script>"


def answered(question, recipe, rng, *, failed=False):
    row = dict.fromkeys(PREDICTIONS.names)
    row |= {"status": "failed", "reason": "document 'x' is 7 tokens too long"}
    if not failed:
        right = rng.random() < 0.8
        row |= {"status": "ok", "reason": None, "answer": f"it is {question.answers[0] if right else 'none'}"}
        row |= {"attended_share": 0.02 + 0.1 * len(recipe), "seconds": 0.5, "answer_tokens": 4, "fingerprint": "f"}
    return prediction(recipe, question, row)


def an_evaluation(recipes, *, lengths=(4096, 8192), stored=None):
    rng, rows = random.Random(0), []
    for task in ("niah_depth", "vt"):
        for length in lengths:
            for index in range(22):
                document = f"{task}/{length}/{index}"
                depths = (index % 11 / 10,) if task == "niah_depth" else (0.1, 0.5)
                about = {"answers": (str(index + 1000),), "expected": str(index), "depths": depths}
                question = Question(f"{document}/0", document, task, length, index, "Who?", **about)
                rows += [answered(question, name, rng, failed=name == HOSTILE and index < 3) for name in recipes]
    rows += refused(recipes[0], [Question("f:1", None, "vt", lengths[0], 0, error=f"context {HOSTILE}")])
    sizes = {
        (t, n, r): 1000.0 + 50 * place for t in ("niah_depth", "vt") for n in lengths for place, r in enumerate(recipes)
    }
    cells = cells_of(
        rows, stored=sizes if stored is None else stored, recall={("vt", lengths[0], recipes[0]): (4, 3.0)}
    )
    return cells, over_tasks(cells), rows


SETTINGS = {"model": {"name": HOSTILE}, "samples": 22, "tasks": ["niah_depth", "vt"]}
TEN = (
    *("dense", "streaming", "graph", "scan", "flat", "graph:top_k=50", "graph:top_k=20:budget=fixed"),
    *("duo+graph", "snapkv", HOSTILE),
)


def test_cells_count_what_failed_and_what_was_not_asked():
    cells, means, rows = an_evaluation(("dense", HOSTILE))
    found = {(cell.task, cell.length, cell.recipe): cell for cell in cells}
    assert len(cells) == 8
    first = found["vt", 4096, "dense"]
    assert (first.questions, first.contexts, first.failed) == (23, 22, 1)
    assert first.failures == {"context <script>alert(N)</script>": 1}
    mine = [row["score"] for row in rows if (row["task"], row["length"], row["recipe"]) == ("vt", 4096, "dense")]
    scored = [score for score in mine if score is not None]
    assert len(scored) == 22
    assert first.score.mean == pytest.approx(sum(scored) / 22)
    assert (first.recall, first.recall_samples) == (0.75, 4)
    assert first.seconds_per_token == 0.125
    assert first.difference is None
    for cell in cells:
        if cell.recipe == HOSTILE:
            other = found[cell.task, cell.length, "dense"]
            assert cell.difference.mean == pytest.approx(cell.score.mean - other.score.mean)
            assert cell.difference.low <= cell.difference.mean <= cell.difference.high
    hostile = found["vt", 8192, HOSTILE]
    assert (hostile.questions, hostile.failed) == (22, 3)
    assert hostile.failures == {"document … is N tokens too long": 3}
    assert [cell.recipe for cell in means] == ["dense", HOSTILE] * 2
    assert means[0].score.mean == pytest.approx((first.score.mean + found["niah_depth", 4096, "dense"].score.mean) / 2)
    json.dumps([cell.to_dict() for cell in cells], allow_nan=False)


def test_depths_are_those_of_single_needles():
    _, _, rows = an_evaluation(("dense",))
    found = over_depths(rows)["dense"]
    assert set(found) == {(depth, length) for depth in range(11) for length in (4096, 8192)}
    assert all(count == 2 for _, count in found.values())
    other = over_depths([row for row in rows if row["task"] == "vt"])
    assert other == {}


def test_tables_for_people():
    cells, means, _ = an_evaluation(("dense", "graph|x"))
    text = markdown(cells, means, SETTINGS)
    assert "## Contexts of 4K tokens" in text
    assert "graph\\|x" in text
    assert "## Failures by reason" in text
    rows = [line for line in text.splitlines() if line.startswith("| vt")]
    assert len(rows) == 2
    assert score_text(Estimate(0.95, 0.882, 0.981)) == "95.0 (88.2-98.1)"
    assert score_text(None) == "-"
    lines = table_lines(cells, means)
    assert lines[0].startswith("4K tokens")
    assert max(map(len, lines)) < 140


def test_the_page_escapes_and_names_every_plot():
    cells, means, rows = an_evaluation(TEN)
    text = page(cells, means, rows, SETTINGS).decode()
    assert "<script" not in text
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 2 * 2 + len(TEN)
    for figure in figures:
        named = re.search(r'aria-labelledby="(\S+) (\S+)"', figure)
        assert all(text.count(f'id="{name}"') == 1 for name in named.groups())
        assert figure.count("<details>") == 1


def test_a_page_without_anything_to_plot():
    cells, means, rows = an_evaluation(("dense",), stored={})
    assert page(cells, means, rows, {}).count(b"<figure>") == 2 + 1
    failed = [row | {"score": None, "status": "failed", "reason": "x", "attended_share": None} for row in rows]
    none = cells_of(failed, stored={}, recall={})
    assert page(none, over_tasks(none), failed, {}).count(b"<figure>") == 0
    assert page([], [], [], {}).count(b"<figure>") == 0


def test_marks_never_hide_each_other():
    spots = [(200.0, 30.0)] * 10 + [(52.0, 12.0), (380.0, 170.0)]
    places = plots._apart(spots)
    assert places[0] == spots[0]
    gaps = [math.dist(a, b) for n, a in enumerate(places) for b in places[n + 1 :]]
    assert min(gaps) >= 2 * plots._RADIUS
    assert all(0 < x < plots.WIDTH and 0 < y < plots.HEIGHT for x, y in places)


def test_the_page_in_a_browser(tmp_path):
    if browser.found() is None:
        pytest.skip(browser.MISSING)
    path = tmp_path / "report.html"
    cells, means, rows = an_evaluation(TEN, lengths=(2048, 4096, 8192))
    path.write_bytes(page(cells, means, rows, SETTINGS))
    for found, _ in browser.looks(path, _LOOK):
        assert len(found["plots"]) == 3 * 2 + len(TEN)
        for plot in found["plots"]:
            assert plot["width"] >= 250
            assert plot["outside"] == 0
            assert plot["overlaps"] == 0
            assert plot["marks"] == len(TEN) or plot["cells"] == 33
            assert plot["contrast"] >= 4.5


_LOOK = """
const box = e => e.getBoundingClientRect();
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const rgb = color => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const linear = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  return .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
};
const contrast = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
return {
  scripts: document.scripts.length,
  page: document.documentElement.scrollWidth,
  window: innerWidth,
  plots: [...document.querySelectorAll("figure > svg")].map(svg => {
    const all = box(svg), text = [...svg.querySelectorAll("text")];
    const texts = text.map(box), marks = [...svg.querySelectorAll("circle.mark")].map(box);
    const off = b => Math.max(all.left - b.left, b.right - all.right, all.top - b.top, b.bottom - all.bottom) > 1;
    const track = svg.querySelector(".track"), heats = [...svg.querySelectorAll(".heat")];
    const under = track ? rgb(getComputedStyle(track).fill) : rgb(getComputedStyle(svg.querySelector(".mark")).fill);
    const ink = rgb(getComputedStyle(svg.querySelector(".heat-value, .mark-name")).fill);
    const grounds = [under, ...heats.map(h => {
      const over = rgb(getComputedStyle(h).fill), a = Number(h.getAttribute("fill-opacity"));
      return under.map((c, i) => a * over[i] + (1 - a) * c);
    })];
    return {
      width: all.width, marks: marks.length, cells: svg.querySelectorAll("rect.track").length,
      outside: [...texts, ...marks].filter(off).length,
      overlaps: texts.filter((a, i) => texts.slice(i + 1).some(b => !apart(a, b))).length,
      contrast: Math.min(...grounds.map(ground => contrast(ground, ink))),
    };
  }),
};
"""
