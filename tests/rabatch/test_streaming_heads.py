"""Streaming heads, from prefill to answers: they keep the static set only, and attend it and the tail, in every recipe.

The reference is plain transformers with a mask of its own for each head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from rabatch.attention.caches import ContextCache
from rabatch.attention.context import QuestionAttention
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError
from rabatch.executor import Executor
from rabatch.fingerprint import index_fields
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.prefill import encode, prefill_units, run
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

TOLERANCE = 1e-5
FULL = 1 << 20
STEPS = 3
SINK, WINDOW = 8, 32
BUILD = BuildConfig(
    sink_tokens=SINK, window_tokens=WINDOW, kv_dtype="float32", prefill_chunk_tokens=128, query_top_k=16
)
QUESTIONS = ["What is the gate code?", "Who manages the old mill near the river, and why?", "When?"]
RECIPES: list[dict[str, Any]] = [
    {"method": "dense"},
    *({"method": method, "top_k": FULL, "question_attention": "exact"} for method in ("flat", "graph", "scan")),
    *({"method": method, "top_k": FULL, "question_attention": "index"} for method in ("flat", "graph", "scan")),
    {"method": "graph", "top_k": FULL, "question_attention": "index", "budget": "fixed", "estimate": False},
]
# One with GQA (four query heads, two KV heads), one with sliding layers between, and the demo model.
MODELS = ["qwen3", "gemma2", "demo"]


class Setting(NamedTuple):
    loaded: LoadedModel
    pattern: list[list[int]]
    store: IndexStore
    manifest: Manifest


def pattern_for(loaded: LoadedModel) -> list[list[int]]:
    """The first layer keeps all, the last none, those between alternate; also where a layer slides by nature."""
    n_layers, n_heads = loaded.geometry.n_layers, loaded.geometry.n_kv_heads
    rows = [[(layer + head) % 2 for head in range(n_heads)] for layer in range(n_layers)]
    rows[0], rows[-1] = [1] * n_heads, [0] * n_heads
    return rows


@pytest.fixture(scope="module", params=MODELS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp(request.param)
    name = "demo" if request.param == "demo" else str(save_tiny_model(request.param, folder / "model"))
    loaded = load_model(ModelConfig(name=name, device="cpu", dtype="float32"))
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    store, pattern = new_store(folder), pattern_for(loaded)
    build = dataclasses.replace(BUILD, head_pattern=pattern)
    return Setting(loaded, pattern, store, store_document(loaded, store, document["text"], build))


def tails(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.template.encode_question(loaded.tokenizer, question) for question in QUESTIONS]


def reference_logits(setting: Setting, tail: list[int]) -> Tensor:
    """Of a sequence without a cache: [STEPS, vocab]. Context tokens see what the model lets them, tail tokens of a
    streaming head only first and last tokens of the context, and the tail."""
    loaded, pattern, store, manifest = setting
    n = manifest.context_tokens
    middle = torch.zeros(n, dtype=torch.bool)
    middle[SINK : n - WINDOW] = True

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
        group = query.shape[1] // key.shape[1]
        window = kwargs.get("sliding_window") or 0
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap"):
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        tokens = torch.arange(key.shape[2])
        age = tokens[:, None] - tokens
        hidden = (age < 0) | (age >= (window or len(tokens)))
        hidden = hidden.expand(query.shape[1], -1, -1).clone()
        for head in range(key.shape[1]):
            if not pattern[module.layer_idx][head] and not window:  # type: ignore[index]
                hidden[head * group : (head + 1) * group, n:, :n] |= middle
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_by_head", attend)
    model = AutoModelForCausalLM.from_pretrained(
        loaded.model.name_or_path, dtype=torch.float32, attn_implementation="masked_by_head"
    ).eval()
    ids, found = store.read_tokens(manifest).token_ids.tolist() + tail, []
    for _ in range(STEPS):
        with torch.inference_mode():
            found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids = [*ids, int(found[-1].argmax())]
    return torch.stack(found)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[Tensor]:
    return [reference_logits(setting, tail) for tail in tails(setting.loaded)]


def found_logits(setting: Setting, **recipe: Any) -> Tensor:
    made = Recipe(**recipe)
    context = open_context(setting.store, setting.manifest, setting.loaded, made)
    return tail_logits(context, tails(setting.loaded), made, STEPS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
def test_full_budget_equals_a_mask_per_head(setting: Setting, expected: list[Tensor], recipe: dict[str, Any]) -> None:
    found = found_logits(setting, **recipe)
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row, wanted, atol=TOLERANCE * float(wanted.abs().max()), rtol=TOLERANCE)
