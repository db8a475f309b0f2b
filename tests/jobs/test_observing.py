"""What is seen of a job: progress, Ray's metrics, the report."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rabatch.cli import main
from rabatch.config import BuildConfig, GenerationSettings, Resources
from rabatch.errors import ConfigError, FailedRowsError
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.observing import Observer
from rabatch.jobs.progress import clock, showing
from rabatch.report.collect import collect
from rabatch.storage.answers import AnswerStore
from rabatch.storage.store import IndexStore

ROOT = Path(__file__).parents[2]
WORDS = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "
SMALL = BuildConfig(sink_tokens=16, window_tokens=64)
SHORT = GenerationSettings(max_new_tokens=4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with showing("build", "documents", 4, stream=out) as progress:
        progress.advance(tokens=100)
        progress.advance(failed=True)
    last = out.getvalue().split("\r")[-1]
    assert "build" in last
    assert "2/4" in last
    assert re.search(r"1 failed, [\d,]+ tokens/s", last)


def test_a_log_gets_lines_now_and_then():
    out = io.StringIO()
    with showing("answer", "answers", 4, stream=out, every_s=0.05) as progress:
        progress.advance(tokens=8)
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(3):
            progress.advance(tokens=8)
    first, *_, last = out.getvalue().splitlines()
    assert re.fullmatch(r"answer: 1 of 4 answers, 0 failed, [\d,]+ tokens/s, \d+ s so far, \d+ s left", first)
    assert re.fullmatch(r"answer: 4 of 4 answers, 0 failed, [\d,]+ tokens/s, \d+ s so far", last)


def test_what_is_over_soon_or_unwanted_writes_nothing():
    out, terminal = io.StringIO(), Terminal()
    with showing("answer", "answers", 1, stream=out) as progress:
        progress.advance()
    with showing("answer", "answers", 1, visible=False, stream=terminal) as progress:
        progress.advance()
    assert (out.getvalue(), terminal.getvalue()) == ("", "")
    assert [clock(s) for s in (0.2, 59.5, 187, 7500)] == ["1 s", "1:00 min", "3:07 min", "2:05:00 h"]


@pytest.fixture(scope="module")
def watched(local_ray, tmp_path_factory):
    """A build and its answering with one observer, hostile names among them, and the report they left."""
    folder = tmp_path_factory.mktemp("watched")
    documents = [
        {"document_id": "good", "text": WORDS * 20},
        {"document_id": "<script>alert('id')</script>", "text": " "},
        {"document_id": "better", "text": WORDS * 25},
    ]
    questions = [
        {"question_id": "<img src=x onerror=alert(1)>", "question": "Who counts?", "document_id": "good"},
        {"question_id": "q2", "question": "What & where?", "document_id": "better"},
        {"question_id": "<b>lost</b>", "question": "Who?", "document_id": "\"nowhere'"},
    ]
    report = folder / "report.html"
    with Observer("run & report", progress=False, report_html=report) as watch:
        built = build(documents, store=folder / "index", config=SMALL, observer=watch)
        asked = {"store": folder / "index", "generation": SHORT, "output": folder / "answers"}
        asked["resources"] = Resources(recall_share=1.0)
        answered = answer(questions, **asked, observer=watch)
        again = answer(questions, **asked, observer=watch)
    return watch.run, report, built, answered, again


def test_the_observer_counts_what_the_result_says(watched):
    run, _, built, answered, again = watched
    of_build, of_answers, of_rerun = run.phases
    assert of_build.counts == {"built": 2, "failed": 1}
    assert (of_build.n_tokens, of_build.stored_bytes) == (built.tokens, built.stored_bytes)
    assert (of_build.rows.total, of_build.tokens.total) == (2, built.tokens)
    assert min(of_build.seconds[kind] for kind in ("prefill", "graph", "write")) > 0
    assert of_build.fingerprints == {built.fingerprint: 2}
    ok = [row for row in answered.rows if row["status"] == "ok"]
    assert of_answers.counts == {"answered": 2, "failed": 1, "reused": 0}
    assert of_answers.n_tokens == sum(row["answer_tokens"] for row in ok)
    assert of_answers.latency.total == pytest.approx(sum(row["seconds"] for row in ok))
    assert of_answers.attended.mean == pytest.approx(answered.attended_share)
    assert of_answers.recall.count >= 12  # one per pass and full layer
    assert 0.5 < of_answers.recall.mean <= 1
    assert sum(of_answers.failures.counts.values()) == 1
    assert (again.reused, of_rerun.counts) == (2, {"reused": 2, "failed": 1})
    assert [phase.unfinished for phase in run.phases] == [0, 0, 0]


def test_the_report_says_so_and_escapes_names(watched):
    _, path, built, *_ = watched
    page = path.read_text()
    for text in (
        "run &amp; report",
        built.fingerprint,
        "&lt;script&gt;alert(&#x27;id&#x27;)&lt;/script&gt;",
        "text is empty",
    ):
        assert text in page
    assert "<script" not in page
    assert "onerror" not in page.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    assert re.findall(r"""\b(?:src|href|url)\s*[=(]\s*"?([^"\s>]*)""", re.sub(r"&[#\w]+;", "", page)) == ["data:,"]
    n_plots = page.count('role="img"')
    assert n_plots == 2 + 5  # the rerun had nothing to do
    assert page.count("<figure>") == page.count("<details>") == n_plots


def test_a_page_about_the_stores(watched, tmp_path, capsys):
    run, path, built, *_ = watched
    store, answers = (str(path.parent / name) for name in ("index", "answers"))
    page = tmp_path / "page.html"
    assert main(["report", "--store", store, "--answers", answers, "--report-html", str(page), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"build": {"indexed": 2}, "answer": {"answered": 2, "failed": 1}}
    text = page.read_text()
    assert built.fingerprint in text
    assert text.count("<figure>") == 2 + 2  # when answers were given is not known
    made = collect(IndexStore(store), AnswerStore(answers))
    assert [phase.n_tokens for phase in made.phases] == [phase.n_tokens for phase in run.phases[:2]]
    assert made.phases[0].stored_bytes == built.stored_bytes
    assert main(["report", "--store", store, "--report-html", str(page)]) == 0
    assert main(["report"]) == 2
    assert main(["report", "--store", store, "--report-html", str(tmp_path / "page.pdf")]) == 2
    capsys.readouterr()


def test_a_run_that_stops_leaves_a_report(local_ray, tmp_path):
    documents = [{"document_id": str(number), "text": ""} for number in range(5)]
    report = tmp_path / "r.html"
    with pytest.raises(FailedRowsError), Observer(progress=False, report_html=report) as watch:
        build(documents, store=tmp_path / "index", config=SMALL, max_failed_rows=2, observer=watch)
    page = report.read_text()
    assert "The run failed. FailedRowsError: max_failed_rows = 2" in page
    assert watch.run.phases[0].failures.counts.total() == 3


def test_a_report_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"report_html = 'r.pdf': must end in .html"):
        Observer(report_html="r.pdf")


_METRICS = """
import json, socket, sys, time, urllib.request
import ray
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init("local", num_cpus=4, include_dashboard=False, _metrics_export_port=port, log_to_driver=False,
         _system_config={"metrics_report_interval_ms": 500})
from rabatch.config import BuildConfig, GenerationSettings
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
words = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "
documents = [{"document_id": f"d{n}", "text": words * n} for n in (20, 0, 25)]
built = build(documents, store="index", config=BuildConfig(sink_tokens=16, window_tokens=64), progress=False)
asked = [{"question_id": f"q{n}", "question": "Who counts?", "document_id": f"d{n}"} for n in (20, 25, 7)]
short = GenerationSettings(max_new_tokens=4)
answered = answer(asked, store="index", output="answers", generation=short, progress=False)
deadline = time.monotonic() + 60
text = ""
while time.monotonic() < deadline and "ray_rabatch_attended_share_count" not in text:
    time.sleep(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
tokens = sum(row["answer_tokens"] or 0 for row in answered.rows)
print(json.dumps({"text": text, "tokens": built.tokens, "bytes": built.stored_bytes, "generated": tokens}))
"""


@pytest.mark.slow
def test_prometheus_reads_the_counters(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", _METRICS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])

    def value(name, **tags):
        found = [line for line in told["text"].splitlines() if line.startswith(f"ray_rabatch_{name}{{")]
        found = [line for line in found if all(f'{tag}="{is_}"' in line for tag, is_ in tags.items())]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    assert value("documents_total", status="built") == 2
    assert value("documents_total", status="failed") == 1
    assert value("failures_total", phase="build") == 1
    assert value("answers_total", status="answered") == 2
    assert value("failures_total", phase="answer") == 1
    assert value("tokens_total", kind="context") == told["tokens"]
    assert value("tokens_total", kind="generated") == told["generated"]
    assert value("stored_bytes_total") == told["bytes"]
    assert min(value("work_seconds_total", kind=kind) for kind in ("prefill", "graph", "write", "answer")) > 0
    assert value("answer_seconds_count") == value("attended_share_count") == 2
    assert value("rows_left", phase="answer") == 0
