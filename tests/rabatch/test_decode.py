"""Answering: batches, failures, stopping, sampling, evidence, counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from rabatch.attention.context import QuestionAttention
from rabatch.attention.layer import ContextLayer
from rabatch.attention.seam import AttentionCall
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import FingerprintError, IntegrityError
from rabatch.evaluation.scoring import exact_match
from rabatch.executor import Executor
from rabatch.generation import generation_config, seed_of
from rabatch.loading import LoadedModel, load_model
from rabatch.records import ANSWERS
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document

GREEDY = GenerationSettings(max_new_tokens=24)
BUILD = BuildConfig(sink_tokens=16, window_tokens=128)
Stored = tuple[LoadedModel, IndexStore, Manifest, list[dict[str, Any]], str]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    loaded = load_model(ModelConfig(device="cpu"))
    document, questions = generate_document(
        document_id="d", tokens=2048, n_questions=12, kinds=("single", "many_keys"), seed=11
    )
    store = new_store(tmp_path_factory.mktemp("decode"))
    manifest = store_document(loaded, store, document["text"], BUILD)
    return loaded, store, manifest, questions, document["text"]


def context_of(stored: Stored, recipe: Recipe) -> OpenContext:
    loaded, store, manifest, _, _ = stored
    return open_context(store, manifest, loaded, recipe)


def answers(rows: list[dict]) -> dict[str, str]:
    return {row["question_id"]: row["answer"] for row in rows}


def test_answers_are_right_and_streaming_is_not(stored: Stored) -> None:
    questions = stored[3]
    right = {}
    for method in ("dense", "flat", "graph", "scan", "streaming"):
        recipe = Recipe(method=method, top_k=32)
        rows = answer_batch(context_of(stored, recipe), questions, recipe, GREEDY)
        assert [row["question_id"] for row in rows] == [q["question_id"] for q in questions]
        assert all(row["status"] == "ok" and set(row) == set(ANSWERS.names) for row in rows)
        right[method] = sum(exact_match(q["expected"], r["answer"]) for q, r in zip(questions, rows, strict=True))
    assert right["dense"] >= 11
    assert right["graph"] >= right["dense"] - 1
    assert right["flat"] >= right["dense"] - 1
    assert right["scan"] >= right["dense"] - 1
    assert right["streaming"] <= 5


@pytest.mark.parametrize("method", ["dense", "graph", "scan"])
def test_order_batch_and_company_do_not_change_answers(stored: Stored, method: str) -> None:
    questions, recipe = stored[3], Recipe(method=method, top_k=32)
    context = context_of(stored, recipe)
    together = answers(answer_batch(context, questions, recipe, GREEDY))
    assert answers(answer_batch(context, questions[::-1], recipe, GREEDY)) == together
    alone = {}
    for question in questions[:5]:
        alone |= answers(answer_batch(context, [question], recipe, GREEDY))
    assert alone == {key: together[key] for key in alone}
    odd = [{"question_id": "long", "question": "Why " + "and why " * 60 + "?"}, *questions[5:8]]
    assert {k: v for k, v in answers(answer_batch(context, odd, recipe, GREEDY)).items() if k != "long"} == {
        q["question_id"]: together[q["question_id"]] for q in questions[5:8]
    }


def test_answering_never_changes_what_is_stored(stored: Stored) -> None:
    recipe = Recipe(top_k=32)
    context = context_of(stored, recipe)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in context.layers]
    answer_batch(context, stored[3][:4], recipe, GREEDY)
    for layer, (keys, values) in zip(context.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_attended_share_counts_static_set_and_top_k(stored: Stored) -> None:
    n = stored[2].context_tokens
    expected = {"dense": 1.0, "streaming": (16 + 128) / n, "flat": (16 + 128 + 20) / n, "graph": (16 + 128 + 20) / n}
    expected["scan"] = expected["graph"]
    for method, share in expected.items():
        recipe = Recipe(method=method, top_k=20, budget="fixed")
        rows = answer_batch(context_of(stored, recipe), stored[3][:3], recipe, GREEDY)
        assert [row["attended_share"] for row in rows] == pytest.approx([share] * 3, rel=1e-5)


def test_exact_question_attention_costs_more(stored: Stored) -> None:
    recipe = Recipe(top_k=20, question_attention="exact")
    rows = answer_batch(context_of(stored, recipe), stored[3][:3], recipe, GREEDY)
    assert all(0.1 < row["attended_share"] < 1 for row in rows)


def test_bad_questions_are_rows_and_the_rest_goes_on(stored: Stored) -> None:
    good = stored[3][:2]
    bad = [
        {"question_id": "empty", "question": "   "},
        {"question_id": "none", "question": None},
        {"question_id": "special", "question": "What is <|end|>?"},
        {"question_id": "huge", "question": "What is the gate code of the mill? " * 5000},
    ]
    recipe = Recipe(top_k=32)
    context = context_of(stored, recipe)
    rows = answer_batch(context, [bad[0], good[0], bad[1], bad[2], good[1], bad[3]], recipe, GREEDY)
    assert [row["status"] for row in rows] == ["failed", "ok", "failed", "failed", "ok", "failed"]
    assert [row["question_id"] for row in rows] == [
        "empty",
        good[0]["question_id"],
        "none",
        "special",
        good[1]["question_id"],
        "huge",
    ]
    for row, fix in zip(
        (rows[0], rows[2], rows[3], rows[5]), ("empty", "missing", "remove it", "shorten"), strict=True
    ):
        assert fix in row["reason"]
    assert (
        answers(rows)[good[0]["question_id"]]
        == answers(answer_batch(context, good[:1], recipe, GREEDY))[good[0]["question_id"]]
    )


def test_one_failing_question_does_not_take_the_batch_along(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, recipe = stored[3][:4], Recipe(method="dense")
    context = context_of(stored, recipe)
    poison = context.loaded.template.encode_question(context.loaded.tokenizer, questions[2]["question"])
    forward = type(context.loaded.model).forward

    def failing(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if any(row[: len(poison)].tolist() == poison for row in input_ids):
            raise RuntimeError("out of memory")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(context.loaded.model), "forward", failing)
    rows = answer_batch(context, questions, recipe, GREEDY)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert "out of memory" in rows[2]["reason"]


def test_max_new_tokens_and_stop_strings(stored: Stored) -> None:
    recipe = Recipe(method="dense")
    context = context_of(stored, recipe)
    question = stored[3][:1]
    whole = answer_batch(context, question, recipe, GREEDY)[0]
    assert whole["finish_reason"] == "stop"
    short = answer_batch(context, question, recipe, GenerationSettings(max_new_tokens=1))[0]
    assert (short["finish_reason"], short["answer_tokens"]) == ("length", 1)
    assert whole["answer"].startswith(short["answer"])
    stop = whole["answer"][-1]
    cut = answer_batch(context, question, recipe, GenerationSettings(max_new_tokens=24, stop_strings=(stop,)))[0]
    assert cut["finish_reason"] == "stop"
    assert cut["answer"] == whole["answer"].split(stop)[0].strip()


def test_a_question_has_its_own_prefix_and_limit(stored: Stored) -> None:
    """The prefix is as if the model had said it; no other question changes by it."""
    recipe = Recipe(method="dense")
    context = context_of(stored, recipe)
    found = answer_batch(context, stored[3], recipe, GREEDY)
    number = next(n for n, row in enumerate(found) if " " in row["answer"])
    plain, whole, other, company = stored[3][number], found[number], stored[3][number - 1], found[number - 1]
    first, _, rest = whole["answer"].partition(" ")
    asked = [{**plain, "answer_prefix": f" {first}"}, other, {**plain, "max_new_tokens": 1}]
    rows = answer_batch(context, asked, recipe, GREEDY, slots=2)
    assert rows[0]["answer"] == rest
    assert rows[0]["question_tokens"] + rows[0]["answer_tokens"] == whole["question_tokens"] + whole["answer_tokens"]
    assert (rows[1]["answer"], rows[1]["question_tokens"]) == (company["answer"], company["question_tokens"])
    assert (rows[2]["finish_reason"], rows[2]["answer_tokens"]) == ("length", 1)
    wrong = [{**plain, "answer_prefix": "<|end|>"}, {**plain, "max_new_tokens": 1 << 20}]
    reasons = [row["reason"] for row in answer_batch(context, wrong, recipe, GREEDY)]
    assert "answer_prefix" in reasons[0]
    assert "special token" in reasons[0]
    assert "room for 0" in reasons[1]


def test_sampling_is_repeatable_per_question(stored: Stored) -> None:
    recipe = Recipe(method="dense")
    context = context_of(stored, recipe)
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=8.0, seed=1)
    first = answers(answer_batch(context, stored[3][:4], recipe, settings))
    assert answers(answer_batch(context, stored[3][3::-1], recipe, settings)) == first
    other = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=8.0, seed=2)
    assert answers(answer_batch(context, stored[3][:4], recipe, other)) != first


def test_evidence_points_at_the_fact(stored: Stored) -> None:
    questions = stored[3]
    for method in ("dense", "graph"):
        recipe = Recipe(method=method, top_k=32)
        rows = answer_batch(context_of(stored, recipe), questions, recipe, GREEDY)
        right = [(q, r) for q, r in zip(questions, rows, strict=True) if exact_match(q["expected"], r["answer"])]
        hits = 0
        for question, row in right:
            assert sum(span["score"] for span in row["evidence"]) <= 1 + 1e-6
            top = row["evidence"][0]
            assert 0 <= top["start"] < top["end"] <= len(stored[4])
            hits += top["start"] < question["fact_end"] and top["end"] > question["fact_start"]
        assert hits >= 0.75 * len(right)


def test_finished_questions_are_not_counted_further(stored: Stored) -> None:
    """A question's share and evidence are the same whether it waits for a longer answer or not."""
    recipe = Recipe(top_k=32)
    context = context_of(stored, recipe)
    questions = stored[3][:6]
    together = answer_batch(context, questions, recipe, GREEDY)
    for question, row in zip(questions, together, strict=True):
        alone = answer_batch(context, [question], recipe, GREEDY)[0]
        assert alone["attended_share"] == pytest.approx(row["attended_share"])
        assert alone["evidence"][0]["start"] == row["evidence"][0]["start"]
        assert alone["evidence"][0]["score"] == pytest.approx(row["evidence"][0]["score"], abs=1e-3)


def test_an_index_is_refused_for_another_model(stored: Stored) -> None:
    _loaded, store, manifest, _, _ = stored
    other = load_model(ModelConfig(device="cpu", dtype="bfloat16"))
    with pytest.raises(FingerprintError, match="dtype"):
        open_context(store, manifest, other, Recipe())
    template = load_model(ModelConfig(device="cpu", context_template="Read this.\n{document}\nQ: {question}"))
    with pytest.raises(FingerprintError, match="context_template"):
        open_context(store, manifest, template, Recipe())


def test_graph_needs_a_graph(stored: Stored, tmp_path: Path) -> None:
    loaded = stored[0]
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, stored[4], BuildConfig(sink_tokens=16, window_tokens=128, index="none"))
    assert manifest.fingerprint != stored[2].fingerprint
    with pytest.raises(FingerprintError, match="flat"):
        open_context(store, manifest, loaded, Recipe())
    rows = answer_batch(
        open_context(store, manifest, loaded, Recipe(method="flat")), stored[3][:2], Recipe(method="flat"), GREEDY
    )
    assert [row["status"] for row in rows] == ["ok", "ok"]


@pytest.mark.parametrize(("held", "lacked"), [("graph", "scan"), ("scan", "graph")])
def test_an_index_holds_what_was_built(stored: Stored, tmp_path: Path, held: str, lacked: str) -> None:
    loaded = stored[0]
    store = new_store(tmp_path)
    build = BuildConfig(sink_tokens=16, window_tokens=128, index=held)  # type: ignore[arg-type]
    manifest = store_document(loaded, store, stored[4], build)
    with pytest.raises(FingerprintError, match=f"holds no {lacked}; use flat, or build with --index graph"):
        open_context(store, manifest, loaded, Recipe(method=lacked))  # type: ignore[arg-type]
    recipe = Recipe(method=held, top_k=32)  # type: ignore[arg-type]
    rows = answer_batch(open_context(store, manifest, loaded, recipe), stored[3], recipe, GREEDY)
    both = answer_batch(context_of(stored, recipe), stored[3], recipe, GREEDY)
    assert answers(rows) == answers(both)
    assert set(open_context(store, manifest, loaded, Recipe(method="auto")).layers[0].indexes) == {held}


def test_a_scan_finds_most_of_the_exact_best(stored: Stored) -> None:
    recipe = Recipe(method="scan", top_k=32, budget="fixed")
    context = context_of(stored, recipe)
    for layer in context.layers:
        index = layer.indexes["scan"]
        assert (index.exceptions >= 0).sum() == 2 * 128  # it is no exact search of a short document
        queries = np.ascontiguousarray(index.keys.decode()[:, ::90] * 3)
        exact = np.argsort(-np.einsum("hqd,hkd->hqk", queries, index.keys.decode()), axis=2)[:, :, :32]
        found = index.search(queries, k=32).ids
        shares = [
            len(set(a) & set(b)) / 32
            for a, b in zip(found.reshape(-1, 32).tolist(), exact.reshape(-1, 32).tolist(), strict=True)
        ]
        assert np.mean(shares) > 0.9


def test_a_flipped_byte_is_never_answered_from(stored: Stored, tmp_path: Path) -> None:
    loaded, _, _, _, text = stored
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, text, BUILD)
    part = next(p for p in manifest.parts if p.layer == 2)
    file = tmp_path / "store" / part.path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"sha256|SHA-256"):
        open_context(store, manifest, loaded, Recipe())


def test_padding_queries_count_nothing() -> None:
    """Two questions of different length get the same share as alone."""
    keys = torch.randn(1, 50, 4)
    layer = ContextLayer(keys, keys, 0, 10, 40, np.zeros(1, np.int64))
    attention = QuestionAttention([layer], context_tokens=50, slots=2, recipe=Recipe(method="streaming"))
    query, tail = torch.randn(2, 2, 5, 4), torch.randn(2, 1, 5, 4)
    attention.begin(0, [5, 2], question=True)
    out = attention.attend(AttentionCall(0, query, tail, tail, 0.5, None, 0))
    assert torch.isfinite(out).all()
    np.testing.assert_array_equal(attention._seen.queries, [5, 2])
    assert [attention.seen(slot).attended_share for slot in (0, 1)] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("method", ["dense", "graph", "scan"])
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_a_free_slot_takes_the_next_question(stored: Stored, method: str, slots: int) -> None:
    """Of 12 questions with answers of unlike length: the same rows as with a slot for each."""
    recipe = Recipe(method=method, top_k=32)
    context = context_of(stored, recipe)
    questions = [*stored[3], {"question_id": "long", "question": "Which " + "gate, and which " * 20 + "mill?"}]
    whole = answer_batch(context, questions, recipe, GREEDY)
    passes: list[int] = []
    executor_forward = Executor.forward

    def counting(self: Executor, first: int, tokens: Any, *, question: bool) -> torch.Tensor:
        passes.append(first + len(tokens))
        return executor_forward(self, first, tokens, question=question)

    with mock.patch.object(Executor, "forward", counting):
        rows = answer_batch(context, questions, recipe, GREEDY, slots=slots)
    assert max(passes) == slots
    for row, expected in zip(rows, whole, strict=True):
        for name in ("question_id", "answer", "finish_reason", "answer_tokens", "question_tokens"):
            assert row[name] == expected[name]
        assert row["attended_share"] == pytest.approx(expected["attended_share"], rel=1e-3)
        assert row["evidence"][0]["score"] == pytest.approx(expected["evidence"][0]["score"], abs=1e-3)
    tokens = sum(row["answer_tokens"] + (row["finish_reason"] == "stop") for row in rows)
    assert len(passes) <= 2 * tokens / slots + max(r["answer_tokens"] for r in rows) + len(rows) + 1


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=12, do_sample=False, repetition_penalty=1.4),
        GenerationSettings(max_new_tokens=12, do_sample=True, temperature=1.5, top_k=40, top_p=0.9, seed=5),
        GenerationSettings(max_new_tokens=12, do_sample=True, temperature=3.0, repetition_penalty=1.2, seed=6),
    ],
    ids=["penalty", "sampled", "both"],
)
def test_tokens_are_those_of_transformers_generate(
    stored: Stored, settings: GenerationSettings, tmp_path: Path
) -> None:
    """Processors see context and tail, and draws come from a stream of the question's own: all answered together."""
    loaded, recipe = stored[0], Recipe(method="dense")
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, stored[4], dataclasses.replace(BUILD, kv_dtype="float32"))
    context = open_context(store, manifest, loaded, recipe)
    questions = stored[3][:4]
    rows = answer_batch(context, questions, recipe, settings, slots=3)
    for question, row in zip(questions, rows, strict=True):
        tail = loaded.template.encode_question(loaded.tokenizer, question["question"])
        ids = torch.cat([context.token_ids, torch.tensor(tail)])[None]
        torch.manual_seed(seed_of(settings.seed, question["question_id"]))
        config = generation_config(loaded, settings)
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        text = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert (row["status"], row["answer"]) == ("ok", text)
