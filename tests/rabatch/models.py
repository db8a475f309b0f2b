"""Tiny random models of each supported architecture, saved with the demo tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from rabatch.config import ModelConfig
from rabatch.models import local_path

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 4059,
    "eos_token_id": 4060,
    "pad_token_id": 4061,
    "initializer_range": 0.2,
}
SLIDING = 96
"""Native window of the sliding layers below, in tokens: shorter than the test documents."""

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": SLIDING, "head_dim": 16}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": SLIDING, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": SLIDING, "query_pre_attn_scalar": 32}),
}
SLIDING_LAYERS = {
    "qwen2-sliding": {1, 2},
    "mistral-sliding": {0, 1, 2},
    "gemma2": {0, 2},
    "gemma3": {0, 1, 2},
}


def save_tiny_model(name: str, folder: Path) -> Path:
    """Writes a random model of the architecture `name` into `folder`."""
    kind, extra = ARCHITECTURES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, kind)(**{**COMMON, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in local_path(ModelConfig()).glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder
