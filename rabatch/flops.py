"""What a prefill computes, from a model's config alone.

Weights are counted on a model without memory (torch's ``meta`` device), which is right for whatever the architecture
does between its attentions: gated or plain MLPs, fused projections, experts. A multiplication and an addition are two
operations; norms, rotations and softmax are left out, as usual: they are below a percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rabatch.config import ModelConfig
from rabatch.errors import ModelError
from rabatch.models import ModelGeometry, first_line, geometry_of, read_config

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")


@dataclass(frozen=True)
class ModelWork:
    """What a model multiplies.

    Args:
        geometry: Shapes of the attention.
        windows: Per layer: the tokens a query sees at most, 0 for all before it.
        parameters: All weights.
        token_weights: Weights that every token is multiplied with, embeddings and output left out; of experts those
            that are active.
        output_weights: Of the output layer, needed once per forward pass.
    """

    geometry: ModelGeometry
    windows: tuple[int, ...]
    parameters: int
    token_weights: int
    output_weights: int

    def attention_pairs(self, n_tokens: int) -> int:
        """Pairs of query and key that causal attention computes, per query head, over all layers."""
        return sum(_pairs(n_tokens, window) for window in self.windows)

    def attention_flops(self, n_tokens: int) -> int:
        """Scores and weighted sums: 4 x head_dim for a pair."""
        return 4 * self.geometry.head_dim * self.geometry.n_query_heads * self.attention_pairs(n_tokens)

    def gemm_flops(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Projections and MLPs of every token, the output layer of one token per chunk."""
        return 2 * (n_tokens * self.token_weights + -(-n_tokens // chunk_tokens) * self.output_weights)

    def prefill_flops(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Of one document."""
        return self.gemm_flops(n_tokens, chunk_tokens=chunk_tokens) + self.attention_flops(n_tokens)


def model_work(config: ModelConfig) -> ModelWork:
    """Reads the model's config; weights are neither read nor made.

    Raises:
        ModelError: It cannot be read, or is of an unsupported architecture.
    """
    text_config = read_config(config)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(text_config, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError("model", config.name, f"cannot be made from its config ({first_line(error)})") from error
    output = model.get_output_embeddings()
    token_weights, every = 0.0, 0
    counted: set[int] = set()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        every += sum(weight.numel() for weight in own if id(weight) not in counted)
        counted.update(map(id, own))
        if module is not output and not isinstance(module, torch.nn.Embedding):
            share = _active_share(text_config) if "experts" in name.split(".") else 1.0
            token_weights += share * sum(weight.numel() for weight in own if weight.ndim >= 2)
    return ModelWork(
        geometry=geometry_of(text_config),
        windows=sliding_windows(text_config),
        parameters=every,
        token_weights=round(token_weights),
        output_weights=output.weight.numel(),
    )


def sliding_windows(text_config: Any) -> tuple[int, ...]:
    """Per layer the native window in tokens, 0 for full attention."""
    n_layers = text_config.num_hidden_layers
    window = getattr(text_config, "sliding_window", None) or 0
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return (window,) * n_layers


def _active_share(text_config: Any) -> float:
    experts, active = _first(text_config, _EXPERTS), _first(text_config, _ACTIVE)
    return active / experts if experts and active else 1.0


def _first(text_config: Any, names: tuple[str, ...]) -> int:
    return next((value for name in names if (value := getattr(text_config, name, None))), 0)


def _pairs(n_tokens: int, window: int) -> int:
    seen = min(n_tokens, window) if window else n_tokens
    return seen * (seen + 1) // 2 + (n_tokens - seen) * seen
