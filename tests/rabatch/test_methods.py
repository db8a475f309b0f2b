"""What every method keeps to: exact with a full budget, else within its share of the keys, the same in any company."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from rabatch.attention.context import QuestionAttention
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.evaluation.scoring import exact_match
from rabatch.loading import LoadedModel, load_model
from rabatch.selectors import RETRIEVING
from rabatch.selectors.quest import PAGE_KEYS
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from rabatch.traits import METHODS
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

FULL = 1 << 20
SINK, WINDOW, TOP_K = 16, 128, 32
BUILD = BuildConfig(sink_tokens=SINK, window_tokens=WINDOW, key_mass=True, query_vectors=True)
GREEDY = GenerationSettings(max_new_tokens=24)
TAILS = [[7, 8, 9], list(range(100, 150)), [300]]

retrieving = pytest.mark.parametrize("method", RETRIEVING)
every = pytest.mark.parametrize("method", [method for method in METHODS if method != "auto"])


class Stored(NamedTuple):
    loaded: LoadedModel
    store: IndexStore
    manifest: Manifest
    questions: list[dict[str, Any]]
    contexts: dict[Recipe, OpenContext]

    def opened(self, recipe: Recipe) -> OpenContext:
        """Once: indexes that are not stored are built then."""
        if recipe not in self.contexts:
            self.contexts[recipe] = open_context(self.store, self.manifest, self.loaded, recipe)
        return self.contexts[recipe]

    def answers(self, recipe: Recipe, questions: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        return answer_batch(self.opened(recipe), questions, recipe, GREEDY, **options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    loaded = load_model(ModelConfig(device="cpu"))
    document, questions = generate_document(document_id="d", tokens=2048, n_questions=8, kinds=("single",), seed=11)
    store = new_store(tmp_path_factory.mktemp("methods"))
    return Stored(loaded, store, store_document(loaded, store, document["text"], BUILD), questions, {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A random model in float32 whose index is large enough for the baselines to be built."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded = load_model(
        ModelConfig(name=str(save_tiny_model("qwen3", folder / "model")), device="cpu", dtype="float32")
    )
    document, _ = generate_document(document_id="d", tokens=500, n_questions=2, seed=5)
    kept = {"key_mass": True, "query_vectors": True}
    build = BuildConfig(sink_tokens=8, window_tokens=32, kv_dtype="float32", query_top_k=16, **kept)
    store = new_store(folder)
    return Stored(loaded, store, store_document(loaded, store, document["text"], build), [], {})


@retrieving
@pytest.mark.parametrize("question_attention", ["index", "exact"])
def test_full_budget_equals_dense(tiny: Stored, method: Any, question_attention: Any) -> None:
    dense = Recipe(method="dense")
    expected = tail_logits(tiny.opened(dense), TAILS, dense, 4)
    recipe = Recipe(method=method, top_k=FULL, question_attention=question_attention)
    found = tail_logits(tiny.opened(recipe), TAILS, recipe, 4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every
def test_torch_attends_as_the_compiled_kernels_do(tiny: Stored, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a card, run on the CPU."""
    recipe = Recipe(method=method, top_k=20)
    expected = tail_logits(tiny.opened(recipe), TAILS, recipe, 4)
    begin = QuestionAttention.begin

    def on_card(self: QuestionAttention, *args: Any, **options: Any) -> torch.Tensor:
        self.compiled = False
        return begin(self, *args, **options)

    monkeypatch.setattr(QuestionAttention, "begin", on_card)
    found = tail_logits(tiny.opened(recipe), TAILS, recipe, 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """One layer keeps all heads, one some and one none, and what is kept is encoded."""
    folder = tmp_path_factory.mktemp("mixed")
    loaded = load_model(
        ModelConfig(name=str(save_tiny_model("qwen3", folder / "model")), device="cpu", dtype="float32")
    )
    document, _ = generate_document(document_id="d", tokens=500, n_questions=2, seed=5)
    build = BuildConfig(
        sink_tokens=8, window_tokens=32, query_top_k=16, query_share=1.0, key_mass=True, query_vectors=True,
        key_codec="int8", value_codec="int4", head_pattern=[[1, 1], [0, 1], [0, 0]],
    )  # fmt: skip
    store = new_store(folder)
    return Stored(loaded, store, store_document(loaded, store, document["text"], build), [], {})


@retrieving
def test_full_budget_equals_dense_where_heads_stream_and_keys_are_encoded(mixed: Stored, method: Any) -> None:
    dense = Recipe(method="dense")
    expected = tail_logits(mixed.opened(dense), TAILS, dense, 3)
    recipe = Recipe(method=method, top_k=FULL, estimate=False)
    found = tail_logits(mixed.opened(recipe), TAILS, recipe, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    few = Recipe(method=method, top_k=16, estimate=False, dense_layers=1)
    assert (tail_logits(mixed.opened(few), TAILS, few, 3) - expected).abs().max() > 1e-3
    indexed = mixed.manifest.index_stop - mixed.manifest.index_start
    for layer, heads in enumerate((2, 1)):
        block = mixed.store.read_heads(mixed.manifest, layer, streaming=False)
        assert block is not None
        assert block.key_mass is not None
        assert block.key_mass.shape == (heads, indexed)
        assert block.key_mass.sum() > 0
        assert block.queries is not None
        assert block.queries.shape == (heads, block.rows, block.head_dim)  # more were sampled
        assert len(block.queries[0].unique(dim=0)) == block.rows


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
    recipe = Recipe(method=method, top_k=TOP_K, budget="fixed")
    n, layers = demo.manifest.context_tokens, demo.manifest.geometry.n_layers
    dense = recipe.leading_dense_layers
    rows = demo.answers(recipe, demo.questions[:3])
    most = SINK + WINDOW + TOP_K + (PAGE_KEYS if method == "quest" else 0)
    for row in rows:
        share = row["attended_share"] * n
        if recipe.traits.observes_questions:  # the question's own pass is exact
            passes = row["question_tokens"], row["answer_tokens"] + (row["finish_reason"] == "stop") - 1
            share = (share * sum(passes) - n * passes[0]) / passes[1]
        sparse = (share * layers - n * dense) / (layers - dense)
        assert SINK + WINDOW < sparse <= most + 1
        if method not in ("pyramidkv", "infinigen", "quest"):
            assert sparse == pytest.approx(SINK + WINDOW + TOP_K, abs=0.1)


@every
def test_order_and_company_change_nothing(demo: Stored, method: Any) -> None:
    recipe = Recipe(method=method, top_k=TOP_K, budget="fixed")
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
    recipe = Recipe(method=method, top_k=TOP_K, budget="fixed")
    first = [demo.store.read_layer(demo.manifest, layer) for layer in range(demo.manifest.geometry.n_layers)]
    context = demo.opened(recipe)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in context.layers]
    answer_batch(context, demo.questions[:2], recipe, GREEDY)
    for layer, (keys, values) in zip(context.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    for number, block in enumerate(first):
        assert demo.store.read_layer(demo.manifest, number, check=True).equals(block)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("auto", "h2o")])
def test_two_facts_asked_separately(demo: Stored, method: Any) -> None:
    """All but the static set alone can answer both; that one neither, if they stand in the middle. H2O is not among
    them: what it keeps is chosen before there is a question."""
    recipe = Recipe(method=method, top_k={"quest": 128}.get(method, TOP_K), budget="fixed")
    start, stop = demo.manifest.index_start, demo.manifest.index_stop
    tokens = demo.opened(recipe).tokens
    middle = int(tokens.char_end[start]), int(tokens.char_start[stop - 1])
    asked = [q for q in demo.questions if middle[0] <= q["fact_start"] and q["fact_end"] <= middle[1]][-2:]
    right = [exact_match(q["expected"], demo.answers(recipe, [q])[0]["answer"]) for q in asked]
    assert right == [method != "streaming"] * 2
