"""The training forward pass over the modules of a stock `LlamaForCausalLM`.

transformers reads a jump in `position_ids` as the border of a packed sequence and masks attention across it. Position
jumps are what teaches the model long distances, so training calls the layers itself, with plain causal attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def hidden_states(model: LlamaForCausalLM, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Final hidden states [batch, length, hidden] of `token_ids` at RoPE `positions`, both [batch, length]."""
    config: Any = model.config
    batch, length = token_ids.shape
    angles = positions[:, None, :, None].float() * model.model.rotary_emb.inv_freq
    x = model.model.embed_tokens(token_ids)
    cos, sin = angles.cos(), angles.sin()
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        h = F.rms_norm(x, (config.hidden_size,), layer.input_layernorm.weight, config.rms_norm_eps)
        attention = layer.self_attn
        query, key, value = (
            projection(h).view(batch, length, -1, config.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key = _rotate(key, cos, sin).repeat_interleave(group, dim=1)
        output = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), key, value.repeat_interleave(group, dim=1), is_causal=True
        )
        x = x + attention.o_proj(output.transpose(1, 2).reshape(batch, length, -1))
        h = F.rms_norm(x, (config.hidden_size,), layer.post_attention_layernorm.weight, config.rms_norm_eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return F.rms_norm(x, (config.hidden_size,), model.model.norm.weight, config.rms_norm_eps)
