"""Answer: the same answers whatever the order and the company, and none asked twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from answer_samples import files

from rabatch.config import GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.errors import SourceError, StoreError
from rabatch.jobs.answer import answer, answer_with
from rabatch.jobs.asking import Asked
from rabatch.jobs.observing import Observer
from rabatch.records import ANSWERS

ROOT = Path(__file__).parents[2]
SHORT = GenerationSettings(max_new_tokens=24)
PER_QUESTION = ("answer", "finish_reason", "answer_tokens", "question_tokens", "context_tokens")


def contents(result):
    rows = (row for row in result.rows if row["status"] == "ok")
    return {(row["question_id"], row["document_id"]): tuple(row[name] for name in PER_QUESTION) for row in rows}


def test_every_question_is_a_row_in_input_order(answered, demo_store):
    result, _, asked = answered
    ids = [row["question_id"] for row in result.rows]
    assert ids[:12] == [q["question_id"] for q in demo_store.questions]
    everyone = [row for row in result.rows if row["question_id"] == "everyone"]
    assert [row["document_id"] for row in everyone] == ["doc-00000", "doc-00001", "doc-00002"]
    assert ids[12:] == ["everyone"] * 3 + ["lost", "silent", "long", asked[0]["question_id"], ids[-1]]
    assert ids[-1].startswith("q-")


def test_bad_questions_are_rows_with_reasons(answered):
    result, *_ = answered
    reasons = [(row["question_id"], row["reason"]) for row in result.rows if row["status"] == "failed"]
    expected = ("document is not in the store", "question is empty", "shorten it", "question_id is the same as that of")
    assert len(reasons) == len(expected)
    assert [part in reason for part, (_, reason) in zip(expected, reasons, strict=True)] == [True] * 4
    assert (result.failed, result.answered, result.exit_code) == (4, 16, 1)
    assert result.summary()[-1].startswith("answered 16, failed 4 of 20 in ")


def test_answers_carry_what_they_cost(answered):
    result, *_ = answered
    for row in result.rows:
        if row["status"] == "ok":
            assert row["finish_reason"] in ("stop", "length")
            assert 0 < row["attended_share"] <= 1
            assert row["seconds"] > 0
            assert row["recipe"] == "graph"
            assert len(row["fingerprint"]) == 64
            assert 0 < sum(span["score"] for span in row["evidence"]) <= 1 + 1e-6
    assert result.exact_match is not None
    assert result.attended_share is not None


def test_the_output_is_the_result_twice(answered):
    result, output, _ = answered
    assert pq.read_schema(output / "answers.parquet").names == ANSWERS.names
    parquet = pq.read_table(output / "answers.parquet").to_pylist()
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in parquet] == [row["answer"] for row in lines] == [r["answer"] for r in result.rows]
    assert list(lines[0]) == ANSWERS.names


@pytest.mark.slow
def test_order_batch_size_and_company_change_no_answer(answered, demo_store):
    result, _, asked = answered
    want = contents(result)
    resources = Resources(questions_per_batch=3, answer_actors=1)
    backwards = answer(asked[11::-1], store=demo_store.store, generation=SHORT, resources=resources, progress=False)
    assert [row["question_id"] for row in backwards.rows] == [q["question_id"] for q in asked[11::-1]]
    assert contents(backwards) == {key: want[key] for key in contents(backwards)}
    some = [asked[1], asked[6], asked[12]]
    resources = Resources(questions_per_batch=1)
    alone = answer(some, store=demo_store.store, generation=SHORT, resources=resources, progress=False)
    assert contents(alone) == {key: want[key] for key in contents(alone)}


def test_a_rerun_asks_only_what_is_not_answered(answered, demo_store):
    result, output, asked = answered
    before = files(output)
    again = answer(asked, store=demo_store.store, generation=SHORT, output=str(output), progress=False)
    assert (again.reused, again.failed, again.run) == (result.answered, result.failed, None)
    assert again.rows == result.rows
    assert (again.exact_match, again.attended_share) == (result.exact_match, pytest.approx(result.attended_share))
    assert {path: data for path, data in files(output).items() if "answers." not in path} == {
        path: data for path, data in before.items() if "answers." not in path
    }


def test_killed_between_the_commits_of_two_recipes(demo_store, tmp_path, monkeypatch):
    """Nothing is asked again; and a recipe that the index does not serve fails its own questions only."""
    questions = demo_store.questions[:3]
    methods = ("dense", "streaming", "h2o")

    def ask():
        return answer_with(
            [(Recipe(method=method), tmp_path / method) for method in methods],
            questions,
            store=demo_store.store,
            model=ModelConfig(),
            generation=SHORT,
            resources=Resources(),
            address=None,
            storage_options={},
            fingerprint=None,
            documents=None,
            max_failed_rows=None,
            observer=Observer(progress=False),
        )

    commit = Asked.commit

    def killed(job, **about):
        if job.recipe.method == "streaming":
            raise KeyboardInterrupt
        return commit(job, **about)

    with monkeypatch.context() as patch:
        patch.setattr(Asked, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            ask()
    dense, streaming, h2o = ask()
    assert [(one.reused, one.answered, one.failed) for one in (dense, streaming)] == [(3, 3, 0)] * 2
    assert (dense.run, streaming.run) == (None, 1), "what was committed stands, what was answered is committed now"
    assert (h2o.answered, h2o.failed) == (0, 3)
    assert all("--key-mass" in row["reason"] for row in h2o.rows)


@pytest.mark.slow
def test_a_damaged_index_fails_its_questions_only_and_can_be_made_anew(demo_store, tmp_path, capsys):
    import shutil

    from rabatch import cli
    from rabatch.config import BuildConfig
    from rabatch.jobs.build import build
    from rabatch.storage.store import IndexStore

    store = tmp_path / "index"
    shutil.copytree(demo_store.store, store)
    (manifest,) = IndexStore(str(store)).find("doc-00001")
    part = store / next(part.path for part in manifest.parts if part.layer == 1)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    result = answer(demo_store.questions, store=str(store), recipe="flat", generation=SHORT, progress=False)
    assert {(row["document_id"], row["status"]) for row in result.rows} == {
        ("doc-00000", "ok"), ("doc-00001", "failed"), ("doc-00002", "ok")
    }  # fmt: skip
    reasons = [row["reason"] for row in result.rows if row["status"] == "failed"]
    assert all("sha256" in reason and "--remove-damaged" in reason for reason in reasons)
    config = BuildConfig(**demo_store.static_set)
    rebuilt = build(demo_store.documents, store=str(store), config=config, progress=False)
    assert (rebuilt.built, rebuilt.skipped) == (0, 3)
    assert cli.main(["verify", "--store", str(store), "--remove-damaged"]) == 1
    rebuilt = build(demo_store.documents, store=str(store), config=config, progress=False)
    assert (rebuilt.built, rebuilt.skipped) == (1, 2)
    assert cli.main(["verify", "--store", str(store)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("questions", "change", "error", "reason"),
    [
        ("missing.jsonl", {}, SourceError, "does not exist"),
        ([], {"store": "nothing-there"}, StoreError, "is no rabatch store"),
        ([], {"output": "file/answers"}, StoreError, "a file lies where a folder is needed"),
    ],
)
def test_what_cannot_run(demo_store, tmp_path, monkeypatch, questions, change, error, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=reason):
        answer(questions, progress=False, **{"store": demo_store.store, **change})


def test_no_questions_are_no_failure(demo_store):
    result = answer([], store=demo_store.store, progress=False)
    assert (result.rows, result.exit_code, result.exact_match) == ([], 0, None)


def run_module(name, *arguments, cwd):
    """``python -m rabatch.jobs.NAME`` in a folder that is not the checkout's; its JSON."""
    command = [sys.executable, "-m", f"rabatch.jobs.{name}", *map(str, arguments), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_answer_module_runs_by_itself(demo_store, tmp_path):
    """Workers of the Ray that it starts find the code, though the working folder is another."""
    (tmp_path / "q.jsonl").write_text(json.dumps(demo_store.questions[0]) + "\n")
    arguments = ("q.jsonl", "--store", demo_store.store, "--output", "out", "--recipe", "dense")
    answered = run_module("answer", *arguments, cwd=tmp_path)
    assert (answered["answered"], answered["rows"][0]["attended_share"]) == (1, 1.0)
    assert (tmp_path / "out/answers.jsonl").is_file()


@pytest.mark.slow
def test_the_build_module_joins_a_cluster(demo_store, tmp_path):
    """The cluster's workers are given the checkout's code."""
    import ray

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in demo_store.static_set.items()]
    address = ray.get_runtime_context().gcs_address
    documents = demo_store.corpus["paths"]["documents"]
    built = run_module("build", documents, "--store", demo_store.store, *flags, "--address", address, cwd=tmp_path)
    assert (built["skipped"], built["failed"]) == (3, 0)
