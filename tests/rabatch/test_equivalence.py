"""Invariant 1: with a full budget every recipe equals dense attention, and dense equals plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rabatch.attention.context import QuestionAttention
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.executor import Executor
from rabatch.loading import LoadedModel, load_model
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import ARCHITECTURES, SLIDING, SLIDING_LAYERS, save_tiny_model

TOLERANCE = 1e-4
FULL = 1 << 20
STEPS = 4
BUILD = BuildConfig(sink_tokens=8, window_tokens=32, kv_dtype="float32", prefill_chunk_tokens=128, query_top_k=16)
QUESTIONS = ["What is the gate code?", "Who manages the old mill near the river, and why?", "When?"]


NAMES = [*ARCHITECTURES, "demo"]
# Models reach the kernels by one seam; these differ in what goes through it: windows, soft-capped logits, scaling.
DIFFERENT = ("mistral-sliding", "gemma2", "demo")


@pytest.fixture(scope="module", params=NAMES)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LoadedModel, list]:
    """A loaded fp32 model, one stored document of a few hundred tokens, opened for every recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    name = "demo" if request.param == "demo" else str(save_tiny_model(request.param, folder / "model"))
    loaded = load_model(ModelConfig(name=name, device="cpu", dtype="float32"))
    document, _ = generate_document(document_id="d", tokens=400, n_questions=2, seed=5)
    store = new_store(folder)
    manifest = store_document(loaded, store, document["text"], BUILD)
    return request.param, loaded, [store, manifest]


def opened(setting: tuple, **recipe: object) -> tuple[OpenContext, Recipe]:
    made = Recipe(**recipe)  # type: ignore[arg-type]
    return open_context(*setting[2], setting[1], made), made


def tails(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.template.encode_question(loaded.tokenizer, question) for question in QUESTIONS]


def reference_logits(loaded: LoadedModel, context_ids: list[int], tail: list[int], steps: int) -> torch.Tensor:
    """Plain transformers, eager attention, one sequence without a cache: [steps, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(
        loaded.model.name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, found = context_ids + tail, []
    for _ in range(steps):
        with torch.inference_mode():
            found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids = [*ids, int(found[-1].argmax())]
    return torch.stack(found)


def test_dense_equals_transformers(setting: tuple) -> None:
    context, recipe = opened(setting, method="dense")
    found = tail_logits(context, tails(setting[1]), recipe, STEPS)
    for row, tail in enumerate(tails(setting[1])):
        expected = reference_logits(setting[1], context.token_ids.tolist(), tail, STEPS)
        torch.testing.assert_close(found[row], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("method", ["flat", "graph", "scan"])
@pytest.mark.parametrize("question_attention", ["index", "exact"])
def test_full_budget_equals_dense(setting: tuple, method: str, question_attention: str) -> None:
    dense = tail_logits(*opened(setting, method="dense")[:1], tails(setting[1]), Recipe(method="dense"), STEPS)
    context, recipe = opened(setting, method=method, top_k=FULL, question_attention=question_attention)
    found = tail_logits(context, tails(setting[1]), recipe, STEPS)
    torch.testing.assert_close(found, dense, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("method", ["streaming", "flat", "graph"])
def test_small_budget_differs_from_dense(setting: tuple, method: str) -> None:
    """The comparison above can fail: with few keys the logits move, unless every layer is natively sliding."""
    name, loaded, _ = setting
    dense = tail_logits(*opened(setting, method="dense")[:1], tails(loaded), Recipe(method="dense"))
    context, recipe = opened(setting, method=method, top_k=1)
    moved = (tail_logits(context, tails(loaded), recipe) - dense).abs().max()
    all_sliding = len(SLIDING_LAYERS.get(name, ())) == loaded.geometry.n_layers
    assert (moved <= TOLERANCE) if all_sliding else (moved > 10 * TOLERANCE)


def test_sliding_layers_stay_sliding(setting: tuple) -> None:
    """A natively sliding layer stores its window only, keeps no graph, and says so in the manifest."""
    name, _loaded, (store, manifest) = setting
    windows = manifest.geometry.sliding_windows
    assert {layer for layer, window in enumerate(windows) if window} == SLIDING_LAYERS.get(name, set())
    for layer, window in enumerate(windows):
        block = store.read_layer(manifest, layer)
        assert block.rows == (min(SLIDING, manifest.context_tokens) if window else manifest.context_tokens)
        assert (block.neighbors is None) == bool(window)


def test_chunk_size_does_not_change_stored_keys(setting: tuple, tmp_path: Path) -> None:
    _, loaded, (store, manifest) = setting
    document, _ = generate_document(document_id="d", tokens=400, n_questions=2, seed=5)
    other = BuildConfig.from_dict({**BUILD.to_dict(), "prefill_chunk_tokens": 4096})
    whole_store = new_store(tmp_path)
    whole = store_document(loaded, whole_store, document["text"], other)
    assert whole.fingerprint == manifest.fingerprint
    for layer in range(manifest.geometry.n_layers):
        mine, theirs = store.read_layer(manifest, layer), whole_store.read_layer(whole, layer)
        torch.testing.assert_close(mine.keys, theirs.keys, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(mine.values, theirs.values, atol=TOLERANCE, rtol=TOLERANCE)


def test_generate_equals_transformers(setting: tuple) -> None:
    """`answer_batch` (left-padded, tail cache) gives the text that transformers' own generate gives, one by one."""
    loaded = setting[1]
    context, recipe = opened(setting, method="dense")
    rows = answer_batch(
        context,
        [{"question_id": str(i), "question": q} for i, q in enumerate(QUESTIONS)],
        recipe,
        GenerationSettings(max_new_tokens=6, do_sample=False),
    )
    model = AutoModelForCausalLM.from_pretrained(
        loaded.model.name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for row, tail in zip(rows, tails(loaded), strict=True):
        ids = torch.tensor([context.token_ids.tolist() + tail])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert row["status"] == "ok", row["reason"]
        assert row["answer"] == text


@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[] if name in DIFFERENT else [pytest.mark.slow]) for name in NAMES],
    indirect=True,
    scope="module",
)
@pytest.mark.parametrize("method", ["dense", "streaming", "flat", "graph"])
@pytest.mark.parametrize("question_attention", ["exact", "index"])
def test_torch_attends_as_the_compiled_kernels_do(
    setting: tuple, method: str, question_attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a card, run on the CPU: the same logits, shares and evidence."""
    context, recipe = opened(setting, method=method, top_k=20, question_attention=question_attention)
    found = {}
    seen: list[tuple] = []
    begin = QuestionAttention.begin

    def on_card(self: QuestionAttention, *args: Any, **options: Any) -> torch.Tensor:
        self.compiled = False
        return begin(self, *args, **options)

    def remember(self: Executor) -> None:
        seen.append(tuple(self.attention.seen(slot) for slot in range(len(QUESTIONS))))

    for name in ("compiled", "torch"):
        with monkeypatch.context() as patch:
            if name == "torch":
                patch.setattr(QuestionAttention, "begin", on_card)
            found[name] = tail_logits(context, tails(setting[1]), recipe, STEPS, then=remember)
    torch.testing.assert_close(found["torch"], found["compiled"], atol=TOLERANCE, rtol=TOLERANCE)
    for mine, theirs in zip(*seen, strict=True):
        assert mine.attended_share == pytest.approx(theirs.attended_share)
        some_layer_is_full = mine.attended_share > 0
        assert (
            (mine.mass_share is None)
            == (theirs.mass_share is None)
            == (method == "streaming" or not some_layer_is_full)
        )
        assert mine.mass_share is None or mine.mass_share == pytest.approx(theirs.mass_share, rel=1e-4)
        if method != "dense" and question_attention == "index":  # exact attention names its best keys only
            np.testing.assert_allclose(mine.mass, theirs.mass, atol=1e-4)
