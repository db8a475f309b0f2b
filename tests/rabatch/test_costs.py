"""Recipe `auto`: what was measured decides, and the answer's row says what it decided."""

from __future__ import annotations

import pytest

from rabatch import costs
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.loading import LoadedModel, load_model
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document

Stored = tuple[LoadedModel, IndexStore, Manifest, list[dict]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    loaded = load_model(ModelConfig(device="cpu"))
    store = new_store(tmp_path_factory.mktemp("costs"))
    document, questions = generate_document(document_id="d", tokens=500, n_questions=3, seed=5)
    build = BuildConfig(sink_tokens=8, window_tokens=64)
    return loaded, store, store_document(loaded, store, document["text"], build), questions


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_seconds", {})


@pytest.mark.parametrize("faster", ["dense", "graph", "scan"])
def test_the_faster_way_is_taken_and_named(stored: Stored, faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, store, manifest, questions = stored
    asked: list[tuple[str, int, int]] = []

    def seconds(layer: object, recipe: Recipe, **options: int) -> float:
        asked.append((recipe.method, options["questions"], options["q_tokens"]))
        return 1.0 if recipe.method == faster else 2.0

    monkeypatch.setattr(costs, "layer_seconds", seconds)
    recipe = Recipe(method="auto", top_k=20)
    context = open_context(store, manifest, loaded, recipe)
    rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=12), slots=2)
    assert {row["recipe"] for row in rows} == {faster}
    assert {(n, t) for _, n, t in asked} == {(2, 1)}
    named = Recipe(method=faster, top_k=20)  # type: ignore[arg-type]
    alone = answer_batch(
        open_context(store, manifest, loaded, named), questions, named, GenerationSettings(max_new_tokens=12)
    )
    assert [row["answer"] for row in rows] == [row["answer"] for row in alone]


@pytest.mark.parametrize("faster", ["exact", "index"])
def test_questions_attend_by_the_cheaper_way(stored: Stored, faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, store, manifest, _ = stored
    monkeypatch.setattr(
        costs, "layer_seconds", lambda layer, recipe, **_: 1.0 if recipe.question_attention == faster else 2.0
    )
    recipe = Recipe(question_attention="auto")
    found = costs.chosen(open_context(store, manifest, loaded, recipe), recipe, questions=3)
    assert (found.question_attention, found.method) == (faster, "graph")


def test_times_are_taken_once_for_a_length(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, store, manifest, _ = stored
    calls: list[str] = []
    take = costs.layer_seconds

    def counted(*args: object, **options: object) -> float:
        calls.append("taken")
        return take(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(costs, "layer_seconds", counted)
    recipe = Recipe(method="auto", question_attention="auto", top_k=20)
    context = open_context(store, manifest, loaded, recipe)
    first = costs.chosen(context, recipe, questions=2)
    n = len(calls)
    assert n >= 2
    assert costs.chosen(context, recipe, questions=2) == first
    assert len(calls) == n
    assert "auto" not in (first.method, first.question_attention)
    costs.chosen(context, recipe, questions=3)
    assert len(calls) > n


def test_without_an_index_auto_is_dense(stored: Stored) -> None:
    loaded, store, _, questions = stored
    document, questions = generate_document(document_id="e", tokens=400, n_questions=2, seed=6)
    bare = store_document(loaded, store, document["text"], BuildConfig(index="none"), "e")
    recipe = Recipe(method="auto", question_attention="auto")
    context = open_context(store, bare, loaded, recipe)
    rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=4))
    assert [(row["status"], row["recipe"]) for row in rows] == [("ok", "dense")] * 2


def test_a_recipe_without_auto_is_left_alone(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, store, manifest, _ = stored
    monkeypatch.setattr(costs, "layer_seconds", lambda *_, **__: pytest.fail("nothing to measure"))
    recipe = Recipe(method="flat")
    assert costs.chosen(open_context(store, manifest, loaded, recipe), recipe, questions=5) is recipe
