"""The command line: exit codes, one-line errors, JSON on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rabatch.cli import main
from rabatch.demo.run import format_report, run_demo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_line(err):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("rabatch: error: ")
    return lines[0]


def test_help_is_fast():
    best = 60.0
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rabatch.cli", "--help"], cwd=ROOT, check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
        if best < 1:
            break
    assert best < 1


def test_corpus_as_json_and_for_people(cli, tmp_path):
    code, out, _ = cli("corpus", "--out", tmp_path / "a", "--documents", 2, "--tokens", 300, "--questions", 2, "--json")
    written = json.loads(out)
    assert (code, written["documents"], written["questions"]) == (0, 2, 4)
    arguments = ("--documents", 2, "--tokens", 300, "--questions", 2, "--kinds", "single", "--format", "parquet")
    code, out, _ = cli("corpus", tmp_path / "b", *arguments)
    assert code == 0
    assert out.splitlines()[1:] == [str(tmp_path / "b/documents.parquet"), str(tmp_path / "b/questions.parquet")]


def build_flags(demo_store):
    flags = [("--" + name.replace("_", "-"), value) for name, value in demo_store.static_set.items()]
    return ["--store", demo_store.store, *(item for flag in flags for item in flag)]


def test_build_of_what_is_built(cli, demo_store):
    code, out, _ = cli("build", demo_store.corpus["paths"]["documents"], *build_flags(demo_store))
    assert code == 0
    assert out.splitlines()[-1].startswith("built 0, skipped 3, failed 0 of 3 documents")
    code, out, _ = cli(
        "build", demo_store.corpus["paths"]["documents"], *build_flags(demo_store), "--limit", 2, "--json"
    )
    assert (code, json.loads(out)["skipped"]) == (0, 2)


def test_build_counts_failures_and_exits_1(cli, demo_store, tmp_path):
    rows = [*demo_store.documents, {"document_id": "bad\u202e", "text": " "}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = cli("build", tmp_path / "d.jsonl", *build_flags(demo_store))
    assert code == 1
    *_, failure, last = out.splitlines()
    assert failure == "failed: 'bad\\u202e' (d.jsonl:4): text is empty; leave the row out, or give it a text"
    assert last.startswith("built 0, skipped 3, failed 1 of 4 documents")


def test_answers_that_fail_exit_1(cli, demo_store, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who?", "document_id": "nowhere"}) + "\n")
    arguments = ("answer", tmp_path / "q.jsonl", "--store", demo_store.store, "--output", tmp_path / "out")
    code, out, _ = cli(*arguments)
    assert code == 1
    assert "document is not in the store" in out.splitlines()[-2]
    assert out.splitlines()[-1].startswith("answered 0, failed 1 of 1")
    code, out, _ = cli(*arguments, "--json")
    assert (code, json.loads(out)["rows"][0]["status"]) == (1, "failed")


def test_inspect(cli, demo_store):
    code, out, _ = cli("inspect", "--store", demo_store.store)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["document", "doc-00000", "doc-00001", "doc-00002", "3"]
    assert " demo " in out
    assert " ago " in out
    code, out, _ = cli("inspect", "--store", demo_store.store, "--json")
    found = json.loads(out)["documents"]
    assert sum(row["context_tokens"] for row in found) == demo_store.built.tokens
    assert {row["index"] for row in found} == {"graph+scan"}


def test_verify_names_what_is_wrong(cli, demo_store, tmp_path):
    code, out, _ = cli("verify", "--store", demo_store.store)
    assert code == 0
    assert out.splitlines()[-1].endswith("bytes read: ok")
    store = tmp_path / "index"
    shutil.copytree(demo_store.store, store)
    part = sorted(store.glob("parts/**/layer-002*.parquet"))[0]
    data = bytearray(part.read_bytes())
    data[1000] ^= 1
    part.write_bytes(data)
    code, out, _ = cli("verify", "--store", store)
    assert code == 1
    assert "sha256" in out
    assert part.name in out
    assert "--remove-damaged" in out
    manifests = sorted(store.glob("manifests/*/*.json"))
    whole = next(path for path in manifests if part.name not in path.read_text())
    whole.write_text("{")
    code, out, _ = cli("verify", "--store", store, "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) >= 2
    assert json.loads(out)["withdrawn"] == []
    assert cli("inspect", "--store", store)[0] == 1
    assert sorted(store.glob("manifests/*/*.json")) == manifests
    code, out, _ = cli("verify", "--store", store, "--remove-damaged")
    assert code == 1
    assert "withdrew 2 indexes" in out
    assert len(list(store.glob("manifests/*/*.json"))) == len(manifests) - 2
    assert cli("verify", "--store", store)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "DOCUMENTS", "--store", "new", "--model", "/no/such/model"], "model = '/no/such/model'"),
        (["build", "missing", "--store", "new"], "documents = "),
        (["build", "DOCUMENTS", "--store", "file/index"], "a file lies where a folder is needed"),
        (["build", "DOCUMENTS", "--store", "old"], "reads format 1"),
        (["build", "DOCUMENTS", "--store", "memory://x"], "lives in one process"),
        (["build", "DOCUMENTS", "--store", "new", "--query-share", "2"], "query_share = 2.0"),
        (["build", "DOCUMENTS", "--store", "new", "--report", "x.csv"], "must end in .parquet or .jsonl"),
        (["build", "DOCUMENTS", "--store", "new", "--limit", "0"], "limit = 0"),
        (["answer", "QUESTIONS", "--store", "new"], "is no rabatch store"),
        (["answer", "QUESTIONS", "--store", "STORE", "--model", "/no/such/model"], "model = '/no/such/model'"),
        (["answer", "QUESTIONS", "--store", "STORE", "--temperature", "-1"], "temperature = -1.0"),
        (["answer", "QUESTIONS", "--store", "STORE", "--answer-actors", "3-1"], "answer_actors = (3, 1)"),
        (["answer", "QUESTIONS", "--store", "STORE", "--answer-actors", "x"], "must be a number of actors, or MIN-MAX"),
        (["answer", "QUESTIONS", "--store", "STORE", "--output", "STORE"], "holds an index store"),
        (["answers", "--answers", "new"], "holds no answers"),
        (["answers", "--answers", "new", "--out", "x.xls"], "must end in .parquet, .jsonl or .csv"),
        (["run", "missing.yaml"], "pipeline = 'missing.yaml': cannot be read"),
        (["inspect", "--store", "old"], "reads format 1"),
        (["verify", "--store", "new"], "is no rabatch store"),
        (["corpus", "--documents", "0"], "n_documents = 0"),
        (["demo", "--documents", "1", "--keep", "file"], "is a file"),
        (["build", "DOCUMENTS"], "the following arguments are required: --store"),
        (["build", "DOCUMENTS", "--store", "new", "--index", "tree"], "invalid choice: 'tree'"),
        (["build", "DOCUMENTS", "--store", "new", "--storage-options", "{"], "is not JSON"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_2(cli, demo_store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/rabatch-store.json").write_text('{"format": "rabatch", "format_version": 99}')
    known = {**demo_store.corpus["paths"], "store": demo_store.store}
    code, out, err = cli(*(known.get(argument.lower(), argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in one_line(err)


def test_the_report_of_the_demo():
    report = {
        "documents": 2, "tokens": 4000, "questions": 1, "exact_match": {"graph": 1.0, "dense": 1.0, "streaming": 0.0},
        "attended_share": 0.1, "attended_shares": {"graph": 0.1, "dense": 1.0, "streaming": None},
        "stored_bytes": 15_000_000, "kv_bytes": 10_000_000, "failed": 0, "folder": None, "store": "s3://bucket/index",
        "seconds": {"build": 1.0, "answer": 2.0, "answer_dense": 3.0, "answer_streaming": 4.0},
        "samples": [{"document_id": "d", "question": "Who?", "expected": "A", "answer": "B", "reason": None}],
    }  # fmt: skip
    text = format_report(report)
    assert "1.50 x keys and values in bf16" in text
    assert 'B  (expected "A")' in text
    lines = [line.split() for line in text.splitlines()]
    assert ["graph", "100.0%", "10.0%", "2.0"] in lines
    assert ["streaming", "0.0%", "-", "4.0"] in lines
    assert lines[-1] == ["index", "store", "s3://bucket/index"]


def test_the_demo_leaves_nothing_behind(local_ray, tmp_path, monkeypatch):
    """What it reports is read before its folder goes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = run_demo(documents=1, tokens=700, questions=1, progress=False)
    assert (report["questions"], report["failed"], len(report["samples"])) == (1, 0, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo(local_ray, tmp_path):
    report = run_demo(documents=1, tokens=1500, questions=4, keep=str(tmp_path / "kept"), progress=False)
    assert (report["documents"], report["questions"], report["failed"]) == (1, 4, 0)
    assert set(report["exact_match"]) == {"dense", "streaming", "graph"}
    assert report["exact_match"]["streaming"] <= report["exact_match"]["dense"]
    assert {"build", "answer"} <= set(report["seconds"])
    assert (tmp_path / "kept/answers-graph/answers.jsonl").is_file()
    assert format_report(report)
