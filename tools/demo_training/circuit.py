"""Circuit initialisation: weights in which finding and copying is roughly wired up before training.

From an ordinary initialisation a model this small does not begin to retrieve within millions of tokens. So layer 0
gets attention kernels at fixed offsets (a constant embedding dimension drives RoPE), which write codes of the preceding
tokens into each position; the last layers match those codes in RoPE dimensions that hardly rotate, and copy what they
find. All embeddings have the same norm: RMSNorm would otherwise distort the kernels.
"""

import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from rabatch.demo.corpus import ANSWER_TEMPLATE, KINDS, QUESTION_TEMPLATE, compose_document

CODE = slice(1, 65)
"""Residual dimensions of a token's own code; dimension 0 is constant, 128 makes the norms equal."""
PREVIOUS_CODE = slice(65, 129)
NORM_DIM = 128
WINDOW_CODE = slice(129, 192)

# One kernel per query head of layer 0: (offset in tokens, first RoPE pair used, amplitude, what it writes). A kernel
# that begins at a later pair is wider.
KERNELS = (
    (1, 0, 5.0, "previous"), (6, 4, 3.0, "window"), (5, 3, 3.0, "window"),
    (2, 0, 5.0, "free"), (7, 4, 3.0, "window"), (3, 0, 5.0, "free"),
)  # fmt: skip
KERNEL_PAIRS = 16
"""RoPE pairs that the kernels of layer 0 use; pairs from 18 on rotate so little that content is matched there."""
MATCH_FROM_PAIR = 18
CONSTANT = 0.4
CODE_NORM = 0.8
KEY_SCALE = 2.0
MATCH_WEIGHTS = ((1.0, 0.7), (0.5, 1.0), (0.2, 1.0))
"""Per query head of a group: how much the own code and the window code count in the match."""


def token_frequencies(tokenizer: Tokenizer, vocab_size: int, seed: int, n_documents: int = 40) -> Tensor:
    """Relative frequencies [vocab_size] of the tokens in demo documents with questions."""
    rng = Random(f"frequencies/{seed}")
    counts = torch.ones(vocab_size)
    for _ in range(n_documents):
        text, placed = compose_document(rng, tokens=1024, question_kinds=[*KINDS] * 3, fact_share=0.3)
        for item in placed:
            text += QUESTION_TEMPLATE.format(question=item.fact.question)
            text += ANSWER_TEMPLATE.format(expected=item.fact.expected)
        counts += torch.bincount(torch.tensor(tokenizer.encode(text).ids), minlength=vocab_size)
    return counts / counts.sum()


def _kernel_query(inverse_frequencies: Tensor, offset: int, first_pair: int, amplitude: float, scale: float) -> Tensor:
    """Query weights [head_dim] that attend `offset` tokens back, for keys that are constant in the kernel's pairs."""
    amplitudes = torch.zeros(len(inverse_frequencies))
    amplitudes[first_pair : first_pair + 4] = amplitude
    amplitudes[first_pair + 4 : KERNEL_PAIRS] = 1.0
    query = amplitudes * 8 / KEY_SCALE / scale
    angles = -offset * inverse_frequencies
    return torch.cat([query * angles.cos(), query * angles.sin()])


def _init_embedding(weight: Tensor, frequencies: Tensor, generator: torch.Generator) -> None:
    # Very common tokens get a smaller code: they say little about where a fact is.
    rarity = (1 - 0.25 * torch.log10((frequencies * 3000).clamp(min=1))).clamp(0.25, 1)
    code = F.normalize(torch.randn(weight.shape[0], 64, generator=generator), dim=1) * CODE_NORM
    weight.zero_()
    weight[:, 0] = CONSTANT
    weight[:, CODE] = code * rarity[:, None]
    weight[:, NORM_DIM] = CODE_NORM * (1 - rarity**2).sqrt()


@torch.no_grad()
def initialise_circuit(model: LlamaForCausalLM, frequencies: Tensor, seed: int) -> None:
    """Set all weights of `model` (hidden size 192, head_dim 64, two KV heads of three query heads) in place."""
    config: Any = model.config
    head, hidden = config.head_dim, config.hidden_size
    if (hidden, head, config.num_attention_heads, config.num_key_value_heads) != (192, 64, 6, 2):
        raise ValueError("the circuit is laid out for hidden size 192, head_dim 64, 6 query heads and 2 KV heads")
    generator = torch.Generator().manual_seed(seed)
    pairs = head // 2
    inverse_frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2).float() / head)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1 / math.sqrt(weight.shape[1]))
        else:
            weight.fill_(1.0)
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.mul_(10)
        layer.mlp.up_proj.weight.mul_(10)
    _init_embedding(model.model.embed_tokens.weight, frequencies, generator)

    constant_after_norm = CONSTANT / math.sqrt((CODE_NORM**2 + CONSTANT**2) / hidden)
    identity = torch.eye(64)
    n_window = WINDOW_CODE.stop - WINDOW_CODE.start
    attention = model.model.layers[0].self_attn
    for kv_head in range(config.num_key_value_heads):
        rows = slice(kv_head * head, (kv_head + 1) * head)
        key, value = attention.k_proj.weight[rows], attention.v_proj.weight[rows]
        key.mul_(0.3)
        key[:, 0] = 0
        key[:KERNEL_PAIRS, 0] = KEY_SCALE / constant_after_norm
        value.mul_(0.1)
        value[:, CODE] += identity
    for index, (offset, first_pair, amplitude, target) in enumerate(KERNELS):
        rows = slice(index * head, (index + 1) * head)
        query, output = attention.q_proj.weight[rows], attention.o_proj.weight[:, rows]
        query.mul_(0.3)
        query[:, 0] = _kernel_query(inverse_frequencies, offset, first_pair, amplitude, constant_after_norm)
        if target == "previous":
            output.mul_(0.1)
            output[PREVIOUS_CODE] += identity * 0.065
            output[NORM_DIM] = 0
        elif target == "window":
            output.mul_(0.1)
            output[WINDOW_CODE] += identity[:n_window] * 0.12

    still = torch.tensor([*range(MATCH_FROM_PAIR, pairs), *range(pairs + MATCH_FROM_PAIR, head)])
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers[2:]:
        attention = layer.self_attn
        for kv_head in range(config.num_key_value_heads):
            rows = slice(kv_head * head, (kv_head + 1) * head)
            by_previous = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][: len(still)]
            by_window = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][: len(still), :n_window]
            key, value = attention.k_proj.weight[rows], attention.v_proj.weight[rows]
            key.mul_(0.5)
            match = torch.zeros(len(still), hidden)
            match[:, PREVIOUS_CODE] = by_previous * 1.5
            match[:, WINDOW_CODE] = by_window * 1.5
            key[still] = match
            key[:, 0] = 0
            key[5:11, 0] = 0.8  # with the query below: a penalty on the nearest tokens
            value.mul_(0.2)
            value[:, CODE] += identity
            for index in range(group):
                columns = slice((kv_head * group + index) * head, (kv_head * group + index + 1) * head)
                own, window = MATCH_WEIGHTS[index]
                query, output = attention.q_proj.weight[columns], attention.o_proj.weight[:, columns]
                query.mul_(0.5)
                match = torch.zeros(len(still), hidden)
                match[:, CODE] = by_previous * (2.5**2 / 1.5 * own)
                match[:, WINDOW_CODE] = by_window * (1.5**2 / 1.5 * window)
                query[still] = match
                query[:, 0] = 0
                query[5:11, 0] = -0.8
                output.mul_(0.2)
                output[CODE] += identity * 0.2
