"""Attention between full and streaming, by a gate per KV head, through which gradients go to the gates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rabatch.attention.seam import AttentionCall

_BLOCK_ROWS = 512
"""Queries attended together where not every key is seen: their scores are all that is held of the square."""


class GatedAttention:
    """Causal attention of whole sequences: of each KV head ``gate x full + (1 - gate) x streaming``.

    Layers with a sliding window of their own attend it, and have no gate.

    Args:
        gates: float32 [n_layers, n_kv_heads]; None: every head attends everything (the teacher).
        sink_tokens, recent_tokens: What a streaming head sees of the tokens up to its query: the first, and the last,
            that of the query itself among them.

    Attributes:
        windows: Native sliding window by layer, 0 for full attention; known after the first pass.
    """

    def __init__(self, gates: Tensor | None, *, sink_tokens: int, recent_tokens: int) -> None:
        self.gates = gates
        self.sink_tokens, self.recent_tokens = sink_tokens, recent_tokens
        self.windows: dict[int, int] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        self.windows[call.layer] = call.sliding_window
        n_tokens = call.key.shape[2]
        group = call.query.shape[1] // call.key.shape[1]
        if call.sliding_window:
            out = banded(call, sink=0, recent=call.sliding_window)
        elif self.gates is None or n_tokens <= self.sink_tokens + self.recent_tokens:
            out = full(call)
        else:
            gate = self.gates[call.layer].repeat_interleave(group)[:, None, None].to(call.query.dtype)
            streaming = banded(call, sink=self.sink_tokens, recent=self.recent_tokens)
            out = torch.lerp(streaming, full(call), gate)  # exact at 0 and at 1
        return out.transpose(1, 2)


def full(call: AttentionCall) -> Tensor:
    """Causal attention to every key: [batch, n_query_heads, tokens, head_dim]."""
    if call.softcap is not None:
        return banded(call, sink=0, recent=call.key.shape[2])
    keys, values = _of_queries(call)
    return F.scaled_dot_product_attention(call.query, keys, values, is_causal=True, scale=call.scaling)


def banded(call: AttentionCall, *, sink: int, recent: int) -> Tensor:
    """Causal attention to the first `sink` keys and to the `recent` last of each query, its own among them."""
    keys, values = _of_queries(call)
    n_tokens = keys.shape[2]
    parts = []
    for start in range(0, n_tokens, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n_tokens)
        low = max(0, start - recent + 1)  # from here on the block's queries see keys for being recent
        first = min(sink, low)
        queries = torch.arange(start, stop, device=keys.device)[:, None]
        others = torch.cat([torch.arange(first), torch.arange(low, stop)]).to(keys.device)
        seen = (others <= queries) & ((others > queries - recent) | (others < sink))
        mine, theirs = (_joined(states, first, low, stop) for states in (keys, values))
        rows = call.query[:, :, start:stop]
        if call.softcap is None:
            parts.append(F.scaled_dot_product_attention(rows, mine, theirs, attn_mask=seen, scale=call.scaling))
        else:  # its scores are not kept for the way back, they are made again
            bound = (call.softcap, call.scaling)
            parts.append(checkpoint(_capped, rows, mine, theirs, seen, *bound, use_reentrant=False))
    return torch.cat(parts, 2)


def _joined(states: Tensor, first: int, low: int, stop: int) -> Tensor:
    """The `first` rows, and those from `low` to `stop`."""
    recent = states[:, :, low:stop]
    return torch.cat([states[:, :, :first], recent], 2) if first else recent


def _capped(rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float, scaling: float) -> Tensor:
    """Attention with bounded scores (Gemma 2), which torch's own has not."""
    scores = (rows @ keys.transpose(-1, -2)).to(torch.promote_types(rows.dtype, torch.float32)) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -math.inf).softmax(-1).to(values.dtype) @ values


def _of_queries(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Keys and values for every query head."""
    group = call.query.shape[1] // call.key.shape[1]
    if group == 1:
        return call.key, call.value
    return call.key.repeat_interleave(group, 1), call.value.repeat_interleave(group, 1)
