"""What every method keeps to: exact with a full budget, its own share of the keys otherwise, the same in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rabatch.config import METHODS, BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import FingerprintError
from rabatch.evaluation.scoring import exact_match
from rabatch.loading import LoadedModel, load_model
from rabatch.selectors import RETRIEVING
from rabatch.selectors.quest import PAGE_KEYS
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

FULL = 1 << 20
SINK, WINDOW, TOP_K = 16, 128, 32
BUILD = BuildConfig(sink_tokens=SINK, window_tokens=WINDOW, key_mass=True)
GREEDY = GenerationSettings(max_new_tokens=24)
TAILS = [[7, 8, 9], list(range(100, 150)), [300]]

retrieving = pytest.mark.parametrize("method", RETRIEVING)
every = pytest.mark.parametrize("method", [method for method in METHODS if method != "auto"])


class Stored(NamedTuple):
    loaded: LoadedModel
    store: IndexStore
    manifest: Manifest
    questions: list[dict[str, Any]]
    text: str

    def opened(self, recipe: Recipe) -> OpenContext:
        return open_context(self.store, self.manifest, self.loaded, recipe)

    def answers(self, recipe: Recipe, questions: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        return answer_batch(self.opened(recipe), questions, recipe, GREEDY, **options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    loaded = load_model(ModelConfig(device="cpu"))
    document, questions = generate_document(document_id="d", tokens=2048, n_questions=8, kinds=("single",), seed=11)
    store = new_store(tmp_path_factory.mktemp("methods"))
    return Stored(loaded, store, store_document(loaded, store, document["text"], BUILD), questions, document["text"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A random model in float32 whose index is large enough for the baselines to be built."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded = load_model(ModelConfig(name=str(save_tiny_model("llama", folder / "model")), device="cpu", dtype="float32"))
    document, _ = generate_document(document_id="d", tokens=500, n_questions=2, seed=5)
    build = BuildConfig(sink_tokens=8, window_tokens=32, kv_dtype="float32", query_top_k=16, key_mass=True)
    store = new_store(folder)
    return Stored(loaded, store, store_document(loaded, store, document["text"], build), [], document["text"])


@retrieving
@pytest.mark.parametrize("question_attention", ["index", "exact"])
def test_full_budget_equals_dense(tiny: Stored, method: Any, question_attention: Any) -> None:
    dense = Recipe(method="dense")
    expected = tail_logits(tiny.opened(dense), TAILS, dense, 4)
    recipe = Recipe(method=method, top_k=FULL, question_attention=question_attention)
    found = tail_logits(tiny.opened(recipe), TAILS, recipe, 4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@retrieving
def test_a_small_budget_is_not_dense(tiny: Stored, method: Any) -> None:
    """The comparison above can fail."""
    dense = Recipe(method="dense")
    expected = tail_logits(tiny.opened(dense), TAILS, dense, 4)
    recipe = Recipe(method=method, top_k=1)
    moved = (tail_logits(tiny.opened(recipe), TAILS, recipe, 4) - expected).abs().max()
    assert moved > 1e-3


@retrieving
def test_no_more_than_its_budget_is_attended(demo: Stored, method: Any) -> None:
    """In every layer but those that are dense by what was published."""
    recipe = Recipe(method=method, top_k=20, budget="fixed", question_attention="index")
    n, layers = demo.manifest.context_tokens, demo.manifest.geometry.n_layers
    dense = recipe.leading_dense_layers
    rows = demo.answers(recipe, demo.questions[:3])
    most = SINK + WINDOW + 20 + (PAGE_KEYS if method == "quest" else 0)
    for row in rows:
        share = row["attended_share"] * n
        if recipe.observes_questions:  # the question's own pass is exact
            passes = row["question_tokens"], row["answer_tokens"] + (row["finish_reason"] == "stop") - 1
            share = (share * sum(passes) - n * passes[0]) / passes[1]
        sparse = (share * layers - n * dense) / (layers - dense)
        assert SINK + WINDOW < sparse <= most + 1
        if method not in ("pyramidkv", "infinigen", "quest"):
            assert sparse == pytest.approx(SINK + WINDOW + 20, abs=0.1)


@every
def test_order_and_company_change_nothing(demo: Stored, method: Any) -> None:
    recipe = Recipe(method=method, top_k=TOP_K)
    context = demo.opened(recipe)

    def answered(questions: list[dict[str, Any]], slots: int = 0) -> dict[str, tuple[str, float]]:
        rows = answer_batch(context, questions, recipe, GREEDY, slots=slots)
        assert all(row["status"] == "ok" for row in rows), rows[0]["reason"]
        return {row["question_id"]: (row["answer"], pytest.approx(row["attended_share"], rel=1e-3)) for row in rows}

    questions = demo.questions[:5]
    together = answered(questions)
    assert answered(questions[::-1], slots=2) == together
    assert answered([questions[3]]) == {questions[3]["question_id"]: together[questions[3]["question_id"]]}


@retrieving
def test_answering_changes_nothing_stored(demo: Stored, method: Any) -> None:
    recipe = Recipe(method=method, top_k=TOP_K)
    first = [demo.store.read_layer(demo.manifest, layer) for layer in range(demo.manifest.geometry.n_layers)]
    context = demo.opened(recipe)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in context.layers]
    answer_batch(context, demo.questions[:2], recipe, GREEDY)
    for layer, (keys, values) in zip(context.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    for number, block in enumerate(first):
        assert demo.store.read_layer(demo.manifest, number, check=True).equals(block)


@every
def test_two_facts_asked_separately(demo: Stored, method: Any) -> None:
    """All but the static set alone can answer both; that one neither, if they stand in the middle."""
    recipe = Recipe(method=method, top_k=TOP_K)
    start, stop = demo.manifest.index_start, demo.manifest.index_stop
    tokens = demo.opened(recipe).tokens
    middle = int(tokens.char_end[start]), int(tokens.char_start[stop - 1])
    asked = [q for q in demo.questions if middle[0] <= q["fact_start"] and q["fact_end"] <= middle[1]][:2]
    right = [exact_match(q["expected"], demo.answers(recipe, [q])[0]["answer"]) for q in asked]
    assert right == [method != "streaming"] * 2
