"""Operations of a prefill: by hand, and as torch counts them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from rabatch.config import ModelConfig
from rabatch.flops import model_work
from tests.rabatch.models import ARCHITECTURES, SLIDING, SLIDING_LAYERS, save_tiny_model

BEFORE, COUNTED = 2 * SLIDING, 10


def saved(config: transformers.PretrainedConfig, folder) -> ModelConfig:
    config.save_pretrained(folder)
    return ModelConfig(name=str(folder))


def test_llama_3_8b_by_hand(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    work = model_work(saved(config, tmp_path))
    assert work.parameters == 8_030_261_248
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # q and o, k and v, gate up and down
    assert work.token_weights == 32 * layer
    assert work.output_weights == 128256 * 4096
    n = 131072
    assert work.attention_flops(n) == 32 * 32 * 4 * 128 * n * (n + 1) // 2
    assert work.gemm_flops(n, chunk_tokens=2048) == 2 * (n * 32 * layer + 64 * 128256 * 4096)
    assert work.prefill_flops(n, chunk_tokens=2048) == pytest.approx(6.34e15, rel=0.01)


def test_of_experts_the_active_ones_count(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    work = model_work(saved(config, tmp_path))
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 32 * 8, 3 * 32 * 48
    assert work.token_weights == 2 * (attention + router + 2 * expert)
    assert work.parameters > 2 * 8 * expert


def test_an_ungated_mlp_is_counted_as_it_is(tmp_path):
    config = transformers.PhiConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    assert model_work(saved(config, tmp_path)).token_weights == 2 * (4 * 32 * 32 + 2 * 32 * 48)


def test_a_sliding_layer_sees_its_window(tmp_path):
    work = model_work(ModelConfig(name=str(save_tiny_model("gemma2", tmp_path))))
    assert work.windows == (SLIDING, 0, SLIDING)
    full, local = sum(range(1, 201)), sum(min(n, SLIDING) for n in range(1, 201))
    assert work.attention_pairs(200) == full + 2 * local


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_counts_the_same(name, tmp_path):
    """Token by token, for then every query computes the keys it sees and no others."""
    folder = save_tiny_model(name, tmp_path)
    work = model_work(ModelConfig(name=str(folder)))
    assert {n for n, window in enumerate(work.windows) if window} == SLIDING_LAYERS.get(name, set())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    cache = transformers.DynamicCache(config=model.config)
    counter = FlopCounterMode(display=False)
    ids = torch.arange(5, 5 + BEFORE + COUNTED)[None]
    with torch.inference_mode():
        model(input_ids=ids[:, :BEFORE], past_key_values=cache, use_cache=True)
        with counter:
            for token in range(BEFORE, BEFORE + COUNTED):
                model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
    attention = work.attention_flops(BEFORE + COUNTED) - work.attention_flops(BEFORE)
    assert counter.get_total_flops() == pytest.approx(work.gemm_flops(COUNTED, chunk_tokens=1) + attention, rel=0.05)
    assert attention > 0.06 * counter.get_total_flops()  # else the check would miss its absence
