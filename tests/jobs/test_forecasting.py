"""`rabatch plan`: counted tokens, rates of earlier runs, the cheapest recipe. No Ray is started for it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rabatch.cli import main
from rabatch.config import ModelConfig
from rabatch.errors import SourceError
from rabatch.forecast import Rates
from rabatch.jobs.forecasting import plan
from rabatch.jobs.survey import SAMPLE_CHARS, SAMPLE_DOCUMENTS, Surveyor
from rabatch.models import load_tokenizer
from rabatch.pipeline import Pipeline
from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerStore, Run

ROOT = Path(__file__).parents[2]
RATES = Rates(
    prefill_flops_per_s=1e10,
    index_keys_per_s={"graph": 1e5, "scan": 2e5},
    write_bytes_per_s=1e8,
    read_bytes_per_s=2e8,
    decode_bytes_per_s=1e9,
)


@pytest.fixture
def written(tmp_path):
    """Two documents, one row that is none, three questions of which one is asked of both."""
    documents = [
        {"document_id": name, "text": "The owner of the boat is Ann. " * n} for name, n in (("a", 40), ("b", 400))
    ]
    documents.append({"document_id": "c", "text": " "})
    questions = [{"question": "Who?"}, {"question": "Whose?", "document_id": "a"}, {"question": " "}]
    for name, rows in (("d", documents), ("q", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {name: str(tmp_path / name) for name in ("store", "answers")}
    return Pipeline(documents=str(tmp_path / "d.jsonl"), questions=str(tmp_path / "q.jsonl"), **places)


def context_tokens(text: str) -> int:
    return len(load_tokenizer(ModelConfig())(text, add_special_tokens=False).input_ids)


def test_a_corpus_that_fits_the_sample_is_counted(written):
    made = plan(written)
    whole = sum(context_tokens("The owner of the boat is Ann. " * n) for n in (40, 400))
    before = len(Surveyor(ModelConfig())._template.encode_context(load_tokenizer(ModelConfig()), "x")) - 1
    assert made.tokens == whole + 2 * before
    assert (made.documents, made.unusable, made.too_long) == (2, 1, 0)
    assert made.sample["all"]
    assert (made.questions, made.questions_per_document) == (3, 1.5)
    assert made.missing == [
        *("prefill_flops_per_s", "write_bytes_per_s", "read_bytes_per_s", "decode_bytes_per_s", "index_keys_per_s")
    ]
    assert made.cheapest == []
    assert "not known: --prefill-flops-per-s" in "\n".join(made.summary())


def test_hours_by_hand(written):
    made = plan(written, rates=RATES, questions_per_document=10)
    assert made.hours["prefill"] == pytest.approx(made.flops["total"] / 1e10 / 3600)
    assert made.hours["write"] == pytest.approx(made.stored["total"] / 1e8 / 3600)
    assert made.hours["read"] == pytest.approx(made.hours["write"] / 2)
    indexed = sum(max(0, n - 640) for n in Surveyor(ModelConfig()).documents(written.documents).tokens) * 4 * 2
    assert made.recipes["graph"]["hours"]["index"] == pytest.approx(indexed / 1e5 / 3600)
    assert made.recipes["scan"]["hours"]["index"] == pytest.approx(indexed / 2e5 / 3600)
    assert made.recipes["dense"]["hours"]["index"] == 0
    assert made.recipes["dense"]["stored_bytes"] < made.recipes["graph"]["stored_bytes"] < made.stored["total"]
    for recipe in made.recipes.values():
        assert recipe["total_hours"] == pytest.approx(sum(recipe["hours"].values()))
    twice = plan(written, rates=RATES, questions_per_document=20)
    assert twice.hours["decode"] == pytest.approx(made.hours["decode"] * 2, rel=0.2)
    assert json.loads(json.dumps(made.to_dict()))["cheapest"]


def test_the_cheapest_recipe_is_the_one_with_the_fewest_hours(written):
    made = plan(written, rates=RATES)
    ranges = [(choice["first"], choice["last"]) for choice in made.cheapest]
    assert ranges[0][0] == 1
    assert [last + 1 for _, last in ranges[:-1]] == [first for first, _ in ranges[1:]]
    for choice in made.cheapest:
        if choice["recipe"] != "prefill":
            here = plan(written, rates=RATES, questions_per_document=choice["first"])
            hours = {name: recipe["total_hours"] for name, recipe in here.recipes.items()}
            assert hours[choice["recipe"]] == pytest.approx(min(hours.values()), rel=1e-6)


def test_slow_prefill_makes_storing_pay_sooner(written):
    def first_stored(prefill: float) -> int:
        rates = dataclasses.replace(RATES, prefill_flops_per_s=prefill)
        return next(choice["first"] for choice in plan(written, rates=rates).cheapest if choice["recipe"] != "prefill")

    assert first_stored(1e9) <= first_stored(1e11) <= first_stored(1e12)
    assert first_stored(1e9) < first_stored(1e12)


def test_many_documents_are_estimated_from_a_sample(tmp_path):
    sentences = ["The owner of the boat is Ann. ", "Where is crate 983-740 kept? ", "Zeppelins, quietly. "]
    for n in range(3 * SAMPLE_DOCUMENTS):
        (tmp_path / f"{n}.txt").write_text("".join(sentences[(n + k) % 3] for k in range(20 + n)))
    (tmp_path / "long.txt").write_text(sentences[0] * (2 * SAMPLE_CHARS // 30))
    (tmp_path / "empty.txt").write_text("")
    corpus = Surveyor(ModelConfig()).documents(str(tmp_path))
    assert not corpus.exact
    assert (corpus.sampled_documents, corpus.unusable) == (SAMPLE_DOCUMENTS, 1)
    exact = [context_tokens(path.read_text()) for path in sorted(tmp_path.iterdir()) if path.stat().st_size]
    assert sum(corpus.tokens) == pytest.approx(sum(exact), rel=0.05)
    assert corpus == Surveyor(ModelConfig()).documents(str(tmp_path)), "the same sample every time"


def test_documents_that_the_model_does_not_take_are_counted(written):
    text = "The owner of the boat is Ann. " * 6000
    Path(written.documents).write_text(json.dumps({"document_id": "a", "text": text}) + "\n")
    made = plan(written)
    assert (made.documents, made.too_long) == (0, 1)
    assert "1 more are too long" in made.summary()[0]


def test_only_paths_are_surveyed(written):
    with pytest.raises(SourceError, match="reads paths and URLs"):
        plan(dataclasses.replace(written, documents=[{"document_id": "a", "text": "x"}]))


def store_answers(url: str, rows: list[dict]) -> None:
    """As a run of the demo model would have stored them."""
    blank = dict.fromkeys(STORED_ANSWERS.names)
    table = pa.Table.from_pylist(
        [{**blank, "question_id": str(n), "model": "demo", "answer_key": str(n), **row} for n, row in enumerate(rows)],
        schema=STORED_ANSWERS,
    )
    store = AnswerStore(url, create=True)
    attempt = store.new_attempt()
    parts = (store.put(table, attempt=attempt, number=0),)
    now = "2026-11-25T00:00:00+00:00"
    store.commit(Run(number=1, created_at=now, attempt=attempt, definition_sha256="0" * 64, parts=parts))


def test_rates_come_from_earlier_runs(demo_store, tmp_path):
    """Of builds and answers of the same model; and the bytes that were stored are those that are planned."""
    answers, paths = str(tmp_path / "answers"), demo_store.corpus["paths"]
    options = {"build": demo_store.static_set, "resources": {"questions_per_batch": 4}}
    pipeline = Pipeline(**paths, store=demo_store.store, answers=answers, **options)
    made = plan(pipeline)
    assert made.missing == ["decode_bytes_per_s"]
    assert made.tokens == demo_store.built.tokens
    assert made.stored["total"] == pytest.approx(demo_store.built.stored_bytes, rel=0.05)
    spent = sum(row["prefill_s"] for row in demo_store.built.rows)
    assert made.hours["prefill"] * 3600 == pytest.approx(spent, rel=1e-6)
    assert "measured: 3 documents built on cpu" in made.rates["sources"]["prefill_flops_per_s"]
    timed = {"status": "ok", "context_tokens": 1200, "answer_tokens": 10}
    rows = [{**timed, "recipe": "graph", "seconds": 1.0}] * 2 + [{**timed, "recipe": "dense", "seconds": 4.0}]
    other = {"status": "ok", "recipe": "graph", "seconds": 999.0, "context_tokens": 1, "answer_tokens": 1, "model": "x"}
    store_answers(answers, [*rows, other, {"status": "failed", "recipe": "graph"}])
    made = plan(pipeline)
    assert made.missing == []
    assert made.rates["sources"]["decode_bytes_per_s"] == "measured: 3 answers"
    assert made.cheapest
    # 64 tokens at most take 64 tenths of a second with graph, and four times as long with dense.
    per_question = {name: recipe["hours"]["decode"] * 3600 / 12 for name, recipe in made.recipes.items()}
    assert per_question["graph"] == pytest.approx(6.4, rel=0.2)
    assert per_question["dense"] == pytest.approx(25.6, rel=0.2)


def test_the_command(written, capsys, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(written.to_yaml())
    rates = ("--prefill-flops-per-s", "1e10", "--index-keys-per-s", "1e5", "--write-bytes-per-s", "1e8")
    code = main(["plan", str(tmp_path / "pipeline.yaml"), *rates, "--decode-bytes-per-s", "1e9"])
    out = capsys.readouterr().out
    assert code == 0
    assert "cheapest, by questions per document:" in out
    assert "read_bytes_per_s: 1e+08 (that of writing)" in out
    options = ("--documents", written.documents, "--questions", written.questions, "--model", "demo", "--json")
    assert main(["plan", *options]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    assert main(["plan", "--documents", "d"]) == 2
    assert "questions = None" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "pipeline.yaml"), "--model", "demo"]) == 2
    assert main(["plan", str(tmp_path / "pipeline.yaml"), "--read-bytes-per-s", "0"]) == 2


def test_a_plan_reads_no_weights_and_starts_no_ray(written, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in (ROOT / "rabatch/demo/model").iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    code = f"""
import ray
from rabatch.jobs.forecasting import plan
from rabatch.pipeline import Pipeline
from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerStore, Run
made = plan(Pipeline.from_yaml({written.to_yaml()!r}.replace("name: demo", "name: {model}")))
print(made.flops["total"] > 0, ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr
