"""The examples run as a reader would run them, on small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rabatch
from rabatch.demo.corpus import write_corpus

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.timeout(600)  # Ray's start alone takes a minute on a busy machine
SIZES = ("--documents", "1", "--tokens", "1024", "--questions", "4")


def run(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run("quickstart.py", "out", *SIZES, cwd=folder)


def test_quickstart_builds_and_answers(quickstart):
    _, done = quickstart
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("built 1 documents, 0 were there already")
    assert len(lines) == 5
    assert sum("(right;" in line for line in lines[1:]) >= 2, done.stdout


def test_a_store_is_readable_with_pyarrow_alone(quickstart):
    folder, _ = quickstart
    done = run("query_store.py", "out/index", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("doc-00000: ")
    config = json.loads((ROOT / "rabatch/demo/model/config.json").read_text())
    heads = [line for line in done.stdout.splitlines() if line.startswith("head ")]
    assert len(heads) == config["num_key_value_heads"]
    assert all(f", {config['head_dim']})" in line for line in heads)
    assert done.stdout.count("most linked positions") == len(heads)


def test_a_store_without_the_document_is_named(quickstart):
    folder, _ = quickstart
    done = run("query_store.py", "out/index", "doc-9", cwd=folder)
    assert done.returncode == 1
    assert "holds no document 'doc-9'" in done.stdout


def test_a_store_answers_sql(quickstart):
    folder, _ = quickstart
    done = run("query_sql.py", "out/index", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("doc-00000: ")
    config = json.loads((ROOT / "rabatch/demo/model/config.json").read_text())
    tokens = int(lines[0].split()[1])
    assert lines[3].startswith(f"its layer 0: {config['num_key_value_heads']} KV heads of {tokens} tokens")
    assert all(int(line.split()[-2]) > 1 for line in lines[4:])
    assert len(lines) == 7


@pytest.mark.parametrize("name", ["query_store.py", "query_sql.py"])
def test_queries_import_nothing_of_rabatch(name):
    assert "import rabatch" not in (EXAMPLES / name).read_text()


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "quickstart.py",
        "query_store.py",
        "query_sql.py",
        "key_index.py",
    }


def test_a_key_index_alone(tmp_path):
    done = run("key_index.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    share = float(lines[2].removeprefix("held-out queries: ").split()[0])
    assert 0.97 < share <= 1
    assert lines[3].startswith("8202 keys with 10 inserted")
    assert lines[3].endswith("loads as saved: True")


def test_the_pipeline_is_the_defaults_but_for_what_it_says():
    pipeline = rabatch.Pipeline.from_yaml(EXAMPLES / "pipeline.yaml")
    places = {name: getattr(pipeline, name) for name in ("documents", "questions", "store", "answers")}
    assert pipeline == rabatch.Pipeline(**places, max_failed_rows=100)


@pytest.mark.slow
def test_the_pipeline_runs(local_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus("corpus", n_documents=1, tokens=1024, n_questions=4)
    pipeline = rabatch.Pipeline.from_yaml(EXAMPLES / "pipeline.yaml")
    result = rabatch.run(pipeline, progress=False)
    assert (result.build.built, result.answers.answered, result.exit_code) == (1, 4, 0)
