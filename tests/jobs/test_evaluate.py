"""An evaluation end to end: one build for all recipes, nothing twice, bad rows beside good ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from answer_samples import files

from rabatch.cli import main
from rabatch.config import BuildConfig, Resources
from rabatch.errors import ConfigError, StoreError
from rabatch.jobs import working
from rabatch.jobs.answering import AnswerActor
from rabatch.jobs.evaluate import evaluate
from rabatch.jobs.observing import Observer

RECIPES = ("dense", "streaming", "graph:top_k=16")
ASKED = {
    "tasks": ("niah_single_1", "niah_multikey_3"),
    "lengths": (256, 384),
    "recipes": RECIPES,
    "samples": 3,
    "questions_per_context": 2,
    "config": BuildConfig(sink_tokens=8, window_tokens=32),
    "progress": False,
}
CONTEXTS, QUESTIONS = 2 * (3 + 2), 2 * (3 + 3)
ANSWERED = 5


class Killed(Observer):
    """Ends a run once some questions are answered."""

    def answered(self, answers, **about):
        super().answered(answers, **about)
        if sum(phase.counts["answered"] for phase in self.run.phases) >= ANSWERED:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def evaluated(local_ray, tmp_path_factory):
    """A run that is killed while it answers, and the one that goes on; both results' folder."""
    out = tmp_path_factory.mktemp("evaluation")
    with pytest.raises(KeyboardInterrupt):
        evaluate(out=out, observer=Killed(progress=False), **ASKED)
    return evaluate(out=out, **ASKED), out


def test_a_killed_evaluation_goes_on(evaluated):
    result, _ = evaluated
    assert result.reused + result.asked == 3 * QUESTIONS
    assert result.reused >= ANSWERED
    assert result.asked > 0
    assert (result.failed, result.failed_documents, result.exit_code) == (0, 0, 0)


def test_the_model_is_loaded_once_for_all_recipes(evaluated, monkeypatch, tmp_path):
    """One actor asks with every recipe."""
    _, out = evaluated
    loads = tmp_path / "loads"
    loads.mkdir()
    where = str(loads)

    class Counting(AnswerActor):
        def __init__(self, settings):
            import secrets
            from pathlib import Path

            (Path(where) / secrets.token_hex(8)).touch()
            super().__init__(settings)

    monkeypatch.setattr(working, "AnswerActor", Counting)
    resources = Resources(answer_actors=1)
    again = evaluate(out=tmp_path / "again", store=out / "index", resources=resources, **ASKED)
    assert again.asked == 3 * QUESTIONS
    assert len(list(loads.iterdir())) == 1


def test_a_second_run_asks_nothing_and_writes_nothing_into_the_stores(evaluated):
    first, out = evaluated
    stores = {name: files(out / name) for name in ("index", "answers")}
    again = evaluate(out=out, **ASKED)
    assert (again.asked, again.reused) == (0, 3 * QUESTIONS)
    assert {name: files(out / name) for name in stores} == stores
    assert again.cells == first.cells, "recall of the first run is kept too"


def test_every_cell_says_what_it_costs(evaluated):
    result, _ = evaluated
    assert len(result.cells) == 2 * 2 * 3
    assert len(result.means) == 2 * 3
    for cell in result.cells:
        assert (cell.questions, cell.contexts) == (3, 3 if cell.task == "niah_single_1" else 2)
        assert 0 <= cell.score.low <= cell.score.mean <= cell.score.high <= 1
        assert cell.seconds_per_token > 0
        assert cell.answer_tokens >= 3
    by_recipe = {cell.recipe: cell for cell in result.cells if (cell.task, cell.length) == ("niah_multikey_3", 384)}
    dense, streaming, graph = (by_recipe[name] for name in RECIPES)
    assert dense.attended_share == 1 > graph.attended_share > streaming.attended_share
    assert streaming.stored_bytes_per_token < dense.stored_bytes_per_token < graph.stored_bytes_per_token
    assert 0 < graph.recall <= 1
    assert graph.recall_samples > 0
    assert (dense.recall, streaming.recall) == (None, None)
    single = {c.recipe: c.score.mean for c in result.cells if (c.task, c.length) == ("niah_single_1", 384)}
    assert single["dense"] >= single["streaming"]


def test_what_is_written(evaluated):
    result, out = evaluated
    rows = pq.read_table(out / "predictions.parquet").to_pylist()
    assert rows == result.predictions
    assert len(rows) == 3 * QUESTIONS
    assert {row["recipe"] for row in rows} == set(RECIPES)
    assert all(
        row["question_id"].startswith(f"{row['task']}/{row['length']}/seed-0/{row['index']:05d}/") for row in rows
    )
    with open(out / "predictions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["answer"] for line in lines] == [row["answer"] for row in rows]
    assert json.loads(lines[0]["answers"]) == rows[0]["answers"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["cells"] == [cell.to_dict() for cell in result.cells]
    assert set(metrics["seconds"]) == {"contexts", "build", "answer", "all"}
    assert "## Contexts of 256 tokens" in (out / "report.md").read_text()
    assert (out / "report.html").read_text().count("<figure>") == 2 * 2 + 3


def test_questions_of_a_file(evaluated, tmp_path, capsys):
    """Good rows are asked, two of them of one context; the others fail by name. The store is that of the tasks."""
    _, out = evaluated
    text = "The value of key red-mill is 4711. The path is dry. " * 12
    row = {"context": text, "question": "What is the value of key red-mill?", "answer": ["4711", "nothing"]}
    rows = [
        row | {"task": "qa_mine", "answer_prefix": " It is", "max_new_tokens": 8},
        row | {"task": "all_of_it"},
        row | {"answer": None, "task": "qa_mine"},
        row | {"context": "number " * 60_000, "task": "all_of_it"},
    ]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows) + "{\n")
    command = ["evaluate", "--data", str(data), "--recipes", "dense", "--out", str(tmp_path / "out")]
    command += ["--store", str(out / "index"), "--sink-tokens", "8", "--window-tokens", "32", "--no-progress", "--json"]
    assert main(command) == 1
    told = json.loads(capsys.readouterr().out)
    cells = {cell["task"]: cell for cell in told["cells"]}
    assert {task: (cell["questions"], cell["failed"]) for task, cell in cells.items()} == {
        **{"qa_mine": (2, 1), "all_of_it": (2, 1)},
        "file": (1, 1),
    }
    assert (told["asked"], told["failed"], told["failed_documents"], told["exit_code"]) == (2, 3, 1, 1)
    assert cells["file"]["score"] is None
    found = {row["question_id"]: row for row in pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()}
    assert found["mine.jsonl:1"]["document_id"] == found["mine.jsonl:2"]["document_id"]
    assert found["mine.jsonl:1"]["answer_tokens"] <= 8
    assert found["mine.jsonl:1"]["match"] == "part"
    reasons = {name: row["reason"] for name, row in found.items() if row["status"] == "failed"}
    assert "column answer is missing" in reasons["mine.jsonl:3"]
    assert reasons["mine.jsonl:4"].startswith("its document was not built: ")
    assert "line is not JSON" in reasons["mine.jsonl:5"]
    assert found["mine.jsonl:4"]["score"] == 0
    assert found["mine.jsonl:5"]["score"] is None


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tasks": ["vtt"]}, ConfigError, "there is no such task"),
        ({"recipes": "duo+graph"}, ConfigError, "--head-pattern"),
        ({"lengths": [16]}, ConfigError, "at least 256"),
        ({"data": "/nowhere/q.csv"}, Exception, "cannot be read"),
        ({"out": "memory://x"}, ConfigError, "out = "),
    ],
)
def test_what_cannot_run(local_ray, tmp_path, change, error, reason):
    with pytest.raises(error, match=reason):
        evaluate(**{"out": tmp_path / "out", "progress": False} | change)
    assert not (tmp_path / "out" / "index").exists()


def test_a_folder_that_holds_something_else_is_refused(local_ray, tmp_path):
    (tmp_path / "answers").write_text("mine")
    with pytest.raises(StoreError):
        evaluate(out=tmp_path, **ASKED)
    assert (tmp_path / "answers").read_text() == "mine"


def test_options_count_before_the_definition(tmp_path):
    from rabatch.cli import make_parser
    from rabatch.cli_evaluate import settings

    path = tmp_path / "evaluation.yaml"
    path.write_text(
        "tasks: [vt]\nsamples: 4\nbuild: {window_tokens: 64}\nheads: {head_pattern: x, head_sparsity: 0.5}\n"
    )
    parse = make_parser().parse_args
    found = settings(parse(["evaluate", "--config", str(path), "--samples", "7", "--lengths", "2K,300"]))
    assert (found["tasks"], found["samples"], found["lengths"]) == (["vt"], 7, [2048, 300])
    assert found["config"].window_tokens == 64
    assert found["model"].name == "demo"
    own = settings(parse(["evaluate", "--config", str(path), "--threshold", "0.5"]))
    assert own["heads"] == {"head_pattern": "x", "head_threshold": 0.5}
    with pytest.raises(ConfigError, match="stands in the definition"):
        settings(parse(["evaluate", "--config", str(path), "--window-tokens", "32"]))
    plain = settings(parse(["evaluate"]))
    assert set(plain) == {"model", "config", "resources", "progress"}
    with pytest.raises(SystemExit):
        parse(["evaluate", "--lengths", "many"])


def test_the_module_is_the_command(local_ray, tmp_path, capsys):
    from rabatch.jobs.command import main as run

    assert run("evaluate", ["--tasks", "vtt", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("rabatch: error: tasks = 'vtt': there is no such task")
    assert not (Path(tmp_path) / "out" / "index").exists()
