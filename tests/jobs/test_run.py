"""A pipeline's run: what is built and answered stays, and only what is new is built and asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import rabatch
from rabatch.cli import main
from rabatch.config import BuildConfig, GenerationSettings, Resources
from rabatch.errors import FailedRowsError, SourceError
from rabatch.jobs import working
from rabatch.jobs.answer import answer
from rabatch.jobs.answering import AnswerActor
from rabatch.jobs.build import build
from rabatch.records import ANSWERS, EXPORTED_ANSWERS

SHORT = GenerationSettings(max_new_tokens=8)
WORDS = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "
ONE_ACTOR = Resources(answer_actors=1, prefill_actors=1, graph_actors=1)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Every (question, document) pair that the model was asked, one call as often as it was made."""
    folder = tmp_path / "calls"
    folder.mkdir()
    where = str(folder)

    class Counting(AnswerActor):
        def _answer(self, turn, loaded, index, recipe, batches, recall):
            import secrets
            from pathlib import Path

            for batch in batches:
                for question in batch["questions"]:
                    name = f"{question['question_id']}|{index.document_id}|{secrets.token_hex(4)}"
                    (Path(where) / name).write_text("")
            yield from super()._answer(turn, loaded, index, recipe, batches, recall)

    monkeypatch.setattr(working, "AnswerActor", Counting)

    def take():
        calls = sorted(tuple(path.name.split("|")[:2]) for path in folder.iterdir())
        for path in folder.iterdir():
            path.unlink()
        return calls

    return take


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pipeline_of(demo_store, tmp_path, **change):
    """Over the session's index store, in which everything is built."""
    fields = {
        "documents": demo_store.corpus["paths"]["documents"],
        "questions": write(tmp_path / "q.jsonl", demo_store.questions[:6]),
        "store": demo_store.store,
        "answers": str(tmp_path / "answers"),
        "build": BuildConfig(**demo_store.static_set),
        "generation": SHORT,
        "resources": ONE_ACTOR,
    }
    return rabatch.Pipeline(**{**fields, **change})


def exported(answers, capsys, *options):
    assert main(["answers", "--answers", str(answers), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_a_rerun_asks_only_what_is_new(demo_store, tmp_path, asked, capsys):
    pipeline = pipeline_of(demo_store, tmp_path)
    first = rabatch.run(pipeline, progress=False)
    pairs = sorted((q["question_id"], q["document_id"]) for q in demo_store.questions[:6])
    assert asked() == pairs
    assert (first.build.skipped, first.answers.answered, first.answers.reused, first.answers.run) == (3, 6, 0, 1)
    (run,) = rabatch.AnswerStore(pipeline.answers).runs()
    assert (run.definition_sha256, run.counts) == (pipeline.digest, {"answered": 6, "failed": 0, "reused": 0})
    write(
        Path(pipeline.questions),
        [*demo_store.questions[:7], {"question_id": "x", "question": "Who?", "document_id": "nowhere"}],
    )
    (tmp_path / "pipeline.yaml").write_text(pipeline.to_yaml())
    assert main(["run", str(tmp_path / "pipeline.yaml"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert asked() == [(demo_store.questions[6]["question_id"], demo_store.questions[6]["document_id"])]
    assert (told["build"]["skipped"], told["answers"]["reused"], told["answers"]["answered"]) == (3, 6, 7)
    assert told["answers"]["failures"] == [
        "'x' on 'nowhere': is none of the pipeline's documents; correct the document_id"
    ]
    assert main(["run", str(tmp_path / "pipeline.yaml")]) == 1
    assert asked() == []
    assert "nothing new in" in capsys.readouterr().out
    rows = exported(pipeline.answers, capsys)
    assert [row["run"] for row in rows] == [1] * 6 + [2] * 2
    assert {row["answer"] for row in first.answers.rows} == {row["answer"] for row in rows[:6]}


def test_a_whole_result_becomes_a_dataset(demo_store, tmp_path):
    output = str(tmp_path / "answers")
    questions = demo_store.questions[:2]
    shared = {"store": demo_store.store, "generation": SHORT, "resources": ONE_ACTOR, "progress": False}
    result = answer(questions, output=output, **shared)
    dataset = result.to_dataset()
    assert dataset.schema().base_schema.names == ANSWERS.names
    chained = dataset.map(lambda row: {"question_id": row["question_id"], "document_id": row["document_id"]})
    assert chained.take_all() == [{name: q[name] for name in ("question_id", "document_id")} for q in questions]
    again = answer(dataset.select_columns(["question_id", "question", "document_id"]), output=output, **shared)
    assert (again.reused, again.run) == (2, None)


@pytest.mark.slow
def test_a_changed_document_is_built_and_asked_anew(local_ray, tmp_path, asked, capsys):
    documents = [{"document_id": name, "text": f"{name} " + WORDS * 20} for name in ("a", "b")]
    pipeline = rabatch.Pipeline(
        documents=write(tmp_path / "d.jsonl", documents),
        questions=write(tmp_path / "q.jsonl", [{"question_id": "q", "question": "Who?"}]),
        store=tmp_path / "index",
        answers=tmp_path / "answers",
        build=BuildConfig(sink_tokens=16, window_tokens=64),
        generation=SHORT,
        resources=ONE_ACTOR,
    )
    first = rabatch.run(pipeline, progress=False)
    assert (first.exit_code, first.build.built, asked()) == (0, 2, [("q", "a"), ("q", "b")])
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    documents[1]["text"] += "And the lamps were blue."
    write(tmp_path / "d.jsonl", [*documents, {"document_id": "c", "text": ""}])
    second = rabatch.run(pipeline, progress=False)
    assert (second.build.built, second.build.skipped, second.build.failed, asked()) == (1, 1, 1, [("q", "b")])
    assert (second.answers.superseded, second.answers.reused) == (1, 1)
    assert before.items() <= {p: p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file()}.items()
    rows = exported(pipeline.answers, capsys, "--all")
    told = [(row["document_id"], row["run"], row["superseded"]) for row in rows]
    assert sorted(told) == [("a", 1, False), ("b", 1, True), ("b", 2, False)]
    documents[0]["text"] = " "
    write(tmp_path / "d.jsonl", documents)
    write(tmp_path / "q.jsonl", [{"question_id": "q", "question": "Who?", "document_id": "a"}])
    third = rabatch.run(pipeline, progress=False)  # an earlier text does not answer for one that cannot be built
    assert (third.answers.failed, asked()) == (1, [])
    assert "its document was not built: text is empty" in third.answers.first_failures[0]


def test_hopeless_runs_end_early(demo_store, tmp_path):
    bad = [{"document_id": f"bad{n}", "text": ""} for n in range(3)]
    pipeline = pipeline_of(demo_store, tmp_path, documents=[*demo_store.documents, *bad], max_failed_rows=2)
    with pytest.raises(FailedRowsError, match=r"max_failed_rows = 2: 3 documents failed.*'bad0' \(table:4\): text is"):
        rabatch.run(pipeline, progress=False)
    build(pipeline.documents, store=demo_store.store, config=pipeline.build, max_failed_rows=3, progress=False)
    with pytest.raises(SourceError, match="questions"):  # before anything is built
        rabatch.run(pipeline_of(demo_store, tmp_path, questions="nowhere.jsonl"), progress=False)


def test_exports(tmp_path, capsys):
    from answer_samples import fill

    url = str(tmp_path / "answers")
    fill(url)
    command = ["answers", "--answers", url]
    for suffix in ("parquet", "jsonl", "csv"):
        assert main([*command, "--out", str(tmp_path / f"x.{suffix}")]) == 0
        assert capsys.readouterr().out == f"2 answers written to {tmp_path / f'x.{suffix}'}\n"
    parquet = pq.read_table(tmp_path / "x.parquet")
    assert parquet.schema.equals(EXPORTED_ANSWERS)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    with open(tmp_path / "x.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    found = [[(row["question_id"], row["answer"]) for row in rows] for rows in (parquet.to_pylist(), lines, cells)]
    assert found == [[("q1", 'line\n2, "quoted"'), ("q0", "new")]] * 3
    assert json.loads(cells[0]["evidence"]) == lines[0]["evidence"] == [{"start": 0, "end": 3, "score": 0.5}]
    assert main([*command, "--all", "--question-id", "q0", "--out", str(tmp_path / "all.csv")]) == 0
    with open(tmp_path / "all.csv", newline="") as file:
        assert [(row["answer"], row["superseded"]) for row in csv.DictReader(file)] == [
            ("old", "True"),
            ("new", "False"),
        ]
    capsys.readouterr()
    assert main([*command, "--all", "--document", "a"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "q0 on a (superseded): old", 'q1 on a: line 2, "quoted"', "q0 on a: new"
    ]  # fmt: skip
    assert main([*command, "--out", str(tmp_path / "x.xls")]) == 2
    assert "must end in .parquet, .jsonl or .csv" in capsys.readouterr().err
    (part, *_) = sorted((tmp_path / "answers/parts").rglob("*.parquet"))
    part.unlink()
    assert main(command) == 2
    assert part.name in capsys.readouterr().err
