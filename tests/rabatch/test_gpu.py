"""The same path on a CUDA card: it equals dense attention there, and the CPU's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.loading import load_model
from rabatch.prefill import encode, prefill_units
from tests.rabatch.engine import new_store, store_document, tail_logits

pytestmark = pytest.mark.gpu
BUILD = BuildConfig(sink_tokens=16, window_tokens=128, kv_dtype="float32", prefill_chunk_tokens=512)


@pytest.mark.parametrize("method", ["flat", "graph"])
def test_full_budget_equals_dense_on_cuda(tmp_path: Path, method: str) -> None:
    loaded = load_model(ModelConfig(device="cuda", dtype="float32"))
    document, questions = generate_document(document_id="d", tokens=2048, n_questions=4, seed=5)
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, document["text"], BUILD)
    tails = [loaded.template.encode_question(loaded.tokenizer, q["question"]) for q in questions]
    found = {}
    for recipe in (Recipe(method="dense"), Recipe(method=method, top_k=1 << 20)):  # type: ignore[arg-type]
        found[recipe.method] = tail_logits(open_context(store, manifest, loaded, recipe), tails, recipe, steps=3)
    torch.testing.assert_close(found[method], found["dense"], atol=1e-3, rtol=1e-3)


def test_cuda_answers_are_the_cpus(tmp_path: Path) -> None:
    answers = {}
    document, questions = generate_document(document_id="d", tokens=4096, n_questions=12, seed=6)
    for device in ("cpu", "cuda"):
        loaded = load_model(ModelConfig(device=device, dtype="float32"))
        store = new_store(tmp_path / device)
        manifest = store_document(loaded, store, document["text"], BUILD)
        recipe = Recipe()
        context = open_context(store, manifest, loaded, recipe)
        rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=24))
        answers[device] = [row["answer"] for row in rows]
    same = sum(a == b for a, b in zip(answers["cpu"], answers["cuda"], strict=True))
    assert same >= 11


def test_a_prefill_on_the_card_is_the_cpus(tmp_path: Path) -> None:
    """Keys, values and lists, brought to the host while the card went on: packed, in chunks that cross borders."""
    texts = [str(generate_document(document_id="d", tokens=n, n_questions=1, seed=n)[0]["text"]) for n in (900, 1500)]
    units = {}
    for device in ("cpu", "cuda"):
        loaded = load_model(ModelConfig(device=device, dtype="float32"))
        contexts = [encode(loaded, "d", text) for text in texts]
        units[device] = list(prefill_units(loaded, contexts, BUILD))
    for (number, mine), (other, theirs) in zip(units["cpu"], units["cuda"], strict=True):
        assert number == other
        for name in ("keys", "values", "queries"):
            if mine[name]:
                ours, cuda = (torch.frombuffer(bytearray(u[name]), dtype=torch.float32) for u in (mine, theirs))
                torch.testing.assert_close(cuda, ours, atol=2e-3, rtol=1e-3)
        lists = [torch.frombuffer(bytearray(u["lists"]), dtype=torch.int32) for u in (mine, theirs) if u["lists"]]
        if lists:
            assert (lists[0] == lists[1]).float().mean() > 0.98  # rounding may swap keys that score alike
