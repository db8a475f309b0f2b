"""Build: bad documents are rows, good ones are committed, nothing is done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rabatch.config import BuildConfig, Recipe
from rabatch.demo.corpus import write_corpus
from rabatch.fingerprint import model_fields
from rabatch.index.links import unreachable
from rabatch.jobs.build import build
from rabatch.jobs.catalog import Catalog, read_entries
from rabatch.jobs.settings import model_settings, resolved_model
from rabatch.records import BUILD_REPORT
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import digest_of
from rabatch.storage.verify import verify
from tests.jobs.processes import killer

ROOT = Path(__file__).parents[2]
SMALL = BuildConfig(sink_tokens=16, window_tokens=64)
WORDS = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "


def problems(store):
    return verify(IndexStore(str(store)), check_graph=lambda n, e: len(unreachable(n, e)))


def snapshot(store):
    """Content and time of every file of a store."""
    files = (path for path in Path(store).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_demo_store(demo_store):
    built = demo_store.built
    assert (built.built, built.skipped, built.failed, built.exit_code) == (3, 0, 0, 0)
    assert built.tokens >= 3 * 1200
    assert 0.5 < built.stored_bytes / built.kv_bytes < 2
    assert [row["document_id"] for row in built.rows] == [d["document_id"] for d in demo_store.documents]
    assert all(row["prefill_s"] > 0 and row["graph_s"] > 0 for row in built.rows)
    assert json.loads(json.dumps(built.to_dict()))["built"] == 3
    assert built.summary()[-1].startswith("built 3, skipped 0, failed 0 of 3 documents")
    assert problems(demo_store.store) == []


def test_a_second_build_prefills_nothing(demo_store, tmp_path):
    before = snapshot(demo_store.store)
    again = build(
        demo_store.corpus["paths"]["documents"], store=demo_store.store, progress=False,
        config=BuildConfig(**demo_store.static_set), report=str(tmp_path / "report.parquet"),
    )  # fmt: skip
    assert (again.built, again.skipped, again.failed) == (0, 3, 0)
    assert snapshot(demo_store.store) == before
    assert (again.tokens, again.stored_bytes) == (demo_store.built.tokens, demo_store.built.stored_bytes)
    assert pq.read_table(tmp_path / "report.parquet").to_pylist() == again.rows
    assert pa.Table.from_pylist(again.rows, schema=BUILD_REPORT).num_rows == 3


def test_a_dataset_and_a_table_hold_the_same_documents(demo_store):
    import ray

    sources = (ray.data.from_items(demo_store.documents), pa.Table.from_pylist(demo_store.documents))
    for source in sources:
        config = BuildConfig(**demo_store.static_set)
        again = build(source, store=demo_store.store, config=config, progress=False)
        assert [row["status"] for row in again.rows] == ["skipped"] * 3


@pytest.fixture(scope="module")
def bad_input(local_ray, tmp_path_factory):
    """The matrix of bad documents, beside good ones; what a build made of it, by id, and the store."""
    folder = tmp_path_factory.mktemp("bad-input")
    documents = folder / "documents"
    documents.mkdir()
    (documents / "good.txt").write_text(WORDS * 12)
    (documents / "empty.txt").write_text("")
    (documents / "white.md").write_text(" \n\n ")
    (documents / "latin.txt").write_bytes("café".encode("latin-1"))
    rows = [
        {"document_id": "../../etc/x", "text": WORDS * 10, "year": 1999},
        {"document_id": "名前" * 150, "text": WORDS * 11},
        {"document_id": "../../etc/x", "text": WORDS * 12},
        {"document_id": "long", "text": "number " * 50_000},
        {"document_id": "nul\u0000", "text": WORDS},
        {"document_id": "one-word", "text": "word"},
        {"document_id": "no-text"},
    ]
    (documents / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"document_id": \n')
    pq.write_table(pa.table({"document_id": ["p"], "body": ["t"]}), documents / "no-column.parquet")
    result = build(str(documents), store=str(folder / "index"), config=SMALL, progress=False)
    return result, folder / "index"


def test_bad_documents_are_rows_with_reasons(bad_input):
    result, _ = bad_input
    found = {(row["source"], row["document_id"][:20]): (row["status"], row["reason"] or "") for row in result.rows}
    expected = {
        ("empty.txt", "empty.txt"): "text is empty",
        ("latin.txt", "latin.txt"): "not UTF-8 at byte 3",
        ("white.md", "white.md"): "text is empty",
        ("no-column.parquet:1", "p"): "column text is missing",
        ("rows.jsonl:3", "../../etc/x"): "same as that of rows.jsonl:1",
        ("rows.jsonl:4", "long"): "split the document",
        ("rows.jsonl:5", "nul\u0000"): "control character U+0000",
        ("rows.jsonl:7", "no-text"): "column text is missing",
        ("rows.jsonl:8", ""): "line is not JSON",
    }
    failed = {key: reason for key, (status, reason) in found.items() if status == "failed"}
    assert failed.keys() == expected.keys()
    assert {key for key, reason in expected.items() if reason not in failed[key]} == set()
    built = {document_id for (_, document_id), (status, _) in found.items() if status == "built"}
    assert built == {"good.txt", "../../etc/x", ("名前" * 150)[:20], "one-word"}
    assert (result.built, result.failed, result.exit_code) == (4, 9, 1)
    assert result.summary()[-2:] == ["failed: 4 more; every reason is in the report", result.summary()[-1]]


def test_what_is_good_beside_bad_documents_is_sound(bad_input):
    _, store = bad_input
    assert problems(store) == []
    manifests = {m.document_id: m for m in IndexStore(str(store)).manifests()}
    assert set(manifests) == {"good.txt", "../../etc/x", "名前" * 150, "one-word"}
    assert manifests["../../etc/x"].metadata == {"year": 1999}
    outside = [path for path in store.parent.rglob("*x*") if path.name == "x"]
    assert outside == []


def test_a_changed_text_is_indexed_again_and_the_newest_answers(demo_store, tmp_path):
    import ray

    store = str(tmp_path / "index")
    shutil.copytree(demo_store.store, store)
    config = BuildConfig(**demo_store.static_set)
    old = demo_store.documents[0]
    new = {**old, "text": old["text"] + " " + WORDS}

    def newest():
        fields = model_fields(resolved_model(model_settings(None), has_cuda=False))
        index = IndexStore(store)
        found = Catalog(read_entries(index), digest_of(fields), Recipe()).indexes["doc-00000"]
        return index.get(found.document_id, found.content_sha256, found.fingerprint).text_chars

    assert newest() == len(old["text"])
    changed = build(ray.data.from_items([new]), store=store, config=config, progress=False)
    assert (changed.built, newest()) == (1, len(new["text"]))
    time.sleep(1)  # manifests carry whole seconds
    back = build(pa.Table.from_pylist([old]), store=store, config=config, progress=False)
    assert (back.built, back.skipped, newest()) == (0, 1, len(old["text"]))
    assert problems(store) == []


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_where_it_stopped(tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=6, tokens=4000, n_questions=1)
    store = tmp_path / "index"
    command = [
        sys.executable,
        "-m",
        "rabatch.cli",
        "build",
        corpus["paths"]["documents"],
        "--store",
        str(store),
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not list(store.glob("manifests/*/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    committed = {path: content for path, content in snapshot(store).items() if "/manifests/" in path}
    assert 1 <= len(committed) < 6
    assert problems(store) == []
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["skipped"] >= len(committed)
    assert result["built"] + result["skipped"] == 6
    now = snapshot(store)
    assert {path: now[path] for path in committed} == committed
    assert problems(store) == []


@pytest.mark.slow
def test_the_work_of_a_dead_actor_is_done_by_another(local_ray, tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=3, tokens=4000, n_questions=1)
    with killer("PrefillActor", limit=1) as killed:
        result = build(corpus["paths"]["documents"], store=str(tmp_path / "index"), progress=False)
    assert len(killed) == 1
    assert (result.built, result.failed) == (3, 0)
    assert problems(tmp_path / "index") == []


@pytest.mark.slow
def test_a_document_that_always_kills_its_actor_fails_alone(local_ray, tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=1, tokens=4000, n_questions=1)
    with killer("PrefillActor", limit=100) as killed:
        result = build(corpus["paths"]["documents"], store=str(tmp_path / "index"), progress=False)
    assert len(killed) >= 4
    assert (result.built, result.failed) == (0, 1)
    assert "its worker died 4 times" in result.rows[0]["reason"]
    assert list(IndexStore(str(tmp_path / "index")).manifests()) == []
