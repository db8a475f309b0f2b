"""The corpus generator: same seed, same corpus; facts are where it says; questions have one answer."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from random import Random

import fsspec
import pyarrow.parquet as pq
import pytest

from rabatch.demo.corpus import (
    KINDS,
    compose_document,
    count_tokens,
    generate_corpus,
    generate_document,
    spread,
    write_corpus,
)
from rabatch.errors import ConfigError


def rows(n_documents: int = 4, tokens: int = 1024, n_questions: int = 12, **options):
    return list(generate_corpus(n_documents=n_documents, tokens=tokens, n_questions=n_questions, **options))


def test_same_seed_same_corpus_whatever_else_was_generated():
    corpus = rows(seed=5)
    assert rows(seed=5) == corpus
    document, questions = corpus[2]
    alone = generate_document(document_id=document["document_id"], tokens=1024, n_questions=12, seed=5)
    assert alone == (document, questions)
    assert rows(seed=6) != corpus


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_other_processes_and_hash_seeds_generate_the_same(hash_seed):
    program = (
        "import json; from rabatch.demo.corpus import generate_document;"
        "print(json.dumps(generate_document(document_id='a', tokens=400, n_questions=8, seed=3)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    document, questions = generate_document(document_id="a", tokens=400, n_questions=8, seed=3)
    assert json.loads(done.stdout) == [document, questions]


@pytest.mark.parametrize("tokens", [128, 129, 500, 2048, 8192])
def test_length_is_at_least_the_wish_and_less_than_64_more(tokens):
    for index in range(5):
        document, _ = generate_document(document_id=str(index), tokens=tokens, n_questions=2, seed=0)
        assert tokens <= count_tokens(document["text"]) < tokens + 64


@pytest.mark.parametrize("kinds", [("two_hop",), ("several_values",), ("many_keys",), ("single",), KINDS])
def test_a_small_document_full_of_questions_keeps_its_length(kinds):
    for index in range(10):
        document, questions = generate_document(document_id=str(index), tokens=480, n_questions=10, kinds=kinds, seed=1)
        assert 480 <= count_tokens(document["text"]) < 480 + 64
        assert {question["kind"] for question in questions} == set(kinds)


def test_spans_hold_whole_sentences_with_the_expected_values():
    for document, questions in rows(tokens=2048, n_questions=24):
        for question in questions:
            stated = [document["text"][start:end] for start, end in question["fact_spans"]]
            assert [question["fact_start"], question["fact_end"]] == question["fact_spans"][0]
            assert all(sentence.endswith(".") and sentence[0].isupper() for sentence in stated)
            if question["kind"] == "several_values":
                values = question["expected"].split(", ")
                assert len(values) == len(stated) in (2, 3)
                assert all(value in sentence for value, sentence in zip(values, stated, strict=True))
                assert question["fact_spans"] == sorted(question["fact_spans"])
            elif question["kind"] == "two_hop":
                bridge = " ".join(question["expected"].split()[:2]).removesuffix(",")
                assert all(bridge in sentence for sentence in stated)
                assert stated[1].removesuffix(".").endswith(question["expected"].split()[-1])
            else:
                assert question["expected"] in stated[0]
                assert len(stated) == 1


def test_asked_keys_are_stated_once():
    """What is left of a sentence without its value, so its key, occurs nowhere else."""
    for seed in range(5):
        text, placed = compose_document(
            Random(seed), tokens=4096, question_kinds=list(KINDS) * 10, fact_share=0.5, similarity=0.8
        )
        for item in placed:
            for sentence, value, (start, end) in zip(item.fact.sentences, item.fact.values, item.spans, strict=True):
                assert text[start:end] == sentence
                key = max(sentence.split(value), key=len)
                boundary = key if key[0].isupper() else f" {key.lstrip()}"
                assert text.count(boundary) == 1, (sentence, boundary)
        assert len({item.fact.question for item in placed}) == len(placed)


def test_facts_lie_uniformly_over_the_document():
    n_bins = 8
    bins = [0] * n_bins
    for document, questions in rows(n_documents=40, tokens=1024, n_questions=20, seed=2):
        for question in questions:
            for start, _ in question["fact_spans"]:
                bins[int(start / len(document["text"]) * n_bins)] += 1
    mean = sum(bins) / n_bins
    assert all(0.75 * mean < count < 1.25 * mean for count in bins), bins


@pytest.mark.parametrize("n_positions", [1, 2, 3])
def test_sentences_of_one_fact_are_far_apart(n_positions):
    rng = Random(0)
    for _ in range(200):
        positions = sorted(spread(rng, n_positions))
        assert all(0 <= position < 1 for position in positions)
        gaps = [b - a for a, b in pairwise(positions)]
        assert all(gap > 0.59 / n_positions for gap in gaps)


def test_about_a_tenth_of_the_tokens_are_facts():
    text, _ = compose_document(Random(0), tokens=8192, question_kinds=[])
    words = (" is ", " of the ", "Parcel", "Guest", "works at", "kept at")
    stated = [s for s in text.replace("\n", " ").split(". ") if any(w in s for w in words) and any(map(str.isdigit, s))]
    assert 0.03 < sum(count_tokens(s) for s in stated) / count_tokens(text) < 0.15


def test_kinds_take_turns():
    _, questions = generate_document(document_id="a", tokens=1024, n_questions=8, seed=0)
    assert sorted(question["kind"] for question in questions) == sorted(KINDS * 2)
    assert len({question["question_id"] for question in questions}) == 8


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_what_is_written_reads_back(tmp_path, format):
    options = {"n_documents": 67, "tokens": 200, "n_questions": 4, "seed": 9}
    summary = write_corpus(str(tmp_path / "corpus"), **options, format=format)
    expected = list(generate_corpus(**options))
    assert summary["documents"] == 67
    assert summary["questions"] == 67 * 4
    assert summary["tokens"] == sum(count_tokens(document["text"]) for document, _ in expected)
    read = {}
    for name, path in summary["paths"].items():
        if format == "parquet":
            read[name] = pq.read_table(path).to_pylist()
        else:
            with open(path, encoding="utf-8") as file:
                read[name] = [json.loads(line) for line in file]
    assert read["documents"] == [document for document, _ in expected]
    assert read["questions"] == [question for _, questions in expected for question in questions]


def test_any_fsspec_url_will_do():
    paths = write_corpus("memory://corpora/small", n_documents=1, tokens=200, n_questions=2)["paths"]
    assert paths["documents"] == "memory://corpora/small/documents.jsonl"
    with fsspec.open(paths["questions"]) as file:
        assert len(file.read().splitlines()) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_documents", 0),
        ("tokens", 100),
        ("n_questions", -1),
        ("n_questions", 100),
        ("kinds", ()),
        ("kinds", ("single", "triple")),
        ("format", "csv"),
    ],
)
def test_bad_arguments_are_named(tmp_path, field, value):
    options = {"n_documents": 1, "tokens": 500, "n_questions": 2, **{field: value}}
    with pytest.raises(ConfigError, match=field):
        write_corpus(str(tmp_path), **options)
    assert list(tmp_path.iterdir()) == []
