"""Long tails: what leaves the part that is attended whole is found again, and belongs to its question alone."""

from __future__ import annotations

import pytest
import torch

from rabatch.attention import overlay
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.demo.corpus import generate_document
from rabatch.executor import Executor
from rabatch.generation import Generation
from rabatch.loading import LoadedModel, load_model
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document

BLOCK = 16


Stored = tuple[LoadedModel, IndexStore, Manifest]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    loaded = load_model(ModelConfig(device="cpu", dtype="float32"))
    store = new_store(tmp_path_factory.mktemp("overlay"))
    document, _ = generate_document(document_id="d", tokens=600, n_questions=2, seed=3)
    manifest = store_document(loaded, store, document["text"], BuildConfig(sink_tokens=8, window_tokens=64))
    return loaded, store, manifest


@torch.inference_mode()
def logits(context: OpenContext, tails: list[list[int]], recipe: Recipe) -> torch.Tensor:
    """Logits after every token from the ninth on, of each tail, [tails, tokens - 8, vocabulary]."""
    made = Generation(context.loaded, GenerationSettings(), context.token_ids)
    executor = Executor(context, recipe, made, slots=len(tails))
    executor.forward(0, [tail[:8] for tail in tails], question=True)
    found = []
    for number in range(8, len(tails[0])):
        found.append(executor.forward(0, [[tail[number]] for tail in tails], question=False))
    assert bool((executor.attention.overlays.begins > 0).all()) == (recipe.tail_tokens + BLOCK < len(tails[0]) - 1)
    return torch.stack(found, 1)


@pytest.fixture
def tails(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr(overlay, "BLOCK_TOKENS", BLOCK)
    make = torch.Generator().manual_seed(0)
    return [torch.randint(5, 4000, (60,), generator=make).tolist() for _ in range(2)]


@pytest.mark.parametrize("compiled", [True, False])
def test_with_a_full_budget_an_overlay_changes_nothing(
    stored: Stored, tails: list[list[int]], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Recipe(top_k=1 << 20, budget="fixed")
    wide = opened(stored, full)
    whole = logits(wide, tails, full)
    if not compiled:
        monkeypatch.setattr("rabatch.attention.context.attend_compiled", not_called)
        monkeypatch.setattr("rabatch.attention.context.QuestionAttention.begin", on_card)
    long = logits(wide, tails, Recipe(top_k=1 << 20, budget="fixed", tail_tokens=20))
    torch.testing.assert_close(long, whole, atol=5e-4, rtol=5e-4)


def test_older_tokens_compete_for_the_budget(stored: Stored, tails: list[list[int]]) -> None:
    """With few keys the result changes, but it is far nearer than without the older tokens."""
    few = Recipe(top_k=30, budget="fixed")
    context = opened(stored, few)
    whole = logits(context, tails, few)
    long = logits(context, tails, Recipe(top_k=30, budget="fixed", tail_tokens=20))
    assert 0 < (long - whole).norm() / whole.norm() < 0.1


def test_overlays_are_private_and_follow_their_slot(stored: Stored, tails: list[list[int]]) -> None:
    recipe = Recipe(top_k=60, tail_tokens=20)
    context = opened(stored, recipe)
    together = logits(context, tails, recipe)
    for number, tail in enumerate(tails):
        alone = logits(context, [tail], recipe)
        torch.testing.assert_close(together[number], alone[0], atol=5e-4, rtol=5e-4)
    made = Generation(context.loaded, GenerationSettings(), context.token_ids)
    executor = Executor(context, recipe, made, slots=2)
    with torch.inference_mode():
        executor.forward(0, [tail[:50] for tail in tails], question=True)
        expected = executor.forward(0, [[tail[50]] for tail in tails], question=False)[1]
        executor = Executor(context, recipe, made, slots=2)
        executor.forward(0, [tail[:50] for tail in tails], question=True)
        executor.attention.move(1, 0)
        moved = executor.forward(0, [[tails[1][50]]], question=False)[0]
        executor.attention.clear(0)
        assert int(executor.attention.overlays.begins[0]) == 0
    torch.testing.assert_close(moved, expected, atol=5e-4, rtol=5e-4)


def test_dense_keeps_the_whole_tail(stored: Stored, tails: list[list[int]]) -> None:
    recipe = Recipe(method="dense", tail_tokens=20)
    context = opened(stored, recipe)
    made = Generation(context.loaded, GenerationSettings(), context.token_ids)
    executor = Executor(context, recipe, made, slots=1)
    with torch.inference_mode():
        executor.forward(0, [tails[0]], question=True)
    assert int(executor.attention.overlays.begins[0]) == 0


def opened(stored: Stored, recipe: Recipe) -> OpenContext:
    loaded, store, manifest = stored
    return open_context(store, manifest, loaded, recipe)


def not_called(*args: object, **options: object) -> None:
    raise AssertionError("the compiled pass was taken")


def on_card(self: object, *args: object, **options: object) -> torch.Tensor:
    from rabatch.attention.context import QuestionAttention

    assert isinstance(self, QuestionAttention)
    self.compiled = False
    self._slots = slice(args[0], args[0] + len(args[1]))  # type: ignore[arg-type, operator]
    self._question = bool(options["question"])
    return self.tails.begin(*args)  # type: ignore[arg-type]
